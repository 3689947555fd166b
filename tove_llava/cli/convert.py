"""Convert LLaVA-1.5 checkpoints, both ways. The format of --model is recognised.

tove      this package's own: only CLIP, or with --preset a start of training with that preset's experts, whose logits
          are the checkpoint's own until it is trained
original  haotian-liu/LLaVA's folders: a whole model, stage 1's mm_projector.bin, or LoRA adapters
llava-hf  transformers' LlavaForConditionalGeneration

The other formats take a model whose tower is only CLIP. Tensors keep their bits. The new folder is complete or not
there at all, and the old one is only read.
"""

import argparse

HELP = "convert checkpoints of LLaVA and llava-hf to this package's, and back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", required=True, help="folder to convert, or hf:owner/name")
    parser.add_argument("--out", metavar="DIR", required=True, help="new folder to write")
    parser.add_argument("--to", default="tove", metavar="NAME", help="tove (default), original or llava-hf")
    parser.add_argument("--preset", metavar="NAME", help="give the tower this preset's experts and fusion, untrained")
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value", help="override a preset's key")
    parser.add_argument("--base", metavar="DIR", help="language model of a stage-1 or LoRA folder")
    parser.add_argument("--clip", metavar="DIR", help="CLIP, where --model does not say where it is")
    parser.add_argument("--template", metavar="NAME", help="conversation template (default: v1; stage 1: plain)")


def run(args: argparse.Namespace) -> int:
    import sys

    from tove_llava.checkpoints.conversion import convert_checkpoint
    from tove_llava.core.logs import quiet_transformers

    quiet_transformers()
    remarks = convert_checkpoint(
        args.model,
        args.out,
        args.to,
        preset=args.preset,
        overrides=args.set,
        base=args.base,
        clip=args.clip,
        template=args.template,
    )
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    print(args.out)
    return 0
