"""Check fused kernels under Triton's interpreter.

It runs in a separate process: python -m kernels_child FAMILY.

The interpreter lacks two things that the compiler has: float arguments as float32 scalars, and libdevice's square root.
"""

import sys

import numpy as np
import torch
import triton
import triton.language as tl
from test_kernels import compare
from triton.runtime import interpreter

_convert = interpreter._implicit_cvt


def convert(argument):
    if isinstance(argument, float):
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return _convert(argument)


@triton.jit
def inverse_root(x):
    return 1.0 / tl.sqrt(x)


if __name__ == "__main__":
    import liger_kernel.ops.rms_norm

    interpreter._implicit_cvt = convert
    liger_kernel.ops.rms_norm.rsqrt = inverse_root
    compare(sys.argv[1], torch.device("cpu"), torch.float32, 1e-5)
    print("equal")
