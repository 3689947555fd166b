"""Serve a model to programs through OpenAI's chat API, with images.

`transformers serve` runs the model, experts included, and answers POST /v1/chat/completions. It needs the format of
`tove-llava export --format remote-code`; a folder of training is first written in that format to a temporary folder
(TMPDIR). `tove-llava demo` is the page for people.
"""

import argparse

from tove_llava.cli._flags import add_device, add_host, add_model

HELP = "serve a model to programs, as OpenAI's chat API does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, required=False)
    add_host(parser)
    parser.add_argument("--port", type=int, help="port (default: 8000)")
    add_device(parser)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")


def run(args: argparse.Namespace) -> int:
    from tove_llava.serve.models import find_model

    folder = find_model(args.model)
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.serve.openai_api import serve_openai

    quiet_transformers()
    serve_openai(folder, args.host, args.port, args.device, args.dtype)
    return 0
