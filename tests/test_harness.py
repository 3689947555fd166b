"""lmms-eval: answers of the model, and the exported model as plain ``llava_hf``.

The tests that run lmms-eval itself need it installed next to this package, here or in another environment:
TOVE_LMMS_PYTHON=/path/to/python python -m pytest -m slow tests/test_harness.py
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from answer_parts import picture
from export_parts import checkpoint
from hypothesis import given
from hypothesis import strategies as st
from train_parts import ROOT, environment
from transformers import AutoProcessor

from tove_llava import cli
from tove_llava.checkpoints.conversion import export_model
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import Turn, load_tokenizer
from tove_llava.eval.rows import read_answers, read_jsonl
from tove_llava.inference.generation import Answerer
from tove_llava.integrations.lmms_eval.asking import Request, answer, cut, decoding_of, loss, user_turn
from tove_llava.tower import ToveVisionConfig

SIDE = 96  # pixels of the bundled CLIP: nothing is resized, by whichever library
GREEDY = {"max_new_tokens": 8, "temperature": 0, "do_sample": False}


def requests(settings=GREEDY):
    """Questions with no, one and two images, of different lengths."""
    images = [[picture(10 * index + number) for number in range(index % 3)] for index in range(7)]
    return [
        Request([user_turn(f"What is {'it ' * index}?", len(some))], some, settings)
        for index, some in enumerate(images)
    ]


def alone(answerer, request):
    """Answer as the chat would: one conversation, transformers' own generation."""
    ids = answerer.encode(request.turns, len(request.images))
    features = answerer.features(torch.stack([answerer.pixels(i) for i in request.images])) if request.images else []
    return answerer.generate([ids], features, request.settings["max_new_tokens"])[0]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_answers_are_those_of_one_at_a_time(answerer, size):
    asked = requests()
    expected = [alone(answerer, request) for request in asked]
    assert len(set(expected)) > 2, "a model that always says the same would prove nothing"
    done = []
    assert answer(answerer, asked, size, done.append) == expected
    assert sum(done) == len(asked)
    assert answer(answerer, asked[::-1], size) == expected[::-1]


def test_each_request_has_its_own_settings(answerer):
    asked = [Request(r.turns, r.images, {**GREEDY, "max_new_tokens": 1 + n % 2}) for n, r in enumerate(requests())]
    assert answer(answerer, asked, 4) == [alone(answerer, request) for request in asked]


def test_an_answer_ends_at_its_stop_text(answerer):
    asked = requests()[1]
    (whole,) = answer(answerer, [asked])
    stop = whole[len(whole) // 2 :]
    (short,) = answer(answerer, [Request(asked.turns, asked.images, {**GREEDY, "until": [stop]})])
    assert stop and short == whole.split(stop)[0] != whole


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", max_size=2), max_size=3))
def test_cut_holds_no_stop_text(text, stops):
    short = cut(text, stops)
    assert text.startswith(short) and not any(stop and stop in short for stop in stops)
    assert cut(text, None) == text and (cut(text, stops[0]) == cut(text, stops[:1]) if stops else True)


def test_images_stand_in_front_unless_the_text_says_where():
    assert user_turn("What?", 2).text == "<image>\n<image>\nWhat?"
    assert user_turn("Is <image> like <image>?", 2).text == "Is <image> like <image>?"
    assert user_turn("<image>\nWhat?", 1).text == "<image>\nWhat?"
    assert user_turn("a <image> tag", 0).text == "a  tag"  # a placeholder without an image means nothing


def test_settings_of_harnesses():
    found = decoding_of({"until": ["\n"], "max_new_tokens": 5, "temperature": 0, "num_beams": 3, "do_sample": False})
    assert (found.max_new_tokens, found.temperature, found.num_beams) == (5, 0, 3)
    assert decoding_of({"do_sample": False, "temperature": 0.7, "top_p": None}).temperature == 0
    assert decoding_of({"do_sample": True, "temperature": 0.7, "top_p": 0.9}).top_p == 0.9
    assert decoding_of({"do_sample": True}).temperature == 1
    assert decoding_of({"temperature": 0, "top_p": 0}).top_p == 1
    assert decoding_of({}).max_new_tokens == 1024
    with pytest.raises(ConfigError, match="repetition_penalty"):
        decoding_of({"repetition_penalty": 1.2})


def test_a_bad_request_is_named(answerer):
    good = requests()[0]
    with pytest.raises(DataError, match="request 1: .*shorten"):
        answer(answerer, [good, Request([Turn("user", "long " * 700)], (), GREEDY)])
    with pytest.raises(DataError, match="no image file"):
        answer(answerer, [Request([user_turn("What?", 1)], ["/no/such.png"], GREEDY)])


def test_the_loss_is_transformers_own(answerer):
    for request in requests()[:3]:
        for words in ("yes", "a red cone"):
            said = answerer.answer_ids(words)
            ids = torch.tensor([answerer.encode(request.turns, len(request.images)) + said])
            labels = ids.clone()
            labels[:, : -len(said)] = -100
            pixels = {"pixel_values": torch.stack(list(map(answerer.pixels, request.images)))} if request.images else {}
            with torch.no_grad():
                expected = answerer.model(input_ids=ids, labels=labels, **pixels).lm_loss
            assert loss(answerer, request, f" {words}")[0] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(DataError, match="without words"):
        loss(answerer, requests()[0], " ")


def test_only_the_most_likely_tokens_are_greedy(answerer, monkeypatch):
    request = requests()[1]
    prompt = answerer.encode(request.turns, len(request.images))
    pixels = torch.stack([answerer.pixels(image) for image in request.images])
    best = []
    for _ in range(3):  # what greedy decoding begins with
        with torch.no_grad():
            logits = answerer.model(input_ids=torch.tensor([prompt + best]), pixel_values=pixels).logits[0, -1]
        best.append(int(logits.argmax()))
    monkeypatch.setattr(answerer, "answer_ids", lambda words: [int(word) for word in words.split()])

    def asked(*tokens):
        return loss(answerer, request, " ".join(map(str, tokens)))

    assert asked(*best[:1])[1] and asked(*best)[1]
    others = [asked(token) for token in range(3, 40) if token != best[0]]
    assert not any(greedy for _, greedy in others)
    assert min(value for value, _ in others) > asked(best[0])[0]
    assert not asked(*best[:2], best[2] - 1)[1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Save a model with and without bundled experts, and two exports.

    The folders are with/model (bundled experts), model, and the exports.
    """
    root = tmp_path_factory.mktemp("export")
    entries = [{"name": name, "source": f"bundled:{name}"} for name in ("depth", "edge")]
    vision = ToveVisionConfig.from_sources("bundled:clip", entries)
    checkpoint(root / "with", tokenizer=load_tokenizer("bundled:llm"), vision=vision)
    model = checkpoint(root, tokenizer=load_tokenizer("bundled:llm"), vision=vision, detached=("depth", "edge"))
    export_model(model, root / "template")
    assert cli.main(["export", "--model", str(model), "--out", str(root / "tokenizer"), "--bos", "tokenizer"]) == 0
    return root


def test_bos_stands_once(exported):
    """Render and then call the processor with --bos tokenizer.

    With the default, do as servers do.
    """
    answerer = Answerer.load(exported / "model", "cpu")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    expected = answerer.encode([user_turn("What is it?", 1)], 1)
    image = picture(0, (SIDE, SIDE))
    for name, counted in (("tokenizer", 1), ("template", 2)):
        processor = AutoProcessor.from_pretrained(exported / name, backend="pil")
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        ids = processor(images=[image], text=text).input_ids[0]
        assert list(ids).count(processor.tokenizer.bos_token_id) == counted
        assert list(ids)[counted - 1 :] == expected
        whole = [{"role": "user", "content": [{"type": "image", "image": image}, chat[0]["content"][1]]}]
        asked = processor.apply_chat_template(whole, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert list(asked["input_ids"][0]) == expected  # transformers looks whether BOS is there
        served = processor.tokenizer(text, add_special_tokens=False).input_ids
        assert (served[0] == processor.tokenizer.bos_token_id) is (name == "template")


@pytest.fixture(scope="module")
def lmms_python():
    """An interpreter that has lmms-eval and this package."""
    python = os.environ.get("TOVE_LMMS_PYTHON", sys.executable)
    code = "import lmms_eval; from importlib.metadata import entry_points as e; print(e(group='lmms_eval.models'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment())
    if "No module named 'lmms_eval'" in found.stderr:
        pytest.skip("lmms-eval is not installed; TOVE_LMMS_PYTHON names an interpreter that has it")
    assert "tove_llava.integrations.lmms_eval:manifest" in found.stdout, "reinstall this package: pip install -e ."
    return python


@pytest.fixture(scope="module")
def scenes(exported):
    """Write playground/data/scenes in a separate folder."""
    root = exported / "work"
    data = root / "playground" / "data" / "scenes"
    (data / "images").mkdir(parents=True)
    rows = []
    for index in range(12):
        picture(index, (SIDE, SIDE)).save(data / "images" / f"val_{index}.png")
        row = {"question_id": f"q{index}", "image": f"val_{index}.png", "category": "count"}
        rows.append({**row, "text": f"What is number {index}{' of them' * (index % 3)}?"})
    write_rows(root, rows, ["?"] * len(rows))
    return root


def write_rows(root, rows, answers):
    lines = [json.dumps({**row, "answer": text}) + "\n" for row, text in zip(rows, answers, strict=True)]
    (root / "playground" / "data" / "scenes" / "val_questions.jsonl").write_text("".join(lines))


def ours(model, root, name):
    """Return our runner's answers and accuracy, with two thirds made right."""
    data = root / "playground" / "data" / "scenes"
    command = ["eval", "--model", str(model), "--benchmark", "scenes", "--data-root", str(data), "--device", "cpu"]
    command += ["--output", str(root / name)]
    assert cli.main(command) == 0
    texts = [row["text"] for row in read_answers(root / name / "scenes" / "full" / "answers.jsonl")]
    rows = read_jsonl(data / "val_questions.jsonl")
    write_rows(root, rows, [text if index % 3 else "something else" for index, text in enumerate(texts)])
    assert cli.main(command) == 0  # nothing is answered again
    result = json.loads((root / name / "scenes" / "full" / "result.json").read_text())
    assert result["questions_answered"] == 0 and len(set(texts)) > 1
    return texts, result["scores"]["overall"]["accuracy"]


def lmms(python, root, name, model, arguments, *flags):
    """Return lmms-eval's accuracy and its answer to each question."""
    command = ["-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", "tove_scenes"]
    command += ["--include_path", str(ROOT / "playground" / "lmms_eval"), "--device", "cpu", "--log_samples"]
    settings = environment(HF_HUB_OFFLINE="1", HF_HOME=str(root / "hf"))
    done = subprocess.run(
        [python, *command, "--output_path", name, *flags], cwd=root, env=settings, capture_output=True, text=True
    )
    files = list((root / name).rglob("*_results.json"))
    assert files, done.stdout[-2000:] + done.stderr[-3000:]
    (found,) = (json.loads(file.read_text()) for file in files)
    (samples,) = (file.read_text().splitlines() for file in (root / name).rglob("*_samples_tove_scenes.jsonl"))
    rows = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, samples)}
    texts = [rows[key][0] if isinstance(rows[key], list) else rows[key] for key in sorted(rows)]
    return found["results"]["tove_scenes"]["accuracy,none"], [text.strip() for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--batch_size=5",), ("--batch_size=2", "--force_simple")], ids=["chat", "simple"])
def test_lmms_eval_agrees_with_the_runner(lmms_python, exported, scenes, flags):
    model = exported / "with" / "model"
    expected, right = ours(model, scenes, f"ours{len(flags)}")
    accuracy, texts = lmms(lmms_python, scenes, f"entry{len(flags)}", "tove_llava", f"pretrained={model}", *flags)
    assert texts == expected
    assert 0 < accuracy < 1 and accuracy == pytest.approx(right)


@pytest.mark.slow
def test_the_export_as_llava_hf_agrees_with_the_runner(lmms_python, exported, scenes):
    folder = exported / "tokenizer"
    expected, right = ours(folder, scenes, "ours_export")
    arguments = f"pretrained={folder},dtype=float32,device_map=cpu"
    accuracy, texts = lmms(lmms_python, scenes, "stock", "llava_hf", arguments, "--batch_size", "1")
    assert texts == expected
    assert 0 < accuracy < 1 and accuracy == pytest.approx(right)
