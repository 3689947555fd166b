"""Runs' results for comparison, their statistics, and the pages."""

import base64
import json
import sys
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from answer_parts import make_scenes, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from score_parts import SAMPLES, read_rows, truth_file, write_rows

from tove_llava import cli
from tove_llava.eval import result_files
from tove_llava.eval.benchmarks import BENCHMARKS, Question, Score, get_benchmark
from tove_llava.eval.captions import METRICS
from tove_llava.eval.report.page import escape_markdown
from tove_llava.eval.report.published import read_published
from tove_llava.eval.report.statistics import Bootstrap, holm, mcnemar
from tove_llava.eval.rows import read_answers
from tove_llava.eval.tasks import Decoding, Task


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (6, 6), (0, 7), (12, 2)])
def test_mcnemar_counts_coin_tosses(better, worse):
    tosses = list(product((0, 1), repeat=better + worse))
    as_far = [t for t in tosses if abs(2 * sum(t) - len(t)) >= abs(better - worse)]
    assert mcnemar(better, worse) == pytest.approx(len(as_far) / len(tosses))


@given(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=2, max_size=40))
@settings(max_examples=30, deadline=None)
def test_an_interval_holds_its_mean_and_can_be_repeated(values):
    bootstrap = Bootstrap(resamples=2000, seed=3)
    found = bootstrap.interval(values)
    assert found.low - 1e-12 <= found.mean <= found.high + 1e-12 and found.count == len(values)
    assert bootstrap.interval(values) == found == bootstrap.interval(values[::-1])


@pytest.mark.parametrize("values", [(np.arange(400) % 5 < 3) * 1.0, np.sin(np.arange(400.0))], ids=["few", "many"])
def test_intervals_are_as_wide_as_the_normal_ones(values):
    found = Bootstrap().interval(values)
    error = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - error, values.mean() + error), abs=error / 10)


def test_drawing_counts_is_drawing_questions(monkeypatch):
    values = np.repeat([0.0, 0.3, 0.9, 1.0], [40, 30, 20, 10])
    counted = Bootstrap(20_000).means(values)
    monkeypatch.setattr("tove_llava.eval.report.statistics._FEW", 0)
    drawn = Bootstrap(20_000).means(values)
    assert not np.array_equal(counted, drawn)
    assert np.quantile(counted, [0.025, 0.5, 0.975]) == pytest.approx(np.quantile(drawn, [0.025, 0.5, 0.975]), abs=5e-3)


def test_a_difference_is_paired():
    generator = np.random.default_rng(0)
    hard = generator.random(600)  # questions differ much more than the runs do
    first, second = hard, hard + 0.01 + 0.02 * generator.random(600)
    found = Bootstrap().difference(first, second)
    assert found.test == "bootstrap" and found.p < 0.001 and found.better == 600 and found.worse == 0
    assert found.interval.low > 0.015 and found.interval.high < 0.025
    swapped = Bootstrap().difference(second, first)
    assert swapped.interval.mean == -found.interval.mean and swapped.p == found.p and swapped.worse == 600


def test_binary_questions_are_tested_exactly_and_equal_runs_have_p_1():
    found = Bootstrap().difference([1] * 10 + [0] * 9 + [1] * 3, [1] * 10 + [1] * 9 + [0] * 3)
    assert (found.test, found.better, found.worse) == ("McNemar", 9, 3) and found.p == mcnemar(9, 3)
    assert found.interval.mean == pytest.approx(6 / 22)
    assert Bootstrap().difference([0.3, 0.6], [0.3, 0.6]).p == 1.0 == Bootstrap().difference([1, 0], [1, 0]).p
    with pytest.raises(ValueError, match="cannot be paired"):
        Bootstrap().difference([1.0], [1.0, 0.0])


def test_under_the_null_p_is_small_as_often_as_it_says():
    generator = np.random.default_rng(1)
    draws = [generator.normal(size=(2, 60)) for _ in range(300)]
    small = [Bootstrap(500).difference(a, b).p < 0.1 for a, b in draws]
    assert 0.06 < np.mean(small) < 0.15


@pytest.mark.parametrize("kind", ["few", "many"])
def test_questions_about_one_image_are_resampled_together(kind):
    generator = np.random.default_rng(2)
    one = (generator.random(200) < 0.6) * 1.0 if kind == "few" else generator.normal(size=200)
    values, images = np.repeat(one, 4), np.repeat(np.arange(200), 4)  # four questions, all right or all wrong
    alone, naive, found = (Bootstrap().interval(*args) for args in ((one,), (values,), (values, images)))
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.02) and found.count == 800
    assert naive.high - naive.low < 0.6 * (found.high - found.low)
    order = generator.permutation(800)
    assert Bootstrap().interval(values[order], images[order]) == found
    assert Bootstrap().interval(one, np.arange(200)) == alone


def test_a_difference_over_images_is_no_exact_test():
    first, second = np.zeros(40), np.repeat([1.0] * 3 + [0.0] * 7, 4)  # better on 12 questions, but on 3 images
    separate, grouped = (
        Bootstrap().difference(first, second, groups) for groups in (None, np.repeat(np.arange(10), 4))
    )
    assert separate.test == "McNemar" and separate.p < 0.001
    assert grouped.test == "bootstrap" and grouped.p > 0.02 and grouped.better == 12


def test_a_detectable_difference_is_found_four_times_in_five():
    generator, bootstrap = np.random.default_rng(3), Bootstrap(1000)
    noise = [generator.normal(size=100) for _ in range(200)]
    least = bootstrap.difference(np.zeros(100), noise[0]).detectable
    found = [bootstrap.difference(np.zeros(100), each + least).p < 0.05 for each in noise]
    assert 0.7 < np.mean(found) < 0.9
    same = bootstrap.difference([1.0] * 50, [1.0] * 50)
    assert same.detectable == 6 / 50 and mcnemar(6, 0) < 0.05 < mcnemar(5, 0)
    assert bootstrap.difference([1.0] * 2, [0.0] * 2, ["a", "a"]).detectable is None


def test_pages_say_what_they_could_show(tmp_path):
    marks = [0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    lone = write_run(tmp_path / "lone", marks, unparsed=2, unparsed_ids=[1, 3])
    items = read_rows(lone / "items.jsonl")
    write_rows(lone / "items.jsonl", [{**row, "image": f"images/{index // 2}.png"} for index, row in enumerate(items)])
    code, found = report(tmp_path / "one", f"x={lone}")
    assert code == 0
    notes = " ".join(found["benchmarks"]["scenes"]["notes"])
    assert "8 questions are about 4 images" in notes and "2 answers that the rule could not read" in notes
    assert "Another model is told apart from x" in notes
    page = (tmp_path / "one" / "report.md").read_text()
    assert "answers not read | 2 | 8" in page


def test_holm():
    values, adjusted = (0.01, 0.04, 0.03, 0.005), (0.03, 0.06, 0.06, 0.02)
    assert holm(dict(zip("abcd", values, strict=True))) == pytest.approx(dict(zip("abcd", adjusted, strict=True)))
    assert holm({"x": 0.7, "y": 0.9}) == {"x": 1.0, "y": 1.0} and holm({}) == {}


def test_without_scipy_the_extra_is_named(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tove_llava.eval.report.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "page")]) == 2
    assert "tove-llava[eval]" in capsys.readouterr().err


MARKED = dict.fromkeys(("mmbench", "mmbench_cn", "okvqa", "scenes", "vqav2"), "overall") | {"seed": "total"}
MARKED |= dict.fromkeys(
    ("gqa", "scienceqa", "textvqa", "vizwiz", "vsr", "chartqa", "ocrbench", "mmmu", "mmmu_pro"), "accuracy"
)
MARKED |= {"docvqa": "anls", "hallusionbench": "aAcc"}


def scored(name):
    benchmark, folder = get_benchmark(name), SAMPLES / name
    truth = benchmark.read_ground_truth(truth_file(folder))
    answers = read_answers(folder / "predictions.jsonl")
    score = benchmark.score(answers, truth)
    task = Task(name, benchmark, Path(), Decoding.of(benchmark), [], [], truth)
    return score, result_files.item_rows(task, answers, score)


@pytest.mark.parametrize("name", MARKED)
def test_items_give_the_score_and_its_breakdown(name):
    score, items = scored(name)
    assert len(items) == len(score.marks) == len({row["item"] for row in items})
    values = [row["values"]["mark"] for row in items]
    assert 100 * sum(values) / len(values) == pytest.approx(score.rows[MARKED[name]][0])
    assert all(row["expected"] for row in items) and any(row["answer"] is not None for row in items)
    groups = [group for level in result_files.breakdown(items).values() for group in level.items()]
    compared = [(name, entry) for name, entry in groups if name in score.rows]
    assert all((100 * e["mark"], e["count"]) == pytest.approx(score.rows[n]) for n, e in compared)
    if name not in (
        "scienceqa",
        "textvqa",
        "mmbench",
        "mmbench_cn",
        "docvqa",
    ):  # no groups, or abbreviated ones in the table
        assert compared


def test_breakdowns_where_the_table_has_other_names():
    for name, level, key, factor in (("pope", None, "accuracy", 1), ("mme", "subtasks", "acc", 100)):
        score, items = scored(name)
        expected = score.scores[level] if level else score.scores
        found = {group: factor * entry["mark"] for group, entry in result_files.breakdown(items)["category"].items()}
        assert found == pytest.approx({group: entry[key] for group, entry in expected.items()})
    score, items = scored("mmbench")
    found = {group: entry["mark"] for group, entry in result_files.breakdown(items)["category"].items()}
    assert found.items() <= score.scores.items()


def test_values_of_images_replace_missing_marks():
    first, second = {"CIDEr": 0.5, "Bleu_4": 0.1}, {"CIDEr": 1.5, "Bleu_4": 0.2}
    details = {"per_item": {7: {**first, "note": "x"}, 8: second}}
    assert result_files.item_values(Score({}, 2, {}, details=details)) == {"7": first, "8": second}
    assert result_files.item_values(Score({}, 2, {}, details={"per_item": {1: {"review": "x"}}})) == {}


def evaluate(model, data, out, *flags):
    command = ["eval", "--model", str(model), "--benchmark", "scenes", "--data-root", str(data), "--device", "cpu"]
    assert cli.main([*command, "--output", str(out), *flags]) == 0


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Evaluate one model with images (run0) and blank ones (run1).

    Each gets some questions right.
    """
    folder = tmp_path_factory.mktemp("runs")
    make_scenes(folder / "data")
    save_model(folder)
    blank = ("--blank-image", "--overwrite")
    evaluate(folder / "model", folder / "data", folder / "run0")
    evaluate(folder / "model", folder / "data", folder / "run1", *blank)
    seen, unseen = (read_answers(folder / run / "scenes" / name / "answers.jsonl") for run, name in FOLDERS)
    file = folder / "data" / "val_questions.jsonl"
    questions = read_rows(file)
    for index, row in enumerate(questions):
        row["answer"] = (seen, unseen, seen, [{"text": "no such answer"}] * len(seen))[index % 4][index]["text"]
    write_rows(file, questions)
    evaluate(folder / "model", folder / "data", folder / "run0", "--overwrite")
    evaluate(folder / "model", folder / "data", folder / "run1", *blank)
    return folder


FOLDERS = (("run0", "full"), ("run1", "blank"))


def results(folder):
    return [json.loads((folder / run / "scenes" / name / "result.json").read_text()) for run, name in FOLDERS]


def items_of(folder):
    return [read_rows(folder / run / "scenes" / name / "items.jsonl") for run, name in FOLDERS]


def test_a_result_names_its_sources(evaluated):
    (result, blank), (items, _) = results(evaluated), items_of(evaluated)
    answers = read_answers(evaluated / "run0" / "scenes" / "full" / "answers.jsonl")
    assert result["benchmark"] == "scenes" and result["condition"]["name"] == "full" and result["command"]
    assert blank["condition"]["blank_image"] and not result["condition"]["blank_image"]
    assert result["fingerprint"] == json.loads((evaluated / "model" / "tove_llava.json").read_text())["fingerprint"]
    assert len(set(result["backbones"].values())) == len(result["backbones"]) > 1 and "clip" in result["backbones"]
    assert result["data"] == blank["data"] and result["data"]["question_count"] == result["count"]
    assert result["questions_answered"] == len(answers) == result["count"] == len(items)
    assert result["images"] == len({row["image"] for row in items}) and result["images_per_second"] > 0
    assert {row["item"]: row["answer"] for row in items} == {str(r["question_id"]): r["text"] for r in answers}
    assert result["versions"].keys() >= {"torch", "transformers", "tove_llava"}
    assert result["breakdown"]["category"].keys() == set(result["scores"]) - {"overall"}
    whole = json.loads((evaluated / "run0" / "results.json").read_text())
    assert whole["benchmarks"]["scenes"]["full"]["scores"] == result["scores"]


def test_the_data_digest_covers_questions_and_answers_in_any_order():
    digest = result_files.data_fingerprint
    questions = [Question(i, f"What is {i}?", Path(f"a/{i}.png")) for i in range(3)]
    truth = [{"question_id": i, "answer": str(i)} for i in range(3)]
    first = digest(questions, truth)
    moved = [Question(q.question_id, q.text, Path("b") / q.image.name) for q in questions]
    assert first == digest(questions[::-1], truth[::-1]) == digest(moved, truth)
    other = digest([*questions[:2], Question(2, "What is 2 ?", Path("a/2.png"))], truth)
    changed = digest(questions, [*truth[:2], {"question_id": 2, "answer": "3"}])
    assert other["questions"] != first["questions"] == changed["questions"]
    assert other["ground_truth"] == first["ground_truth"] != changed["ground_truth"]
    assert digest(questions, None)["ground_truth"] is None


def test_a_run_that_goes_on_counts_its_own_questions(evaluated, tmp_path):
    for flags, answered in ((["--limit", "2"], 2), ([], len(items_of(evaluated)[0]) - 2), ([], 0)):
        evaluate(evaluated / "model", evaluated / "data", tmp_path, *flags)
        result = json.loads((tmp_path / "scenes" / "full" / "result.json").read_text())
        assert result["questions_answered"] == answered and (result["questions_per_second"] is None) == (not answered)


def report(out, *arguments):
    code = cli.main(["report", *map(str, arguments), "--out", str(out)])
    return code, json.loads((out / "report.json").read_text()) if code == 0 else None


def both(folder):
    return [f"{name}={folder / name}" for name in "ab"]


def compared(tmp_path, first, second, *flags, out="page", benchmark="scenes"):
    """Report on two runs with these marks."""
    for name, marks in (("a", first), ("b", second)):
        if not (tmp_path / name).exists():
            write_run(tmp_path / name, marks, benchmark)
    code, found = report(tmp_path / out, *both(tmp_path), *flags)
    assert code == 0
    return found["benchmarks"][benchmark]


class Reader(HTMLParser):
    """A page as a browser sees it: tags, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "style")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.text.append(data)


def test_pages_show_scores_intervals_and_differing_questions(evaluated, tmp_path):
    code, found = report(tmp_path / "page", f"one={evaluated / 'run0'}", f"two={evaluated / 'run1'}")
    assert code == 0
    scenes = found["benchmarks"]["scenes"]
    runs = results(evaluated)
    for label, result in zip(("one", "two (image blanked)"), runs, strict=True):
        assert scenes["runs"][label]["rows"] == result["rows"]
        means = {line["group"]: line["means"][label]["mean"] for line in scenes["lines"]}
        assert means.pop("all questions") == pytest.approx(result["scores"]["overall"]["accuracy"])
        assert means == pytest.approx({n: e["mark"] for n, e in result["breakdown"]["category"].items()})
    (pair,) = scenes["pairs"]
    first, second = items_of(evaluated)
    differing = {a["item"] for a, b in zip(first, second, strict=True) if a["values"] != b["values"]}
    assert pair["differing"] == len(differing) > 2 and set(pair["shown"]) <= differing
    reader = Reader((tmp_path / "page" / "report.html").read_text())
    assert "script" not in reader.tags and "link" not in reader.tags
    assert all(address.startswith("data:image/jpeg;base64,") for address in reader.addresses)
    files = list((tmp_path / "page" / "pictures").iterdir())
    assert len(reader.addresses) == len(pair["shown"]) == len(files)
    assert base64.b64decode(reader.addresses[0].split(",")[1])[:2] == b"\xff\xd8"
    text = (tmp_path / "page" / "report.md").read_text()
    assert all(f"pictures/{file.name})" in text for file in files)
    assert f"{100 * runs[0]['scores']['overall']['accuracy']:.1f}" in text


def test_the_same_runs_give_the_same_page_and_do_not_differ(evaluated, tmp_path):
    sources = [f"{name}={evaluated / 'run0'}" for name in ("one", "same")]
    found = report(tmp_path / "a", *sources)[1]
    assert found == report(tmp_path / "b", *sources)[1]
    for name in ("report.html", "report.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    scenes = found["benchmarks"]["scenes"]
    assert scenes["pairs"][0]["differing"] == 0
    for line in scenes["lines"]:
        assert line["differences"]["same"].items() >= {"mean": 0, "low": 0, "high": 0, "p": 1}.items()


def write_run(folder, marks, benchmark="scenes", answers=None, prompts=None, **result):
    """Write a result folder with one item a mark."""
    items = [
        {
            "item": str(index),
            "question_id": index,
            "values": value if isinstance(value, dict) else {"mark": value},
            "groups": {"category": ["even" if index % 2 == 0 else "odd"]},
            "prompt": (prompts or {}).get(index, f"Question {index}?"),
            "image": f"images/{index}.png",
            "answer": (answers or {}).get(index, "yes"),
            "expected": "yes",
        }
        for index, value in enumerate(marks)
    ]
    write_rows(folder / "items.jsonl", items)
    condition = {"name": "full", "title": "ToVE", "blank_image": False, "detach": []}
    whole = {"benchmark": benchmark, "model": "models/m", "rows": {"overall": [50.0, len(items)]}, "count": len(items)}
    whole |= {"condition": condition, "data": {"questions": "q"}, "data_root": str(folder / "data"), **result}
    (folder / "result.json").write_text(json.dumps(whole))
    return folder


HARMLESS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "ul", "li", "table", "thead"}
HARMLESS |= {"tbody", "tr", "th", "td", "details", "summary", "img"}
NASTY = "<script>alert(1)</script> | [x](javascript:alert(1)) ![y](http://evil/z.png) `a` **b**\n# c & </td>"


def test_answers_cannot_write_the_page(tmp_path):
    write_run(tmp_path / "a", [1, 0], answers={0: NASTY}, prompts={0: NASTY})
    write_run(tmp_path / "b", [0, 1], answers={0: NASTY}, prompts={0: NASTY}, model=f"m/{NASTY}")
    assert report(tmp_path / "page", f"{NASTY.replace('=', '')}={tmp_path / 'a'}", tmp_path / "b")[0] == 0
    reader = Reader((tmp_path / "page" / "report.html").read_text())
    assert set(reader.tags) <= HARMLESS
    assert not reader.addresses  # there is no image file, and nothing else may be fetched
    assert sum(NASTY in text for text in reader.text) >= 3
    lines = (tmp_path / "page" / "report.md").read_text().split("\n")
    tables = [line for line in lines if line.startswith("| ")]
    assert any("alert" in line for line in tables)
    for line in tables:
        bare = line.replace("\\\\", "").replace("\\|", "")
        assert "<script" not in line.replace("\\<script", "") and "](javascript" not in line.replace("\\](", "")
        assert bare.count("|") in {bare.count("|") for bare in tables}


@given(st.text(max_size=60))
def test_markdown_texts_hold_no_markup(text):
    shown = escape_markdown(text)
    assert "\n" not in shown
    unescaped = shown.replace("\\\\", "")
    for mark in "*_[]<>|`#":
        assert unescaped.count(mark) == unescaped.count(f"\\{mark}")


def test_images_come_only_from_the_data_folder(tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    Image.new("RGB", (400, 200), "red").save(data / "images" / "0.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "secret.png")
    (data / "images" / "1.png").write_bytes(b"not an image")
    for name, marks in (("a", [1, 1, 1]), ("b", [0, 0, 0])):
        file = write_run(tmp_path / name, marks) / "items.jsonl"
        rows = read_rows(file)
        rows[2]["image"] = "../secret.png"
        write_rows(file, rows)
    compared(tmp_path, [], [], "--data-root", data)
    reader = Reader((tmp_path / "page" / "report.html").read_text())
    (address,) = reader.addresses
    (file,) = (tmp_path / "page" / "pictures").iterdir()
    assert base64.b64decode(address.split(",")[1]) == file.read_bytes()
    with Image.open(file) as image:
        assert image.size == (160, 80)
    text = " ".join(reader.text)
    assert "leads out of the image folder" in text and "is not a" in text
    compared(tmp_path, [], [], "--thumbnail", "0", out="bare")
    assert not list((tmp_path / "bare" / "pictures").iterdir())


def test_shown_questions_are_of_both_kinds_and_spread(tmp_path):
    first, second = [1] * 50 + [0] * 40 + [1] * 10, [0] * 50 + [1] * 40 + [1] * 10
    (pair,) = compared(tmp_path, first, second, "--differences", "10")["pairs"]
    worse = [name for name in pair["shown"] if int(name) < 50]
    assert pair["differing"] == 90 and len(pair["shown"]) == 10 and worse == ["0", "10", "20", "30", "40"]
    (pair,) = compared(tmp_path, first, second, "--differences", "200", out="all")["pairs"]
    assert len(pair["shown"]) == 90
    (pair,) = compared(tmp_path / "rare", first, [0] * 2 + [1] * 98, "--differences", "10")["pairs"]
    shown = pair["shown"]
    assert len(shown) == 10 and sum(int(name) < 2 for name in shown) == 2  # the rarer kind is whole


def test_only_the_same_questions_are_paired(tmp_path):
    write_run(tmp_path / "b", [0, 0, 0], prompts={1: "Another question?"}, data={"questions": "other"}, limit=3)
    scenes = compared(tmp_path, [1, 1, 1, 1], [])
    assert (scenes["pairs"][0]["shared"], scenes["pairs"][0]["left_out"]) == (2, 2)
    line = next(line for line in scenes["lines"] if line["group"] == "all questions")
    assert line["differences"]["b"]["count"] == 2 and line["means"]["a"]["count"] == 4
    assert any("different questions" in note for note in scenes["notes"])
    assert any("--limit" in note for note in scenes["notes"])


def test_captions_get_intervals_over_images(tmp_path):
    values, better = ([{"Bleu_4": 0.1 * i, "CIDEr": 0.01 * i * i + more} for i in range(12)] for more in (0, 0.3))
    captions = compared(tmp_path, values, better, benchmark="coco_caption")
    lines = {line["metric"]: line for line in captions["lines"] if not line["level"]}
    cider = lines["CIDEr"]["differences"]["b"]
    assert cider["mean"] == pytest.approx(0.3) and cider["test"] == "bootstrap"
    assert lines["Bleu_4"]["differences"]["b"]["p"] == 1 and captions["pairs"][0]["differing"] == 12


def test_holm_families_are_the_page_and_each_level(tmp_path):
    for name in ("scenes", "pope"):
        write_run(tmp_path / "a" / name, [0] * 10 + [1] * 10, name)
        write_run(tmp_path / "b" / name, [1] * 10 + [1] * 10, name)
    _, found = report(tmp_path / "page", *both(tmp_path))
    for section in found["benchmarks"].values():
        for line in section["lines"]:
            difference = line["differences"]["b"]
            assert difference["p_holm"] == pytest.approx(min(1, 2 * difference["p"]))  # two benchmarks, two groups


def test_a_score_without_items_has_no_interval(tmp_path):
    write_run(tmp_path / "a", [1, 0])
    (tmp_path / "a" / "items.jsonl").unlink()
    scenes = compared(tmp_path, [], [1, 0])
    assert not scenes["pairs"] and any("no interval" in note for note in scenes["notes"])
    assert all(set(line["means"]) == {"b"} for line in scenes["lines"])


ITEM = '{"item": 1, "values": {"mark": 1}, "groups": {}}'


def with_text(name, text):
    return lambda folder: (folder / name).write_text(text)


def with_result(**entries):
    return lambda folder: write_run(folder, [1, 0], **entries)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "result.json").unlink(), "has no result.json"),
        (with_text("result.json", '{"benchmark": "sce'), "not valid JSON"),
        (with_text("result.json", "[]"), "was it written by"),
        (with_result(rows=None), "no 'rows'"),
        (with_result(rows={"x": "y"}), "a value and a number"),
        (with_result(condition={}), "a name and a title"),
        (with_text("items.jsonl", '{"item": 1}\n'), "line 1: the key 'values' is missing"),
        (with_text("items.jsonl", f"{ITEM}\n{ITEM[:-5]}"), "line 2: not valid JSON"),
        (with_text("items.jsonl", ITEM.replace("1}", '"x"}')), "each a number"),
        (with_text("items.jsonl", ITEM.replace("1}", "NaN}")), "line 1: not valid JSON (NaN"),
        (with_text("items.jsonl", f"{ITEM}\n" * 2), "line 2: '1' occurs twice"),
        (with_text("items.jsonl", ITEM.replace("{}", '{"a": "b"}')), "lists of groups"),
    ],
)
def test_malformed_results_are_refused(tmp_path, capsys, spoil, message):
    spoil(write_run(tmp_path / "a", [1, 0]))
    assert report(tmp_path / "page", tmp_path / "a")[0] == 2
    assert message in capsys.readouterr().err and not (tmp_path / "page").exists()


def test_wrong_arguments_are_refused(tmp_path, capsys):
    run = write_run(tmp_path / "a", [1, 0])

    def refused(*arguments):
        assert cli.main(["report", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    out = tmp_path / "page"
    assert "no run is called 'x'" in refused(run, "--out", out, "--baseline", "x")
    assert "give them names" in refused(run, write_run(tmp_path / "b", [1, 0]), "--out", out)
    assert "--out" in refused(run)
    assert "no result of benchmark gqa" in refused(run, "--out", out, "--benchmark", "gqa")
    assert "no published figures of 'gpt'" in refused(run, "--out", out, "--published", "gpt")
    assert "--resamples" in refused(run, "--out", out, "--resamples", "3")
    out.mkdir()
    assert "exists already" in refused(run, "--out", out)
    assert not list(tmp_path.glob(".page*"))


def labels_of(name):
    known = {"coco_caption": set(METRICS), "mmvet": {"total"}, "llava_bench": {"all"}}  # their tests have these labels
    more = {"perception (points)", "cognition (points)"} if name == "mme" else set()
    return known[name] if name in known else set(scored(name)[0].rows) | more


@pytest.mark.parametrize("model", read_published().values(), ids=lambda model: model.key)
def test_published_figures_stand_under_the_scorers_labels(model):
    assert model.url.startswith("https://") and model.arxiv[:4].isdigit() and model.source and model.paper
    for name, figures in model.scores.items():
        assert name in BENCHMARKS
        assert set(figures) <= labels_of(name), f"{name} has no such row"
        assert all(0 < value < (2000 if name == "mme" else 200) for value in figures.values())


def test_published_figures_are_listed_marked_and_apart(tmp_path, capsys):
    assert cli.main(["report", "--list-published"]) == 0
    assert "llava-1.5-7b " in capsys.readouterr().out
    write_run(tmp_path / "a", [1, 0], "gqa")
    report(tmp_path / "page", f"mine={tmp_path / 'a'}")
    text = (tmp_path / "page" / "report.md").read_text()
    assert "### Published figures, not measured here" in text
    (table,) = [part for part in text.split("\n\n") if "LLaVA-1.5 7B (published)" in part]
    assert "mine" not in table and "62" in table and "arXiv 2310.03744" in table
    report(tmp_path / "none", f"mine={tmp_path / 'a'}", "--published", "none")
    assert "published" not in (tmp_path / "none" / "report.md").read_text().lower()
