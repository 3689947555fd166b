"""Serve a model to programs through OpenAI's chat API, with images.

The engine of `tove-llava chat` answers POST /v1/chat/completions, experts included, many requests at a time.
`tove-llava demo` is the page for people.
"""

import argparse
import os
import sys

from tove_llava.cli._flags import add_host, add_loading, add_model, loading_options

HELP = "serve a model to programs, as OpenAI's chat API does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, required=False)
    add_host(parser)
    parser.add_argument("--port", type=int, help="port (default: 8000)")
    add_loading(parser)


def run(args: argparse.Namespace) -> int:
    from tove_llava.serve.models import find_model

    folder = find_model(args.model)
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.serve.openai_api import serve_openai

    quiet_transformers()
    try:
        serve_openai(folder, args.host, args.port, **loading_options(args))
    except KeyboardInterrupt:
        print("\ntove-llava serve: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # all is closed, and with torch the interpreter's own end takes seconds
    return 0
