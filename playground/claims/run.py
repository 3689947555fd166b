"""Train what the paper's claims need, and write docs/background/claims.md.

The runs are those of claims.yaml, computed by 'tove-llava ablate', one per core (or GPU); the frozen encoders run once
for all of them. The same command goes on where it was interrupted. Several machines over one file system: --shard 0/4
to --shard 3/4 on each, then once more without it for the report. Only the sections of --claims are rewritten.
OUT/results.json has every run's numbers.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from numbers_of_runs import ROOT, ROWS, Runs, Study  # noqa: E402

from tove_llava.core.errors import ToveError  # noqa: E402
from tove_llava.core.text import markdown_table  # noqa: E402

STUDIES = yaml.safe_load((HERE / "studies.yaml").read_text())
STAGES = {"pretrain": "captions", "finetune_lora": "instruct"}
BATCH = 8  # of the preset tiny


class Failed(RuntimeError):
    """A command failed, and has said why."""


def main() -> int:
    try:
        run(parse())
    except Failed as error:
        return int(str(error))
    except ToveError as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", default="a,c,f", help=f"which of {','.join(STUDIES)}, or all (default: a,c,f)")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="compare these arms instead; a table, no page of claims"
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1 (default: 5)")
    parser.add_argument("--train", type=int, default=2400, help="training scenes, for every stage (default: 2400)")
    parser.add_argument("--val", type=int, default=300, help="held-out scenes (default: 300)")
    parser.add_argument("--pictures", type=int, default=8000, help="further pictures to merge on (default: 8000)")
    parser.add_argument("--scene-seed", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("outputs/claims"))
    parser.add_argument("--workers", type=int, help="jobs at a time (default: one a GPU, or one a core)")
    parser.add_argument("--shard", default="0/1", help="this machine's part of the seeds, such as 0/4")
    parser.add_argument(
        "--report", type=Path, help="the page, or the table of --arms (default: docs/background/claims.md)"
    )
    parser.add_argument("--no-report", action="store_true")
    args = parser.parse_args()
    args.chosen = list(STUDIES) if args.claims == "all" else args.claims.split(",")
    unknown = [name for name in args.chosen if name not in STUDIES]
    if unknown:
        parser.error(f"unknown claim {unknown[0]!r}; there are {', '.join(STUDIES)}")
    # As typed, but for output paths, and with explicit sizes.
    args.typed = f"--arms {' '.join(args.arms)}" if args.arms else f"--claims {args.claims}"
    for name in ("seeds", "train", "val", "pictures", "scene_seed", "workers"):
        value = getattr(args, name)
        if name in ("seeds", "train", "val") or value != parser.get_default(name):
            args.typed += f" --{name.replace('_', '-')} {value}"
    return args


def run(args: argparse.Namespace) -> None:
    study = Study(args.out.resolve(), args.seeds, args.train, args.val, args.scene_seed, args.pictures)
    arms = args.arms or list(dict.fromkeys(arm for name in args.chosen for arm in STUDIES[name]["arms"]))
    steps = prepare(study, "lite" in arms)
    part, parts = (int(number) for number in args.shard.split("/"))
    seeds = list(range(part, args.seeds, parts))
    overrides = [f"seeds={seeds}", *(f"arms.{arm}.stages.{stage}.flags.max_steps={n}" for arm, stage, n in steps)]
    words = ["--arms", ",".join(arms), *(word for text in overrides for word in ("--set", text))]
    words += ["--jobs", str(args.workers)] if args.workers else []
    command("ablate", HERE / "claims.yaml", "--out", study.out, *words)
    if parts > 1 or args.no_report:
        return
    if args.arms:
        text = comparison(study, args.arms)
        print(text)
        if args.report:
            args.report.write_text(text + "\n")
        return
    from measures import MEASURES
    from report import write_report

    # The curves' jobs are forks, which must come before this process has computed.
    for name in sorted(STUDIES[name]["measured"] for name in args.chosen if "measured" in STUDIES[name]):
        MEASURES[name](study)
    write_report(study, args.report or ROOT / "docs" / "background" / "claims.md", args.chosen, args.typed)


def comparison(study: Study, arms: list[str]) -> str:
    """Tabulate question types by arm, with the paired gain over the first."""
    runs = [Runs(study, arm) for arm in arms]
    rows = [[row, *(str(arm.interval(row)) for arm in runs), runs[-1].gain(runs[0], row).signed] for row in ROWS]
    return markdown_table(["accuracy, %", *arms, "gain"], rows)


def prepare(study: Study, pictures: bool) -> list[tuple[str, str, int]]:
    """Make scenes, features and shares of the scenes; return the steps of the arms that see a share."""
    make_scenes(study.scenes, study.features, list(STAGES.values()), study.train, study.val, study.scene_seed)
    if pictures:
        folder = study.pictures
        make_scenes(folder, folder / "features", ["captions"], study.further, 1, study.scene_seed + 1)
    steps = []
    for arm, share in [arm.split("-") for arm in STUDIES["b"]["arms"] if "-" in arm]:
        for stage, kind in STAGES.items():
            records = json.loads((study.scenes / f"train_{kind}.json").read_text())
            count = max(1, round(float(share.rstrip("%")) / 100 * len(records)))
            (study.scenes / f"train_{kind}-{share}.json").write_text(json.dumps(records[:count]))
            steps.append((f"{arm}-{share}", stage, -(-len(records) // BATCH)))
    return steps


def make_scenes(folder: Path, features: Path, kinds: list[str], train: int, val: int, seed: int) -> None:
    command("scenes", "--out", folder, "--train", train, "--val", val, "--seed", seed)
    data = [word for kind in kinds for word in ("--data", folder / f"train_{kind}.json")]
    images = ["--image-folder", folder / "images", "--image-aspect-ratio", "square"]
    command("features", "--preset", "tiny", *data, *images, "--out", features)


def command(*words: object) -> None:
    """Run a verb in a process of its own; Failed has its exit code."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-m", "tove_llava", *map(str, words)], env=environment)
    if found.returncode:
        raise Failed(found.returncode)


if __name__ == "__main__":
    raise SystemExit(main())
