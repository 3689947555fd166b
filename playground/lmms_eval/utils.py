"""What the task tove_scenes shows the model, and how it marks answers: as ``tove-llava eval --benchmark scenes``."""

from pathlib import Path

from PIL import Image

from tove_llava.eval.benchmarks.playground_scenes import normalise

IMAGES = Path("playground/data/scenes/images")


def pictures(doc):
    """The question's picture."""
    with Image.open(IMAGES / doc["image"]) as picture:
        return [picture.convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    """The question file carries the whole prompt."""
    return doc["text"]


def mark(doc, results):
    """1 where the answer equals the expected one."""
    return {"accuracy": float(normalise(results[0]) == normalise(doc["answer"]))}
