"""What a block took is given back at its end, also after an error."""

import signal
import threading

import pytest
import torch
from answer_parts import ask, make_scenes, picture, save_model

from tove_llava.analysis.measure import without
from tove_llava.checkpoints import saving
from tove_llava.checkpoints.loading import load_model
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.core.errors import BusyError, CheckpointError
from tove_llava.core.locks import locked
from tove_llava.eval.conditions import DETACHED
from tove_llava.eval.question_loader import QuestionLoader
from tove_llava.experts.random_weights import random_weights
from tove_llava.inference.engine import Engine, Sampling
from tove_llava.llava.varlen import packed_rows
from tove_llava.serve.commands import Conversation, run_command
from tove_llava.tower.tower_model import clip_follows
from tove_llava.train.interrupts import watching


class Broken(Exception):
    """The block fails."""


def detached(answerer):
    return list(answerer.tower.config.detached_experts)


def attention(answerer):
    return answerer.model.model.language_model.config._attn_implementation


def clips_attention(answerer):
    return answerer.tower.config.clip_config._attn_implementation


def handlers(answerer):
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def readers(answerer):
    return sorted(each.name for each in threading.enumerate() if each.name.startswith("images"))


def loader(answerer):
    loading = QuestionLoader(answerer, [])
    loading._pool.submit(int)  # a thread begins with the first image
    return loading


BLOCKS = {
    "condition": (lambda a: DETACHED.applied(a.model), detached),
    "without": (lambda a: without(a.tower, ["depth"]), detached),
    "packed rows": (lambda a: packed_rows(a.model.model.language_model), attention),
    "signals": (lambda a: watching(), handlers),
    "loader": (loader, readers),
    "random weights": (lambda a: random_weights("random:x"), lambda a: torch.random.initial_seed()),
}


@pytest.mark.filterwarnings("ignore:random:UserWarning")
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("error", [None, Broken])
def test_a_block_gives_back_what_it_took(answerer, name, error):
    enter, state = BLOCKS[name]
    before = state(answerer)
    try:
        with enter(answerer):
            assert state(answerer) != before
            if error is not None:
                raise error
    except Broken:
        pass
    assert state(answerer) == before


def test_a_refused_attention_is_given_back(answerer):
    config = answerer.tower.config
    before = clips_attention(answerer)
    with pytest.raises(ValueError), clip_follows(config, "no such attention"):
        raise ValueError
    assert clips_attention(answerer) == before


def test_a_lock_is_free_after_its_block(tmp_path):
    for _ in range(2):
        with pytest.raises(Broken), locked(tmp_path):
            with pytest.raises(BusyError), locked(tmp_path):
                pass
            raise Broken


def test_an_engine_is_free_after_each_way_to_end(answerer):
    """Cancelled, forgotten, failed and answered questions all leave their place in the queue."""
    with Engine(answerer, max_batch=1, max_waiting=2) as engine:
        for round_ in range(6):
            replies = [engine.ask(ask("Hi", picture(round_)), Sampling(2)) for _ in range(2)]
            replies[0].cancel() if round_ % 2 else list(replies[0])
            replies[1].text()
            assert engine.worker.waiting == 0
        assert engine.worker.running == 0


def test_scenes_that_are_asked_about_are_let_go(answerer, tmp_path):
    from tove_llava.eval.benchmarks import get_benchmark

    make_scenes(tmp_path / "data", images=4, questions_each=1)
    questions = get_benchmark("scenes").questions(tmp_path / "data")
    with QuestionLoader(answerer, [[each] for each in questions], capacity=1) as loading:
        while jobs := loading.take(1):
            loading.features(jobs)
            assert len(loading._known) <= 1 and len(loading._opening) <= 1


def test_a_new_conversation_has_no_images(answerer, tmp_path):
    picture().save(tmp_path / "x.png")
    with Engine(answerer) as engine:
        chat = Conversation(engine)
        run_command(chat, f"/image {tmp_path / 'x.png'}")
        chat.keep("What?", "It.")
        run_command(chat, f"/image {tmp_path / 'x.png'}")
        assert chat.images and chat.history
        run_command(chat, "/reset")
        assert not chat.images and not chat.history


def test_a_checkpoint_is_none_while_it_is_written_over(tmp_path, monkeypatch):
    model = save_model(tmp_path)
    loaded, processor = load_model(model)
    manifest = Manifest.read(model)

    def fail(folder, *_):
        raise Broken

    monkeypatch.setattr(saving, "write_manifest", fail)
    with pytest.raises(Broken):
        saving.save_checkpoint(model, loaded, processor, manifest, dict(loaded.state_dict()))
    with pytest.raises(CheckpointError, match="not a complete"):
        load_model(model)
