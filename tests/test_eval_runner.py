import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from answer_parts import make_answerer, make_scenes, save_model

from tove_llava import cli
from tove_llava.errors import ConfigError, DataError
from tove_llava.eval.benchmarks import Question, get_benchmark
from tove_llava.eval.conditions import ALL, BLANK, DETACHED, FULL, Condition, parse_conditions
from tove_llava.eval.pictures import EmbeddedPicture
from tove_llava.eval.rows import AppendFile
from tove_llava.eval.runner import run_benchmark, spread


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    return make_answerer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_scenes(root)
    return root


def answer(answerer, data, folder, condition=FULL, **options):
    benchmark = get_benchmark("scenes")
    rows = run_benchmark(answerer, benchmark, benchmark.questions(data), folder, condition, model_id="m", **options)
    return {row["question_id"]: row["text"] for row in rows}


def test_answers_do_not_depend_on_the_batch(answerer, data, tmp_path):
    one = answer(answerer, data, tmp_path / "1", batch_size=1)
    assert len(set(one.values())) > 3, "a model that always says the same would prove nothing"
    for size in (3, 5, 64):
        assert answer(answerer, data, tmp_path / str(size), batch_size=size) == one


def test_answer_lines_are_llavas(answerer, data, tmp_path):
    answer(answerer, data, tmp_path)
    questions = [json.loads(line) for line in (data / "val_questions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in questions]
    assert set(rows[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert rows[0]["prompt"] == questions[0]["text"] and rows[0]["metadata"] == {"category": "count"}
    assert not list(tmp_path.glob("answers.part*"))


def test_the_prompt_is_llavas(answerer):
    from tove_llava.eval.runner import _prompt

    ids = _prompt(answerer, Question(1, "Is it red?", Path("x.png")))
    images = [index for index, token in enumerate(ids) if token == answerer.image_token_id]
    assert len(images) == answerer.num_image_tokens == 16 and images[-1] - images[0] == 15
    text = answerer.tokenizer.decode(ids[images[-1] + 1 :])
    assert text == "\nIs it red? ASSISTANT:"
    before = answerer.tokenizer.decode(ids[: images[0]], skip_special_tokens=True)
    assert before.startswith("A chat between a curious user") and before.endswith("USER: ")


def test_blank_images_are_all_alike_and_detached_experts_come_back(answerer, data, tmp_path):
    full = answer(answerer, data, tmp_path / "full")
    blank = answer(answerer, data, tmp_path / "blank", BLANK)
    by_question = {}
    for key, text in blank.items():
        by_question.setdefault(key.split("-")[1], set()).add(text)
    assert all(len(texts) == 1 for texts in by_question.values())
    assert blank != full
    detached = answer(answerer, data, tmp_path / "detached", DETACHED)
    assert detached != full
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
    encoded = []
    real = answerer.features
    monkeypatch.setattr(answerer, "features", lambda pixels: encoded.append(len(pixels)) or real(pixels))
    answer(answerer, data, tmp_path, batch_size=2)
    assert sum(encoded) == 4


class Crash(Exception):
    pass


@pytest.mark.parametrize("torn", [b"", b'{"question_id": "3-2", "text": "half an ans'])
def test_a_broken_run_goes_on_where_it_stopped(answerer, data, tmp_path, monkeypatch, torn):
    whole = answer(answerer, data, tmp_path / "whole", batch_size=2)
    real, calls = answerer.generate, []

    def fail_at_the_third(prompts, *rest, **options):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise Crash
        return real(prompts, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(answerer, "generate", fail_at_the_third)
        with pytest.raises(Crash):
            answer(answerer, data, tmp_path / "run", batch_size=2)
    (part,) = (tmp_path / "run").glob("answers.part*.jsonl")
    assert part.read_bytes().count(b"\n") == 4
    part.write_bytes(part.read_bytes() + torn)

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(answerer, "generate", lambda p, *r, **o: asked.append(len(p)) or real(p, *r, **o))
        assert answer(answerer, data, tmp_path / "run", batch_size=2) == whole
        assert sum(asked) == 8
        assert answer(answerer, data, tmp_path / "run", batch_size=2) == whole
        assert sum(asked) == 8, "a finished run asks nothing again"


def test_answers_of_another_run_are_not_used(answerer, data, tmp_path):
    answer(answerer, data, tmp_path)
    before = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(DataError, match="blank_image differ.*--overwrite"):
        answer(answerer, data, tmp_path, BLANK)
    weight = answerer.model.model.multi_modal_projector.linear_1.weight
    with torch.no_grad():
        weight.add_(1)
    try:
        with pytest.raises(DataError, match="weights differ"):
            answer(answerer, data, tmp_path)
    finally:
        with torch.no_grad():
            weight.sub_(1)
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_a_limit_spreads_over_the_file_and_can_be_raised(answerer, data, tmp_path):
    some = answer(answerer, data, tmp_path, limit=4)
    assert len(some) == 4 and {key.split("-")[0] for key in some} == {"0", "1", "2", "3"}
    every = answer(answerer, data, tmp_path)
    assert len(every) == 12 and some.items() <= every.items()
    assert spread([1, 2, 3], 5) == [1, 2, 3]


def test_a_picture_that_cannot_be_read_names_the_question(answerer, tmp_path):
    make_scenes(tmp_path / "data", images=3)
    (tmp_path / "data" / "images" / "val_000001.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"question '1-\d': .*val_000001.png is not a picture"):
        answer(answerer, tmp_path / "data", tmp_path / "run", batch_size=2)


def test_append_file_keeps_whole_lines_only(tmp_path):
    file = tmp_path / "rows.jsonl"
    with AppendFile(file) as out:
        out.append([{"a": 1}, {"a": "é"}])
    file.write_bytes(file.read_bytes() + b'{"a": 3')
    with AppendFile(file) as out:
        out.append([{"a": 4}])
    assert [json.loads(line)["a"] for line in file.read_text().splitlines()] == [1, "é", 4]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, False, None), [FULL]),
        (("blank,detached,full", False, None), [BLANK, DETACHED, FULL]),
        ((None, True, None), [Condition("blank", "image blanked", True)]),
        (
            (None, True, "edge,depth"),
            [Condition("blank+without-depth-edge", "image blanked, without depth, edge", True, ("depth", "edge"))],
        ),
        ((None, False, "all"), [Condition("without-all", "without all", False, (ALL,))]),
    ],
)
def test_conditions_of_a_command_line(arguments, expected):
    assert parse_conditions(*arguments) == expected


@pytest.mark.parametrize("arguments", [("fool", False, None), ("", False, None), ("full", True, None)])
def test_wrong_conditions_are_refused(arguments):
    with pytest.raises(ConfigError):
        parse_conditions(*arguments)


# -- the command, on a folder as training writes it -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved"))


def evaluate(model_folder, data, output, *more, benchmark="scenes"):
    arguments = [
        "--model",
        str(model_folder),
        "--benchmark",
        benchmark,
        "--data-root",
        str(data),
        "--output",
        str(output),
    ]
    return ["eval", *arguments, "--device", "cpu", *more]


def test_table_has_question_types_as_rows_and_conditions_as_columns(model_folder, data, tmp_path, capsys):
    assert cli.main(evaluate(model_folder, data, tmp_path, "--conditions", "blank,detached,full")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "scenes (%)"
    assert [head in lines[0] for head in ("image blanked", "experts detached", "ToVE")] == [True] * 3
    assert [line.split()[0] for line in lines[2:6]] == ["colour", "count", "left_of", "overall"]
    assert lines[5].split()[-1] == "12"
    results = json.loads((tmp_path / "results.json").read_text())["benchmarks"]["scenes"]
    assert set(results) == {"blank", "detached", "full"} and results["full"]["count"] == 12


def test_json_has_the_scores_of_every_benchmark(model_folder, data, tmp_path, capsys):
    assert cli.main(evaluate(model_folder, data, tmp_path, "--limit", "6", "--json", benchmark="all")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["benchmarks"]["scenes"]["full"]["count"] == 6
    assert list(result["benchmarks"]) == ["scenes"], "pope's data is not there"


def test_saved_model_answers_as_the_one_in_memory(model_folder, data, tmp_path, answerer):
    from tove_llava.serve.generation import Answerer

    loaded = Answerer.load(model_folder, device="cpu")
    assert answer(loaded, data, tmp_path / "a") == answer(answerer, data, tmp_path / "b")
    assert loaded.template.name == "v1" and loaded.transform.aspect_ratio == "pad"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--benchmark", "pope"], "the data of benchmark 'pope' is not there"),
        (["--benchmark", "pop"], "Did you mean 'pope'"),
        (["--model", "nowhere"], "there is no model folder"),
        (["--model", "tests"], "tove_llava.json"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--device", "cuda:0"], "no CUDA device"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--detach", "sonar"], "sonar"),
    ],
)
def test_bad_input_is_explained(model_folder, data, tmp_path, capsys, change, words):
    if "cuda" in words.lower() and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if change[-1] == "tests":
        change = [change[0], str(Path(__file__).parent)]
    assert cli.main([*evaluate(model_folder, data, tmp_path), *change]) == 2
    assert words in capsys.readouterr().err


def command(*arguments):
    tests = str(Path(__file__).parent)
    # The dummy experts of the tests must be registered in the process that loads the model.
    program = "import sys, tower_parts; from tove_llava.cli import main; sys.exit(main())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": tests}
    return [sys.executable, "-c", program, *arguments], environment


@pytest.mark.slow
def test_a_killed_process_loses_and_repeats_nothing(model_folder, tmp_path):
    make_scenes(tmp_path / "data", images=60)
    arguments, environment = command(*evaluate(model_folder, tmp_path / "data", tmp_path / "out", "--batch-size", "1"))
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "out" / "scenes" / "full" / "answers.part0.jsonl"
    deadline = time.monotonic() + 90
    while not (part.exists() and part.read_bytes().count(b"\n") >= 10):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [json.loads(line)["answer_id"] for line in part.read_text().split("\n")[:-1]]
    assert 10 <= len(kept) < 180
    subprocess.run(arguments, env=environment, check=True, timeout=150, capture_output=True)
    lines = (tmp_path / "out" / "scenes" / "full" / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["question_id"] for row in rows}) == len(rows) == 180
    assert set(kept) <= {row["answer_id"] for row in rows}


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(model_folder, data, tmp_path):
    texts = {}
    for world in (1, 2):
        processes = []
        for rank in range(world):
            arguments, environment = command(*evaluate(model_folder, data, tmp_path / str(world), "--batch-size", "2"))
            if world > 1:
                environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"}
            processes.append(subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate(timeout=150)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * world
        assert "overall" in outputs[0] and not any(outputs[1:])
        lines = (tmp_path / str(world) / "scenes" / "full" / "answers.jsonl").read_text().splitlines()
        texts[world] = {row["question_id"]: row["text"] for row in map(json.loads, lines)}
    assert texts[1] == texts[2]


def test_two_questions_of_one_id_get_an_answer_each(answerer, data, tmp_path):
    benchmark = get_benchmark("mme")
    image = data / "images" / "val_000000.png"
    questions = [Question("existence/1.png", text, image) for text in ("Is there a cat?", "Is there a dog, too?")]
    for _ in range(2):  # the second time all is answered already
        rows = run_benchmark(answerer, benchmark, questions, tmp_path, FULL, limit=None)
        assert [row["prompt"] for row in rows] == [question.text for question in questions]
        assert len({row["answer_id"] for row in rows}) == 2


def test_pictures_inside_the_question_file(answerer, data, tmp_path):
    content = base64.b64encode((data / "images" / "val_000000.png").read_bytes()).decode()
    benchmark = get_benchmark("mmbench")
    texts = {}
    for name, image in (
        ("file", data / "images" / "val_000000.png"),
        ("embedded", EmbeddedPicture("row 1", content)),
    ):
        (row,) = run_benchmark(answerer, benchmark, [Question(1, "Which?", image)], tmp_path / name, FULL)
        texts[name] = row["text"]
    assert texts["embedded"] == texts["file"]
    with pytest.raises(DataError, match="question 1: picture row 2 is not base64"):
        run_benchmark(
            answerer, benchmark, [Question(1, "Which?", EmbeddedPicture("row 2", "?"))], tmp_path / "bad", FULL
        )


def test_answers_without_public_truth_are_kept_and_not_scored(tmp_path):
    folder = save_model(tmp_path)
    data = tmp_path / "data"
    make_scenes(data / "vqav2" / "rows")
    (data / "vqav2" / "rows" / "images").rename(data / "vqav2" / "test2015")
    rows = [{"question_id": 1, "image": "val_000000.png", "text": "What?", "category": "default"}]
    file = data / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--benchmark", "vqav2", "--data-root", str(data), "--device", "cpu"]
    assert cli.main(["eval", "--model", str(folder), *flags]) == 0
    results = json.loads((folder / "eval" / "results.json").read_text())["benchmarks"]["vqav2"]["full"]
    assert results["scores"] == {} and "submission" in results["unavailable"]["all"]
    assert len((folder / "eval" / "vqav2" / "full" / "answers.jsonl").read_text().splitlines()) == 1
