"""Chat with a model in the terminal.

With --question one answer is printed; without it, questions are read line by line ('/image FILE' adds a picture, '/new'
starts over, an empty line or Ctrl-D ends).
"""

import argparse
import sys

from tove_llava.cli._loading import add_loading_arguments, loading_options

HELP = "chat with a model in the terminal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="folder that training wrote (default: the newest in outputs/)")
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture; may be repeated")
    parser.add_argument("--question", metavar="TEXT", help="ask this and stop")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--json", action="store_true", help="print one JSON object; needs --question")
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import json
    import time

    from tove_llava.errors import ConfigError, DataError
    from tove_llava.logs import quiet_transformers
    from tove_llava.serve.engine import Engine, Message
    from tove_llava.serve.models import find_model

    if args.json and args.question is None:
        raise ConfigError("--json needs --question")
    quiet_transformers()
    engine = Engine.load(find_model(args.model), **loading_options(args))
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    if args.json:
        started = time.monotonic()
        text = engine.answer([Message("user", args.question, args.image)], **options)
        routing = [engine.routing(image) for image in args.image]
        print(
            json.dumps(
                {
                    "model": engine.name,
                    "images": args.image,
                    "question": args.question,
                    "answer": text,
                    "routing": [entry.means if entry else None for entry in routing],
                    "seconds": round(time.monotonic() - started, 3),
                },
                ensure_ascii=False,
            )
        )
        return 0
    if args.question is not None:
        _print_stream(engine.stream([Message("user", args.question, args.image)], **options))
        return 0

    print(f"{engine.name}: type a question; /image FILE adds a picture, /new starts over, an empty line ends.")
    history: list[Message] = []
    pictures = list(args.image)
    while line := _read_line():
        command, _, rest = line.partition(" ")
        if command == "/new":
            history, pictures = [], list(args.image)
            continue
        if command == "/image":
            pictures.append(rest.strip())
            continue
        asked = [*history, Message("user", line, tuple(pictures))]
        try:
            answer = _print_stream(engine.stream(asked, **options))
        except DataError as error:  # a picture that cannot be read must not end the conversation
            print(f"{error}", file=sys.stderr)
            pictures = []
            continue
        history, pictures = [*asked, Message("assistant", answer)], []
    return 0


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _print_stream(pieces) -> str:  # type: ignore[no-untyped-def]
    text = ""
    for piece in pieces:
        text += piece
        print(piece, end="", flush=True)
    print()
    return text.strip()
