"""The verbs ``data check`` and ``tokenize``, through the command's entry point."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import byte_level_tokenizer, decode_spans, train_sentencepiece
from PIL import Image

from tove_llava.cli import main
from tove_llava.data import load_tokenizer


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


GOOD = [
    {"id": "a", "image": "a.png", "conversations": turns("<image>\nWhat?", "A kite.")},
    {"id": "a", "image": "grey.png", "conversations": turns("<image>\nWhat?", "A drum.")},
    {"id": "t", "conversations": turns("Hello", "Hi.", "Well?", "Yes.")},
    {"id": "m", "image": ["a.png", "grey.png"], "conversations": turns("<image> <image>", "Two.")},
]
BAD = [
    {"id": "roles", "conversations": [{"from": "user", "value": "x"}]},
    {"id": "count", "image": "a.png", "conversations": turns("What?", "A kite.")},
    {"id": "absent", "image": "absent.png", "conversations": turns("<image>\nWhat?", "A kite.")},
    {"id": "damaged", "image": "damaged.png", "conversations": turns("<image>\nWhat?", "A kite.")},
    {"id": "outside", "image": "../data.json", "conversations": turns("<image>\nWhat?", "A kite.")},
    {"id": "mute", "conversations": turns("Hello?", "")},
    {"id": "long", "conversations": turns("lantern " * 500, "Lost.")},
    "not a record",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "images" / "grey.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "images" / "noise.png")
    (tmp_path / "images" / "damaged.png").write_bytes((tmp_path / "images" / "noise.png").read_bytes()[:900])
    train_sentencepiece(tmp_path / "tokenizer")
    return tmp_path


def run(folder: Path, records: list[Any], *flags: str) -> int:
    (folder / "data.json").write_text(json.dumps(records))
    paths = ["--data-path", str(folder / "data.json"), "--image-folder", str(folder / "images")]
    return main(["data", "check", *paths, "--workers", "1", *flags])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_good_data_set(folder: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    flags = ["--tokenizer", str(folder / "tokenizer"), "--num-image-tokens", "9", "--workers", workers]
    assert run(folder, GOOD, *flags, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["bad"], report["problems"], report["counts"]) == (4, 0, [], {})
    assert (report["images"], report["image_modes"]) == (2, {"L": 1, "RGB": 1})
    assert (report["text_only"], report["multi_image"], report["turns"], report["duplicate_ids"]) == (1, 1, 4, 1)
    assert report["tokens"]["truncated"] == 0
    assert report["tokens"]["max"] > report["tokens"]["mean"] > report["tokens"]["mean_supervised"] > 0
    assert run(folder, GOOD) == 0
    assert capsys.readouterr().out.strip().endswith("all records are good")


@pytest.mark.parametrize("workers", ["1", "3"])
def test_every_problem_is_found(folder: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    flags = ["--tokenizer", str(folder / "tokenizer"), "--model-max-length", "300", "--num-image-tokens", "9"]
    assert run(folder, GOOD + BAD, *flags, "--workers", workers, "--json") == 2
    report = json.loads(capsys.readouterr().out)
    assert [(problem["index"], problem["id"], problem["kind"]) for problem in report["problems"]] == [
        (4, "roles", "structure"),
        (5, "count", "conversation"),
        (6, "absent", "image"),
        (7, "damaged", "image"),
        (8, "outside", "image"),
        (9, "mute", "length"),
        (10, "long", "length"),
        (11, "", "structure"),
    ]
    assert report["counts"] == {"structure": 2, "conversation": 1, "length": 2, "image": 3}
    assert report["bad"] == 8
    for problem in report["problems"]:
        assert f"data.json: record {problem['index']}" in problem["message"]


def test_the_table_names_records_and_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, GOOD + BAD, "--show", "2") == 2
    out = capsys.readouterr().out
    assert "record 4 (id 'roles')" in out
    assert "record 6" not in out
    assert "and 5 more" in out
    assert out.strip().endswith("7 of 12 records cannot be trained on")


def test_one_bad_picture_is_reported_for_each_of_its_records(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, [BAD[3], GOOD[0], {**BAD[3], "id": "again"}], "--json") == 2
    assert [problem["id"] for problem in json.loads(capsys.readouterr().out)["problems"]] == ["damaged", "again"]


def test_without_decoding_a_damaged_picture_passes(folder: Path) -> None:
    assert run(folder, [BAD[3]], "--no-decode") == 0
    assert run(folder, [BAD[2]], "--no-decode") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-folder", "/nowhere"], "no image folder /nowhere"),
        (["--template", "v7"], "unknown conversation template 'v7'"),
        (["--workers", "0"], "workers must be positive"),
        (["--data-path", "/nowhere.json"], "no data file /nowhere.json"),
        (["--tokenizer", "/nowhere"], "no tokenizer folder /nowhere"),
    ],
)
def test_wrong_flags(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert run(folder, GOOD, *flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_images_need_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data.json").write_text(json.dumps(GOOD))
    assert main(["data", "check", "--data-path", str(folder / "data.json")]) == 2
    assert "--image-folder" in capsys.readouterr().err


# --- tokenize ---------------------------------------------------------------------------------------------------------


def tokenize(folder: Path, records: list[Any], *flags: str) -> int:
    (folder / "data.json").write_text(json.dumps(records))
    return main(["tokenize", "--tokenizer", str(folder / "tokenizer"), "--records", str(folder / "data.json"), *flags])


def test_json_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenize(folder, GOOD + BAD, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(GOOD + BAD)
    assert set(rows[0]) == {"id", "input_ids", "labels", "error", "warning"}
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert rows[0]["input_ids"].count(-200) == 1
    assert decode_spans(tokenizer, rows[0]["labels"]) == [" A kite.</s>"]
    assert decode_spans(tokenizer, rows[2]["labels"]) == [" Hi.</s>", " Yes.</s>"]
    assert (rows[0]["error"], rows[0]["warning"]) == (None, None)
    assert rows[4]["input_ids"] is None
    assert "from 'user'" in rows[4]["error"]
    assert rows[5]["input_ids"]
    assert "0 <image> placeholders for 1 image" in rows[5]["warning"]
    assert "nothing is supervised" in rows[9]["warning"]


def test_golden_rows_through_the_command(conformance: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from data_helpers import jsonl

    rows = [row for row in jsonl(conformance / "llava" / "tokenization.jsonl") if row.get("record")]
    for template in sorted({row["template"] for row in rows} - {"some_unknown_name"}):
        chosen = [row for row in rows if row["template"] == template]
        (tmp_path / "rows.json").write_text(json.dumps([row["record"] for row in chosen]))
        model = str(conformance / "llava" / "llama_tokenizer.model")
        flags = ["--tokenizer", model, "--template", template, "--records", str(tmp_path / "rows.json"), "--json"]
        assert main(["tokenize", *flags]) == 0
        for row, line in zip(chosen, capsys.readouterr().out.splitlines(), strict=True):
            ours = json.loads(line)
            if row["error"] or row["id"] == "gpt-only":
                assert ours["error"]
                continue
            assert ours["input_ids"][: len(row["input_ids"])] == row["input_ids"], row["id"]
            if not row["mismatch"] and row["id"] != "long-image-mismatch-hidden":
                assert ours["labels"][: len(row["labels"])] == row["labels"], row["id"]


def test_text_marks_what_is_learnt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenize(folder, [GOOD[0], BAD[0]]) == 0
    plain = capsys.readouterr().out
    assert "USER: <image>" in plain
    assert "ASSISTANT:⟦ A kite.</s>⟧" in plain
    assert "error: " in plain
    assert tokenize(folder, [GOOD[0]], "--color", "always") == 0
    assert "ASSISTANT:\033[1;32m A kite.</s>\033[0m" in capsys.readouterr().out


def test_generation_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = {"id": "q", "image": "a.png", "conversations": turns("<image>\nWhat?")}
    assert tokenize(folder, [raw], "--generate", "--json") == 0
    row = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert tokenizer.decode(row["input_ids"][-4:]).endswith(":")
    assert set(row["labels"]) == {-100}


def test_another_tokenizer_with_its_chat_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_level_tokenizer().save_pretrained(folder / "bytes")
    assert tokenize(folder, GOOD, "--tokenizer", str(folder / "bytes"), "--template", "chat_template") == 0
    assert "assistant\n⟦A kite.<|im_end|>⟧" in capsys.readouterr().out
