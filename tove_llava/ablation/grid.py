"""Make an ablation's jobs: caches, stages and evaluations, each computed once."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tove_llava.ablation.ablation_plan import Arm, EvaluationPlan, Plan, StagePlan
from tove_llava.checkpoints.plugin_records import plugin_versions
from tove_llava.core.errors import ConfigError, ToveError
from tove_llava.data.data_paths import described
from tove_llava.eval.conditions import parse_conditions
from tove_llava.eval.tasks import find_data
from tove_llava.llava.build import vision_config
from tove_llava.tower import FUSIONS
from tove_llava.train.arguments import parse
from tove_llava.train.feature_cache import describe_parts
from tove_llava.train.feature_stores import STORES
from tove_llava.train.run_settings import Settings

_LENGTH = 10  # hexadecimal digits of a job's key
Parts = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One command of the grid.

    Attributes:
        key: digest of all that decides its result.
        name: of its files; ends with the key.
        words: the command, after ``tove-llava``.
        output: the folder that it writes.
        needs: keys of the jobs before it.
        sources: sources of the parts that it uses.
    """

    key: str
    name: str
    title: str
    words: tuple[str, ...]
    output: Path
    needs: tuple[str, ...] = ()
    sources: frozenset[str] = frozenset()


@dataclass
class Chain:
    """The jobs of one arm with one seed, and the folders that they write."""

    arm: str
    seed: int
    jobs: list[Job] = field(default_factory=list)
    stages: dict[str, Path] = field(default_factory=dict)
    evaluation: Path | None = None


@dataclass
class Grid:
    """All jobs, in an order that they can run in, and each arm's and seed's chain of them.

    Attributes:
        gpus: of each training.
        wanted: keys of the jobs to run.
    """

    out: Path
    gpus: int = 1
    wanted: set[str] = field(default_factory=set)
    jobs: dict[str, Job] = field(default_factory=dict)
    chains: list[Chain] = field(default_factory=list)

    @property
    def wanted_jobs(self) -> list[Job]:
        return [job for key, job in self.jobs.items() if key in self.wanted]

    def folder(self, kind: str, name: str, key: str) -> Path:
        """Return a job's folder; another arm's, or an older one, with the same key is shared."""
        if key in self.jobs:
            return self.jobs[key].output
        there = sorted((self.out / kind).glob(f"*-{key}"))
        return there[0] if there else self.out / kind / f"{name}-{key}"

    def add(self, job: Job) -> Job:
        return self.jobs.setdefault(job.key, job)


@dataclass
class _Cache:
    """A feature cache: the encoders in it, the arm that has them, and the records whose images it holds."""

    parts: Parts
    arm: Arm
    settings: Settings
    files: dict[str, None] = field(default_factory=dict)


def make_grid(plan: Plan, out: Path) -> Grid:
    """Make the jobs; those of the first seed come first.

    Raises:
        ConfigError: an arm's preset, stage, flag or data is unusable; the message names file and arm.
    """
    grid = Grid(out, plan.gpus)
    checked = _checked_arms(plan)
    sizes = _question_sizes(plan)
    caches = _caches(plan, checked, grid) if plan.feature_cache is not None else {}
    for seed in plan.seeds:
        for arm in (arm for arm in plan.arms if arm.name in {name for name, _ in checked}):
            chain = Chain(arm.name, seed)
            for stage in arm.stages:
                _add_stage(grid, chain, arm, stage, checked[arm.name, stage], caches.get((arm.name, stage)))
            if plan.evaluation is not None:
                _add_evaluation(grid, chain, plan.evaluation, sizes)
            grid.chains.append(chain)
    _want(grid, [job.key for chain in grid.chains if chain.arm in plan.chosen for job in chain.jobs])
    return grid


def _want(grid: Grid, keys: Iterable[str]) -> None:
    for key in keys:
        grid.wanted.add(key)
        _want(grid, grid.jobs[key].needs)


def _checked_arms(plan: Plan) -> dict[tuple[str, str], Settings]:
    """Read the settings of each arm's stages; leave out an arm that is neither chosen nor usable."""
    found = {}
    for arm in plan.arms:
        try:
            found |= {(arm.name, stage): _settings(arm, stage) for stage in arm.stages}
        except ConfigError:
            if arm.name in plan.chosen:
                raise
    return found


def _settings(arm: Arm, stage: str) -> Settings:
    try:
        settings = parse(["--stage", stage, *_words(arm, stage, 0), "--output_dir", "unused"])
        FUSIONS.get(vision_config(settings.preset.vision).fusion)
        return settings
    except ToveError as error:
        raise ConfigError(f"{arm.where}: stages.{stage}: {error}") from error


def _words(arm: Arm, stage: str, seed: int) -> list[str]:
    plan: StagePlan = arm.stages[stage]
    words = [*_preset(arm), "--data_path", plan.data_path, "--image_folder", str(plan.image_folder)]
    words += ["--seed", str(seed), "--disable_tqdm", "True"]
    for name, value in plan.flags.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _preset(arm: Arm) -> list[str]:
    return ["--preset", arm.preset, *(word for text in arm.overrides for word in ("--set", text))]


def _add_stage(grid: Grid, chain: Chain, arm: Arm, stage: str, settings: Settings, cache: Job | None) -> None:
    before = chain.jobs[-1] if chain.jobs else None
    ranks = None if grid.gpus == 1 else grid.gpus
    plugins = plugin_versions(vision_config(settings.preset.vision), settings.stage.template) or None
    record = {**settings.record(), "arguments.seed": chain.seed, "world_size": ranks, "plugins": plugins}
    # A folder may move, and a preset be renamed.
    data = described(settings.data_path, whole=False)
    record |= {"data_path": data, "image_folder": settings.image_folder.name, "preset": None}
    if settings.stage.merge:
        record["merge_data_path"] = described(settings.merge_data_path, whole=False)
    key = _key([{name: value for name, value in record.items() if value is not None}, before and before.key])
    folder = grid.folder("runs", f"{arm.name}-seed{chain.seed}-{stage}", key)
    start = ["train", "--stage", stage] if ranks is None else ["launch", stage, "--gpus", str(ranks)]
    words = [*start, *_words(arm, stage, chain.seed), "--output_dir", str(folder)]
    if before is not None:
        words += ["--pretrained", str(before.output)]
    if cache is not None:
        words += ["--feature_cache", str(cache.output)]
    needs = tuple(job.key for job in (before, cache) if job is not None)
    title = f"{arm.name}, seed {chain.seed}: {stage}"
    chain.jobs.append(grid.add(Job(key, folder.name, title, tuple(words), folder, needs, _sources(settings))))
    chain.stages[stage] = folder


def _question_sizes(plan: Plan) -> list[int]:
    """Check the evaluation; return the sizes of its question files."""
    evaluation = plan.evaluation
    if evaluation is None:
        return []
    try:
        parse_conditions(",".join(evaluation.conditions))
        found = find_data(",".join(evaluation.benchmarks), [evaluation.data_root])
    except ToveError as error:
        raise ConfigError(f"{plan.where}: evaluate: {error}") from error
    return [benchmark.question_file(root).stat().st_size for _, benchmark, root in found]


def _add_evaluation(grid: Grid, chain: Chain, evaluation: EvaluationPlan, sizes: list[int]) -> None:
    before, model = chain.jobs[-1], chain.jobs[-1].output
    named = {**dataclasses.asdict(evaluation), "data_root": Path(evaluation.data_root).name, "batch_size": None}
    key = _key([named, sizes, before.key])
    chain.evaluation = model / f"eval-{key}"
    words = ("eval", "--model", str(model), *evaluation.flags(), "--output", str(chain.evaluation))
    title = f"{chain.arm}, seed {chain.seed}: evaluation"
    name = f"{chain.arm}-seed{chain.seed}-eval-{key}"
    chain.jobs.append(grid.add(Job(key, name, title, words, chain.evaluation, (before.key,), before.sources)))


def _caches(plan: Plan, checked: Mapping[tuple[str, str], Settings], grid: Grid) -> dict[tuple[str, str], Job]:
    """Make a cache for each set of encoders that no other set contains."""
    if plan.feature_cache not in STORES:
        raise ConfigError(f"{plan.where}: unknown feature_cache {plan.feature_cache!r}; known: {', '.join(STORES)}")
    groups: dict[tuple[str, str], list[_Cache]] = {}
    arms = {arm.name: arm for arm in plan.arms}
    users: dict[tuple[str, str], Parts] = {}
    for user, settings in checked.items():
        users[user] = describe_parts(vision_config(settings.preset.vision), torch.float32)
        groups.setdefault(_images(settings), []).append(_Cache(users[user], arms[user[0]], settings))
    for place, caches in groups.items():
        largest: list[_Cache] = []
        for cache in sorted(caches, key=lambda cache: -len(cache.parts)):
            if not any(_contains(other.parts, cache.parts) for other in largest):
                largest.append(cache)
        groups[place] = largest
    owners = {}
    for user, settings in checked.items():
        owner = next(cache for cache in groups[_images(settings)] if _contains(cache.parts, users[user]))
        owner.files[str(settings.data_path)] = None
        owners[user] = owner
    jobs = {id(cache): grid.add(_cache_job(grid, cache, str(plan.feature_cache))) for cache in owners.values()}
    return {user: jobs[id(cache)] for user, cache in owners.items()}


def _images(settings: Settings) -> tuple[str, str]:
    return str(settings.image_folder), settings.stage.image_aspect_ratio


def _contains(parts: Parts, others: Parts) -> bool:
    return all(parts.get(name) == part for name, part in others.items())


def _cache_job(grid: Grid, cache: _Cache, store: str) -> Job:
    folder, aspect = _images(cache.settings)
    files = sorted(cache.files)
    sizes = [[Path(file).name, os.path.getsize(file)] for file in files]
    key = _key([cache.parts, Path(folder).name, aspect, store, sizes])
    out = grid.folder("features", aspect, key)
    words = ["features", *_preset(cache.arm), *(word for file in files for word in ("--data", file))]
    words += ["--image-folder", folder, "--image-aspect-ratio", aspect, "--store", store, "--out", str(out)]
    title = f"features, {aspect}: {', '.join(cache.parts)}"
    return Job(key, f"features-{out.name}", title, tuple(words), out, sources=_sources(cache.settings))


def _sources(settings: Settings) -> frozenset[str]:
    vision, language = settings.preset.vision, settings.preset.language
    named = [vision.clip, language.source, language.tokenizer, *(expert.get("source") for expert in vision.experts)]
    return frozenset(source for source in named if source)


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:_LENGTH]
