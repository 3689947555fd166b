"""The layers with adapters, merging them, and uses of the merged model."""

import shutil
from contextlib import nullcontext

import pytest
import torch
import yaml
from impostors import NAMES, impostors
from safetensors.torch import load_file, save_file
from stage_parts import HARD, close, inputs, train_stages
from train_parts import flags, write_parts, write_records
from transformers import AutoModelForImageTextToText

from tove_llava import build_model, load_model, load_preset
from tove_llava.checkpoints.conversion import merge_lora
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.cli import main as cli
from tove_llava.core.errors import CheckpointError
from tove_llava.data import Turn
from tove_llava.inference.generation import Answerer
from tove_llava.llava.adapters import adapter_layers, inputs_left_to_autocast
from tove_llava.train.arguments import parse
from tove_llava.train.run import main, run
from tove_llava.train.stages import freeze

LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = train_stages(tmp_path_factory.mktemp("lora"), lora=("finetune_lora", "--max_steps", "4", *HARD))
    merge_lora(folder / "lora", folder / "plain")
    return folder


def logits(model):
    """Compute logits of an image with some bytes, and without an image."""
    with torch.no_grad():
        rows = model(**inputs(model)).logits[0], model(input_ids=torch.tensor([[1, 70, 80]])).logits[0]
    return torch.cat(rows)


def test_under_autocast_adapters_take_their_inputs_as_they_come(root):
    model, _ = load_model(root / "lora")
    taken = set()
    for layer in adapter_layers(model).values():
        layer.lora_A["default"].register_forward_pre_hook(lambda _, args: taken.add(args[0].dtype))
        layer.get_base_layer().to(torch.bfloat16)
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    found = []
    for context in (nullcontext(), inputs_left_to_autocast(model)):
        taken.clear()
        model.zero_grad()
        hidden = torch.randn(1, 5, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(1))
        layer = model.model.language_model.layers[0].mlp
        with torch.autocast("cpu", torch.bfloat16), context:
            out = layer(hidden.bfloat16())
        out.float().square().sum().backward()
        found.append([out, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert taken == {torch.bfloat16}  # not float32, to which peft casts them
    assert len(found[0]) == 7
    assert all(torch.equal(ours, plain) for plain, ours in zip(*found, strict=True))


# -- where adapters go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 4, 8])
def test_adapters_are_only_on_the_language_model_whatever_a_tower_s_layers_are_called(tmp_path, bits):
    file = write_parts(tmp_path)
    write_records(tmp_path, captions=4, count=4)
    with impostors(tmp_path / "impostor") as vision:
        preset = yaml.safe_load(file.read_text())
        preset["vision"] |= vision
        file.write_text(yaml.safe_dump(preset))
        model, _ = build_model(str(file))
        expert = {name: value.clone() for name, value in model.tower.frozen.hub.state_dict().items()}
        assert {name.split(".")[-2] for name in expert} >= set(NAMES)

        out, words = tmp_path / "out", ["--max_steps", "2", "--bits", str(bits), "--learning_rate", "0.05"]
        assert main(flags(tmp_path, "finetune_lora", out, *words)) == 0
        adapters = [name.removeprefix("base_model.model.") for name in load_file(out / "adapter_model.safetensors")]
        assert {tuple(name.split(".")[:3]) for name in adapters} == {("model", "language_model", "layers")}
        assert {name.split(".")[-3] for name in adapters} == LAYERS
        trained, untrained = load_file(out / "trained.safetensors"), dict(model.named_parameters())
        fusion = [name for name in trained if ".fusion.language_model." in name]
        assert {name.split(".")[-2] for name in fusion} == set(NAMES)  # whole and trained, not adapted
        assert any(not torch.equal(trained[name], untrained[name]) for name in fusion)

        loaded, _ = load_model(out)
        assert all(torch.equal(value, expert[name]) for name, value in loaded.tower.frozen.hub.state_dict().items())
        merge_lora(out, tmp_path / "plain")
        close(logits(load_model(tmp_path / "plain")[0]), logits(loaded))


def test_adapters_miss_the_student_of_a_merge(root):
    """The student is a CLIP inside, with layers q_proj, k_proj and v_proj."""
    preset = load_preset(str(root / "preset.yaml"))
    model, _ = build_model(preset)
    trainable = freeze(model, preset.stage("merge"))
    student = [name for name, _ in model.named_modules() if ".student." in name and name.endswith("q_proj")]
    assert student
    assert all(name.startswith("model.language_model.layers.") for name in trainable.parts["lora"])


# -- merging ----------------------------------------------------------------------------------------------------------


def test_merged_folder_computes_base_and_adapters(root):
    plain, processor = load_model(root / "plain")
    adapted, own = load_model(root / "lora")
    base, _ = load_model(root / "stage1")
    close(logits(plain), logits(adapted))
    assert not torch.allclose(logits(plain), logits(base), atol=0.05)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    manifest = Manifest.read(root / "plain")
    assert (manifest.kind, manifest.stage, manifest.template) == ("full", "finetune_lora", "v1")
    assert processor.tokenizer.get_vocab() == own.tokenizer.get_vocab()


def test_weights_of_the_merged_folder_are_the_formula_s(root):
    """Adapted weights are W + alpha / r B A; others stay."""
    saved, adapter = load_file(root / "plain/model.safetensors"), load_file(root / "lora/adapter_model.safetensors")
    base = load_file(root / "llm" / "model.safetensors")
    layer = "layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.model.language_model.{layer}.lora_{x}.weight"] for x in "AB")
    expected = base[f"model.{layer}.weight"] + 8 / 8 * b @ a
    close(saved[f"model.language_model.{layer}.weight"], expected)
    assert not torch.allclose(expected, base[f"model.{layer}.weight"], atol=1e-3)
    norm = "layers.1.input_layernorm.weight"
    assert torch.equal(saved[f"model.language_model.{norm}"], base[f"model.{norm}"])
    for name, value in load_file(root / "lora" / "trained.safetensors").items():
        assert torch.equal(saved[name], value)


def test_merged_folder_is_plain(root):
    names = {path.name for path in (root / "plain").iterdir()}
    assert not {name for name in names if "adapter" in name} and "model.safetensors" in names
    expected = logits(load_model(root / "plain")[0])
    close(logits(AutoModelForImageTextToText.from_pretrained(root / "plain").eval()), expected)
    close(logits(Answerer.load(root / "plain", "cpu").model), expected)


def test_merged_in_another_dtype(root, tmp_path):
    merge_lora(root / "lora", tmp_path / "half", dtype="bfloat16")
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    model, _ = load_model(tmp_path / "half")
    assert model.dtype == torch.bfloat16 and model.tower.frozen.clip.dtype == torch.bfloat16
    close(logits(load_model(tmp_path / "half", dtype="float32")[0]), logits(load_model(root / "lora")[0]), 0.1)


def test_merged_folder_takes_along_what_lies_in_the_checkpoint(root, tmp_path):
    """A self-contained checkpoint, and one with experts merged into its CLIP."""
    (source := tmp_path / "parts").mkdir()
    write_parts(source)
    write_records(source, captions=4, count=4)
    two = ["--max_steps", "2"]
    assert main(flags(source, "finetune_lora", tmp_path / "own", *two, "--self_contained", "True")) == 0
    assert main(flags(source, "merge", tmp_path / "lite", *two, "--pretrained", str(tmp_path / "own"))) == 0
    before = {name: logits(load_model(tmp_path / name)[0]) for name in ("own", "lite")}
    for name in before:
        merge_lora(tmp_path / name, tmp_path / f"{name}-plain")
    for gone in (source, tmp_path / "own", tmp_path / "lite"):
        shutil.rmtree(gone)
    for name, expected in before.items():
        close(logits(load_model(tmp_path / f"{name}-plain")[0]), expected)


@pytest.mark.parametrize("stage", ["pretrain", "finetune_lora", "finetune", "merge"])
def test_every_stage_starts_from_the_merged_folder(root, tmp_path, stage):
    start = logits(load_model(root / "plain")[0])
    words = ["--pretrained", str(root / "plain"), "--max_steps"]
    if stage != "merge":  # whose tower becomes CLIP
        assert main(flags(root, stage, tmp_path / "still", *words, "1", "--learning_rate", "0")) == 0
        close(logits(load_model(tmp_path / "still")[0]), start)
    assert main(flags(root, stage, tmp_path / "out", *words, "2")) == 0
    assert not torch.allclose(logits(load_model(tmp_path / "out")[0]), start, atol=1e-4)
    kinds = {"pretrain": "trained", "finetune_lora": "lora", "finetune": "full", "merge": "full"}
    assert Manifest.read(tmp_path / "out").kind == kinds[stage]


def test_adapters_on_a_merged_folder_can_be_merged_again(root, tmp_path):
    copy = shutil.copytree(root / "plain", tmp_path / "base")
    words = ["--pretrained", str(copy), "--max_steps", "2", *HARD]
    assert main(flags(root, "finetune_lora", tmp_path / "more", *words, "--self_contained", "True")) == 0
    merge_lora(tmp_path / "more", tmp_path / "plain")
    expected = logits(load_model(tmp_path / "more")[0])
    close(logits(load_model(tmp_path / "plain")[0]), expected)
    assert main(flags(root, "finetune_lora", tmp_path / "named", *words)) == 0
    close(logits(load_model(tmp_path / "named")[0]), expected)
    shutil.rmtree(copy)
    close(logits(load_model(tmp_path / "more")[0]), expected)  # its language model lies in it
    with pytest.raises(CheckpointError, match=str(copy)):
        load_model(tmp_path / "named")


def test_a_changed_base_is_noticed(root, tmp_path, monkeypatch):
    copy = shutil.copytree(root / "plain", tmp_path / "base")
    assert main(flags(root, "finetune_lora", tmp_path / "more", "--pretrained", str(copy), "--max_steps", "1")) == 0
    load_model(tmp_path / "more")
    stored = load_file(copy / "model.safetensors")
    stored["model.language_model.layers.0.mlp.up_proj.weight"] *= 1.01
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not those that its tove_llava.json names by their SHA-256"):
        load_model(tmp_path / "more")
    monkeypatch.setenv("TOVE_ACCEPT_CHANGED_WEIGHTS", "1")  # of the base; adapters still belong to the old one
    with pytest.raises(CheckpointError, match="changed since"):
        load_model(tmp_path / "more")


def test_the_verb(root, tmp_path, capsys):
    assert cli(["merge-lora", "--model", str(root / "lora"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    written, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", root / "plain"))
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("stage1", "no LoRA adapters to merge: it is a checkpoint of kind 'trained'"),
        ("plain", "kind 'full'"),
        ("llm", "not a complete ToVE-LLaVA checkpoint"),
        ("nowhere", "is not a folder"),
    ],
)
def test_what_cannot_be_merged_is_refused(root, tmp_path, capsys, model, message):
    assert cli(["merge-lora", "--model", str(root / model), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_and_left_alone(root, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert cli(["merge-lora", "--model", str(root / "lora"), "--out", str(tmp_path / "out")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_nothing_is_left_of_a_merge_that_failed(root, tmp_path, monkeypatch):
    def full_disk(folder, *args, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tove_llava.checkpoints.formats.tove.save_checkpoint", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        merge_lora(root / "lora", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_stage_two_sends_a_lora_folder_to_merge_lora(root, tmp_path):
    with pytest.raises(CheckpointError, match="stage 1's folder.*merge-lora"):
        run(parse(flags(root, "finetune_lora", tmp_path / "x", "--pretrained", str(root / "lora"))))


# -- batches ----------------------------------------------------------------------------------------------------------

QUESTIONS = [
    ("What is it?", 1),
    ("How many red spheres are there in the image, and where are they?", 1),
    ("Hello", 0),
    ("Is there a cone in it, or is there a cube, or neither of them?", 1),
    ("Which of these two images has more objects in it? Answer with one word.", 2),
    ("Name a colour.", 0),
    ("Describe the whole scene, please.", 1),
    ("What is the capital of France, and which river runs through it? Say it in one short sentence, please.", 0),
]


def assert_batch_is_eight_times_one(model, processor, template, new_tokens):
    """Compare through our own answering, and through transformers' processor and ``generate``."""
    answerer = Answerer(model, processor, template)
    generator = torch.Generator().manual_seed(0)
    size = processor.image_processor.crop_size["height"]
    images = [torch.randn(count, 3, size, size, generator=generator) for _, count in QUESTIONS]
    turns = [[Turn("user", "<image>\n" * count + text)] for text, count in QUESTIONS]
    prompts = [answerer.encode(turn, count) for turn, (_, count) in zip(turns, QUESTIONS, strict=True)]
    assert len({len(prompt) for prompt in prompts}) == 8
    features = [answerer.features(p) if len(p) else [] for p in images]
    single = [answerer.generate([p], f, new_tokens)[0] for p, f in zip(prompts, features, strict=True)]
    together = answerer.generate(prompts, [f for row in features for f in row], new_tokens)
    assert together == single
    assert len(set(single)) > 4 and max(map(len, single)) > 8

    tokenizer = processor.tokenizer

    def generate(rows, pixels):
        padded = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        found = {"pixel_values": pixels} if len(pixels) else {}
        keys = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        output = model.generate(**padded, **found, **keys)[:, padded["input_ids"].shape[1] :]
        return tokenizer.batch_decode(output, skip_special_tokens=True)

    stock = [generate([prompt], pixels)[0] for prompt, pixels in zip(prompts, images, strict=True)]
    assert generate(prompts, torch.cat(images)) == stock and [text.strip() for text in stock] == single


def opened(preset, **keys):
    """Build a preset's model whose tower and projector have an effect."""
    model, processor = build_model(preset, **keys)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (*model.tower.fusion.parameters(), *model.model.multi_modal_projector.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), processor


def test_batch_of_prompts_of_different_lengths_answers_as_one_by_one():
    assert_batch_is_eight_times_one(*opened("tiny", template="v1"), "v1", new_tokens=24)


@pytest.mark.slow
def test_batch_answers_as_one_by_one_with_a_real_chat_model():
    assert_batch_is_eight_times_one(*opened("small", template="chat_template"), "chat_template", new_tokens=24)
