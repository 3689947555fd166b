"""Compare the Triton kernels with the plain form, in Triton's interpreter.

Needs TRITON_INTERPRET=1; prints "same".
"""

import torch

from tove_llava.tower import fused
from tove_llava.tower.fused_kernels import backward, forward


def compare(rows, columns, experts, dtype, tolerance):
    generator = torch.Generator().manual_seed(rows + experts)
    hidden = [torch.randn(rows, columns, generator=generator).to(dtype).requires_grad_() for _ in range(experts)]
    gates = torch.rand(rows, experts, generator=generator).softmax(-1)
    gates[0, 0] = 0.0  # as of a detached expert
    gates.requires_grad_()
    grad = torch.randn(rows, columns, generator=generator).to(dtype)

    expected = fused.gated_gelu_sum(hidden, gates)
    expected.backward(grad)
    plain = [z.detach() for z in hidden]
    d_hidden, d_gates = backward(plain, gates.detach(), grad)
    pairs = [(forward(plain, gates.detach()), expected.detach()), (d_gates, gates.grad)]
    for ours, its in pairs + [(ours, z.grad) for ours, z in zip(d_hidden, hidden, strict=True)]:
        assert ours.dtype == its.dtype
        distance = (ours.double() - its.double()).norm() / its.double().norm()
        assert distance <= tolerance, f"{rows} x {columns}, {experts} experts, {dtype}: {distance}"


def through_autograd():
    """Run the whole function as on a GPU, with the kernels."""
    fused.supports_fused = lambda hidden, gates: True
    hidden = [torch.randn(5, 7, dtype=torch.float64).float().requires_grad_() for _ in range(3)]
    logits = torch.randn(5, 3, requires_grad=True)
    results = []
    for use in (False, True):
        for leaf in (*hidden, logits):
            leaf.grad = None
        out = fused.gated_gelu_sum(hidden, logits.softmax(-1), fused=use)
        out.square().sum().backward()
        results.append([out.detach(), logits.grad, *(z.grad for z in hidden)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    torch.manual_seed(0)
    compare(33, 130, 4, torch.float32, 1e-5)  # neither is a multiple of a block
    compare(16, 128, 1, torch.float32, 1e-5)
    compare(20, 24, 8, torch.float32, 1e-5)
    compare(33, 40, 3, torch.bfloat16, 1e-2)
    through_autograd()
    print("same")
