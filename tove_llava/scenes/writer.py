"""Write scenes as files: images, LLaVA records, evaluation questions, and POPE's layout.

A folder is written next to its destination and renamed when complete, so that an interrupted run leaves nothing that
looks finished. Several processes may write the same folder: each writes its own, and the first to end is kept.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tove_llava.core.errors import CheckpointError, ConfigError, DataError
from tove_llava.core.files import read_json_object, staged
from tove_llava.scenes.language import SHORT_ANSWER, Question, absent_pair, ask, describe, with_article
from tove_llava.scenes.objects import COLOURS, SHAPES, Scene
from tove_llava.scenes.render import Rendering, render
from tove_llava.scenes.world import HELD_OUT_PAIRS, sample_scene, scene_rng

POPE_QUESTIONS = 3  # of each answer, image and category, as in POPE
MANIFEST = "scenes.json"
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Request:
    """The scenes to write; ``counts`` maps splits (train, val, novel) to numbers."""

    counts: dict[str, int]
    seed: int = 0
    size: int = 96
    image_format: str = "png"
    maps: bool = False

    def __post_init__(self) -> None:
        if self.image_format not in ("png", "jpg"):
            raise ConfigError(f"--format is png or jpg, not {self.image_format!r}")
        if not 32 <= self.size <= 1024:
            raise ConfigError(f"--size is {self.size}; images may have 32 to 1024 pixels a side")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must not be negative")
        for split, count in self.counts.items():
            if count < 0:
                raise ConfigError(f"--{split} is {count}; it must not be negative")
        if not any(self.counts.values()):
            raise ConfigError("no scenes were asked for; give --train, --val or --novel a number above 0")


def write_scenes(request: Request, folder: Path, progress: Progress | None = None) -> bool:
    """Write the scenes of a request to ``folder``.

    Returns:
        False if the folder already holds exactly this request's scenes, which then stay.

    Raises:
        DataError: the folder exists and holds something else. Nothing is overwritten.
    """
    if _is_written(request, folder):
        return False
    try:
        with staged(folder) as fresh:
            _write(request, fresh, progress)
    except CheckpointError:
        if _is_written(request, folder):  # another process was faster
            return False
        raise
    return True


def _is_written(request: Request, folder: Path) -> bool:
    """Tell if the folder holds these scenes; DataError for anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise DataError(f"{folder} exists and holds no scenes; choose another --out")
    wanted, found = asdict(request), read_json_object(manifest, DataError)
    if found == wanted:
        return True
    differing = ", ".join(sorted(k for k in wanted if wanted[k] != found.get(k)))
    raise DataError(f"{folder} holds other scenes (different: {differing}); choose another --out or delete it")


def _write(request: Request, folder: Path, progress: Progress | None) -> None:
    (folder / "images").mkdir()
    total, done, begun = sum(request.counts.values()), 0, time.monotonic()
    for split, count in request.counts.items():
        scenes = []
        for index in range(count):
            scene = sample_scene(request.seed, split, index)
            _write_images(request, scene, render(scene, request.size), folder)
            scenes.append(scene)
            done += 1
            if progress is not None:
                progress(done, total, time.monotonic() - begun)
        if scenes:
            _write_language(request, split, scenes, folder)
    _write_json(folder / MANIFEST, asdict(request))


def image_name(scene: Scene, image_format: str) -> str:
    return f"{scene.split}_{scene.index:06d}.{image_format}"


def caption_record(scene: Scene, image: str) -> dict[str, Any]:
    """Make a stage-1 record: the image and its description."""
    return _record(scene, image, [("<image>\nDescribe the scene.", describe(scene))])


def instruct_record(scene: Scene, image: str, questions: list[Question]) -> dict[str, Any]:
    """Make a stage-2 record: one conversation of an image's questions.

    LLaVA joins VQA data like this. Every other record omits the request for a short answer, as people in a chat do.
    """
    first = f"<image>\n{questions[0].text}" + (f"\n{SHORT_ANSWER}" if scene.index % 2 == 0 else "")
    turns = [(first if i == 0 else q.text, q.answer) for i, q in enumerate(questions)]
    return _record(scene, image, turns)


def _record(scene: Scene, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    messages = [
        {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
    ]
    return {"id": f"{scene.split}-{scene.index}", "image": image, "conversations": messages}


def _write_language(request: Request, split: str, scenes: list[Scene], folder: Path) -> None:
    images = [image_name(scene, request.image_format) for scene in scenes]
    asked = [ask(scene, scene_rng(request.seed, split, scene.index, purpose=1)) for scene in scenes]
    _write_json(folder / f"{split}_captions.json", [caption_record(s, i) for s, i in zip(scenes, images, strict=True)])
    _write_json(
        folder / f"{split}_instruct.json",
        [instruct_record(s, i, q) for s, i, q in zip(scenes, images, asked, strict=True) if q],
    )
    _write_jsonl(folder / f"{split}_worlds.jsonl", [scene.to_dict() for scene in scenes])
    if split == "train":
        return
    _write_jsonl(
        folder / f"{split}_questions.jsonl",
        [
            {
                "question_id": f"{split}-{scene.index}-{q.category}",
                "image": image,
                "text": f"{q.text}\n{SHORT_ANSWER}",
                "answer": q.answer,
                "category": q.category,
            }
            for scene, image, questions in zip(scenes, images, asked, strict=True)
            for q in questions
        ],
    )
    if split == "val":
        _write_pope(request, scenes, images, folder)


def _write_pope(request: Request, scenes: list[Scene], images: list[str], folder: Path) -> None:
    """Write POPE's categories: random, popular (frequent) and adversarial (near) absent pairs."""
    frequency: dict[tuple[str, str], int] = {}
    for scene in scenes:
        for item in scene.objects:
            frequency[item.pair] = frequency.get(item.pair, 0) + 1
    popular = sorted(frequency, key=lambda pair: (-frequency[pair], pair))
    everything = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS]
    pope = folder / "pope"
    (pope / "coco").mkdir(parents=True)
    (pope / "val2014").mkdir()
    for image in images:
        shutil.copyfile(folder / "images" / image, pope / "val2014" / image)
    rows = []
    for category in ("random", "popular", "adversarial"):
        labels = []
        for scene, image in zip(scenes, images, strict=True):
            rng = scene_rng(request.seed, scene.split, scene.index, purpose=2)
            for pair, label in _pope_pairs(scene, rng, category, everything, popular):
                text = f"Is there {with_article(' '.join(pair))} in the image?"
                labels.append({"question_id": len(labels) + 1, "image": image, "text": text, "label": label})
                rows.append(
                    {"question_id": len(rows), "image": image, "text": f"{text}\n{SHORT_ANSWER}", "category": category}
                )
        _write_jsonl(pope / "coco" / f"coco_pope_{category}.json", labels)
    _write_jsonl(pope / "llava_pope_test.jsonl", rows)


def _pope_pairs(
    scene: Scene,
    rng: np.random.Generator,
    category: str,
    everything: list[tuple[str, str]],
    popular: list[tuple[str, str]],
) -> Iterator[tuple[tuple[str, str], str]]:
    present = {item.pair for item in scene.objects}
    count = min(POPE_QUESTIONS, len(present))
    absent: list[tuple[str, str]] = []
    if category == "random":
        pool = [pair for pair in everything if pair not in present]
        absent = [pool[i] for i in rng.permutation(len(pool))[:count]]
    elif category == "popular":
        absent = [pair for pair in popular if pair not in present][:count]
    else:
        for _ in range(50):
            pair = absent_pair(scene, rng, near=True)
            if pair not in absent:
                absent.append(pair)
            if len(absent) == count:
                break
    there = [scene.objects[i].pair for i in rng.permutation(len(scene.objects))[: len(absent)]]
    for yes, no in zip(there, absent, strict=True):
        yield yes, "yes"
        yield no, "no"


def _write_images(request: Request, scene: Scene, rendering: Rendering, folder: Path) -> None:
    name = image_name(scene, request.image_format)
    # Level 1 takes a third of the default's time, for a tenth more bytes.
    options: dict[str, Any] = {"compress_level": 1} if request.image_format == "png" else {"quality": 92}
    Image.fromarray(rendering.image).save(folder / "images" / name, **options)
    if not request.maps:
        return
    stem = Path(name).stem
    maps = {
        "depth": Image.fromarray(np.round(rendering.depth * 1000).astype(np.uint16)),  # millimetres
        "normals": Image.fromarray(np.round((rendering.normals + 1) * 127.5).astype(np.uint8)),
        "instances": Image.fromarray((rendering.instances + 2).astype(np.uint8)),  # 0 sky, 1 ground, 2... objects
        "classes": Image.fromarray(rendering.classes),
        "edges": Image.fromarray(rendering.edges.astype(np.uint8) * 255),
    }
    for kind, image in maps.items():
        (folder / "maps" / kind).mkdir(parents=True, exist_ok=True)
        image.save(folder / "maps" / kind / f"{stem}.png", compress_level=1)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")


def _write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
