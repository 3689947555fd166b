"""Many questions at once each get their single answers, whatever happens."""

import gc
import logging
import random
import threading
import tracemalloc
from dataclasses import replace

import pytest
import torch
from answer_parts import ask, before_forward, make_answerer, picture, save_model
from hypothesis import given, settings
from hypothesis import strategies as st

from tove_llava.core.errors import AnswerError, BusyError, DataError
from tove_llava.inference import engine as engines
from tove_llava.inference import vision
from tove_llava.inference.engine import Engine, Message, Sampling
from tove_llava.inference.rolling_batch import Batch, RollingBatch
from tove_llava.inference.vision import Vision
from tove_llava.inference.worker import Worker

TOKENS = 10
EXPERTS = ("depth", "edge", "normal")


@pytest.fixture
def engine(answerer):
    with Engine(answerer, max_batch=4) as engine:
        yield engine


def chats():
    """Conversations of every kind: (messages, options)."""
    return [
        (ask("What is it?", picture(0)), {}),
        (ask("Who are you, and what do you want here?"), {}),
        ([Message("user", "A", (picture(1),)), Message("assistant", "b"), *ask("And this?", picture(2))], {}),
        (ask("Which is redder?", picture(3), picture(4)), {}),
        (ask("What is it?", picture(0)), {"experts": ("depth",)}),
        (ask("What is it?", picture(0)), {"experts": ()}),
        (ask("Why?", picture(5)), {"experts": ("normal", "edge"), "system": "Say little."}),
        (ask("How?"), {"system": "Be long."}),
    ]


def ask_all(engine, count=None):
    return [engine.ask(messages, Sampling(TOKENS), **options) for messages, options in chats()[:count]]


def alone(answerer, messages, tokens=TOKENS, experts=None, system=None):
    """Answer by transformers' ``generate``, with the experts detached by hand."""
    engine, tower = Engine(answerer), answerer.tower
    chosen = frozenset(EXPERTS if experts is None else experts)
    asked = engine.prepare(messages, system=system, experts=chosen)
    out = [name for name in tower.config.expert_names if name not in chosen]
    tower.detach_experts(out)
    try:
        features = answerer.features(torch.stack(asked.pixels)) if asked.pixels else []
    finally:
        tower.attach_experts(out)
    return answerer.generate([asked.prompt], features, tokens)[0]


@pytest.fixture(scope="module")
def answers(answerer):
    """Answer each of :func:`chats` by itself."""
    texts = [alone(answerer, messages, **options) for messages, options in chats()]
    assert len(set(texts)) == len(texts) and all(texts)
    return texts


history = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.lists(st.integers(0, 7), min_size=1, max_size=3)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("abandon"), st.just(0)),
    ),
    min_size=2,
    max_size=7,
)


@given(events=history)
@settings(max_examples=12, deadline=None)
def test_rows_that_join_leave_and_start_again_answer_as_by_themselves(answerer, answers, events):
    engine = Engine(answerer)
    batch, asked = RollingBatch(answerer, Vision(answerer).read), []
    for kind, value in events:
        if kind == "join":
            made = [engine.prepare(chats()[i][0], Sampling(TOKENS), **chats()[i][1]) for i in value]
            batch.join(made)
            asked += zip(value, made, strict=True)
        elif kind == "step":
            for _ in range(value):
                batch.leave()
                batch.step()
        elif kind == "cancel" and asked:
            asked[value % len(asked)][1].cancelled = True
        elif kind == "abandon" and (rows := batch.abandon()):  # as when the memory was full
            batch.join(rows)
    while batch.rows:
        batch.leave()
        batch.step()
    for number, made in asked:
        text = answerer.text(made.tokens)
        assert made.ended or made.cancelled
        assert answers[number].startswith(text.rstrip("\ufffd")) if made.cancelled else text == answers[number]
    assert answerer.tower.config.detached_experts == []


@pytest.mark.parametrize("fusion", ["sequence_append", "channel_concat", "replace", "top1"])
def test_expert_sets_of_one_batch_for_other_fusions(tmp_path, fusion):
    """``sequence_append`` gives an image more tokens the more experts are attached."""
    answerer = make_answerer(tmp_path, fusion=fusion)
    sets = [None, ("edge",), ("normal", "depth")]
    expected = [alone(answerer, ask("What is it?", picture()), 6, experts) for experts in sets]
    with Engine(answerer) as engine:
        replies = [engine.ask(ask("What is it?", picture()), Sampling(6), experts=experts) for experts in sets]
        assert [reply.text() for reply in replies] == expected


def in_threads(count, work):
    """Run ``work(0)``, ``work(1)``, ... at once; return their results."""
    results, start = [None] * count, threading.Barrier(count)

    def run(index):
        start.wait()
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_fifty_clients_at_once_each_get_their_own_answer(answerer):
    def question(index):
        return ask(f"What is number {index}?", picture(index))

    expected = [alone(answerer, question(index), tokens=12) for index in range(50)]
    assert len(set(expected)) > 40
    with Engine(answerer) as engine:

        def work(index):
            if index % 10 == 9:  # leaves in mid-stream
                reply = engine.ask(question(index), Sampling(400))
                next(reply)
                reply.cancel()
                return "left"
            return engine.answer(question(index), max_new_tokens=12)

        got = in_threads(50, work)
        assert got == ["left" if index % 10 == 9 else expected[index] for index in range(50)]
        assert engine.worker.waiting == 0


class Gate:
    """A gate that holds the model until it is opened."""

    def __init__(self, answerer, monkeypatch):
        self.opened, self.entered = threading.Event(), threading.Event()
        before_forward(answerer, monkeypatch, self.wait)

    def wait(self, ids):
        self.entered.set()
        assert self.opened.wait(timeout=300)


def test_the_queue_is_bounded_and_says_whose_turn_it_is(answerer, answers, monkeypatch):
    gate = Gate(answerer, monkeypatch)
    with Engine(answerer, max_batch=1, max_waiting=2) as engine:
        (first, _), (second, _), (third, _) = chats()[:3]
        one = engine.ask(first, Sampling(TOKENS))
        assert gate.entered.wait(timeout=300) and one.position == 0 and one.timing.tokens == 0
        two, three = engine.ask(second, Sampling(TOKENS)), engine.ask(third, Sampling(TOKENS))
        assert (two.position, three.position, engine.worker.waiting, two.timing) == (1, 2, 2, None)
        with pytest.raises(BusyError, match="2 questions are waiting"):
            engine.ask(first)
        two.cancel()
        assert (two.position, three.position, engine.worker.waiting) == (0, 1, 1)
        four = engine.ask(second, Sampling(TOKENS))
        gate.opened.set()
        assert [reply.text() for reply in (one, two, three, four)] == [answers[0], "", answers[2], answers[1]]
        assert four.position == 0 and four.timing.waited > 0


def test_the_bound_holds_for_questions_that_were_prepared_at_once(answerer, monkeypatch):
    gate = Gate(answerer, monkeypatch)
    with Engine(answerer, max_batch=1, max_waiting=2) as engine:
        running, *prepared, late = [engine.prepare(ask("Hi"), Sampling(1)) for _ in range(4)]
        engine.worker.submit(running)
        assert gate.entered.wait(timeout=300)
        for request in prepared:
            engine.worker.submit(request)
        try:
            with pytest.raises(BusyError, match="2 questions are waiting"):
                engine.worker.submit(late)
        finally:
            gate.opened.set()


def test_the_bounds_of_a_loaded_engine_are_the_given_ones(tmp_path, monkeypatch):
    model = save_model(tmp_path)
    with Engine.load(model, "cpu", max_batch=1, max_waiting=1) as engine:
        gate = Gate(engine.answerer, monkeypatch)
        running = [engine.ask(ask("Hi"), Sampling(1))]
        assert gate.entered.wait(timeout=300)
        running.append(engine.ask(ask("Hi"), Sampling(1)))
        try:
            with pytest.raises(BusyError, match="1 questions are waiting"):
                engine.ask(ask("Hi"))
        finally:
            gate.opened.set()
        for reply in running:
            reply.text()


@pytest.mark.parametrize("leave", ["cancel", "close", "forget"])
def test_a_client_that_leaves_frees_its_row(answerer, answers, leave):
    with Engine(answerer, max_batch=1) as engine:
        if leave == "close":
            pieces = engine.stream(ask("Talk", picture()), max_new_tokens=400)
            next(pieces)
            pieces.close()
        else:
            reply = engine.ask(ask("Talk", picture()), Sampling(400))
            next(reply)
            if leave == "cancel":
                reply.cancel()
                assert len(list(reply)) < 390 > reply.timing.tokens
            del reply
            gc.collect()
        assert engine.ask(chats()[0][0], Sampling(TOKENS)).text() == answers[0]
        assert engine.worker.running == 0


def test_timing_says_where_the_time_went(engine):
    reply = engine.ask(ask("What?", picture(), picture(1)), Sampling(TOKENS))
    reply.text()
    timing = reply.timing
    assert 0 < timing.tower < timing.first_token and timing.waited >= 0
    assert 2 <= timing.tokens <= TOKENS and timing.tokens_per_second > 0 and timing.images == 2
    silent = engine.ask(ask("What?"), Sampling(1))
    silent.text()
    assert silent.timing.tower == 0 and silent.timing.images == 0 and silent.timing.tokens_per_second == 0


def test_experts_are_chosen_for_one_question(engine, answerer):
    assert engine.experts == EXPERTS
    base = engine.routing(picture())
    less = engine.routing(picture(), experts=("edge", "normal"))
    assert base.means["depth"] > 0 == less.means["depth"]
    assert sum(less.means.values()) == pytest.approx(1, abs=1e-5)
    assert sum(less.chosen.values()) == pytest.approx(1) and less.chosen["depth"] == 0
    assert less.weights.shape == (4, 4, 3) and torch.allclose(base.weights.sum(-1), torch.ones(4, 4))
    assert less.argmax.tolist() == less.weights.argmax(-1).tolist()
    assert less.grids["edge"] == less.weights[..., 1].tolist()
    assert engine.routing(picture(), experts=()) is None
    assert answerer.tower.config.detached_experts == []
    with pytest.raises(DataError, match="unknown expert.*thermal.*depth, edge, normal"):
        engine.ask(ask("What?"), experts=("depth", "thermal"))


def test_images_of_a_conversation_are_encoded_once(answerer, monkeypatch):
    encoded, real = [], answerer.features
    first = alone(answerer, ask("What?", picture(0)))
    chat = [*ask("What?", picture(0)), Message("assistant", first), *ask("And?", picture(1), picture(1))]
    expected = [alone(answerer, chat), alone(answerer, chat, experts=("edge",))]
    monkeypatch.setattr(answerer, "features", lambda pixels: encoded.append(len(pixels)) or real(pixels))
    with Engine(answerer) as engine:
        assert engine.answer(ask("What?", picture(0)), max_new_tokens=TOKENS) == first
        read = [replace(each, images=[engine.pixels(image) for image in each.images]) for each in chat]
        for messages in (chat, read):
            assert engine.answer(messages, max_new_tokens=TOKENS) == expected[0]
        assert encoded == [1, 1]
        assert engine.answer(chat, max_new_tokens=TOKENS, experts=("edge",)) == expected[1]
        assert encoded == [1, 1, 2], "other experts, other features"
        monkeypatch.setattr(vision, "KEPT", 1)
        for _ in range(2):
            assert engine.answer(chat, max_new_tokens=TOKENS) == expected[0]
        assert encoded[3:] == [1], "only the last image was kept"


def test_an_expert_that_the_model_has_lost_cannot_be_chosen(tmp_path):
    answerer = make_answerer(tmp_path)
    answerer.tower.detach_experts("edge")
    with Engine(answerer) as engine:
        assert engine.experts == ("depth", "normal")
        with pytest.raises(DataError, match="unknown expert.*edge"):
            engine.ask(ask("What?"), experts=("edge",))
        engine.answer(ask("What?", picture()), experts=("depth",), max_new_tokens=2)
    assert answerer.tower.config.detached_experts == ["edge"]


def test_a_system_prompt_replaces_the_templates(engine, answerer):
    def prompt(system):
        return answerer.tokenizer.decode(engine.prepare(ask("Hi"), system=system).prompt)

    assert prompt("Be brief.") == "Be brief. USER: Hi ASSISTANT:"
    assert prompt(None).startswith("A chat between a curious user")
    with pytest.raises(DataError, match="placeholder"):
        engine.ask(ask("What?", picture()), system="<image>")
    plain = Engine(answerer.with_template("plain"))
    with pytest.raises(DataError, match="'plain' has no system prompt"):
        plain.ask(ask("What?", picture()), system="Be brief.")


def test_drawn_answers_differ_and_greedy_ones_next_to_them_do_not(engine, answers):
    messages, _ = chats()[0]
    random.seed(0)
    replies = [engine.ask(messages, Sampling(TOKENS, temperature=value)) for value in (0.0, 3.0, 3.0, 3.0)]
    texts = [reply.text() for reply in replies]
    assert texts[0] == answers[0] and len(set(texts)) == 4
    assert engine.ask(messages, Sampling(TOKENS, temperature=3.0, top_p=1e-6)).text() == answers[0]


def limit_rows(answerer, monkeypatch, rows):
    """Let the memory hold ``rows`` rows; return the sizes of the batches."""
    sizes = []

    def check(ids):
        if len(ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(ids))

    before_forward(answerer, monkeypatch, check)
    return sizes


def test_full_memory_makes_the_batch_smaller_and_loses_no_answer(answerer, answers, monkeypatch, caplog):
    sizes = limit_rows(answerer, monkeypatch, 2)
    with Engine(answerer) as engine, caplog.at_level(logging.WARNING, "tove_llava"):
        assert [reply.text() for reply in ask_all(engine)] == answers
    # Three questions may have joined before the first pass; half of three is one.
    assert max(sizes) in (1, 2) and "memory is full" in caplog.text


class OneAtATime(Batch):
    """A batch whose memory holds one row; its first waits until ``begun`` is set."""

    def __init__(self):
        super().__init__(None, None)
        self.begun, self.order = threading.Event(), []

    def join(self, rows):
        assert self.begun.wait(timeout=300)
        if len(self.live) + len(rows) > 1:
            raise MemoryError
        self.rows = list(rows)
        self.order += rows

    def step(self):
        for row in self.rows:
            row.finish()


def test_questions_that_did_not_fit_are_answered_in_their_order(answerer):
    asked = [Engine(answerer).prepare(ask("Hi"), Sampling(1)) for _ in range(6)]
    batch = OneAtATime()
    worker = Worker(batch, 4, 8, lambda: None)
    for request in asked:
        worker.submit(request)
    batch.begun.set()
    for request in asked:
        request.events.get(timeout=300)
    worker.close(300)
    assert batch.order == asked


def test_a_question_too_large_for_the_memory_fails_and_the_next_is_answered(answerer, answers, monkeypatch):
    with Engine(answerer) as engine:
        with monkeypatch.context() as patch:
            limit_rows(answerer, patch, 0)
            with pytest.raises(AnswerError, match="memory is full with only this question"):
                engine.answer(ask("What?", picture()))
        assert engine.ask(chats()[0][0], Sampling(TOKENS)).text() == answers[0]


def test_memory_that_fills_up_in_mid_answer_repeats_no_word(answerer, answers, monkeypatch):
    steps = {4: 3, 2: 3}  # by rows: the step that fails

    def check(ids):
        rows, columns = ids.shape
        if columns == 1 and rows in steps:
            steps[rows] -= 1
            if not steps[rows]:
                del steps[rows]
                raise torch.OutOfMemoryError("CUDA out of memory")

    before_forward(answerer, monkeypatch, check)
    with Engine(answerer, max_batch=4) as engine:
        assert [reply.text() for reply in ask_all(engine, 5)] == answers[:5]
    assert not steps


def test_a_fault_reaches_only_its_own_client(answerer, answers, monkeypatch, caplog):
    real, bad = answerer.tower.forward, answerer.pixels(picture(9))

    def forward(pixel_values=None, **kwargs):
        if any(torch.equal(pixels, bad) for pixels in pixel_values):
            raise KeyError("poison")
        return real(pixel_values, **kwargs)

    monkeypatch.setattr(answerer.tower, "forward", forward)
    gate = Gate(answerer, monkeypatch)
    with Engine(answerer) as engine:
        (first, _), (second, _) = chats()[:2]
        before = engine.ask(second, Sampling(TOKENS))
        poisoned, other = engine.ask(ask("What?", picture(9))), engine.ask(first, Sampling(TOKENS))
        gate.opened.set()
        with pytest.raises(AnswerError, match="KeyError.*poison"):
            poisoned.text()
        assert (before.text(), other.text()) == (answers[1], answers[0])
    assert "Traceback" in caplog.text, "the log says where"


def test_closing_lets_running_answers_end_and_refuses_waiting_ones(answerer, answers, monkeypatch):
    gate = Gate(answerer, monkeypatch)
    engine = Engine(answerer, max_batch=1)
    (first, _), (second, _) = chats()[:2]
    one = engine.ask(first, Sampling(TOKENS))
    assert gate.entered.wait(timeout=300)
    two = engine.ask(second)
    closer = threading.Thread(target=engine.close, args=(300.0,))
    closer.start()
    with pytest.raises(BusyError, match="before this question's turn"):
        two.text()
    gate.opened.set()
    assert one.text() == answers[0]
    closer.join(timeout=300)
    for call in (lambda: engine.ask(first), lambda: engine.routing(picture())):
        with pytest.raises(BusyError, match="shut down"):
            call()


def test_closing_without_patience_ends_a_running_answer(answerer):
    engine = Engine(answerer)
    reply = engine.ask(ask("Talk", picture()), Sampling(400))
    next(reply)
    engine.close(patience=0)
    with pytest.raises(BusyError, match="before this answer's end"):
        reply.text()


def test_an_engine_that_is_forgotten_takes_its_thread_along(answerer):
    engine = Engine(answerer)
    engine.answer(ask("Hi"), max_new_tokens=1)
    thread = engine.worker._thread
    reply = engine.ask(ask("Hi"), Sampling(TOKENS))
    del engine
    gc.collect()
    assert reply.text(), "a reply keeps its engine"
    del reply
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_other_caches_answer_one_after_another(answerer, answers, monkeypatch):
    monkeypatch.setattr(engines, "has_plain_cache", lambda model: False)
    with Engine(answerer) as engine:
        assert isinstance(engine.worker._batch, engines.SequentialBatch)
        replies = ask_all(engine)
        assert [reply.text() for reply in replies] == answers
        assert 1 < replies[0].timing.tokens <= TOKENS
        long = engine.ask(ask("Talk", picture()), Sampling(400))
        next(long)
        long.cancel()
        assert engine.ask(chats()[0][0], Sampling(TOKENS)).text() == answers[0]
        assert long.timing.tokens < 390


def test_a_model_of_captions_ends_with_its_line(answerer, monkeypatch):
    newline = answerer.tokenizer.encode("\n", add_special_tokens=False)[0]
    always = torch.eye(answerer.model.lm_head.out_features)[newline]
    monkeypatch.setattr(answerer.model.lm_head, "forward", lambda hidden: always.expand(*hidden.shape[:-1], -1))
    for template, length in (("plain", 1), ("v1", 5)):  # v1 has a separate end token
        model = answerer.with_template(template)
        with Engine(model) as engine:
            reply = engine.ask(ask("Describe it", picture()), Sampling(5))
            assert reply.text() == "" and reply.timing.tokens == length
            asked = engine.prepare(ask("Describe it", picture()))
        assert len(model.generate_ids([asked.prompt], model.features(asked.pixels[0][None]), 5)[0]) == length


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind(answerer):
    with Engine(answerer) as engine:

        def rounds(count):
            for _ in range(count // 10):
                replies = [engine.ask(ask(f"What {number}?", picture(number)), Sampling(3)) for number in range(10)]
                replies[0].cancel()
                for reply in replies:
                    reply.text()

        rounds(100)
        tracemalloc.start()
        gc.collect()
        before, held, objects = tracemalloc.get_traced_memory()[0], resident(), len(gc.get_objects())
        rounds(1000)
        gc.collect()
        grown, more = tracemalloc.get_traced_memory()[0] - before, len(gc.get_objects()) - objects
        tracemalloc.stop()
        assert grown < 300_000 and more < 500, (grown, more)
        assert resident() - held < 30e6
        worker = engine.worker
        assert not (worker._waiting or worker._jobs or worker._batch.rows)
