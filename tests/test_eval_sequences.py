"""Rows that join, leave and share prefixes read their own tokens."""

import pytest
import torch
from answer_parts import before_forward, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tower_parts import text_config
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tove_llava.data import Turn
from tove_llava.inference.prefill import Prefill, Prompt
from tove_llava.inference.sequences import Sequences, has_plain_cache, pad_left


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 256}
    return LlamaForCausalLM(text_config(vocab_size=50, initializer_range=0.5, **sizes)).eval()


@torch.no_grad()
def alone(model, tokens):
    """[V] logits after a whole sequence, without any cache."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


words = st.lists(st.integers(1, 49), min_size=1, max_size=6)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.lists(words, min_size=1, max_size=3)),
        st.tuples(st.just("extend"), st.integers(1, 45)),  # up to more than one growth of the buffer
        st.tuples(st.just("read"), st.integers(2, 4)),  # tokens a row at once, at most, with gaps before them
        st.tuples(st.just("choose"), st.lists(st.integers(0, 9), min_size=1, max_size=5)),
    ),
    min_size=1,
    max_size=6,
)


@given(st.lists(words, min_size=1, max_size=4), steps, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history_of_a_row_reads_as_its_tokens_alone(model, prompts, steps, random):
    device = torch.device("cpu")

    def start(prompts):
        sequences = Sequences(len(prompts), 2, device)
        ids, valid = pad_left(prompts, 0, device)
        with torch.no_grad():
            return sequences, sequences.extend(model, ids, valid)[:, -1]

    sequences, logits = start(prompts)
    rows = [list(prompt) for prompt in prompts]
    for kind, value in steps:
        if kind == "join":
            more, new = start(value)
            sequences = Sequences.gather([(sequences, range(len(rows))), (more, range(len(value)))])
            logits, rows = torch.cat([logits, new]), rows + [list(prompt) for prompt in value]
        elif kind == "choose":
            chosen = [index % len(rows) for index in value]
            sequences, logits = Sequences.gather([(sequences, chosen)]), logits[chosen]
            rows = [list(rows[index]) for index in chosen]
        elif kind == "read":
            more = [[random.randrange(1, 50) for _ in range(random.randint(1, value))] for _ in rows]
            ids, valid = pad_left(more, 0, device)
            with torch.no_grad():
                logits = sequences.extend(model, ids, valid)[:, -1]
            rows = [row + added for row, added in zip(rows, more, strict=True)]
        else:
            for _ in range(value):
                tokens = [random.randrange(1, 50) for _ in rows]
                with torch.no_grad():
                    logits = sequences.extend(model, torch.tensor(tokens)[:, None])[:, -1]
                rows = [row + [token] for row, token in zip(rows, tokens, strict=True)]
    assert sequences.lengths == [len(row) for row in rows] == sequences.mask.sum(dim=1).tolist()
    for row, got in zip(rows, logits, strict=True):
        torch.testing.assert_close(got, alone(model, row), atol=1e-4, rtol=1e-4)


def test_columns_that_no_row_uses_are_dropped(model):
    sequences = Sequences(2, 2, torch.device("cpu"))
    ids, valid = pad_left([[5] * 20, [6, 7]], 0, torch.device("cpu"))
    sequences.extend(model, ids, valid)
    assert Sequences.gather([(sequences, [1])]).mask.shape == (1, 2)


def test_sliding_windows_are_known_not_to_fit(model):
    assert has_plain_cache(model)
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sliding = MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=1, num_key_value_heads=1, sliding_window=4))
    assert not has_plain_cache(sliding)


def features_of(answerer, count):
    return answerer.features(torch.stack([answerer.pixels(picture(index)) for index in range(count)]))


def prompt(answerer, text, image=None, features=()):
    turn = Turn("user", text if image is None else f"<image>\n{text}")
    return Prompt(answerer.encode([turn], num_images=int(image is not None)), image, features)


@torch.no_grad()
def reference(answerer, prompt):
    images = {"pixel_values": answerer.pixels(picture(prompt.image))[None]} if prompt.features else {}
    return answerer.model(input_ids=torch.tensor([prompt.ids]), **images).logits[0, -1]


@pytest.mark.parametrize("share", [True, False])
def test_prompts_with_shared_images_with_their_own_and_with_none(answerer, share):
    features = features_of(answerer, 3)
    asked = [("Is it red?", 0), ("How many?", 1), ("No image at all", None), ("Who?", None), ("What?", 2)]
    asked.insert(3, ("Where is the ball that is left of it?", 0))
    prompts = [prompt(answerer, text, image, () if image is None else [features[image]]) for text, image in asked]
    prefill = Prefill(answerer, share)
    for _ in range(2):  # the second time the head is known
        sequences, logits = prefill(prompts)
        assert sequences.lengths == [len(each.ids) for each in prompts]
        for each, got in zip(prompts, logits, strict=True):
            torch.testing.assert_close(got, reference(answerer, each), atol=1e-4, rtol=1e-4)


def test_what_is_shared_is_computed_once(answerer, monkeypatch):
    features, shapes = features_of(answerer, 2), []
    prompts = [prompt(answerer, f"Question {i}?", i // 3, features[i // 3 : i // 3 + 1]) for i in range(6)]
    before_forward(answerer, monkeypatch, lambda ids: shapes.append(tuple(ids.shape)))
    prefill = Prefill(answerer)
    prefill(prompts)
    head = prompts[0].ids.index(answerer.image_token_id)
    tail = len(prompts[0].ids) - head - 16
    assert shapes == [(1, head), (2, 16), (6, tail)]
    prefill(prompts)
    assert shapes[3:] == [(2, 16), (6, tail)]


def test_a_prompt_that_ends_with_its_image_is_not_cut(answerer):
    asked = Prompt([1, 5, *[answerer.image_token_id] * 16], 0, features_of(answerer, 1))
    _, logits = Prefill(answerer)([asked])
    torch.testing.assert_close(logits[0], reference(answerer, asked), atol=1e-4, rtol=1e-4)
