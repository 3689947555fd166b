"""The claims' statistics on made-up runs, and (slow) the whole command at a tiny size."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "playground" / "claims"))

import report  # noqa: E402
from jobs import ARMS, Job, Settings  # noqa: E402
from numbers_of_runs import BOTH, Interval, Runs  # noqa: E402

from tove_llava.presets import load_preset  # noqa: E402
from tove_llava.scenes.language import CATEGORIES  # noqa: E402
from tove_llava.tower import FUSIONS  # noqa: E402


def write_run(settings, name, seed, accuracy, answers=()):
    folder = settings.out / "runs" / name / str(seed)
    place = folder / "eval" / "scenes" / "full"
    place.mkdir(parents=True)
    scores = {row: {"accuracy": accuracy.get(row, 0.5)} for row in (*CATEGORIES, "overall")}
    results = {"benchmarks": {"scenes": {"full": {"scores": scores}}}}
    (folder / "eval" / "results.json").write_text(json.dumps(results))
    (folder / "done.json").write_text(json.dumps({"seconds": 10 * (1 + seed)}))
    lines = [json.dumps({"question_id": key, "text": text}) for key, text in answers]
    (place / "answers.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path, seeds=3, train=100, val=10, scene_seed=0)


def test_interval_is_students():
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(Interval.of([1.0]).half)


def test_gains_are_paired_by_seed(settings):
    for seed, (a, b) in enumerate([(0.5, 0.6), (0.7, 0.8), (0.6, 0.7)]):
        write_run(settings, "clip", seed, {"overall": a})
        write_run(settings, "tove", seed, {"overall": b})
    clip, tove = Runs(settings, "clip"), Runs(settings, "tove")
    gain = tove.gain(clip, "overall")
    assert gain.mean == pytest.approx(10)
    assert gain.half == pytest.approx(0, abs=1e-9)
    assert clip.interval("overall").half > 10
    assert clip.interval(BOTH).mean == pytest.approx(50)
    assert clip.seconds() == 20


def test_verdict_needs_the_whole_interval_above_zero():
    clear, unclear = Interval(2.0, 1.0, 5), Interval(2.0, 3.0, 5)
    assert report.verdict([clear, clear]) == report.HOLDS
    assert report.verdict([clear, unclear]) == report.PART
    assert report.verdict([unclear, Interval(-2.0, 1.0, 5)]) == report.NOT


def test_page_says_what_was_not_run_and_works_the_rest_out(settings, tmp_path):
    truth = [{"question_id": f"q{i}", "answer": "Yes", "category": "existence"} for i in range(4)]
    settings.scenes.mkdir()
    (settings.scenes / "val_questions.jsonl").write_text("\n".join(map(json.dumps, truth)))
    for seed in range(3):
        wrong = [("q0", "yes."), ("q1", "Yes"), ("q2", "No"), ("q3", "No")]
        write_run(settings, "clip", seed, {"overall": 0.5}, wrong)
        write_run(settings, "tove", seed, {"overall": 0.75 + 0.01 * seed}, [*wrong[:3], ("q3", "Yes")])
        write_run(settings, "replace", seed, {"overall": 0.25}, [("q0", "Yes"), *((f"q{i}", "No") for i in (1, 2, 3))])
    report.write_report(settings, tmp_path / "claims.md")
    page = (tmp_path / "claims.md").read_text()
    assert "tove-1%: 0 of 3 seeds" in page
    assert "bash playground/claims.sh --claims b" in page
    residual = page.partition("## (f)")[2].partition("## (g)")[0]
    assert "2 of 4" in residual  # CLIP answers two questions well; ToVE keeps both, replacement one
    assert "100.0 ± 0.0 %" in residual
    assert "replacement 50.0 ± 0.0 %" in residual
    assert report.HOLDS in residual


@pytest.mark.parametrize(("half", "said"), [(0.79, report.HOLDS), (0.70, report.NOT)])
def test_curve_is_slow_when_half_of_the_experts_are_cheap(settings, tmp_path, half, said):
    for seed in range(3):
        folder = settings.out / "curves" / str(seed)
        folder.mkdir(parents=True)
        scores = zip(("abcd", "abc", "ab", "a", ""), (0.8, 0.8, half + 0.001 * seed, 0.6, 0.5), strict=True)
        steps = [{"experts": list(left), "accuracy": score, "images_per_second": 10} for left, score in scores]
        (folder / "detach_curve.json").write_text(json.dumps({"steps": steps}))
    text = report.SECTIONS["d"](settings, tmp_path)
    assert said in text
    assert f"{100 * (0.799 - half):+.1f} ± 0.2" in text


def test_every_study_is_written_about_and_names_arms_that_exist():
    assert report.SECTIONS.keys() == report.STUDIES.keys()
    for study in report.STUDIES.values():
        for entry in study["jobs"]:
            assert (ARMS / f"{entry['arm']}.yaml").is_file(), entry
            Job(seed=0, **entry)
    fusions = {load_preset(str(file)).vision.fusion for file in ARMS.glob("*.yaml")}
    assert fusions == set(FUSIONS.names())


@pytest.mark.slow
def test_claims_from_nothing_at_a_tiny_size(tmp_path):
    """Trainings of two arms and a merge, in worker processes; again, nothing is trained twice."""
    command = [sys.executable, str(ROOT / "playground" / "claims" / "run.py"), "--claims", "c,f", "--seeds", "2"]
    command += [
        "--train",
        "48",
        "--val",
        "8",
        "--pictures",
        "64",
        "--out",
        str(tmp_path / "out"),
        "--report",
        str(tmp_path / "claims.md"),
    ]
    first = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert first.returncode == 0, first.stderr[-3000:]
    page = (tmp_path / "claims.md").read_text()
    lite = page.partition("## (c)")[2].partition("## (d)")[0]
    assert "| lite | CLIPVisionModel |" in lite
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ") for line in lite.splitlines() if "CLIPVisionModel" in line
    }
    assert rows["lite"][2] == rows["clip"][2], "as many operations as CLIP"
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "6 runs, 6 of them done before" in again.stdout, again.stdout
