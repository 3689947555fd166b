"""Train one stage of a preset on several GPUs, nodes, or CPU processes.

The stage comes first. All flags that are not listed here go on to the trainer: 'tove-llava train --help' explains them.

  tove-llava launch pretrain --gpus 8 --preset vicuna-7b --data_path captions.json --image_folder images
  tove-llava launch finetune_lora --max_steps 10 --set vision.top_k=2

The same command again resumes an interrupted run, or reuses a finished one. Ctrl-C and SIGTERM stop the run after a
checkpoint is saved.

Environment variables give defaults, also for flags of the trainer:

  PRESET            --preset                                   (tiny)
  OUTPUT_DIR        --output_dir                               (outputs/<preset>/<stage>)
  DATA_PATH         --data_path, LLaVA records                 (the quickstart's scenes)
  IMAGE_FOLDER      --image_folder                             (the quickstart's scenes)
  STAGE1_DIR        --pretrained of stage 2                    (outputs/<preset>/pretrain)
  MODEL_DIR         --pretrained of a merge                    (outputs/<preset>/finetune_lora)
  DEEPSPEED_CONFIG  --deepspeed: zero2, zero3, zero3_offload, none, or a .json file    (the preset's)
  NUM_GPUS, HOSTFILE, LAUNCHER    --gpus, --hostfile, --launcher
  MASTER_PORT       port at which the ranks meet               (a free one)
"""

import argparse
import os
import sys
from pathlib import Path

HELP = "train one stage on several GPUs or nodes"
PASSES_FLAGS_ON = True
SCENES = "playground/data/scenes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    given = os.environ.get
    parser.add_argument("stage", metavar="STAGE", help="pretrain, finetune_lora, finetune, finetune_qlora, merge, ...")
    parser.add_argument(
        "--preset", default=given("PRESET") or "tiny", metavar="NAME", help="name of a preset or a .yaml file"
    )
    parser.add_argument(
        "--gpus",
        default=given("NUM_GPUS") or None,
        metavar="N",
        help="processes on each node (default: all GPUs; without any, at most 2)",
    )
    parser.add_argument(
        "--hostfile",
        default=given("HOSTFILE") or None,
        metavar="FILE",
        help="DeepSpeed's hostfile, for several nodes that share a file system",
    )
    parser.add_argument(
        "--launcher",
        default=given("LAUNCHER") or None,
        metavar="NAME",
        help="deepspeed or torchrun (default: DeepSpeed's with --hostfile; else none is needed)",
    )


def run(args: argparse.Namespace) -> int:
    from tove_llava.core.errors import ConfigError
    from tove_llava.core.plugins import plugin_flags
    from tove_llava.train.flags import refuse_mistyped
    from tove_llava.train.launcher import plan, run_ranks

    refuse_mistyped(args.passed_on)

    numbers = {"--gpus": args.gpus, "MASTER_PORT": os.environ.get("MASTER_PORT") or None}
    for name, value in numbers.items():
        if value is not None and not (value.isdecimal() and int(value) > 0):
            raise ConfigError(f"{name} {value}: give a number above 0")
    gpus, port = (None if value is None else int(value) for value in numbers.values())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = [*trainer_flags(args.preset, args.stage), *args.passed_on]
    if args.hostfile:  # other nodes do not inherit this environment
        arguments += plugin_flags()
    launch = plan(gpus, args.launcher, args.hostfile, port)
    print(f"launch: {launch}", file=sys.stderr, flush=True)
    return run_ranks(launch, arguments)


def trainer_flags(preset: str, stage_name: str) -> list[str]:
    """Return the trainer's flags by environment variables and defaults."""
    from tove_llava.presets import load_preset

    stage = load_preset(preset).stage(stage_name)
    outputs = Path("outputs", Path(preset).name.removesuffix(".yaml"))
    records = "train_captions.json" if stage.train == "alignment" else "train_instruct.json"
    flags = {
        "--preset": preset,
        "--stage": stage_name,
        "--output_dir": os.environ.get("OUTPUT_DIR") or outputs / stage_name,
        "--data_path": os.environ.get("DATA_PATH") or f"{SCENES}/{records}",
        "--image_folder": os.environ.get("IMAGE_FOLDER") or f"{SCENES}/images",
        "--deepspeed": os.environ.get("DEEPSPEED_CONFIG"),
    }
    if stage.train == "merge":
        flags["--pretrained"] = os.environ.get("MODEL_DIR") or outputs / "finetune_lora"
    elif stage.train != "alignment":
        flags["--pretrained"] = os.environ.get("STAGE1_DIR") or outputs / "pretrain"
    return [word for flag, value in flags.items() if value for word in (flag, str(value))]
