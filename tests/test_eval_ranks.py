"""Interrupted runs and several processes end with what one uninterrupted process has."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from answer_parts import make_scenes, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from score_parts import read_rows

from tove_llava.eval.benchmarks import Question, get_benchmark
from tove_llava.eval.conditions import FULL
from tove_llava.eval.question_loader import portions
from tove_llava.eval.runner import Ranks, Settings, run_benchmark
from tove_llava.eval.tasks import Task

IMAGES = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_scenes(root, images=IMAGES)
    return root


@pytest.fixture(scope="module")
def whole(answerer, data, tmp_path_factory):
    """Folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    rows = run(answerer, data, folder).rows
    assert len({row["text"] for row in rows}) > 3, "a model that always says the same would prove nothing"
    return folder


def run(answerer, data, folder, batch_size=32, ranks=None):
    task = Task.read("scenes", get_benchmark("scenes"), data)
    return run_benchmark(answerer, task, folder, FULL, Settings("m", batch_size=batch_size), ranks, label=None)


def answers(folder):
    return set((folder / "answers.jsonl").read_text(encoding="utf-8").splitlines())


def scores(rows, data):
    """Score against a truth of which about half is the model's."""
    benchmark = get_benchmark("scenes")
    said = {row["question_id"]: row["text"] for row in rows}
    truth = benchmark.ground_truth(data)
    for place, row in enumerate(truth):
        row["answer"] = said[row["question_id"]] if place % 2 else "something else"
    return benchmark.score(rows, truth).scores


class Together(Ranks):
    """Processes played by threads."""

    def __init__(self, rank, world, barrier, counts, lock):
        super().__init__(rank, world)
        self.barrier, self.shared, self.lock = barrier, counts, lock

    def wait(self):
        self.barrier.wait(timeout=60)

    def add(self, counter, amount):
        with self.lock:
            self.shared[counter] = self.shared.get(counter, 0) + amount
            return self.shared[counter]


def run_together(answerer, data, folder, world, batch_size, kind=Together):
    barrier, counts, lock, results = threading.Barrier(world), {}, threading.Lock(), {}

    def work(rank):
        try:
            results[rank] = run(answerer, data, folder, batch_size, kind(rank, world, barrier, counts, lock))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return results


@given(world=st.integers(1, 4), batch_size=st.integers(1, 20))
@settings(max_examples=12, deadline=None)
def test_answers_and_scores_depend_on_neither_ranks_nor_batch(answerer, data, whole, world, batch_size):
    folder = Path(tempfile.mkdtemp(dir=whole))
    results = run_together(answerer, data, folder, world, batch_size)
    assert (folder / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
    assert {rank: bool(result.rows) for rank, result in results.items()} == {rank: rank == 0 for rank in range(world)}
    assert scores(results[0].rows, data) == scores(read_rows(whole / "answers.jsonl"), data)
    assert {result.answered for result in results.values()} == {3 * IMAGES}
    assert IMAGES <= results[0].images <= 3 * IMAGES
    assert not list(folder.glob("answers.part*"))


class Late(Together):
    """Processes of which the second is slow to read answers, and to give them."""

    waits = 0

    def wait(self):
        super().wait()
        self.waits += 1
        if self.waits == 1:  # before it reads the answers that are there
            time.sleep(0.5 * self.rank)

    def add(self, counter, amount):
        value = super().add(counter, amount)
        if counter.endswith("claimed"):
            time.sleep(0.3 * self.rank)
        return value


def test_no_rank_is_ahead_of_a_slow_one(answerer, data, whole, tmp_path):
    results = run_together(answerer, data, tmp_path, 2, 2, Late)
    assert {result.answered for result in results.values()} == {3 * IMAGES}
    assert answers(tmp_path) == answers(whole)
    assert not list(tmp_path.glob("answers.part*"))


def test_every_question_is_taken_by_one_rank_and_both_have_some(answerer, data, tmp_path, monkeypatch):
    taken, real = {}, Together.add

    def add(self, counter, amount):
        if counter.endswith("answered"):
            taken[self.rank] = taken.get(self.rank, 0) + amount
        return real(self, counter, amount)

    monkeypatch.setattr(Together, "add", add)
    run_together(answerer, data, tmp_path, world=2, batch_size=4)
    assert sum(taken.values()) == 3 * IMAGES and min(taken.values()) > 0


asked = st.lists(st.tuples(st.none() | st.integers(0, 5), st.integers(1, 30)), max_size=60).map(
    lambda rows: [
        Question(index, "w" * length, None if image is None else Path(f"{image}.png"))
        for index, (image, length) in enumerate(rows)
    ]
)


@given(asked, st.integers(1, 16), st.integers(1, 4))
def test_portions_hold_every_question_once_and_keep_images_together(questions, batch_size, world):
    work = portions(questions, batch_size, world)
    flat = [question for portion in work for question in portion]
    assert sorted(question.question_id for question in flat) == list(range(len(questions)))
    assert all(1 <= len(portion) <= batch_size for portion in work)
    images = [question.image for question in flat]
    assert images == sorted(images, key=images.index), "questions about an image follow one another"
    with_image = [question.image is not None for question in flat]
    assert with_image == sorted(with_image, reverse=True)


@given(st.integers(200, 600), st.integers(2, 8), st.lists(st.floats(0.5, 2), min_size=8, max_size=8))
def test_ranks_of_different_speed_finish_together(count, world, speeds):
    questions = [Question(index, "w" * (index % 30 + 1), Path(f"{index // 3}.png")) for index in range(count)]
    work = portions(questions, 32, world)
    clocks = [0.0] * world
    for portion in work:
        rank = clocks.index(min(clocks))
        clocks[rank] += len(portion) * speeds[rank]
    assert max(clocks) - min(clocks) <= 3 * 2 * 2, "they differ by two small portions at most"


def test_long_questions_come_first():
    questions = [Question(index, "w" * length, None) for index, length in enumerate([3, 30, 1, 20])]
    assert [question.question_id for portion in portions(questions, 2) for question in portion] == [1, 3, 0, 2]


def _answer_in_child(answerer, data, folder, batch_size):
    torch.set_num_threads(1)  # a forked process must not use its parent's pool
    run(answerer, data, folder, batch_size)
    os._exit(0)


def test_a_run_killed_again_and_again_ends_with_the_same_file(answerer, data, whole, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dice = random.Random(5)
    fork = multiprocessing.get_context("fork")
    try:
        started = time.monotonic()
        run(answerer, data, tmp_path / "timed", batch_size=2)
        lasts = time.monotonic() - started
        seen, kills = set(), 0
        for _ in range(40):
            process = fork.Process(target=_answer_in_child, args=(answerer, data, tmp_path / "run", 2))
            process.start()
            process.join(dice.uniform(0, lasts / 4))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
            parts = (tmp_path / "run").glob("answers*.jsonl")
            lines = {line for part in parts for line in part.read_text(encoding="utf-8").split("\n")[:-1]}
            assert seen <= lines <= answers(whole), "nothing is lost, and nothing but right answers is written"
            seen = lines
    finally:
        torch.set_num_threads(threads)
    assert kills >= 5
    result = run(answerer, data, tmp_path / "run", batch_size=2)
    assert answers(tmp_path / "run") == answers(whole)
    assert scores(result.rows, data) == scores(read_rows(whole / "answers.jsonl"), data)


def command(model, data, out, *more):
    # The dummy experts of the tests must be registered in the process that loads the model.
    program = "import sys, tower_parts; from tove_llava.cli import main; sys.exit(main())"
    arguments = ["eval", "--model", model, "--benchmark", "scenes", "--data-root", data, "--output", out, *more]
    return [sys.executable, "-c", program, *map(str, arguments), "--device", "cpu"]


def environment(**more):
    tests = Path(__file__).parent
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}:{tests}", **more}


def two_ranks(arguments, port):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launched = [
        subprocess.Popen(arguments, env=environment(RANK=rank, LOCAL_RANK=rank, **shared), **pipes) for rank in "01"
    ]
    return launched, [process.communicate(timeout=240) for process in launched]


def one_process(arguments):
    return subprocess.run(arguments, env=environment(), check=True, timeout=240, capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def written(folder):
    return sum(part.read_bytes().count(b"\n") for part in folder.glob("answers*"))


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(model, tmp_path):
    make_scenes(tmp_path / "data", images=20)
    one = one_process(command(model, tmp_path / "data", tmp_path / "1", "--batch-size", "3"))
    launched, outputs = two_ranks(command(model, tmp_path / "data", tmp_path / "2", "--batch-size", "4"), 29613)
    assert [process.returncode for process in launched] == [0, 0], outputs
    assert outputs[0][0] == one.stdout and not outputs[1][0], "one table, from the first process"
    assert answers(tmp_path / "1/scenes/full") == answers(tmp_path / "2/scenes/full")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in "12"]
    assert [result["processes"] for result in results] == [1, 2]
    first, second = (result["benchmarks"]["scenes"]["full"] for result in results)
    assert first["scores"] == second["scores"] and first["questions_answered"] == second["questions_answered"] == 60


@pytest.mark.slow
def test_when_one_process_fails_the_other_does_not_wait_for_ever(model, tmp_path):
    make_scenes(tmp_path / "data", images=20)
    (tmp_path / "data/images/val_000007.png").write_bytes(b"not an image")
    launched, outputs = two_ranks(command(model, tmp_path / "data", tmp_path / "out"), 29617)
    assert all(process.returncode for process in launched)
    assert any("question '7-" in errors and "is not an image" in errors for _, errors in outputs)
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.slow
def test_a_killed_command_goes_on_when_it_is_given_again(model, tmp_path):
    make_scenes(tmp_path / "data", images=60)
    one_process(command(model, tmp_path / "data", tmp_path / "whole"))
    dice = random.Random(1)
    arguments = command(model, tmp_path / "data", tmp_path / "out", "--batch-size", "1")
    folder = tmp_path / "out/scenes/full"
    for _ in range(2):
        process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted, deadline = written(folder) + dice.randrange(5, 60), time.monotonic() + 120
        while written(folder) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = one_process(arguments)
    assert answers(folder) == answers(tmp_path / "whole/scenes/full")
    results = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "whole"))
    result, whole = (each["benchmarks"]["scenes"]["full"] for each in results)
    assert result["scores"] == whole["scores"] and 0 < result["questions_answered"] < 180
    assert "scenes: 100%" in last.stderr and "180/180" in last.stderr
