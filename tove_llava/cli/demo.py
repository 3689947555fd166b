"""Chat about images in the browser, and see the model's experts.

The same as `python -m tove_llava.serve.gradio_app`.
"""

import argparse
import os
import signal
import tempfile
import threading
from contextlib import ExitStack

from tove_llava.cli._flags import add_host, add_loading, add_model, loading_options

HELP = "chat with a model in the browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, required=False)
    parser.add_argument("--compare", metavar="DIR", help="a second model, next to the first in the tab Compare")
    add_host(parser)
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="ask for a password; @FILE reads such lines from a file, which keeps them out of the list of processes",
    )
    parser.add_argument("--share", action="store_true", help="make a public address through gradio's service")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    add_loading(parser)


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
        # Uploads go to a folder that only this user reads and that ends with this process; gradio's own is shared.
        folder = running.enter_context(tempfile.TemporaryDirectory(prefix="tove-llava-", ignore_cleanup_errors=True))
        if os.environ.setdefault("GRADIO_TEMP_DIR", folder) == folder:
            running.callback(os.environ.pop, "GRADIO_TEMP_DIR", None)
        engine = running.enter_context(Engine.load(model, **options))
        compare = None if other is None else running.enter_context(Engine.load(other, **options))
        if threading.current_thread() is threading.main_thread():  # a service manager stops it as cleanly as Ctrl-C
            running.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
        launch(engine, args.host, args.port, args.max_new_tokens, compare=compare, auth=auth, share=args.share)
    return 0
