"""The models in transformers' interfaces, from Auto classes to the hub."""

import json
import shutil
import subprocess
import sys
from threading import Thread

import pytest
import torch
from answer_parts import make_model, picture
from experts_zoo import timm_folder
from hub_stub import HubStub
from safetensors.torch import load_file
from stage_parts import edit_manifest, inputs, logits
from tower_parts import expert_entries, make_tower, pixels, save_clip
from train_parts import ROOT, environment
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    TextIteratorStreamer,
    pipeline,
)

import tove_llava
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.data import Turn
from tove_llava.inference.generation import Answerer
from tove_llava.llava import ToveLlavaConfig, ToveLlavaForConditionalGeneration, VisionInputs
from tove_llava.llava.adapters import fold_adapters
from tove_llava.tower import ToveVisionConfig, ToveVisionModel

KINDS = ("stage1", "lora", "full")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")


@pytest.fixture(scope="module")
def root(kinds):
    picture(3, (40, 24)).save(kinds / "wide.png")
    return kinds


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model whose answers depend on the question."""
    return make_model(tmp_path_factory.mktemp("chatty"))


def opened(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


def chat(text, *images):
    content = [{"type": "image", "url": str(image)} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def prepare(processor, talks, **options):
    keys = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(talks, **keys, **options)


def answers(model, processor, prepared, new_tokens, **options):
    output = model.generate(**prepared, max_new_tokens=new_tokens, **options)
    return processor.batch_decode(output[:, prepared["input_ids"].shape[1] :], skip_special_tokens=True)


@EVERY_KIND
def test_auto_classes_open_every_kind(root, kind):
    assert type(AutoConfig.from_pretrained(root / kind)) is ToveLlavaConfig
    model = opened(root / kind)
    assert type(model) is ToveLlavaForConditionalGeneration and model.tower.is_loaded and not model.training
    expected, _ = tove_llava.load_model(root / kind)
    assert torch.equal(logits(model), logits(expected))
    assert model.config.name_or_path == str(root / kind)


@EVERY_KIND
def test_processor_prepares_prompts_and_images_as_training_does(root, kind):
    processor = AutoProcessor.from_pretrained(root / kind, backend="pil")
    prepared = prepare(processor, chat("What is it?", root / "wide.png"))
    answerer = Answerer.load(root / kind, "cpu", "float32")
    assert prepared["input_ids"].tolist() == [answerer.encode([Turn("user", "<image>\nWhat is it?")], 1)]
    assert torch.equal(prepared["pixel_values"][0], answerer.pixels(root / "wide.png"))
    assert processor.image_processor.do_pad == (Manifest.read(root / kind).image_aspect_ratio == "pad")


@EVERY_KIND
def test_pipeline(root, kind):
    pipe = pipeline("image-text-to-text", model=str(root / kind), processor=str(root / kind))
    asked = chat("What is it?", root / "wide.png")
    [first, second] = pipe(text=[asked, chat("Where?", root / "wide.png")], max_new_tokens=6, batch_size=2)
    processor = AutoProcessor.from_pretrained(root / kind)
    model, _ = tove_llava.load_model(root / kind)
    expected = answers(model, processor, prepare(processor, asked), 6)
    assert [first[0]["generated_text"][-1]["content"]] == expected
    assert second[0]["generated_text"][-1]["role"] == "assistant"


def test_a_tower_is_a_transformers_model(tmp_path):
    tower = make_tower(tmp_path / "parts", opened=True)
    tower.save_pretrained(tmp_path / "saved")
    assert type(AutoConfig.from_pretrained(tmp_path / "saved")) is ToveVisionConfig
    loaded = AutoModel.from_pretrained(tmp_path / "saved").eval()
    assert type(loaded) is ToveVisionModel
    assert torch.equal(loaded(pixels()).last_hidden_state, tower(pixels()).last_hidden_state)
    by_name, by_position = tower(pixels()), tower(pixels(), return_dict=False)
    assert torch.equal(by_position[0], by_name.last_hidden_state) and len(by_position) == len(by_name)


def test_a_tower_from_a_self_contained_folder_is_saved_with_its_backbones(tmp_path):
    tower = make_tower(tmp_path / "parts", opened=True)
    tower.save_pretrained(tmp_path / "one", self_contained=True)
    assert tower.config.clip_source == f"hf:{tmp_path / 'parts' / 'clip'}"
    ToveVisionModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for gone in ("one", "parts"):
        shutil.rmtree(tmp_path / gone)
    loaded = ToveVisionModel.from_pretrained(tmp_path / "two").eval()
    assert torch.equal(loaded(pixels()).last_hidden_state, tower(pixels()).last_hidden_state)


def test_a_tower_with_sources_of_this_machine_is_not_pushed(tmp_path):
    with pytest.raises(CheckpointError, match="folders of this machine"):
        make_tower(tmp_path).push_to_hub("me/tower")


# -- generating -------------------------------------------------------------------------------------------------------


def test_a_batch_of_eight_answers_like_eight_of_one(chatty, tmp_path):
    model, processor = chatty
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for index, file in enumerate(files):
        picture(index, (30 + index, 24)).save(file)
    text = "What is the colour of the cone that stands behind the two small boxes"
    talks = [chat(text[: 5 + 9 * index], *files[: index % 3]) for index in range(8)]
    batch = prepare(processor, talks, processor_kwargs={"padding": True})
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == 8 and bool((batch["attention_mask"][:, -1] == 1).all())
    together = answers(model, processor, batch, 12, do_sample=False)
    single = [answers(model, processor, prepare(processor, talk), 12, do_sample=False)[0] for talk in talks]
    assert together == single and len(set(single)) > 4


def test_streaming(chatty, tmp_path):
    model, processor = chatty
    picture(1, (30, 24)).save(tmp_path / "a.png")
    prepared = prepare(processor, chat("What is it?", tmp_path / "a.png"))
    [expected] = answers(model, processor, prepared, 10, do_sample=False)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"max_new_tokens": 10, "do_sample": False, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs={**prepared, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected != ""


# -- dtype, attention, devices, memory --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("stage1", {"dtype": torch.bfloat16}), ("lora", {"torch_dtype": "bfloat16"}), ("full", {"dtype": "bfloat16"})],
)
def test_dtype(root, kind, options):
    model = opened(root / kind, **options)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model.tower.frozen.clip.dtype}
    # Rotary frequencies are no weights: rounded, they would misplace the tokens of a long prompt.
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "implementation"), [("stage1", "eager"), ("lora", "sdpa"), ("full", "eager")])
def test_attention_reaches_language_model_and_encoders(root, kind, implementation, caplog):
    model = opened(root / kind, attn_implementation=implementation)
    parts = (model, model.model.language_model, model.tower, model.tower.frozen.clip)
    assert {part.config._attn_implementation for part in parts} == {implementation}
    torch.testing.assert_close(logits(model), logits(opened(root / kind)), rtol=1e-4, atol=1e-5)
    other = {"eager": "sdpa", "sdpa": "eager"}[implementation]
    model.set_attn_implementation(other)
    logits(model)
    assert {part.config._attn_implementation for part in parts} == {other}
    assert "without finding the associated sub-model" not in caplog.text


@EVERY_KIND
def test_flash_attention_that_is_not_installed_is_refused_by_the_library(root, kind):
    with pytest.raises(ImportError, match="FlashAttention2 has been toggled on, but it cannot be used"):
        opened(root / kind, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_reaches_experts(tmp_path, implementation):
    from transformers import DPTConfig, DPTForDepthEstimation

    small = DPTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 1, 1], neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4,
    )  # fmt: skip
    DPTForDepthEstimation(small).save_pretrained(tmp_path / "depth")
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    (tmp_path / "depth" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    make = timm_folder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    (tmp_path / "dinov2").mkdir()
    experts = [
        {"name": "depth", "source": f"hf:{tmp_path / 'depth'}"},
        {"name": "dinov2", "source": make(tmp_path / "dinov2"), "image_size": 32},
    ]
    config = ToveVisionConfig.from_sources(save_clip(tmp_path / "clip"), experts)
    tower = ToveVisionModel._from_config(config, attn_implementation=implementation).load_backbones().eval()
    depth, tokens = (tower.frozen.hub[name].network for name in ("depth", "dinov2"))
    expected, other = tower(pixels()).last_hidden_state, {"eager": "sdpa", "sdpa": "eager"}[implementation]
    for now in (implementation, other):
        torch.testing.assert_close(tower(pixels()).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
        assert depth.config._attn_implementation == now
        assert [block.attn.fused_attn for block in tokens.blocks] == [now == "sdpa"] * 2
        tower.set_attn_implementation(other)


def calls(module):
    """Count a module's forward passes from now on."""
    count = [0]
    module.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


def test_gradient_checkpointing_recomputes_only_the_language_model(root):
    model = opened(root / "full").train()
    data = {**inputs(model), "labels": inputs(model)["input_ids"]}
    noise = torch.randn(1, 16, 2)
    model(**data, vision=VisionInputs(gate_noise=noise)).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    function = model.model.language_model.layers[0]._gradient_checkpointing_func
    assert function.keywords == {"use_reentrant": False}
    layer, clip = calls(model.model.language_model.layers[0].mlp), calls(model.tower.frozen.clip.encoder.layers[0])
    experts, fusion = calls(model.tower.frozen.hub["normal"]), calls(model.tower.fusion)
    model(**data, vision=VisionInputs(gate_noise=noise)).loss.backward()
    assert (layer[0], clip[0], experts[0], fusion[0]) == (2, 1, 1, 1)
    for module in model.tower.frozen.modules():
        assert not any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_gradient_checkpointing_over_a_frozen_language_model(root):
    """Gradients reach projector and tower through recomputed layers."""
    model = opened(root / "stage1").train()
    model.model.language_model.requires_grad_(False)
    model.gradient_checkpointing_enable()
    model(**inputs(model), labels=inputs(model)["input_ids"]).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert model.tower.fusion.output.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "device_map"),
    [("stage1", "cpu"), ("lora", "auto"), ("lora", {"": "cpu"}), ("lora", torch.device("cpu")), ("full", "auto")],
)
def test_device_map_of_one_device(root, kind, device_map):
    model = opened(root / kind, device_map=device_map)
    assert torch.equal(logits(model), logits(opened(root / kind)))


@pytest.mark.parametrize(
    ("kind", "away"), [("stage1", PARTS[0]), ("lora", PARTS[2]), ("lora", PARTS[3]), ("full", PARTS[0])]
)
def test_device_map_with_a_part_on_disk(root, kind, away, tmp_path):
    expected = logits(opened(root / kind))
    places = {part: "disk" if part == away else "cpu" for part in PARTS}
    (tmp_path / "index.json").write_text("{}")  # what an earlier model left in the folder
    model = opened(root / kind, device_map=places, offload_folder=str(tmp_path))
    assert all(p.is_meta for p in model.get_submodule(away).parameters())
    assert torch.equal(logits(model), expected)
    options = {**inputs(model), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**options), opened(root / kind).generate(**options))


@EVERY_KIND
def test_automatic_device_map_keeps_the_tower_whole(root, kind, tmp_path):
    model = opened(root / kind)
    assert {"ToveVisionModel", "LlamaDecoderLayer"} <= set(model._no_split_modules)
    size = 4 * (model.num_parameters() - model.lm_head.weight.numel())
    split = opened(root / kind, device_map="auto", max_memory={"cpu": size}, offload_folder=str(tmp_path))
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    tower = [name for name in split.hf_device_map if name.startswith("model.vision_tower")]
    assert tower in ([], ["model.vision_tower"])
    assert torch.equal(logits(split), logits(model))


def test_meta_device(root):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(root / "full"))
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(CheckpointError, match="meta device"):
        model.tower.load_backbones()


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_contained", [False, True])
@EVERY_KIND
def test_saved_folder_is_the_same_model(root, tmp_path, kind, self_contained):
    model, processor = tove_llava.load_model(root / kind)
    expected, before = logits(model), model.config.vision_config.to_dict()
    model.save_pretrained(tmp_path / "one", self_contained=self_contained)
    processor.save_pretrained(tmp_path / "one")
    assert {**model.config.vision_config.to_dict(), "dtype": None} == {**before, "dtype": None}
    again = opened(tmp_path / "one")
    assert torch.equal(logits(again), expected)
    # Parts in a folder are saved with the next, and nothing refers to the first any more.
    again.save_pretrained(tmp_path / "two")
    processor.save_pretrained(tmp_path / "two")
    shutil.rmtree(tmp_path / "one")
    assert torch.equal(logits(opened(tmp_path / "two")), expected)
    assert torch.equal(logits(tove_llava.load_model(tmp_path / "two")[0]), expected)
    texts = [(tmp_path / "two" / name).read_text() for name in ("config.json", "tove_llava.json")]
    assert (f"hf:{root}" in "".join(texts)) != self_contained


def test_adapters_survive(root, tmp_path):
    opened(root / "lora").save_pretrained(tmp_path / "saved")
    for file in ("adapter_model.safetensors", "trained.safetensors"):
        old, new = load_file(root / "lora" / file), load_file(tmp_path / "saved" / file)
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert Manifest.read(tmp_path / "saved").kind == "lora"
    assert not torch.equal(logits(opened(tmp_path / "saved")), logits(opened(root / "stage1")))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@EVERY_KIND
def test_a_changed_model_is_saved_as_it_is(root, tmp_path, kind, dtype):
    model = opened(root / kind, dtype=dtype)
    before = logits(model)
    model.tower.detach_experts("normal")
    with torch.no_grad():
        model.tower.fusion.output.weight.add_(0.1)
        model.model.multi_modal_projector.linear_1.weight.mul_(1.5)
        if kind == "stage1":
            model.lm_head.weight.add_(0.01)
        if kind == "lora":
            model.model.language_model.layers[0].self_attn.q_proj.lora_B["default"].weight.add_(0.1)
    assert not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    assert again.dtype == model.dtype and again.tower.active_experts == ["segmentation"]
    assert torch.equal(logits(again), logits(model))


def test_folded_adapters_are_saved_whole(root, tmp_path):
    model = opened(root / "lora")
    fold_adapters(model)
    model.save_pretrained(tmp_path / "saved")
    assert Manifest.read(tmp_path / "saved").kind == "full"
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    assert torch.equal(logits(opened(tmp_path / "saved")), logits(model))


def test_shards(root, tmp_path):
    model = opened(root / "full")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(opened(tmp_path)), logits(model))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_saving_over_the_folder_that_it_was_loaded_from(root, tmp_path, kind):
    copy = shutil.copytree(root / kind, tmp_path / "copy")
    model = opened(copy)
    with torch.no_grad():
        model.tower.fusion.output.weight.add_(0.1)
    expected = logits(model)
    model.save_pretrained(copy)
    assert torch.equal(logits(model), expected) and torch.equal(logits(opened(copy)), expected)
    assert (copy / "run.json").is_file()


def test_what_would_not_be_the_same_model_is_refused(root, tmp_path):
    model = opened(root / "lora")
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.add_(0.01)
    with pytest.raises(CheckpointError, match="not what it was when it was loaded"):
        model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="cast to another dtype"):
        opened(root / "lora").to(torch.bfloat16).save_pretrained(tmp_path / "cast")
    places = dict.fromkeys(PARTS, "cpu") | {"model.language_model": "disk"}
    away = opened(root / "lora", device_map=places, offload_folder=str(tmp_path / "offload"))
    with pytest.raises(CheckpointError, match="offloaded"):
        away.save_pretrained(tmp_path / "offloaded")

    rounded = opened(root / "full")
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    rounded.model.language_model.layers[0].mlp.up_proj.weight = weight
    with pytest.raises(CheckpointError, match=r"4 or 8 bits.*up_proj"):
        rounded.save_pretrained(tmp_path / "rounded")

    opened(root / "full").save_pretrained(tmp_path / "inside", self_contained=True)
    without = opened(tmp_path / "inside", load_backbones=False)
    with pytest.raises(CheckpointError, match=r"load_backbones\(\) before saving"):
        without.save_pretrained(tmp_path / "without")


def test_adapters_that_the_format_has_no_place_for_are_refused(root, tmp_path):
    from peft import LoraConfig

    for kind, layers, name, message in (
        ("full", ["q_proj"], "default", "in no source that could be named"),
        ("stage1", ["q_proj"], "mine", "named 'default'"),
        ("stage1", ["q_proj", "linear_1"], "default", r"not on model\.multi_modal_projector\.linear_1"),
    ):
        model = opened(root / kind)
        model.add_adapter(LoraConfig(target_modules=layers), adapter_name=name)
        with pytest.raises(CheckpointError, match=message):
            model.save_pretrained(tmp_path / "x")
    fine = opened(root / "stage1")
    fine.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    fine.save_pretrained(tmp_path / "y")
    assert torch.equal(logits(opened(tmp_path / "y")), logits(fine))


def test_kinds_are_not_mixed_in_a_folder(root, tmp_path):
    folded = opened(root / "lora")
    fold_adapters(folded)
    for kind, model in (("lora", folded), ("full", opened(root / "lora"))):
        copy = shutil.copytree(root / kind, tmp_path / kind)
        with pytest.raises(CheckpointError, match="another kind of checkpoint"):
            model.save_pretrained(copy)
        assert torch.equal(logits(opened(copy)), logits(opened(root / kind)))
    with pytest.raises(CheckpointError, match="is a file"):
        folded.save_pretrained(copy / "config.json")


def test_arguments_that_cannot_be_met_are_refused(root):
    with pytest.raises(ConfigError, match=r"tove_llava\.load_model"):
        opened(root / "lora", quantization_config={"load_in_4bit": True})
    with pytest.raises(ConfigError, match="'colour'"):
        ToveLlavaForConditionalGeneration.from_pretrained(root / "stage1", colour="red")
    config = AutoConfig.from_pretrained(root / "stage1")
    config.vision_config.detached_experts = ["normal"]
    with pytest.raises(ConfigError, match="changed vision_config"):
        opened(root / "stage1", config=config)
    config = AutoConfig.from_pretrained(root / "stage1")
    config.image_aspect_ratio = "pad"
    assert opened(root / "stage1", config=config).config.image_aspect_ratio == "pad"
    _, info = ToveLlavaForConditionalGeneration.from_pretrained(root / "lora", output_loading_info=True)
    assert not any(info.values())


def test_a_folder_without_a_processor(root, tmp_path):
    opened(root / "full").save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"processor\.save_pretrained"):
        tove_llava.load_model(tmp_path / "bare")


# -- the model card ---------------------------------------------------------------------------------------------------


def card(folder):
    return (folder / "README.md").read_text()


def test_training_writes_a_card(root):
    text = card(root / "lora")
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    assert "| expert normal | a local folder (normal), map, 32 px | not stated by the source |" in text
    assert "| language model | a local folder (llm) |" in text
    assert "|  | pretrain | finetune_lora |" in text and "| data | captions.json | instruct.json |" in text
    assert "| learning rate | 0.01 | 0.01 |" in text and "| LoRA rank |  | 4 |" in text
    assert "Not evaluated" in text and str(root) not in text


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_code_in_a_card_runs(root, tmp_path, kind, monkeypatch, capsys):
    shutil.copy(root / "wide.png", tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    code = card(root / kind).split("```python\n")[1].split("```")[0]
    exec(code, {"FOLDER": str(root / kind)})
    assert capsys.readouterr().out


def test_card_names_repositories_and_licences(root, tmp_path):
    copy, licensed = shutil.copytree(root / "full", tmp_path / "copy"), tmp_path / "licensed"
    for name in ("normal", "clip"):
        shutil.copytree(root / name, licensed / name)
        (licensed / name / "README.md").write_text("---\ntags: []\nlicense: cc-by-nc-4.0\n---\n")
    model = opened(edit_manifest(copy, {"source": "hf:lmsys/vicuna-7b-v1.5"}), load_backbones=False)
    model.config.vision_config.clip_source = f"hf:{licensed / 'clip'}"
    model.config.vision_config.experts[0]["source"] = f"hf:{licensed / 'normal'}"
    model.tower.config = model.config.vision_config
    model.save_pretrained(tmp_path / "saved")
    text = card(tmp_path / "saved")
    assert "base_model:\n- lmsys/vicuna-7b-v1.5\n" in text
    assert "| language model | hf:lmsys/vicuna-7b-v1.5 | Llama 2 Community License |" in text
    assert "| vision tower's CLIP | a local folder (clip) | cc-by-nc-4.0 |" in text
    assert "| expert normal | a local folder (normal), map, 32 px | cc-by-nc-4.0 |" in text


def test_licences_go_along_with_copies(root, tmp_path):
    parts = shutil.copytree(root / "clip", tmp_path / "clip")
    (parts / "README.md").write_text("---\nlicense: mit\n---\n")
    entries = expert_entries(tmp_path / "experts", ("depth",))
    (tmp_path / "experts" / "depth" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    tower = ToveVisionModel(ToveVisionConfig.from_sources(f"hf:{parts}", entries, projection_dim=4)).load_backbones()
    tower.save_pretrained(tmp_path / "saved", self_contained=True)
    for name, licence in (("clip", "mit"), ("experts/depth", "apache-2.0")):
        assert f"license: {licence}\n" in (tmp_path / "saved" / "backbones" / name / "README.md").read_text()


@EVERY_KIND
def test_a_card_has_only_the_scores_of_the_same_weights(root, tmp_path, kind):
    copy = shutil.copytree(root / kind, tmp_path / "copy")
    (copy / "eval").mkdir()
    scores = {"full": {"scores": {"overall": {"accuracy": 0.625}}, "count": 8}}
    report = {"model": "x", "benchmarks": {"scenes": scores}}
    (copy / "eval" / "results.json").write_text(json.dumps(report))
    model, _ = tove_llava.load_model(copy)
    model.save_pretrained(tmp_path / "same")
    assert "| scenes | full | overall.accuracy | 0.625 |" in card(tmp_path / "same")
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias.add_(1e-3)
    model.save_pretrained(tmp_path / "changed")
    assert "0.625" not in card(tmp_path / "changed") and "changed since" in card(tmp_path / "changed")
    if kind == "stage1":
        other, _ = tove_llava.load_model(copy)
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
        other.save_pretrained(tmp_path / "language")
        assert "0.625" not in card(tmp_path / "language")


def test_a_model_without_a_checkpoint_has_a_card_and_a_card_of_somebody_is_kept(chatty, tmp_path):
    model, _ = chatty
    model.save_pretrained(tmp_path)
    assert "| language model | not recorded |" in card(tmp_path) and "Not recorded." in card(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert card(tmp_path) == "# Mine\n"


# -- the hub ----------------------------------------------------------------------------------------------------------

PUSH = """
import sys, torch
import tove_llava
from transformers import AutoModelForImageTextToText, AutoProcessor
sys.path.insert(0, "tests")
from pathlib import Path
from huggingface_hub.constants import HF_HUB_CACHE
from stage_parts import logits
from tower_parts import pixels
from tove_llava.llava import ToveLlavaForConditionalGeneration

def snapshots(kind):
    return Path(HF_HUB_CACHE) / f"models--me--{kind}" / "snapshots"

root = sys.argv[1]
for kind in ("lora", "full"):
    model, processor = tove_llava.load_model(f"{root}/{kind}")
    commit = model.push_to_hub(f"me/{kind}", commit_message="Mine", tags=["scenes"])
    processor.push_to_hub(f"me/{kind}")
    tower = tove_llava.load_tower(f"me/{kind}")  # fetches no language model that lies beside it
    assert torch.equal(tower(pixels(1)).last_hidden_state, model.tower(pixels(1)).last_hidden_state), kind
    assert not list(snapshots(kind).rglob("language/*.safetensors"))
    there, _ = tove_llava.load_model(f"hf:me/{kind}")
    assert torch.equal(logits(there), logits(model)), kind
    assert torch.equal(logits(ToveLlavaForConditionalGeneration.from_pretrained(f"me/{kind}")), logits(model)), kind
auto = AutoModelForImageTextToText.from_pretrained("me/full", attn_implementation="eager")
torch.testing.assert_close(logits(auto), logits(model), rtol=1e-4, atol=1e-5)
assert AutoProcessor.from_pretrained("me/full").tokenizer.padding_side == "left"
model.save_pretrained(f"{root}/pushed", push_to_hub=True, repo_id="me/second")
try:
    tove_llava.load_model("hf:me/nothing")
except tove_llava.CheckpointError as error:
    print("refused:", error)
try:
    ToveLlavaForConditionalGeneration.from_pretrained("me/nothing")
except OSError as error:
    print("refused:", error)
print("commit:", commit.oid)
"""


def test_push_and_back(root, tmp_path):
    with HubStub() as hub:
        hub.repositories["me/full"] = {"README.md": b"# Written by a person\n"}
        settings = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_of_the_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", PUSH, str(root)]
        done = subprocess.run(command, cwd=ROOT, env=environment(**settings), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("refused:") == 2 and "commit: " in done.stdout
    assert hub.tokens == {"Bearer hf_of_the_test"}
    lora, full = hub.repositories["me/lora"], hub.repositories["me/full"]
    # By value, because the sources are folders of this machine; no file names one of its paths.
    assert {"language/config.json", "backbones/clip/model.safetensors", "adapter_model.safetensors"} <= lora.keys()
    assert {"model.safetensors", "backbones/experts/normal/config.json", "processor_config.json"} <= full.keys()
    assert b"- scenes\n" in lora["README.md"] and b"# Written by a person\n" in full["README.md"]
    for files in (lora, full):
        assert not [name for name, data in files.items() if str(root).encode() in data]
    assert hub.repositories["me/second"].keys() >= {"model.safetensors", "README.md"}
