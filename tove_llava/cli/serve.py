"""Serve a model to programs: OpenAI's chat API, with pictures, for models with experts too.

The model, its experts included, is handed to `transformers serve`, which answers POST /v1/chat/completions as OpenAI's
API does. A folder of training is written to a temporary place first, as `tove-llava export --format remote-code` does,
in the system's folder for temporary files (TMPDIR). The page for people is `tove-llava demo`.
"""

import argparse

HELP = "serve a model to programs, as OpenAI's chat API does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="folder that training wrote (default: the newest in outputs/)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, help="port (default: 8000)")
    parser.add_argument("--device", help="cpu, cuda or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")


def run(args: argparse.Namespace) -> int:
    from tove_llava.serve.models import find_model

    folder = find_model(args.model)
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.serve.openai_api import serve_openai

    quiet_transformers()
    serve_openai(folder, args.host, args.port, args.device, args.dtype)
    return 0
