"""Merging: the losses, the learned weights, and a plain CLIP result."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from data_helpers import CHATML
from export_parts import ask_stock, both_logits, compare_in_clean_environment
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tower_parts import make_tower, open_output, pixels, text_config
from train_killed import train_until_killed
from train_parts import flags, losses, weights, write_inputs
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration

import tove_llava
from tove_llava.checkpoints.conversion import export_model
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.cli import main as cli
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.llava.build import assemble
from tove_llava.presets import LoraPreset, MergePreset, ProjectorPreset
from tove_llava.train import run
from tove_llava.train.arguments import Parser, parse
from tove_llava.train.merging import MERGE_LOSSES, FurtherImages, ImagePool, MergingTower, merge_loss, merged_encoder
from tove_llava.train.run import main, make_dataset
from tove_llava.train.stage_data import make_further_images
from tove_llava.train.stages import MERGE_OPTIMIZERS, Trainable, make_optimizer, parameter_groups
from tove_llava.train.start import STARTS

# -- losses ----------------------------------------------------------------------------------------------------------


def tokens(seed, shape=(3, 5, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 100), st.floats(1e-2, 1e3), st.sampled_from(["uniform", "transfer"]))
def test_unlearned_mse_is_one_whatever_the_scale(seed, scale, weights):
    base, target = tokens(seed) * scale, tokens(seed + 1) * scale
    torch.testing.assert_close(merge_loss(base, base, target, token_weights="uniform"), torch.ones(3))
    assert (merge_loss(base, base, target, token_weights=weights) > 0.5).all()


@pytest.mark.parametrize("loss", MERGE_LOSSES.names())
@pytest.mark.parametrize("weights", ["uniform", "transfer"])
def test_loss_is_zero_at_the_target_and_falls_towards_it(loss, weights):
    base, target = tokens(0), tokens(1)
    values = [
        merge_loss(base + share * (target - base), base, target, loss=loss, token_weights=weights).mean().item()
        for share in (0.0, 0.5, 0.9, 1.0)
    ]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0, abs=1e-6)


def test_token_weights_count_what_was_transferred():
    base, target, student = tokens(0), tokens(1), tokens(0)
    target[:, 1:] = base[:, 1:]  # only one token has received something
    student[:, 1:] += 1  # and the student is wrong in the others
    student[:, 0] = target[:, 0]
    assert merge_loss(student, base, target, token_weights="transfer").abs().max() == 0
    assert merge_loss(student, base, target).min() > 0


def test_images_do_not_influence_each_other_and_no_gradient_reaches_the_target():
    base, target, student = tokens(0), tokens(1).requires_grad_(), tokens(2).requires_grad_()
    whole = merge_loss(student, base, target)
    apart = torch.cat([merge_loss(student[i : i + 1], base[i : i + 1], target[i : i + 1]) for i in range(3)])
    assert torch.equal(whole, apart)
    whole.sum().backward()
    assert target.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", MERGE_LOSSES.names())
def test_tower_that_transfers_nothing_gives_a_finite_loss(loss):
    base, student = tokens(0), tokens(0).requires_grad_()
    value = merge_loss(student, base, base, loss=loss, token_weights="transfer")
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()


# -- the tower while it is merged ------------------------------------------------------------------------------------


def merging(folder, **settings):
    keys = settings.pop("keys", {})
    return MergingTower(make_tower(folder, opened="fusion" not in keys, **keys), MergePreset(**settings))


@torch.no_grad()
def disturb(tower):
    """Move the student, since plain CLIP always has a loss of 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in tower.learning():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_student_starts_as_clip_and_the_teacher_is_nowhere_to_be_trained(tmp_path):
    teacher = make_tower(tmp_path, opened=True).train()  # as a training loop may have left it
    tower = MergingTower(teacher, MergePreset()).train()
    assert not teacher.training
    features = tower.teacher.encode(pixels(2))
    output = tower(pixels(2))
    assert torch.equal(output.last_hidden_state, features.base)
    torch.testing.assert_close(output.merge_loss, torch.ones(2))
    fixed = (tower.teacher, tower.teacher.frozen.clip)
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in fixed]
    output.merge_loss.sum().backward()
    torch.optim.SGD(tower.parameters(), lr=0.1).step()
    names = [name for name, _ in tower.named_parameters()]
    assert names and all(name.startswith("student.") for name in names)
    for module, values in zip(fixed, before, strict=True):
        assert values and all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
    assert not teacher.training
    assert not torch.equal(tower(pixels(2)).last_hidden_state, features.base)


def test_target_is_the_teachers_tokens_without_noise(tmp_path):
    tower = merging(tmp_path).train()
    disturb(tower)
    features = tower.teacher.encode(pixels(2))
    target = tower.teacher.fuse(features).last_hidden_state
    expected = merge_loss(tower(pixels(2)).last_hidden_state, features.base, target)
    torch.testing.assert_close(tower(pixels(2)).merge_loss, expected)
    torch.testing.assert_close(tower(pixels(2), features=features).merge_loss, expected)
    assert tower.eval()(pixels(2)).merge_loss is None


@pytest.mark.parametrize(
    ("settings", "learns"),
    [
        ({}, "everything"),
        ({"layers": [1]}, "encoder.layers.1."),
        ({"layers": [-1]}, "encoder.layers.1."),
        ({"layers": [0], "lora": LoraPreset(r=2, alpha=4, dropout=0.0)}, "encoder.layers.0."),
        ({"lora": LoraPreset(r=2, alpha=4, dropout=0.0)}, "encoder.layers."),
    ],
)
def test_merged_encoder_is_plain_clip_that_gives_the_students_tokens(tmp_path, settings, learns):
    tower = merging(tmp_path, **settings).train()
    disturb(tower)
    learned = {id(p) for p in tower.learning()}
    tensors = {name: p.detach() for name, p in tower.student.named_parameters() if id(p) in learned}
    clip = tower.teacher.frozen.clip
    encoder = merged_encoder(clip, tower.settings, tensors)
    assert type(encoder) is CLIPVisionModel and encoder.state_dict().keys() == clip.state_dict().keys()
    with torch.no_grad():
        found = encoder(pixels(2)).last_hidden_state[:, 1:]
        torch.testing.assert_close(found, tower(pixels(2)).last_hidden_state, rtol=1e-5, atol=1e-5)
    changed = {n for n, value in encoder.state_dict().items() if not torch.equal(value, clip.state_dict()[n])}
    assert changed and (changed == set(clip.state_dict()) or all(name.startswith(learns) for name in changed))
    assert (changed == set(clip.state_dict())) == (learns == "everything")


def test_what_cannot_be_merged_is_refused(tmp_path):
    for message, settings in {
        "no experts to merge": {"keys": {"fusion": "none"}},
        "another shape": {"keys": {"fusion": "channel_concat"}},
        "numbered 0 to 1": {"layers": [2]},
        "merge loss 'msee'": {"loss": "msee"},
        "coefficient must be a number from 0": {"coefficient": -1.0},
    }.items():
        with pytest.raises(ConfigError, match=message):
            merging(tmp_path / message, **settings)
    tuned = merging(tmp_path / "tuned", coefficient=0.0, keys={"fusion": "none"}).train()
    assert tuned(pixels(1)).merge_loss is None


def test_model_adds_the_merge_loss_itself_in_a_plain_loop(tmp_path):
    tower = make_tower(tmp_path, opened=True)
    model = assemble(LlamaForCausalLM(text_config()), tower.config, ProjectorPreset())
    model.config.image_token_index = 63
    model.tower.load_backbones()
    open_output(model.tower)
    model.model.vision_tower = MergingTower(model.tower, MergePreset(coefficient=2.0))
    ids = torch.tensor([[1, *[63] * tower.config.num_patches, 5, 6, 7]])
    output = model.train()(input_ids=ids, pixel_values=pixels(1), labels=torch.where(ids == 63, -100, ids))
    torch.testing.assert_close(output.loss, output.lm_loss + 2 * output.merge_loss.mean())


# -- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("merge"))
    start = ("--max_steps", "8", "--num_train_epochs", "2", "--learning_rate", "0.05")
    assert main(flags(folder, "pretrain", folder / "trained", *start)) == 0
    for stage, name in (("finetune_lora", "lora"), ("finetune", "full")):
        assert main(flags(folder, stage, folder / name, *start, "--pretrained", str(folder / "trained"))) == 0
    return folder


def merge(root, start, output, *more):
    brief = ("--max_steps", "3", "--learning_rate", "2e-4")
    return flags(root, "merge", output, "--pretrained", str(root / start), *brief, *more)


def history(output, term):
    return [value for (value,) in losses(output, term)]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("start", "kind"), [("trained", "lora"), ("lora", "lora"), ("full", "full")])
def test_merged_checkpoint_loads_as_clip_without_the_experts(root, tmp_path, start, kind):
    """Merge during stage 2 (from stage 1), after LoRA, after full tuning."""
    copy = tmp_path / "parts"  # a copy, whose experts can be taken away
    shutil.copytree(root, copy)
    for file in (*copy.rglob("*.json"), copy / "preset.yaml"):
        file.write_text(file.read_text().replace(str(root), str(copy)))
    before = load_file(copy / start / "adapter_model.safetensors") if start == "lora" else {}
    files = contents(copy / start)
    assert main(merge(copy, start, copy / "merged")) == 0
    assert contents(copy / start) == files
    first, *_, last = history(copy / "merged", "merge_loss")
    assert first == pytest.approx(1, abs=1e-3) and last < first
    for gone in ("normal", "segmentation", "clip", start):
        shutil.rmtree(copy / gone)
    model, processor = tove_llava.load_model(copy / "merged")
    assert model.config.vision_config.expert_names == []
    assert type(model.tower.frozen.clip) is CLIPVisionModel and processor.conversation_template == "v1"
    assert json.loads((copy / "merged" / "tove_llava.json").read_text())["kind"] == kind
    assert (copy / "merged" / "adapter_model.safetensors").exists() == (kind == "lora")
    if start == "lora":  # the adapters were continued, not begun again
        after = load_file(copy / "merged" / "adapter_model.safetensors")
        assert after.keys() == before.keys()
        distance = sum(float((after[n] - before[n]).abs().sum()) for n in before)
        assert 0 < distance < 0.5 * sum(float(value.abs().sum()) for value in before.values())


@pytest.fixture(
    params=[("lora",), ("full",), ("lora", "--merge_lora_r", "2")],
    ids=["adapted language model", "tuned language model", "adapted encoder"],
)
def exported(request, root, tmp_path):
    """The folders of a merge far from CLIP and of its export."""
    start, *options = request.param
    assert main(merge(root, start, tmp_path / "merged", "--encoder_learning_rate", "0.02", *options)) == 0
    export_model(tmp_path / "merged", tmp_path / "out")
    return tmp_path


def test_stock_llava_of_the_export_computes_what_the_merged_model_does(root, exported):
    file, question = root / "images" / "1.png", "What is it?"
    model, seen = ask_stock(exported / "out", file, question)
    assert type(model) is LlavaForConditionalGeneration and type(model.model.vision_tower) is CLIPVisionModel
    expected, _ = both_logits(exported / "merged", seen, file, question)
    torch.testing.assert_close(seen["logits"], expected, rtol=1e-5, atol=1e-5)
    # With CLIP as it was before, the answer would be another.
    before = CLIPVisionModel.from_pretrained(root / "clip", num_hidden_layers=2, dtype=torch.float32)
    before.post_layernorm = torch.nn.Identity()
    model.model.vision_tower = before.eval()
    with torch.no_grad():
        other = model(input_ids=seen["ids"], pixel_values=seen["pixels"]).logits
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.slow
def test_export_of_a_merged_model_in_a_clean_environment(root, exported):
    file = root / "images" / "1.png"
    compare_in_clean_environment(exported / "merged", exported / "out", file, "What is it?", exported)


def test_merge_from_stage_one_speaks_the_language_models_own_template(tmp_path):
    """Stage 1's folder has the plain chat template, not the tokenizer's own."""
    write_inputs(tmp_path)
    (tmp_path / "llm" / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "</s>"))
    assert main(flags(tmp_path, "pretrain", tmp_path / "trained", "--max_steps", "8", "--learning_rate", "0.05")) == 0
    assert main(merge(tmp_path, "trained", tmp_path / "merged", "--template", "chat_template")) == 0
    _, processor = tove_llava.load_model(tmp_path / "merged")
    assert processor.conversation_template == "chat_template"
    assert "<|im_start|>" in processor.apply_chat_template([{"role": "user", "content": "Hello"}])


def test_merge_does_not_change_the_conversation_template_unasked(root, tmp_path, capsys):
    """scripts/merge.sh may be given a model of another preset than PRESET."""
    other = tmp_path / "other.yaml"
    other.write_text((root / "preset.yaml").read_text().replace("template: v1", "template: llava_v1"))
    words = merge(root, "lora", tmp_path / "out", "--preset", str(other))
    assert main(words) == 2 and not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    assert message.startswith("tove-llava merge: ")
    assert all(part in message for part in ("template 'v1'", "'llava_v1'", "--template v1", "--preset preset"))
    for name, template in {"its own": "v1", "another": "llava_v1", "its own by another name": "vicuna_v1"}.items():
        assert main([*words, "--template", template, "--output_dir", str(tmp_path / name), "--max_steps", "1"]) == 0
        assert "'other'" in capsys.readouterr().out
        assert tove_llava.load_model(tmp_path / name)[1].conversation_template == template
    other.write_text(other.read_text().replace("template: llava_v1", "template: vicuna_v1"))
    assert main([*words, "--max_steps", "1"]) == 0


def test_merge_on_cached_features_equals_the_merge_on_images(root, tmp_path):
    data = ["--data", str(root / "instruct.json"), "--image-folder", str(root / "images")]
    where = ["--preset", str(root / "preset.yaml"), "--out", str(root / "cache")]
    assert cli(["features", *where, *data, "--image-aspect-ratio", "pad"]) == 0
    assert main(merge(root, "lora", tmp_path / "images")) == 0
    assert main(merge(root, "lora", tmp_path / "cached", "--feature_cache", str(root / "cache"))) == 0
    for term in ("lm_loss", "merge_loss"):
        assert history(tmp_path / "cached", term) == pytest.approx(history(tmp_path / "images", term), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "learns"),
    [
        (["--merge_lora_r", "2"], "encoder.layers."),
        (["--merge_layers", "1"], "encoder.layers.1."),
        (["--merge_loss", "cosine"], ""),
    ],
    ids=["adapters", "layer", "loss"],
)
def test_options_of_the_command_line(root, tmp_path, options, learns):
    words = ["merge", "--model", str(root / "lora"), *merge(root, "lora", tmp_path / "out")]
    for flag in ("--stage", "--pretrained"):
        at = words.index(flag)
        del words[at : at + 2]
    assert cli([*words, *options]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (root / "clip", tmp_path / "out" / "clip"))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(name.startswith(learns) for name in changed)
    assert any(name.startswith("embeddings.") for name in changed) == (not learns)


def test_links_of_further_images_are_followed_only_if_allowed(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(root / "images" / "1.png", tmp_path / "elsewhere")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    record = json.loads((root / "captions.json").read_text())[0] | {"image": "link.png"}
    (tmp_path / "more.json").write_text(json.dumps([record]))
    data = ["--merge_data_path", str(tmp_path / "more.json"), "--merge_image_folder", str(tmp_path / "images")]
    for allowed in ("True", "False"):
        words = [*data, "--merge_images_per_record", "1", "--allow_image_links", allowed]
        settings = parse(merge(root, "lora", tmp_path / "x", *words))
        start = STARTS.get("checkpoint")(settings.preset, settings.stage, settings.pretrained)
        further = make_further_images(settings, make_dataset(settings, start.processor, start.vision), None, 0)
        if allowed == "True":
            assert len(further.of(0)[0]) == 1
        else:
            with pytest.raises(DataError, match="link.png.*--allow_image_links"):
                further.of(0)


def test_further_images_are_dealt_out_evenly_and_change_only_the_merge_loss(root, tmp_path):
    others = ["--merge_data_path", str(root / "captions.json")]
    for name, more in {"none": [], "two": ["2"], "other": ["2", *others]}.items():
        flag = ["--merge_images_per_record", *more] if more else []
        assert main(merge(root, "lora", tmp_path / name, *flag)) == 0
    assert len({history(tmp_path / name, "merge_loss")[-1] for name in ("none", "two", "other")}) == 3
    # The first step's loss is taken before anything has learned: its records are the same whatever else they bring.
    assert len({history(tmp_path / name, "lm_loss")[0] for name in ("none", "two", "other")}) == 1
    settings = parse(merge(root, "lora", tmp_path / "x"))
    start = STARTS.get("checkpoint")(settings.preset, settings.stage, settings.pretrained)
    dataset = make_dataset(settings, start.processor, start.vision)
    pool = ImagePool(root / "instruct.json", root / "images", dataset.image_transform)
    further = FurtherImages(pool, 3, seed=0)
    images = torch.cat([further.of(i)[0] for i in range(len(dataset))])
    own = torch.cat([x for i in range(len(dataset)) if (x := dataset[i]["pixel_values"]) is not None])
    counts = [sum(torch.equal(a, b) for b in images) for a in own]
    assert len(images) == 3 * len(dataset)
    assert min(counts) >= len(images) // len(own) and max(counts) <= len(images) // len(own) + 1
    assert main(merge(root, "lora", tmp_path / "y", "--merge_images_per_record", "-1")) == 2


@pytest.mark.parametrize("options", [("--merge_lora_r", "2"), ("--merge_optimizer", "muon")], ids=["lora", "muon"])
def test_interrupted_merge_resumes(root, tmp_path, capsys, options):
    def command(output):
        steps = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "8", "--num_train_epochs", "2"]
        return flags(root, "merge", output, "--pretrained", str(root / "lora"), *steps, *options)

    assert main(command(tmp_path / "whole")) == 0
    train_until_killed("between", command(tmp_path / "killed"))
    assert main(command(tmp_path / "killed")) == 0
    assert "resuming from" in capsys.readouterr().out
    whole, resumed = (weights(tmp_path / name) for name in ("whole", "killed"))
    assert any("lora" in name for name in whole) and "encoder.layers.0.mlp.fc1.weight" in whole
    torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-6)


def test_muon_steps_of_matrices_are_orthogonal_and_others_are_adamws(tmp_path):
    torch.manual_seed(0)
    tower = MergingTower(make_tower(tmp_path), MergePreset(optimizer="muon"))
    matrices = MERGE_OPTIMIZERS.get("muon")(tower)
    assert {p.ndim for p in matrices} == {2}
    names = {name for name, p in tower.named_parameters() if id(p) in set(map(id, matrices))}
    assert "student.encoder.layers.0.mlp.fc1.weight" in names
    assert not any("embedding" in name or "norm" in name or "bias" in name for name in names)
    everything = Trainable({"encoder": dict(tower.named_parameters())})
    twin = copy.deepcopy(tower)
    copies = Trainable({"encoder": dict(twin.named_parameters())})
    options = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    groups = parameter_groups(everything, learning_rate=0.01, weight_decay=0.1, muon=matrices)
    optimizer = make_optimizer(groups, torch.optim.AdamW, options)
    plain = make_optimizer(parameter_groups(copies, learning_rate=0.01, weight_decay=0.1), torch.optim.AdamW, options)
    assert isinstance(plain, torch.optim.AdamW)
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    for p, q in zip(tower.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    plain.step()
    for (name, p), q in zip(tower.named_parameters(), twin.parameters(), strict=True):
        if name in names:
            step = (1 - 0.01 * 0.1) * before[name] - p.detach()
            sizes = torch.linalg.svdvals(step.float())
            # Newton and Schulz's five steps bring singular values near to one, not to one.
            assert sizes.max() < 1.5 * sizes.median(), name
            assert step.pow(2).mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.3), name
        else:
            torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize(
    "words",
    [
        "--model=lora --preset=tiny",
        "--model lora --preset tiny",
        "--preset=tiny --bf16=True --model lora",
        "--model=lora --bf16=True",
    ],
)
def test_verb_takes_flags_in_either_form(root, monkeypatch, words):
    seen = []
    monkeypatch.setattr(run, "main", lambda words, **_: seen.append(Parser().given(words)) or 0)
    manifest = dataclasses.replace(Manifest.read(root / "lora"), preset="small")
    monkeypatch.setattr(Manifest, "read", lambda folder: manifest)
    assert cli(["merge", *words.split(), "--max_steps", "1"]) == 0
    preset = "tiny" if "--preset" in words else "small"
    expected = {"pretrained": "lora", "preset": preset, "stage": "merge", "max_steps": 1}
    assert {key: seen[0][key] for key in expected} == expected
    assert seen[0].get("bf16", False) == ("--bf16=True" in words)


def test_bad_input_is_refused_under_the_verbs_name(root, tmp_path, monkeypatch, capsys):
    assert cli(["merge"]) == 0
    without, out = ["--set", "vision.fusion=none", "--set", "vision.experts=[]"], tmp_path / "out"
    assert main(flags(root, "pretrain", tmp_path / "plain", "--max_steps", "1", *without)) == 0
    for function, words, message in [
        (cli, ["merge", "--data_path", "x"], "--model DIR is needed"),
        (cli, ["merge", "--model", str(tmp_path)], "not a complete"),
        (
            cli,
            ["merge", "--model", str(root / "lora"), "--preset", "tiny", "--no_such_flag", "1"],
            "verb: unknown flag",
        ),
        (main, merge(root, "lora", out, "--merge_loss", "msee"), "msee"),
        (main, merge(root, "lora", tmp_path / "begun", "--merge_optimizer", "muo"), "muon"),
        (main, flags(root, "merge", out, "--pretrained", str(tmp_path / "plain")), "verb: this model has no experts"),
        (main, flags(root, "pretrain", out, "--merge_loss", "mse"), "--stage merge"),
        (main, flags(root, "merge", out), "--pretrained"),
        (main, merge(root, "lora", out, "--deepspeed", "zero2", "--merge_optimizer", "muon"), "--deepspeed none"),
    ]:
        if "zero2" in words:  # under a launcher
            monkeypatch.setenv("WORLD_SIZE", "1")
        assert function(words) == 2 and not out.exists()
        assert message in capsys.readouterr().err.replace("tove-llava merge:", "verb:")
