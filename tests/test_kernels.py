"""Fused kernels: refusals, the plain numbers, and no trace left behind."""

import importlib.util
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from test_llava_model import make_llava
from test_packing import COLLATORS, EXAMPLES
from tower_parts import text_config
from train_parts import ROOT, environment, flags, write_inputs
from transformers.models.llama import modeling_llama

from tove_llava.core.errors import ConfigError
from tove_llava.llava import kernels
from tove_llava.llava.kernels import KNOWN, check_kernels, fused_kernels
from tove_llava.llava.varlen import packed_rows
from tove_llava.presets import LoraPreset, StagePreset
from tove_llava.train.recomputation import KINDS, set_checkpointing
from tove_llava.train.run import main
from tove_llava.train.stages import freeze

LIGER = importlib.util.find_spec("liger_kernel") is not None
CONFIGS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
LORA = StagePreset("lora", "v1", lora=LoraPreset(r=4, alpha=8, dropout=0.2))


def language(family):
    keys = {key: getattr(text_config(), key) for key in ("vocab_size", "intermediate_size", "pad_token_id")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return getattr(transformers, CONFIGS[family])(**keys, **heads, hidden_size=32, num_hidden_layers=2)


def one_step(model, batch, device, dtype):
    model.zero_grad()
    torch.manual_seed(0)
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
        loss = model(**batch).loss
    loss.backward()
    return loss.detach().float(), {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


def compare(family, device, dtype, tolerance):
    """Compare losses and gradients with and without the kernels.

    The cases are adapters, packing and every checkpointing.
    """
    for train in ("all", "lora"):
        with tempfile.TemporaryDirectory() as folder:
            model = make_llava(Path(folder), text=language(family)).train()
        if train == "lora":
            freeze(model, LORA)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
        model.to(device)
        text = model.model.language_model
        names = list(model.state_dict())
        for packed, kind in [(False, "none"), *((True, kind) for kind in KINDS)]:
            batch = COLLATORS[packed](EXAMPLES[:3])
            set_checkpointing(model, kind)
            with packed_rows(text) if packed else nullcontext():
                loss, expected = one_step(model, batch, device, dtype)
                exact = one_step(model, batch, device, torch.float32)[1]
                before = {module: set(vars(module)) for module in text.modules()}
                with fused_kernels(text):
                    assert list(model.state_dict()) == names
                    fused = text.layers[0].mlp.forward.__func__ is not type(text.layers[0].mlp).forward
                    assert fused and "LigerRMSNorm" in repr(text.norm)
                    got_loss, got = one_step(model, batch, device, dtype)
            assert before == {module: set(vars(module)) for module in text.modules()}
            assert got.keys() == expected.keys()
            close(got_loss, loss, tolerance, f"{train} {kind} loss")
            for name, value in expected.items():
                close(got[name], value, tolerance, f"{train} {kind} packed={packed} {name}", exact[name])


def close(got, expected, tolerance, what, exact=None):
    """Compare relative to the largest value.

    In 16 bits, an error of 1.5 times the plain one's passes too.
    """
    got, expected = got.cpu(), expected.cpu()
    difference, largest = (got - expected).abs().max(), expected.abs().max()
    as_near = exact is not None and (got - exact).norm() <= 1.5 * (expected - exact).norm()
    assert difference <= tolerance * largest + 1e-7 or as_near, f"{what}: {difference} of {largest}"


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and LIGER), reason="needs a CUDA device and liger-kernel")
@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_numbers_are_the_plain_ones(family, dtype, tolerance):
    compare(family, torch.device("cuda"), dtype, tolerance)


@pytest.mark.slow
@pytest.mark.skipif(not LIGER, reason="needs liger-kernel")
@pytest.mark.parametrize("family", KNOWN)
def test_the_numbers_are_the_plain_ones_in_tritons_interpreter(family):
    variables = environment(TRITON_INTERPRET="1", PYTHONPATH=":".join(sys.path + [str(ROOT / "tests")]))
    command = [sys.executable, "-m", "kernels_child", family]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-4000:]


def test_without_cuda_they_are_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="need a CUDA GPU, and this runs on cpu"):
        check_kernels(torch.device("cpu"))
    line = flags(write_inputs(tmp_path), "pretrain", tmp_path / "out", "--max_steps", "1", "--use_cpu", "True")
    assert main([*line, "--fused_kernels", "True"]) == 2
    assert "need a CUDA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*line, "--use_liger_kernel", "True"]) == 2
    assert "--fused_kernels True" in capsys.readouterr().err


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'tove-llava\[kernels\]'"):
        check_kernels(torch.device("cuda"))


@pytest.mark.parametrize(
    ("change", "message"), [({"model_type": "gpt_neox"}, "gpt_neox"), ({"hidden_act": "gelu"}, "gelu")]
)
def test_what_they_do_not_know_is_refused(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(kernels, "check_kernels", lambda device: None)
    model = make_llava(tmp_path).model.language_model
    for key, value in change.items():
        monkeypatch.setattr(type(model.config) if key == "model_type" else model.config, key, value)
    with pytest.raises(ConfigError, match=message), fused_kernels(model):
        pass


def test_an_error_inside_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    """A stand-in for the package replaces liger's functions and methods."""

    def mark(model, **which):
        assert which == {
            "rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False,
        }  # fmt: skip
        modeling_llama.apply_rotary_pos_emb = rotation
        modeling_llama.LlamaMLP = object
        for layer in model.layers:
            layer.mlp.forward = layer.mlp.down_proj.forward

    def rotation(query, key, cos, sin):
        query += 1
        return query, key

    monkeypatch.setattr(kernels, "check_kernels", lambda device: None)
    monkeypatch.setattr(kernels, "_liger", lambda: mark)
    model = make_llava(tmp_path).model.language_model
    functions = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP
    with pytest.raises(RuntimeError, match="inside"), fused_kernels(model):
        assert modeling_llama.LlamaMLP is object and "forward" in vars(model.layers[0].mlp)
        query = torch.zeros(1, 1, 2, 4)
        rotated, _ = modeling_llama.apply_rotary_pos_emb(query, query, None, None)
        assert rotated.sum() == 8 and query.sum() == 0  # a copy: what checkpointing keeps is not written to
        raise RuntimeError("inside")
    assert functions == (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP)
    assert not any("forward" in vars(layer.mlp) for layer in model.layers)
