import base64
import json
from pathlib import Path

import pytest
import torch
from answer_parts import make_scenes, save_model
from score_parts import read_rows, write_rows

from tove_llava import cli
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.eval.benchmarks import EmbeddedImage, Question, get_benchmark
from tove_llava.eval.conditions import ALL, BLANK, DETACHED, FULL, Condition, parse_conditions
from tove_llava.eval.question_loader import prompt_ids
from tove_llava.eval.rows import AppendFile, spread
from tove_llava.eval.runner import Settings, run_benchmark
from tove_llava.eval.tasks import Decoding, Task
from tove_llava.inference.generation import Answerer
from tove_llava.inference.reasoning import Spoken


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_scenes(root)
    return root


def answer(answerer, data, folder, condition=FULL, limit=None, **settings):
    task = Task.read("scenes", get_benchmark("scenes"), data, limit)
    run = run_benchmark(answerer, task, folder, condition, Settings("m", **settings))
    return {row["question_id"]: row["text"] for row in run.rows}


def answer_questions(answerer, name, questions, folder):
    benchmark = get_benchmark(name)
    task = Task(name, benchmark, Path(), Decoding.of(benchmark), questions, questions, truth=None)
    return run_benchmark(answerer, task, folder, FULL).rows


def test_answer_lines_are_llavas(answerer, data, tmp_path):
    answer(answerer, data, tmp_path)
    questions, rows = read_rows(data / "val_questions.jsonl"), read_rows(tmp_path / "answers.jsonl")
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in questions]
    assert set(rows[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert rows[0]["prompt"] == questions[0]["text"] and rows[0]["metadata"] == {"category": "count"}
    assert not list(tmp_path.glob("answers.part*"))


def test_the_prompt_is_llavas(answerer):
    ids = prompt_ids(answerer, Question(1, "Is it red?", Path("x.png")))
    images = [index for index, token in enumerate(ids) if token == answerer.image_token_id]
    assert len(images) == answerer.num_image_tokens == 16 and images[-1] - images[0] == 15
    assert answerer.tokenizer.decode(ids[images[-1] + 1 :]) == "\nIs it red? ASSISTANT:"
    before = answerer.tokenizer.decode(ids[: images[0]], skip_special_tokens=True)
    assert before.startswith("A chat between a curious user") and before.endswith("USER: ")


def test_blank_images_are_all_alike_and_detached_experts_come_back(answerer, data, tmp_path):
    full = answer(answerer, data, tmp_path / "full")
    blank = answer(answerer, data, tmp_path / "blank", BLANK)
    assert len({(key.split("-")[1], text) for key, text in blank.items()}) == 3, "one answer a question"
    assert blank != full != answer(answerer, data, tmp_path / "detached", DETACHED)
    assert answerer.model.config.vision_config.detached_experts == []
    assert answer(answerer, data, tmp_path / "again") == full


def test_experts_that_were_detached_before_stay_detached(answerer):
    tower = answerer.tower
    tower.detach_experts("edge")
    with DETACHED.applied(answerer.model):
        assert tower.config.attached_experts == []
    assert tower.config.attached_experts == ["depth", "normal"]
    with Condition("x", "x", detach=("depth", "edge")).applied(answerer.model):
        assert tower.config.attached_experts == ["normal"]
    assert tower.config.attached_experts == ["depth", "normal"]
    tower.attach_experts("edge")
    with pytest.raises(ConfigError, match="depht"), Condition("x", "x", detach=("depht",)).applied(answerer.model):
        pass
    assert tower.config.attached_experts == ["depth", "edge", "normal"]


def test_each_image_is_encoded_once_for_its_questions(answerer, data, tmp_path, monkeypatch):
    encoded, real = [], answerer.features
    monkeypatch.setattr(answerer, "features", lambda pixels: encoded.append(len(pixels)) or real(pixels))
    answer(answerer, data, tmp_path, batch_size=2)
    assert sum(encoded) == 4


@pytest.mark.parametrize("torn", [b"", b'{"question_id": "3-2", "text": "half an ans'])
def test_a_broken_run_goes_on_where_it_stopped(answerer, data, tmp_path, monkeypatch, torn):
    whole = answer(answerer, data, tmp_path / "whole", batch_size=2)
    written, real = [], AppendFile.append

    def fail_at_the_third(self, rows):
        written.append(rows)
        if len(written) == 3:
            raise KeyError
        real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(AppendFile, "append", fail_at_the_third)
        with pytest.raises(KeyError):
            answer(answerer, data, tmp_path / "run", batch_size=2)
    (part,) = (tmp_path / "run").glob("answers.part*.jsonl")
    kept = part.read_bytes()
    assert 1 <= kept.count(b"\n") <= 4
    part.write_bytes(kept + torn)

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(AppendFile, "append", lambda self, rows: real(self, asked.extend(rows := list(rows)) or rows))
        assert answer(answerer, data, tmp_path / "run", batch_size=2) == whole
        assert len(asked) == 12 - kept.count(b"\n")
        assert answer(answerer, data, tmp_path / "run", batch_size=2) == whole
        assert len(asked) == 12 - kept.count(b"\n"), "a finished run asks nothing again"
    assert (tmp_path / "run" / "answers.jsonl").read_bytes() == (tmp_path / "whole" / "answers.jsonl").read_bytes()


def test_a_damaged_line_in_the_middle_is_named(answerer, data, tmp_path):
    answer(answerer, data, tmp_path)
    file = tmp_path / "answers.jsonl"
    lines = file.read_text().splitlines()
    file.write_text(damaged := "\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"answers.jsonl, line 2: not valid JSON"):
        answer(answerer, data, tmp_path)
    assert file.read_text() == damaged


def test_answers_of_another_run_are_not_used(answerer, data, tmp_path, monkeypatch):
    answer(answerer, data, tmp_path)
    before = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(DataError, match="blank_image differ.*--overwrite"):
        answer(answerer, data, tmp_path, BLANK)
    weight = answerer.model.model.multi_modal_projector.linear_1.weight
    monkeypatch.setattr(weight, "data", weight.data + 1)
    with pytest.raises(DataError, match="weights differ"):
        answer(answerer, data, tmp_path)
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_a_limit_spreads_over_the_file_and_can_be_raised(answerer, data, tmp_path):
    some = answer(answerer, data, tmp_path, limit=4)
    assert len(some) == 4 and {key.split("-")[0] for key in some} == {"0", "1", "2", "3"}
    every = answer(answerer, data, tmp_path)
    assert len(every) == 12 and some.items() <= every.items()
    whole = (tmp_path / "answers.jsonl").read_bytes()
    assert answer(answerer, data, tmp_path, limit=4) == some
    assert (tmp_path / "answers.jsonl").read_bytes() == whole, "answers that are not asked for now are kept"
    assert spread([1, 2, 3], 5) == [1, 2, 3]


def test_an_unreadable_image_names_the_question(answerer, tmp_path):
    make_scenes(tmp_path / "data", images=3)
    (tmp_path / "data" / "images" / "val_000001.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"question '1-\d': .*val_000001.png is not an image"):
        answer(answerer, tmp_path / "data", tmp_path / "run", batch_size=2)


def test_append_file_keeps_whole_lines_only(tmp_path):
    file = tmp_path / "rows.jsonl"
    with AppendFile(file) as out:
        out.append([{"a": 1}, {"a": "é"}])
    file.write_bytes(file.read_bytes() + b'{"a": 3')
    with AppendFile(file) as out:
        out.append([{"a": 4}])
    assert [row["a"] for row in read_rows(file)] == [1, "é", 4]


TWO_DETACHED = Condition("blank+without-depth-edge", "image blanked, without depth, edge", True, ("depth", "edge"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, False, None), [FULL]),
        (("blank,detached,full", False, None), [BLANK, DETACHED, FULL]),
        ((None, True, None), [Condition("blank", "image blanked", True)]),
        ((None, True, "edge,depth"), [TWO_DETACHED]),
        ((None, False, "all"), [Condition("without-all", "without all", False, (ALL,))]),
        ((None, False, "clip,all"), [Condition("without-all-clip", "without all, clip", False, (ALL, "clip"))]),
        (("fool", False, None), None),
        (("", False, None), None),
        (("full", True, None), None),
    ],
)
def test_conditions_of_a_command_line(arguments, expected):
    if expected is None:
        with pytest.raises(ConfigError):
            parse_conditions(*arguments)
    else:
        assert parse_conditions(*arguments) == expected


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved"))


def evaluate(model_folder, data, output, *more, benchmark="scenes", code=0):
    flags = ["--model", str(model_folder), "--data-root", str(data), "--output", str(output), "--device", "cpu"]
    assert cli.main(["eval", "--benchmark", benchmark, *flags, *more]) == code


def scores_of(folder, benchmark="scenes"):
    return json.loads((folder / "results.json").read_text())["benchmarks"][benchmark]


def test_table_has_question_types_as_rows_and_conditions_as_columns(model_folder, data, tmp_path, capsys):
    evaluate(model_folder, data, tmp_path, "--conditions", "blank,detached,full")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "scenes (%)"
    assert all(head in lines[0] for head in ("image blanked", "experts detached", "ToVE"))
    assert [line.split()[0] for line in lines[2:6]] == ["colour", "count", "left_of", "overall"]
    assert lines[5].split()[-1] == "12"
    results = scores_of(tmp_path)
    assert set(results) == {"blank", "detached", "full"} and results["full"]["count"] == 12


def test_think_blocks_are_counted_and_not_scored(model_folder, data, tmp_path, capsys, monkeypatch):
    said = iter([Spoken("red", "Let me see", True), Spoken("", "It is", False)] + [Spoken("red")] * 100)
    monkeypatch.setattr(Answerer, "spoken", lambda self, tokens: next(said))
    evaluate(model_folder, data, tmp_path, "--limit", "6")
    assert "2 answers began with a think block, which is not scored; 1 never closed it." in capsys.readouterr().out
    rows = [json.loads(line) for line in next(tmp_path.rglob("answers.jsonl")).read_text().splitlines()]
    assert sorted(row["metadata"].get("reasoning", "") for row in rows)[-2:] == ["It is", "Let me see"]
    assert not any("Let me" in row["text"] for row in rows)


def test_json_has_the_scores_of_every_benchmark(model_folder, data, tmp_path, capsys):
    evaluate(model_folder, data, tmp_path, "--limit", "6", "--json", benchmark="all")
    result = json.loads(capsys.readouterr().out)["benchmarks"]
    assert result["scenes"]["full"]["count"] == 6 and list(result) == ["scenes"], "pope's data is not there"


def test_saved_model_answers_as_the_one_in_memory(model_folder, data, tmp_path, answerer):
    loaded = Answerer.load(model_folder, device="cpu")
    assert answer(loaded, data, tmp_path / "a") == answer(answerer, data, tmp_path / "b")
    assert loaded.template.name == "v1" and loaded.transform.aspect_ratio == "pad"


def test_flags_override_the_benchmarks_decoding(model_folder, data, tmp_path, capsys):
    def full(name, *flags):
        evaluate(model_folder, data, tmp_path / name, "--json", *flags)
        return json.loads(capsys.readouterr().out)["benchmarks"]["scenes"]["full"]

    usual = full("usual")
    values = {"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "min_new_tokens": 0}
    assert usual["decoding"] | {"min_new_tokens": 0} == values
    assert usual["answering"] == "generate" and usual["template"] == "v1"
    assert usual["questions_answered"] == 12 and usual["images"] == 4 and usual["seconds"] > 0
    assert usual["questions_per_second"] == pytest.approx(12 / usual["seconds"], rel=0.05)
    other = full("other", "--max-new-tokens", "2", "--temperature", "0.5", "--top-p", "0.9", "--conv-mode", "llava_v1")
    assert other["decoding"] | {"max_new_tokens": 2, "temperature": 0.5, "top_p": 0.9} == other["decoding"]
    assert other["template"] == "llava_v1"
    assert full("beams", "--num-beams", "2")["answering"] == "batches"
    again = full("usual")
    assert again["questions_answered"] == 0 and again["questions_per_second"] is None
    assert again["scores"] == usual["scores"]


def test_options_are_scored_and_recorded(model_folder, tmp_path):
    rows = make_scenes(tmp_path / "data")
    for row in rows:
        row |= {"text": f"{row['text']}\nA. red\nB. blue", "answer": "A"}
    write_rows(tmp_path / "data" / "val_questions.jsonl", rows)
    for name in ("likelihood", "likelihood_text"):
        evaluate(model_folder, tmp_path / "data", tmp_path / name, "--score-options", name)
        full = scores_of(tmp_path / name)["full"]
        assert full["answering"] == name
        lines = read_rows(tmp_path / name / "scenes/full/answers.jsonl")
        picked = [max(line["metadata"]["log_likelihood"].items(), key=lambda item: item[1])[0] for line in lines]
        assert [line["text"] for line in lines] == picked
        assert full["scores"]["overall"]["accuracy"] == picked.count("A") / 12


def tree(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def finished(model_folder, data, tmp_path_factory):
    """Folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    evaluate(model_folder, data, folder)
    return folder


def changed(change):
    """Change the text of the question file."""
    return lambda folder: (file := folder / "val_questions.jsonl").write_text(change(file.read_text()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(lambda text: text.replace('"question_id": "1-1"', '"quest')), ["line 5: not valid JSON"]),
        (changed(lambda text: text[:-30]), ["val_questions.jsonl, line 12: not valid JSON"]),
        (changed(lambda text: text.replace('"image": ', '"picture": ')), ["line 1: the key 'image' is missing"]),
        (
            lambda folder: (folder / "images" / "val_000002.png").unlink(),
            ["3 of 12 images are missing", "question '2-0': there is no image", "val_000002.png"],
        ),
        (changed(lambda text: ""), ["val_questions.jsonl", "no questions"]),
    ],
)
def test_bad_data_is_named_and_nothing_is_overwritten(model_folder, finished, tmp_path, capsys, change, words):
    make_scenes(tmp_path / "data")
    change(tmp_path / "data")
    before = tree(finished)
    evaluate(model_folder, tmp_path / "data", finished, "--overwrite", code=2)
    captured = capsys.readouterr()
    assert all(word in captured.err for word in words) and not captured.out
    assert tree(finished) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--benchmark", "pope"], "the data of benchmark 'pope' is not there"),
        (["--benchmark", "pop"], "Did you mean 'pope'"),
        (["--model", "nowhere"], "there is no model folder"),
        (["--model", str(Path(__file__).parent)], "tove_llava.json"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--device", "cuda:0"], "no CUDA device"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--detach", "sonar"], "sonar"),
        (["--conv-mode", "v11"], "unknown conversation template 'v11'"),
        (["--num-beams", "2", "--temperature", "1"], "not both"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--score-options", "likelyhood"], "Available: likelihood, likelihood_text"),
        (["--score-options", "likelihood"], "question '0-0' of 'scenes' lists no options"),
    ],
)
def test_bad_input_is_explained_and_nothing_is_overwritten(model_folder, data, finished, capsys, change, words):
    if "cuda" in words.lower() and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = tree(finished)
    evaluate(model_folder, data, finished, "--overwrite", *change, code=2)
    assert words in capsys.readouterr().err
    assert tree(finished) == before


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "llava"}', '{"model_type": "bert"}', "[]"])
def test_a_folder_that_is_no_model_is_refused(data, finished, tmp_path, capsys, content):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    before = tree(finished)
    evaluate(tmp_path / "model", data, finished, "--overwrite", code=2)
    assert str(tmp_path / "model") in capsys.readouterr().err
    assert tree(finished) == before


def test_two_questions_of_one_id_get_an_answer_each(answerer, data, tmp_path):
    image = data / "images" / "val_000000.png"
    questions = [Question("existence/1.png", text, image) for text in ("Is there a cat?", "Is there a dog, too?")]
    for _ in range(2):  # the second time all is answered already
        rows = answer_questions(answerer, "mme", questions, tmp_path)
        assert [row["prompt"] for row in rows] == [question.text for question in questions]
        assert len({row["answer_id"] for row in rows}) == 2


def test_images_inside_the_question_file(answerer, data, tmp_path):
    file, texts = data / "images" / "val_000000.png", []
    embedded = EmbeddedImage("row 1", base64.b64encode(file.read_bytes()).decode())
    for image in (file, embedded):
        (row,) = answer_questions(answerer, "mmbench", [Question(1, "Which?", image)], tmp_path / str(len(texts)))
        texts.append(row["text"])
    assert texts[0] == texts[1]
    with pytest.raises(DataError, match="question 1: image row 2 is not base64"):
        answer_questions(answerer, "mmbench", [Question(1, "Which?", EmbeddedImage("row 2", "?"))], tmp_path / "bad")


def test_answers_without_public_truth_are_kept_and_not_scored(model_folder, tmp_path):
    data = tmp_path / "data"
    make_scenes(data / "vqav2" / "rows")
    (data / "vqav2" / "rows" / "images").rename(data / "vqav2" / "test2015")
    row = {"question_id": 1, "image": "val_000000.png", "text": "What?", "category": "default"}
    write_rows(data / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl", [row])
    evaluate(model_folder, data, tmp_path / "out", benchmark="vqav2")
    results = scores_of(tmp_path / "out", "vqav2")["full"]
    assert results["scores"] == {} and "submission" in results["unavailable"]["all"]
    assert len(read_rows(tmp_path / "out" / "vqav2" / "full" / "answers.jsonl")) == 1


def test_a_public_benchmarks_name_over_generated_scenes_is_told_apart(model_folder, tmp_path, capsys):
    root = tmp_path / "data"
    assert cli.main(["scenes", "--out", str(root), "--train", "1", "--val", "6"]) == 0
    evaluate(model_folder, root, tmp_path / "out", "--limit", "2", benchmark="pope")
    assert "generated scenes" in capsys.readouterr().out
    evaluate(model_folder, root, tmp_path / "out2", "--limit", "2")
    assert "generated scenes" not in capsys.readouterr().out
