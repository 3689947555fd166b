"""``tove-llava runs``: tables of the folders that training wrote."""

import csv
import json
import math

import pytest
from scipy.stats import t

from tove_llava.ablation.seed_means import SeedMean
from tove_llava.cli import main
from tove_llava.core.locks import locked


def write_run(folder, stage="finetune_lora", seed=0, loss=1.0, score=None, finished=True, start=None, **settings):
    """Write what a run of 10 steps leaves, as far as the table reads it."""
    folder.mkdir(parents=True)
    experts = [{"name": name, "mode": "map"} for name in settings.pop("experts", ("depth", "edge"))]
    record = {"preset": "tiny", "stage": stage, "arguments.seed": seed, "vision.experts": experts, **settings}
    record |= {"pretrained": start and str(start), "pretrained_fingerprint": start and f"print of {start}"}
    (folder / "run.json").write_text(json.dumps(record))
    last = 10 if finished else 4
    logs = [{"step": 2, "lm_loss": 9.0}, {"step": last, "lm_loss": loss, "gate/depth": 0.25, "gate/entropy": 0.5}]
    place = folder if finished else folder / "checkpoint-4"
    place.mkdir(exist_ok=True)
    state = {"global_step": last, "max_steps": 10, "log_history": [*logs, {"step": last, "train_loss": 5.0}]}
    (place / "trainer_state.json").write_text(json.dumps(state))
    if finished:
        (folder / "tove_llava.json").write_text(json.dumps({"fingerprint": str(folder)}))
    if score is not None:
        write_result(folder / "eval", str(folder), score)
    return folder


def write_result(output, fingerprint, score, condition="full"):
    place = output / "scenes" / condition
    place.mkdir(parents=True)
    rows = {"shape": [1.0, 2], "overall": [score, 4]}
    result = {"benchmark": "scenes", "model": "m", "rows": rows, "data": {}, "count": 4, "fingerprint": fingerprint}
    (place / "result.json").write_text(json.dumps({**result, "condition": {"name": condition, "title": condition}}))
    (place / "run.json").write_text(json.dumps({"benchmark": "Scenes"}))


def table(capsys, *arguments):
    assert main(["runs", *map(str, arguments)]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    rows = [line.split("  ") for line in lines]
    return [word for word in header.split("  ") if word], [[cell.strip() for cell in row if cell] for row in rows]


def test_seeds_share_a_line_and_only_differing_settings_are_shown(tmp_path, capsys):
    for rate in (0.001, 1.0):
        for seed in (0, 1):
            start = write_run(
                tmp_path / f"{rate}/{seed}/pretrain", "pretrain", seed, **{"arguments.learning_rate": rate}
            )
            write_run(tmp_path / f"{rate}/{seed}/model", seed=seed, loss=rate + seed, score=50 + 10 * seed, start=start)
    header, rows = table(capsys, tmp_path, "--stage", "finetune_lora")
    assert [name.strip() for name in header] == [
        "run", "pretrain: arguments.learning_rate", "seeds", "state", "lm_loss", "gate depth", "gate entropy", "scenes"
    ]  # fmt: skip
    assert rows[0] == [
        str(tmp_path / "0.001/*/model"), "0.001", "2", "finished", f"0.5010 ± {math.sqrt(0.5):.4f}", "0.250 ± 0.000",
        "0.500 ± 0.000", "55.0 ± 7.1",
    ]  # fmt: skip
    assert rows[1][1] == "1" and len(rows) == 2
    assert len(table(capsys, tmp_path, "--stage", "finetune_lora", "--by-seed")[1]) == 4


def test_a_second_run_of_a_seed_is_no_further_seed(tmp_path, capsys):
    for place in ("first", "copy"):
        for seed in (0, 1):
            write_run(tmp_path / place / str(seed), seed=seed, loss=1.0 + seed)
    _, rows = table(capsys, tmp_path)
    assert [row[1] for row in rows] == ["2", "2"]


def test_each_stage_has_a_table_and_files_have_every_run(tmp_path, capsys):
    start = write_run(tmp_path / "a", "pretrain", experts=["depth"])
    write_run(tmp_path / "b", score=40, start=start)
    write_result(tmp_path / "eval", str(tmp_path / "b"), 20, "blank")  # next to it
    write_result(tmp_path / "b/old", "other weights", 99)
    files = [str(tmp_path / name) for name in ("x.csv", "x.json", "x.png")]
    assert main(["runs", str(tmp_path), "--csv", files[0], "--json", files[1], "--plot", files[2]]) == 0
    printed = capsys.readouterr().out
    assert "pretrain\nrun" in printed and "finetune_lora\nrun" in printed
    with open(files[0]) as handle:
        rows = list(csv.DictReader(handle))
    assert [row["stage"] for row in rows] == ["pretrain", "finetune_lora"]
    assert float(rows[1]["scenes: overall"]) == 40 and float(rows[1]["scenes (blank): overall"]) == 20
    assert float(rows[1]["lm_loss"]) == 1 and rows[0]["scenes: overall"] == ""
    found = json.loads((tmp_path / "x.json").read_text())[1]["groups"][0]
    assert found["means"]["scenes: shape"]["mean"] == 1 and found["runs"][0]["scores"]["scenes"]["overall"] == [40, 4]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_experts_differ_by_name_and_by_option(tmp_path, capsys):
    write_run(tmp_path / "a", experts=["depth"])
    write_run(tmp_path / "b", experts=["depth", "edge"])
    header, rows = table(capsys, tmp_path)
    assert "vision.experts" in header[1] and not any("edge.mode" in name for name in header)
    assert [row[1] for row in rows] == ["depth", "depth,edge"]


def test_state_of_a_run_that_is_not_finished(tmp_path, capsys):
    folder = write_run(tmp_path / "a", finished=False, loss=3.0)
    assert table(capsys, folder)[1][0][1:3] == ["interrupted at step 4 of 10", "3.0000"]
    with locked(folder):
        assert table(capsys, folder)[1][0][1] == "running at step 4 of 10"
    (folder / "checkpoint-4").rename(folder / "incomplete-checkpoint-4")
    assert table(capsys, folder)[1] == [[str(folder), "interrupted"]]
    assert main(["runs", str(folder), "--plot", str(tmp_path / "x.png")]) == 2
    assert "no run has a logged loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda top: None, "is no training run, and has none below it: there is no run.json"),
        (lambda top: (top / "run.json").write_text('{"benchmark": "Scenes"}'), "run.json has the key 'benchmark'"),
        (lambda top: (top / "run.json").write_text('{"preset": "tiny"}'), "run.json has no 'stage'"),
        (lambda top: (top / "run.json").write_text("{"), "run.json, line 1: not valid JSON"),
        (lambda top: top.rmdir(), "there is no folder"),
    ],
)
def test_folders_that_are_no_runs(tmp_path, capsys, make, message):
    top = tmp_path / "run"
    top.mkdir()
    make(top)
    assert main(["runs", str(top)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(top) in error
    write_run(tmp_path / "good")
    assert main(["runs", str(tmp_path / "good"), "--stage", "pretrain"]) == 2
    assert "the runs are of the stages finetune_lora" in capsys.readouterr().err


def test_mean_over_seeds_is_students():
    found = SeedMean.of([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.std == 1 and found.half == pytest.approx(t.ppf(0.975, 2) / math.sqrt(3))
    assert str(found) == "2.0 ± 2.5" and found.signed == "+2.0 ± 2.5" and found.text(".2f", std=True) == "2.00 ± 1.00"
    assert math.isnan(SeedMean.of([1.0]).half) and str(SeedMean.of([1.0])) == "1.0"
