"""The claims' statistics on made-up runs, and (slow) the whole command."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from threading import Event, Timer
from unittest.mock import Mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "playground" / "claims"))

import records  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
from jobs import ARMS, Job, Settings  # noqa: E402
from numbers_of_runs import BOTH, Interval, Runs  # noqa: E402

from tove_llava.checkpoints.manifest import MANIFEST  # noqa: E402
from tove_llava.core.sources import BundledSource  # noqa: E402
from tove_llava.presets import load_preset  # noqa: E402
from tove_llava.scenes.language import CATEGORIES  # noqa: E402
from tove_llava.tower import FUSIONS  # noqa: E402


def cost(seconds, **keys):
    found = {"made": {}, "seconds": seconds, "cpu_seconds": 2 * seconds, "resumed": False}
    return {**found, "date": "2026-11-28", "commit": "abc1234567", "machine": "Z80, 2 cores", **keys}


def write_run(settings, name, seed, accuracy, answers=()):
    folder = settings.out / "runs" / name / str(seed)
    place = folder / "eval" / "scenes" / "full"
    place.mkdir(parents=True)
    scores = {row: {"accuracy": accuracy.get(row, 0.5)} for row in (*CATEGORIES, "overall")}
    results = {"benchmarks": {"scenes": {"full": {"scores": scores}}}}
    (folder / "eval" / "results.json").write_text(json.dumps(results))
    (folder / "done.json").write_text(json.dumps(cost(10 * (1 + seed))))
    lines = [json.dumps({"question_id": key, "text": text}) for key, text in answers]
    (place / "answers.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path, seeds=3, train=100, val=10, scene_seed=0)


def test_interval_is_students():
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(Interval.of([1.0]).half) and str(Interval.of([1.0])) == "1.0" and str(found) == "2.0 ± 2.5"


def test_gains_are_paired_by_seed(settings):
    for seed, (a, b) in enumerate([(0.5, 0.6), (0.7, 0.8), (0.6, 0.7)]):
        write_run(settings, "clip", seed, {"overall": a})
        write_run(settings, "tove", seed, {"overall": b})
    clip, tove = Runs(settings, "clip"), Runs(settings, "tove")
    gain = tove.gain(clip, "overall")
    assert gain.mean == pytest.approx(10) and gain.half == pytest.approx(0, abs=1e-9)
    assert clip.interval("overall").half > 10 and clip.interval(BOTH).mean == pytest.approx(50)
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
    report.write_report(settings, tmp_path / "claims.md", list("abcdefg"), "--claims all")
    page = (tmp_path / "claims.md").read_text()
    assert "tove-1%: 0 of 3 seeds" in page
    assert "bash playground/claims.sh --claims b" in page
    residual = page.partition("## (f)")[2].partition("## (g)")[0]
    assert "2 of 4" in residual  # CLIP answers two questions well; ToVE keeps both, replacement one
    assert "100.0 ± 0.0 %" in residual and "replacement 50.0 ± 0.0 %" in residual and report.HOLDS in residual


@pytest.mark.parametrize(("half", "said"), [(0.79, report.HOLDS), (0.70, report.NOT)])
def test_curve_is_slow_when_half_of_the_experts_are_cheap(settings, tmp_path, half, said):
    for seed in range(3):
        folder = settings.out / "curves" / str(seed)
        folder.mkdir(parents=True)
        scores = zip(("abcd", "abc", "ab", "a", ""), (0.8, 0.8, half + 0.001 * seed, 0.6, 0.5), strict=True)
        steps = [{"experts": list(left), "accuracy": score, "images_per_second": 10} for left, score in scores]
        curve = {"steps": steps, "records": 800, "records_in_file": 2683}
        (folder / "detach_curve.json").write_text(json.dumps(curve))
        (folder / "contributions.json").write_text(json.dumps({"overall": {"records": 300}}))
    text = report.SECTIONS["d"](settings, tmp_path)
    assert said in text
    assert f"{100 * (0.799 - half):+.1f} ± 0.2" in text
    assert "300 records of the training set" in " ".join(text.split())
    assert "800 of 2,683 held-out questions" in text


def test_every_study_has_a_section_and_names_arms_that_exist():
    assert report.SECTIONS.keys() == report.STUDIES.keys()
    for study in report.STUDIES.values():
        for entry in study["jobs"]:
            assert (ARMS / f"{entry['arm']}.yaml").is_file(), entry
            Job(seed=0, **entry)
    fusions = {load_preset(str(file)).vision.fusion for file in ARMS.glob("*.yaml")}
    assert fusions == set(FUSIONS.names())


def test_a_record_says_what_was_run_and_refuses_something_else(tmp_path):
    made, folder = {"job": {"merge": "--x 1"}, "starts_from": "aa"}, tmp_path / "run"
    with pytest.raises(KeyError), records.recorded(folder, made, "abc"):
        raise KeyError
    assert not records.is_done(folder, made)
    others = [
        ({"job": {"merge": "--x 2"}, "starts_from": "aa"}, "job.merge was '--x 1', is '--x 2'.* Delete .*--out"),
        ({**made, "starts_from": "bb"}, "starts_from was 'aa', is 'bb'"),
        ({**made, "version": "2"}, "version was None, is '2'"),
    ]

    def are_refused():
        for other, message in others:
            with pytest.raises(records.StaleRecord, match=message):
                records.is_done(folder, other)

    are_refused()  # unfinished
    with records.recorded(folder, made, "abc"):
        (folder / "log.txt").write_text("trained\n")
    found = json.loads((folder / "done.json").read_text())
    assert found["made"] == made and found["commit"] == "abc" and found["cpu_seconds"] >= 0 and found["resumed"]
    assert "cores" in found["machine"] and records.is_done(folder, made)
    assert records.is_done(folder, {**made, "starts_from": None}), "not known yet"
    are_refused()
    (folder / "done.json").write_text('{"arm": "clip", "seed": 0, "seconds": 1.0}')
    with pytest.raises(records.StaleRecord, match="does not say what it was made of"):
        records.is_done(folder, made)


def test_what_is_made_depends_on_preset_parts_sizes_and_the_start(settings, monkeypatch):
    plain = Job("tove", 0)
    merged = Job("tove", 0, label="lite", merge="--merge_coefficient 1", pictures=True)
    before = plain.made(settings)
    assert set(before["parts"]) == {f"bundled:{part.name}" for part in BundledSource.root.iterdir()}
    assert set(Job("clip", 0).made(settings)["parts"]) == {"bundled:clip", "bundled:llm"}
    assert before["preset"] != Job("add", 0).made(settings)["preset"]
    assert merged.made(settings)["starts_from"] is None
    model = settings.folder(plain) / "model"
    model.mkdir(parents=True)
    manifest = {"kind": "lora", "stage": "s", "preset": "p", "template": "v1", "image_aspect_ratio": "square"}
    manifest |= {"model_max_length": 9, "language": {}, "fingerprint": "ff", "format_version": 1}
    (model / MANIFEST).write_text(json.dumps(manifest))
    assert merged.made(settings)["starts_from"] == "ff"
    assert merged.made(replace(settings, further=5))["pictures"] == 5
    assert plain.made(replace(settings, train=5)) != before
    monkeypatch.setattr("records._hash_of", lambda name: "other")
    assert plain.made(settings)["parts"] != before["parts"]


def test_the_commit_is_that_of_this_very_repository(monkeypatch, tmp_path):
    answers = {"rev-parse --show-toplevel": str(records.ROOT), "rev-parse --short=10 HEAD": "0123456789"}

    def git(*words):
        return answers.get(" ".join(words), answers.get(words[0], ""))

    monkeypatch.setattr(records, "_git", git)
    assert records.commit() == "0123456789"
    answers["status"] = " M tove_llava/x.py"
    assert records.commit() == "0123456789+"
    answers["rev-parse --show-toplevel"] = str(tmp_path)  # unpacked inside somebody else's
    assert records.commit() == "unknown"


@dataclass(frozen=True)
class Stub:
    """A job that calls ``act``."""

    name: str
    act: Callable[[], None] = lambda: None
    seed: int = 0

    def run(self, settings):
        self.act()


def test_a_failed_run_is_reported_at_once_and_nothing_begins_after_it(settings, capsys):
    expired, heard, begun = Event(), [], []

    def fail():
        raise ValueError("no space")

    def long():  # ends when the failure has been reported, in a minute at the latest
        while "failed" not in "".join(heard) and not expired.wait(0.02):
            heard.append(capsys.readouterr().err)
        begun.append("long ended")

    timer = Timer(60, expired.set)
    timer.start()
    later = [Stub(f"later{i}", lambda: begun.append("later")) for i in range(3)]
    with ThreadPoolExecutor(2) as pool, pytest.raises(run.RunFailed):
        run.run_all(pool, settings, [Stub("long", long), Stub("bad", fail), *later], 2)
    timer.cancel()
    assert not expired.is_set(), "the failure was reported only after the others' end"
    assert begun == ["long ended"]
    assert "bad, seed 0 failed: no space" in "".join(heard) and "3 are not begun" in "".join(heard)
    with ThreadPoolExecutor(2) as pool:
        run.run_all(pool, settings, later, 2)
    assert begun == ["long ended", *["later"] * 3] and "[3/3]" in capsys.readouterr().out


def test_a_failure_is_the_commands_status(settings, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    for error, code in ((run.RunFailed(), 1), (records.StaleRecord("runs/clip/0 was made of something else"), 2)):
        monkeypatch.setattr(run, "run", Mock(side_effect=error))
        assert run.main() == code
    assert "runs/clip/0" in capsys.readouterr().err


def whole_study(settings):
    """Write all runs of claims c, d, f without speed and curves."""
    truth = {"question_id": "q0", "answer": "Yes", "category": "existence"}
    settings.scenes.mkdir(exist_ok=True)
    (settings.scenes / "val_questions.jsonl").write_text(json.dumps(truth))
    for name, seed in product(("clip", "tove", "replace", "lite", "clip_tuned"), range(settings.seeds)):
        write_run(settings, name, seed, {"overall": 0.5 + 0.1 * (name == "tove")}, [("q0", "Yes")])


def test_a_section_says_how_it_came_about(settings, tmp_path):
    whole_study(settings)
    (settings.out / "runs" / "clip" / "0" / "done.json").write_text(json.dumps(cost(10, commit="0000000000+")))
    report.write_report(settings, tmp_path / "claims.md", ["f"], "--claims f --seeds 3")
    found = " ".join((tmp_path / "claims.md").read_text().partition("## (f)")[2].partition("## (g)")[0].split())
    assert "`bash playground/claims.sh --claims f --seeds 3`, run 2026-11-28" in found
    assert "commit 0000000000+ and abc1234567; 3 seeds, 100 training scenes for each stage, 10 held-out scenes" in found
    # Three arms of 10, 20 and 30 seconds on two cores.
    assert "Z80, 2 cores. 9 runs: 360 processor seconds, 3.0 minutes on two cores." in found


def test_a_run_of_some_claims_leaves_the_other_sections_as_they_stand(settings, tmp_path):
    whole_study(settings)
    page = tmp_path / "claims.md"
    old = "## (a) An older title\n\nProduced in 2020.\n\n| a | b |\n| --- | ---: |\n| x | 1.0 |\n"
    page.write_text(
        f"# Old head\n\n{old}\n## (b) Data\n\nNot run yet (old): `x`.\n\n"
        "## (f) Old\n\nold numbers\n\n### more of it\n\n## Remarks\n\nby hand, (f) and all\n"
    )
    report.write_report(settings, page, ["b"], "--claims b")
    assert "## (f) Old\n\nold numbers\n" in page.read_text(), "its runs are there, but it was not asked for"
    report.write_report(settings, page, ["f"], "--claims f")
    text = page.read_text()
    assert text.startswith(report.HEAD) and old in text
    assert "old numbers" not in text and "more of it" not in text and text.count("## (f)") == 1
    assert "## Remarks\n\nby hand, (f) and all\n" in text
    assert "Not run yet (old)" not in text and "`bash playground/claims.sh --claims b`" in text
    headings = [line[3:6] for line in text.splitlines() if line.startswith("## (")]
    assert headings == [f"({name})" for name in report.STUDIES]
    report.write_report(settings, page, ["f"], "--claims f")
    assert page.read_text() == text, "the same run writes the same page"
    report.write_report(replace(settings, seeds=4), page, ["f"], "--claims f --seeds 4")
    again = page.read_text()
    assert report.sections_of(again)["(f)"] == report.sections_of(text)["(f)"], "a section that lacks a seed stays"
    for seed in "01":
        (settings.out / "curves" / seed).mkdir(parents=True)
        (settings.out / "curves" / seed / "detach_curve.json").write_text("{}")
    report.write_report(settings, page, ["d"], "--claims d")
    assert "Not run yet (curves/2/detach_curve.json)" in page.read_text()


def test_a_share_of_no_clear_gain_is_not_defined(settings, tmp_path):
    assert report.kept_share(Interval(10, 1, 5), Interval(8, 1, 5)) == pytest.approx(80)
    for whole in (Interval(0, 0, 5), Interval(-3, 1, 5), Interval(2, 3, 5), Interval(2, math.nan, 1)):
        assert report.kept_share(whole, Interval(1, 1, 5)) is None
    for name, seed in product(("clip", "tove", "lite", "clip_tuned"), range(3)):
        write_run(settings, name, seed, {})
    speed = {"batch": 32, "threads": 1, "rounds": 31, "rows": []}
    (settings.out / "speed.json").write_text(json.dumps(speed))
    text = report.SECTIONS["c"](replace(settings, further=777), tmp_path)
    assert f"**{report.UNDEFINED}** (goal: 80 %, missed)" in text and report.NOT in text
    assert "brought 16 of\n777 further images" in text


def test_summary_has_every_run(settings):
    whole_study(settings)
    run.summarize(settings, "--claims f", 61.0)
    found = json.loads((settings.out / "summary.json").read_text())
    assert found["last_command"]["command"] == "--claims f" and found["last_command"]["seconds"] == 61
    rows = {(row["name"], row["seed"]): row for row in found["runs"]}
    last = rows["tove", 2]
    assert len(rows) == 15 and last["accuracy"] == pytest.approx(60)
    assert last["seconds"] == 30 and last["cpu_seconds"] == 60


def test_the_readmes_numbers_are_those_of_the_page():
    page = (ROOT / "docs" / "background" / "claims.md").read_text()
    numbers = re.findall(r"[\d.]+ ± [\d.]+", (ROOT / "README.md").read_text())
    assert numbers and not [number for number in numbers if number not in page]


@pytest.mark.slow
def test_claims_from_nothing_at_a_tiny_size(tmp_path):
    """Train three arms, merge, draw detach curves; then train nothing twice."""
    command = [sys.executable, str(ROOT / "playground" / "claims" / "run.py"), "--claims", "c,d,f", "--seeds", "2"]
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
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["runs"]) == 10 and all(row["cpu_seconds"] > 1 for row in summary["runs"])
    merged = tmp_path / "out" / "runs" / "lite" / "0" / "done.json"
    assert len(json.loads(merged.read_text())["made"]["starts_from"]) == 64
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "6 runs, 6 of them done before" in again.stdout, again.stdout
    merged.write_text(merged.read_text().replace("--merge_coefficient 20", "--merge_coefficient 19"))
    refused = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert refused.returncode == 2 and str(merged.parent.resolve()) in refused.stderr, refused.stderr[-3000:]
