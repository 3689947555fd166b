"""Submission files: exact formats, and what the format cannot do without."""

import json

import pytest
from score_parts import read_rows, write_rows

from tove_llava import cli
from tove_llava.eval.benchmarks import get_benchmark


def submit(tmp_path, benchmark, answers, questions=None, *flags, out="out.json"):
    file = write_rows(tmp_path / "answers.jsonl", answers) if isinstance(answers, list) else answers
    arguments = ["submission", "--benchmark", benchmark, "--predictions", str(file), "--out", str(tmp_path / out)]
    arguments += ["--questions", str(questions)] if questions else []
    return cli.main([*arguments, *flags])


def written(tmp_path):
    return json.loads((tmp_path / "out.json").read_text())


def answer(key, text):
    return {"question_id": key, "prompt": "p", "text": text}


def question(key):
    return {"question_id": key, "image": f"{key}.jpg", "text": "?"}


def test_vqav2_fills_gaps_and_names_what_it_left_out(tmp_path, capsys):
    questions = write_rows(tmp_path / "q.jsonl", map(question, (5, 6, 7)))
    rows = [answer(7, "first"), '{"question_id": 5, "te', answer(99, "x"), answer(7, "A")]
    rows += [answer(5, "The 2 dogs, two.")]
    assert submit(tmp_path, "vqav2", rows, questions) == 0
    expected = {5: "2 dogs 2", 6: "", 7: ""}
    assert written(tmp_path) == [{"question_id": key, "answer": text} for key, text in expected.items()]
    said = capsys.readouterr().err
    assert "answers 2 of the 447,793 questions of the test set" in said
    assert "answers.jsonl, line 2: not valid JSON; left out" in said
    assert "1 unanswered: 6" in said and "1 duplicated: 7" in said and "1 unknown: 99" in said


def test_vizwiz_wants_every_answer(tmp_path, capsys):
    questions = write_rows(tmp_path / "q.jsonl", map(question, (0, 1)))
    assert submit(tmp_path, "vizwiz", [answer(1, "Unanswerable")], questions) == 2
    assert "1 questions have no answer" in capsys.readouterr().err and not (tmp_path / "out.json").exists()
    assert submit(tmp_path, "vizwiz", [answer(1, "Unanswerable"), answer(0, "it's")], questions) == 0
    assert written(tmp_path) == [{"image": "0.jpg", "answer": "it 's"}, {"image": "1.jpg", "answer": "unanswerable"}]


def test_docvqa_answers_its_test_file_which_is_not_scored(tmp_path, capsys):
    records = [{"questionId": key, "question": "?", "image": "a.png", "data_split": "test"} for key in (5, 6)]
    file = tmp_path / "docvqa" / "test_v1.0.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"data": records}))
    rows = [answer(6, "Red Kite"), answer(5, "7")]
    assert get_benchmark("docvqa").ground_truth(tmp_path) is None
    assert (
        submit(tmp_path, "docvqa", rows[:1], tmp_path) == 2 and "1 questions have no answer" in capsys.readouterr().err
    )
    assert submit(tmp_path, "docvqa", rows, tmp_path) == 0
    assert written(tmp_path) == [{"questionId": 5, "answer": "7"}, {"questionId": 6, "answer": "Red Kite"}]
    assert "answers 2 of the 5,188 questions" in capsys.readouterr().err
    files = ["--predictions", str(tmp_path / "answers.jsonl"), "--ground-truth", str(file)]
    assert cli.main(["score", "--benchmark", "docvqa", *files]) == 2
    assert "test_v1.0.json has no answers" in capsys.readouterr().err


def test_nothing_is_overwritten_or_misnamed(tmp_path, capsys):
    questions = write_rows(tmp_path / "q.jsonl", [question(1)])
    (tmp_path / "out.json").write_text("mine")
    assert submit(tmp_path, "vqav2", [answer(1, "a")], questions) == 2
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "out.json").read_text() == "mine"
    assert submit(tmp_path, "vqav2", [answer(1, "red")], questions, "--overwrite") == 0
    assert written(tmp_path) == [{"question_id": 1, "answer": "red"}]
    for benchmark, key, file, out, words in (
        ("vqav2", 1, questions, "out.txt", "must end in .json"),
        ("vqav2", 1, None, "new.json", "give --questions"),
        ("pope", 1, questions, "new.json", "no submission format"),
        ("vqav2", 2, questions, "new.json", "another benchmark's"),
    ):
        assert submit(tmp_path, benchmark, [answer(key, "a")], file, out=out) == 2
        assert words in capsys.readouterr().err


def test_questions_may_be_the_data_root(tmp_path):
    # The server wants the whole test set, not the test-dev questions that were asked.
    write_rows(tmp_path / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl", map(question, (1, 2)))
    assert submit(tmp_path, "vqav2", [answer(1, "red")], tmp_path) == 0
    assert len(written(tmp_path)) == 2


@pytest.fixture
def openpyxl():
    return pytest.importorskip("openpyxl")


def cells(book):
    assert book.sheetnames == ["Sheet1"]
    return [list(row) for row in book.active.iter_rows(values_only=True)]


SHEET = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit\n"


def test_mmbench_sheet(tmp_path, capsys, openpyxl):
    sheet = tmp_path / "mmbench.tsv"
    row = "\tWhich?\t\tN/A\tno\t\t\tB\tx\t/9j/\ts\tl\tc\tdev\n"
    sheet.write_text(SHEET + f"1{row}2{row}3{row}")
    rows = [answer(2, "=1+1"), answer(1, "B"), answer(3, "x" * 40000)]
    assert submit(tmp_path, "mmbench", rows, sheet, out="out.xlsx") == 0
    book = openpyxl.load_workbook(tmp_path / "out.xlsx")
    header, *body = cells(book)
    assert header == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert body[0] == [1, "Which?", None, "no", None, None, "B", "B", "dev"]
    assert body[1][6] == "=1+1" and len(body[2][6]) == 32767
    assert "cut to Excel's 32767 characters: 3" in capsys.readouterr().err
    assert book.active["G3"].data_type == "s", "a formula would lose the answer"
    for character in ("\x00", "\uffff"):  # no program opens a workbook with one of these
        rows = [answer(1, "B"), answer(2, f"a{character}b")]
        assert submit(tmp_path, "mmbench", rows, sheet, out="bad.xlsx") == 2
        said = capsys.readouterr().err
        assert "question 2" in said and "control character" in said and not (tmp_path / "bad.xlsx").exists()
    lines = "a \r\n\tb\r\U0001f600 "
    assert submit(tmp_path, "mmbench", [answer(1, lines)], sheet, out="lines.xlsx") == 0
    assert cells(openpyxl.load_workbook(tmp_path / "lines.xlsx"))[1][6].split() == lines.split()


@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "mmvet"])
def test_golden_json(tmp_path, conformance, name):
    place = conformance / "eval" / "submission" / name
    questions = None if name == "mmvet" else place / "questions.jsonl"
    assert submit(tmp_path, name, place / "predictions.jsonl", questions) == 0
    assert written(tmp_path) == json.loads((place / "expected_submission.json").read_text())


def test_golden_gqa_needs_no_questions(tmp_path, conformance):
    place = conformance / "eval" / "gqa"
    expected = json.loads((place / "converted_predictions.json").read_text())
    for questions in (None, place / "ground_truth.json"):
        assert submit(tmp_path, "gqa", place / "predictions.jsonl", questions, "--overwrite") == 0
        assert written(tmp_path) == expected


def test_golden_seed(tmp_path, conformance, capsys):
    place = conformance / "eval" / "seed_bench"
    assert submit(tmp_path, "seed", place / "predictions.jsonl", place / "ground_truth.json", out="out.jsonl") == 0
    assert read_rows(tmp_path / "out.jsonl") == read_rows(place / "converted_submission.jsonl")
    incomplete = place / "predictions_incomplete.jsonl"
    assert submit(tmp_path, "seed", incomplete, place / "ground_truth.json", out="new.jsonl") == 2
    assert "have no answer" in capsys.readouterr().err


def test_golden_mmbench(tmp_path, conformance, openpyxl):
    place = conformance / "eval" / "submission" / "mmbench"
    expected = json.loads((place / "expected_submission.json").read_text())
    assert submit(tmp_path, "mmbench", place / "predictions.jsonl", place / "annotation.tsv", out="out.xlsx") == 0
    header, *rows = cells(openpyxl.load_workbook(tmp_path / "out.xlsx"))
    assert header == expected["header"] and rows == expected["rows"]
    assert [list(map(type, row)) for row in rows] == [list(map(type, row)) for row in expected["rows"]]
