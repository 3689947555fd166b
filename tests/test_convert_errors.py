"""``tove-llava convert``: what is refused and how, interruptions, and the command itself."""

import contextlib
import errno
import hashlib
import json
import os
import shutil

import pytest
import torch
from convert_parts import (
    make_original,
    original_tensors,
    write_language,
    write_lora,
    write_original,
    write_projector,
    write_shards,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stage_parts import edit_manifest

from tove_llava import convert_checkpoint, load_model, open_llava
from tove_llava.checkpoints.base import FORMATS, LlavaFormat, find_format, register_format
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.checkpoints.tensors import file_tensors, folder_tensors
from tove_llava.cli import main
from tove_llava.core.errors import CheckpointError, ConfigError, ToveError


def snapshot(folder):
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def edit(file, **changes):
    data = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**data, **changes}.items() if v != "gone"}))


def refused(folder, tmp_path, *words, error=ToveError, to="tove", **options):
    """Conversion fails with these words, changes no folder and leaves nothing behind."""
    before, around = snapshot(folder), sorted(os.listdir(tmp_path))
    with pytest.raises(error) as failure:
        convert_checkpoint(folder, tmp_path / "out", to, **options)
    for word in words:
        assert word in str(failure.value), str(failure.value)
    assert snapshot(folder) == before
    assert sorted(os.listdir(tmp_path)) == around
    return str(failure.value)


@pytest.fixture
def whole(tmp_path, world):
    return shutil.copytree(world.whole, tmp_path / "llava")


@pytest.fixture
def hf(tmp_path, world):
    return shutil.copytree(world.hf, tmp_path / "hf")


SHARD, INDEX = "pytorch_model-00002-of-00003.bin", "pytorch_model.bin.index.json"


# -- not a LLaVA ------------------------------------------------------------------------------------------------------


def test_other_models_are_no_llava(tmp_path, world):
    message = refused(world.base, tmp_path, "not a LLaVA", "'llama'", error=CheckpointError)
    assert all(name in message for name in ("original", "llava-hf", "tove"))
    refused(world.clip, tmp_path, "clip_vision_model", error=CheckpointError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "config.json", error=CheckpointError)
    with pytest.raises(CheckpointError, match="not a folder"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("whole", {"mm_projector_type": "linear"}, ["config.json", "mm_projector_type", "'linear'", "mlp2x_gelu"]),
        ("whole", {"mm_projector_type": "gone"}, ["config.json", "mm_projector_type"]),
        ("whole", {"mm_vision_select_feature": "cls_patch"}, ["config.json", "cls_patch"]),
        ("whole", {"image_aspect_ratio": "anyres"}, ["config.json", "anyres"]),
        ("whole", {"mm_patch_merge_type": "spatial_unpad"}, ["config.json", "spatial_unpad"]),
        ("whole", {"mm_use_im_start_end": True}, ["config.json", "mm_use_im_start_end"]),
        ("whole", {"model_type": "llava_mpt"}, ["model_type", "llava_mpt"]),
        ("whole", {"s2": True}, ["config.json", "s2"]),
        ("whole", {"quantization_config": {"load_in_4bit": True}}, ["config.json", "quantization_config"]),
        ("hf", {"vision_feature_select_strategy": "full"}, ["class token"]),
        ("hf", {"vision_feature_layer": [-2, -5]}, ["vision_feature_layer"]),
        ("hf", {"vision_config": {"model_type": "siglip_vision_model"}}, ["siglip_vision_model"]),
        ("hf", {"model_type": "llava_next"}, ["llava_next"]),
        ("hf", {"quantization_config": {"load_in_8bit": True}}, ["quantised"]),
    ],
)
def test_other_llavas_are_refused(request, tmp_path, layout, change, words):
    folder = request.getfixturevalue(layout)
    edit(folder / "config.json", **change)
    refused(folder, tmp_path, *words, error=ConfigError if layout == "whole" else ToveError)


# -- damaged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bin", "old", "safetensors"])
@pytest.mark.parametrize("length", [0, 100, 0.5, 0.99])
def test_truncated_shard(tmp_path, world, kind, length):
    folder = write_original(tmp_path / "llava", world.model, world.clip, kind=kind)
    shard = next(folder.glob("*-00002-of-00003.*"))
    data = shard.read_bytes()
    shard.write_bytes(data[: length if isinstance(length, int) else int(len(data) * length)])
    refused(folder, tmp_path, shard.name, "damaged", error=CheckpointError)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(folder)


def test_missing_shard_and_index(tmp_path, whole):
    (whole / SHARD).unlink()
    refused(whole, tmp_path, SHARD, "1 of 3 shards", error=CheckpointError)
    (whole / INDEX).unlink()
    refused(whole, tmp_path, INDEX, error=CheckpointError)
    for file in whole.glob("*.bin"):
        file.unlink()
    refused(whole, tmp_path, "holds no weights", error=CheckpointError)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *((INDEX, text, []) for text in ("", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x.bin"}}')),
        (SHARD, {"other": torch.ones(1)}, ["lacks"]),
        (SHARD, [torch.ones(1)], ["not a table of tensors"]),
        ("generation_config.json", "[", []),
        ("generation_config.json", '{"temperature": "warm", "cache_implementation": 3}', []),
        ("config.json", {"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ("tokenizer.model", None, []),
    ],
)
def test_damaged_file(tmp_path, whole, name, content, words):
    if content is None:
        (whole / name).unlink()
    elif name == SHARD:
        torch.save(content, whole / name)
    elif name == "config.json":
        edit(whole / name, **content)
    else:
        (whole / name).write_text(content)
    refused(whole, tmp_path, *(words or [name.removesuffix(".model")]), error=CheckpointError)


@pytest.mark.parametrize("value", [3, {"hidden_size": 33}])
def test_damaged_vision_config(tmp_path, hf, value):
    edit(hf / "config.json", vision_config=value)
    refused(hf, tmp_path, "config.json", error=CheckpointError)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(80, 47), ["[80, 47]", "[80, 48]"]),
        ("model.embed_tokens.weight", torch.zeros(599, 48), ["[599, 48]", "[600, 48]"]),
        ("model.mm_projector.0.weight", torch.zeros(48, 31), ["projector", "[48, 31]"]),
        ("model.mm_projector.2.bias", None, ["projector", "linear_2.bias", "missing"]),
        ("lm_head.weight", None, ["lm_head.weight", "missing"]),
        ("model.embed_tokens.weight", None, ["model.embed_tokens.weight", "missing"]),
        ("model.layers.1.mlp.up_proj.weight", None, ["model.layers.1.mlp.up_proj.weight", "missing"]),
        ("model.layers.2.mlp.up_proj.weight", torch.zeros(80, 48), ["model.layers.2.mlp.up_proj.weight"]),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(80, 48, dtype=torch.uint8), ["quantised"]),
        ("model.image_newline", torch.zeros(48), ["model.image_newline"]),
        ("something.else", torch.zeros(48), ["something.else"]),
        ("model.vision_tower.vision_tower.vision_model.embeddings.class_embedding", torch.zeros(31),
         ["CLIP", "class_embedding", "[31]", "[32]"]),
    ],
)  # fmt: skip
def test_tensors_that_config_json_does_not_ask_for(tmp_path, world, whole, name, value, words):
    changed = {k: v for k, v in original_tensors(world.model).items() if k != name}
    write_shards(whole, changed if value is None else {**changed, name: value})
    refused(whole, tmp_path, str(whole), *words)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00", '{"a":' * 100000])
def test_damaged_config(tmp_path, world, whole, hf, text):
    for folder in (whole, hf, shutil.copytree(world.tove, tmp_path / "tove")):
        (folder / "config.json").write_text(text)
        to = "original" if folder.name == "tove" else "tove"
        refused(folder, tmp_path, "config.json", error=CheckpointError, to=to)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "many"), ("num_attention_heads", 7), ("rms_norm_eps", None), ("rope_scaling", 3),
        ("rope_scaling", {"type": "sideways"}), ("mm_vision_tower", 3), ("mm_vision_select_layer", "gone"),
        ("mm_vision_select_layer", -9), ("mm_hidden_size", 64), ("vocab_size", -1), ("hidden_act", "unheard"),
    ],
)  # fmt: skip
def test_values_in_config_that_cannot_be(tmp_path, whole, key, value):
    edit(whole / "config.json", **{key: value})
    refused(whole, tmp_path)


def test_pickles_run_no_code(tmp_path, whole):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    for content in ({"a": Evil()}, Evil()):
        torch.save(content, whole / SHARD)
        refused(whole, tmp_path, SHARD, "pickled", error=CheckpointError)
    assert not (tmp_path / "run").exists()


def test_tokenizer_without_the_image_token(tmp_path, hf):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = json.loads((hf / name).read_text())
        data.pop("additional_special_tokens", None)
        if "added_tokens" in data:
            data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<image>"]
        (hf / name).write_text(json.dumps(data))
    (hf / "added_tokens.json").unlink()
    refused(hf, tmp_path, "600", "image token", "no such token", error=CheckpointError)
    edit(hf / "config.json", image_token_index=45)
    refused(hf, tmp_path, "45", "image token", error=CheckpointError)


def test_half_written_folder_of_our_own(tmp_path, world):
    folder = shutil.copytree(world.tove, tmp_path / "tove")
    (folder / "trained.safetensors").write_bytes(b"")
    refused(folder, tmp_path, "trained.safetensors", error=CheckpointError, to="original")
    shutil.rmtree(folder / "language")
    refused(folder, tmp_path, "language", error=CheckpointError, to="original")
    (folder / "tove_llava.json").unlink()
    refused(folder, tmp_path, "tove_llava.json", "not a complete", error=CheckpointError, to="original")


# -- stage 1 and LoRA -------------------------------------------------------------------------------------------------


def test_folders_without_a_language_model_ask_for_it(tmp_path, world):
    for folder in (world.projector, world.lora):
        refused(folder, tmp_path, "--base", "lmsys/vicuna-7b-v1.5", error=ConfigError)
        with pytest.raises(ConfigError, match="--base"):
            load_model(folder)
    refused(world.whole, tmp_path, "--base", base=str(world.base), error=ConfigError)
    refused(world.hf, tmp_path, "--base", base=str(world.base), error=ConfigError, to="original")
    refused(world.projector, tmp_path, "nowhere", base=str(tmp_path / "nowhere"), error=CheckpointError)


def test_another_language_model(tmp_path, world):
    other = write_language(tmp_path / "other", make_original(width=64))
    for folder in (world.projector, world.lora):
        refused(folder, tmp_path, "hidden_size", "48", "64", "--base", base=str(other), error=CheckpointError)


def test_adapters_that_do_not_fit(tmp_path, world):
    base = {"base": str(world.base)}
    deeper, _ = write_lora(tmp_path / "deeper", make_original(layers=3), world.clip)
    refused(deeper, tmp_path, "does not fit", error=CheckpointError, **base)
    folder, _ = write_lora(tmp_path / "lora", world.model, world.clip)
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, tmp_path, "adapter_model.safetensors", "does not exist", error=CheckpointError, **base)
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    refused(folder, tmp_path, "'x'", error=CheckpointError, **base)
    folder, _ = write_lora(tmp_path / "lora-2", world.model, world.clip)
    (folder / "non_lora_trainables.bin").unlink()
    refused(folder, tmp_path, "non_lora_trainables.bin", error=CheckpointError, **base)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")],
)
def test_adapters_of_other_kinds(tmp_path, world, change, word):
    folder, _ = write_lora(tmp_path / "lora", world.model, world.clip)
    edit(folder / "adapter_config.json", **change)
    refused(folder, tmp_path, word, "merge_lora_weights.py", error=ConfigError, base=str(world.base))


def test_trained_embeddings_next_to_adapters_or_projector(tmp_path, world):
    embeddings = {"model.embed_tokens.weight": torch.zeros(600, 48)}
    folder, _ = write_lora(tmp_path / "lora", world.model, world.clip)
    others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    torch.save(others | {f"base_model.model.{n}": x for n, x in embeddings.items()}, folder / "non_lora_trainables.bin")
    refused(folder, tmp_path, "embed_tokens", error=ConfigError, base=str(world.base))
    folder = write_projector(tmp_path / "projector", world.model, world.clip)
    torch.save(torch.load(folder / "mm_projector.bin", weights_only=True) | embeddings, folder / "mm_projector.bin")
    refused(folder, tmp_path, "embed_tokens", error=ConfigError, base=str(world.base))


# -- targets ----------------------------------------------------------------------------------------------------------


def test_targets_that_are_refused(tmp_path, world):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        convert_checkpoint(world.whole, tmp_path / "used")
    assert (tmp_path / "used" / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match="lies in the folder"):
        convert_checkpoint(world.whole, world.whole / "inside")
    for folder, to in ((world.whole, "original"), (world.hf, "llava-hf"), (world.tove, "tove")):
        refused(folder, tmp_path, "already", error=ConfigError, to=to)
    refused(world.whole, tmp_path, "Did you mean 'llava-hf'", error=ConfigError, to="llava_hf")
    refused(world.whole, tmp_path, "unknown", error=ConfigError, template="v9")
    refused(world.whole, tmp_path, "unknown preset", error=ConfigError, preset="vicuna-8b")


@pytest.mark.parametrize("to", ["tove", "original", "llava-hf"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interruption_leaves_nothing(tmp_path, world, monkeypatch, to, error):
    """The last write of each format fails."""

    def fail(*args, **kwargs):
        raise error

    last = {
        "tove": "tove_llava.checkpoints.saving.write_manifest",
        "original": "tove_llava.checkpoints.original_layout.original_config",
        "llava-hf": "tove_llava.checkpoints.formats.llava_hf.add_sentencepiece",
    }
    monkeypatch.setattr(last[to], fail)
    source = world.tove if to == "original" else world.whole
    before = snapshot(source)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError):
        convert_checkpoint(source, tmp_path / "out", to)
    assert os.listdir(tmp_path) == []
    assert snapshot(source) == before


def test_source_is_only_read(tmp_path, world):
    """Neither conversion nor changes of the opened model reach mapped files."""
    for folder, to in ((world.whole, "tove"), (world.whole, "llava-hf"), (world.tove, "original"), (world.hf, "tove")):
        before = snapshot(folder)
        convert_checkpoint(folder, tmp_path / f"{folder.name}-{to}", to)
        model, _ = load_model(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert snapshot(folder) == before


def test_opening_does_not_read_tensors(tmp_path):
    """Nothing of 100 MB of weights comes into memory."""
    for kind in ("bin", "safetensors"):
        (tmp_path / kind).mkdir()
        write_shards(tmp_path / kind, {f"w{i}": torch.zeros(10_000_000) + i for i in range(3)}, kind)
        before = _private_megabytes()
        found = folder_tensors(tmp_path / kind)
        assert found["w2"].shape == (10_000_000,) and _private_megabytes() - before < 20
        assert found["w2"][5] == 2


def _private_megabytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), name=st.sampled_from(["new.bin", "old.bin", "x.safetensors"]))
def test_damaged_weight_files_are_refused_or_read(tmp_path, data, name):
    file = tmp_path / name
    stored = {"a": torch.zeros(4, 4), "b": torch.ones(3)}
    if name == "x.safetensors":
        save_file(stored, file)
    else:
        torch.save(stored, file, _use_new_zipfile_serialization=name == "new.bin")
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    with contextlib.suppress(CheckpointError):
        assert all(isinstance(value, torch.Tensor) for value in file_tensors(file).values())


def test_adapters_next_to_their_language_model(tmp_path, world):
    """The original has no self-contained LoRA layout; transformers takes merged weights."""
    convert_checkpoint(world.lora, tmp_path / "tove", base=str(world.base))
    shutil.copytree(world.base, tmp_path / "tove" / "language")
    edit_manifest(tmp_path / "tove", {"source": "hf:./language"})
    refused(tmp_path / "tove", tmp_path, "tove-llava merge-lora", error=ConfigError, to="original")
    convert_checkpoint(tmp_path / "tove", tmp_path / "hf", "llava-hf")
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_older_tokenizers_are_remarked_on(tmp_path, whole):
    assert not any("legacy" in remark for remark in convert_checkpoint(whole, tmp_path / "one"))
    edit(whole / "tokenizer_config.json", legacy="gone")
    assert any("legacy" in remark for remark in convert_checkpoint(whole, tmp_path / "two"))


def test_a_new_format_is_one_class(tmp_path, world):
    @register_format("test-format")
    class New(LlavaFormat):
        def detect(self, folder, config):
            return config.get("model_type") == "test-format"

        def read(self, folder, request):
            raise NotImplementedError

        def write(self, parts, folder, request):
            (folder / "config.json").write_text(json.dumps({"model_type": "test-format", "rows": len(parts.tokenizer)}))
            parts.remarks.append("Done.")

    try:
        assert convert_checkpoint(world.whole, tmp_path / "out", "test-format") == ["Done."]
        assert find_format(tmp_path / "out").name == "test-format"
    finally:
        del FORMATS._entries["test-format"]


@pytest.mark.parametrize(("layout", "name"), [("whole", "original"), ("hf", "llava-hf")])
def test_training_names_the_command(world, layout, name):
    with pytest.raises(CheckpointError, match=f"format {name}.*tove-llava convert --model"):
        Manifest.read(getattr(world, layout))


def test_command(tmp_path, world, capsys):
    back = ["convert", "--model", str(world.tove), "--to", "original", "--out"]
    assert main([*back, str(tmp_path / "back")]) == 0
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'back'}\n"
    assert "note: The original wants llava in the folder's name" in output.err
    assert main([*back, str(tmp_path / "llava-back")]) == 0
    assert "folder's name" not in capsys.readouterr().err
    lora = ["--base", str(world.base), "--clip", str(world.clip), "--template", "llava_v1"]
    assert main(["convert", "--model", str(world.lora), "--out", str(tmp_path / "lora"), *lora]) == 0
    assert Manifest.read(tmp_path / "lora").template == "llava_v1"
    assert main(["convert", "--model", str(world.lora), "--out", str(tmp_path / "other")]) == 2
    assert "tove-llava convert: " in (error := capsys.readouterr().err) and "--base" in error
    assert main([*back, str(tmp_path / "back")]) == 2
    assert "not empty" in capsys.readouterr().err
    preset = ["--preset", "tiny", "--set", "vision.image_size=32"]
    assert main(["convert", "--model", str(world.whole), "--out", str(tmp_path / "hub"), *preset]) == 0
    model, _ = load_model(tmp_path / "hub")
    assert model.tower.config.expert_names == ["depth", "normal", "edge", "segmentation"]


def test_open_llava_says_what_is_wrong(world):
    with pytest.raises(CheckpointError, match="not a LLaVA"):
        open_llava(world.base)
    with pytest.raises(ConfigError, match="dtype"):
        open_llava(world.whole, dtype="int8")
