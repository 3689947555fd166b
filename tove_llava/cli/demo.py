"""Open the demo: chat with a model about pictures in the browser, and see its experts at work.

The same as `python -m tove_llava.serve.gradio_app`.
"""

import argparse
import os
import signal
import tempfile
import threading
from contextlib import ExitStack

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

    model = find_model(args.model)
    other = None if args.compare is None else find_model(args.compare)
    auth = read_auth(args.auth)
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.inference.engine import Engine
    from tove_llava.serve.gradio_app import launch

    quiet_transformers()
    options = loading_options(args)
    with ExitStack() as running:
        # Uploads in a folder of this process and user alone, gone with it; gradio's own is shared.
        folder = running.enter_context(tempfile.TemporaryDirectory(prefix="tove-llava-", ignore_cleanup_errors=True))
        if os.environ.setdefault("GRADIO_TEMP_DIR", folder) == folder:
            running.callback(os.environ.pop, "GRADIO_TEMP_DIR", None)
        engine = running.enter_context(Engine.load(model, **options))
        compare = None if other is None else running.enter_context(Engine.load(other, **options))
        if threading.current_thread() is threading.main_thread():  # a service manager's end is as clean as Ctrl-C
            running.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
        launch(engine, args.host, args.port, args.max_new_tokens, compare=compare, auth=auth, share=args.share)
    return 0
