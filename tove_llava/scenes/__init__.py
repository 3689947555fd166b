"""Playground scenes: small rendered 3-D worlds with exact geometry, captions and questions."""

from tove_llava.scenes.language import Question, ask, caption, describe
from tove_llava.scenes.objects import Object, Scene
from tove_llava.scenes.render import Rendering, render
from tove_llava.scenes.world import SPLITS, sample_scene

__all__ = ["SPLITS", "Object", "Question", "Rendering", "Scene", "ask", "caption", "describe", "render", "sample_scene"]
