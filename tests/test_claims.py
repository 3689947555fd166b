"""The claims' statistics on made-up runs, and (slow) the whole command."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = ROOT / "playground" / "claims"
sys.path.insert(0, str(CLAIMS))

import report  # noqa: E402
from numbers_of_runs import BOTH, Runs, Study  # noqa: E402

from tove_llava.ablation import job_records  # noqa: E402
from tove_llava.ablation.ablation_plan import read_plan  # noqa: E402
from tove_llava.ablation.seed_means import SeedMean  # noqa: E402
from tove_llava.presets import load_preset  # noqa: E402
from tove_llava.scenes.language import CATEGORIES  # noqa: E402
from tove_llava.tower import FUSIONS  # noqa: E402


def cost(seconds, **keys):
    found = {"seconds": seconds, "cpu_seconds": 2 * seconds, "tries": 1}
    return {**found, "date": "2026-11-28", "commit": "abc1234567", "machine": "Z80, 2 cores", **keys}


def write_run(study, name, seed, accuracy, answers=(), **keys):
    """Add a run to the results that ``tove-llava ablate`` would write."""
    folder = study.out / "runs" / f"{name}-seed{seed}"
    place = folder / "eval" / "scenes" / "full"
    place.mkdir(parents=True)
    manifest = {"kind": "lora", "stage": "s", "preset": "p", "template": "v1", "image_aspect_ratio": "square"}
    manifest |= {
        "model_max_length": 9,
        "language": {"source": "bundled:llm"},
        "fingerprint": "f" * 64,
        "format_version": 1,
    }
    (folder / "tove_llava.json").write_text(json.dumps(manifest))
    scores = {row: [100 * accuracy.get(row, 0.5), 4] for row in (*CATEGORIES, "overall")}
    lines = [json.dumps({"question_id": key, "text": text}) for key, text in answers]
    (place / "answers.jsonl").write_text("\n".join(lines) + "\n")
    jobs = {f"train-{name}-{seed}": cost(10 * (1 + seed), **keys)}
    run = {"seed": seed, "folder": str(folder), "evaluation": str(folder / "eval"), "jobs": jobs, "gate": {}}
    file = study.out / "results.json"
    groups = json.loads(file.read_text())[0]["groups"] if file.is_file() else []
    group = next((group for group in groups if group["label"] == name), {"label": name, "runs": []})
    group["runs"].append({**run, "scores": {"scenes": scores}})
    groups = [*(other for other in groups if other["label"] != name), group]
    file.write_text(json.dumps([{"groups": groups}]))


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path, seeds=3, train=100, val=10, scene_seed=0)


def write_curve(study, seed, steps, records=300):
    """Write a seed's curve, of the weights that :func:`write_run` names."""
    folder = study.out / "curves" / f"{seed}-{'f' * 10}"
    folder.mkdir(parents=True)
    curve = {"steps": steps, "records": 800, "records_in_file": 2683}
    (folder / "detach_curve.json").write_text(json.dumps(curve))
    (folder / "contributions.json").write_text(json.dumps({"overall": {"records": records}}))


def test_gains_are_paired_by_seed(study):
    for seed, (a, b) in enumerate([(0.5, 0.6), (0.7, 0.8), (0.6, 0.7)]):
        write_run(study, "clip", seed, {"overall": a})
        write_run(study, "tove", seed, {"overall": b})
    clip, tove = Runs(study, "clip"), Runs(study, "tove")
    gain = tove.gain(clip, "overall")
    assert gain.mean == pytest.approx(10) and gain.half == pytest.approx(0, abs=1e-9)
    assert clip.interval("overall").half > 10 and clip.interval(BOTH).mean == pytest.approx(50)
    assert clip.seconds() == 20


def mean(value, half, count):
    return SeedMean(value, math.nan, half, count)


def test_verdict_needs_the_whole_interval_above_zero():
    clear, unclear = mean(2.0, 1.0, 5), mean(2.0, 3.0, 5)
    assert report.verdict([clear, clear]) == report.HOLDS
    assert report.verdict([clear, unclear]) == report.PART
    assert report.verdict([unclear, mean(-2.0, 1.0, 5)]) == report.NOT


def test_page_says_what_was_not_run_and_works_the_rest_out(study, tmp_path):
    truth = [{"question_id": f"q{i}", "answer": "Yes", "category": "existence"} for i in range(4)]
    study.scenes.mkdir()
    (study.scenes / "val_questions.jsonl").write_text("\n".join(map(json.dumps, truth)))
    for seed in range(3):
        wrong = [("q0", "yes."), ("q1", "Yes"), ("q2", "No"), ("q3", "No")]
        write_run(study, "clip", seed, {"overall": 0.5}, wrong)
        write_run(study, "tove", seed, {"overall": 0.75 + 0.01 * seed}, [*wrong[:3], ("q3", "Yes")])
        write_run(study, "replace", seed, {"overall": 0.25}, [("q0", "Yes"), *((f"q{i}", "No") for i in (1, 2, 3))])
    report.write_report(study, tmp_path / "claims.md", list("abcdefg"), "--claims all")
    page = (tmp_path / "claims.md").read_text()
    assert "tove-1%: 0 of 3 seeds" in page
    assert "bash playground/claims.sh --claims b" in page
    residual = page.partition("## (f)")[2].partition("## (g)")[0]
    assert "2 of 4" in residual  # CLIP answers two questions well; ToVE keeps both, replacement one
    assert "100.0 ± 0.0 %" in residual and "replacement 50.0 ± 0.0 %" in residual and report.HOLDS in residual


@pytest.mark.parametrize(("half", "said"), [(0.79, report.HOLDS), (0.70, report.NOT)])
def test_curve_is_slow_when_half_of_the_experts_are_cheap(study, tmp_path, half, said):
    for seed in range(3):
        write_run(study, "tove", seed, {})
    for seed in range(3):
        scores = zip(("abcd", "abc", "ab", "a", ""), (0.8, 0.8, half + 0.001 * seed, 0.6, 0.5), strict=True)
        steps = [{"experts": list(left), "accuracy": score, "images_per_second": 10} for left, score in scores]
        write_curve(study, seed, steps)
    text = report.SECTIONS["d"](study, tmp_path)
    assert said in text
    assert f"{100 * (0.799 - half):+.1f} ± 0.2" in text
    assert "300 records of the training set" in " ".join(text.split())
    assert "800 of 2,683 held-out questions" in text


def test_every_study_has_a_section_and_names_arms_that_exist(tmp_path):
    assert report.SECTIONS.keys() == report.STUDIES.keys()
    plan = read_plan(CLAIMS / "claims.yaml", tmp_path)
    named = {arm for study in report.STUDIES.values() for arm in study["arms"]}
    assert named == {arm.name for arm in plan.arms} and list(plan.seeds) == [0, 1, 2, 3, 4]
    presets = {arm.name: load_preset(arm.preset, arm.overrides) for arm in plan.arms}
    assert {preset.vision.fusion for preset in presets.values()} == set(FUSIONS.names())
    assert presets["clip-3%"].vision == presets["clip"].vision and presets["lite"].vision == presets["tove"].vision
    assert [expert["name"] for expert in presets["edge_without_clip"].vision.experts] == ["edge"]
    merges = [arm.name for arm in plan.arms if list(arm.stages) == ["pretrain", "finetune_lora", "merge"]]
    assert merges == ["lite", "clip_tuned"]


def test_the_commit_is_that_of_this_very_repository(monkeypatch, tmp_path):
    answers = {"rev-parse --show-toplevel": str(ROOT), "rev-parse --short=10 HEAD": "0123456789"}

    def git(root, *words):
        return answers.get(" ".join(words), answers.get(words[0], ""))

    monkeypatch.setattr(job_records, "_git", git)
    commit = job_records.commit.__wrapped__  # without its cache
    assert commit() == "0123456789"
    answers["status"] = " M tove_llava/x.py"
    assert commit() == "0123456789+"
    answers["rev-parse --show-toplevel"] = str(tmp_path)  # unpacked inside somebody else's
    assert commit() == "unknown"


def whole_study(study):
    """Write all runs of claims c, d, f without speed and curves."""
    truth = {"question_id": "q0", "answer": "Yes", "category": "existence"}
    study.scenes.mkdir(exist_ok=True)
    (study.scenes / "val_questions.jsonl").write_text(json.dumps(truth))
    for name, seed in product(("clip", "tove", "replace", "lite", "clip_tuned"), range(study.seeds)):
        keys = {"commit": "0000000000+"} if (name, seed) == ("clip", 0) else {}
        write_run(study, name, seed, {"overall": 0.5 + 0.1 * (name == "tove")}, [("q0", "Yes")], **keys)


def test_a_section_says_how_it_came_about(study, tmp_path):
    whole_study(study)
    report.write_report(study, tmp_path / "claims.md", ["f"], "--claims f --seeds 3")
    found = " ".join((tmp_path / "claims.md").read_text().partition("## (f)")[2].partition("## (g)")[0].split())
    assert "`bash playground/claims.sh --claims f --seeds 3`, run 2026-11-28" in found
    assert "commit 0000000000+ and abc1234567; 3 seeds, 100 training scenes for each stage, 10 held-out scenes" in found
    # Three arms of 10, 20 and 30 seconds on two cores.
    assert "Z80, 2 cores. 9 runs: 360 processor seconds, 3.0 minutes on two cores." in found


def test_a_run_of_some_claims_leaves_the_other_sections_as_they_stand(study, tmp_path):
    whole_study(study)
    page = tmp_path / "claims.md"
    old = "## (a) An older title\n\nProduced in 2020.\n\n| a | b |\n| --- | ---: |\n| x | 1.0 |\n"
    page.write_text(
        f"# Old head\n\n{old}\n## (b) Data\n\nNot run yet (old): `x`.\n\n"
        "## (f) Old\n\nold numbers\n\n### more of it\n\n## Remarks\n\nby hand, (f) and all\n"
    )
    report.write_report(study, page, ["b"], "--claims b")
    assert "## (f) Old\n\nold numbers\n" in page.read_text(), "its runs are there, but it was not asked for"
    report.write_report(study, page, ["f"], "--claims f")
    text = page.read_text()
    assert text.startswith(report.HEAD) and old in text
    assert "old numbers" not in text and "more of it" not in text and text.count("## (f)") == 1
    assert "## Remarks\n\nby hand, (f) and all\n" in text
    assert "Not run yet (old)" not in text and "`bash playground/claims.sh --claims b`" in text
    headings = [line[3:6] for line in text.splitlines() if line.startswith("## (")]
    assert headings == [f"({name})" for name in report.STUDIES]
    report.write_report(study, page, ["f"], "--claims f")
    assert page.read_text() == text, "the same run writes the same page"
    report.write_report(replace(study, seeds=4), page, ["f"], "--claims f --seeds 4")
    again = page.read_text()
    assert report.sections_of(again)["(f)"] == report.sections_of(text)["(f)"], "a section that lacks a seed stays"
    for seed in (0, 1, 2):
        write_curve(study, seed, [])
    (study.out / "curves/2-ffffffffff/detach_curve.json").unlink()
    report.write_report(study, page, ["d"], "--claims d")
    assert "Not run yet (curves/2-ffffffffff/detach_curve.json)" in page.read_text()


def test_a_share_of_no_clear_gain_is_not_defined(study, tmp_path):
    assert report.kept_share(mean(10, 1, 5), mean(8, 1, 5)) == pytest.approx(80)
    for whole in (mean(0, 0, 5), mean(-3, 1, 5), mean(2, 3, 5), mean(2, math.nan, 1)):
        assert report.kept_share(whole, mean(1, 1, 5)) is None
    for name, seed in product(("clip", "tove", "lite", "clip_tuned"), range(3)):
        write_run(study, name, seed, {})
    speed = {"batch": 32, "threads": 1, "rounds": 31, "rows": []}
    (study.out / "speed.json").write_text(json.dumps(speed))
    text = report.SECTIONS["c"](replace(study, further=777), tmp_path)
    assert f"**{report.UNDEFINED}** (goal: 80 %, missed)" in text and report.NOT in text
    assert "brought 16 of\n777 further images" in text


def test_the_readmes_numbers_are_those_of_the_page():
    page = (ROOT / "docs" / "background" / "claims.md").read_text()
    numbers = re.findall(r"[\d.]+ ± [\d.]+", (ROOT / "README.md").read_text())
    assert numbers and not [number for number in numbers if number not in page]


@pytest.mark.slow
def test_claims_from_nothing_at_a_tiny_size(tmp_path):
    """Train three arms, merge, draw detach curves; then train nothing twice."""
    command = [sys.executable, str(CLAIMS / "run.py"), "--claims", "c,d,f", "--seeds", "2"]
    command += ["--train", "48", "--val", "8", "--pictures", "64"]
    command += ["--out", str(tmp_path / "out"), "--report", str(tmp_path / "claims.md")]
    first = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert first.returncode == 0, first.stderr[-3000:]
    page = (tmp_path / "claims.md").read_text()
    lite = page.partition("## (c)")[2].partition("## (d)")[0]
    lines = [line.strip("| ").split(" | ") for line in lite.splitlines() if "CLIPVisionModel" in line]
    rows = {cells[0]: cells for cells in lines}
    assert rows["lite"][2] == rows["clip"][2], "as many operations as CLIP"
    assert "--claims c,d,f --seeds 2 --train 48 --val 8 --pictures 64`, run 2" in lite
    assert "4 runs and 2 curves: " in page.partition("## (d)")[2]
    runs = Study(tmp_path / "out", 2, 48, 8, 100).runs
    assert sum(map(len, runs.values())) == 10
    assert all(job["cpu_seconds"] > 0 for arm in runs.values() for run in arm.values() for job in run["jobs"].values())
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "26 jobs, 26 of them done before" in again.stdout and "4 jobs, 4 of them done before" in again.stdout
    record = next((tmp_path / "out/jobs").glob("lite-seed0-merge-*.json"))
    record.write_text(record.read_text().replace('"version": "', '"version": "old '))
    refused = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert refused.returncode == 2 and str(record) in refused.stderr, refused.stderr[-3000:]
