"""The folders that training saves, loading them, and refusals."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_parts import close, edit_manifest, logits
from train_parts import flags, weights, write_parts, write_records
from transformers import AutoModelForCausalLM

from tove_llava import build_model, load_model, load_preset, load_tower
from tove_llava.checkpoints.loading import load_processor, load_trained
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.core.errors import CheckpointError, ToveError
from tove_llava.train.arguments import parse
from tove_llava.train.run import main, run
from tove_llava.train.stages import freeze


@pytest.fixture(scope="module")
def root(kinds):
    return kinds


def start(root, **options):
    return build_model(str(root / "preset.yaml"), **options)[0]


@pytest.mark.parametrize(("stage", "folder"), [("pretrain", "stage1"), ("finetune_lora", "lora"), ("finetune", "full")])
def test_saved_keys_are_the_trainable_keys(root, stage, folder):
    saved = {name.removeprefix("base_model.model.") for name in weights(root / folder)}
    trained = freeze(start(root, load_backbones=False), load_preset(str(root / "preset.yaml")).stage(stage)).names()
    assert saved == {name.replace(".default.weight", ".weight") for name in trained}
    assert not [name for name in saved if "clip" in name or "backbone" in name]


def test_saved_values_are_trained_values(root):
    before = dict(start(root, load_backbones=False).named_parameters())
    for folder in ("stage1", "lora", "full"):
        moved = [n for n, v in weights(root / folder).items() if n in before and not torch.equal(v, before[n])]
        assert len(moved) > 10, folder


@pytest.mark.parametrize("folder", ["stage1", "lora", "full"])
def test_loading_gives_every_saved_tensor_back(root, folder):
    model, processor = load_model(root / folder)
    assert not model.training and model.tower.is_loaded
    present = {n.replace(".default.weight", ".weight"): p for n, p in model.named_parameters()}
    for name, value in weights(root / folder).items():
        assert torch.equal(present[name.removeprefix("base_model.model.")], value), name
    assert processor.conversation_template == Manifest.read(root / folder).template
    assert torch.isfinite(logits(model)).all()


def test_loaded_model_is_the_trained_one(root):
    model = start(root)
    load_trained(model, root / "stage1")
    assert torch.equal(logits(model.eval()), logits(load_model(root / "stage1")[0]))


def test_peft_reads_the_adapter(root):
    from peft import PeftModel

    plain = start(root)
    plain.load_state_dict(load_file(root / "lora" / "trained.safetensors"), strict=False)
    wrapped = PeftModel.from_pretrained(plain, root / "lora").eval()
    close(logits(wrapped), logits(load_model(root / "lora")[0]))


def test_processor_survives(root):
    _, built = build_model(str(root / "preset.yaml"), template="v1", load_backbones=False)
    loaded = load_processor(root / "lora")
    text = "USER: <image>\nWhat is it? ASSISTANT: two  spaces</s>"
    assert loaded.tokenizer(text).input_ids == built.tokenizer(text).input_ids
    assert loaded.image_token_id == built.image_token_id and loaded.patch_size == 8
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    prompt = loaded.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.endswith("USER: <image>\nHi ASSISTANT:")


def test_self_contained_folder_needs_nothing_else(tmp_path):
    (source := tmp_path / "parts").mkdir()
    write_parts(source)
    write_records(source, captions=4, count=4)
    output = tmp_path / "model"
    assert main(flags(source, "finetune_lora", output, "--max_steps", "1", "--self_contained", "True")) == 0
    before = logits(load_model(output)[0])
    shutil.rmtree(source)
    assert torch.equal(logits(load_model(output.rename(tmp_path / "elsewhere"))[0]), before)


ONE_EXPERT = "[{name: segmentation, source: 'hf:%s', mode: features}]"


def test_language_model_that_has_changed_or_is_gone_is_noticed(root, tmp_path):
    folder, llm = (shutil.copytree(root / name, tmp_path / name) for name in ("lora", "llm"))
    assert Manifest.read(folder).language_fingerprint
    load_model(edit_manifest(folder, {"source": f"hf:{llm}"}))
    stored = load_file(llm / "model.safetensors")
    stored["model.layers.0.self_attn.q_proj.weight"] += 0.01
    save_file(stored, llm / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="its weights have changed"):
        load_model(folder)
    shutil.rmtree(llm)
    with pytest.raises(CheckpointError, match=str(llm)):
        load_model(folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vision.experts=" + ONE_EXPERT, "its experts are normal, segmentation, this model's segmentation"),
        ("vision.experts.normal.mode=features", "expert normal: mode 'map' against 'features'"),
        ("vision.projection_dim=12", "projection_dim 8 against 12"),
        ("vision.top_k=1", "top_k None against 1"),
    ],
)
def test_stage_two_refuses_another_tower(root, tmp_path, override, message):
    words = ["--pretrained", str(root / "stage1"), "--set", override.replace("%s", str(root / "segmentation"))]
    with pytest.raises(CheckpointError, match="another tower") as error:
        run(parse(flags(root, "finetune_lora", tmp_path / "x", *words)))
    assert message in str(error.value)
    assert not (tmp_path / "x").exists()


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root / "stage1", tmp_path / "copy")


def test_incomplete_folder_is_refused(copy, tmp_path):
    (copy / "tove_llava.json").unlink()
    with pytest.raises(CheckpointError, match="written last"):
        load_model(copy)
    (copy / "checkpoint-4").mkdir()
    with pytest.raises(CheckpointError, match="unfinished run"):
        load_model(copy)
    with pytest.raises(CheckpointError, match="not a folder"):
        load_model(tmp_path / "nowhere")


def test_pickles_are_refused(tmp_path):
    torch.save({"model.mm_projector.0.weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds pickled weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("folder", ["stage1", "lora"])
def test_truncated_weights_are_refused(root, tmp_path, folder):
    copy = shutil.copytree(root / folder, tmp_path / "copy")
    files = sorted(copy.glob("*.safetensors"))
    assert len(files) == {"stage1": 1, "lora": 2}[folder]
    for file in files:
        file.write_bytes(file.read_bytes()[:-50])
        with pytest.raises(CheckpointError, match=file.name):
            load_model(copy)
        shutil.copy(root / folder / file.name, file)


@pytest.mark.parametrize("kind", ["stage1", "lora"])
def test_the_recorded_configuration_comes_back(root, kind):
    saved = json.loads((root / kind / "config.json").read_text())
    loaded = load_model(root / kind, load_backbones=False)[0].config
    for key in ("image_token_index", "conversation_template", "image_aspect_ratio"):
        assert saved[key] is not None and getattr(loaded, key) == saved[key], key
    assert loaded.text_config.pad_token_id == loaded.pad_token_id == saved["pad_token_id"] is not None


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_without_one_of_its_tensors_is_refused(root, tmp_path, part):
    folder = shutil.copytree(root / "lora", tmp_path / "copy")
    whole = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in whole if f"q_proj.{part}" in name)
    for changed in ({k: v for k, v in whole.items() if k != name}, {**whole, f"{name}.more": whole[name].clone()}):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors.*q_proj"):
            load_model(folder)


def test_missing_and_foreign_tensors_are_refused(copy):
    whole, name = load_file(copy / "trained.safetensors"), "model.vision_tower.fusion.output.weight"
    for changed, message in (
        ({k: v for k, v in whole.items() if k != name}, "another tower"),
        ({**whole, name: whole[name][:, :3].contiguous()}, r"another tower.*\(16, 3\) against \(16, 8\)"),
        ({**whole, "foreign": torch.zeros(1)}, "foreign"),
    ):
        save_file(changed, copy / "trained.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_model(copy)


def test_new_vocabulary_rows_are_the_same_in_every_load(root):
    first = start(root, load_backbones=False)
    second, _ = load_model(root / "stage1", load_backbones=False)
    for matrix in ("get_input_embeddings", "get_output_embeddings"):
        a, b = getattr(first, matrix)().weight, getattr(second, matrix)().weight
        assert a.shape[0] % 64 == 0 and torch.equal(a, b)
    old = AutoModelForCausalLM.from_pretrained(root / "llm").get_input_embeddings().weight
    assert torch.equal(first.get_input_embeddings().weight[: len(old)], old)


# -- weights are what the manifest says -------------------------------------------------------------------------------


def flipped(file, count=2000):
    """Flip bits of a file's last values: small ones, so that every number stays finite."""
    data = bytearray(file.read_bytes())
    for place in range(len(data) - 4 * count, len(data), 4):
        data[place] ^= 1  # the lowest bit of a float32
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("folder", "file"),
    [("stage1", "trained"), ("lora", "trained"), ("lora", "adapter_model"), ("full", "model")],
)
def test_changed_weights_are_noticed(root, tmp_path, monkeypatch, folder, file):
    copy = shutil.copytree(root / folder, tmp_path / "copy")
    flipped(copy / f"{file}.safetensors", 200)
    for use in (load_model, load_tower, lambda copy: start(root) and load_trained(start(root), copy)):
        if (use is load_tower and folder == "full") or (use not in (load_model, load_tower) and folder != "stage1"):
            continue
        with pytest.raises(CheckpointError, match=r"copy: .*not those that its tove_llava\.json names.*TOVE_ACCEPT"):
            use(copy)
    for name, value in (("LOCAL_RANK", "1"), ("TOVE_ACCEPT_CHANGED_WEIGHTS", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            load_model(copy)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize(
    ("folder", "file"),
    [("stage1", "trained"), ("lora", "adapter_model"), ("full", "model"), ("tower", "model"), ("stage1", "llm/model"),
     ("stage1", "clip/model"), ("stage1", "segmentation/model")],
)  # fmt: skip
def test_nan_and_infinity_are_said_with_tensor_and_file(root, tmp_path, monkeypatch, folder, file, value):
    monkeypatch.setenv("TOVE_ACCEPT_CHANGED_WEIGHTS", "1")
    if folder == "tower":
        load_tower(root / "stage1").save_pretrained(tmp_path / "tower")
    else:
        shutil.copytree(root / folder, tmp_path / folder)
    place = tmp_path / folder / f"{file}.safetensors"
    if "/" in file:  # a part that the folder names by its source
        shutil.copytree(root, tmp_path / "all", ignore=shutil.ignore_patterns("full", "lora"))
        place = tmp_path / "all" / f"{file}.safetensors"
        for record in (tmp_path / folder / "config.json", tmp_path / folder / "tove_llava.json"):
            record.write_text(record.read_text().replace(str(root), str(tmp_path / "all")))
        edit_manifest(tmp_path / folder, language_fingerprint="")
    stored = load_file(place)
    name = sorted(n for n in stored if "weight" in n and "head" not in n and "post_layernorm" not in n)[0]
    stored[name].view(-1)[-1] = value
    save_file(stored, place, metadata={"format": "pt"})
    last = name.rpartition(".")[0].rpartition(".")[2]
    with pytest.raises(CheckpointError, match=rf"{place.parent}.*{last}.*NaN or infinity"):
        (load_tower if folder == "tower" else load_model)(tmp_path / folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.num_hidden_layers", 10**9),
        ("text_config.num_hidden_layers", 100),
        ("text_config.vocab_size", 10**7),
        ("text_config.hidden_size", -1),
        ("image_seq_length", 10**12),
        ("vision_config.clip_config.num_hidden_layers", 900),  # of a CLIP that is elsewhere
        ("vision_config.projection_dim", 10**6),
        ("vision_config.null_slot", [[]]),
        ("vision_config.experts", -1),
        ("projector_hidden_act", "no_such"),
    ],
)
def test_sizes_and_types_are_checked_before_anything_is_made(root, tmp_path, path, value):
    folder = shutil.copytree(root / "full", tmp_path / "copy")
    record = json.loads((folder / "config.json").read_text())
    *parents, key = path.split(".")
    node = record
    for parent in parents:
        node = node[parent]
    node[key] = value
    (folder / "config.json").write_text(json.dumps(record))
    start_of_load = time.monotonic()
    with pytest.raises(ToveError, match=key):
        load_model(folder)
    assert time.monotonic() - start_of_load < 5


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 5}, {"model_max_length": "long"}, {"model_max_length": -1}, {"image_aspect_ratio": "round"},
        {"history": {}}, {"plugins": [5]}, {"quantization": "4"}, {"quantization": {"bits": "4"}}, {"template": None},
        {"language": {"source": 5}}, {"language": {"source": "nowhere"}}, {"language": {"revision": 7}},
        {"unheard_of": 1}, {"format_version": "1"},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_manifest_is_named(root, tmp_path, change):
    folder = shutil.copytree(root / "stage1", tmp_path / "copy")
    language = change.get("language")
    edit_manifest(folder, language, **({} if language else change))
    with pytest.raises(CheckpointError, match=r"copy/tove_llava\.json"):
        load_model(folder)


@pytest.mark.parametrize(("key", "value"), [("num_additional_image_tokens", 10**12), ("patch_size", 1)])
def test_a_processor_of_another_model_is_refused(root, tmp_path, key, value):
    folder = shutil.copytree(root / "stage1", tmp_path / "copy")
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=rf"copy: the processor's {key} is {value}"):
        load_model(folder)
