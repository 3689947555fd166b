"""The evaluation's benchmark at toy size, and what it promises about its numbers."""

import json
import sys
from pathlib import Path

import pytest
from test_benchmarks import REDUCED

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BRIEF = ["--device", "cpu", "--repeats", "2", "--batch", "4", "--questions", "6", "--single", "2", "--per-picture", "3"]


@pytest.fixture(scope="module")
def program():
    """The program, imported as Python imports a script's neighbours."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import eval_throughput

        yield eval_throughput
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("eval_throughput", "common"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def measured(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("throughput")
    assert program.main([*BRIEF, "--answer-tokens", "3", "--output", str(folder)]) == 0
    file = folder / "eval_throughput-tiny-cpu.json"
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


def test_every_case_is_measured_and_answers_are_the_same(measured):
    record, markdown = measured
    cases = record["cases"]
    assert [(case["questions_per_picture"], case["answer_tokens"]) for case in cases] == [(1, 3), (3, 3)]
    for case in cases:
        rows = case["contenders"]
        assert list(rows) == ["single", "runner", "whole"]
        for row in rows.values():
            assert row["same_answers"] == 1, "contenders that answer differently cannot be compared"
            assert row["questions_per_second"] == pytest.approx(1 / row["wall_seconds"]["median"])
            assert row["peak_bytes_above_weights"] > 0
        ratio = case["ratios"]["runner_over_single"]
        wall = [rows[name]["wall_seconds"] for name in ("single", "runner")]
        assert ratio["value"] == pytest.approx(wall[0]["median"] / wall[1]["median"])
        inside = sorted(a / b for a, b in zip(wall[0]["values"], wall[1]["values"], strict=True))
        assert inside[0] <= ratio["paired_q1"] <= ratio["paired_q3"] <= inside[-1]
        assert f"**{ratio['value']:.2f} times**" in markdown
    assert "3 questions about each picture" in markdown and str(BENCHMARKS.parent) not in json.dumps(record)


def test_answers_have_their_length_and_only_the_runner_shares(program, tmp_path, monkeypatch):
    """The time of one by one is that of a picture for each question and of every word of its answer."""
    calls = {"pictures": 0, "words": []}
    bench = program.Bench(_arguments(program))
    answerer = program.build_answerer(bench, "source")
    questions = program.write_data(tmp_path, 6, 3, (40, 30), seed=0)
    assert len({question.image for question in questions}) == 2 and all(
        question.image.is_file() for question in questions
    )
    encode, forward = answerer.model.model.get_image_features, answerer.model.forward

    def count(*args, **kwargs):
        calls["pictures"] += len(kwargs["pixel_values"])
        return encode(*args, **kwargs)

    monkeypatch.setattr(answerer.model.model, "get_image_features", count)
    one = program.OneByOne(answerer, questions, workers=0, tokens=4, out=tmp_path / "answers.jsonl")
    texts = one()
    assert calls["pictures"] == 6 and len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6
    calls["pictures"] = 0

    def lengths(*args, **kwargs):
        calls["words"].append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(answerer.model, "forward", lengths)
    assert program.runner(answerer, questions, tokens=4, batch=6, share=True)() == texts
    assert calls["pictures"] == 2
    assert [shape[1] for shape in calls["words"]].count(1) == 3, "three steps after the prompts' first words"


def _arguments(program):
    from common import argument_parser

    parser = argument_parser("")
    parser.set_defaults(batch=4, device="cpu")
    return parser.parse_args([])


def test_random_weights_where_the_sources_are_out_of_reach(program, tmp_path, capsys):
    preset = tmp_path / "reduced.yaml"
    preset.write_text(REDUCED)
    flags = [*BRIEF, "--preset", str(preset), "--answer-tokens", "3", "--output", str(tmp_path)]
    assert program.main(flags) == 2
    assert "vocabulary must have at least" in capsys.readouterr().err
    assert program.main([*flags, "--set", "language.config.vocab_size=1000"]) == 0
    record = json.loads((tmp_path / "eval_throughput-reduced-cpu.json").read_text())
    assert record["weights"] == "random" and record["settings"]["picture_size"] == [112, 84]


@pytest.mark.parametrize(
    ("flags", "message"), [(["--answer-tokens", "0"], "--answer-tokens"), (["--repeats", "0"], "--repeats")]
)
def test_bad_flags_are_told(program, tmp_path, capsys, flags, message):
    assert program.main([*BRIEF, "--output", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_case_that_fails_leaves_the_other(program, tmp_path, monkeypatch):
    case = program.case

    def second_fails(bench, answerer, questions, each, *rest):
        if each == 3:
            raise RuntimeError("out of memory")
        return case(bench, answerer, questions, each, *rest)

    monkeypatch.setattr(program, "case", second_fails)
    assert program.main([*BRIEF, "--answer-tokens", "2", "--output", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "eval_throughput-tiny-cpu.json").read_text())
    assert [row["questions_per_picture"] for row in record["cases"]] == [1]
    assert record["not_measured"] == {"answers of 2 tokens, 3 a picture": "RuntimeError: out of memory"}
    assert record["targets"][0]["value"] is None  # it is for the slowest case
    assert "| answers of 2 tokens, 3 a picture | RuntimeError" in (tmp_path / "eval_throughput-tiny-cpu.md").read_text()
