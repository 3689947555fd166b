"""Run ``tove-llava score`` inside the tests, and compare with expected numbers."""

import json
from pathlib import Path

from tove_llava import cli

SAMPLES = Path(__file__).parent / "data" / "eval"


def score(capsys, benchmark, predictions, truth, *flags):
    """Return the JSON object that the command prints."""
    files = ["--predictions", str(predictions), "--ground-truth", str(truth)]
    code = cli.main(["score", "--benchmark", benchmark, *files, "--json", "--per-item", *flags])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def refuse(capsys, benchmark, predictions, truth, *flags):
    """Return the message with which the command fails."""
    files = ["--predictions", str(predictions), "--ground-truth", str(truth)]
    assert cli.main(["score", "--benchmark", benchmark, *files, *flags]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


def write_rows(file, rows):
    """Write JSONL; rows may be lines already."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def read_rows(file):
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def sample(name):
    """Return a benchmark's sample: answers, ground truth and expected numbers."""
    folder = SAMPLES / name
    expected = json.loads((folder / "expected.json").read_text())
    return folder / "predictions.jsonl", truth_file(folder), expected


def truth_file(folder):
    names = ("ground_truth.jsonl", "ground_truth.json", "questions.jsonl", "ground_truth.csv")
    return next(folder / name for name in names if (folder / name).exists())


def differences(got, expected, tolerance, place=""):
    """List entries of ``expected`` that ``got`` lacks or contradicts.

    Only numbers may differ, by ``tolerance``.
    """
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            return [(place, got, expected)]
        return [
            difference
            for key, value in expected.items()
            for difference in differences(got.get(key, "missing"), value, tolerance, f"{place}/{key}")
        ]
    if isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            return [(place, got, expected)]
        pairs = enumerate(zip(got, expected, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, tolerance, f"{place}[{i}]")]
    number = isinstance(expected, int | float) and not isinstance(expected, bool)
    if number and isinstance(got, int | float) and not isinstance(got, bool):
        return [] if abs(got - expected) <= tolerance else [(place, got, expected)]
    return [] if got == expected and type(got) is type(expected) else [(place, got, expected)]
