"""Open the demo: chat with a model about pictures in the browser."""

import argparse

from tove_llava.cli._loading import add_loading_arguments, loading_options

HELP = "chat with a model in the browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="folder that training wrote (default: the newest in outputs/)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from tove_llava.serve.models import find_model

    folder = find_model(args.model)
    from tove_llava.logs import quiet_transformers
    from tove_llava.serve.engine import Engine
    from tove_llava.serve.gradio_app import launch

    quiet_transformers()
    launch(Engine.load(folder, **loading_options(args)), args.host, args.port, args.max_new_tokens)
    return 0
