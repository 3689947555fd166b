"""LoRA adapters: peft's settings are reproduced, or refused by name."""

import dataclasses
import json
import math
import shutil
import time

import pytest
import torch
from convert_world import chain, logits
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tove_llava import convert_checkpoint, load_model, open_llava
from tove_llava.checkpoints.conversion import merge_lora
from tove_llava.core.errors import CheckpointError, ConfigError, ToveError
from tove_llava.llava.adapter_settings import HONOURED, REFUSED, WITHOUT_EFFECT


def edit(file, **changes):
    file.write_text(json.dumps({k: v for k, v in {**json.loads(file.read_text()), **changes}.items() if v != "gone"}))


@pytest.fixture(scope="module")
def stage1(world, tmp_path_factory):
    return chain(world.projector, tmp_path_factory.mktemp("adapters"), "tove", base=str(world.base))


def adapted(stage1, **options):
    """Load a model, and give it adapters that change its logits."""
    model, model.processor = load_model(stage1)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 16} | options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def native(stage1, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "lora"
    adapted(stage1).save_pretrained(folder)
    return folder


def test_every_field_of_peft_is_known():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert sorted(fields) == sorted([*HONOURED, *REFUSED, *WITHOUT_EFFECT])


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "orthogonal"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 40}},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["layers.0.mlp.down_proj"]},
        {"fan_in_fan_out": True, "lora_dropout": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_adapters_compute_as_in_peft(stage1, tmp_path, options):
    model = adapted(stage1, **options)
    expected = logits(model)
    model.save_pretrained(tmp_path / "lora")
    model.processor.save_pretrained(tmp_path / "lora")
    assert torch.equal(logits(load_model(tmp_path / "lora")[0]), expected)
    merge_lora(tmp_path / "lora", tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")[0]), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, logits(load_model(stage1)[0]), atol=1e-2)
    file = tmp_path / "lora" / "adapter_config.json"
    if not {"use_rslora", "init_lora_weights", "fan_in_fan_out"} & options.keys():  # only this package has a place
        with pytest.raises(ConfigError, match=rf"{file}.*{next(iter(options))}.*merge-lora"):
            convert_checkpoint(tmp_path / "lora", tmp_path / "out", "llava-hf")
    else:
        converted = chain(tmp_path / "lora", tmp_path, "llava-hf")
        torch.testing.assert_close(logits(load_model(converted)[0]), expected, rtol=1e-3, atol=1e-4)


REFUSALS = [
    ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"),
    ("init_lora_weights", "loftq"), ("init_lora_weights", "corda"), ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "mica"), ("alora_invocation_tokens", [7]), ("layer_replication", [[0, 1], [0, 2]]),
    ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [5]), ("target_parameters", ["x.weight"]),
    ("use_qalora", True), ("use_bdlora", {"x": 1}), ("kasa_config", {"x": 1}), ("arrow_config", {"x": 1}),
    ("velora_config", {"x": 1}), ("monteclora_config", {"x": 1}), ("megatron_config", {"x": 1}),
    ("peft_type", "IA3"), ("of_a_newer_peft", "yes"),
]  # fmt: skip
DAMAGED = [
    ("r", 0), ("r", -4), ("r", "4"), ("r", 4.0), ("r", True), ("r", None), ("r", 200_000), ("r", 8), ("r", "gone"),
    ("lora_alpha", "16"), ("lora_alpha", 0), ("lora_alpha", -1), ("lora_alpha", math.nan), ("lora_alpha", math.inf),
    ("lora_alpha", 10**400), ("lora_alpha", [16]), ("lora_dropout", 1.0), ("lora_dropout", "0"), ("bias", "some"),
    ("use_rslora", "yes"), ("use_dora", 1), ("init_lora_weights", {}), ("rank_pattern", [4]),
    ("rank_pattern", {"a": 0}),
    ("rank_pattern", {"(a+)+$": 4}), ("rank_pattern", {"q_proj": 60_000}), ("alpha_pattern", {"a": math.nan}),
    ("alpha_pattern", {"a": 0}), ("lora_dropout", -0.1),
    ("target_modules", "(.*)*(.*)*(.*)*(.*)*x"), ("target_modules", ["(a+)+$"]), ("target_modules", "all-linear"),
    ("target_modules", None), ("target_modules", 5), ("target_modules", ["v_proj"]),
    ("layers_to_transform", "0"), ("layers_pattern", "(a+)+"),
    ("exclude_modules", "(a+)+"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "error"), [(*case, ConfigError) for case in REFUSALS]
                         + [(*case, CheckpointError) for case in DAMAGED])  # fmt: skip
def test_refused_or_damaged_settings_are_named(native, tmp_path, key, value, error):
    folder = shutil.copytree(native, tmp_path / "lora")
    edit(folder / "adapter_config.json", **{key: value})
    start = time.monotonic()
    for run in (load_model, lambda folder: merge_lora(folder, tmp_path / "merged")):
        with pytest.raises(error) as failure:
            run(folder)
        assert str(folder) in str(failure.value)
        assert any(word in str(failure.value) for word in (key, "lora_", "rank", "not valid JSON")), failure.value
    assert not (tmp_path / "merged").exists()
    assert time.monotonic() - start < 10


def of_peft(world, folder, **options):
    """Write an original's LoRA folder with peft itself; return the folder and peft's logits of a text."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    model = get_peft_model(language, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for name in ("config.json", "non_lora_trainables.bin"):
        shutil.copyfile(world.lora / name, folder / name)
    with torch.no_grad():
        return folder, model(torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_rslora": True}, ""),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
)
def test_original_s_adapters_of_peft_itself(world, tmp_path, options, named):
    folder, expected = of_peft(world, tmp_path / "lora", **options)
    if named:
        for run in (open_llava, lambda folder, base: convert_checkpoint(folder, tmp_path / "out", base=base)):
            with pytest.raises(ConfigError, match=rf"adapter_config\.json.*{named}.*merge_lora_weights"):
                run(folder, base=str(world.base))
        assert not (tmp_path / "out").exists()
        return
    for merge in (False, True):
        model, _ = open_llava(folder, base=str(world.base), merge_lora=merge)
        with torch.no_grad():
            found = model(torch.arange(5, 25)[None]).logits[..., : expected.shape[-1]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_name_of_a_layer_is_no_pattern(world, tmp_path):
    folder, _ = of_peft(world, tmp_path / "lora")
    file = folder / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.(a+)+$.lora_A.weight"
    save_file(load_file(file) | {name: torch.ones(4, 8)}, file, metadata={"format": "pt"})
    with pytest.raises(ToveError, match="no LoRA tensor"):
        open_llava(folder, base=str(world.base))
