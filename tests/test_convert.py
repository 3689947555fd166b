"""``tove-llava convert``: the same logits, the same bits, both ways."""

import json
import shutil

import pytest
import torch
import yaml
from answer_parts import make_scenes
from convert_parts import (
    IMAGE,
    QUESTION,
    TOKENS,
    make_original,
    original_config,
    original_tensors,
    pixels,
    write_clip,
    write_language,
    write_lora,
    write_original,
    write_projector,
    write_shards,
)
from convert_world import ROWS, assert_same, chain, close, expanded, logits, ours, stock, tensors
from PIL import Image
from safetensors.torch import load_file, save_file
from tower_parts import open_output
from train_parts import flags, write_parts, write_records
from transformers import AutoProcessor, AutoTokenizer, LlavaConfig, MistralForCausalLM

from tove_llava import convert_checkpoint, load_model, open_llava
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.cli import main as cli
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.data import Turn, encode_prompt, load_tokenizer
from tove_llava.eval.rows import read_answers
from tove_llava.inference.generation import Answerer
from tove_llava.train.run import main as train


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def change(folder, name="config.json", **changes):
    (folder / name).write_text(json.dumps({**read(folder, name), **changes}))


# -- the same logits --------------------------------------------------------------------------------------------------


def test_original_opened_here_equals_stock_on_the_converted_folder(world):
    model, _ = open_llava(world.whole)
    found, theirs = logits(model), logits(stock(world.hf))
    assert found.shape == theirs.shape == (len(QUESTION) - 1 + TOKENS, 640)
    close(found, theirs)
    close(found[:, :ROWS], world.expected)
    with torch.no_grad():
        blank = model(expanded(600), pixel_values=torch.zeros(1, 3, IMAGE, IMAGE)).logits[0]
    assert found[:, :ROWS].std() > 0.1 and not torch.allclose(found, blank, atol=0.1)


@pytest.mark.parametrize("stored_clip", [True, False])
@pytest.mark.parametrize("kind", ["bin", "old", "safetensors"])
def test_every_way_of_storing_weights_is_read(tmp_path, world, kind, stored_clip):
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    options = {"kind": kind, "stored_clip": stored_clip, "extra": old if stored_clip else {}}
    folder = write_original(tmp_path / "llava", world.model, world.clip, **options)
    close(ours(folder), world.expected)
    tove = chain(folder, tmp_path, "tove")
    close(ours(tove), world.expected)
    assert (tove / "backbones").exists() == stored_clip


def test_load_model_opens_folders_of_other_formats(world):
    close(ours(world.hf), world.expected)
    model, _ = load_model(world.whole, load_backbones=False)
    assert not model.tower.is_loaded
    model, _ = load_model(world.whole, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model.tower.frozen.clip.dtype}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(model(expanded(600), pixel_values=pixels().bfloat16()).logits).all()


@pytest.mark.parametrize("pickled", [True, False])
def test_lora_folder_is_base_plus_adapters(tmp_path, world, pickled):
    folder, _ = write_lora(tmp_path / "lora", world.model, world.clip, pickled=pickled)
    expected, base = world.merged_logits(), {"base": str(world.base)}
    for merge in (True, False):
        close(ours(folder, merge_lora=merge, **base), expected, 1e-4)
    assert not torch.allclose(expected, world.expected, atol=0.1)
    tove = chain(folder, tmp_path, "tove", **base)
    assert Manifest.read(tove).kind == "lora"
    close(ours(tove), expected, 1e-4)
    close(logits(stock(chain(folder, tmp_path, "llava-hf", **base)))[:, :ROWS], expected, 1e-4)


def test_projector_folder_is_the_projector_on_its_language_model(tmp_path, world):
    base = {"base": str(world.base)}
    close(ours(world.projector, **base), world.expected)
    tove = chain(world.projector, tmp_path, "tove", **base)
    manifest = Manifest.read(tove)
    assert (manifest.kind, manifest.template) == ("trained", "plain")
    assert manifest.language["source"] == f"hf:{world.base}"
    assert not (tove / "language").exists()
    close(ours(tove), world.expected)
    close(logits(stock(chain(world.projector, tmp_path, "llava-hf", **base)))[:, :ROWS], world.expected)


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
         {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ({"num_key_value_heads": 2}, {}),
        ({"tie": True}, {}),
    ],
)  # fmt: skip
def test_architecture_settings_survive(tmp_path, settings, written):
    model = make_original(**settings)
    clip, expected = write_clip(tmp_path / "clip", model), model.logits(pixels())
    folder = write_original(tmp_path / "llava", model, clip, **written)
    close(ours(folder), expected)
    hf = chain(folder, tmp_path, "llava-hf")
    close(logits(stock(hf))[:, :ROWS], expected)
    back = chain(hf, tmp_path, "tove", "original")
    close(ours(back), expected)
    found, asked = read(back), original_config(model, clip, **written)
    keys = ["rope_theta", "rope_scaling", "num_key_value_heads", "tie_word_embeddings", "hidden_size", "rms_norm_eps"]
    assert [found[key] for key in keys] == [asked[key] for key in keys]


def test_mistral(tmp_path):
    model = make_original()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps", "initializer_range")  # fmt: skip
    same = {key: getattr(model.language.config, key) for key in keys}
    config = MistralForCausalLM.config_class(**same, num_key_value_heads=2, sliding_window=None)
    model.language = MistralForCausalLM(config).eval()
    written = {"model_type": "llava_mistral", "sliding_window": None}
    folder = write_original(tmp_path / "llava", model, write_clip(tmp_path / "clip", model), **written)
    close(ours(folder), model.logits(pixels()))
    back = chain(folder, tmp_path, "tove", "original")
    assert read(back)["model_type"] == "llava_mistral"
    assert_same(tensors(back), tensors(folder))


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["tove", "llava-hf"])
def test_original_comes_back(tmp_path, world, way, dtype):
    dtypes = {"dtype": dtype, "torch_dtype": str(dtype).removeprefix("torch.")}
    folder = write_original(tmp_path / "llava-a", world.model, world.clip, **dtypes)
    back = chain(folder, tmp_path, way, "original")
    assert_same(tensors(back), tensors(folder))
    before, after = (read(f) for f in (folder, back))
    free = {"mm_vision_tower", "model_type", "transformers_version", "_name_or_path", "max_length", "initializer_range"}
    common = before.keys() & after.keys() - free
    assert [after[key] for key in common] == [before[key] for key in common]
    text = "USER: two  spaces\n ASSISTANT: x</s>USER: and?"
    assert load_tokenizer(back)(text).input_ids == load_tokenizer(folder)(text).input_ids
    assert (back / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert "<image>" not in load_tokenizer(back).get_vocab()


def test_parts_of_different_dtypes_keep_them(tmp_path, world):
    stored = original_tensors(world.model)
    dtypes = {"vision_tower": torch.float16, "mm_projector": torch.bfloat16}
    mixed = {name: x.to(dtypes.get(name.split(".")[1], x.dtype)) for name, x in stored.items()}
    folder = write_original(tmp_path / "llava", world.model, world.clip)
    write_shards(folder, mixed)
    hf = chain(folder, tmp_path, "llava-hf")
    tove = chain(hf, tmp_path, "tove")
    assert_same(tensors(chain(tove, tmp_path, "original")), mixed)
    close(logits(load_model(tove)), logits(open_llava(folder)))
    close(logits(stock(hf)), logits(open_llava(folder)))


def test_tokenizers_saved_by_transformers_5_are_made_readable(tmp_path, world):
    """transformers 4 gets a class name that it knows, not transformers 5's."""
    folder = shutil.copytree(world.tove, tmp_path / "tove")
    changes = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}
    change(folder / "language", "tokenizer_config.json", **changes)
    written = read(chain(folder, tmp_path, "original"), "tokenizer_config.json")
    assert (written["tokenizer_class"], written["legacy"]) == ("LlamaTokenizer", False)
    assert "backend" not in written


def test_llava_hf_comes_back(tmp_path, world):
    stored = tensors(world.hf)
    # The original has no rows for the image token and the padding after it.
    for way in ("tove", "original"):
        assert_same(tensors(chain(world.hf, tmp_path, way, "llava-hf")), stored)
    assert {name.split(".")[0] for name in stored} == {"language_model", "vision_tower", "multi_modal_projector"}
    # All of CLIP is kept, and the layer named.
    config = LlavaConfig.from_pretrained(world.hf)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    last = "encoder.layers.2.mlp.fc1.weight"
    assert torch.equal(stored[f"vision_tower.vision_model.{last}"], world.model.clip.state_dict()[last])


def test_stage_one_and_lora_folders_come_back(tmp_path, world):
    for folder in (world.projector, world.lora):
        back = chain(folder, tmp_path, "tove", "original", base=str(world.base))
        assert_same(tensors(back), tensors(folder))
        names = {"config.json", "mm_projector.bin"} if folder == world.projector else {
            "config.json", "adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"
        }  # fmt: skip
        assert {file.name for file in back.iterdir()} == names
        config = read(back)
        assert (config["mm_vision_tower"], config["vocab_size"]) == (str(world.clip), ROWS)
    before, after = (read(f, "adapter_config.json") for f in (world.lora, back))
    for key in ("r", "lora_alpha", "lora_dropout", "bias", "peft_type", "task_type", "target_modules"):
        assert after[key] == before[key], key


def test_names_are_those_of_the_reference(tmp_path, conformance):
    names = json.loads((conformance / "llava" / "parameter_names.json").read_text())
    model = make_original(layers=1, clip_layers=1)
    folder = write_original(tmp_path / "llava", model, write_clip(tmp_path / "clip", model), mm_vision_select_layer=-1)
    back = chain(folder, tmp_path, "tove", "original")
    assert set(tensors(back)) == set(names["stage2_full"]["state_dict_keys"])
    base = {"base": str(write_language(tmp_path / "base", model))}
    stage1 = write_projector(tmp_path / "stage1", model, tmp_path / "clip", mm_vision_select_layer=-1)
    lora, _ = write_lora(tmp_path / "stage2", model, tmp_path / "clip", mm_vision_select_layer=-1)
    stage1, lora = (chain(source, tmp_path, "tove", "original", **base) for source in (stage1, lora))
    adapters = names["stage2_lora"]
    assert set(torch.load(stage1 / "mm_projector.bin", weights_only=True)) == set(names["stage1"]["mm_projector.bin"])
    assert set(torch.load(lora / "non_lora_trainables.bin", weights_only=True)) == set(
        adapters["non_lora_trainables.bin"]
    )
    assert set(load_file(lora / "adapter_model.safetensors")) == set(adapters["adapter_file_keys"])


def test_names_of_old_and_new_transformers_are_read(tmp_path, world):
    def module_name(name):
        inside = "model." + name.replace("language_model.model.", "language_model.")
        return "lm_head.weight" if name.endswith("lm_head.weight") else inside

    renamings = (
        str, module_name, lambda n: n.replace("vision_tower.vision_model.", "vision_tower."),
        lambda n: module_name(n).replace("vision_model.", ""),
    )  # fmt: skip
    expected = logits(stock(world.hf))
    for number, rename in enumerate(renamings):
        folder = shutil.copytree(world.hf, tmp_path / str(number))
        save_file({rename(n): x for n, x in tensors(world.hf).items()}, folder / "model.safetensors")
        close(logits(open_llava(folder)), expected)


# -- tokens -----------------------------------------------------------------------------------------------------------


def padded_llava_hf(world, folder):
    """The layout of llava-hf: ``<image>`` and ``<pad>`` after the vocabulary.

    Random rows fill it up to a multiple of 64.
    """
    shutil.copytree(world.hf, folder)
    generator = torch.Generator().manual_seed(1)
    stored = tensors(world.hf)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        stored[name] = torch.cat([stored[name][:ROWS], torch.randn(40, 48, generator=generator)])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    absent = ("conversation_template", "image_aspect_ratio")
    config = {key: value for key, value in read(folder).items() if key not in absent}
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 601}))
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": 600, "<pad>": 601}))
    change(folder, "tokenizer_config.json", pad_token="<pad>")
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").unlink()
    return folder


def test_tokens_that_the_original_has_not(tmp_path, world):
    folder = padded_llava_hf(world, tmp_path / "hf")
    expected = logits(stock(folder))
    model, processor = open_llava(folder)
    close(logits(model), expected)
    assert (processor.image_token_id, processor.tokenizer.pad_token_id) == (600, 601)
    assert (model.config.pad_token_id, processor.conversation_template) == (601, "v1")
    assert model.config.image_aspect_ratio == "pad"

    remarks = convert_checkpoint(folder, tmp_path / "llava", "original")
    assert any("<image>, <pad>" in remark for remark in remarks)
    assert_same(tensors(tmp_path / "llava"), original_tensors(world.model))
    assert len(load_tokenizer(tmp_path / "llava")) == ROWS
    assert read(tmp_path / "llava")["vocab_size"] == ROWS
    close(ours(tmp_path / "llava"), expected[:, :ROWS])

    tove = chain(folder, tmp_path, "tove")
    close(logits(load_model(tove)), expected)
    assert_same(tensors(chain(tove, tmp_path, "llava-hf")), tensors(folder))
    assert_same(tensors(chain(tove, tmp_path, "original")), original_tensors(world.model))

    # Its tokenizer is converted by transformers, whose ids differ in runs of spaces.
    turns = [Turn("user", "<image>\nTwo  spaces?"), Turn("assistant", "Yes."), Turn("user", " And?")]
    found = Answerer.load(folder, "cpu", "float32").encode(turns, 1)
    wanted = encode_prompt(turns, load_tokenizer(world.whole), "v1")
    assert found == [t for i in wanted for t in ([600] * TOKENS if i == -200 else [i])]


def test_rows_and_tokens_of_the_users_own_stay(tmp_path, world):
    """A vocabulary that was padded before LLaVA keeps its rows and tokens."""
    model = make_original(vocab=608)
    folder = write_original(tmp_path / "llava", model, world.clip)
    (folder / "added_tokens.json").write_text(json.dumps({"<box>": 600, "</box>": 601}))
    tove = chain(folder, tmp_path, "tove")
    assert load_model(tove, load_backbones=False)[1].image_token_id == 602
    assert_same(tensors(chain(tove, tmp_path, "original")), tensors(folder))
    back = chain(tove, tmp_path, "llava-hf", "original")
    tokenizer = load_tokenizer(back)
    assert tokenizer("<box> a </box>").input_ids == load_tokenizer(folder)("<box> a </box>").input_ids
    assert len(tokenizer) == len(tensors(back)["lm_head.weight"]) == 602 and "<image>" not in tokenizer.get_vocab()


def test_prompts_are_the_originals(tmp_path, world):
    """The original template's ids are the same in every folder and implementation."""
    turns = [Turn("user", "<image>\nTwo  spaces?"), Turn("assistant", "Yes."), Turn("user", "And?")]
    expected = encode_prompt(turns, load_tokenizer(world.whole), "v1")
    assert expected.count(-200) == 1
    for folder in (world.whole, world.hf, world.tove):
        _, processor = load_model(folder, load_backbones=False)
        assert encode_prompt(turns, processor.tokenizer, "v1") == expected
    text = "USER: two  spaces</s>USER: x"
    stock_tokenizer = AutoTokenizer.from_pretrained(world.hf)
    assert stock_tokenizer(text).input_ids == load_tokenizer(world.whole)(text).input_ids
    processor = AutoProcessor.from_pretrained(world.hf, backend="pil")
    messages = [
        {"role": t.role, "content": [{"type": "image"}] * (i == 0) + [{"type": "text", "text": t.text.split("\n")[-1]}]}
        for i, t in enumerate(turns)
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert stock_tokenizer(prompt, add_special_tokens=False).input_ids == [600 if i == -200 else i for i in expected]


def test_real_llama_tokenizer(tmp_path, conformance):
    model = make_original(vocab=32000, width=16, layers=1)
    folder = write_original(tmp_path / "llava", model, write_clip(tmp_path / "clip", model))
    shutil.copyfile(conformance / "llava" / "llama_tokenizer.model", folder / "tokenizer.model")
    hf = chain(folder, tmp_path, "llava-hf")
    model = stock(hf)
    assert (model.config.text_config.vocab_size, model.config.image_token_index) == (32064, 32000)
    close(logits(open_llava(folder)), logits(model))
    assert_same(tensors(chain(hf, tmp_path, "original")), tensors(folder))


def test_processors_show_images_as_in_training(tmp_path, world):
    """``image_aspect_ratio: pad`` pads wide images to a square; others cut them."""
    image = Image.new("RGB", (80, 20), (255, 0, 0))
    square = write_original(tmp_path / "llava", world.model, world.clip, image_aspect_ratio="square")
    seen = {}
    for name, folder in (("pad", world.whole), ("square", square)):
        for opened in (folder, chain(folder, tmp_path, "tove")):
            processor = load_model(opened, load_backbones=False)[1]
            answerer = Answerer.load(opened, "cpu", "float32")
            pixel_values = processor(images=[image], text="<image>", return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(pixel_values[0], answerer.pixels(image), rtol=0, atol=1e-5)
            seen[name] = pixel_values
    assert not torch.allclose(seen["pad"], seen["square"], atol=0.5)


def test_merged_adapters_go_to_the_original(tmp_path, world):
    """LoRA of the original converts, merges, and becomes a whole original model."""
    lora = chain(world.lora, tmp_path, "tove", base=str(world.base))
    assert cli(["merge-lora", "--model", str(lora), "--out", str(tmp_path / "merged")]) == 0
    close(ours(chain(tmp_path / "merged", tmp_path, "original")), world.merged_logits(), 1e-4)


# -- CLIP -------------------------------------------------------------------------------------------------------------


def test_public_name_of_clip_survives(tmp_path, world, monkeypatch):
    """A preset knows a hub CLIP's architecture; the folder has its weights."""
    preset = {"vision": {"clip": "hf:someone/clip", "clip_config": world.model.clip.config.to_dict()},
              "language": {"source": "bundled:llm"}}  # fmt: skip
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "known.yaml").write_text(yaml.safe_dump(preset))
    monkeypatch.setattr("tove_llava.presets.preset.FOLDER", tmp_path / "presets")
    folder = write_original(tmp_path / "llava", world.model, "someone/clip")
    tove = chain(folder, tmp_path, "tove")
    close(ours(tove), world.expected)
    back = chain(tove, tmp_path, "original")
    assert read(back)["mm_vision_tower"] == "someone/clip"
    assert not (back / "vision_tower").exists()
    assert_same(tensors(back), tensors(folder))
    # A tower that was trained is not the public one.
    folder = write_original(tmp_path / "llava-2", world.model, "someone/clip", unfreeze_mm_vision_tower=True)
    back = chain(folder, tmp_path, "tove", "original")
    assert read(back)["mm_vision_tower"] == str(back / "vision_tower")


def test_clip_by_reference_is_read_by_transformers_4_too(tmp_path, world):
    """The names of a transformers 5 CLIP are copied for transformers 4.

    With wrong names, transformers 4 takes random numbers.
    """
    base = {"base": str(world.base)}
    world.model.clip.save_pretrained(tmp_path / "clip")
    assert not any(name.startswith("vision_model.") for name in load_file(tmp_path / "clip" / "model.safetensors"))
    for clip, copied in ((world.clip, False), (tmp_path / "clip", True)):
        folder = write_projector(tmp_path / str(copied), world.model, clip)
        back = chain(folder, tmp_path, "tove", "original", **base)
        named = read(back)["mm_vision_tower"]
        assert named == str(back / "vision_tower" if copied else clip)
        stored = load_file(f"{named}/model.safetensors")
        assert_same(stored, {f"vision_model.{n}": x for n, x in world.model.clip.state_dict().items()})
        close(ours(back, **base), world.expected)


def test_clip_flag_and_moved_folders(tmp_path, world):
    lost = write_original(tmp_path / "llava", world.model, "/nowhere/clip", stored_clip=False)
    with pytest.raises(CheckpointError, match="--clip"):
        open_llava(lost)
    close(ours(lost, clip=str(world.clip)), world.expected)
    convert_checkpoint(world.hf, tmp_path / "made" / "llava", "original")
    (tmp_path / "made").rename(tmp_path / "moved")
    close(ours(tmp_path / "moved" / "llava"), world.expected)


def test_images_are_normalised_as_clips_own_folder_says(tmp_path, world):
    clip = shutil.copytree(world.clip, tmp_path / "clip")
    change(clip, "preprocessor_config.json", image_mean=[0.5] * 3)
    folder = write_original(tmp_path / "llava", world.model, clip, image_aspect_ratio="square")
    for to in ("tove", "llava-hf"):
        model, processor = load_model(chain(folder, tmp_path, to))
        assert list(processor.image_processor.image_mean) == [0.5] * 3
        assert list(model.config.vision_config.image_mean) == [0.5] * 3
        assert model.config.image_aspect_ratio == "square"


# -- with experts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(world, tmp_path_factory):
    """The world's LLaVA with two experts, a preset, and training records."""
    root = tmp_path_factory.mktemp("start")
    preset = write_parts(root)
    write_records(root, captions=8, count=8)
    convert_checkpoint(world.whole, root / "start", preset=str(preset))
    return root


def test_untrained_tower_with_experts_computes_the_checkpoint(world, start):
    model, _ = load_model(start / "start")
    assert model.tower.config.attached_experts == ["normal", "segmentation"] and model.tower.is_loaded
    assert torch.equal(logits(model), logits(open_llava(world.whole)))
    open_output(model.tower)
    assert not torch.allclose(logits(model), logits(open_llava(world.whole)), atol=1e-3)
    manifest = Manifest.read(start / "start")
    assert (manifest.kind, manifest.preset, manifest.language["source"]) == ("trained", "preset", "hf:./language")


@pytest.mark.parametrize("fusion", ["top1", "add", "replace", "sequence_append"])
def test_other_fusions_start_from_the_checkpoint_or_are_remarked_on(tmp_path, world, start, fusion):
    options = {"preset": str(start / "preset.yaml"), "overrides": [f"vision.fusion={fusion}"]}
    remarks = convert_checkpoint(world.whole, tmp_path / "out", **options)
    model, _ = load_model(tmp_path / "out")
    assert model.tower.config.fusion == fusion
    if fusion in ("top1", "add"):
        assert remarks == [] and torch.equal(logits(model), logits(open_llava(world.whole)))
    else:
        assert repr(fusion) in remarks[0] and "before it is trained" in remarks[0]


def test_training_starts_from_it(world, start):
    """Stage 1 and LoRA start from a converted, moved folder's language model."""
    moved = shutil.copytree(start / "start", start / "elsewhere")
    from_checkpoint = [f"--set=stages.{stage}.starts_from=checkpoint" for stage in ("pretrain", "finetune_lora")]
    common = ["--max_steps", "2", *from_checkpoint]
    assert train(flags(start, "pretrain", start / "one", *common, "--pretrained", str(moved))) == 0
    assert train(flags(start, "finetune_lora", start / "two", *common, "--pretrained", str(start / "one"))) == 0
    first, second = load_model(start / "one")[0], load_model(start / "two")[0]
    assert Manifest.read(start / "two").kind == "lora"
    expected = world.model.language.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(first.model.language_model.layers[1].mlp.up_proj.weight, expected)
    assert torch.equal(second.model.language_model.layers[1].mlp.up_proj.base_layer.weight, expected)
    weight = first.model.multi_modal_projector.linear_1.weight
    assert not torch.equal(weight, world.model.projector[0].weight)
    assert torch.isfinite(logits(second)).all()


def test_experts_go_onto_a_checkpoint_of_our_own(tmp_path, world, start):
    preset = {"preset": str(start / "preset.yaml")}
    assert torch.equal(ours(chain(world.tove, tmp_path, "tove", **preset)), ours(world.tove))
    model, _ = load_model(chain(world.lora, tmp_path, "tove", base=str(world.base), **preset))
    close(logits(model)[:, :ROWS], world.merged_logits(), 1e-4)
    assert model.tower.config.attached_experts == ["normal", "segmentation"]


def test_presets_that_would_change_the_logits_are_refused(tmp_path, world, start):
    preset = str(start / "preset.yaml")
    changes = {"clip_layer=-1": "clip_layer", "image_size=64": "image_size", "fusion=channel_concat": "width"}
    for change, word in changes.items():
        with pytest.raises(ConfigError, match=word):
            convert_checkpoint(world.whole, tmp_path / "out", preset=preset, overrides=[f"vision.{change}"])
    with pytest.raises(ConfigError, match="--to tove"):
        convert_checkpoint(world.whole, tmp_path / "out", "llava-hf", preset=preset)
    with pytest.raises(ConfigError, match="--preset"):
        convert_checkpoint(world.whole, tmp_path / "out", overrides=["vision.top_k=1"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["original", "llava-hf"])
def test_towers_with_experts_go_nowhere_else(tmp_path, start, to):
    with pytest.raises(ConfigError, match="tove-llava merge.*tove-llava detach"):
        convert_checkpoint(start / "start", tmp_path / "out", to)


def test_a_model_trained_here_goes_to_the_original(tmp_path, world, start):
    """A CLIP-only tower's grown vocabulary is cut again after full fine-tuning."""
    preset = tmp_path / "clip.yaml"
    data = yaml.safe_load((start / "preset.yaml").read_text())
    data["vision"] |= {"fusion": "none", "experts": [], "clip": f"hf:{world.clip}"}
    data["language"]["source"] = f"hf:{world.base}"
    preset.write_text(yaml.safe_dump(data))
    shutil.copytree(start / "images", tmp_path / "images")
    shutil.copyfile(start / "instruct.json", tmp_path / "instruct.json")
    for stage, kind in (("finetune", "full"), ("finetune_lora", "lora")):
        arguments = flags(tmp_path, stage, tmp_path / stage, "--max_steps", "2")
        arguments[1] = str(preset)
        assert train(arguments) == 0
        assert Manifest.read(tmp_path / stage).kind == kind
        out = tmp_path / f"llava-{stage}"
        convert_checkpoint(tmp_path / stage, out, "original")
        expected = logits(load_model(tmp_path / stage))
        base = {"base": str(world.base)} if kind == "lora" else {}
        close(ours(out, **base), expected[:, :ROWS])
        close(logits(stock(chain(tmp_path / stage, tmp_path, "llava-hf"))), expected, 1e-4)
    whole = tensors(tmp_path / "llava-finetune")
    assert len(whole["lm_head.weight"]) == ROWS and len(load_tokenizer(tmp_path / "llava-finetune")) == ROWS
    assert read(tmp_path / "llava-finetune")["mm_vision_tower"] == str(world.clip)


def test_benchmarks_are_answered_from_every_folder(tmp_path, capsys, world):
    make_scenes(tmp_path / "data", images=2)
    flags = ["--benchmark", "scenes", "--data-root", str(tmp_path / "data"), "--device", "cpu", "--json"]
    found = []
    for name, folder in (("original", world.whole), ("hf", world.hf), ("tove", world.tove)):
        assert cli(["eval", "--model", str(folder), "--output", str(tmp_path / name), *flags]) == 0
        result = json.loads(capsys.readouterr().out)["benchmarks"]["scenes"]["full"]
        rows = read_answers(tmp_path / name / "scenes" / "full" / "answers.jsonl")
        found.append((result["template"], result["scores"], [row["text"] for row in rows]))
    assert found[0] == found[1] == found[2] and len(set(found[0][2])) > 1
    for folder in (world.lora, world.projector):  # parts of a model
        assert cli(["eval", "--model", str(folder), "--output", str(tmp_path / "no"), *flags]) == 2
        assert f"tove-llava convert --model {folder} --base" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_published_widths_at_reduced_depth(tmp_path):
    """A whole CLIP ViT-L/14-336 and one layer of Vicuna-7B, half precision.

    CLIP has its published name.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from tove_llava.presets import load_preset

    vicuna = load_preset("vicuna-7b")
    model = make_original(vocab=32000, width=4096, clip_width=32, layers=1, intermediate_size=11008,
                          num_attention_heads=32, num_key_value_heads=32)  # fmt: skip
    torch.manual_seed(1)
    model.clip = CLIPVisionModel(CLIPVisionConfig(**vicuna.vision.clip_config)).eval()
    model.projector = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 4096))
    model.round()
    folder = write_original(tmp_path / "llava", model, "openai/clip-vit-large-patch14-336", dtype=torch.float16,
                            torch_dtype="float16")  # fmt: skip
    big = pixels(size=336)
    expected = model.logits(big)
    del model
    hf, back = chain(folder, tmp_path, "llava-hf"), chain(folder, tmp_path, "tove", "original")
    assert_same(tensors(back), tensors(folder))

    def run(opened):
        token, count = opened.config.image_token_id, 576
        ids = torch.tensor([[t for i in QUESTION for t in ([token] * count if i == -200 else [i])]])
        with torch.no_grad():
            return opened(input_ids=ids, pixel_values=big).logits[0]

    found = run(open_llava(folder, dtype="float32")[0])
    close(found, run(stock(hf).eval()))
    close(found[:, :32000], expected, 1e-4)
    shutil.rmtree(tmp_path)  # two gigabytes, which pytest would keep
