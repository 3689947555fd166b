"""A small endpoint in a thread, and requests to it."""

import base64
import contextlib
import io
import threading
import time

import httpx
from answer_parts import picture

from tove_llava.serve.openai_api import CHAT, HEALTH, Server, bind

PICTURE = picture()


def data_url(image=PICTURE, kind="PNG", raw=None, **options):
    buffer = io.BytesIO()
    if raw is None:
        image.save(buffer, kind, **options)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue() if raw is None else raw).decode()}"


def user(text="What is it?", *urls):
    content = [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def body(*urls, text="What is it?", **changes):
    return {"model": "my-model", "messages": [user(text, *urls)], "max_tokens": 8, **changes}


@contextlib.contextmanager
def serving(engine):
    """Serve in a thread; yield the port."""
    with bind("127.0.0.1", 0) as bound:
        server = Server(engine, bound)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = bound.getsockname()[1]
        try:
            wait_for(port)
            yield port
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


def wait_for(port, alive=lambda: True, log=None):
    for _ in range(1200):
        assert alive(), log.read_text()
        try:
            if httpx.get(f"http://127.0.0.1:{port}{HEALTH}").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server did not come up")


def post(port, content, **options):
    return httpx.post(f"http://127.0.0.1:{port}{CHAT}", json=content, timeout=120, **options)
