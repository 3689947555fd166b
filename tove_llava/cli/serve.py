"""Serve a model: a page to chat with it in the browser, or, with --openai, an endpoint for programs.

--openai hands the model, its experts included, to `transformers serve`, which answers POST /v1/chat/completions as
OpenAI's API does. A folder of training is written to a temporary place first, as `tove-llava export --format
remote-code` does, in the system's folder for temporary files (TMPDIR).
"""

import argparse
import os
import signal
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

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
    page = parser.add_argument_group("the page")
    page.add_argument("--compare", metavar="DIR", help="a second model, beside the first in the tab Compare")
    page.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="ask for a password; @FILE reads such lines from a file, so that the list of processes does not show it",
    )
    page.add_argument("--share", action="store_true", help="make a public address through gradio's service")
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from tove_llava.errors import ConfigError
    from tove_llava.serve.models import find_model

    if args.openai and (args.load_4bit or args.load_8bit):
        raise ConfigError("--openai does not go with --load-4bit or --load-8bit; serve a merged or smaller model")
    if args.openai and (args.compare or args.auth or args.share):
        raise ConfigError("--compare, --auth and --share belong to the page and do not go with --openai")
    folder = find_model(args.model)
    from tove_llava.logs import quiet_transformers

    quiet_transformers()
    if args.openai:
        from tove_llava.serve.openai_api import serve_openai

        serve_openai(folder, args.host, args.port, args.device, args.dtype)
        return 0
    _serve_page(args, folder)
    return 0


def _serve_page(args: argparse.Namespace, model: Path) -> None:
    from tove_llava.serve.models import find_model
    from tove_llava.serve.ui.auth import read_auth

    auth = read_auth(args.auth)
    other = None if args.compare is None else find_model(args.compare)
    from tove_llava.serve.engine import Engine
    from tove_llava.serve.gradio_app import launch

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
