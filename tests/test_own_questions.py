"""Benchmarks of one's own: the rules, the file of questions, and the commands."""

import json
import re

import pytest
from answer_parts import picture, save_model
from score_parts import read_rows, write_rows

from tove_llava import cli
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.eval.own_questions import OwnSpec, from_file, own_benchmark
from tove_llava.eval.rules import RULES, get_rule
from tove_llava.eval.rules.choice_letter import letter_of

OPTIONS = {"A": "red car", "B": "blue car", "C": "None", "D": "x"}
TEN = ["red"] * 2 + ["blue"] * 8


@pytest.mark.parametrize(
    ("rule", "answers", "text", "mark"),
    [
        *(("exact", ["Red", "crimson"], text, mark) for text, mark in ((" red. ", 1), ("crimson", 1), ("the red", 0))),
        *(("contains", ["10"], text, mark) for text, mark in (("it is 1040", 1), ("1 0", 0))),
        *(("vqa", TEN, text, mark) for text, mark in (("blue", 1), ("Red", 0.6), ("green", 0))),
        *(("relaxed", ["100"], text, mark) for text, mark in (("105", 1), ("106", 0), ("10000%", 1), ("1e2", 1))),
        *(("relaxed", ["0"], text, mark) for text, mark in (("0", 1), ("0.0", 0), ("nan", 0))),
        ("relaxed", ["Blue"], "blue", 1),
        *(("anls", ["word"], text, mark) for text, mark in (("word", 1), ("wo", 0.5), ("w", 0), ("Word ", 1), ("", 0))),
        *(("yes_no", ["yes"], text, mark) for text, mark in (("Yes, it is", 1), ("TRUE", 1), ("no", 0), ("eyes", 0))),
        *(("choice", ["B"], text, mark) for text, mark in (("B", 1), ("(B) it is", 1), ("blue car.", 1), ("b", 0))),
        ("choice", ["B"], "The answer is B", 1),
        ("choice", ["C"], "none", 1),  # an option that is spelled so
        ("choice", ["D"], "x", 0),  # one character says nothing about the letter
    ],
)
def test_marks(rule, answers, text, mark):
    assert get_rule(rule).mark({"answers": answers, "options": OPTIONS}, text) == pytest.approx(mark)


@pytest.mark.parametrize(("rule", "text"), [("choice", "yes"), ("yes_no", "maybe"), ("exact", " "), ("anls", "")])
def test_what_a_rule_cannot_read(rule, text):
    assert not get_rule(rule).is_readable({"answers": ["A"], "options": OPTIONS}, text)


def without_reasoning(text):
    """Cut the blocks that lmms-eval cuts."""
    for tag in ("think", "analysis"):
        text = re.sub(rf"<{tag}>.*?</{tag}>", "", text, flags=re.DOTALL).rpartition(f"</{tag}>")[2]
    return text.strip()


def golden(conformance, name):
    """Yield (row, answer, expected entry) of a golden set."""
    place = conformance / "eval" / name
    expected = json.loads((place / "expected.json").read_text())["per_item"]
    answers = {str(row["question_id"]): row["text"] for row in read_rows(place / "predictions.jsonl")}
    if (place / "ground_truth.jsonl").exists():
        rows = read_rows(place / "ground_truth.jsonl")
    else:
        content = json.loads((place / "ground_truth.json").read_text())
        rows = content["data"] if isinstance(content, dict) else content
    for number, row in enumerate(rows):
        key = str(row.get("questionId", row.get("index", number)))
        yield row, answers[key], expected[key]


def test_golden_rules(conformance):
    count = 0
    for row, text, entry in golden(conformance, "realworldqa"):
        if row["answer"] in tuple("ABCD"):
            assert (letter_of(without_reasoning(text), "ABCD") == row["answer"]) == entry["correct"]
            count += 1
    differing = json.loads((conformance / "eval" / "mmstar" / "expected.json").read_text())["rules"]["lmms_eval"]
    for row, text, entry in golden(conformance, "mmstar"):
        verdict = differing["verdicts_that_differ"].get(str(row["index"]), entry["correct"])
        assert (letter_of(without_reasoning(text), "ABCD") == row["answer"]) == verdict
        count += 1
    for row, text, entry in golden(conformance, "chartqa"):
        assert get_rule("relaxed").mark({"answers": [row["answer"]]}, without_reasoning(text)) == entry["correct"]
        count += 1
    for row, text, entry in [*golden(conformance, "docvqa"), *golden(conformance, "infovqa")]:
        assert get_rule("anls").mark(row, text) == pytest.approx(entry, abs=1e-9)
        count += 1
    for row, text, entry in golden(conformance, "ocrbench"):
        if row["dataset_name"] != "HME100k":  # whose rule also deletes spaces
            answers = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
            assert get_rule("contains").mark({"answers": answers}, text) == entry["correct"]
            count += 1
    assert count > 220


FINE = {"question": "Which?", "image": "0.png", "answer": "B", "options": ["red", "blue"]}


def test_records_may_have_several_forms(tmp_path):
    rows = [
        FINE,
        {"question": "Which?", "image": ["0.png", "1.png"], "answer": "blue", "options": {"A": "red", "B": "blue"}},
        {"question_id": "x", "text": "Which?", "answers": ["A", "B"], "options": [1, 2], "category": "c"},
    ]
    file = write_rows(tmp_path / "mine.jsonl", rows)
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    for source in (file, tmp_path / "mine.json"):
        name, benchmark, images = from_file(source, tmp_path, "choice")
        first, second, third = benchmark.questions(images)
        assert name == "mine" and first.question_id == 0 and third.question_id == "x"
        assert first.text == "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
        assert first.images == (tmp_path / "0.png",) and len(second.images) == 2 and third.images == ()
        assert [row["answers"] for row in benchmark.ground_truth(images)] == [["B"], ["B"], ["A", "B"]]
    bare = from_file(file, tmp_path, "judge", prompt="")[1].questions(tmp_path)
    assert bare[0].text == "Which?\nA. red\nB. blue"


@pytest.mark.parametrize(
    ("rule", "change", "words"),
    [
        ("exact", {"question": " "}, "'question' must be"),
        ("exact", {"answer": None}, "'answer' must be"),
        ("exact", {"answer": {}}, "'answer' must be"),
        ("exact", {"answer": []}, "'answer' must be"),
        ("exact", {"image": 5.5j}, None),
        ("exact", {"image": {"a": 1}}, "'image' must be"),
        ("exact", {"category": 5}, "'category' must be"),
        ("exact", {"question_id": None}, "'question_id' must be"),
        ("choice", {"answer": "green"}, "the answer 'green' is no option"),
        ("choice", {"answer": "C"}, "is no option"),
        ("choice", {"options": ["red"]}, "'options' must be"),
        ("choice", {"options": {"B": "red", "C": "blue"}}, "'options' must be"),
        ("choice", {"options": None}, "needs 'options'"),
        ("vqa", {"answer": ["red"] * 9}, "needs 10 answers"),
        ("yes_no", {"answer": "maybe"}, "must be yes, no"),
    ],
)
def test_a_bad_record_is_named(tmp_path, rule, change, words):
    if words is None:
        change, words = {"image": [None]}, "'image' must be"
    rows = [{**FINE, "answer": "yes" if rule == "yes_no" else ["B"] * 10}, {**FINE, **change}]
    file = write_rows(tmp_path / "mine.jsonl", rows)
    with pytest.raises(DataError, match=f"mine.jsonl, record 2.*{words}"):
        from_file(file, tmp_path, rule)[1].questions(tmp_path)


def test_an_answer_of_one_character_is_a_letter_before_it_is_an_option(tmp_path):
    rows = [{**FINE, "options": ["B", "red"], "answer": "B"}, {**FINE, "options": ["1", "2"], "answer": "2"}]
    found = from_file(write_rows(tmp_path / "mine.jsonl", rows), tmp_path, "choice")[1].ground_truth(tmp_path)
    assert [row["answers"] for row in found] == [["B"], ["B"]]


def test_a_public_benchmark_s_name_is_taken(tmp_path):
    with pytest.raises(ConfigError, match="'mmvp' is the name of a public benchmark"):
        from_file(tmp_path / "mmvp.jsonl", tmp_path, "exact")


@pytest.mark.parametrize("rule", ["exact", "caption", "judge"])
def test_the_longest_answer_is_the_file_s(tmp_path, rule):
    assert own_benchmark(OwnSpec("mine.jsonl", rule, max_new_tokens=7), tmp_path).max_new_tokens == 7


def test_a_judge_reads_every_right_answer(tmp_path):
    class Half:
        def hold(self, talks):
            asked.extend(str(next(talk).messages) for talk in talks)
            return [0.5]

    asked, file = [], write_rows(tmp_path / "mine.jsonl", [{**FINE, "answer": ["red", "crimson"]}, FINE])
    benchmark = from_file(file, tmp_path, "judge")[1]
    score = benchmark.verdicts(Half(), benchmark.ground_truth(tmp_path), ["scarlet", None])
    assert "red <OR> crimson" in asked[0] and "scarlet" in asked[0] and score.scores == {"grade": 0.25}


def test_an_id_twice_and_no_question_are_named(tmp_path):
    file = write_rows(tmp_path / "mine.jsonl", [{**FINE, "question_id": 1}, FINE])
    with pytest.raises(DataError, match="record 2: question_id 1 is taken by .*record 1"):
        from_file(file, tmp_path, "exact")[1].questions(tmp_path)
    with pytest.raises(DataError, match="holds no questions"):
        from_file(write_rows(tmp_path / "none.jsonl", []), tmp_path, "exact")[1].questions(tmp_path)


def test_from_a_file_to_a_report(tmp_path, capsys):
    def run(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, capsys.readouterr()

    folder, model, out = tmp_path / "data" / "birds", save_model(tmp_path), tmp_path / "out"
    (folder / "images").mkdir(parents=True)
    for index in range(3):
        picture(index).save(folder / "images" / f"{index}.png")
    rows = [
        {"question": "How many?", "image": "0.png", "answer": 2, "category": "count"},
        {"question": "Which differ?", "image": ["1.png", "2.png"], "answer": ["both", "all"]},
        {"question": "Which differ?", "image": ["2.png", "1.png"], "answer": ["both", "all"]},
        {"question": "Two and two?", "answer": "4"},
    ]
    file = write_rows(folder / "mine.jsonl", rows)
    answering = ["eval", "--model", model, "--device", "cpu", "--max-new-tokens", 4, "--output", out]
    own = ["--questions", file, "--image-folder", folder / "images"]
    code, said = run(*answering, *own, "--rule", "contains", "--json")
    result = json.loads(said.out)["benchmarks"]["mine"]["full"]
    assert code == 0 and result["count"] == 4 and result["rule"] == "contains" and result["images"] == 3
    answers = read_rows(out / "mine" / "full" / "answers.jsonl")
    assert answers[1]["prompt"] == answers[2]["prompt"] and answers[1]["text"] != answers[2]["text"]  # images in order
    again = [*answering[:-1], tmp_path / "single", "--batch-size", 1]
    assert run(*again, *own, "--rule", "contains")[0] == 0
    assert [row["text"] for row in read_rows(tmp_path / "single" / "mine" / "full" / "answers.jsonl")] == [
        row["text"] for row in answers
    ]

    right = [{**row, "text": text} for row, text in zip(answers, ("2", "Both.", "all", "5"), strict=True)]
    given = write_rows(tmp_path / "answers.jsonl", right)
    code, said = run("score", "--questions", file, "--rule", "exact", "--predictions", given, "--json")
    expected = {"count": {"accuracy": 1.0, "samples": 1}, "overall": {"accuracy": 0.75, "samples": 4}}
    assert code == 0 and json.loads(said.out)["scores"] == expected

    (folder / "benchmark.yaml").write_text("questions: mine.jsonl\nimages: images\nrule: exact\n")
    assert run(*answering, "--benchmark", "birds", "--data-root", tmp_path / "data")[0] == 0
    scoring = ["score", "--benchmark", "birds", "--predictions", given, "--json"]
    for place in (folder, tmp_path / "data"):
        assert json.loads(run(*scoring, "--ground-truth", place)[1].out)["scores"]["overall"]["accuracy"] == 0.75
    code, said = run(*scoring, "--ground-truth", folder, "--rule", "contains")
    assert json.loads(said.out)["rule"] == "contains"
    assert run("report", f"a={out}", f"b={tmp_path / 'single'}", "--out", tmp_path / "page")[0] == 0
    page = (tmp_path / "page" / "report.md").read_text()
    assert "## mine" in page and "## birds" in page

    for arguments, words in (
        ([], "--benchmark a name, or --questions"),
        (own, "needs --rule"),
        ([*own, "--rule", "exactly"], f"rules: {', '.join(RULES)}"),
        (["--benchmark", "scenes", "--rule", "exact"], "belong to --questions"),
        (["--benchmark", "scenes", "--image-folder", "."], "belong to --questions"),
        ([*own, "--rule", "exact", "--judge-url", "u", "--judge-model", "m"], "mine.jsonl is scored without a judge"),
        ([*own[:2], "--rule", "exact"], "images are missing"),
        (["--benchmark", "bird", "--data-root", tmp_path / "data"], "unknown benchmark 'bird'"),
    ):
        code, said = run(*answering, *arguments)
        assert code == 2 and words in said.err, said.err
    (folder / "benchmark.yaml").write_text("questions: mine.jsonl\nrules: exact\n")
    code, said = run(*answering, "--benchmark", "birds", "--data-root", tmp_path / "data")
    assert code == 2 and "unknown key 'rules'" in said.err and "benchmark.yaml" in said.err
