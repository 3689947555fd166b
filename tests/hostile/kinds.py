"""The kinds of hostile inputs: each turns a seed into a case, with an oracle for the right result."""

import io
import json
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hostile.invariant import Case, finite, strict_json
from hostile.mutations import (
    dice_of,
    harmless_text,
    mutate_bytes,
    mutate_text,
    mutate_value,
    written,
)
from PIL import Image
from train_parts import byte_tokenizer

from tove_llava.cli import main as cli
from tove_llava.core.sources import Source
from tove_llava.data import ImageTransform, LlavaDataset, load_tokenizer
from tove_llava.data.images import open_image, to_rgb

TOKENS = 36
SAMPLES = Path(__file__).parents[1] / "data" / "eval"


@dataclass
class World:
    """What all cases of a session share; only read.

    Attributes:
        images: folder with ``a.png``, ``b.jpg`` and ``c.png``.
        tokenizer: of ``bundled:llm``.
        templates: a tokenizer's folder.
        engine: of a small random model, for requests.
    """

    images: Path
    tokenizer: Any
    templates: Path
    engine: Any = None


def picture(seed: int = 0, size: tuple[int, int] = (20, 14), mode: str = "RGB") -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


def chat_tokenizer(folder: Path) -> Path:
    """Save a byte tokenizer with the end tokens of several families."""
    tokenizer = byte_tokenizer()
    ends = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|return|>", "<end_of_turn>", "<|end|>", "<|endoftext|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    tokenizer.save_pretrained(folder)
    return folder


def make_world(folder: Path) -> World:
    (images := folder / "images").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.jpg", "c.png")):
        picture(seed).save(images / name)
    tokenizer = load_tokenizer(Source.parse("bundled:llm").require())
    return World(images, tokenizer, chat_tokenizer(folder / "tokenizer"))


# -- images ------------------------------------------------------------------------------------------------------------

FORMATS = [
    ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("PNG", "1"), ("JPEG", "RGB"),
    ("JPEG", "L"), ("JPEG", "CMYK"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"), ("WEBP", "RGB"),
    ("PPM", "RGB"), ("AVIF", "RGB"), ("JPEG2000", "RGB"),
]  # fmt: skip


def png_of_size(dice, content: bytes) -> bytes:
    """Let a PNG's header claim another size or kind, with a right check sum."""
    width, height = (dice.choice([0, 1, 7, 2**16, 2**31 - 1, 2**32 - 1, dice.randrange(1, 10**5)]) for _ in range(2))
    body = (
        b"IHDR" + struct.pack(">II", width, height) + bytes([dice.choice([1, 2, 8, 16, 3]), dice.randrange(8), 0, 0, 0])
    )
    return content[:12] + body + struct.pack(">I", zlib.crc32(body)) + content[33:]


def images(seed: int, folder: Path, world: World) -> Case:
    dice = dice_of("images", seed)
    kind, mode = dice.choice(FORMATS)
    size = dice.choice([(1, 1), (20, 14), (3, 900), (64, 64)])
    source = picture(seed, size, "L" if mode == "I;16" else mode) if mode != "F" else picture(seed, size, "F")
    if mode == "I;16":
        source = source.convert("I;16")
    buffer = io.BytesIO()
    source.save(buffer, kind)
    content = buffer.getvalue()
    passes = dice.random() < 0.15 and mode != "F"
    if not passes:
        if kind == "PNG" and dice.random() < 0.3:
            content = png_of_size(dice, content)
        for _ in range(dice.choice([1, 1, 2])):
            content = mutate_bytes(dice, content)
    name = f"x.{dice.choice(['png', 'jpg', 'gif', kind.lower()])}"
    file = folder / "images" / name
    file.parent.mkdir()
    file.write_bytes(content)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    records = folder / "records.json"
    records.write_text(json.dumps([{"id": "1", "image": name, "conversations": turns}]))

    def right(out: str) -> None:
        pixels = ImageTransform(48, "pad").open(file)
        assert pixels.shape == (3, 48, 48) and pixels.isfinite().all()
        seen = to_rgb(open_image(file))
        with Image.open(file) as expected:
            assert seen.size == expected.size
            if expected.mode in ("RGB", "L"):
                assert seen.tobytes() == expected.convert("RGB").tobytes()

    words = ["data", "check", "--data-path", str(records), "--image-folder", str(file.parent), "--workers", "1"]
    return Case(
        lambda: cli(words), (name, "records.json: record 0"), right, folder, f"images {seed}: {kind} {mode}", passes
    )


# -- records -----------------------------------------------------------------------------------------------------------


def good_records() -> list[dict[str, Any]]:
    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]

    return [
        {"id": "r0", "image": "a.png", "conversations": turns("<image>\nWhat is it?", "A red cube.")},
        {"id": "r1", "conversations": turns("Who are you?", "A model.", "And now?", "Still one.")},
        {"id": "r2", "image": ["b.jpg", "c.png"], "conversations": turns("<image><image>\nCompare.", "They differ.")},
    ]


def supervised(example: dict[str, Any], tokenizer: Any) -> str:
    labels = example["labels"]
    return tokenizer.decode(labels[labels >= 0], skip_special_tokens=True)


def squeezed(text: str) -> str:
    return "".join(text.split())


def check_learned(file: Path, images: Path, tokenizer: Any, template: str) -> None:
    """Training takes what the check passed, and learns the replies that stand in the file."""
    dataset = LlavaDataset(file, images, tokenizer, template, ImageTransform(48, "pad"), TOKENS, unsupervised="error")
    text = file.read_text("utf-8-sig")
    try:
        rows = json.loads(text)
        rows = rows if isinstance(rows, list) else [rows]
    except ValueError:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    assert len(dataset) == len(rows), f"{len(dataset)} records of {len(rows)} are trained on"
    for index, row in enumerate(rows):
        example = dataset[index]
        turns = row.get("conversations") or row.get("messages")
        replies = [turn.get("value", turn.get("content")) for turn in turns]
        replies = [text for text, turn in zip(replies, turns, strict=True) if is_reply(turn) and turn is not turns[0]]
        plain = all(
            isinstance(text, str) and text.isascii() and text.isprintable() and "<" not in text for text in replies
        )
        if plain and sum(map(len, replies)) < 500:
            learned = supervised(example, tokenizer)
            assert squeezed(learned) == squeezed("".join(replies)), f"learns {learned!r} of {replies}"
        images_named = row.get("image") if row.get("image") is not None else row.get("images") or []
        count = 1 if isinstance(images_named, str) else len(images_named)
        assert int((example["input_ids"] == -200).sum()) == count, f"{count} images in record {index}"


def is_reply(turn: dict[str, Any]) -> bool:
    return turn.get("from", turn.get("role")) in ("gpt", "assistant", "bot", "chatgpt", "model")


def records(seed: int, folder: Path, world: World) -> Case:
    dice = dice_of("records", seed)
    rows, lines, passes = good_records(), dice.random() < 0.3, dice.random() < 0.15
    if passes:
        dice.shuffle(rows)
        content = harmless_text(dice, written(dice, rows, lines))
    else:
        mutated: Any = rows
        for _ in range(dice.choice([0, 1, 1, 2])):
            mutated = mutate_value(dice, mutated)
        content = written(dice, mutated, lines)
        if mutated is rows or dice.random() < 0.2:
            content = mutate_text(dice, content)
    file = folder / ("records.jsonl" if lines else "records.json")
    file.write_bytes(content)
    words = [
        "data",
        "check",
        "--data-path",
        str(file),
        "--image-folder",
        str(world.images),
        "--tokenizer",
        "bundled:llm",
    ]
    words += ["--num-image-tokens", str(TOKENS), "--template", "v1", "--workers", "1"]

    def right(out: str) -> None:
        check_learned(file, world.images, world.tokenizer, "v1")

    return Case(lambda: cli(words), (file.name,), right, folder, f"records {seed}", passes)


# -- answers and ground truths -----------------------------------------------------------------------------------------

SCORED = [
    "scenes", "pope", "vqav2", "gqa", "mme", "okvqa", "scienceqa", "seed", "textvqa", "vizwiz", "vsr", "mmbench",
    "chartqa", "docvqa", "ocrbench", "hallusionbench", "mmmu", "mmmu_pro",
]  # fmt: skip


def answers(seed: int, folder: Path, world: World) -> Case:
    dice = dice_of("answers", seed)
    benchmark = dice.choice(SCORED)
    sample = SAMPLES / benchmark
    truth = next(path for path in sorted(sample.iterdir()) if path.stem in ("ground_truth", "questions"))
    files = {name: folder / name for name in ("predictions.jsonl", truth.name)}
    hit, passes = dice.choice(sorted(files)), dice.random() < 0.15
    for name, file in files.items():
        content = (sample / name).read_bytes()
        if name == hit and passes and file.suffix in (".json", ".jsonl"):
            content = harmless_text(dice, content)
        elif name == hit and not passes:
            content = hostile_rows(dice, content, file.suffix)
        file.write_bytes(content)
    words = ["score", "--benchmark", benchmark, "--predictions", str(folder / "predictions.jsonl")]
    words += ["--ground-truth", str(folder / truth.name), "--json", "--per-item"]

    def right(out: str) -> None:
        got = strict_json(out)
        assert got["count"] >= 1 and finite(got)
        rows = [value for value in numbers(got["scores"]) if value < 0]
        assert not rows, f"negative scores {rows[:3]}"
        if passes:
            expected = json.loads((sample / "expected.json").read_text())
            assert got["count"] == expected["count"]
            for key, value in expected["scores"].items():
                if isinstance(value, float):
                    assert abs(got["scores"][key] - value) < 1e-6, key

    return Case(
        lambda: cli(words), (hit, "question", "record"), right, folder, f"answers {seed}: {benchmark} {hit}", passes
    )


def hostile_rows(dice: Any, content: bytes, suffix: str) -> bytes:
    try:
        lines = suffix == ".jsonl"
        value = [json.loads(line) for line in content.splitlines() if line.strip()] if lines else json.loads(content)
    except ValueError:
        return mutate_bytes(dice, content)
    for _ in range(dice.choice([0, 1, 1, 2])):
        value = mutate_value(dice, value)
    content = written(dice, value, suffix == ".jsonl")
    return mutate_text(dice, content) if dice.random() < 0.4 else content


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in numbers(inner)]
    return [float(value)] if isinstance(value, int | float) else []


# -- questions ---------------------------------------------------------------------------------------------------------


def questions(seed: int, folder: Path, world: World) -> Case:
    """The model is a small random one (``world`` is read by the fixture that replaces the loading)."""
    dice = dice_of("questions", seed)
    rows = [
        {"question_id": f"q{k}", "image": name, "text": text, "answer": "red", "category": "colour"}
        for k, (name, text) in enumerate(
            [("a.png", "What colour is it?"), ("a.png", "How many?"), ("c.png", "Which one?")]
        )
    ]
    passes = dice.random() < 0.15
    if passes:
        content = harmless_text(dice, written(dice, rows, True))
    else:
        content = hostile_rows(dice, written(dice, rows, True), ".jsonl")
    root, out = folder / "data", folder / "out"
    root.mkdir()
    (root / "val_questions.jsonl").write_bytes(content)
    (root / "images").symlink_to(world.images)
    words = ["eval", "--model", str(world.images), "--benchmark", "scenes", "--data-root", str(root)]
    words += ["--output", str(out), "--max-new-tokens", "1", "--device", "cpu", "--json"]

    def right(text: str) -> None:
        given = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
        folders = list(out.rglob("answers.jsonl"))
        answered = [json.loads(line) for line in folders[0].read_text().split("\n") if line]
        assert [row["question_id"] for row in answered] == [row["question_id"] for row in given]
        assert [row["prompt"] for row in answered] == [row["text"] for row in given]

    names = ("val_questions.jsonl", "question", "images")
    return Case(lambda: cli(words), names, right, folder, f"questions {seed}", passes, keeps="out")


# -- templates ---------------------------------------------------------------------------------------------------------

PIECES = [
    "{{ ", " }}", "{% ", " %}", "| upper", "| trim", "| replace('e', '')", "content", "message['content']", "role",
    "{% endfor %}", "{% if false %}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**9 }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}", "{% set x = namespace() %}", "bos_token", "eos_token", "{{ messages | tojson }}",
    "{% include '/etc/passwd' %}", "{{ 'a' * 10**6 }}", "{{ cycler.__init__.__globals__ }}", "<image>", "\x00", "{#",
]  # fmt: skip


def templates(seed: int, folder: Path, world: World) -> Case:
    dice = dice_of("templates", seed)
    good = sorted((Path(__file__).parents[1] / "chat_templates").glob("*.jinja"))
    text = dice.choice(good).read_text()
    for _ in range(dice.choice([0, 1, 1, 2])):
        at = dice.randrange(len(text) + 1)
        end = min(len(text), at + dice.choice([0, 1, 5, 30]))
        text = text[:at] + dice.choice(PIECES) * dice.choice([0, 1, 1]) + text[end:]
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    for file in world.templates.iterdir():
        if file.name != "chat_template.jinja":
            shutil.copy(file, tokenizer)
    (tokenizer / "chat_template.jinja").write_text(text)
    data = folder / "records.json"
    data.write_text(json.dumps(good_records()))
    words = [
        "data",
        "check",
        "--data-path",
        str(data),
        "--image-folder",
        str(world.images),
        "--tokenizer",
        str(tokenizer),
    ]
    words += ["--num-image-tokens", str(TOKENS), "--template", "chat_template", "--workers", "1"]

    def right(out: str) -> None:
        check_learned(data, world.images, load_tokenizer(tokenizer), "chat_template")

    return Case(lambda: cli(words), ("template", "tokenizer"), right, folder, f"templates {seed}")


# -- flags -------------------------------------------------------------------------------------------------------------

WORDS = [
    "", " ", "0", "-1", "1", "1e309", "nan", "inf", "-inf", "0.5", "x", "None", "null", "True", "{}", "[]", "{",
    "9" * 30, "../x", "/", "\x00", "\udcff", "é", "a,b", "a=b", "--x", "steps", "yes", "1 2", "0x10", "1_000", "٣", "½",
]  # fmt: skip


def flags(seed: int, folder: Path, world: World) -> Case:
    """Settings of a training, read as for ``--print-config``, without its estimates (a fixture sees to that)."""
    from tove_llava.train.arguments import Parser

    dice = dice_of("flags", seed)
    known = [name for action in Parser()._actions for name in action.option_strings if name.startswith("--")]
    known = [name for name in known if name not in ("--help", "--help_all", "--help-all", "--plugin", "--meta")]
    data = folder / "records.json"
    data.write_text(json.dumps(good_records()))
    words = ["train", "--preset", "tiny", "--stage", dice.choice(["pretrain", "finetune_lora", "finetune"])]
    words += ["--data_path", str(data), "--image_folder", str(world.images), "--output_dir", str(folder / "out")]
    chosen = [dice.choice(known) for _ in range(dice.choice([1, 1, 2]))]
    if dice.random() < 0.1:
        chosen.append(dice.choice(["--lerning_rate", "--", "-x", "--set", "-", "--no-such"]))
    values = [dice.choice(WORDS) for _ in chosen]
    for name, value in zip(chosen, values, strict=True):
        words += [name] if dice.random() < 0.05 else [name, value]
    words.append("--print_config")
    plain = [name.lstrip("-").replace("-", "_") for name in chosen]
    names = (*chosen, *plain, *(name.partition("_")[2] for name in plain if "_" in name))  # lora_dropout: lora: dropout
    names += tuple(each for value in values for each in (repr(value), value.partition("=")[0].strip()))

    def right(out: str) -> None:
        """Each number in the record is finite, and that of a flag is the last one given."""
        record = json.loads(out.splitlines()[-1])
        given = {name.lstrip("-").replace("-", "_"): value for name, value in zip(chosen, values, strict=True)}
        assert finite(record)
        for key, found in record.items():
            text = given.get(key.rpartition(".")[2])
            if text is not None and isinstance(found, int | float) and not isinstance(found, bool):
                assert type(found)(text) == found, f"{key} is {found}"

    names = tuple(name for name in names if name)
    return Case(lambda: cli(words), names, right, folder, f"flags {seed}: {words[11:-1]}")


KINDS = {
    "images": images, "records": records, "answers": answers, "questions": questions, "templates": templates,
    "flags": flags,
}  # fmt: skip
