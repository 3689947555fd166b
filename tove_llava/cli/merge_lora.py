"""Write a model's LoRA adapters into its language model's weights.

The result is one whole model, which load_model, from_pretrained, 'tove-llava export' and further training read. After
QLoRA it keeps the language model's weights as quantisation left them, in full precision. (The verb that merges experts
into CLIP is 'tove-llava merge'.)
"""

import argparse

HELP = "write a model's LoRA adapters into its language model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", required=True, help="folder that LoRA or QLoRA training wrote, or hf:owner/name"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="new folder to write")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: the language model's in training)")
    parser.add_argument("--self-contained", action="store_true", help="write CLIP and the experts as well")


def run(args: argparse.Namespace) -> int:
    from tove_llava.checkpoints.conversion import merge_lora
    from tove_llava.core.logs import quiet_transformers

    quiet_transformers()
    merge_lora(args.model, args.out, dtype=args.dtype, self_contained=args.self_contained)
    print(args.out)
    return 0
