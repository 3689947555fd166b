"""Small samples with numbers worked out by hand, and the golden sets.

The golden sets lie next to the repository.
"""

import importlib.util
import json
import random
import shutil

import pytest
from score_parts import SAMPLES, differences, read_rows, refuse, sample, score, truth_file, write_rows

from tove_llava import cli
from tove_llava.eval.benchmarks import BENCHMARKS, get_benchmark
from tove_llava.eval.benchmarks.scienceqa import option_index
from tove_llava.eval.benchmarks.scienceqa import parse_answer as parse_scienceqa
from tove_llava.eval.normalisation import flatten, normalise_evalai, normalise_vqa, strip_punctuation

CAPTIONS = ("coco_caption", "nocaps")
JUDGED = ("llava_bench", "mmvet")
PLAIN = [name for name in BENCHMARKS if name not in CAPTIONS + JUDGED]

needs_java = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="caption metrics need pycocoevalcap and Java",
)


def test_every_benchmark_has_a_sample():
    assert sorted(folder.name for folder in SAMPLES.iterdir()) == list(BENCHMARKS)


@pytest.mark.parametrize("name", PLAIN)
def test_sample(capsys, name):
    answers, truth, expected = sample(name)
    got = score(capsys, name, answers, truth)
    assert got["benchmark"] == name and not differences(got, expected, 1e-9)


@needs_java
@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTIONS)
def test_caption_sample(capsys, name):
    answers, truth, expected = sample(name)
    got = score(capsys, name, answers, truth)
    assert not differences(got, expected, 1e-6)
    assert "SPICE" in got["unavailable"] and "SPICE" not in got["scores"]


@pytest.mark.parametrize("name", PLAIN)
def test_order_of_answers_does_not_matter_and_the_last_of_two_counts(capsys, tmp_path, name):
    answers, truth, _ = sample(name)
    want = score(capsys, name, answers, truth)
    last = {(row["question_id"], row["prompt"]): row for row in read_rows(answers)}
    early = [{**row, "text": "nonsense"} for row in last.values()]
    shuffled = random.Random(0).sample(list(last.values()), len(last))  # test_eval_properties.py draws more orders
    got = score(capsys, name, write_rows(tmp_path / "predictions.jsonl", [*early, *shuffled]), truth)
    assert not differences(got["scores"], want["scores"], 1e-12) and got["count"] == want["count"]
    assert len(got["duplicated"]) >= 1 and set(got["unanswered"]) == set(want["unanswered"])


@pytest.mark.parametrize("name", PLAIN)
def test_a_missing_answer_stays_in_the_count(capsys, tmp_path, name):
    answers, truth, _ = sample(name)
    want = score(capsys, name, answers, truth)
    file = write_rows(tmp_path / "predictions.jsonl", read_rows(answers)[-2:-1])
    got = score(capsys, name, file, truth)
    assert got["count"] == want["count"] and got["unanswered"]
    # The human-readable form names them.
    assert cli.main(["score", "--benchmark", name, "--predictions", str(file), "--ground-truth", str(truth)]) == 0
    assert f"{len(got['unanswered'])} questions without an answer" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*PLAIN, *JUDGED])
def test_ground_truth_of_another_benchmark_is_refused(capsys, name):
    same = {"vqav2", "okvqa"}, {"mmbench", "mmbench_cn"}
    for other in BENCHMARKS:
        if other == name or any({name, other} <= pair for pair in same):
            continue
        message = refuse(capsys, name, SAMPLES / name / "predictions.jsonl", truth_file(SAMPLES / other))
        assert truth_file(SAMPLES / other).name in message or "another benchmark's" in message, (other, message)


@pytest.mark.parametrize("name", [*PLAIN, *JUDGED])
def test_bad_files_are_refused(capsys, tmp_path, name):
    answers, truth, _ = sample(name)
    empty, cut = tmp_path / "empty.jsonl", tmp_path / "cut.jsonl"
    empty.write_text("\n")
    assert "holds no answers" in refuse(capsys, name, empty, truth)
    lines = answers.read_bytes().split(b"\n")
    cut.write_bytes(b"\n".join([*lines[:-1], lines[0][:30]]))
    assert f"cut.jsonl, line {len(lines)}: not valid JSON" in refuse(capsys, name, cut, truth)
    cut.write_bytes(b"\n".join([*lines[:-1], '{"question_id": 1, "text": "é'.encode()[:-1]]))
    assert f"cut.jsonl, line {len(lines)}: not UTF-8" in refuse(capsys, name, cut, truth)
    nothing = tmp_path / f"nothing{truth.suffix}"
    nothing.write_text("" if truth.suffix == ".jsonl" else "{}")
    assert str(nothing) in refuse(capsys, name, answers, nothing)


def test_texts_with_other_line_ends_are_read_and_half_surrogates_refused(capsys, tmp_path):
    answers, truth, _ = sample("textvqa")
    rows = read_rows(answers)
    rows[0]["text"] = "a\u2028b\x85c \U0001f600"
    line = json.dumps(rows[0]).replace("\\u2028", "\u2028").replace("\\u0085", "\x85")
    got = score(capsys, "textvqa", write_rows(tmp_path / "predictions.jsonl", [line, rows[1]]), truth)
    assert got["per_item"][0]["normalized_prediction"] == "b c \U0001f600"  # the article went
    rows[1]["text"] = "a \ud83d"
    broken = write_rows(tmp_path / "half.jsonl", [line, json.dumps(rows[1])])
    assert "half.jsonl, line 2: not valid JSON (half of a surrogate pair" in refuse(capsys, "textvqa", broken, truth)


@pytest.mark.parametrize(
    ("name", "rule", "values"),
    [
        # LLaVA's conversion drops the comma and lower-cases before the official program sees the answer.
        ("vqav2", "llava", {"overall": 30.0}),
        # Letters are drawn where none is read.
        ("mmmu", "random", {"accuracy": 2.0 / 3}),
        ("docvqa", "lmms_eval", {"anls": 0.375}),
        ("vizwiz", "api", {"accuracy": 1.0 / 3, "unanswerability": {"f1_percent": 100.0}}),
    ],
)
def test_other_rules_are_named(capsys, name, rule, values):
    answers, truth, _ = sample(name)
    got = score(capsys, name, answers, truth, "--rule", rule)
    assert got["rule"] == rule and not differences(got["scores"], values, 1e-9)
    assert score(capsys, name, answers, truth)["rule"] == next(iter(get_benchmark(name).rules))


def test_an_unknown_rule_is_refused(capsys):
    files = sample("vqav2")[:2]
    assert "no rule 'mine'; rules: official, llava" in refuse(capsys, "vqav2", *files, "--rule", "mine")
    assert "it has only one" in refuse(capsys, "gqa", *files, "--rule", "mine")


SHORT = "Answer the question using a single word or phrase."


def test_one_odd_prompt_of_textvqa_spoils_no_other(capsys, tmp_path):
    asked = {"i1": "What does\nit say?", "i2": "Who\nis it?", "i3": "Where?", "i4": "Why?", "i5": "When\n?"}
    records = [{"image_id": key, "question": text, "answers": ["stop"] * 10} for key, text in asked.items()]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"data": records}))
    prompts = {
        "i1": f"{asked['i1']}\nReference OCR token: ST\nOP, A\n{SHORT}",
        "i2": f"{asked['i2']}\n{SHORT}",
        "i3": f"Reference OCR token: ST\nOP\nWhere?\n{SHORT}",
        "i4": "Why?",
        "i5": "OCR tokens: ST\nOP. Question: When\n? Short answer:",
    }
    rows = [{"question_id": key, "prompt": text, "text": "stop"} for key, text in prompts.items()]
    got = score(capsys, "textvqa", write_rows(tmp_path / "p.jsonl", rows), truth)
    assert got["scores"]["accuracy"] == 4 / 5 and got["unanswered"] == got["unknown"] == ["i4"]
    assert "read back from the prompt" in refuse(capsys, "textvqa", write_rows(tmp_path / "p.jsonl", rows[3:4]), truth)


@pytest.mark.parametrize("name", PLAIN)
def test_answers_that_cannot_be_read_are_counted_apart_from_wrong_ones(capsys, tmp_path, name):
    answers, truth, _ = sample(name)
    rows = list({(row["question_id"], row["prompt"]): row for row in read_rows(answers)}.values())
    known = [row for row in rows if row["question_id"] not in score(capsys, name, answers, truth)["unknown"]]
    bad = write_rows(tmp_path / "predictions.jsonl", [{**row, "text": " "} for row in known[:1]] + known[1:])
    got = score(capsys, name, bad, truth)
    assert got["unparsed"] == len(got["unparsed_ids"]) >= 1 and not set(got["unparsed_ids"]) & set(got["unanswered"])
    assert cli.main(["score", "--benchmark", name, "--predictions", str(bad), "--ground-truth", str(truth)]) == 0
    table = capsys.readouterr().out
    assert "answers not read" in table and f"{got['unparsed']} answers that the rule could not read" in table


def test_vsr_missing_answers_are_not_unparsed_ones(capsys, tmp_path):
    answers, truth, _ = sample("vsr")
    got = score(capsys, "vsr", write_rows(tmp_path / "predictions.jsonl", read_rows(answers)[1:3]), truth)
    assert got["unanswered"] == [0, 3] and got["unparsed"] == 1


def test_mme_takes_the_lines_of_an_image_two_by_two(capsys, tmp_path):
    answers = ["yes", "yes", "yes", "no"]  # all right but the last
    rows = [{"question_id": "count/1.jpg", "prompt": f"{i}", "text": text} for i, text in enumerate(answers)]
    truth = [{"category": "count", "image": "1.jpg", "question": f"{i}", "answer": "Yes"} for i in range(4)]
    got = score(capsys, "mme", write_rows(tmp_path / "p.jsonl", rows), write_rows(tmp_path / "t.jsonl", truth))
    assert got["scores"]["subtasks"]["count"]["score"] == 75 + 50
    assert "perception" in got["unavailable"] and "perception" not in got["scores"]


# The golden sets: benchmark, folder, tolerance, and the entries of expected.json that must be met.
GOLDEN = [
    ("vqav2", "vqav2", 1e-6, ("scores", "count", "per_item")),
    ("gqa", "gqa", 1e-6, ("scores", "detailed", "per_item", "count_balanced", "count_all")),
    ("vizwiz", "vizwiz", 1e-9, ("scores", "count", "count_per_answer_type", "per_item")),
    ("textvqa", "textvqa", 1e-9, ("scores", "count", "per_item")),
    ("pope", "pope", 1e-9, ("scores", "count", "mean_of_categories", "per_item")),
    ("mme", "mme", 1e-6, ("scores", "count", "per_item")),
    ("mmbench", "mmbench", 1e-9, ("scores", "count_questions", "count_rows", "per_question_hit", "per_row_parsed")),
    ("mmbench", "mmbench", 1e-9, ("extra",)),
    ("mmbench_cn", "mmbench", 1e-9, ("scores",)),
    ("seed", "seed_bench", 0.005, ("scores", "count", "count_per_type", "correct", "per_item")),
    ("vsr", "vsr", 5e-5, ("scores", "rows_without_meta_category", "unparsed", "per_item")),
]


def golden(capsys, conformance, name, folder, *flags):
    """Return a golden set's measured numbers, its expected ones and its folder."""
    place = conformance / "eval" / folder
    got = score(capsys, name, place / "predictions.jsonl", truth_file(place), *flags)
    return got, json.loads((place / "expected.json").read_text()), place


@pytest.mark.parametrize(("name", "folder", "tolerance", "entries"), GOLDEN)
def test_golden(capsys, conformance, name, folder, tolerance, entries):
    got, expected, _ = golden(capsys, conformance, name, folder)
    for entry in entries:
        assert not differences(got[entry], expected[entry], tolerance)


def test_golden_scienceqa(capsys, conformance):
    got, expected, place = golden(capsys, conformance, "scienceqa", "scienceqa")
    assert not differences(got, {key: expected[key] for key in ("scores", "per_item")}, 1e-9)
    real = json.loads((place / "real_model_expected.json").read_text())["per_item"]
    rows = read_rows(place / "real_model_outputs.jsonl")
    assert len(rows) == len(real)
    for row in rows:
        letter, want = parse_scienceqa(row["text"]), real[row["question_id"]]
        assert (letter, option_index(letter, 5)) == (want["parsed"], want["index_with_5_options"])


def test_golden_seed_with_missing_answers(capsys, conformance):
    place = conformance / "eval" / "seed_bench"
    expected = json.loads((place / "expected.json").read_text())["scores_incomplete_predictions"]
    got = score(capsys, "seed", place / "predictions_incomplete.jsonl", truth_file(place))
    types = got["scores"]["per_type_percent"]
    assert not differences(types, {key: value for key, value in expected.items() if key in types}, 0.005)
    assert abs(got["scores"]["total_percent"] - expected["Total accuracy"]) <= 0.005
    assert got["count"] == 215 and got["unanswered"]


def test_golden_mme_real_answers_in_any_order(capsys, conformance, tmp_path):
    place = conformance / "eval" / "mme"
    rows = read_rows(place / "real_lavin_rows.jsonl")
    expected = json.loads((place / "real_lavin_expected.json").read_text())
    answers = [
        {"question_id": f"{row['category']}/{row['image']}", "prompt": f"q{row['pair_position']}", "text": row["text"]}
        for row in rows
    ]
    truth = [{**row, "question": f"q{row['pair_position']} Please answer yes or no."} for row in rows]
    file = write_rows(tmp_path / "truth.jsonl", truth)
    for order in (0, 1):
        if order:
            random.Random(order).shuffle(answers)
        got = score(capsys, "mme", write_rows(tmp_path / "answers.jsonl", answers), file)
        assert not differences(got, {key: expected[key] for key in ("scores", "count")}, 1e-6)


def test_mme_pairs_by_position_where_prompts_are_the_same(capsys, tmp_path):
    answers, truth, expected = sample("mme")
    file, rows = tmp_path / "predictions.jsonl", read_rows(answers)
    same = [{**row, "prompt": "p"} for row in rows]
    got = score(capsys, "mme", write_rows(file, same), truth)
    assert not differences(got, expected, 1e-9)
    swapped = [rows[1], rows[0], *rows[2:]]  # by position this would exchange two answers
    assert score(capsys, "mme", write_rows(file, swapped), truth)["scores"] == got["scores"]
    assert "another benchmark's" in refuse(capsys, "mme", write_rows(file, same[:-1]), truth)


def test_golden_other_rules(capsys, conformance):
    got, expected, _ = golden(capsys, conformance, "vqav2", "vqav2", "--rule", "llava")
    other = expected["alternatives"]["official_after_llava_submission_conversion"]
    assert not differences(got["scores"], other, 0.005)
    got, expected, _ = golden(capsys, conformance, "vizwiz", "vizwiz", "--rule", "api")
    other = expected["alternatives"]["vizwiz_api_raw_text"]
    assert abs(100 * got["scores"]["accuracy"] - other["accuracy_percent"]["overall"]) <= 0.005
    detection = got["scores"]["unanswerability"]
    assert abs(detection["average_precision_percent"] - other["unanswerability"]["average_precision"]) <= 0.005
    assert abs(detection["f1_percent"] - other["unanswerability"]["f1_score"]) <= 0.005
    per_item = {key: 100 * value for key, value in got["per_item"].items()}
    assert not differences(per_item, other["per_item"], 0.005)


@needs_java
@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTIONS)
def test_golden_captions(capsys, conformance, name):
    got, expected, place = golden(capsys, conformance, name, name)
    alternatives = expected.pop("alternatives", None)
    assert not differences(got, expected, 1e-6)
    assert not differences(got["tokenized"], json.loads((place / "tokenized.json").read_text()), 0)
    if alternatives:
        other, *_ = golden(capsys, conformance, name, name, "--rule", "means")
        means = alternatives["mean_of_per_image_scores_from_the_full_run"]
        assert other["rule"] == "means" and not differences(other["domains"], means, 1e-6)


def test_golden_normalisation(conformance):
    def rows(name):
        return read_rows(conformance / "eval" / name / "normalization.jsonl")

    for row in rows("vqav2"):
        assert strip_punctuation(flatten(row["input"])) == row["after_punctuation"]
        assert normalise_vqa(flatten(row["input"])) == row["normalized"]
    for row in rows("textvqa"):
        assert normalise_evalai(row["input"]) == row["normalized"]
