import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tove_llava import cli
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.eval.benchmarks import get_benchmark
from tove_llava.eval.benchmarks.playground_scenes import normalise
from tove_llava.eval.benchmarks.pope import parse_answer


def close(got, expected):
    if isinstance(expected, dict):
        return all(close(got[key], value) for key, value in expected.items())
    return got == pytest.approx(expected, abs=1e-9, rel=0)


def test_pope_equals_the_reference(conformance, capsys):
    folder = conformance / "eval" / "pope"
    files = ["--predictions", str(folder / "predictions.jsonl"), "--ground-truth", str(folder / "ground_truth.jsonl")]
    assert cli.main(["score", "--benchmark", "pope", *files, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    expected = json.loads((folder / "expected.json").read_text())
    assert got["benchmark"] == "pope" and got["count"] == expected["count"]
    assert close(got["scores"], expected["scores"])
    assert close(got["mean_of_categories"], expected["mean_of_categories"])


def test_pope_reads_each_answer_as_the_reference_does(conformance):
    folder = conformance / "eval" / "pope"
    expected = json.loads((folder / "expected.json").read_text())["per_item"]
    lines = (folder / "predictions.jsonl").read_text().split("\n")
    parsed = {str(row["question_id"]): parse_answer(row["text"]) for row in map(json.loads, filter(None, lines))}
    assert parsed == expected


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("No", "no"),
        ("no, there is none.", "no"),
        ("It is not there", "no"),
        ("Yes. No.", "yes"),  # only up to the first full stop
        ("NO", "yes"),
        ("no!", "yes"),
        ("well\nno", "yes"),
        ("", "yes"),
        ("n,o", "no"),
    ],
)
def test_pope_rule(text, answer):
    assert parse_answer(text) == answer


POPE_TRUTH = [
    {"question_id": index, "label": "yes" if index % 2 else "no", "category": ("random", "popular")[index // 4]}
    for index in range(8)
]


def test_pope_counts_by_hand():
    answers = ["no", "yes", "yes", "no", "no", "yes", "no", "yes"]
    predictions = [{"question_id": index, "text": text} for index, text in enumerate(answers)]
    score = get_benchmark("pope").score(predictions, POPE_TRUTH)
    assert score.scores["popular"]["f1"] == 1.0 and score.scores["popular"]["accuracy"] == 1.0
    random = score.scores["random"]
    assert [random[key] for key in ("TP", "FP", "TN", "FN")] == [1, 1, 1, 1] and random["f1"] == 0.5
    assert score.extras["mean_of_categories"]["accuracy"] == 0.75


@given(st.permutations(range(8)), st.lists(st.sampled_from(["yes", "No", "", "not sure"]), min_size=8, max_size=8))
def test_scores_do_not_depend_on_the_order_of_answers(order, texts):
    rows = [{"question_id": index, "text": text} for index, text in enumerate(texts)]
    benchmark = get_benchmark("pope")
    shuffled = [rows[index] for index in order]
    assert benchmark.score(shuffled, POPE_TRUTH) == benchmark.score(rows, POPE_TRUTH)


@pytest.mark.parametrize("name", ["pope", "scenes"])
def test_unanswered_questions_are_named_and_wrong_and_the_last_of_two_answers_counts(name):
    truth = [{**row, "answer": row["label"]} for row in POPE_TRUTH]
    benchmark = get_benchmark(name)
    perfect = [{"question_id": row["question_id"], "text": row["label"]} for row in truth]
    assert benchmark.score(perfect, truth).rows[{"pope": "mean accuracy", "scenes": "overall"}[name]][0] == 100
    for missing in range(8):
        score = benchmark.score([row for row in perfect if row["question_id"] != missing], truth)
        assert score.count == 8 and score.extras["unanswered"] == [missing]
        assert score.rows[{"pope": "mean accuracy", "scenes": "overall"}[name]][0] == 87.5
    corrected = [{"question_id": 0, "text": "yes"}, *perfect]
    score = benchmark.score(corrected, truth)
    assert score.extras["duplicated"] == [0]
    assert score.scores == benchmark.score(perfect, truth).scores


def test_scenes_accuracy_per_category_and_overall():
    truth = [
        {"question_id": "a", "answer": "Red", "category": "colour"},
        {"question_id": "b", "answer": "blue", "category": "colour"},
        {"question_id": "c", "answer": "2", "category": "count"},
    ]
    texts = {"a": " red. ", "b": "green", "c": "2"}
    score = get_benchmark("scenes").score([{"question_id": k, "text": v} for k, v in texts.items()], truth)
    assert score.scores["colour"] == {"accuracy": 0.5, "samples": 2}
    assert score.scores["count"]["accuracy"] == 1
    assert score.scores["overall"]["accuracy"] == pytest.approx(2 / 3)
    assert score.rows["overall"] == (pytest.approx(200 / 3), 3)


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)
    assert normalise(text.upper().lower() + ".") == normalise(text.upper().lower())


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("predictions", "truth", "words"),
    [
        (['{"question_id": 1, "text": "yes"}', '{"question_id": 2, "te'], None, "predictions.jsonl, line 2"),
        (["[1, 2]"], None, "predictions.jsonl, line 1: a JSON object is needed"),
        (['{"question_id": 1}'], None, "the key 'text' is missing"),
        (['{"question_id": 1, "text": 5}'], None, "question 1 is not a string"),
        ([], None, "holds no answers"),
        (['{"question_id": 77, "text": "yes"}'], None, "none of the predictions"),
        (None, ['{"question_id": 1, "answer": "yes", "category": "x"}'], "the key 'label' is missing"),
        (None, ['{"question_id": 1, "label": "maybe", "category": "x"}'], "must be yes or no"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, capsys, predictions, truth, words):
    good = {"p": ['{"question_id": 1, "text": "yes"}'], "t": ['{"question_id": 1, "label": "yes", "category": "x"}']}
    p = write(tmp_path / "predictions.jsonl", *(good["p"] if predictions is None else predictions))
    t = write(tmp_path / "truth.jsonl", *(good["t"] if truth is None else truth))
    assert cli.main(["score", "--benchmark", "pope", "--predictions", p, "--ground-truth", t]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and not captured.out


def test_missing_file_and_unknown_benchmark(tmp_path, capsys):
    arguments = ["--predictions", str(tmp_path / "none.jsonl"), "--ground-truth", str(tmp_path / "none.jsonl")]
    assert cli.main(["score", "--benchmark", "pope", *arguments]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert cli.main(["score", "--benchmark", "pop", *arguments]) == 2
    assert "Did you mean 'pope'?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="scenes"):
        get_benchmark("nothing")


def test_rows_end_at_newlines_only(tmp_path):
    from tove_llava.eval.rows import read_jsonl

    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question_id": 1, "text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n\n")
    assert read_jsonl(file)[0]["text"] == "a\u2028b\x85c"


def test_pope_layout_pairs_labels_by_position(tmp_path):
    folder = tmp_path / "pope"
    (folder / "coco").mkdir(parents=True)
    questions = [
        {"question_id": 10 * c + i, "image": f"{i}.jpg", "text": f"Is there {i}?", "category": category}
        for i in range(3)
        for c, category in enumerate(("random", "adversarial"))
    ]
    (folder / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    for category, labels in (("random", ["yes", "no", "no"]), ("adversarial", ["no", "no", "yes"])):
        rows = [{"question_id": i + 1, "image": f"{i}.jpg", "label": label} for i, label in enumerate(labels)]
        file = folder / "coco" / f"coco_pope_{category}.json"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = get_benchmark("pope")
    labels = {row["question_id"]: row["label"] for row in benchmark.ground_truth(tmp_path)}
    assert labels == {0: "yes", 1: "no", 2: "no", 10: "no", 11: "no", 12: "yes"}
    asked = benchmark.questions(tmp_path)
    assert asked[0].image == folder / "val2014" / "0.jpg" and len(asked) == 6

    file = folder / "coco" / "coco_pope_random.json"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[::-1]) + "\n")
    with pytest.raises(DataError, match="different orders"):
        benchmark.ground_truth(tmp_path)
    file.write_text("\n".join(lines[:2]) + "\n")
    with pytest.raises(DataError, match="has 2 labels"):
        benchmark.ground_truth(tmp_path)
