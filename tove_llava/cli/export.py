"""Write a trained model as a folder that loads without this package.

hf-llava     a stock LlavaForConditionalGeneration, for a model whose tower is only CLIP (merged, or all experts
             detached); vLLM, SGLang and `transformers serve` read that format
remote-code  a model with its experts, its code and its backbones in the folder; loads with trust_remote_code=True

LoRA adapters are merged. The folder is complete or not there at all.
"""

import argparse

HELP = "write a trained model as a folder that loads without this package"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", required=True, help="folder that training, merge or detach wrote, or hf:owner/name"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="new folder to write")
    parser.add_argument("--format", default="hf-llava", metavar="NAME", help="hf-llava (default) or remote-code")
    parser.add_argument(
        "--bos",
        choices=("template", "tokenizer"),
        default="template",
        help="what writes the beginning-of-text token of a chat: the template (default; for servers, which encode a "
        "rendered chat as it is) or the tokenizer (for lmms-eval's llava_hf and other code that has it added)",
    )
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: the language model's in training)")


def run(args: argparse.Namespace) -> int:
    import sys

    from tove_llava.checkpoints.conversion import export_model
    from tove_llava.core.logs import quiet_transformers

    quiet_transformers()
    begins = args.bos == "template"
    for remark in export_model(args.model, args.out, args.format, dtype=args.dtype, chat_begins=begins):
        print(f"note: {remark}", file=sys.stderr)
    print(args.out)
    return 0
