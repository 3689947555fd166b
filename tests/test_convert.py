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
from PIL import Image
from safetensors.torch import load_file, save_file
from tower_parts import open_output
from train_parts import flags, write_parts, write_records
from transformers import AutoProcessor, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration, MistralForCausalLM

from tove_llava import convert_checkpoint, load_model, open_llava
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.cli import main as cli
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.data import Turn, encode_prompt, load_tokenizer
from tove_llava.eval.rows import read_answers
from tove_llava.inference.generation import Answerer
from tove_llava.train.run import main as train

ROWS = 600  # of the original's embeddings; transformers' LLaVA has 640


class World:
    """One LLaVA in every layout."""

    def __init__(self, root):
        self.root, self.model = root, make_original()
        self.clip = write_clip(root / "clip", self.model)
        self.whole = write_original(root / "llava-whole", self.model, self.clip)
        self.base = write_language(root / "vicuna", self.model)
        self.projector = write_projector(root / "llava-projector", self.model, self.clip)
        self.lora, self.merged = write_lora(root / "llava-lora", self.model, self.clip)
        self.hf = root / "hf"
        convert_checkpoint(self.whole, self.hf, "llava-hf")
        self.tove = root / "tove"
        convert_checkpoint(self.whole, self.tove)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("convert"))


def expanded(image_token):
    return torch.tensor([[t for i in QUESTION for t in ([image_token] * TOKENS if i == -200 else [i])]])


@torch.no_grad()
def logits(model):
    """[positions, rows of the head] for the question of ``Original.logits``."""
    model = model[0] if isinstance(model, tuple) else model
    return model.eval()(input_ids=expanded(model.config.image_token_id), pixel_values=pixels()).logits[0]


def stock(folder, **keys):
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **keys)


def tensors(folder):
    """All tensors in the files of a folder, read by the libraries alone."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- the same logits --------------------------------------------------------------------------------------------------


def test_original_opened_here_equals_stock_on_the_converted_folder(world):
    ours, theirs = logits(open_llava(world.whole)), logits(stock(world.hf))
    assert ours.shape == theirs.shape == (len(QUESTION) - 1 + TOKENS, 640)
    close(ours, theirs)
    close(ours[:, :ROWS], world.model.logits(pixels()))
    assert ours[:, :ROWS].std() > 0.1 and not torch.allclose(ours, logits_without_picture(world), atol=0.1)


@torch.no_grad()
def logits_without_picture(world):
    model, _ = open_llava(world.whole)
    ids = expanded(model.config.image_token_id)
    return model(input_ids=ids, pixel_values=torch.zeros(1, 3, IMAGE, IMAGE)).logits[0]


@pytest.mark.parametrize("stored_clip", [True, False])
@pytest.mark.parametrize("kind", ["bin", "old", "safetensors"])
def test_every_way_of_storing_weights_is_read(tmp_path, world, kind, stored_clip):
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    folder = write_original(
        tmp_path / "llava",
        world.model,
        world.clip,
        kind=kind,
        stored_clip=stored_clip,
        extra=old if stored_clip else {},
    )
    close(logits(open_llava(folder))[:, :ROWS], world.model.logits(pixels()))
    convert_checkpoint(folder, tmp_path / "tove")
    close(logits(load_model(tmp_path / "tove"))[:, :ROWS], world.model.logits(pixels()))
    assert (tmp_path / "tove" / "backbones").exists() == stored_clip


def test_load_model_opens_folders_of_other_formats(world):
    for folder in (world.whole, world.hf):
        close(logits(load_model(folder))[:, :ROWS], world.model.logits(pixels()))
    model, _ = load_model(world.whole, load_backbones=False)
    assert not model.tower.is_loaded
    model, _ = load_model(world.whole, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model.tower.frozen.clip.dtype}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(model(expanded(600), pixel_values=pixels().bfloat16()).logits).all()


@pytest.mark.parametrize("pickled", [True, False])
def test_lora_folder_is_base_plus_adapters(tmp_path, world, pickled):
    folder, merged = write_lora(tmp_path / "llava-lora", world.model, world.clip, pickled=pickled)
    expected = merged_model(world, merged).logits(pixels())
    for merge in (True, False):
        opened = logits(open_llava(folder, base=str(world.base), merge_lora=merge))[:, :ROWS]
        torch.testing.assert_close(opened, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, world.model.logits(pixels()), atol=0.1)
    convert_checkpoint(folder, tmp_path / "tove", base=str(world.base))
    assert Manifest.read(tmp_path / "tove").kind == "lora"
    torch.testing.assert_close(logits(load_model(tmp_path / "tove"))[:, :ROWS], expected, rtol=1e-4, atol=1e-4)
    convert_checkpoint(folder, tmp_path / "hf", "llava-hf", base=str(world.base))
    torch.testing.assert_close(logits(stock(tmp_path / "hf"))[:, :ROWS], expected, rtol=1e-4, atol=1e-4)


def merged_model(world, merged):
    model = make_original()
    model.language.load_state_dict({**model.language.state_dict(), **merged})
    return model


def test_projector_folder_is_the_projector_on_its_language_model(tmp_path, world):
    expected = world.model.logits(pixels())
    close(logits(open_llava(world.projector, base=str(world.base)))[:, :ROWS], expected)
    convert_checkpoint(world.projector, tmp_path / "tove", base=str(world.base))
    manifest = Manifest.read(tmp_path / "tove")
    assert (manifest.kind, manifest.template) == ("trained", "plain")
    assert manifest.language["source"] == f"hf:{world.base}"
    assert not (tmp_path / "tove" / "language").exists()
    close(logits(load_model(tmp_path / "tove"))[:, :ROWS], expected)
    convert_checkpoint(world.projector, tmp_path / "hf", "llava-hf", base=str(world.base))
    close(logits(stock(tmp_path / "hf"))[:, :ROWS], expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"num_key_value_heads": 2},
        {"tie": True},
    ],
)
def test_architecture_settings_survive(tmp_path, settings):
    model = make_original(**settings)
    clip = write_clip(tmp_path / "clip", model)
    folder = write_original(tmp_path / "llava", model, clip)
    expected = model.logits(pixels())
    close(logits(open_llava(folder))[:, :ROWS], expected)
    convert_checkpoint(folder, tmp_path / "hf", "llava-hf")
    close(logits(stock(tmp_path / "hf"))[:, :ROWS], expected)
    convert_checkpoint(tmp_path / "hf", tmp_path / "llava-back", "original")
    close(logits(open_llava(tmp_path / "llava-back"))[:, :ROWS], expected)
    written = json.loads((tmp_path / "llava-back" / "config.json").read_text())
    asked = original_config(model, clip)
    keys = ["rope_theta", "rope_scaling", "num_key_value_heads", "tie_word_embeddings", "hidden_size", "rms_norm_eps"]
    assert {key: written[key] for key in keys} == {key: asked[key] for key in keys}


def test_scaled_rotary_positions_survive(tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = make_original(rope_parameters=scaled)
    scaling = {"type": "linear", "factor": 2.0}
    folder = write_original(tmp_path / "llava", model, write_clip(tmp_path / "clip", model), rope_scaling=scaling)
    close(logits(open_llava(folder))[:, :ROWS], model.logits(pixels()))
    convert_checkpoint(folder, tmp_path / "tove")
    convert_checkpoint(tmp_path / "tove", tmp_path / "llava-back", "original")
    assert json.loads((tmp_path / "llava-back" / "config.json").read_text())["rope_scaling"] == scaling


def test_mistral(tmp_path):
    model = make_original()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = MistralForCausalLM.config_class(
        **{key: getattr(model.language.config, key) for key in keys}, num_key_value_heads=2, rms_norm_eps=1e-5,
        max_position_embeddings=512, sliding_window=None, initializer_range=0.2,
    )  # fmt: skip
    model.language = MistralForCausalLM(config).eval()
    folder = write_original(
        tmp_path / "llava", model, write_clip(tmp_path / "clip", model), model_type="llava_mistral", sliding_window=None
    )
    close(logits(open_llava(folder))[:, :ROWS], model.logits(pixels()))
    convert_checkpoint(folder, tmp_path / "tove")
    convert_checkpoint(tmp_path / "tove", tmp_path / "llava-back", "original")
    assert json.loads((tmp_path / "llava-back" / "config.json").read_text())["model_type"] == "llava_mistral"
    assert_same(tensors(tmp_path / "llava-back"), tensors(folder))


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["tove", "llava-hf"])
def test_original_comes_back(tmp_path, world, way, dtype):
    folder = write_original(
        tmp_path / "llava-a", world.model, world.clip, dtype=dtype, torch_dtype=str(dtype).removeprefix("torch.")
    )
    convert_checkpoint(folder, tmp_path / "there", way)
    convert_checkpoint(tmp_path / "there", tmp_path / "llava-b", "original")
    assert_same(tensors(tmp_path / "llava-b"), tensors(folder))
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "llava-b"))
    free = {"mm_vision_tower", "model_type", "transformers_version", "_name_or_path", "max_length", "initializer_range"}
    assert {k: v for k, v in after.items() if k in before and k not in free} == {
        k: v for k, v in before.items() if k in after and k not in free
    }
    text = "USER: two  spaces\n ASSISTANT: x</s>USER: and?"
    assert load_tokenizer(tmp_path / "llava-b")(text).input_ids == load_tokenizer(folder)(text).input_ids
    assert (tmp_path / "llava-b" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert "<image>" not in load_tokenizer(tmp_path / "llava-b").get_vocab()


def test_parts_of_different_dtypes_keep_them(tmp_path, world):
    stored = original_tensors(world.model)
    dtypes = {"model.vision_tower": torch.float16, "model.mm_projector": torch.bfloat16}
    mixed = {
        name: x.to(next((d for k, d in dtypes.items() if name.startswith(k)), x.dtype)) for name, x in stored.items()
    }
    folder = write_original(tmp_path / "llava", world.model, world.clip)
    write_shards(folder, mixed)
    convert_checkpoint(folder, tmp_path / "hf", "llava-hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "tove")
    convert_checkpoint(tmp_path / "tove", tmp_path / "llava-back", "original")
    assert_same(tensors(tmp_path / "llava-back"), mixed)
    close(logits(load_model(tmp_path / "tove")), logits(open_llava(folder)))
    close(logits(stock(tmp_path / "hf")), logits(open_llava(folder)))


def test_tokenizers_saved_by_transformers_5_are_made_readable(tmp_path, world):
    """Its name for their class is unknown to transformers 4, on which the original runs."""
    folder = shutil.copytree(world.tove, tmp_path / "tove")
    file = folder / "language" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}))
    convert_checkpoint(folder, tmp_path / "llava", "original")
    written = json.loads((tmp_path / "llava" / "tokenizer_config.json").read_text())
    assert (written["tokenizer_class"], written["legacy"]) == ("LlamaTokenizer", False)
    assert "backend" not in written


def test_llava_hf_comes_back(tmp_path, world):
    convert_checkpoint(world.hf, tmp_path / "tove")
    convert_checkpoint(tmp_path / "tove", tmp_path / "back", "llava-hf")
    assert_same(tensors(tmp_path / "back"), tensors(world.hf))
    assert {name.split(".")[0] for name in tensors(world.hf)} == {
        "language_model", "vision_tower", "multi_modal_projector",
    }  # fmt: skip
    # By way of the original, which has no rows for the image token and the padding behind it.
    convert_checkpoint(world.hf, tmp_path / "llava", "original")
    convert_checkpoint(tmp_path / "llava", tmp_path / "again", "llava-hf")
    assert_same(tensors(tmp_path / "again"), tensors(world.hf))


def test_whole_clip_is_kept_and_named_by_layer(world):
    config = LlavaConfig.from_pretrained(world.hf)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.vision_config.num_hidden_layers == 3
    stored = tensors(world.hf)
    assert torch.equal(
        stored["vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"],
        world.model.clip.state_dict()["encoder.layers.2.mlp.fc1.weight"],
    )


def test_stage_one_and_lora_folders_come_back(tmp_path, world):
    for folder in (world.projector, world.lora):
        convert_checkpoint(folder, tmp_path / folder.name / "tove", base=str(world.base))
        convert_checkpoint(tmp_path / folder.name / "tove", tmp_path / folder.name / "llava-lora", "original")
        back = tmp_path / folder.name / "llava-lora"
        assert_same(tensors(back), tensors(folder))
        names = {"config.json", "mm_projector.bin"} if folder == world.projector else {
            "config.json", "adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"
        }  # fmt: skip
        assert {file.name for file in back.iterdir()} == names
        config = json.loads((back / "config.json").read_text())
        assert (config["mm_vision_tower"], config["vocab_size"]) == (str(world.clip), ROWS)
    before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (world.lora, back))
    for key in ("r", "lora_alpha", "lora_dropout", "bias", "peft_type", "task_type", "target_modules"):
        assert after[key] == before[key], key


def test_names_are_those_of_the_reference(tmp_path, conformance):
    names = json.loads((conformance / "llava" / "parameter_names.json").read_text())
    model = make_original(layers=1, clip_layers=1)
    folder = write_original(tmp_path / "llava", model, write_clip(tmp_path / "clip", model), mm_vision_select_layer=-1)
    convert_checkpoint(folder, tmp_path / "tove")
    convert_checkpoint(tmp_path / "tove", tmp_path / "llava-back", "original")
    assert set(tensors(tmp_path / "llava-back")) == set(names["stage2_full"]["state_dict_keys"])
    base = write_language(tmp_path / "base", model)
    stage1 = write_projector(tmp_path / "stage1" / "a", model, tmp_path / "clip", mm_vision_select_layer=-1)
    lora, _ = write_lora(tmp_path / "stage2" / "a", model, tmp_path / "clip", mm_vision_select_layer=-1)
    for source in (stage1, lora):
        convert_checkpoint(source, source.parent / "tove", base=str(base))
        convert_checkpoint(source.parent / "tove", source.parent / "llava-lora", "original")
    adapters = names["stage2_lora"]
    for file, keys in (
        (tmp_path / "stage1" / "llava-lora" / "mm_projector.bin", names["stage1"]["mm_projector.bin"]),
        (tmp_path / "stage2" / "llava-lora" / "non_lora_trainables.bin", adapters["non_lora_trainables.bin"]),
    ):
        assert set(torch.load(file)) == set(keys)
    assert set(load_file(tmp_path / "stage2" / "llava-lora" / "adapter_model.safetensors")) == set(
        adapters["adapter_file_keys"]
    )


def test_names_of_old_and_new_transformers_are_read(tmp_path, world):

    def module_name(name):
        inside = "model." + name.replace("language_model.model.", "language_model.")
        return "lm_head.weight" if name.endswith("lm_head.weight") else inside

    renamings = (
        lambda n: n,
        module_name,
        lambda n: n.replace("vision_tower.vision_model.", "vision_tower."),
        lambda n: module_name(n).replace("vision_model.", ""),
    )
    expected = logits(stock(world.hf))
    for number, rename in enumerate(renamings):
        folder = tmp_path / str(number)
        shutil.copytree(world.hf, folder)
        save_file({rename(n): x for n, x in tensors(world.hf).items()}, folder / "model.safetensors")
        close(logits(open_llava(folder)), expected)


# -- tokens -----------------------------------------------------------------------------------------------------------


def padded_llava_hf(world, folder):
    """As llava-hf's own: ``<image>`` and ``<pad>`` behind the vocabulary, rows up to a multiple of 64, all random."""
    shutil.copytree(world.hf, folder)
    generator = torch.Generator().manual_seed(1)
    stored = tensors(world.hf)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        stored[name] = torch.cat([stored[name][:ROWS], torch.randn(40, 48, generator=generator)])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"] = 601
    for key in ("conversation_template", "image_aspect_ratio"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": 600, "<pad>": 601}))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
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
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["vocab_size"] == ROWS
    close(logits(open_llava(tmp_path / "llava"))[:, :ROWS], expected[:, :ROWS])

    convert_checkpoint(folder, tmp_path / "tove")
    close(logits(load_model(tmp_path / "tove")), expected)
    convert_checkpoint(tmp_path / "tove", tmp_path / "back", "llava-hf")
    assert_same(tensors(tmp_path / "back"), tensors(folder))
    convert_checkpoint(tmp_path / "tove", tmp_path / "llava-2", "original")
    assert_same(tensors(tmp_path / "llava-2"), original_tensors(world.model))


def test_rows_and_tokens_of_the_users_own_stay(tmp_path, world):
    """A vocabulary that was padded and extended before LLaVA: neither its rows nor its tokens are taken for ours."""
    model = make_original(vocab=608)
    folder = write_original(tmp_path / "llava", model, world.clip)
    (folder / "added_tokens.json").write_text(json.dumps({"<box>": 600, "</box>": 601}))
    convert_checkpoint(folder, tmp_path / "tove")
    assert load_model(tmp_path / "tove", load_backbones=False)[1].image_token_id == 602
    convert_checkpoint(tmp_path / "tove", tmp_path / "llava-a", "original")
    assert_same(tensors(tmp_path / "llava-a"), tensors(folder))
    convert_checkpoint(tmp_path / "tove", tmp_path / "hf", "llava-hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "llava-b", "original")
    back = load_tokenizer(tmp_path / "llava-b")
    assert back("<box> a </box>").input_ids == load_tokenizer(folder)("<box> a </box>").input_ids
    assert len(back) == 602 and "<image>" not in back.get_vocab()
    assert len(tensors(tmp_path / "llava-b")["lm_head.weight"]) == 602


def test_prompts_are_the_originals(tmp_path, world):
    """The ids of the original's template, from every folder, by this package and by stock classes."""
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
    convert_checkpoint(folder, tmp_path / "hf", "llava-hf")
    assert stock(tmp_path / "hf").config.text_config.vocab_size == 32064
    assert LlavaConfig.from_pretrained(tmp_path / "hf").image_token_index == 32000
    close(logits(open_llava(folder)), logits(stock(tmp_path / "hf")))
    convert_checkpoint(tmp_path / "hf", tmp_path / "llava-back", "original")
    assert_same(tensors(tmp_path / "llava-back"), tensors(folder))


def test_processors_show_pictures_as_in_training(tmp_path, world):
    """Wide pictures are padded to a square for models of ``image_aspect_ratio: pad``, and cut for others."""
    image = Image.new("RGB", (80, 20), (255, 0, 0))
    square = write_original(tmp_path / "llava", world.model, world.clip, image_aspect_ratio="square")
    seen = {}
    for name, folder in (("pad", world.whole), ("square", square)):
        convert_checkpoint(folder, tmp_path / name)
        for opened in (folder, tmp_path / name):
            processor = load_model(opened, load_backbones=False)[1]
            answerer = Answerer.load(opened, "cpu", "float32")
            pixel_values = processor(images=[image], text="<image>", return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(pixel_values[0], answerer.pixels(image), rtol=0, atol=1e-5)
            seen[name] = pixel_values
    assert not torch.allclose(seen["pad"], seen["square"], atol=0.5)


def test_merged_adapters_go_to_the_original(tmp_path, world):
    """LoRA of the original -> here -> merged -> a whole model of the original."""
    convert_checkpoint(world.lora, tmp_path / "lora", base=str(world.base))
    assert cli(["merge-lora", "--model", str(tmp_path / "lora"), "--out", str(tmp_path / "merged")]) == 0
    convert_checkpoint(tmp_path / "merged", tmp_path / "llava", "original")
    expected = merged_model(world, world.merged).logits(pixels())
    torch.testing.assert_close(logits(open_llava(tmp_path / "llava"))[:, :ROWS], expected, rtol=1e-4, atol=1e-4)


# -- CLIP -------------------------------------------------------------------------------------------------------------


def test_public_name_of_clip_survives(tmp_path, world, monkeypatch):
    """CLIP's name on the hub, which is nowhere in reach: a preset knows its architecture, the folder its weights."""
    preset = {"vision": {"clip": "hf:someone/clip", "clip_config": world.model.clip.config.to_dict()},
              "language": {"source": "bundled:llm"}}  # fmt: skip
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "known.yaml").write_text(yaml.safe_dump(preset))
    monkeypatch.setattr("tove_llava.presets.preset.FOLDER", tmp_path / "presets")
    folder = write_original(tmp_path / "llava", world.model, "someone/clip")
    convert_checkpoint(folder, tmp_path / "tove")
    close(logits(load_model(tmp_path / "tove"))[:, :ROWS], world.model.logits(pixels()))
    convert_checkpoint(tmp_path / "tove", tmp_path / "llava-back", "original")
    assert json.loads((tmp_path / "llava-back" / "config.json").read_text())["mm_vision_tower"] == "someone/clip"
    assert not (tmp_path / "llava-back" / "vision_tower").exists()
    assert_same(tensors(tmp_path / "llava-back"), tensors(folder))
    # A tower that was trained is not the public one.
    folder = write_original(tmp_path / "llava-2", world.model, "someone/clip", unfreeze_mm_vision_tower=True)
    convert_checkpoint(folder, tmp_path / "tove-2")
    convert_checkpoint(tmp_path / "tove-2", tmp_path / "llava-3", "original")
    assert json.loads((tmp_path / "llava-3" / "config.json").read_text())["mm_vision_tower"] == str(
        tmp_path / "llava-3" / "vision_tower"
    )


def test_clip_by_reference_is_read_by_transformers_4_too(tmp_path, world):
    """transformers 4 takes random numbers for a CLIP that transformers 5 saved: its names are copied right."""
    base = {"base": str(world.base)}
    world.model.clip.save_pretrained(tmp_path / "clip")
    assert not any(name.startswith("vision_model.") for name in load_file(tmp_path / "clip" / "model.safetensors"))
    for clip, copied in ((world.clip, False), (tmp_path / "clip", True)):
        work = tmp_path / str(copied)
        folder = write_projector(work / "llava", world.model, clip)
        convert_checkpoint(folder, work / "tove", **base)
        convert_checkpoint(work / "tove", work / "llava-back", "original")
        named = json.loads((work / "llava-back" / "config.json").read_text())["mm_vision_tower"]
        assert named == str(work / "llava-back" / "vision_tower" if copied else clip)
        stored = load_file(f"{named}/model.safetensors")
        assert_same(stored, {f"vision_model.{n}": x for n, x in world.model.clip.state_dict().items()})
        close(logits(open_llava(work / "llava-back", **base))[:, :ROWS], world.model.logits(pixels()))


def test_clip_flag_and_moved_folders(tmp_path, world):
    lost = write_original(tmp_path / "llava", world.model, "/nowhere/clip", stored_clip=False)
    with pytest.raises(CheckpointError, match="--clip"):
        open_llava(lost)
    close(logits(open_llava(lost, clip=str(world.clip)))[:, :ROWS], world.model.logits(pixels()))
    convert_checkpoint(world.hf, tmp_path / "made" / "llava", "original")
    (tmp_path / "made").rename(tmp_path / "moved")
    close(logits(open_llava(tmp_path / "moved" / "llava"))[:, :ROWS], world.model.logits(pixels()))


def test_pictures_are_normalised_as_clips_own_folder_says(tmp_path, world):
    clip = tmp_path / "clip"
    shutil.copytree(world.clip, clip)
    settings = json.loads((clip / "preprocessor_config.json").read_text()) | {"image_mean": [0.5] * 3}
    (clip / "preprocessor_config.json").write_text(json.dumps(settings))
    folder = write_original(tmp_path / "llava", world.model, clip, image_aspect_ratio="square")
    for to, back in (("tove", load_model), ("llava-hf", open_llava)):
        convert_checkpoint(folder, tmp_path / to, to)
        model, processor = back(tmp_path / to)
        assert list(processor.image_processor.image_mean) == [0.5] * 3
        assert list(model.config.vision_config.image_mean) == [0.5] * 3
        assert model.config.image_aspect_ratio == "square"


# -- with experts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(world, tmp_path_factory):
    """The world's LLaVA with two experts, and a preset and records to train it on."""
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


@pytest.mark.parametrize("fusion", ["top1", "add"])
def test_other_residual_fusions_start_from_the_checkpoint_too(tmp_path, world, start, fusion):
    preset, override = str(start / "preset.yaml"), [f"vision.fusion={fusion}"]
    assert convert_checkpoint(world.whole, tmp_path / "out", preset=preset, overrides=override) == []
    model, _ = load_model(tmp_path / "out")
    assert model.tower.config.fusion == fusion
    assert torch.equal(logits(model), logits(open_llava(world.whole)))


@pytest.mark.parametrize("fusion", ["replace", "sequence_append"])
def test_fusions_that_change_the_tokens_at_once_are_remarked_on(tmp_path, world, start, fusion):
    preset, override = str(start / "preset.yaml"), [f"vision.fusion={fusion}"]
    (remark,) = convert_checkpoint(world.whole, tmp_path / "out", preset=preset, overrides=override)
    assert repr(fusion) in remark and "before it is trained" in remark
    assert load_model(tmp_path / "out")[0].tower.config.fusion == fusion


def test_training_starts_from_it(world, start):
    """Stage 1 and LoRA of a converted folder, which may be moved before: the language model is the checkpoint's."""
    moved = start / "elsewhere"
    shutil.copytree(start / "start", moved)
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
    convert_checkpoint(world.tove, tmp_path / "tove", preset=str(start / "preset.yaml"))
    assert torch.equal(logits(load_model(tmp_path / "tove")), logits(load_model(world.tove)))
    convert_checkpoint(world.lora, tmp_path / "lora", preset=str(start / "preset.yaml"), base=str(world.base))
    model, _ = load_model(tmp_path / "lora")
    expected = merged_model(world, world.merged).logits(pixels())
    torch.testing.assert_close(logits(model)[:, :ROWS], expected, rtol=1e-4, atol=1e-4)
    assert model.tower.config.attached_experts == ["normal", "segmentation"]


def test_presets_that_would_change_the_logits_are_refused(tmp_path, world, start):
    preset = str(start / "preset.yaml")
    for override, words in (
        ("vision.clip_layer=-1", "clip_layer"),
        ("vision.image_size=64", "image_size"),
        ("vision.fusion=channel_concat", "width"),
    ):
        with pytest.raises(ConfigError, match=words):
            convert_checkpoint(world.whole, tmp_path / "out", preset=preset, overrides=[override])
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
    """Full fine-tuning of a tower that is CLIP alone: its grown vocabulary is cut again."""
    preset = tmp_path / "alone.yaml"
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
        close(logits(open_llava(out, **base))[:, :ROWS], expected[:, :ROWS])
        convert_checkpoint(tmp_path / stage, tmp_path / f"hf-{stage}", "llava-hf")
        torch.testing.assert_close(logits(stock(tmp_path / f"hf-{stage}")), expected, rtol=1e-4, atol=1e-4)
    whole = tensors(tmp_path / "llava-finetune")
    assert len(whole["lm_head.weight"]) == ROWS and len(load_tokenizer(tmp_path / "llava-finetune")) == ROWS
    assert json.loads((tmp_path / "llava-finetune" / "config.json").read_text())["mm_vision_tower"] == str(world.clip)


# -- evaluation and chat ----------------------------------------------------------------------------------------------


def test_answers_are_the_same_from_every_folder(tmp_path, world):
    picture = torch.randint(0, 256, (24, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(picture.numpy())
    answers = []
    for folder in (world.whole, world.hf, world.tove):
        answerer = Answerer.load(folder, "cpu", "float32")
        prompt = answerer.encode([Turn("user", "<image>\nWhat is it?")], 1)
        features = answerer.features(answerer.pixels(image)[None])
        answers.append(answerer.generate([prompt], features, max_new_tokens=12))
    assert answers[0] == answers[1] == answers[2] and answers[0][0]


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


def test_published_llava_hf_folders_are_asked_with_the_originals_tokens(tmp_path, world):
    """Their tokenizer is converted by transformers, whose ids differ in runs of spaces."""
    folder = padded_llava_hf(world, tmp_path / "hf")
    turns = [Turn("user", "<image>\nTwo  spaces?"), Turn("assistant", "Yes."), Turn("user", " And?")]
    found = Answerer.load(folder, "cpu", "float32").encode(turns, 1)
    expected = encode_prompt(turns, load_tokenizer(world.whole), "v1")
    assert found == [t for i in expected for t in ([600] * TOKENS if i == -200 else [i])]


# -- real widths ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_published_widths_at_reduced_depth(tmp_path):
    """CLIP ViT-L/14-336 whole, one layer of Vicuna-7B, in half precision; the published name of CLIP, no network."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from tove_llava.presets import load_preset

    vicuna = load_preset("vicuna-7b")
    model = make_original(vocab=32000, width=4096, clip_width=32, layers=1, intermediate_size=11008,
                          num_attention_heads=32, num_key_value_heads=32)  # fmt: skip
    torch.manual_seed(1)
    model.clip = CLIPVisionModel(CLIPVisionConfig(**vicuna.vision.clip_config)).eval()
    model.projector = torch.nn.Sequential(
        torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 4096)
    ).eval()
    model.round()
    folder = write_original(tmp_path / "llava", model, "openai/clip-vit-large-patch14-336", dtype=torch.float16,
                            torch_dtype="float16")  # fmt: skip
    big = pixels(size=336)
    expected = model.logits(big)
    del model
    convert_checkpoint(folder, tmp_path / "hf", "llava-hf")
    convert_checkpoint(folder, tmp_path / "tove")
    convert_checkpoint(tmp_path / "tove", tmp_path / "llava-back", "original")
    shutil.rmtree(tmp_path / "tove")
    assert_same(tensors(tmp_path / "llava-back"), tensors(folder))
    shutil.rmtree(tmp_path / "llava-back")

    def run(opened):
        token, count = opened.config.image_token_id, 576
        ids = torch.tensor([[t for i in QUESTION for t in ([token] * count if i == -200 else [i])]])
        with torch.no_grad():
            return opened(input_ids=ids, pixel_values=big).logits[0]

    ours = run(open_llava(folder, dtype="float32")[0])
    theirs = run(stock(tmp_path / "hf").eval())
    close(ours, theirs)
    torch.testing.assert_close(ours[:, :32000], expected, rtol=1e-4, atol=1e-4)
    shutil.rmtree(tmp_path)  # two gigabytes, which pytest would keep
