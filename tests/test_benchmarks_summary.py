"""The summary of all benchmarks' targets."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LOOP = "images/s of ToVE tower, compiled over the loop's"
CEILING = "share of the matrix-product ceiling, GPU"
RECIPE = "samples/s over the original recipe's, tiny, LLaVA-1.5's mix"


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


def write(folder, benchmark, preset, device, targets, **more):
    record = {
        "benchmark": benchmark,
        "preset": preset,
        "device": {"type": device, "description": {"cpu": "a CPU", "cuda": "a GPU"}[device]},
        "targets": targets,
        "versions": {"torch": "9.9", "kornia": "none"},
        **more,
    }
    (folder / f"{benchmark}-{preset}-{device}.json").write_text(json.dumps(record))


def goal(name, value, wanted, at_least=True):
    return {"name": name, "value": value, "target": wanted, "at_least": at_least}


def run(summary, folder):
    assert summary.main(["--output", str(folder)]) == 0
    rows = json.loads((folder / "summary.json").read_text())
    states = {}
    for row in rows:
        states.setdefault(row["target"]["key"], []).append((row["state"], row["value"], row["file"]))
    return states, (folder / "SUMMARY.md").read_text()


def test_it_tells_what_is_met_missed_and_unmeasured(summary, tmp_path):
    cpu = [goal(LOOP, 1.5, 1.3), goal(CEILING, None, 0.55)]
    write(tmp_path, "tower", "tiny", "cpu", cpu, commit="abc+")
    gpu = [goal(LOOP, 1.9, 2.0), goal(CEILING, 0.55, 0.55)]
    write(tmp_path, "tower", "vicuna-7b", "cuda", gpu, commit="def")
    write(tmp_path, "serve_load", "tiny", "cpu", [])
    states, page = run(summary, tmp_path)
    assert states["tower-loop-cpu"] == [("met", 1.5, "tower-tiny-cpu.md")]
    assert states["tower-loop-gpu"] == [("missed", 1.9, "tower-vicuna-7b-cuda.md")]
    assert states["tower-ceiling"] == [("met", 0.55, "tower-vicuna-7b-cuda.md")]
    everything = {target.key for target in summary.load_targets()}
    assert set(states) == everything
    untold = everything - {"tower-loop-cpu", "tower-loop-gpu", "tower-ceiling"}
    assert all(states[key] == [("unmeasured", None, None)] for key in untold)
    assert f"2 met, 1 missed, {len(untold)} unmeasured" in page
    assert f"| ≥ 1.3 | 1.5 | met | [a CPU](tower-tiny-cpu.md) | `{'python benchmarks/tower.py --device cpu'}` |" in page
    assert "| ≥ 2 | 1.9 | **missed** | [a GPU](tower-vicuna-7b-cuda.md) |" in page
    assert "| [`tower-tiny-cpu.md`](tower-tiny-cpu.md) | a CPU |  | abc+ | torch 9.9 |" in page
    assert run(summary, tmp_path)[0] == states, "its own file is no result"


def test_at_most_is_the_other_way_round(summary, tmp_path):
    started = [
        goal("seconds of import tove_llava in a fresh process", 0.31, 0.3, at_least=False),
        goal("seconds of tove-llava --help", 0.5, 0.5, at_least=False),
    ]
    write(tmp_path, "startup", "tiny", "cpu", started)
    states, page = run(summary, tmp_path)
    assert [states[key][0][:2] for key in ("import", "help")] == [("missed", 0.31), ("met", 0.5)]
    assert "| ≤ 0.3 | 0.31 | **missed** |" in page


def test_what_another_device_says_of_a_gpus_target_is_not_the_target(summary, tmp_path):
    write(tmp_path, "train_step", "tiny", "cpu", [goal(RECIPE, 2.5, 2.0)])
    write(tmp_path, "tower", "tiny", "cuda", [goal(LOOP, 2.5, 2.0)])
    states, page = run(summary, tmp_path)
    assert states["step-original"] == [("unmeasured", None, None), ("elsewhere", 2.5, "train_step-tiny-cpu.md")]
    assert states["tower-loop-gpu"][0][0] == "unmeasured" and states["tower-loop-gpu"][1][0] == "elsewhere"
    command = "python benchmarks/train_step.py --device cuda --preset vicuna-7b"
    assert f"| ≥ 2 |  | unmeasured | needs a GPU | `{command}` |" in page
    assert f"| {RECIPE} | 2.5 | `tiny` | [a CPU](train_step-tiny-cpu.md) |" in page.partition("same quantities")[2]
    assert "0 met, 0 missed" in page


def test_one_target_may_be_measured_several_times(summary, tmp_path):
    ranks = [goal("2 ranks over 1, pretrain zero2", 1.9, 1.8), goal("2 ranks over 1, pretrain zero3", 1.7, 1.8)]
    write(tmp_path, "scaling", "tiny", "cpu", ranks)
    states, page = run(summary, tmp_path)
    assert [state for state, *_ in states["scaling"]] == ["met", "missed"]
    assert "(2 ranks over 1, pretrain zero3)" in page


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "\udcff",
        '{"benchmark": "x"}',
        '{"benchmark": "x", "preset": "tiny", "device": 3}',
        '{"benchmark": "x", "preset": "tiny", "device": {"type": "cpu", "description": "d"}, "targets": [3]}',
    ],
)
def test_a_file_that_is_no_result_is_named(summary, tmp_path, capsys, text):
    (tmp_path / "x-tiny-cpu.json").write_bytes(text.encode(errors="surrogateescape"))
    assert summary.main(["--output", str(tmp_path)]) == 2
    assert "x-tiny-cpu.json is not a benchmark's result" in capsys.readouterr().err
    assert not (tmp_path / "SUMMARY.md").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a", "value": 1}, "'at_least'"),
        (goal(LOOP, "fast", 1.3), "'fast'"),
        (goal(3, 1.0, 1.3), "not so"),
        (goal("a new one", 1.0, 1.3), "targets.yaml lists no target of tower named 'a new one'"),
        (goal(LOOP, 1.5, 1.2), "is ≥ 1.2 there and ≥ 1.3 in targets.yaml"),
        (goal(LOOP, 1.5, 1.3, at_least=False), "is ≤ 1.3 there and ≥ 1.3 in targets.yaml"),
    ],
)
def test_targets_that_are_not_as_listed_are_errors(summary, tmp_path, capsys, entry, message):
    write(tmp_path, "tower", "tiny", "cpu", [entry])
    assert summary.main(["--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "tower-tiny-cpu.json" in error


def test_an_empty_folder_is_told(summary, tmp_path, capsys):
    assert summary.main(["--output", str(tmp_path)]) == 2
    assert "no results" in capsys.readouterr().err


def test_the_list_has_one_limit_and_a_pattern_each(summary, tmp_path):
    targets = summary.load_targets()
    for target in targets:
        re.compile(target.named)
        one, whole = f"python benchmarks/{target.benchmark}.py", "bash benchmarks/run.sh "
        assert target.command.startswith(whole if target.benchmark == "run" else one)
        assert (target.device == "cuda") == ("--device cuda" in target.command or target.command.endswith("gpu"))
    odd = tmp_path / "targets.yaml"
    for entry in ("at_least: 1, at_most: 2", "atleast: 1", ""):
        keys = "what: a, than: b, benchmark: c, named: d, command: e, device: any"
        odd.write_text(f"x: {{{keys}{', ' if entry else ''}{entry}}}")
        with pytest.raises(summary.ConfigError):
            summary.load_targets(odd)


def test_it_says_what_was_tried_and_why_it_was_not_measured(summary, tmp_path):
    entry = {**goal(CEILING, None, 0.55), "reason": "CUDA out of memory"}
    lost = {"the loop": "CUDA out of memory"}
    write(tmp_path, "tower", "vicuna-7b", "cuda", [entry], not_measured=lost, seconds=71.2)
    states, page = run(summary, tmp_path)
    assert states["tower-ceiling"] == [("unmeasured", None, "tower-vicuna-7b-cuda.md")]
    assert "| unmeasured | CUDA out of memory ([a GPU](tower-vicuna-7b-cuda.md)) |" in page
    assert "| [`tower-vicuna-7b-cuda.md`](tower-vicuna-7b-cuda.md) | the loop | CUDA out of memory |" in page
    assert "| a GPU | 71 | unknown |" in page
    write(tmp_path, "tower", "tiny", "cpu", [{**goal(CEILING, None, 0.55), "reason": "said on a CPU"}])
    assert run(summary, tmp_path)[0]["tower-ceiling"] == states["tower-ceiling"]


@pytest.mark.parametrize("entry", [{"reason": 3}, {"why": "x"}])
def test_a_reason_is_text(summary, tmp_path, entry):
    write(tmp_path, "tower", "tiny", "cpu", [{**goal(CEILING, None, 0.55), **entry}])
    assert summary.main(["--output", str(tmp_path)]) == 2


def test_a_whole_run_is_a_row_with_its_minutes_and_failures(summary, tmp_path):
    flags = ["--output", str(tmp_path), "--run", "cpu", "--seconds", "558", "--codes", "tower=0", "scaling=1", "x=137"]
    assert summary.main(flags) == 0
    rows = {row["target"]["key"]: row for row in json.loads((tmp_path / "summary.json").read_text())}
    assert (rows["run-cpu"]["state"], rows["run-cpu"]["value"]) == ("missed", 9.3)
    assert rows["run-gpu"]["state"] == "unmeasured"
    record = json.loads((tmp_path / "run-tiny-cpu.json").read_text())
    assert record["not_measured"].keys() == {"scaling.py", "x.py"}
    page = (tmp_path / "SUMMARY.md").read_text()
    assert "| scaling.py | exit code 1: some parts were not measured |" in page
    assert summary.main(["--output", str(tmp_path), "--run", "cpu", "--codes", "tower"]) == 2


def test_the_run_goes_on_after_a_failure_and_ends_with_its_code(tmp_path):
    """The script itself, with a Python that fails on one benchmark and on another later."""
    fake, said = tmp_path / "bin" / "python3", tmp_path / "said"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\necho "$@" >> ' + str(said) + "\ncase $1 in *train_step*) exit 3;; *scaling*) exit 1;; esac\n"
    )
    fake.chmod(0o755)
    root = tmp_path / "root"
    (root / "benchmarks").mkdir(parents=True)
    (root / "benchmarks" / "run.sh").write_text((BENCHMARKS / "run.sh").read_text())
    env = {"PATH": f"{fake.parent}:/usr/bin:/bin", "OUTPUT": "out"}
    for kind, count in (("cpu", 10), ("gpu", 3)):
        said.unlink(missing_ok=True)
        done = subprocess.run(["bash", root / "benchmarks" / "run.sh", kind], env=env, capture_output=True, text=True)
        lines = said.read_text().splitlines()
        assert done.returncode == 3 and len(lines) == count + 1 and "done" in done.stdout
        assert lines[-1].startswith(f"benchmarks/summary.py --output out --run {kind} --seconds ")
        assert "tower=0" in lines[-1] and "train_step=3" in lines[-1] and ("scaling=1" in lines[-1]) == (kind == "cpu")
    assert subprocess.run(["bash", root / "benchmarks" / "run.sh"], env=env, capture_output=True).returncode == 2


def test_the_limits_of_the_gpus_run_are_below_nine_minutes(summary):
    script = (BENCHMARKS / "run.sh").read_text().partition("gpu)")[2]
    commands = script.count("    bench ")
    limits = [int(number) for number in re.findall(r"--limit (\d+)", script)]
    assert commands == len(limits) == 3 and sum(limits) <= 60 * summary.MINUTES - 30


def test_a_row_without_a_limit_is_reported(summary, tmp_path):
    name = "samples/s with cached features over without, pretrain"
    write(tmp_path, "cached_features", "tiny", "cpu", [goal(name, 1.5, None, at_least=False)])
    states, page = run(summary, tmp_path)
    assert states["cached-features"] == [("reported", 1.5, "cached_features-tiny-cpu.md")]
    assert f"({name}) | the same without | none | 1.5 | reported |" in page and "0 met, 0 missed" in page
    write(tmp_path, "cached_features", "tiny", "cpu", [goal(name, 1.5, 1.0)])
    assert summary.main(["--output", str(tmp_path)]) == 2
