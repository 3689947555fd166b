"""The chat's load benchmark at toy size, and what it promises about its numbers."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BRIEF = ["--device", "cpu", "--repeats", "2", "--warmup", "0", "--clients", "5", "--batch", "3"]


@pytest.fixture
def program():
    """The program, imported as Python imports a script's neighbours."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import serve_load

        yield serve_load
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("serve_load", "eval_throughput", "common"):
            sys.modules.pop(name, None)


def test_both_ways_answer_alike_and_every_client_is_counted(program, tmp_path, capsys):
    assert program.main([*BRIEF, "--answer-tokens", "4", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "serve_load-tiny-cpu.json").read_text())
    rows = record["contenders"]
    assert list(rows) == ["together", "single"]
    for row in rows.values():
        assert row["same_answers"] == 1, "contenders that answer differently cannot be compared"
        assert row["questions_per_second"] == pytest.approx(5 / row["wall_seconds"]["median"])
        assert row["tokens_per_second"] == pytest.approx(4 * row["questions_per_second"])
        first, whole = row["first_token_seconds"], row["answer_seconds"]
        assert 0 < first["median"] <= first["p95"] and first["median"] <= whole["median"] <= whole["p95"]
        assert whole["p95"] <= max(row["wall_seconds"]["values"])
    wall = [rows[name]["wall_seconds"]["median"] for name in ("single", "together")]
    assert record["ratio"]["value"] == pytest.approx(wall[0] / wall[1])
    assert f"**{record['ratio']['value']:.2f} times**" in (tmp_path / "serve_load-tiny-cpu.md").read_text()


def test_wrong_numbers_are_explained(program, tmp_path, capsys):
    assert program.main([*BRIEF, "--answer-tokens", "0", "--output", str(tmp_path)]) == 2
    assert "--answer-tokens must be at least 1" in capsys.readouterr().err
