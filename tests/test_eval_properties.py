"""Properties of every answer.

Readers never fail, marks are marks, and order does not matter.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_parts import SAMPLES, truth_file

from tove_llava.core.errors import DataError
from tove_llava.eval.agreement import agreement, record_copies, rounded
from tove_llava.eval.benchmarks import get_benchmark as get
from tove_llava.eval.benchmarks import gqa, llava_bench, mme, mmvet, pope, scienceqa, vsr
from tove_llava.eval.benchmarks.mmbench import parse_answer as parse_mmbench
from tove_llava.eval.matching import match
from tove_llava.eval.normalisation import normalise_evalai, normalise_vizwiz, normalise_vqa
from tove_llava.eval.vqa import vqa_accuracy

WORDS = st.sampled_from(["yes", "No", "A", "B.", "(C)", "The answer is A.", "two", "red", "a dog", "1,000", "", "Z"])
TEXTS = WORDS | st.text(max_size=40)
ANSWERS = st.lists(st.sampled_from(["yes", "Yes", "no", "2", "two", "a dog", "dog"]), min_size=10, max_size=10)


def records(answers):
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(answers)]


@given(TEXTS)
def test_every_text_is_read(text):
    assert pope.parse_answer(text) in ("yes", "no")
    assert mme.parse_answer(text) in ("yes", "no", "other")
    assert vsr.parse_answer(text) in (True, False, None)
    letter = scienceqa.parse_answer(text)
    assert letter == scienceqa.FAILED or (len(letter) == 1 and letter.isupper())
    assert -1 <= scienceqa.option_index(letter, 3) < 3
    options = {"A": "red", "B": "blue"}
    assert parse_mmbench(text, options) in (*options, "Z", False)
    assert gqa.convert(text) == gqa.convert(f"{text}..")
    grade = mmvet.parse_grade(text)
    assert grade is None or 0 <= grade <= 1
    assert len(llava_bench.parse_review(text)) == 2


@given(TEXTS)
def test_normalised_texts_are_lists_of_words(text):
    for normalise in (normalise_vqa, normalise_evalai, normalise_vizwiz):
        words = normalise(text).split(" ")
        assert "the" not in words and " ".join(words) == " ".join(normalise(text).split())


@given(TEXTS, ANSWERS)
def test_consensus_takes_five_values_and_no_order(text, answers):
    mark = vqa_accuracy(text, records(answers))
    assert min(abs(mark - value) for value in (0, 0.3, 0.6, 0.9, 1)) < 1e-12
    assert vqa_accuracy(text, records(answers[::-1])) == pytest.approx(mark, abs=1e-12)
    assert vqa_accuracy(answers[0], records(answers)) >= vqa_accuracy("no such answer", records(answers)) == 0


@given(st.integers(0, 10))
def test_consensus_by_the_number_of_matches(matches):
    references = ["x"] * matches + ["y"] * (10 - matches)
    expected = [0, 0.3, 0.6, 0.9][matches] if matches < 4 else 1
    assert agreement("x", references) == pytest.approx(expected, abs=1e-12)


def test_equal_records_are_not_among_the_others():
    # Without ids the ten records are one, and nothing is left to agree with.
    same = [{"answer": "red"}] * 10
    assert record_copies(same) == [10] * 10 and vqa_accuracy("red", same) == 0
    assert record_copies(records(["red"] * 10)) is None and vqa_accuracy("red", records(["red"] * 10)) == 1
    assert agreement("red", ["red"] * 10) == 1


def test_only_unanimous_references_are_compared_as_they_are():
    assert vqa_accuracy("yes", records(["Yes"] * 10)) == 0
    assert vqa_accuracy("yes", records(["Yes"] * 9 + ["no"])) == 1
    assert vqa_accuracy(" Yes\n", records(["Yes\t"] * 10)) == 1


@pytest.mark.parametrize(
    ("text", "vqa", "evalai"),
    [
        ("1,000", "1000", "1000"),
        ("red,blue", "red blue", "redblue"),  # EvalAI deletes commas first
        ("it's", "it's", "it 's"),
        ("dont stop", "don't stop", "don't stop"),
        ("None of the ten", "0 of 10", "0 of 10"),
        ("a" + "." * 40, "a........", "a........"),  # 32 full stops go; "a" is no separate word here
        ("2.5.", "2.5", "2.5"),
        ("well-known / famous", "well known famous", "well known famous"),
        ("١,٢ x/y", "١ ٢ x y", "١٢ x y"),  # only ASCII digits around a comma count in the official program
    ],
)
def test_normal_forms(text, vqa, evalai):
    assert normalise_vqa(text) == vqa and normalise_evalai(text) == evalai


def test_ties_are_rounded_away_from_zero():
    assert [rounded(value, 2) for value in (0.125, 0.375, 59.288888, 2.675)] == [0.13, 0.38, 59.29, 2.67]


@given(st.lists(st.tuples(st.integers(0, 8), st.text(max_size=3)), max_size=20))
def test_matching_loses_nothing(pairs):
    predictions = [{"question_id": key, "text": text} for key, text in pairs]
    truth = [{"question_id": key} for key in range(5)]
    last = dict(pairs)
    if not any(key < 5 for key in last):
        with pytest.raises(DataError, match="another benchmark's"):
            match(predictions, truth)
        return
    matched = match(predictions, truth)
    assert matched.texts == [last.get(key) for key in range(5)]
    assert set(matched.unanswered) == set(range(5)) - set(last)
    assert set(matched.unknown) == {key for key in last if key >= 5}
    keys = [key for key, _ in pairs]
    assert set(matched.duplicated) == {key for key in keys if keys.count(key) > 1 and key < 5}


def test_ground_truth_with_a_question_twice_is_refused():
    with pytest.raises(DataError, match="question 3 twice"):
        match([{"question_id": 3, "text": ""}], [{"question_id": 3}, {"question_id": 3}])


SCORED = ("gqa", "mmbench", "okvqa", "pope", "scenes", "scienceqa", "seed", "textvqa", "vizwiz", "vqav2", "vsr", "mme")
SCORED += ("chartqa", "docvqa", "ocrbench", "hallusionbench")


@pytest.mark.parametrize("name", SCORED)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_scores_do_not_depend_on_the_order_of_answers(name, data):
    benchmark = get(name)
    truth = benchmark.read_ground_truth(truth_file(SAMPLES / name))
    lines = [json.loads(line) for line in (SAMPLES / name / "predictions.jsonl").read_text().splitlines()]
    rows = [{**row, "text": data.draw(TEXTS)} for row in lines if benchmark.answer_key(row) is not None]
    unique = list({benchmark.answer_key(row): row for row in rows}.values())
    shuffled = data.draw(st.permutations(unique))
    one, other = (benchmark.score(order, truth) for order in (unique, shuffled))
    assert one.scores == other.scores and one.marks == other.marks and one.count == other.count
    assert all(0 <= mark <= 1 for mark in one.marks.values())
