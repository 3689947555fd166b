"""Open the demo: chat with a model about pictures in the browser."""

import argparse

HELP = "chat with a model in the browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="folder that training wrote (default: the newest in outputs/)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: by the device)")


def run(args: argparse.Namespace) -> int:
    from tove_llava.serve.models import find_model

    folder = find_model(args.model)
    from tove_llava.logs import quiet_transformers
    from tove_llava.serve.engine import Engine
    from tove_llava.serve.gradio_app import launch

    quiet_transformers()
    launch(Engine.load(folder, args.device, args.dtype), args.host, args.port, args.max_new_tokens)
    return 0
