"""Answering modes against plain computations, one question at a time."""

import json

import pytest
import torch
from answer_parts import before_forward, make_scenes

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import Turn
from tove_llava.eval.answering import MODES, get_option_mode
from tove_llava.eval.benchmarks import BENCHMARKS, Question, get_benchmark, lettered_options
from tove_llava.eval.question_loader import QuestionLoader, portions, prompt_ids
from tove_llava.eval.tasks import Decoding
from tove_llava.inference.reasoning import Spoken

OPTIONS = {"A": "red", "B": "a blue ball", "C": "green"}
CHOICE = "\n".join(["Which colour?", *(f"{letter}. {words}" for letter, words in OPTIONS.items()), "Answer."])


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_scenes(root, images=4, questions_each=4)
    return [*get_benchmark("scenes").questions(root), Question("text", "Nothing to see?", None)]


def run(answerer, questions, mode="generate", capacity=64, **decoding):
    """Return texts and metadata by question id, and the mode's object."""
    options = lambda question: lettered_options(question.text)  # noqa: E731
    with QuestionLoader(answerer, portions(questions, capacity), options) as loader:
        worker = MODES.get(mode)(answerer, Decoding(**{"max_new_tokens": 12, **decoding}), loader.features, capacity)
        answers = [answer for some in worker.run(loader.take) for answer in some]
    assert sorted(str(answer.question.key) for answer in answers) == sorted(str(each.key) for each in questions)
    return {answer.question.question_id: answer for answer in answers}, worker


def texts(*arguments, **options):
    return {key: answer.text for key, answer in run(*arguments, **options)[0].items()}


def library(answerer, question, **options):
    """Answer a question by itself through transformers' ``generate``."""
    images = {} if question.image is None else {"pixel_values": answerer.pixels(question.image)[None]}
    ids = torch.tensor([prompt_ids(answerer, question)])
    output = answerer.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=answerer.end_ids,
        pad_token_id=answerer.pad_id, **{"do_sample": False, "max_new_tokens": 12, **images, **options},
    )  # fmt: skip
    return answerer.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def library_all(answerer, questions, **options):
    return {question.question_id: library(answerer, question, **options) for question in questions}


@pytest.fixture
def many_lengths(answerer, monkeypatch):
    """Answers of many lengths: random weights hardly ever say the end token."""
    monkeypatch.setattr(answerer, "end_ids", [*answerer.end_ids, *range(3, 60)])


@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_generated_answers_are_those_of_the_library(answerer, questions, many_lengths, capacity):
    expected = library_all(answerer, questions)
    assert len({len(text) for text in expected.values()}) > 3
    assert texts(answerer, questions, capacity=capacity) == expected
    assert texts(answerer, questions, "batches", capacity=capacity) == expected


def test_rows_that_have_ended_leave_and_others_replace_them(answerer, questions, many_lengths, monkeypatch):
    rows = []
    before_forward(answerer, monkeypatch, lambda ids: rows.append(ids.shape))
    monkeypatch.setattr(answerer, "spoken", lambda tokens: Spoken(f"{len(tokens)} words"))
    said = {key: int(text.split()[0]) for key, text in texts(answerer, questions, capacity=8).items()}
    steps = [shape[0] for shape in rows if shape[1] == 1]  # rows of each step that follows a first word
    assert max(steps) <= 8 and min(said.values()) <= 3 and max(said.values()) == 12
    # In fixed batches every row is computed until the longest of its batch ends.
    ordered = [said[question.question_id] for portion in portions(questions, 8) for question in portion]
    fixed = sum(8 * max(ordered[start : start + 8]) for start in range(0, len(ordered), 8))
    assert sum(steps) < 0.7 * fixed


def test_an_answer_has_the_length_that_is_asked_for(answerer, questions, many_lengths):
    length = {"max_new_tokens": 6, "min_new_tokens": 6}
    assert texts(answerer, questions, **length, capacity=5) == library_all(answerer, questions, **length)


def test_no_answer_outgrows_the_model(answerer, questions, monkeypatch):
    longest = max(len(prompt_ids(answerer, question)) for question in questions)
    monkeypatch.setattr(answerer, "max_length", longest + 3)
    for key, text in texts(answerer, questions, capacity=4, min_new_tokens=12).items():
        (question,) = [each for each in questions if each.question_id == key]
        room = longest + 3 - len(prompt_ids(answerer, question))
        assert text == library(answerer, question, max_new_tokens=min(12, room), min_new_tokens=min(12, room))


def test_drawn_answers_are_the_questions_own(answerer, questions):
    one = texts(answerer, questions, capacity=1, temperature=1.5)
    assert texts(answerer, questions, capacity=7, temperature=1.5) == one
    assert texts(answerer, questions[5:], capacity=64, temperature=1.5).items() <= one.items()
    greedy = texts(answerer, questions)
    assert one != greedy
    assert texts(answerer, questions, temperature=1.5, top_p=1e-6) == greedy


def test_beams_are_the_library_s(answerer, questions):
    expected = library_all(answerer, questions, num_beams=3)
    got, worker = run(answerer, questions, "batches", capacity=9, num_beams=3)
    assert {key: answer.text for key, answer in got.items()} == expected
    assert worker.room.size == 3, "three beams need as much memory as three questions"
    assert expected != texts(answerer, questions)


def choices(questions):
    return [Question(each.question_id, f"{CHOICE} {number}", each.image) for number, each in enumerate(questions)]


@torch.no_grad()
def log_probabilities(answerer, question, words):
    """Score each answer token in the whole conversation, encoded as in training."""
    from tove_llava.data import encode_turns

    text = question.text if question.image is None else f"<image>\n{question.text}"
    turns = [Turn("user", text), Turn("assistant", words)]
    encoded = encode_turns(turns, answerer.tokenizer, answerer.template, images=question.image is not None)
    ids, said = [], []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label not in (-100, -200) and token not in answerer.end_ids:
            said.append(len(ids))
        ids += [answerer.image_token_id] * 16 if token == -200 else [token]
    images = {} if question.image is None else {"pixel_values": answerer.pixels(question.image)[None]}
    logs = answerer.model(input_ids=torch.tensor([ids]), **images).logits[0].log_softmax(dim=-1)
    return [float(logs[index - 1, ids[index]]) for index in said]


@pytest.mark.parametrize("capacity", [2, 64])
@pytest.mark.parametrize("mode", ["likelihood", "likelihood_text"])
def test_options_have_the_likelihood_of_the_whole_conversation(answerer, questions, mode, capacity):
    asked = choices(questions)
    answers, _ = run(answerer, asked, mode, capacity=capacity)
    picked = set()
    for question in asked:
        if mode == "likelihood":
            expected = {letter: sum(log_probabilities(answerer, question, letter)) for letter in OPTIONS}
        else:
            logs = {letter: log_probabilities(answerer, question, words) for letter, words in OPTIONS.items()}
            expected = {letter: sum(each) / len(each) for letter, each in logs.items()}
        answer = answers[question.question_id]
        assert answer.metadata["log_likelihood"] == pytest.approx(expected, abs=1e-4)
        assert answer.text == max(expected, key=expected.get)
        assert sum(answer.metadata["share"].values()) == pytest.approx(1, abs=1e-5)
        picked.add(answer.text)
    assert len(picked) > 1, "a model that always picks the same letter would prove little"


def test_an_option_without_words_is_named(answerer):
    question = Question("q7", "Which?\nA. red\nB. ", None)
    with pytest.raises(DataError, match="'q7': an option has no words"):
        run(answerer, [question], "likelihood_text")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (CHOICE, OPTIONS),
        ("Hint: A. B.\nWhich?\nA. it rains\nB. it snows\n请直接回答选项字母。", {"A": "it rains", "B": "it snows"}),
        ("Which?\nOptions: (A) West Virginia (B) Iowa\nAnswer:", {"A": "West Virginia", "B": "Iowa"}),
        ("Is the (A) ball red?", {}),
        ("Which?\nA. red\nC. blue", {}),
        ("Which?\nB. red\nC. blue", {}),
        ("A. Smith painted this. Who?", {}),
        ("", {}),
    ],
)
def test_options_are_read_from_the_question(text, options):
    assert lettered_options(text) == options


def test_options_of_the_golden_questions_are_read(conformance):
    for name in ("seed_bench", "mmbench", "scienceqa"):
        lines = (conformance / "eval" / name / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [row for row in map(json.loads, filter(None, lines)) if "\nA. " in row["prompt"]]
        assert len(rows) > 100
        for row in rows:
            options = lettered_options(row["prompt"])
            assert len(options) >= 2
            if "options" in row:
                assert options == dict(zip(row["option_char"], row["options"], strict=True))


def test_modes_that_score_options_are_known_by_name():
    assert get_option_mode("likelihood").needs_options
    with pytest.raises(ConfigError, match="Available: likelihood, likelihood_text"):
        get_option_mode("generate")


def test_a_template_without_questions_cannot_score_options(answerer):
    with pytest.raises(ConfigError, match="plain"):
        answerer.with_template("plain").answer_ids("A")


def limit_memory(answerer, monkeypatch, rows, words=10**9):
    """Give the model memory for ``rows`` rows and let step ``words`` fail."""
    steps = []

    def check(ids):
        steps.append(len(ids))
        if steps[-1] > rows or len(steps) == words:
            raise torch.OutOfMemoryError("CUDA out of memory")

    before_forward(answerer, monkeypatch, check)


@pytest.mark.filterwarnings("ignore:the GPU's memory is full")
@pytest.mark.parametrize("mode", ["generate", "batches", "likelihood"])
@pytest.mark.parametrize("words", [5, 9, 10**9])
def test_when_memory_is_full_the_batch_is_halved(answerer, questions, monkeypatch, mode, words):
    asked = choices(questions)
    expected = texts(answerer, asked, mode)
    limit_memory(answerer, monkeypatch, rows=3, words=words)
    with pytest.warns(RuntimeWarning, match="going on with 8 questions at a time"):
        got, worker = run(answerer, asked, mode, capacity=16)
    assert {key: answer.text for key, answer in got.items()} == expected
    assert worker.room.size == 2 if words == 10**9 else worker.room.size in (1, 2)


def test_memory_for_not_even_one_question_is_an_error(answerer, questions, monkeypatch):
    limit_memory(answerer, monkeypatch, rows=0)
    with pytest.warns(RuntimeWarning), pytest.raises(ConfigError, match="memory is full with one question"):
        run(answerer, questions, capacity=4)


def test_memory_that_the_images_fill_counts_too(answerer, questions, monkeypatch):
    expected, real = texts(answerer, questions), answerer.features

    def features(pixels):
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pixels)

    monkeypatch.setattr(answerer, "features", features)
    with pytest.warns(RuntimeWarning):
        assert texts(answerer, questions, capacity=16) == expected


def test_llavas_benchmarks_are_decoded_as_its_scripts_do():
    expected = {"pope": 128, "gqa": 128, "vqav2": 128, "vizwiz": 128, "textvqa": 128, "mme": 128, "seed": 128}
    expected |= {"mmbench": 1024, "mmbench_cn": 1024, "scienceqa": 1024, "llava_bench": 1024, "mmvet": 1024}
    found = {name: Decoding.of(get_benchmark(name)) for name in expected if name in BENCHMARKS}
    assert found == {name: Decoding(expected[name]) for name in found} and "pope" in found
    assert all(get_benchmark(name).conv_mode == "vicuna_v1" for name in found)
    settings = Decoding.of(get_benchmark("pope"), {"num_beams": 4, "temperature": None, "max_new_tokens": 7})
    assert settings == Decoding(7, num_beams=4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1}, "temperature must be 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"num_beams": 2, "temperature": 0.5}, "not both"),
        ({"min_new_tokens": 9}, "min_new_tokens must be at most"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Decoding(**{"max_new_tokens": 8, **settings})
