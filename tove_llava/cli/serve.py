"""Serve a model: a page to chat with it in the browser, or, with --openai, an endpoint for programs.

--openai hands the model, its experts included, to `transformers serve`, which answers POST /v1/chat/completions as
OpenAI's API does. A folder of training is written to a temporary place first, as `tove-llava export --format
remote-code` does, in the system's folder for temporary files (TMPDIR).
"""

import argparse

from tove_llava.cli._loading import add_loading_arguments, loading_options

HELP = "chat with a model in the browser, or serve it to programs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="folder that training wrote (default: the newest in outputs/)")
    parser.add_argument("--openai", action="store_true", help="an OpenAI-compatible endpoint instead of the page")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860; with --openai 8000)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer on the page (default: 256)"
    )
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from tove_llava.errors import ConfigError
    from tove_llava.serve.models import find_model

    if args.openai and (args.load_4bit or args.load_8bit):
        raise ConfigError("--openai does not go with --load-4bit or --load-8bit; serve a merged or smaller model")
    folder = find_model(args.model)
    from tove_llava.logs import quiet_transformers

    quiet_transformers()
    if args.openai:
        from tove_llava.serve.openai_api import serve_openai

        serve_openai(folder, args.host, args.port, args.device, args.dtype)
        return 0
    from tove_llava.serve.engine import Engine
    from tove_llava.serve.gradio_app import launch

    launch(Engine.load(folder, **loading_options(args)), args.host, args.port, args.max_new_tokens)
    return 0
