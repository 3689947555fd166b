"""At a limit everything works; one beyond, it is refused."""

import pytest
import torch
from answer_parts import ask, picture
from tower_parts import tower_config

from tove_llava.analysis.detach import reduced_config
from tove_llava.checkpoints.tensors import split_by_prefix
from tove_llava.core.errors import BusyError, CheckpointError, ConfigError, DataError
from tove_llava.data.images import open_image
from tove_llava.inference.engine import Engine, Message, Sampling
from tove_llava.inference.rolling_batch import Room
from tove_llava.inference.sampling import drawn
from tove_llava.serve.ui.conversation import MAX_TEXT, checked_text
from tove_llava.serve.ui.session import MAX_IMAGES, Session


def pixels_of_an_image(engine, folder, count):
    picture(0, (4, 5)).save(folder / "x.png")
    open_image(folder / "x.png", max_pixels=20 - (count - 1))


def images_of_a_question(engine, folder, count):
    picture().save(folder / "x.png")
    Session().question(engine, {"text": "What?", "files": [str(folder / "x.png")] * count})


def text_of_a_question(engine, folder, count):
    checked_text("x" * count, "question")


def tokens_of_a_conversation(engine, folder, count):
    """The model takes at least one more than the prompt."""
    about = len(engine.prepare(ask("a" * 10)).prompt) - 10
    request = engine.prepare([Message("user", "a" * (count - about))])
    assert len(request.prompt) == count and request.longest == 600 - count


def temperature(engine, folder, hundredths):
    Sampling(temperature=hundredths / 100)


def coldest(engine, folder, below):
    Sampling(temperature=0.02 / 2**below)


def top_p(engine, folder, hundredths):
    Sampling(top_p=hundredths / 100)


def least_top_p(engine, folder, below):
    Sampling(top_p=0.01 - (below - 1) * 0.01)


def least_tokens(engine, folder, below):
    Sampling(max_new_tokens=2 - below)


@pytest.mark.parametrize(
    ("use", "limit"),
    [
        (pixels_of_an_image, 1), (images_of_a_question, MAX_IMAGES), (text_of_a_question, MAX_TEXT),
        (tokens_of_a_conversation, 599), (temperature, 10_000), (coldest, 1), (top_p, 100), (least_top_p, 1),
        (least_tokens, 1),
    ],
)  # fmt: skip
def test_a_limit_holds_to_the_unit(answerer, tmp_path, use, limit):
    with Engine(answerer) as engine:
        use(engine, tmp_path, limit)
        with pytest.raises((DataError, ConfigError, BusyError)):
            use(engine, tmp_path, limit + 1)


def test_a_token_is_drawn_where_the_sum_passes_the_draw():
    """A token of probability 0 never is, whatever the draw."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for draw, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (0.9999, 3)):
        assert drawn(logits, [draw]).tolist() == [token]


def test_room_grows_to_what_it_was_and_no_further():
    room = Room(3)
    assert room.halve(2) and room.size == 1
    for _ in range(10):
        room.grow(100)
    assert room.size == 3


def test_a_null_slot_counts_among_the_columns_that_are_left(tmp_path):
    config = tower_config(tmp_path, top_k=2, null_slot=True)
    assert reduced_config(config, ["depth", "edge"]).top_k == 2
    config.top_k = 3
    with pytest.raises(ConfigError, match="top_k=3, but 2"):
        reduced_config(config, ["depth", "edge"])


def test_a_tensor_under_two_names_is_refused(tmp_path):
    table = [("a.", "part", ""), ("b.", "part", "")]
    found = split_by_prefix({"a.x": torch.ones(1), "b.y": torch.ones(1)}, table, tmp_path)
    assert set(found["part"]) == {"x", "y"}
    with pytest.raises(CheckpointError, match="'b.x' is there twice"):
        split_by_prefix({"a.x": torch.ones(1), "b.x": torch.ones(1)}, table, tmp_path)
