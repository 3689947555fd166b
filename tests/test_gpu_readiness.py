"""What a GPU would show at once, shown without one."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tower_parts import make_tower, pixels
from train_parts import ROOT, flags, write_inputs

from tove_llava.core.errors import NonFiniteError
from tove_llava.presets import load_preset
from tove_llava.train.arguments import parse
from tove_llava.train.run import run
from tove_llava.train.trainer import ToveTrainer
from tove_llava.train.window import Window, open_window

# Operators whose result the host reads, or whose output's size depends on values.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")


class Waits(TorchDispatchMode):
    """Counts the operators that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.lstrip("_")
        boolean = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for arg in args
            if isinstance(arg, (list, tuple))
            for x in arg
        )
        if boolean or name in [each.lstrip("_") for each in WAITING]:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_what_waits():
    x = torch.arange(3.0)
    for wait in (lambda: x[x > 1], lambda: bool((x > 1).all()), lambda: x.max().item(), lambda: (x > 1).nonzero()):
        with Waits() as waits:
            wait()
        assert waits.found
    with Waits() as waits:
        torch.where(x > 1, x, 0).sum() + x[1:]
    assert not waits.found


@pytest.mark.parametrize("stage", ["pretrain", "finetune_lora"])
def test_a_micro_step_never_waits_for_the_device(tmp_path, monkeypatch, stage):
    """Only the last one of an optimizer step does. With padding, transformers' mask asks if there is any."""
    steps, honest = [], ToveTrainer.training_step

    def counted(self, *args, **kwargs):
        with Waits() as waits:
            loss = honest(self, *args, **kwargs)
        steps.append(waits.found)
        return loss

    monkeypatch.setattr(ToveTrainer, "training_step", counted)
    arguments = ("--max_steps", "1", "--gradient_accumulation_steps", "3", "--padding_free", "True")
    run(parse(flags(write_inputs(tmp_path), stage, tmp_path / "out", *arguments)))
    *earlier, last = steps[:3]  # of the first optimizer step
    assert earlier == [[], []]
    assert last.count("local_scalar_dense") == 1  # the experts' flags; the losses come as a list


def test_counts_come_from_shapes():
    """Labels are on the device by then; values of the meta device cannot be read."""
    batch = {"labels": torch.empty(2, 5, dtype=torch.long, device="meta"), "supervised": torch.arange(3)}
    assert open_window([batch] * 2, torch.device("cpu")).tokens == 6


def test_a_loss_that_is_not_finite_names_its_own_records():
    losses = [(torch.tensor(loss), torch.tensor(records)) for loss, records in ((1.0, [0]), (torch.inf, [3, 4]))]
    assert Window(1, [[1], [2]], 3, 0, losses=losses).first_non_finite() == (torch.inf, [3, 4])
    assert Window(1, [[1]], 1, 0, losses=losses[:1]).first_non_finite() == (None, [])


def test_deferred_checks_name_the_expert(tmp_path):
    tower = make_tower(tmp_path, expert_options={"edge": {"nan_above": 0.5}}).train()
    hub = tower.frozen.hub
    bright = torch.cat([-pixels(1).abs(), torch.full((1, 3, 32, 32), 3.0)])
    with hub.deferring(), Waits() as waits:
        for images in (bright[:1], bright):
            tower.encode(images)
    assert not waits.found
    with pytest.raises(NonFiniteError, match=r"'edge' returned non-finite values for image\(s\) \[1\]"):
        hub.check_deferred()
    hub.check_deferred()  # said once
    with hub.deferring(), pytest.warns(RuntimeWarning, match="'edge'"):  # outside training nobody asks later
        tower.eval().encode(bright)
    tower.train()
    with pytest.raises(NonFiniteError, match="'edge'"):
        tower.encode(bright)


def test_tests_for_a_gpu_need_no_library_that_its_image_lacks():
    files = ["tests/test_tower_gpu.py", "tests/test_kernels.py", "tests/test_packing.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bare_environment", "--collect-only", "-m", "gpu", *files]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    )
    assert done.returncode == 0 and "test_tower_gpu.py::" in done.stdout, done.stdout[-2000:]


def test_an_expert_without_its_library_is_left_out_of_a_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setitem(sys.modules, "kornia.models.dexined", None)
    common, measuring = importlib.import_module("common"), importlib.import_module("measuring")
    preset, left_out = common.without_missing_libraries(load_preset("vicuna-7b"))
    assert [entry["name"] for entry in preset.vision.experts] == ["eva", "dinov2", "depth"]
    assert list(left_out) == ["edge"] and "pip install kornia" in left_out["edge"]
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    with measuring.without_tf32():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_a_gate_draws_no_noise_in_eval_mode(tmp_path, monkeypatch):
    tower = make_tower(tmp_path, noisy_gating=True)
    with monkeypatch.context() as patch:
        patch.setattr(tower.fusion.gate.noise, "forward", None)  # it must not be called
        expected = tower.eval()(pixels()).routing
    assert torch.equal(tower(pixels()).routing, expected)
