"""``tove-llava ablate``: a grid from one YAML file, killed and resumed."""

import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from threading import Timer
from unittest.mock import ANY

import pytest
import yaml
from test_plugins import FUSION, forgotten
from train_parts import write_parts

from tove_llava.ablation import job_pool, job_records
from tove_llava.ablation.ablation_plan import read_plan
from tove_llava.cli import main
from tove_llava.core.locks import hold
from tove_llava.presets import load_preset


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Small parts, and scenes to train and evaluate on."""
    folder = tmp_path_factory.mktemp("ablate")
    write_parts(folder)
    assert main(["scenes", "--out", str(folder / "scenes"), "--train", "8", "--val", "2"]) == 0
    return folder


def grid(root, file, **changes):
    """Write an ablation: two fusions, and an arm that shares its first stage with one of them."""
    scenes = root / "scenes"
    data = {
        "preset": str(root / "preset.yaml"),
        "image_folder": str(scenes / "images"),
        "flags": {"max_steps": 2, "image_aspect_ratio": "square", "dataloader_num_workers": 0},
        "stages": {
            "pretrain": {"data_path": str(scenes / "train_captions.json")},
            "finetune_lora": {"data_path": str(scenes / "train_instruct.json")},
        },
        "axes": {"vision.fusion": ["tove", "add"]},
        "arms": {"rank2": {"stages": {"finetune_lora": {"flags": {"lora_r": 2}}}}},
        "evaluate": {"benchmarks": ["scenes"], "data_root": str(scenes), "limit": 4},
        "feature_cache": "float32",
    }
    file.write_text(yaml.safe_dump({**data, **changes}, sort_keys=False))
    return file


def ablate(file, out, *more):
    return main(["ablate", str(file), "--out", str(out), "--jobs", "2", *more])


def listed(capsys, file, out, *more):
    """Map the jobs' titles to their state and command, from a dry run."""
    assert ablate(file, out, "--dry-run", *more) == 0
    lines = capsys.readouterr().out.splitlines()
    states = [line.partition(": ") for line in lines[::2]]
    return {title: (state, command) for (state, _, title), command in zip(states, lines[1::2], strict=True)}


def without_costs(out):
    """Return what results.json says of the models, without times and folders."""
    found = json.loads((out / "results.json").read_text().replace(str(out), ""))
    for run in (run for table in found for group in table["groups"] for run in group["runs"]):
        assert len(run.pop("jobs")) == len(run["stages"]) + (run["evaluation"] is not None)
    return found


@pytest.fixture(scope="module")
def whole(root):
    """An ablation that ran without interruption."""
    assert ablate(grid(root, root / "grid.yaml"), root / "whole") == 0
    return root / "whole"


def test_a_killed_ablation_ends_like_a_whole_one(root, whole, tmp_path, capsys):
    file = grid(root, tmp_path / "grid.yaml")
    killed = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=ablate, args=(file, killed))
    process.start()
    while len(done_jobs(killed)) < 3 and process.is_alive():
        time.sleep(0.02)
    jobs = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, jobs)):
        os.kill(pid, signal.SIGKILL)
    process.join()
    before = done_jobs(killed)
    assert 3 <= len(before) < 9 and not (killed / "results.json").exists()
    capsys.readouterr()
    assert ablate(file, killed) == 0
    printed = capsys.readouterr().out
    assert f"9 jobs, {len(before)} of them done before; 2 at a time" in printed
    after = done_jobs(killed)
    assert {name: after[name] for name in before} == before, "a finished job ran again"
    assert without_costs(killed) == without_costs(whole)


def test_results_of_a_whole_ablation(root, whole, capsys, monkeypatch):
    groups = without_costs(whole)[0]["groups"]
    assert [group["label"] for group in groups] == ["tove", "add", "rank2"]
    assert groups[2]["settings"] == {"vision.fusion": "tove", "settings.lora.r": 2}
    assert all(group["runs"][0]["scores"]["scenes"]["overall"][1] == 4 for group in groups)
    table = (whole / "table.md").read_text()
    assert table.startswith("| run | vision.fusion | settings.lora.r |") and "95 % interval" in table
    assert (whole / "results.csv").read_text().count("\n") == 4
    assert (whole / "plot.png").is_file()
    assert ablate(root / "grid.yaml", whole) == 0
    assert "9 jobs, 9 of them done before" in capsys.readouterr().out
    assert main(["runs", str(whole), "--stage", "finetune_lora"]) == 0
    assert f"{whole}/runs/rank2-seed0-finetune_lora-" in capsys.readouterr().out
    monkeypatch.setattr(job_records, "__version__", "0.0.0")
    assert ablate(root / "grid.yaml", whole) == 2
    error = capsys.readouterr().err
    assert f"{whole}/jobs/" in error and "version was" in error and "Give another --out" in error


def done_jobs(out):
    records = {file.name: json.loads(file.read_text()) for file in (out / "jobs").glob("*.json")}
    return {name: record for name, record in records.items() if record["state"] == "done"}


def test_axes_make_an_arm_of_each_combination(root, tmp_path):
    axes = {"vision.fusion": ["tove", "add"], "vision.experts": [["normal"], ["normal", "segmentation"]]}
    axes["vision.fusion_options"] = [{}, {"a/b": 1.0e-5}]
    plan = read_plan(grid(root, tmp_path / "grid.yaml", axes=axes, arms={"x": ["a=1"]}, set=["b=2"]), tmp_path)
    assert [arm.name for arm in plan.arms][-3:] == ["add,normal+segmentation,fusion_options=__", ANY, "x"]
    assert len(plan.arms) == 9 and list(plan.arms[-1].overrides) == ["b=2", "a=1"]
    preset = load_preset(plan.arms[7].preset, plan.arms[7].overrides[1:])
    assert [expert["name"] for expert in preset.vision.experts] == ["normal", "segmentation"]
    assert preset.vision.fusion_options == {"a/b": 1e-5}


def test_what_arms_share_is_one_job(root, tmp_path, capsys):
    arms = {"few": ["vision.experts=[normal]"], "rank2": {"stages": {"finetune_lora": {"flags": {"lora_r": 2}}}}}
    merge = {"merge": {"data_path": str(root / "scenes/train_instruct.json")}}
    file = grid(root, tmp_path / "grid.yaml", arms={**arms, "merged": {"stages": merge}}, seeds=[0, 1])
    jobs = listed(capsys, file, tmp_path / "out")
    features = [title for title in jobs if title.startswith("features")]
    assert features == ["features, square: clip, normal, segmentation"], "the one set that contains the others"
    assert len(jobs) == 1 + 2 * (2 * 3 + 2 + 3 + 2), "rank2 and merged begin with stages of the arm tove"
    tove, add, few = (folder_of(jobs[f"{name}, seed 0: finetune_lora"]) for name in ("tove", "add", "few"))
    assert f"--pretrained {tove} " in jobs["merged, seed 0: merge"][1] and len({tove, add, few}) == 3
    # One more arm, in front, or another seed changes nothing for the others.
    more = listed(capsys, file, tmp_path / "out", "--set", "axes={vision.fusion: [replace, tove, add]}")
    assert set(jobs) < set(more) and all(folder_of(more[title]) == folder_of(jobs[title]) for title in jobs)
    only = listed(capsys, file, tmp_path / "out", "--arms", "add", "--set", "seeds=[1]")
    assert [title for title in only if "seed" in title] == [
        f"add, seed 1: {name}" for name in ("pretrain", "finetune_lora", "evaluation")
    ]


def folder_of(job):
    return re.search(r" --(?:out|output|output_dir) (\S+)", job[1])[1]


def test_a_failed_job_stops_only_those_that_need_it(root, tmp_path, capsys):
    broken = root / "scenes" / "broken.json"
    records = json.loads((root / "scenes/train_captions.json").read_text())
    broken.write_text(json.dumps([{**record, "image": "nowhere.png"} for record in records]))
    arms = {"good": None, "bad": {"stages": {"pretrain": {"data_path": str(broken)}}}}
    only = {"pretrain": {"data_path": str(root / "scenes/train_captions.json")}}
    file = grid(root, tmp_path / "grid.yaml", arms=arms, axes={}, stages=only, feature_cache=None)
    assert ablate(file, tmp_path / "out") == 1
    printed = capsys.readouterr().out
    log = next((tmp_path / "out/jobs").glob("bad-*.log"))
    assert f"bad, seed 0: pretrain: exit code 2, see {log}" in printed and "nowhere.png" in log.read_text()
    assert "bad, seed 0: evaluation: not run, because it needs 'bad, seed 0: pretrain'" in printed
    assert [group["label"] for group in without_costs(tmp_path / "out")[0]["groups"]] == ["good"]
    broken.write_text(json.dumps(records))  # as many bytes or not: another key, or another try
    assert ablate(file, tmp_path / "out") == 0


SHOWN = 'import os, sys\nprint("GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"), file=sys.stderr)\n'


def test_a_job_on_gpus_has_them_and_plugins_and_waits_for_other_commands(root, tmp_path, capsys, monkeypatch):
    with forgotten():
        only = {"pretrain": {"data_path": str(root / "scenes/train_captions.json")}}
        (tmp_path / "mine.py").write_text(FUSION + SHOWN)
        changes = {"axes": {"vision.fusion": ["own_add"]}, "arms": {}, "stages": only, "feature_cache": None}
        changes["plugins"] = [str(tmp_path / "mine.py")]
        file = grid(root, tmp_path / "grid.yaml", **changes, evaluate=None)
        name = Path(folder_of(listed(capsys, file, tmp_path / "out")["own_add, seed 0: pretrain"])).name
        launched = listed(capsys, file, tmp_path / "out", "--set", "gpus=2")["own_add, seed 0: pretrain"]
        assert launched[1].startswith("  tove-llava launch pretrain --gpus 2 ") and name not in launched[1]
        (tmp_path / "out/jobs").mkdir(parents=True)
        lock = hold(tmp_path / f"out/jobs/{name}.lock")
        Timer(1, lock.close).start()
        monkeypatch.setattr(job_pool, "gpu_ids", lambda: ["5", "6"])
        assert ablate(file, tmp_path / "out") == 0
        assert "waiting for jobs that another process runs: own_add, seed 0: pretrain" in capsys.readouterr().out
        assert "GPUs 5\n" in (tmp_path / f"out/jobs/{name}.log").read_text()
        assert ablate(file, tmp_path / "out", "--set", "gpus=3") == 2
        assert "grid.yaml: gpus: 3 are needed, and there are 2" in capsys.readouterr().err
        (tmp_path / "mine.py").write_text(FUSION + "# changed")
    with forgotten():
        changed = folder_of(listed(capsys, file, tmp_path / "out")["own_add, seed 0: pretrain"])
        assert name not in changed, "another plugin is another run"


def test_sigterm_stops_the_jobs(root, tmp_path):
    only = {"pretrain": {"data_path": str(root / "scenes/train_captions.json"), "flags": {"max_steps": 100000}}}
    changes = {"axes": {}, "arms": {}, "stages": only, "feature_cache": None, "evaluate": None}
    file = grid(root, tmp_path / "grid.yaml", **changes)
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(stopped(file, tmp_path / "out")))
    process.start()
    while not list((tmp_path / "out/runs").glob("*/run.json")) and process.is_alive():
        time.sleep(0.05)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    lock = hold(next((tmp_path / "out/jobs").glob("*.lock")))
    assert lock is not None, "the job still runs"
    lock.close()


def stopped(file, out):
    try:
        return ablate(file, out)
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"sedes": [1]}, [], "grid.yaml: unknown key 'sedes'. Did you mean 'seeds'"),
        ({"seeds": "1"}, [], "grid.yaml: seeds: expected a list"),
        ({"stages": {}}, [], "grid.yaml: stages: at least one is needed"),
        ({"stages": {"pretrain": {"date_path": "x"}}}, [], "stages.pretrain: unknown key 'date_path'"),
        (
            {"stages": {"pretrain": {"data_path": "x.json"}}, "arms": {}},
            [],
            "stages.pretrain: --data_path x.json does not exist",
        ),
        ({"arms": {"a": {"sets": []}}}, [], "grid.yaml: arms.a: unknown key 'sets'"),
        ({"arms": {"a/b": []}}, [], "'a/b' is no name for a folder"),
        ({"arms": {"tove": []}}, [], "two arms are called 'tove'"),
        ({"arms": {"a": {"preset": "tyni"}}}, [], "grid.yaml: arms.a: stages.pretrain: unknown preset 'tyni'"),
        ({"arms": {"a": ["vision.fusoin=add"]}}, [], "grid.yaml: arms.a: stages.pretrain: preset"),
        ({"axes": {"vision.fusion": ["adn"]}}, [], "axes (vision.fusion=adn)"),
        ({"flags": {"max_step": 2}}, [], "unknown flag '--max_step'"),
        ({"feature_cache": "float8"}, [], "grid.yaml: unknown feature_cache 'float8'"),
        ({}, ["--arms", "tovee"], "grid.yaml: there is no arm 'tovee'. Did you mean 'tove'"),
        ({}, ["--set", "evaluate.benchmarks=[scened]"], "grid.yaml: evaluate: unknown benchmark 'scened'"),
        ({}, ["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_bad_files_are_refused_before_anything_runs(root, tmp_path, capsys, changes, more, message):
    file = grid(root, tmp_path / "grid.yaml", **changes)
    assert ablate(file, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert message in error and not (tmp_path / "out").exists(), error
