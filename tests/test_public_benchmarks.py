"""Benchmarks in their released files: golden sets, several images, pairs, and bad records named."""

import json

import public_layouts
import pytest
from score_parts import SAMPLES, differences, read_rows, refuse, sample, score, truth_file, write_rows

from tove_llava.core.errors import DataError
from tove_llava.eval.benchmarks import get_benchmark

CHOICES = ("cv_bench", "mmvp", "realworldqa", "blink", "mmstar", "ai2d")


ANSWERS = ("chartqa", "docvqa", "infovqa", "ocrbench", "hallusionbench", "mmmu", "mmmu_pro")
UNREAD = {"blink": "needs_judge", "hallusionbench": "unclear", "mmmu": "fallback_rows", "mmmu_pro": "fallback_rows"}


@pytest.mark.parametrize("name", CHOICES + ANSWERS)
def test_golden(capsys, conformance, name):
    place = conformance / "eval" / name
    expected = json.loads((place / "expected.json").read_text())
    got = score(capsys, name, place / "predictions.jsonl", truth_file(place))
    assert not differences(got["scores"], expected["scores"], 1e-9) and got["count"] == expected["count"]
    items = expected["per_item"].items()
    right = {key: float(item["correct"] if isinstance(item, dict) else item) for key, item in items}
    assert got["per_item"] == pytest.approx(right, abs=1e-9)
    if name in UNREAD:
        empty = {row["question_id"] for row in read_rows(place / "predictions.jsonl") if not row["text"].strip()}
        assert set(expected[UNREAD[name]]) <= set(got["unparsed_ids"]) <= {*expected[UNREAD[name]], *empty}
    if name == "ai2d":  # the images without masks
        files = (place / "predictions_no_mask.jsonl", place / "ground_truth_no_mask.jsonl")
        assert not differences(score(capsys, name, *files)["scores"], expected["no_mask"]["scores"], 1e-9)


@pytest.mark.parametrize(
    ("name", "rule", "other"),
    [("docvqa", "lmms_eval", None), ("infovqa", "lmms_eval", None), ("mmmu", "random", "authors_seed_42")],
)
def test_golden_by_another_rule(capsys, conformance, name, rule, other):
    place = conformance / "eval" / name
    expected = json.loads((place / "expected.json").read_text())["rules"][other or rule]
    got = score(capsys, name, place / "predictions.jsonl", truth_file(place), "--rule", rule)
    assert not differences(got["scores"], expected["scores"], 1e-9)


@pytest.mark.parametrize("name", [*CHOICES, "mmmu", "mmmu_pro"])
def test_a_record_that_lacks_a_column_is_named(capsys, tmp_path, name):
    answers, truth, _ = sample(name)
    first, second, *_ = read_rows(truth)
    for column in get_benchmark(name).columns:
        broken = {key: value for key, value in second.items() if key != column}
        message = refuse(capsys, name, answers, write_rows(tmp_path / "truth.jsonl", [first, broken]))
        assert f"truth.jsonl, record 2: the key '{column}' is missing" in message


OUTSIDE = "the answer '(F)' is no option; its letters: A, B"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("cv_bench", {"answer": "(F)"}, OUTSIDE),
        ("cv_bench", {"choices": ["3"]}, "'choices' must be a list of 2 to 26 texts"),
        ("cv_bench", {"idx": "x"}, "'idx' must be a whole number"),
        ("cv_bench", {"source": "Flickr"}, "'source' must be ADE20K, COCO or Omni3D"),
        ("mmvp", {"Correct Answer": "(F)"}, OUTSIDE),
        ("mmvp", {"Options": "Open Closed"}, "no option; its letters: none"),
        ("mmvp", {"Index": None}, "'Index' must be a whole number"),
        ("realworldqa", {"options": []}, "RealWorldQA has no column 'options'"),
        ("blink", {"answer": "(F)"}, OUTSIDE),
        ("blink", {"idx": "test_Counting_1"}, "'idx' must be like 'val_Counting_1'"),
        ("mmstar", {"answer": "F"}, "'answer' must be A, B, C or D"),
        ("ai2d", {"answer": "4"}, "the answer '4' is no index of an option; there are 4"),
        ("ai2d", {"answer": "B"}, "'answer' must be a whole number"),
        ("ai2d", {"options": "A, B"}, "'options' must be a list of 2 to 26 texts"),
        ("mmmu", {"answer": "F"}, "the answer 'F' is no option; its letters: A, B, C"),
        ("mmmu_pro", {"options": "A, B"}, "'options' must be a list of 2 to 26 texts"),
        *((name, {}, "is taken by") for name in ("cv_bench", "mmvp", "blink", "mmstar", "mmmu", "mmmu_pro")),
    ],
)
def test_a_wrong_record_is_named(capsys, tmp_path, name, change, words):
    answers, truth, _ = sample(name)
    first, second, *_ = read_rows(truth)
    rows = [first, {**second, **change} if change else first]
    message = refuse(capsys, name, answers, write_rows(tmp_path / "truth.jsonl", rows))
    assert "truth.jsonl, record 2: " in message and words in message


def test_all_images_of_a_question_are_asked_in_order_and_a_bad_one_is_named(tmp_path):
    public_layouts.blink(tmp_path)
    first, second, *_ = get_benchmark("blink").questions(tmp_path)
    assert (len(first.images), len(second.images)) == (1, 2)
    file = tmp_path / "blink" / "Counting" / "val-00000-of-00001.parquet"
    row = {"idx": "val_Counting_1", "prompt": "Which?", "choices": ["x", "y"], "answer": "(A)"}
    public_layouts.parquet(file, {**row, "image_1": public_layouts.embedded(), "image_2": {"bytes": b"no", "path": ""}})
    question = get_benchmark("blink").questions(tmp_path)[0]
    with pytest.raises(DataError, match="Counting/val-00000-of-00001.parquet, record 1, image_2 is not an image"):
        [image.open() for image in question.images]


def test_other_files_of_a_release_hold_the_same_questions(tmp_path):
    row = {"Question": "Open?", "Options": "(a) None (b) Some", "Correct Answer": "(a)"}
    public_layouts.parquet(tmp_path / "mmvp" / "data" / "train-0.parquet", {**row, "Index": 1}, {**row, "Index": 2})
    mmvp = get_benchmark("mmvp")
    assert [question.text for question in mmvp.questions(tmp_path)][0].startswith("Open? Options:\nA. None\nB. Some\n")
    public_layouts.mmvp(tmp_path)
    assert len(mmvp.limited(mmvp.questions(tmp_path), 1)) == 2, "a limit keeps pairs"
    public_layouts.mmstar(tmp_path)
    (whole,) = get_benchmark("mmstar").questions(tmp_path)
    (tmp_path / "mmstar" / "mmstar.parquet").unlink()
    cells = {"index": "0", "question": '"Which?\nOptions: A: x, B: y"', "answer": "B", "image": "x", "bench": "MMStar"}
    cells |= {"category": "math", "l2_category": "geometry"}
    (tmp_path / "mmstar" / "MMStar.tsv").write_text("\t".join(cells) + "\n" + "\t".join(cells.values()) + "\n")
    (sheet,) = get_benchmark("mmstar").questions(tmp_path)
    assert (sheet.question_id, sheet.text, dict(sheet.metadata)) == (0, whole.text, dict(whole.metadata))
    assert get_benchmark("mmstar").options(sheet) == {"A": "x", "B": "y"}


def test_a_half_pair_of_mmvp_is_named(capsys, tmp_path):
    answers, truth, _ = sample("mmvp")
    message = refuse(capsys, "mmvp", answers, write_rows(tmp_path / "truth.jsonl", read_rows(truth)[:3]))
    assert "question 99 has no other of its pair" in message


def test_one_of_cv_benchs_files_has_no_combined_score(capsys, tmp_path):
    answers, truth, _ = sample("cv_bench")
    rows = [row for row in read_rows(truth) if row["source"] != "Omni3D"]
    got = score(capsys, "cv_bench", answers, write_rows(tmp_path / "truth.jsonl", rows))
    assert got["scores"]["accuracy_2d"] == 0.5 and got["unavailable"].keys() == {"accuracy", "accuracy_3d"}


def test_hallusionbench_asks_without_an_image_and_limits_by_sets(tmp_path):
    public_layouts.hallusionbench(tmp_path)
    (tmp_path / "hallusionbench" / "HallusionBench.json").write_text(truth_file(SAMPLES / "hallusionbench").read_text())
    benchmark = get_benchmark("hallusionbench")
    asked = benchmark.questions(tmp_path)
    assert [len(question.images) for question in asked] == [1, 1, 1, 1, 0, 1]
    assert [question.question_id[:2] for question in benchmark.limited(asked, 3)] == ["VD"] * 4


def test_the_challenge_s_and_the_hub_s_files_hold_the_same_questions(tmp_path):
    docvqa, ocrbench = get_benchmark("docvqa"), get_benchmark("ocrbench")
    public_layouts.docvqa(tmp_path / "hub")
    record = {"questionId": 5, "question": "What?", "answers": ["red", "a red"], "data_split": "val"}
    file = tmp_path / "docvqa" / "val_v1.0_withQT.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"data": [{**record, "image": "documents/a.png"}]}))
    (question,) = docvqa.questions(tmp_path)
    assert question.image == tmp_path / "docvqa" / "documents" / "a.png"
    assert docvqa.ground_truth(tmp_path) == docvqa.ground_truth(tmp_path / "hub")
    assert question.key == docvqa.questions(tmp_path / "hub")[0].key

    public_layouts.ocrbench(tmp_path)
    row = {"dataset": "IIIT5K", "question": "What is written?", "question_type": "Regular Text Recognition"}
    file = tmp_path / "hub" / "ocrbench" / "data" / "test-00000-of-00001.parquet"
    public_layouts.parquet(file, {**row, "answer": ["stop"], "image": public_layouts.embedded()})
    assert ocrbench.ground_truth(tmp_path) == ocrbench.ground_truth(tmp_path / "hub")
