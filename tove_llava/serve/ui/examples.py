"""A few playground scenes with questions, drawn when the page starts."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tove_llava.scenes import ask, render, sample_scene
from tove_llava.scenes.world import scene_rng

SEED = 7
SIZE = 256  # pixels; models of the playground see 96
DESCRIBE = "Describe the scene."
# (scene, category of its question), chosen to be different and easy to look at
CHOSEN = ((4, "nearer"), (11, "counting"), (10, "left_right"), (9, None))


@dataclass(frozen=True)
class Example:
    """A question about an image file."""

    file: str
    text: str


def make_examples(folder: Path) -> list[Example]:
    """Draw scenes of the "val" split, which no training sees, into ``folder``."""
    examples = []
    for index, category in CHOSEN:
        scene = sample_scene(SEED, "val", index)
        asked = ask(scene, scene_rng(SEED, "val", index, purpose=1))
        text = next((question.text for question in asked if question.category == category), DESCRIBE)
        file = folder / f"scene_{index}.png"
        Image.fromarray(render(scene, SIZE).image).save(file)
        examples.append(Example(str(file), text))
    return examples
