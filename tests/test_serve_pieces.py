"""From tokens to pieces of text, and from logits to tokens."""

import pytest
import torch
from answer_parts import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tower_parts import text_config
from transformers import GenerationConfig, LlamaForCausalLM

from tove_llava.core.errors import DataError
from tove_llava.data import load_tokenizer
from tove_llava.inference.reasoning import Spoken, spoken
from tove_llava.inference.replies import BROKEN, TextStream
from tove_llava.inference.rolling_batch import Row, next_tokens
from tove_llava.inference.sampling import Sampling, drawn, warped

TOKENIZERS = {"bytes": byte_tokenizer(), "bundled": load_tokenizer("bundled:llm")}


def given_out(tokenizer, tokens):
    stream = TextStream(tokenizer)
    return [*(stream.add([token]) for token in tokens), stream.add((), final=True)]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_text_comes_out_whole_and_no_character_in_parts(name, text):
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(tokens, skip_special_tokens=True).lstrip()
    pieces = given_out(tokenizer, tokens)
    assert "".join(pieces) == whole
    assert BROKEN in whole or not any(BROKEN in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_tokens_give_what_they_give_at_once(name, data):
    tokenizer = TOKENIZERS[name]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    whole = tokenizer.decode(tokens, skip_special_tokens=True).lstrip()
    # LLaMA's kind of tokenizer breaks a whole run of bytes for one bad one at its end, when the rest is given out.
    if name == "bytes" or BROKEN not in whole:
        assert "".join(given_out(tokenizer, tokens)) == whole


def test_a_character_of_several_tokens_comes_with_its_last():
    tokenizer = TOKENIZERS["bytes"]
    tokens = tokenizer.encode("a😀b", add_special_tokens=False)
    assert given_out(tokenizer, tokens) == ["a", "", "", "", "😀", "b", ""]
    assert given_out(tokenizer, tokens[:3])[-1] == BROKEN, "what was never finished shows at the end"


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.text(max_size=20), st.text(max_size=12), st.sampled_from(["{}", "<think>{}</think>", "<think>{}"]))
@settings(max_examples=60, deadline=None)
def test_a_think_block_is_no_part_of_the_answer(name, block, answer, form):
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(form.format(block) + answer, add_special_tokens=False)
    stream = TextStream(tokenizer)
    pieces = [*(stream.add([token]) for token in tokens), stream.add((), final=True)]
    whole = spoken(tokenizer.decode(tokens, skip_special_tokens=True))
    assert "".join(pieces).strip() == whole.answer
    if form != "{}":
        assert stream.reasoning == whole.reasoning is not None
        assert whole.closed or not whole.answer


def test_think_blocks_that_were_never_closed_leave_no_answer():
    assert spoken(" <think>\nIt is\n</think>\n\nA <think> ball.") == Spoken("A <think> ball.", "It is", True)
    assert spoken("<think>It is a") == Spoken("", "It is a", False)
    assert spoken("A ball. <think>") == Spoken("A ball. <think>") and spoken("<thin") == Spoken("<thin")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_new_tokens": 0}, "at least 1 token"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-9}, "use 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_sampling_out_of_range_is_explained(values, words):
    with pytest.raises(DataError, match=words):
        Sampling(**values)


def test_each_row_is_chosen_as_it_says():
    logits = torch.tensor([[0.0, 3.0, 1.0], [4.0, 3.9, 0.0], [0.0, 0.0, 5.0], [1.0, 1.0, 1.0], [-torch.inf, 1.0, 2.0]])
    settings = [Sampling(), Sampling(temperature=1.0, top_p=0.3), Sampling(temperature=1.0), Sampling(temperature=2.0)]
    settings.append(Sampling(temperature=3.0))
    draws = iter([0.9, 0.0, 0.99, 0.0])
    rows = [Row(prompt=[1], decoding=each, longest=5, draw=lambda: next(draws)) for each in settings]
    # A nucleus of one word; a draw of 0 takes a row's first word that can be, one of .99 its last.
    assert next_tokens(logits, rows, []).tolist() == [1, 0, 0, 2, 1]


def test_words_are_drawn_as_often_as_transformers_draws_them():
    torch.manual_seed(0)
    model = LlamaForCausalLM(text_config(vocab_size=12, initializer_range=0.8)).eval()
    ids = torch.tensor([[3, 4, 5]])
    config = GenerationConfig(
        max_new_tokens=1, do_sample=True, temperature=0.7, top_p=0.8, top_k=0, output_scores=True, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    out = model.generate(ids, generation_config=config)
    ours = warped(out.logits[0].float(), 0.7, 0.8)
    torch.testing.assert_close(ours.softmax(-1), out.scores[0].softmax(-1))
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    shares = drawn(ours.expand(1000, -1), draws.tolist()).bincount(minlength=12) / 1000
    torch.testing.assert_close(shares, ours.softmax(-1)[0], atol=2e-3, rtol=0)
