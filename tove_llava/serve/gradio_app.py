"""The demo in the browser: ``python -m tove_llava.serve.gradio_app`` or ``tove-llava demo``."""

import html
import ipaddress
import logging
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tove_llava.core.errors import ConfigError
from tove_llava.inference.engine import Engine

logger = logging.getLogger(__name__)

MAX_UPLOAD = "20mb"
WAITING = 128  # events in gradio's queue; more are refused. The engine has its own queue
THREADS = 80
CACHE = (600, 7200)  # seconds between two searches for old files, and the age at which they are deleted

TOGGLE_THEME = "() => { document.body.classList.toggle('dark'); }"


def build_app(engine: Engine, max_new_tokens: int = 256, compare: Engine | None = None) -> Any:
    """Build the page: a chat with experts, and two sides to compare.

    Args:
        max_new_tokens: the longest answer that a user can choose, and the default.
        compare: the model of the right side; by default the same.

    Raises:
        ConfigError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError("the demo needs gradio; install it: pip install 'tove-llava[demo]'") from error
    from tove_llava.serve.ui.api import Api
    from tove_llava.serve.ui.chat_tab import Chat
    from tove_llava.serve.ui.compare_tab import Compare
    from tove_llava.serve.ui.examples import make_examples
    from tove_llava.serve.ui.session import Session

    engines, session = (engine, compare or engine), Session()
    folder = tempfile.TemporaryDirectory(prefix="tove-llava-")
    examples = make_examples(Path(folder.name))
    with gr.Blocks(title="ToVE-LLaVA", analytics_enabled=False, delete_cache=CACHE, fill_width=True) as app:
        with gr.Row(elem_id="tove-head"):
            gr.HTML(_title(engine))
            theme = gr.Button("Light / dark", size="sm", elem_id="tove-theme", scale=0, min_width=110)
        with gr.Tab("Chat"):
            chat = Chat(engine, session, examples, max_new_tokens)
        with gr.Tab("Compare", visible=bool(engine.experts) or compare is not None):
            Compare(engines, session, chat.settings, {"text": examples[0].text, "files": [examples[0].file]})
        Api(engines, session, chat.settings)
        theme.click(None, None, None, js=TOGGLE_THEME, api_visibility="private")
    app.examples_folder = folder  # removed with the app
    return app


def launch(
    engine: Engine,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_new_tokens: int = 256,
    block: bool = True,
    *,
    compare: Engine | None = None,
    auth: Sequence[tuple[str, str]] | None = None,
    share: bool = False,
) -> Any:
    """Serve until interrupted; without ``block``, until the result is closed.

    Args:
        auth: users and passwords; None lets everyone in.
        share: make a public address through gradio's service.

    Raises:
        ConfigError: gradio is not installed, or the port is taken.
    """
    app = build_app(engine, max_new_tokens, compare).queue(max_size=WAITING)
    if auth is None and (share or not _is_loopback(host)):
        logger.warning("everyone who can reach this page can use the model; --auth asks for a password")
    try:
        app.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=None if auth is None else list(auth),
            max_file_size=MAX_UPLOAD,
            max_threads=THREADS,
            show_error=False,  # the page shows ToveErrors all the same; the log has the traceback of others
            prevent_thread_lock=True,
            quiet=True,
            footer_links=["api"],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            theme=_theme(),
            css=resources.files("tove_llava.serve.ui").joinpath("page.css").read_text(encoding="utf-8"),
        )
    except OSError as error:
        raise ConfigError(
            f"the demo cannot listen on {host}:{port or '7860 to 7959'}: {error}; choose --port"
        ) from error
    if share and not app.share_url:
        logger.warning("gradio's service gives no public address now; the page is at its local one")
    if block:
        public = f", for everyone at {app.share_url}" if app.share_url else ""
        print(f"open {app.local_url} in a browser{public}; Ctrl-C ends it", flush=True)
        app.block_thread()
    return app


def _title(engine: Engine) -> str:
    from tove_llava.serve.ui.overlay import name_of

    experts = ", ".join(engine.experts)
    about = f"CLIP with {len(engine.experts)} experts: {experts}" if experts else "only CLIP"
    return (
        f'<div class="tove-brand"><h1>ToVE-LLaVA</h1><p><b>{html.escape(name_of(engine.name))}</b> '
        f"{html.escape(about)}</p></div>"
    )


def _theme() -> Any:
    """Use only system fonts, so that the page loads nothing from elsewhere."""
    import gradio as gr

    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    from tove_llava.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
