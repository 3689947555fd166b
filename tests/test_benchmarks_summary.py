"""The summary of all benchmarks' targets, and the script that runs them."""

import json
import re
import subprocess
import tarfile

import pytest
import summary
from benchmark_parts import BENCHMARKS

LOOP = "images/s of ToVE tower, compiled over the loop's"
CEILING = "share of the matrix-product ceiling, GPU"
RECIPE = "samples/s over the original recipe's, tiny, LLaVA-1.5's mix"
CACHED = "samples/s with cached features over without, pretrain"


def write(folder, benchmark, preset, device, *targets, **more):
    described = {"type": device, "description": {"cpu": "a CPU", "cuda": "a GPU"}[device]}
    record = {"benchmark": benchmark, "preset": preset, "device": described, "targets": targets, **more}
    record["versions"] = {"torch": "9.9", "kornia": "none"}
    (folder / f"{benchmark}-{preset}-{device}.json").write_text(json.dumps(record))


def goal(name, value, wanted, at_least=True, **more):
    return {"name": name, "value": value, "target": wanted, "at_least": at_least, **more}


def run(folder, *flags):
    """Return the states by target, and the page."""
    assert summary.main(["--output", str(folder), *flags]) == 0
    states = {}
    for row in json.loads((folder / "summary.json").read_text()):
        states.setdefault(row["target"]["key"], []).append((row["state"], row["value"], row["file"]))
    return states, (folder / "SUMMARY.md").read_text()


def refused(folder, *flags):
    return summary.main(["--output", str(folder), *flags]) == 2 and not (folder / "SUMMARY.md").exists()


def test_targets_are_met_missed_or_unmeasured(tmp_path):
    write(tmp_path, "tower", "tiny", "cpu", goal(LOOP, 1.5, 1.3), goal(CEILING, None, 0.55), commit="abc+")
    write(tmp_path, "tower", "vicuna-7b", "cuda", goal(LOOP, 1.9, 2.0), goal(CEILING, 0.55, 0.55), commit="def")
    started = goal("seconds of import tove_llava in a fresh process", 0.31, 0.3, at_least=False)
    write(tmp_path, "startup", "tiny", "cpu", started, goal("seconds of tove-llava --help", 0.5, 0.5, at_least=False))
    ranks = [goal(f"2 ranks over 1, pretrain {name}", value, 1.8) for name, value in (("zero2", 1.9), ("zero3", 1.7))]
    write(tmp_path, "scaling", "tiny", "cpu", *ranks)
    write(tmp_path, "cached_features", "tiny", "cpu", goal(CACHED, 1.5, None, at_least=False))
    write(tmp_path, "serve_load", "tiny", "cpu")
    states, page = run(tmp_path)
    found = {
        "tower-loop-cpu": [("met", 1.5, "tower-tiny-cpu.md")],
        "tower-loop-gpu": [("missed", 1.9, "tower-vicuna-7b-cuda.md")],
        "tower-ceiling": [("met", 0.55, "tower-vicuna-7b-cuda.md")],
        "import": [("missed", 0.31, "startup-tiny-cpu.md")],
        "help": [("met", 0.5, "startup-tiny-cpu.md")],
        "scaling": [("met", 1.9, "scaling-tiny-cpu.md"), ("missed", 1.7, "scaling-tiny-cpu.md")],
        "cached-features": [("reported", 1.5, "cached_features-tiny-cpu.md")],
    }
    rest = {target.key for target in summary.load_targets()} - found.keys()
    assert states == {**found, **dict.fromkeys(rest, [("unmeasured", None, None)])}
    assert f"4 met, 3 missed, {len(rest)} unmeasured" in page
    for row in (
        "| ≥ 1.3 | 1.5 | met | [a CPU](tower-tiny-cpu.md) | `python benchmarks/tower.py --device cpu` |",
        "| ≥ 2 | 1.9 | **missed** | [a GPU](tower-vicuna-7b-cuda.md) |",
        "| ≤ 0.3 | 0.31 | **missed** |",
        "(2 ranks over 1, pretrain zero3)",
        f"({CACHED}) | the same without | none | 1.5 | reported |",
        "| [`tower-tiny-cpu.md`](tower-tiny-cpu.md) | a CPU |  | abc+ | torch 9.9 |",
    ):
        assert row in page
    assert run(tmp_path)[0] == states, "its own file is no result"


def test_another_device_does_not_measure_a_gpus_target(tmp_path):
    write(tmp_path, "train_step", "tiny", "cpu", goal(RECIPE, 2.5, 2.0))
    write(tmp_path, "tower", "tiny", "cuda", goal(LOOP, 2.5, 2.0))
    states, page = run(tmp_path)
    assert states["step-original"] == [("unmeasured", None, None), ("elsewhere", 2.5, "train_step-tiny-cpu.md")]
    assert [state for state, *_ in states["tower-loop-gpu"]] == ["unmeasured", "elsewhere"]
    command = "python benchmarks/train_step.py --device cuda --preset vicuna-7b"
    assert f"| ≥ 2 |  | unmeasured | needs a GPU | `{command}` |" in page and "0 met, 0 missed" in page
    assert f"| {RECIPE} | 2.5 | `tiny` | [a CPU](train_step-tiny-cpu.md) |" in page.partition("same quantities")[2]


def test_a_target_that_could_not_be_measured_says_why(tmp_path):
    lost = {"not_measured": {"the loop": "CUDA out of memory"}, "seconds": 71.2}
    write(tmp_path, "tower", "vicuna-7b", "cuda", goal(CEILING, None, 0.55, reason="CUDA out of memory"), **lost)
    write(tmp_path, "tower", "tiny", "cpu", goal(CEILING, None, 0.55, reason="said on a CPU"))
    states, page = run(tmp_path)
    assert states["tower-ceiling"] == [("unmeasured", None, "tower-vicuna-7b-cuda.md")]
    assert "| unmeasured | CUDA out of memory ([a GPU](tower-vicuna-7b-cuda.md)) |" in page
    assert "| [`tower-vicuna-7b-cuda.md`](tower-vicuna-7b-cuda.md) | the loop | CUDA out of memory |" in page
    assert "| a GPU | 71 | unknown |" in page


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "\udcff", '{"benchmark": "x"}', '{"benchmark": "x", "preset": "tiny", "device": 3}',
     '{"benchmark": "x", "preset": "tiny", "device": {"type": "cpu", "description": "d"}, "targets": [3]}'],
)  # fmt: skip
def test_a_file_that_is_no_result_is_named(tmp_path, capsys, text):
    (tmp_path / "x-tiny-cpu.json").write_bytes(text.encode(errors="surrogateescape"))
    assert refused(tmp_path) and "x-tiny-cpu.json is not a benchmark's result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a", "value": 1}, "'at_least'"),
        (goal(LOOP, "fast", 1.3), "'fast'"),
        (goal(3, 1.0, 1.3), "not so"),
        (goal("a new one", 1.0, 1.3), "targets.yaml lists no target of tower named 'a new one'"),
        (goal(LOOP, 1.5, 1.2), "is ≥ 1.2 there and ≥ 1.3 in targets.yaml"),
        (goal(LOOP, 1.5, 1.3, at_least=False), "is ≤ 1.3 there and ≥ 1.3 in targets.yaml"),
        (goal(CEILING, None, 0.55, reason=3), "tower-tiny-cpu.json"),
        (goal(CEILING, None, 0.55, why="x"), "tower-tiny-cpu.json"),
    ],
)
def test_targets_that_are_not_as_listed_are_errors(tmp_path, capsys, entry, message):
    assert refused(tmp_path) and "no results" in capsys.readouterr().err
    write(tmp_path, "tower", "tiny", "cpu", entry)
    assert refused(tmp_path)
    error = capsys.readouterr().err
    assert message in error and "tower-tiny-cpu.json" in error


def test_each_listed_target_has_one_limit_a_pattern_and_a_command(tmp_path):
    for target in summary.load_targets():
        re.compile(target.named)
        one, whole = f"python benchmarks/{target.benchmark}.py", "bash benchmarks/run.sh "
        assert target.command.startswith(whole if target.benchmark == "run" else one)
        assert (target.device == "cuda") == ("--device cuda" in target.command or target.command.endswith("gpu"))
    for entry in (", at_least: 1, at_most: 2", ", atleast: 1", ""):
        keys = "what: a, than: b, benchmark: c, named: d, command: e, device: any"
        (tmp_path / "targets.yaml").write_text(f"x: {{{keys}{entry}}}")
        with pytest.raises(summary.ConfigError):
            summary.load_targets(tmp_path / "targets.yaml")


def test_a_whole_run_is_a_row_with_its_minutes_and_failures(tmp_path):
    assert refused(tmp_path, "--run", "cpu", "--codes", "tower")
    states, page = run(tmp_path, "--run", "cpu", "--seconds", "558", "--codes", "tower=0", "scaling=1", "x=137")
    assert states["run-cpu"][0][:2] == ("missed", 9.3) and states["run-gpu"][0][0] == "unmeasured"
    record = json.loads((tmp_path / "run-tiny-cpu.json").read_text())
    assert record["not_measured"].keys() == {"scaling.py", "x.py"}
    assert "| scaling.py | exit code 1: some parts were not measured |" in page


def fake_python(folder, fails):
    """Write a python3 that says its arguments and fails on some."""
    fake, said = folder / "bin" / "python3", folder / "said"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {said}\ncase "$*" in {fails} esac\n')
    fake.chmod(0o755)
    scripts = folder / "root" / "benchmarks"
    scripts.mkdir(parents=True)
    for name in ("run.sh", "gpu.sh"):
        (scripts / name).write_text((BENCHMARKS / name).read_text())
    (scripts / "gpu_smoke.sh").write_text("exit 0\n")
    return scripts, said, {"PATH": f"{fake.parent}:/usr/bin:/bin", "OUTPUT": "out"}


def test_the_script_goes_on_after_a_failure_and_ends_with_its_code(tmp_path):
    scripts, said, env = fake_python(tmp_path, "*train_step*) exit 3;; *scaling*) exit 1;;")
    done = subprocess.run(["bash", scripts / "run.sh", "cpu"], env=env, capture_output=True, text=True)
    lines = said.read_text().splitlines()
    assert done.returncode == 3 and len(lines) == 11 and "done" in done.stdout
    assert lines[-1].startswith("benchmarks/summary.py --output out --run cpu --seconds ")
    assert "tower=0" in lines[-1] and "train_step=3" in lines[-1] and "scaling=1" in lines[-1]
    done = subprocess.run(["bash", scripts / "run.sh", "gpu"], env=env, capture_output=True, text=True)
    last = said.read_text().splitlines()[-1]
    assert done.returncode == 2 and "--run gpu --seconds" in last and last.endswith("--codes gpu-a=0 gpu-b=2")
    assert subprocess.run(["bash", scripts / "run.sh"], env=env, capture_output=True).returncode == 2


@pytest.mark.parametrize(("group", "parts"), [("a", ["tests", "tower", "tower-compiled"]), ("b", None)])
def test_a_gpus_parts_have_limits_and_are_packed_as_they_come(tmp_path, group, parts):
    scripts, said, env = fake_python(tmp_path, "*concurrent*) exit 1;; *qlora*) sleep 30;;")
    text = (scripts / "gpu.sh").read_text().replace("bench qlora 60", "bench qlora 1")  # hangs in the driver, say
    (scripts / "gpu.sh").write_text(text)
    done = subprocess.run(["bash", scripts / "gpu.sh", group], env=env, capture_output=True, text=True, timeout=60)
    rows = [line.split("\t") for line in (tmp_path / "root" / "out" / f"parts-{group}.tsv").read_text().splitlines()]
    names, codes = [row[0] for row in rows], [int(row[1]) for row in rows]
    assert done.returncode == 1 and names == (parts or ["step", "qlora", "answers-5", "answers-64", "smoke"])
    assert codes == ([0, 1, 0] if group == "a" else [0, 124, 0, 0, 0])
    with tarfile.open(tmp_path / "root" / "out" / f"gpu-{group}.tar.gz") as packed:
        assert {f"./{name}/log.txt" for name in names} <= set(packed.getnames())
    limits = re.findall(r"^    (?:bench|part) \S+ (\d+)", (BENCHMARKS / "gpu.sh").read_text(), re.MULTILINE)
    assert len(limits) == 8 and sum(map(int, limits[:3])) <= 480 and sum(map(int, limits[3:])) <= 480
