"""Chat with a model in the terminal.

With --question one answer is printed; without it, questions are read line by line. A line that begins with / is a
command: /image FILE, /detach NAME, /attach NAME, /experts, /routing OUT.png, /system TEXT, /reset, /help. Ctrl-C stops
an answer; an empty line or Ctrl-D ends.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from tove_llava.cli._flags import add_loading, add_model, loading_options
from tove_llava.core.errors import ConfigError, ToveError
from tove_llava.core.text import has_encoding

if TYPE_CHECKING:
    from tove_llava.serve.commands import Conversation

HELP = "chat with a model in the terminal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, required=False)
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="an image; may be repeated")
    parser.add_argument("--question", metavar="TEXT", help="ask this and stop")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: that of the model's template)")
    parser.add_argument("--experts", metavar="A,B", help="use only these experts (default: all; '' for none)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely words with this share"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; needs --question")
    add_loading(parser)


def run(args: argparse.Namespace) -> int:
    from tove_llava.serve.models import find_model

    if args.json and args.question is None:
        raise ConfigError("--json needs --question")
    folder = find_model(args.model)
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.inference.engine import Engine, Sampling
    from tove_llava.serve.commands import Conversation

    quiet_transformers()
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p)
    experts = None if args.experts is None else [name for name in args.experts.replace(",", " ").split() if name]
    with Engine.load(folder, **loading_options(args)) as engine:
        chat = Conversation(engine, sampling, args.system, experts, images=list(args.image))
        if args.json:
            return _print_json(chat, args.question)
        if args.question is not None:
            with chat.ask(args.question) as reply:
                empty = True
                for piece in reply:
                    print(piece, end="", flush=True)
                    empty = False
            print()
            if empty:
                print("(the answer is empty)", file=sys.stderr)
            if reply.reasoning is not None:
                print(f"(a think block of {len(reply.reasoning)} characters; --json shows it)", file=sys.stderr)
            return 0
        return _converse(chat)


def _print_json(chat: "Conversation", question: str) -> int:
    import json
    import time

    started = time.monotonic()
    reply = chat.ask(question)
    text, timing = reply.text(), reply.timing
    routing = [chat.engine.routing(chat.read(image), chat.attached) for image in chat.images]
    result = {
        "model": chat.engine.name,
        "images": chat.images,
        "experts": list(chat.attached or ()),
        "question": question,
        "answer": text,
        **({"reasoning": reply.reasoning} if reply.reasoning is not None else {}),
        "routing": [entry.means if entry else None for entry in routing],
        "tokens": timing.tokens if timing else 0,
        "tower_seconds": round(timing.tower, 4) if timing else 0.0,
        "first_token_seconds": round(timing.first_token, 4) if timing else 0.0,
        "tokens_per_second": round(timing.tokens_per_second, 2) if timing else 0.0,
        "seconds": round(time.monotonic() - started, 3),
    }
    print(json.dumps(result, ensure_ascii=False))
    return 0


def _converse(chat: "Conversation") -> int:
    from tove_llava.serve.commands import run_command

    print(f"{chat.engine.name}: type a question; /help lists the commands, an empty line ends.")
    while line := _read_line():
        try:
            if line.startswith("/"):
                print(run_command(chat, line))
            else:
                _answer(chat, line)
        except ToveError as error:  # an error in one line does not end the conversation
            print(f"{error}", file=sys.stderr)
    return 0


def _read_line() -> str:
    while True:
        try:
            line = input("> ").strip()
            if has_encoding(line):
                return line
            print("that line is not UTF-8 text; type it again", file=sys.stderr)
        except EOFError:
            return ""
        except KeyboardInterrupt:
            print("\n(an empty line or Ctrl-D ends)", file=sys.stderr)


def _answer(chat: "Conversation", question: str) -> None:
    """Print an answer as it comes; Ctrl-C keeps the printed part."""
    text = ""
    try:
        with chat.ask(question) as reply:
            for piece in reply:
                text += piece
                print(_shown(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="", file=sys.stderr)
    print()
    chat.keep(question, text.strip())


def _shown(text: str) -> str:
    """Replace the control characters that a terminal would obey."""
    if not sys.stdout.isatty():
        return text
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
