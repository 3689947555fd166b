"""Train a small ToVE-LLaVA on generated scenes and score it, without a GPU.

Four steps: draw scenes, train both stages, answer questions about held-out scenes. The same command reuses what is done
and resumes what was interrupted. Nothing is downloaded.

Environment variables give defaults: PRESET, QUICKSTART_TRAIN, QUICKSTART_VAL, QUICKSTART_STEPS, QUICKSTART_QUESTIONS.
QUICKSTART_DIR (outputs/quickstart) and QUICKSTART_SCENES (playground/data/scenes) name folders of their own for the
models and the scenes. NUM_GPUS and LAUNCHER have the meaning of 'tove-llava launch --help'.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

HELP = "train a small model on generated scenes and score it, without a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path("."), help="writes outputs/ and playground/ here (default: .)")
    parser.add_argument("--preset", default=os.environ.get("PRESET") or "tiny", metavar="NAME", help="(default: tiny)")
    for flag, default, text in (
        ("--train", 8000, "scenes to train on (default: 8000)"),
        ("--val", 300, "scenes to evaluate on (default: 300)"),
        ("--steps", None, "most steps of a stage (default: one pass over the data)"),
        ("--questions", 1500, "questions to evaluate on (default: 1500)"),
    ):
        value = os.environ.get(f"QUICKSTART_{flag[2:].upper()}") or default
        parser.add_argument(flag, type=int, default=value, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    from tove_llava.cli import main
    from tove_llava.cli._flags import check_least
    from tove_llava.core.errors import ConfigError

    check_least(args, "--train", "--val", "--steps", "--questions")
    if find_spec("peft") is None:
        raise ConfigError("stage 2 trains LoRA adapters with peft; install it: pip install 'tove-llava[train]'")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    scenes = Path(os.environ.get("QUICKSTART_SCENES") or args.dir / "playground" / "data" / "scenes")
    out = Path(os.environ.get("QUICKSTART_DIR") or args.dir / "outputs" / "quickstart")
    print(f"quickstart: about ten minutes on two CPU cores; writes {scenes} and {out}", flush=True)

    sizes = ["--train", str(args.train), "--val", str(args.val), "--seed", "0"]
    step_1 = training("pretrain", args, scenes, "train_captions.json", out / "pretrain")
    step_2 = training("finetune_lora", args, scenes, "train_instruct.json", out / "model")
    questions = ["--benchmark", "scenes", "--conditions", "blank,detached,full", "--limit", str(args.questions)]
    steps = {
        "1/4 scenes (1 minute)": ["scenes", "--out", str(scenes), *sizes],
        "2/4 alignment: the projector and the tower's gate learn to describe scenes (2 minutes)": step_1,
        "3/4 instruction tuning: LoRA on the language model (5 minutes)": [
            *step_2, "--pretrained", str(out / "pretrain"),
        ],
        "4/4 evaluation on held-out scenes (2 minutes)": [
            "eval", "--model", str(out / "model"), "--data-root", str(scenes), "--batch-size", "64", *questions,
        ],
    }  # fmt: skip
    code = run_steps(steps, main)
    if code == 0:
        print(next_commands(out / "model", scenes))
    return code


def training(stage: str, args: argparse.Namespace, scenes: Path, records: str, out: Path) -> list[str]:
    """Return the command of one stage."""
    command = ["launch", stage, "--preset", args.preset, "--output_dir", str(out)]
    command += ["--data_path", str(scenes / records), "--image_folder", str(scenes / "images")]
    if find_spec("deepspeed") is None:
        command += ["--deepspeed", "none"]
    return command if args.steps is None else [*command, "--max_steps", str(args.steps)]


def run_steps(steps: dict[str, list[str]], main: Callable[[list[str]], int]) -> int:
    """Run verbs one after another, up to the first that fails."""
    for title, command in steps.items():
        print(title, flush=True)
        start = time.monotonic()
        code = main(command)
        if code:
            print(f"quickstart stopped in step {title[:3]}; the same command goes on from there", file=sys.stderr)
            return code
        print(f"done in {time.monotonic() - start:.0f} s", flush=True)
    return 0


def next_commands(model: Path, scenes: Path) -> str:
    """Return what to do with the model."""
    image = min((scenes / "images").glob("val_*"))
    command = program()
    return f"""
model:    {model}
terminal: {command} chat --model {model} --image {image}
browser:  {command} demo --model {model}"""


def program() -> str:
    """Return the shortest name of this environment's tove-llava."""
    file = Path(sys.executable).with_name("tove-llava")
    if file.is_relative_to(Path.cwd()):
        return str(file.relative_to(Path.cwd()))
    if shutil.which("tove-llava") == str(file):
        return "tove-llava"
    return str(file) if file.exists() else f"{sys.executable} -m tove_llava"
