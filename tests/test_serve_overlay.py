"""The routing drawn over the image, its legend, and the examples."""

import numpy as np
import pytest
import torch
from PIL import Image

from tove_llava.analysis.colours import column_colour, heat_colours
from tove_llava.data.images import ImageTransform
from tove_llava.inference.engine import RoutingMap, Timing
from tove_llava.serve.ui.examples import make_examples
from tove_llava.serve.ui.overlay import ALL, RoutingView, draw, legend, name_of
from tove_llava.serve.ui.session import SIDE, timing_line

NAMES = ("depth", "<b>edge")


@pytest.fixture
def found():
    """Two by two tokens, whose left column listens only to depth.

    The right column listens mostly to the other expert.
    """
    depth = torch.tensor([[1.0, 0.25], [1.0, 0.25]])
    framed = Image.new("RGB", (SIDE, SIDE), (10, 20, 30))
    return RoutingView(framed, RoutingMap(NAMES, torch.stack([depth, 1 - depth], dim=-1)), NAMES)


def corner(image, right):
    return image.getpixel((SIDE - 1 if right else 0, 0))


def test_the_map_of_all_has_each_experts_colour(found):
    drawn = draw(found, ALL, 1)
    assert corner(drawn, False) == column_colour(0) and corner(drawn, True) == column_colour(1)
    assert drawn.size == (SIDE, SIDE)


def test_a_heat_map_ends_at_the_largest_weight_of_all(found):
    drawn = draw(found, "<b>edge", 1)
    expected = heat_colours(np.array([0.0, 0.75]))
    assert [corner(drawn, right) for right in (False, True)] == [tuple(map(int, colour)) for colour in expected]


@pytest.mark.parametrize("view", [ALL, "depth"])
def test_opacity_goes_from_the_image_to_the_map(found, view):
    assert draw(found, view, 0).tobytes() == found.framed.tobytes()
    half, whole = (corner(draw(found, view, opacity), False) for opacity in (0.5, 1))
    assert all(abs(h - (w + s) / 2) <= 1 for h, w, s in zip(half, whole, (10, 20, 30), strict=True))


def test_without_a_gate_the_image_is_shown_with_the_reason(found):
    bare = RoutingView(found.framed, None, ())
    assert draw(bare, ALL, 1).tobytes() == found.framed.tobytes() and "only CLIP" in legend(bare, NAMES)


def test_the_legend_has_shares_and_no_foreign_html(found):
    text = legend(found, NAMES)
    assert "62 %" in text and "38 %" in text and "<b>edge" not in text and "&lt;b&gt;edge" in text
    assert "weight of &lt;b&gt;edge: 0" in legend(found, NAMES, "<b>edge")
    detached = legend(RoutingView(found.framed, found.routing, ("depth",)), NAMES)
    assert detached.count("detached") == 1 and "tove-off" in detached


@pytest.mark.parametrize("ratio, size, expected", [("pad", (40, 20), (40, 40)), ("square", (40, 20), (20, 20))])
def test_the_square_that_the_model_sees(ratio, size, expected):
    image = Image.effect_noise(size, 90).convert("RGB")
    transform = ImageTransform(16, ratio)
    framed = transform.framed(image)
    assert framed.size == expected
    # What is framed is square, so that nothing is left to pad or to cut.
    assert (transform(framed) - transform(image)).abs().max() < (1e-6 if ratio == "pad" else 0.5)


def test_times_in_words():
    timing = Timing(waited=0.0, tower=0.0123, first_token=0.0456, tokens=9, tokens_per_second=81.2, images=1)
    assert timing_line(timing, 4) == "tower 12 ms · first token 46 ms · 81 tokens/s · 4 experts"
    assert timing_line(timing, 0).endswith("no experts") and "expert" not in timing_line(timing, None)
    text = Timing(waited=1.26, tower=0.0, first_token=0.0456, tokens=1, tokens_per_second=0.0, images=0)
    assert timing_line(text, 4) == "waited 1.3 s · first token 46 ms"


def test_a_model_is_named_after_its_folder():
    assert name_of("/data/runs/vicuna") == "vicuna" and name_of("outputs/quickstart/model") == "quickstart/model"


def test_examples_are_questions_about_images(tmp_path):
    examples = make_examples(tmp_path)
    assert len({example.text for example in examples}) == len(examples) == 4
    for example in examples:
        with Image.open(example.file) as image:
            assert image.size == (256, 256)
