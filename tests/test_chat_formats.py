"""Chat templates of the field in training.

The files of tests/chat_templates imitate, each, a peculiarity of a family. ``CHAT_TEMPLATES=FOLDER`` names a folder of
the families' own templates (huggingface/trl keeps them in trl/chat_templates); without it those tests skip.
"""

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import transformers.utils.chat_template_utils as clock
from data_helpers import byte_level_tokenizer, decode_spans
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from train_parts import flags, write_parts, write_records

from tove_llava.checkpoints.manifest import Manifest
from tove_llava.cli import main as command
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import Turn
from tove_llava.data.templates import chat_format as formats
from tove_llava.data.templates import get_template
from tove_llava.data.templates.chat_format import chat_format
from tove_llava.data.tokenization import encode_prompt, encode_turns
from tove_llava.inference.generation import Answerer
from tove_llava.llava.build import prepare_tokenizer
from tove_llava.presets import LanguagePreset
from tove_llava.testing.contract import ContractError
from tove_llava.testing.template_contract import check_tokenizer
from tove_llava.train.run import main

OWN = Path(__file__).parent / "chat_templates"
THEIRS = os.environ.get("CHAT_TEMPLATES")


@dataclass(frozen=True)
class Family:
    """A tokenizer's conventions: special tokens, and the token that ends an answer."""

    file: str
    end: str
    tokens: tuple[str, ...]
    bos: str | None = None
    eos: str | None = None
    form: str = "shipped"


CHATML, HEADERS = ("<|im_start|>",), ("<|start_header_id|>", "<|end_header_id|>")
PHI, HARMONY = ("<|user|>", "<|assistant|>", "<|system|>"), ("<|start|>", "<|message|>", "<|channel|>", "<|end|>")
COHERE = tuple(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "USER", "CHATBOT", "SYSTEM"))
IMITATED = [
    Family("chatml", "<|im_end|>", CHATML),
    Family("default_system", "<|im_end|>", CHATML),
    Family("think_block_of_the_last_answer", "<|im_end|>", CHATML, form="linear"),
    Family("opens_a_think_block", "<|eos|>", PHI, "<|bos|>", form="linear"),
    Family("end_after_the_last_answer", "<|end|>", PHI, eos="<|endoftext|>"),
    Family("channels", "<|return|>", HARMONY, form="linear"),
    Family("today", "<|eot_id|>", HEADERS, "<|begin_of_text|>"),
    Family("no_system_turn", "<end_of_turn>", ("<start_of_turn>",), "<bos>", "<eos>", form="linear"),
    Family("system_in_the_last_question", "</s>", (), "<s>", form="linear"),
    Family("separators", "<|im_end|>", (*CHATML, "<|im_sep|>"), "<|endoftext|>"),
    Family("end_token_and_line_between_turns", "<|endoftext|>", PHI, "<|endoftext|>"),
    Family("wants_parts", "<|im_end|>", CHATML),
    Family("mode_in_the_system_text", "<|im_end|>", (*CHATML, "<think>", "</think>")),
]
SHIPPED = [
    *(
        Family(name, "<|im_end|>", CHATML)
        for name in (
            "qwen2_5",
            "qwen2_5_vl",
            "qwen3_instruct_2507",
            "qwen3_vl",
            "lfm2",
            "lfm2_2_5",
            "nemotron_3_nano",
            "nemotron_3_super",
            "nemotron_3_ultra",
        )
    ),
    *(
        Family(name, "<|im_end|>", CHATML, form="linear")
        for name in ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6")
    ),
    *(Family(name, "<|eot_id|>", HEADERS, "<|begin_of_text|>") for name in ("llama3", "llama3_1", "llama3_2")),
    *(Family(name, "<|end|>", PHI, "<s>", "<|endoftext|>") for name in ("phi3", "phi3_5")),
    Family("gemma", "<end_of_turn>", ("<start_of_turn>",), "<bos>", "<eos>", form="linear"),
    Family("gemma3", "<end_of_turn>", ("<start_of_turn>",), "<bos>", "<eos>"),
    Family("gptoss", "<|return|>", HARMONY, "<|startoftext|>", form="linear"),
    Family("diffusion_gemma", "<turn|>", ("<|turn>",), "<bos>"),
    Family("cohere", "<|END_OF_TURN_TOKEN|>", COHERE, "<BOS_TOKEN>"),
    Family("cohere2", "<|END_RESPONSE|>", (*COHERE, "<|START_RESPONSE|>"), "<BOS_TOKEN>"),
    Family("idefics3", "<end_of_utterance>", (), "<|im_start|>", form="linear"),
    Family("llava_next", "</s>", (), "<s>", form="linear"),
    Family("deepseekv3", "<｜end▁of▁sentence｜>", (), "<｜begin▁of▁sentence｜>", form="linear"),
]


def tokenizer_of(family, folder):
    """A byte-level tokenizer with the family's special tokens and template."""
    tokenizer = byte_level_tokenizer()
    # Line breaks are one token whatever follows, as in the tokenizers of Llama 3 and Qwen; GPT-2's splits them.
    lines = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.ByteLevel(False, False)])
    tokenizer.eos_token = family.eos or family.end
    tokenizer.bos_token = family.bos
    added = [token for token in (*family.tokens, family.end, family.bos, family.eos) if token]
    tokenizer.add_special_tokens({"additional_special_tokens": added}, replace_extra_special_tokens=False)
    tokenizer.chat_template = (Path(folder) / f"{family.file}.jinja").read_text(encoding="utf-8")
    return tokenizer


def name_of(family):
    return family.file


@pytest.fixture(params=IMITATED, ids=name_of)
def family(request):
    return request.param


@pytest.fixture
def tokenizer(family):
    return tokenizer_of(family, OWN)


@pytest.mark.parametrize("family", SHIPPED, ids=name_of)
@pytest.mark.skipif(not THEIRS, reason="CHAT_TEMPLATES names no folder of shipped templates")
def test_shipped_templates_keep_the_contract(family):
    tokenizer = tokenizer_of(family, THEIRS)
    form = chat_format(tokenizer)
    assert (form.form, form.end) == (family.form, family.end)
    assert len(check_tokenizer(tokenizer)) == 5
    keeps = chat_format(tokenizer_of(family, THEIRS), reasoning="keep")
    tokenizer.chat_template = keeps.text
    assert len(check_tokenizer(tokenizer)) == 5


@pytest.mark.skipif(not THEIRS, reason="CHAT_TEMPLATES names no folder of shipped templates")
def test_a_shipped_template_that_ends_no_answer_is_refused():
    with pytest.raises(ConfigError, match="ends an answer with '', .*; v1 works with every model"):
        chat_format(tokenizer_of(Family("glm4moe", "<|endoftext|>", PHI), THEIRS))


def test_imitated_templates_keep_the_contract(family, tokenizer):
    form = chat_format(tokenizer)
    assert (form.form, form.end) == (family.form, family.end)
    assert len(check_tokenizer(tokenizer)) == 5
    assert family.end in get_template("chat_template").end_tokens(tokenizer)


def test_one_question_and_answer_are_as_the_model_s_own_template_has_them(family, tokenizer):
    own = [{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": "This."}]
    if family.file == "wants_parts":
        own = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in own]
    shown = tokenizer.apply_chat_template(own, tokenize=False, enable_thinking=False)
    today, fixed = datetime.datetime.now(), datetime.date.fromisoformat(formats.DATE)
    for form in ("%Y-%m-%d", "%d %b %Y", "%d %B %Y"):
        shown = shown.replace(today.strftime(form), fixed.strftime(form))
    text = chat_format(tokenizer).text
    assert formats.render(tokenizer, text, [{**turn, "content": _words(turn)} for turn in own], False) == shown


def _words(turn):
    return turn["content"] if isinstance(turn["content"], str) else turn["content"][0]["text"]


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<>|[]"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    system=st.none() | WORDS,
    images=st.lists(st.sampled_from(["first", "last"]), max_size=4),
    data=st.data(),
)
def test_exactly_the_answers_and_their_ends_are_learned(pairs, system, images, data):
    family = data.draw(st.sampled_from(IMITATED))
    tokenizer = tokenizer_of(family, OWN)
    turns = [Turn("system", system)] if system else []
    for index, (question, answer) in enumerate(pairs):
        where = images[index] if index < len(images) else ""
        question = f"<image>\n{question}" if where == "first" else question + ("\n<image>" if where == "last" else "")
        turns += [Turn("user", question), Turn("assistant", answer)]
    encoded = encode_turns(turns, tokenizer, "chat_template", images=True)
    learned = decode_spans(tokenizer, encoded.labels)
    assert all(span.endswith(family.end) for span in learned)
    assert [span.removesuffix(family.end).strip() for span in learned] == [answer.strip() for _, answer in pairs]
    assert encoded.num_images == len(images[: len(pairs)])
    for end in (index for index, turn in enumerate(turns) if turn.role == "assistant"):
        prompt = encode_prompt(turns[:end], tokenizer, "chat_template")
        assert encoded.input_ids[: len(prompt)] == prompt


THOUGHT = "<think>\nIt is round.\n</think>\n\nA ball."


def test_a_kept_think_block_is_opened_once():
    """The shipped prompt of this kind opens it, and the record's answer does too."""
    tokenizer = tokenizer_of(IMITATED[3], OWN)
    tokenizer.chat_template = chat_format(tokenizer, "keep").text
    turns = [Turn("user", "What?"), Turn("assistant", THOUGHT)]
    assert get_template("chat_template").prompt(turns, tokenizer).count("<think>") == 1


def test_think_blocks_are_refused_dropped_or_kept_by_a_key():
    family = IMITATED[2]
    turns = [Turn("user", "What?"), Turn("assistant", THOUGHT), Turn("user", "So?"), Turn("assistant", THOUGHT)]
    with pytest.raises(DataError, match="turn 2: the answer begins with a think block.*reasoning: keep"):
        encode_turns(turns, tokenizer_of(family, OWN), "chat_template", images=False)
    learned = {}
    for reasoning in ("drop", "keep"):
        tokenizer = tokenizer_of(family, OWN)
        tokenizer.chat_template = chat_format(tokenizer, reasoning).text
        encoded = encode_turns(turns, tokenizer, "chat_template", images=False)
        learned[reasoning] = decode_spans(tokenizer, encoded.labels)
        prompt = tokenizer.decode(encode_prompt(turns[:1], tokenizer, "chat_template", images=False))
        assert prompt.endswith("<think>\n\n</think>\n\n") == (reasoning == "drop")
    assert learned == {"drop": ["A ball.<|im_end|>"] * 2, "keep": [f"{THOUGHT}<|im_end|>"] * 2}


class Tomorrow(datetime.datetime):
    """A clock of another day."""

    @classmethod
    def now(cls, tz=None):
        return cls(2031, 2, 3)


def test_the_preset_s_keys_reach_the_template(tmp_path):
    tokenizer_of(IMITATED[6], OWN).save_pretrained(tmp_path)
    language = LanguagePreset(source=f"hf:{tmp_path}", reasoning="keep", date="2030-05-06")
    form = chat_format(prepare_tokenizer(language, "chat_template"))
    assert (form.reasoning, form.date) == ("keep", "2030-05-06")
    assert "tove_llava" not in prepare_tokenizer(language, "v1").chat_template


@pytest.mark.parametrize("name", ["channels", "today", "mode_in_the_system_text"])
def test_a_template_that_asks_for_the_time_gives_the_same_ids_every_day(name, monkeypatch):
    [family] = [family for family in IMITATED if family.file == name]
    turns = [Turn("user", "What?"), Turn("assistant", "This.")]
    first = tokenizer_of(family, OWN)
    before = encode_turns(turns, first, "chat_template", images=False)
    monkeypatch.setattr(clock, "datetime", Tomorrow)
    assert "2031" in tokenizer_of(family, OWN).apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert encode_turns(turns, tokenizer_of(family, OWN), "chat_template", images=False) == before
    dated = tokenizer_of(family, OWN)
    dated.chat_template = chat_format(dated, date="2030-05-06").text
    assert "2030" in get_template("chat_template").prompt(turns, dated)


def test_a_form_is_made_once_and_saved_with_the_tokenizer(family, tokenizer, tmp_path):
    tokenizer.chat_template = chat_format(tokenizer).text
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert chat_format(again) == chat_format(tokenizer)
    turns = [Turn("user", "<image>\na"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
    assert encode_turns(turns, again, "chat_template", True) == encode_turns(turns, tokenizer, "chat_template", True)


PARTS = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "a turn's text 0 times"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}", "a turn's text 2 times"),
        ("{% for m in messages %}{{ m.content }};{% endfor %}", "begins with no token of this tokenizer"),
        ("{% for m in messages %}", "refuses the conversation"),
        ("{{ messages.__class__.__mro__ }}", "refuses the conversation|renders a turn's text"),
        ("{{ 'a' * 10**9 }}", "takes all memory"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}", "does not come to an end"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{#- tove_llava chat format: {\"end\": 3} -#}" + PARTS, "first line is damaged"),
        ("{#- tove_llava chat format: {\"end\": \"<|x|>\"} -#}" + PARTS, "is no token of this tokenizer"),
        ("{#- tove_llava chat format: {\"more\": 3} -#}" + PARTS, "first line is damaged"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_trained_on_are_refused_before_any_record(template, words):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=words):
        chat_format(tokenizer)


def test_options_are_checked():
    for keys, words in (({"reasoning": "perhaps"}, "refuse, drop, keep"), ({"date": "today"}, "language.date must be")):
        with pytest.raises(ConfigError, match=words):
            chat_format(tokenizer_of(IMITATED[6], OWN), **keys)


def test_a_record_that_the_template_changes_is_refused():
    tokenizer = byte_level_tokenizer()
    changed = "{{ m.content | replace('é', 'e') | replace('[img]', '<image>') }}"
    tokenizer.chat_template = (OWN / "chatml.jinja").read_text().replace("{{ m.content }}", changed)
    for question, answer, words in (
        ("a", "café", "turn 2: .*changes the text"),
        ("café", "a", "turn 1"),
        ("[img]", "a", "turn 1"),
    ):
        with pytest.raises(DataError, match=words):
            encode_turns([Turn("user", question), Turn("assistant", answer)], tokenizer, "chat_template", images=True)


def test_the_contract_finds_a_template_without_the_properties():
    tokenizer = tokenizer_of(IMITATED[2], OWN)
    raw = formats._frozen(tokenizer.chat_template, "refuse", formats.DATE)
    tokenizer.chat_template = formats._headed(formats.ChatFormat(raw, "<|im_end|>")).text
    with pytest.raises(ContractError, match="writes something else around this answer"):
        check_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_parts(folder)
    write_records(folder, captions=4, count=4)
    return folder


TRAINED = ("think_block_of_the_last_answer", "channels", "today", "no_system_turn")


@pytest.mark.parametrize("family", [family for family in IMITATED if family.file in TRAINED], ids=name_of)
def test_both_stages_an_answer_that_stops_and_a_stock_export(family, root, tmp_path, monkeypatch):
    """The model's own generation_config names another end token, as those of several families do."""
    tokenizer = tokenizer_of(family, OWN)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    keys = (f"language.source=hf:{tmp_path / 'llm'}", "vision.fusion=none", "vision.experts=[]")
    chosen = [word for key in keys for word in ("--set", key)]
    chosen += ["--max_steps", "1", "--image_aspect_ratio", "square"]
    assert main(flags(root, "pretrain", tmp_path / "stage1", *chosen)) == 0
    stage2 = ["--pretrained", str(tmp_path / "stage1"), "--template", "chat_template", *chosen]
    assert main(flags(root, "finetune_lora", tmp_path / "model", *stage2)) == 0
    assert f"answers end with {family.end}" in Manifest.read(tmp_path / "model").history[-1]["chat template"]
    answerer = Answerer.load(tmp_path / "model", "cpu", "float32")
    end = answerer.tokenizer.convert_tokens_to_ids(family.end)
    assert end in answerer.end_ids and 0 in answerer.end_ids
    turns = [Turn("user", "<image>\nWhat is it?"), Turn("assistant", "This."), Turn("user", "Sure?")]
    prompt = answerer.encode(turns, 1)
    monkeypatch.setattr(clock, "datetime", Tomorrow)
    assert Answerer.load(tmp_path / "model", "cpu", "float32").encode(turns, 1) == prompt
    assert command(["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 0
    stock = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    told = [{"role": t.role, "content": [{"type": "text", "text": t.text.removeprefix("<image>\n")}]} for t in turns]
    told[0]["content"].insert(0, {"type": "image"})
    ids = stock.apply_chat_template(told, add_generation_prompt=True)
    text = stock.tokenizer(ids, add_special_tokens=False).input_ids
    image = stock.tokenizer.convert_tokens_to_ids("<image>")
    kept = [token for index, token in enumerate(prompt) if token != image or prompt[index - 1] != image]
    assert text == kept  # each image's tokens are one placeholder in the text
    named = transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert end in named and 0 in named
