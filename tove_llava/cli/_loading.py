"""Flags of the verbs that load a model."""

import argparse
from typing import Any


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Where and in which precision the model runs."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: by the device)")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument(
        "--load-4bit", action="store_true", help="language model in 4 bits (NF4, or as it was trained); less memory"
    )
    bits.add_argument("--load-8bit", action="store_true", help="language model in 8 bits")
    parser.add_argument(
        "--tower-execution",
        default="eager",
        metavar="NAME",
        help="how CLIP and the experts are run: eager, concurrent (side by side), or compiled as well (default: eager)",
    )


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``Answerer.load``."""
    from tove_llava.presets import QuantizationPreset

    bits = 4 if args.load_4bit else 8 if args.load_8bit else None
    quantization = None if bits is None else QuantizationPreset(bits=bits)
    return {
        "device": args.device,
        "dtype": args.dtype,
        "quantization": quantization,
        "tower_execution": args.tower_execution,
    }
