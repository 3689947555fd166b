"""A study's run: training stages and an evaluation, each reused if there."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from records import ROOT, digest, is_done, parts, recorded, weights

ARMS = Path(__file__).parent / "arms"
COMMON = (
    "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True", "--image_aspect_ratio", "square",
    "--bf16", "True", "--padding_free", "True", "--logging_steps", "50",
    "--dataloader_num_workers", "0",  # a run has one core
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings that all runs share."""

    out: Path
    seeds: int
    train: int
    val: int
    scene_seed: int
    further: int = 8000
    commit: str = "unknown"  # of the code that runs

    @property
    def scenes(self) -> Path:
        return self.out / "scenes"

    @property
    def pictures(self) -> Path:
        """Return the folder of further scenes, only for their images."""
        return self.out / "pictures"

    @property
    def features(self) -> Path:
        return self.out / "features"

    def folder(self, job: "Job") -> Path:
        return self.out / "runs" / job.name / str(job.seed)

    def is_done(self, job: "Job") -> bool:
        """Tell if the run is done; another run there raises StaleRecord."""
        return is_done(self.folder(job), job.made(self))


@dataclass(frozen=True)
class Job:
    """A run of an arm with a seed.

    Attributes:
        arm: a preset in ``arms/``; for a merge, the arm whose stage-2 model is merged.
        seed: of initial values, order of the data and noise.
        fraction: share of the training scenes that are seen; the number of steps stays that of all of them.
        merge: flags of a merging stage that follows the arm's training.
        label: distinguishes jobs of one arm.
        pictures: whether the merge also learns from further images.
    """

    arm: str
    seed: int
    fraction: float = 1.0
    merge: str = ""
    label: str = ""
    pictures: bool = False

    @property
    def name(self) -> str:
        share = "" if self.fraction == 1 else f"-{100 * self.fraction:g}%"
        return (self.label or self.arm) + share

    @property
    def wave(self) -> int:
        """Return the job's wave; a wave's jobs do not need each other."""
        return int(bool(self.merge))

    def made(self, settings: Settings) -> dict[str, Any]:
        """List what the numbers depend on; a missing merge source is None."""
        from tove_llava import __version__
        from tove_llava.presets import load_preset

        preset = load_preset(str(ARMS / f"{self.arm}.yaml")).to_dict()
        scenes = {"train": settings.train, "val": settings.val, "seed": settings.scene_seed}
        found = {"job": asdict(self), "preset": digest(preset), "parts": parts(preset), "flags": " ".join(COMMON)}
        found |= {"scenes": scenes, "version": __version__}
        if self.merge:
            found["starts_from"] = weights(self._start(settings))
        if self.pictures:
            found["pictures"] = settings.further
        return found

    def run(self, settings: Settings) -> None:
        folder = settings.folder(self)
        folder.mkdir(parents=True, exist_ok=True)
        with recorded(folder, self.made(settings), settings.commit):
            self._run(settings, folder)

    def _run(self, settings: Settings, folder: Path) -> None:
        with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                self._merge(settings, folder) if self.merge else self._train(settings, folder)
                evaluate(folder / "model", settings, folder / "eval")
            except BaseException as error:
                raise RuntimeError(f"{error}; see {folder / 'log.txt'}") from error

    def _train(self, settings: Settings, folder: Path) -> None:
        for stage, records, output in (("pretrain", "captions", "pretrain"), ("finetune_lora", "instruct", "model")):
            more = ["--pretrained", str(folder / "pretrain")] if output == "model" else []
            self._stage(settings, stage, records, folder / output, *more, "--feature_cache", str(settings.features))

    def _start(self, settings: Settings) -> Path:
        return settings.folder(Job(self.arm, self.seed)) / "model"

    def _merge(self, settings: Settings, folder: Path) -> None:
        flags = ["--pretrained", str(self._start(settings)), "--feature_cache", str(settings.features)]
        flags += self.merge.split()
        if self.pictures:
            flags += ["--merge_data_path", str(settings.pictures / "train_captions.json")]
            flags += ["--merge_image_folder", str(settings.pictures / "images")]
            flags += ["--merge_feature_cache", str(settings.pictures / "features")]
        self._stage(settings, "merge", "instruct", folder / "model", *flags)

    def _stage(self, settings: Settings, stage: str, records: str, output: Path, *flags: str) -> None:
        from tove_llava.train.run import main

        data = settings.scenes / f"train_{records}.json"
        steps: tuple[str, ...] = ()
        if self.fraction < 1:
            data, steps = self._subset(settings, data)
        code = main(
            [
                "--preset", str(ARMS / f"{self.arm}.yaml"), "--stage", stage, "--data_path", str(data),
                "--image_folder", str(settings.scenes / "images"), "--output_dir", str(output),
                "--seed", str(self.seed), *COMMON, *steps, *flags,
            ]
        )  # fmt: skip
        if code:
            raise RuntimeError(f"the stage {stage} failed")

    def _subset(self, settings: Settings, data: Path) -> tuple[Path, tuple[str, ...]]:
        """Choose the first scenes, and the steps that all would take."""
        records = json.loads(data.read_text())
        count = max(1, round(self.fraction * len(records)))
        file = settings.scenes / f"{data.stem}-{count}.json"
        if not file.exists():
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(records[:count]))
            part.replace(file)
        return file, ("--max_steps", str(-(-len(records) // 8)))


def evaluate(model: Path, settings: Settings, output: Path, detach: str | None = None) -> None:
    from tove_llava.eval.conditions import parse_conditions
    from tove_llava.eval.evaluate import Evaluation
    from tove_llava.eval.evaluate import evaluate as run

    conditions = parse_conditions(None, detach=detach)
    run(Evaluation(model, "scenes", [settings.scenes], conditions, output, batch_size=64))


def start_worker(numbers, workers: int, gpus: int) -> None:
    """Give a worker process its GPU, or its share of the cores."""
    number = numbers.get()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def command(*words: object) -> None:
    """Run a verb of the product in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-m", "tove_llava", *map(str, words)], check=True, cwd=ROOT, env=environment)
