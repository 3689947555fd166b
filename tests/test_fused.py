"""The gate's weighted sum: the kernel equals the plain form, GPU-only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tove_llava.tower.fused import gated_gelu_sum, supports_fused

TESTS = Path(__file__).parent


def test_the_plain_form_is_the_sum():
    hidden = [torch.randn(5, 4) for _ in range(3)]
    gates = torch.rand(5, 3)
    expected = sum(gates[:, k : k + 1] * F.gelu(z) for k, z in enumerate(hidden))
    torch.testing.assert_close(gated_gelu_sum(hidden, gates), expected)
    assert not supports_fused(hidden, gates)
    assert torch.equal(gated_gelu_sum(hidden, gates, fused=True), gated_gelu_sum(hidden, gates))  # no GPU here


@pytest.mark.slow
def test_the_kernels_are_the_plain_form_forward_and_backward():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parent)}
    run = subprocess.run(
        [sys.executable, str(TESTS / "fused_child.py")], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["same"]
