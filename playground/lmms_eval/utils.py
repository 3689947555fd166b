"""The task tove_scenes, marked like ``tove-llava eval --benchmark scenes``."""

from pathlib import Path

from PIL import Image

from tove_llava.eval.rules.exact_match import normalise

IMAGES = Path("playground/data/scenes/images")


def pictures(doc):
    """Return the question's image."""
    with Image.open(IMAGES / doc["image"]) as picture:
        return [picture.convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    """Return the prompt, which the question file holds whole."""
    return doc["text"]


def mark(doc, results):
    """Return 1 where the answer equals the expected one."""
    return {"accuracy": float(normalise(results[0]) == normalise(doc["answer"]))}
