"""Ask a running demo one question: ask_demo.py URL IMAGE QUESTION.

Waits up to two minutes for the server. Prints the answer; ends with 1 where there is none.
"""

import html
import sys
import time

import httpx
from gradio_client import Client, handle_file

PATIENCE = 120.0  # seconds


def connect(url: str) -> Client:
    """Connect, or raise httpx.ConnectError when no server answers in time."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            httpx.get(url, timeout=10.0).raise_for_status()
            return Client(url, verbose=False)
        except (httpx.ConnectError, httpx.TimeoutException):
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def main(url: str, picture: str, question: str) -> int:
    client = connect(url)
    *_, page = client.predict(message={"text": question, "files": [handle_file(picture)]}, api_name="/chat")
    content = page[-1]["content"]
    answer = html.unescape(content if isinstance(content, str) else content[-1]["text"]).strip()
    print(f"{question} -> {answer!r}")
    return 0 if answer and page[-1]["role"] == "assistant" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
