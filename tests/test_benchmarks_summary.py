"""The summary of all benchmarks' targets."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def summary():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import summary

        yield summary
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("summary", "common"):
            sys.modules.pop(name, None)


def write(folder, stem, device, targets, **more):
    record = {"benchmark": stem.split("-")[0], "device": {"description": device}, "targets": targets, **more}
    (folder / f"{stem}.json").write_text(json.dumps(record))


def goal(name, value, wanted, at_least=True):
    return {"name": name, "value": value, "target": wanted, "at_least": at_least}


def test_it_tells_what_is_met_missed_and_unmeasured(summary, tmp_path):
    cpu = [goal("ratio", 1.5, 1.3), goal("memory", 80, 75, False), goal("share", None, 0.5), goal("later", None, 2)]
    write(tmp_path, "tower-tiny-cpu", "a CPU", cpu, commit="abc+")
    write(tmp_path, "tower-vicuna-7b-cuda", "a GPU", [goal("ratio", 1.9, 2.0), goal("share", 0.5, 0.5)], commit="def")
    write(tmp_path, "old-tiny-cpu", "a CPU", [])
    assert summary.main(["--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())
    found = [(row["name"], row["device"], row["state"]) for row in rows]
    assert found == [
        ("ratio", "a CPU", "met"),
        ("memory", "a CPU", "missed"),
        ("share", "a GPU", "met"),
        ("later", "a CPU", "unmeasured"),
        ("ratio", "a GPU", "missed"),
    ]
    page = (tmp_path / "SUMMARY.md").read_text()
    assert "2 met, 2 missed, 1 that need" in page
    assert "| tower | memory | ≤ 75 | 80 | **missed** | [a CPU](tower-tiny-cpu.md) | abc+ |" in page
    assert "| tower | later | ≥ 2 |  | unmeasured: `bash benchmarks/run.sh gpu` |  | abc+ |" in page
    assert summary.main(["--output", str(tmp_path)]) == 0  # its own file is no result


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "x"}', '{"benchmark": "x", "device": 3}'])
def test_a_file_that_is_no_result_is_named(summary, tmp_path, capsys, text):
    (tmp_path / "x-tiny-cpu.json").write_text(text)
    assert summary.main(["--output", str(tmp_path)]) == 2
    assert "x-tiny-cpu.json is not a benchmark's result" in capsys.readouterr().err


def test_no_result_and_a_strange_target_are_errors(summary, tmp_path, capsys):
    assert summary.main(["--output", str(tmp_path)]) == 2
    assert "no result" in capsys.readouterr().err
    write(tmp_path, "x-tiny-cpu", "a CPU", [{"name": "a", "value": 1}])
    assert summary.main(["--output", str(tmp_path)]) == 2
    assert "['name', 'value']" in capsys.readouterr().err
