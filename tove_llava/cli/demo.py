"""Open the demo: chat with a model about pictures in the browser and see its experts at work."""

import argparse

from tove_llava.cli._loading import add_loading_arguments, loading_options

HELP = "chat with a model in the browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="folder that training wrote (default: the newest in outputs/)")
    parser.add_argument("--compare", metavar="DIR", help="a second model, beside the first in the tab Compare")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="ask for a password; @FILE reads such lines from a file, so that the list of processes does not show it",
    )
    parser.add_argument("--share", action="store_true", help="make a public address through gradio's service")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from tove_llava.serve.models import find_model
    from tove_llava.serve.ui.auth import read_auth

    auth = read_auth(args.auth)
    folder = find_model(args.model)
    other = None if args.compare is None else find_model(args.compare)
    from tove_llava.logs import quiet_transformers
    from tove_llava.serve.engine import Engine
    from tove_llava.serve.gradio_app import launch

    quiet_transformers()
    options = loading_options(args)
    engine = Engine.load(folder, **options)
    compare = None if other is None else Engine.load(other, **options)
    try:
        launch(engine, args.host, args.port, args.max_new_tokens, compare=compare, auth=auth, share=args.share)
    finally:
        for running in (engine, compare):
            if running is not None:
                running.close()
    return 0
