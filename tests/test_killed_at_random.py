"""A command that is killed at random moments, and given again, ends like an uninterrupted one.

TOVE_KILLS sets the number of kills of each kind (2), TOVE_KILLS_SEED their moments.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch
from answer_parts import save_model
from train_parts import flags, free_port, losses, weights, write_inputs

from tove_llava.cli import main as cli
from tove_llava.scenes.writer import Request, write_scenes

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("TOVE_KILLS", "2"))
SCHEDULE = ["--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "3"]
KINDS = (
    "pretrain", "finetune_lora", "finetune", "merge", "zero2", "zero3", "eval", "features", "scenes", "export",
    "convert", "merge-lora",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Inputs of every kind: parts, records, a start for stage 2 and merging, adapters, a whole model, scenes."""
    folder = write_inputs(tmp_path_factory.mktemp("killed"))
    save_model(folder)  # folder/model
    write_scenes(Request({"val": 8}), folder / "scenes")
    start, adapted = folder / "start", folder / "adapted"
    assert cli(["train", *flags(folder, "pretrain", start, "--max_steps", "2")]) == 0
    more = ("--pretrained", str(start), "--max_steps", "2")
    assert cli(["train", *flags(folder, "finetune_lora", adapted, *more)]) == 0
    return folder


def command(kind, root, out):
    model = ["--model", str(root / "model")]
    if kind == "eval":
        data = ["--benchmark", "scenes", "--data-root", str(root / "scenes"), "--output", str(out)]
        return ["eval", *model, *data, "--device", "cpu", "--batch-size", "4"]
    if kind == "features":
        data = ["--data", str(root / "captions.json"), "--image-folder", str(root / "images"), "--out", str(out)]
        return ["features", "--preset", str(root / "preset.yaml"), *data, "--shard-images", "2", "--batch-size", "2"]
    if kind == "scenes":
        return ["scenes", "--out", str(out), "--train", "12", "--val", "6", "--maps"]
    if kind == "export":
        return ["export", *model, "--format", "remote-code", "--out", str(out)]
    if kind == "convert":
        tower = ["--preset", str(root / "preset.yaml")]
        return ["convert", "--model", str(root / "foreign"), "--out", str(out), *tower]
    if kind == "merge-lora":
        return ["merge-lora", "--model", str(root / "adapted"), "--out", str(out), "--self-contained"]
    stage = "finetune_lora" if kind.startswith("zero") else kind
    more = [] if kind == "pretrain" else ["--pretrained", str(root / "start")]
    more += ["--lora_dropout", "0.2"] if stage == "finetune_lora" else []
    more += ["--deepspeed", kind, "--per_device_train_batch_size", "2"] if kind.startswith("zero") else []
    return ["train", *flags(root, stage, out, *SCHEDULE, *more)]


def run(words, log, ranks=1):
    """Run a verb in forks of this process, which need no imports; return them, in one process group."""
    context, port, started = multiprocessing.get_context("fork"), str(free_port()), []

    def rank(number, group):
        os.setpgid(0, group)
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if ranks > 1:
            os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(ranks))
            os.environ.update(LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os._exit(cli(words))

    for number in range(ranks):
        started.append(context.Process(target=rank, args=(number, started[0].pid if started else 0)))
        started[-1].start()
    return started


def ended(processes, seconds):
    """Wait for all; kill them after this time. Return their exit codes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.is_alive() for process in processes):
        time.sleep(0.01)
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def assert_same(kind, out, whole):
    """Compare a result with the uninterrupted one; nothing else is left."""
    if kind in ("features", "scenes", "export", "convert", "merge-lora"):
        one, other = content(out), content(whole)
        assert one.keys() == other.keys()
        assert [name for name in one if one[name] != other[name]] == []
    elif kind == "eval":
        rows, expected = ((f / "scenes/full/answers.jsonl").read_text() for f in (out, whole))
        assert rows == expected
        scores, wanted = (json.loads((f / "results.json").read_text())["benchmarks"] for f in (out, whole))
        assert scores["scenes"]["full"]["scores"] == wanted["scenes"]["full"]["scores"]
        assert content(out).keys() == content(whole).keys()
    else:
        terms = ("step", "lm_loss", "aux_loss", "merge_loss", "learning_rate")
        torch.testing.assert_close(*(torch.tensor(losses(f, *terms)) for f in (out, whole)), rtol=0, atol=1e-6)
        torch.testing.assert_close(weights(out), weights(whole), rtol=0, atol=1e-6)
        assert {name.name for name in out.iterdir()} == {name.name for name in whole.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_command_ends_as_the_whole_one_does(root, tmp_path, kind, request):
    if kind == "convert" and not (root / "foreign").exists():
        shutil.copytree(request.getfixturevalue("world").whole, root / "foreign")
    ranks, moments = 2 if kind.startswith("zero") else 1, random.Random(os.environ.get("TOVE_KILLS_SEED", kind))
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    begin = time.monotonic()
    assert ended(run(command(kind, root, whole), log, ranks), 300) == [0] * ranks, log.read_text()[-3000:]
    length, kills, finished = time.monotonic() - begin, 0, 0
    while True:
        codes = ended(run(command(kind, root, out), log, ranks), moments.uniform(0, length) if kills < KILLS else 300)
        if codes == [2] and "out exists and is not empty" in log.read_text().splitlines()[-1]:
            codes = [0]  # killed when the folder had its name already
        if codes != [0] * ranks:
            assert kills < KILLS and -signal.SIGKILL in codes, log.read_text()[-3000:]
            kills += 1
            continue
        assert_same(kind, out, whole)
        finished += 1
        if kills == KILLS:
            break
        shutil.rmtree(out)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out", "log"}, "a stage or a lock was left"
    print(f"\n{kind}: {kills} kills within {length:.1f} s each, {finished} results, all equal")
