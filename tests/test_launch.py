"""Ranks are started, get signals, and leave no orphan; environment variables become flags."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from train_parts import ROOT, environment, flags, free_port, write_inputs

from tove_llava import cli
from tove_llava.cli.launch import trainer_flags
from tove_llava.core.errors import ConfigError
from tove_llava.core.locks import LOCK, is_locked
from tove_llava.train import launcher
from tove_llava.train.launcher import Launch, plan, run_ranks

OUT = "outputs/quickstart"

# A rank that takes half a second to save after SIGINT or SIGTERM.
SAVES = r"""
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    sys.stdout.write(f"saved {os.environ['RANK']}\n")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
sys.stdout.write(f"ready {os.getpid()}\n")
time.sleep(60)
"""


def started(program, tmp_path, grace=20.0):
    """Launch two ranks that run a program; return the launcher once both are ready."""
    code = f"import sys; from tove_llava.train import launcher as l; l.RANK = ['-c', {program!r}]; l.GRACE = {grace}; "
    code += "sys.exit(l.run_ranks(l.Launch(2), []))"
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=file, start_new_session=True)
    waited(lambda: log.read_text().count("ready") == 2 or process.poll() is not None)
    return process, log


def run_stage(root, *more):
    """Launch stage 1 on two ranks under ZeRO-2."""
    words = flags(root, "pretrain", root / "out", "--save_strategy", "no", *more)
    words = [word for word in words if word not in ("--stage", "pretrain")]
    command = [sys.executable, "-m", "tove_llava", "launch", "pretrain", "--gpus", "2", *words]
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), cwd=ROOT, **kept)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("launch"))


def test_a_wrong_flag_of_the_trainer_is_one_message(root):
    process = run_stage(root, "--max_stepz", "3")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2 and output.count("--max_steps") == 1 and "Traceback" not in output
    assert len(output.splitlines()) == 2, "what is started, and what is wrong"


def test_a_terminated_run_has_a_checkpoint(root):
    process = run_stage(root, "--max_steps", "100000", "--num_train_epochs", "100000")
    for line in process.stdout:
        if line.startswith("step 2"):
            process.terminate()
            break
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 143, output
    assert list((root / "out").glob("checkpoint-*"))


def waited(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)], ids=["TERM", "INT", "HUP"]
)
def test_ranks_get_a_signal_and_are_waited_for(tmp_path, sent, code):
    if signal.getsignal(sent) is signal.SIG_IGN:
        pytest.skip("the tests run under nohup, whose processes ignore this signal")
    process, log = started(SAVES, tmp_path)
    os.killpg(process.pid, sent)  # as a terminal does
    assert process.wait(60) == code
    assert sorted(line for line in log.read_text().splitlines() if "saved" in line) == ["saved 0", "saved 1"]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_ranks_end_with_a_killed_launcher(tmp_path):
    process, log = started(SAVES, tmp_path)
    process.kill()
    process.wait(60)
    waited(lambda: log.read_text().count("saved") == 2)
    pids = [int(line.split()[1]) for line in log.read_text().splitlines() if "ready" in line]
    waited(lambda: not any(map(is_alive, pids)))


@pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc are Linux's")
@pytest.mark.parametrize("killed", ["runner", "launcher"])
def test_a_rank_ends_with_deepspeeds_processes(tmp_path, killed):
    """DeepSpeed's command runs its launcher, which runs the ranks and outlives the command."""
    rank = "import time; from tove_llava.train.launcher import end_with_launcher as e; e(); print('ready', flush=True)"
    rank, waits = f"{rank}; time.sleep(60)", "print(p.pid, flush=True); p.wait()"
    starts = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {!r}]); {}".format
    runner = tmp_path / "deepspeed"
    runner.write_text(starts(starts(rank, waits), waits))
    command = [sys.executable, str(runner)]
    kept = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, env=environment(LOCAL_RANK="0"), **kept)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid if killed == "runner" else pids[0], signal.SIGTERM)
    waited(lambda: not is_alive(pids[1]))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("module", ["deepspeed.launcher.runner", "torch.distributed.run"])
def test_ranks_of_other_launchers_save_and_end(root, tmp_path, module, sent):
    output = tmp_path / "out"
    words = flags(root, "pretrain", output, "--max_steps", "100000", "--num_train_epochs", "100000")
    options = ["--nproc_per_node=2", f"--master_port={free_port()}", "-m"]
    if "deepspeed" in module:
        options = ["--num_gpus=2", *options[1:2], "--no_local_rank", "--module"]
    command = [sys.executable, "-m", module, *options, "tove_llava", "train", *words]
    log = tmp_path / "log"
    with log.open("w") as file:
        kept = {"stdout": file, "stderr": file, "start_new_session": True, "cwd": ROOT}
        process = subprocess.Popen(command, env=environment(), **kept)
    try:
        waited(lambda: "step 2 of" in log.read_text() or process.poll() is not None)
        os.kill(process.pid, sent)
        process.wait(60)
        if module.startswith("deepspeed") or sent == signal.SIGKILL:  # torchrun itself ends ranks that save
            waited(lambda: list(output.glob("checkpoint-*")))
        waited(lambda: not is_locked(output / LOCK))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_the_first_failed_rank_gives_the_code_and_ends_the_others(monkeypatch):
    program = "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else sys.exit(7)"
    monkeypatch.setattr(launcher, "RANK", ["-c", program])
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    start = time.monotonic()
    assert run_ranks(Launch(2), []) == 7
    assert time.monotonic() - start < 30


SLOW = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(1.5 * int(os.environ["RANK"]))
    sys.stdout.write(f"saved {os.environ['RANK']}\\n"); sys.stdout.flush()
    os._exit(128 + number)
signal.signal(signal.SIGTERM, save)
sys.stdout.write("ready\\n"); sys.stdout.flush()
time.sleep(60)
"""


def test_a_rank_that_saved_first_does_not_end_the_others(tmp_path):
    process, log = started(SLOW, tmp_path, grace=0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert sorted(line for line in log.read_text().splitlines() if "saved" in line) == ["saved 0", "saved 1"]


def test_ranks_find_each_other_and_get_the_flags(monkeypatch, tmp_path):
    program = "import os, sys; open(os.environ['RANK'], 'w').write(f'{sys.argv[1:]} {os.environ}')"
    monkeypatch.setattr(launcher, "RANK", ["-c", program])
    monkeypatch.chdir(tmp_path)
    assert run_ranks(Launch(2, port=1234), ["--set", "a b=c"]) == 0
    for rank in "01":
        text = (tmp_path / rank).read_text()
        assert text.startswith("['--set', 'a b=c']") and "'WORLD_SIZE': '2'" in text and "'MASTER_PORT': '1234'" in text
        assert f"'LOCAL_RANK': '{rank}'" in text


def test_one_rank_for_each_visible_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert str(plan(None, None, None, None)) == "2 processes with a GPU each"
    assert plan(8, None, __file__, None).processes == 8  # of other nodes
    with pytest.raises(ConfigError, match="has 2"):
        plan(3, None, None, None)
    ((command, _),) = plan(None, "deepspeed", None, None).commands(["--flag"])
    assert "deepspeed.launcher.launch" in command and command[-3:] == ["tove_llava", "train", "--flag"]
    ((command, _),) = plan(2, None, __file__, 99).commands([])
    assert {"deepspeed.launcher.runner", "--hostfile", __file__, "--master_port", "99"} <= set(command)


def test_cores_are_shared_without_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(launcher, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch = plan(4, None, None, None)
    assert launch.processes == 4 and launch.environment["OMP_NUM_THREADS"] == "2"
    assert str(plan(None, "torchrun", None, None)) == "2 processes on the CPU by torchrun"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrian"], "'pretrain'"),
        (["pretrain", "--gpus", "two"], "--gpus two"),
        (["pretrain", "--launcher", "deepsped"], "'deepspeed'"),
        (["pretrain", "--hostfile", "nowhere"], "nowhere"),
        (["pretrain", "--hostfile", __file__, "--launcher", "torchrun"], "--launcher deepspeed"),
        (["pretrain", "--preset", "tinny"], "'tiny'"),
    ],
)
def test_wrong_flags_are_named_before_anything_starts(monkeypatch, capsys, words, said):
    monkeypatch.setattr(launcher, "RANK", ["-c", "print('started')"])
    assert cli.main(["launch", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_launcher_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(launcher, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--deepspeed none"):
        Launch(1, "deepspeed")


def test_environment_variables_become_flags(monkeypatch):
    for name in ("OUTPUT_DIR", "DATA_PATH", "IMAGE_FOLDER", "DEEPSPEED_CONFIG", "STAGE1_DIR", "MODEL_DIR"):
        monkeypatch.delenv(name, raising=False)
    flags = trainer_flags("tiny", "finetune_lora")
    assert flags[flags.index("--pretrained") + 1] == "outputs/tiny/pretrain"
    assert flags[flags.index("--data_path") + 1] == "playground/data/scenes/train_instruct.json"
    assert "--pretrained" not in trainer_flags("tiny", "pretrain") and "--deepspeed" not in flags
    for name in ("OUTPUT_DIR", "DATA_PATH", "IMAGE_FOLDER", "DEEPSPEED_CONFIG", "STAGE1_DIR", "MODEL_DIR"):
        monkeypatch.setenv(name, name)
    assert set(trainer_flags("tiny", "finetune")[5::2]) == {
        "OUTPUT_DIR", "DATA_PATH", "IMAGE_FOLDER", "DEEPSPEED_CONFIG", "STAGE1_DIR"
    }  # fmt: skip
    assert trainer_flags("tiny", "merge")[-1] == "MODEL_DIR"


@pytest.fixture
def verbs(monkeypatch, tmp_path):
    """Record the verbs that quickstart runs; each succeeds unless its code is set."""
    for name in ("DIR", "SCENES", "TRAIN", "VAL", "STEPS", "QUESTIONS"):
        monkeypatch.delenv(f"QUICKSTART_{name}", raising=False)
    monkeypatch.delenv("PRESET", raising=False)
    monkeypatch.chdir(tmp_path)
    run, codes, seen = cli.main, {}, []
    image = tmp_path / "playground/data/scenes/images/val_000000.png"
    image.parent.mkdir(parents=True)
    image.touch()
    monkeypatch.setattr(cli, "main", lambda words: seen.append(words) or codes.get(words[0], 0))
    return run, seen, codes


def test_quickstart_runs_four_verbs_and_names_the_next(verbs, capsys, monkeypatch):
    run, seen, _ = verbs
    monkeypatch.setenv("QUICKSTART_STEPS", "5")
    assert run(["quickstart", "--questions", "7"]) == 0
    assert [words[0] for words in seen] == ["scenes", "launch", "launch", "eval"]
    assert seen[2][1] == "finetune_lora" and seen[2][-4:] == ["--max_steps", "5", "--pretrained", OUT + "/pretrain"]
    assert seen[0][seen[0].index("--train") + 1] == "8000" and seen[3][-1] == "7"
    out = capsys.readouterr().out
    assert f"demo --model {OUT}/model" in out and "val_000000.png" in out


def test_quickstart_stops_at_a_failed_step(verbs, capsys):
    run, seen, codes = verbs
    codes["launch"] = 143
    assert run(["quickstart", "--dir", "elsewhere"]) == 143
    assert len(seen) == 2 and f"elsewhere/{OUT}/pretrain" in seen[1]
    assert "step 2/4" in capsys.readouterr().err


def test_quickstart_needs_peft_but_not_deepspeed(verbs, capsys, monkeypatch):
    run, seen, _ = verbs
    monkeypatch.setattr("tove_llava.cli.quickstart.find_spec", lambda name: None if name == "deepspeed" else True)
    assert run(["quickstart"]) == 0 and seen[1][-2:] == ["--deepspeed", "none"]
    monkeypatch.setattr("tove_llava.cli.quickstart.find_spec", lambda name: None)
    assert run(["quickstart"]) == 2
    assert "tove-llava[train]" in capsys.readouterr().err
