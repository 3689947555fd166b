import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_parts import SAMPLES, read_rows, refuse, truth_file, write_rows

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.eval.benchmarks import get_benchmark
from tove_llava.eval.benchmarks.pope import parse_answer
from tove_llava.eval.rules.exact_match import normalise


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *((text, "no") for text in ("No", "no, there is none.", "It is not there", "n,o")),
        *((text, "yes") for text in ("NO", "no!", "well\nno", "")),
        ("Yes. No.", "yes"),  # only up to the first full stop
    ],
)
def test_pope_rule(text, answer):
    assert parse_answer(text) == answer


POPE_TRUTH = [
    {"question_id": index, "label": "yes" if index % 2 else "no", "category": ("random", "popular")[index // 4]}
    for index in range(8)
]


@pytest.mark.parametrize("name", ["pope", "scenes"])
def test_unanswered_questions_are_named_and_wrong_and_the_last_of_two_answers_counts(name):
    truth = [{**row, "answer": row["label"]} for row in POPE_TRUTH]
    benchmark = get_benchmark(name)
    perfect = [{"question_id": row["question_id"], "text": row["label"]} for row in truth]
    label = {"pope": "mean accuracy", "scenes": "overall"}[name]
    whole = benchmark.score(perfect, truth)
    assert whole.rows[label][0] == 100
    for missing in range(8):
        score = benchmark.score(perfect[:missing] + perfect[missing + 1 :], truth)
        assert score.count == 8 and score.extras["unanswered"] == [missing] and score.rows[label][0] == 87.5
    score = benchmark.score([{"question_id": 0, "text": "yes"}, *perfect], truth)
    assert score.extras["duplicated"] == [0] and score.scores == whole.scores


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)
    assert normalise(text.upper().lower() + ".") == normalise(text.upper().lower())


@pytest.mark.parametrize(
    ("predictions", "truth", "words"),
    [
        (["[1, 2]"], None, "predictions.jsonl, line 1: a JSON object is needed"),
        (['{"question_id": 1}'], None, "the key 'text' is missing"),
        (['{"question_id": 1, "text": 5}'], None, "question 1 is not a string"),
        (['{"question_id": 77, "text": "yes"}'], None, "none of the predictions"),
        (None, ['{"question_id": 1, "answer": "yes", "category": "x"}'], "the key 'label' is missing"),
        (None, ['{"question_id": 1, "label": "maybe", "category": "x"}'], "must be yes or no"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, capsys, predictions, truth, words):
    p = write_rows(tmp_path / "predictions.jsonl", predictions or ['{"question_id": 1, "text": "yes"}'])
    t = write_rows(tmp_path / "truth.jsonl", truth or ['{"question_id": 1, "label": "yes", "category": "x"}'])
    assert words in refuse(capsys, "pope", p, t)


def spoil(name, folder, change):
    """Copy a benchmark's sample with ``change`` made to its first row of ground truth."""
    shutil.copytree(SAMPLES / name, folder)
    file = truth_file(folder)
    rows = read_rows(file) if file.suffix == ".jsonl" else json.loads(file.read_text())
    row = rows
    for key in () if file.suffix == ".jsonl" else INSIDE.get(name, ()):
        row = row[key]
    row = row[0] if isinstance(row, list) else row
    change(row)
    if file.suffix == ".jsonl":
        write_rows(file, rows)
    else:
        file.write_text(json.dumps(rows))
    return file


INSIDE = {
    "okvqa": ["annotations"],
    "textvqa": ["data"],
    "seed": ["questions"],
    "gqa": ["1"],
    "scienceqa": ["problems", "5"],
    "mmvet": ["v1_0"],
    "docvqa": ["data"],
}
CONSENSUS = [{}, None, [], "red", [None], [{}] * 10]
NONSENSE = [
    *((name, "answers", value) for name in ("vqav2", "okvqa", "vizwiz", "textvqa") for value in CONSENSUS),
    *((name, "answers", [{"answer": "red", "answer_id": 1}]) for name in ("vqav2", "okvqa", "vizwiz")),
    ("textvqa", "answers", ["red"] * 9),
    ("textvqa", "image_id", True),
    ("vizwiz", "answerable", 2),
    *(("pope", "label", value) for value in ("maybe", None, True, "")),
    *(("vsr", "label", value) for value in (2, -1, None, True, "1")),
    *(("mme", "answer", value) for value in ("maybe", None, "")),
    ("mme", "category", "weather"),
    ("gqa", "answer", None),
    ("gqa", "semantic", [None]),
    ("scenes", "answer", {}),
    *(("scienceqa", "answer", value) for value in (2, -1, None, True)),
    ("scienceqa", "choices", []),
    ("scienceqa", "choices", [None, "x"]),
    *(("seed", "answer", value) for value in ("E", "", None)),
    ("seed", "choice_a", None),
    ("seed", "question_type_id", 99),
    *(("mmbench", "answer", value) for value in ("D", "E", None)),
    ("mmbench", "B", None),
    ("mmbench", "index", 1.5),
    ("llava_bench", "category", "weather"),
    ("mmvet", "answer", {}),
    *(("chartqa", key, value) for key, value in (("type", "test"), ("answer", 7), ("question", " "))),
    *(("docvqa", "answers", value) for value in ([], "red", None, [7])),
    *(("docvqa", "questionId", value) for value in ("x1", None, True)),
    *(("ocrbench", key, value) for key, value in (("type", "Weather"), ("answers", []), ("answers", ["a", 7]))),
    *(("mmmu", "options", value) for value in ("['a']", "A, B", None, "['a', 7]", "[" * 9999)),
    *(("mmmu", key, value) for key, value in (("answer", "D"), ("id", "validation_Weather_1"), ("question_type", "x"))),
    ("mmmu", "options", "[1, 2]"),
    *(("mmmu_pro", key, value) for key, value in (("answer", "1"), ("options", "[]"), ("subject", None))),
    *(("hallusionbench", key, value) for key, value in (("gt_answer", "2"), ("gt_answer", 1), ("filename", 7))),
]


@pytest.mark.parametrize(("name", "key", "value"), NONSENSE)
def test_nonsense_in_the_ground_truth_is_named_with_its_row(tmp_path, capsys, name, key, value):
    file = spoil(name, tmp_path / name, lambda row: row.update({key: value}))
    message = refuse(capsys, name, SAMPLES / name / "predictions.jsonl", file)
    assert file.name in message and any(word in message for word in ("line 1", "record", "row", "question", "problem"))


def test_half_a_pair_of_mme_is_refused(tmp_path, capsys):
    file = spoil("mme", tmp_path / "mme", lambda row: None)
    rows = read_rows(file)
    message = refuse(capsys, "mme", SAMPLES / "mme" / "predictions.jsonl", write_rows(file, rows[1:]))
    assert f"{file}: image 'existence/1.jpg' has 1 question" in message


def test_missing_file_and_unknown_benchmark(tmp_path, capsys):
    file = tmp_path / "none.jsonl"
    assert "there is no file" in refuse(capsys, "pope", file, file)
    assert "Did you mean 'pope'?" in refuse(capsys, "pop", file, file)
    with pytest.raises(ConfigError, match="scenes"):
        get_benchmark("nothing")


def test_pope_layout_pairs_labels_by_position(tmp_path):
    folder = tmp_path / "pope"
    questions = [
        {"question_id": 10 * c + i, "image": f"{i}.jpg", "text": f"Is there {i}?", "category": category}
        for i in range(3)
        for c, category in enumerate(("random", "adversarial"))
    ]
    write_rows(folder / "llava_pope_test.jsonl", questions)
    for category, labels in (("random", ["yes", "no", "no"]), ("adversarial", ["no", "no", "yes"])):
        rows = [{"question_id": i + 1, "image": f"{i}.jpg", "label": label} for i, label in enumerate(labels)]
        write_rows(folder / "coco" / f"coco_pope_{category}.json", rows)
    benchmark = get_benchmark("pope")
    labels = {row["question_id"]: row["label"] for row in benchmark.ground_truth(tmp_path)}
    assert labels == {0: "yes", 1: "no", 2: "no", 10: "no", 11: "no", 12: "yes"}
    asked = benchmark.questions(tmp_path)
    assert asked[0].image == folder / "val2014" / "0.jpg" and len(asked) == 6

    file = folder / "coco" / "coco_pope_random.json"
    rows = read_rows(file)
    for spoiled, words in ((rows[::-1], "different orders"), (rows[:2], "has 2 labels")):
        write_rows(file, spoiled)
        with pytest.raises(DataError, match=words):
            benchmark.ground_truth(tmp_path)
