"""Prompts, and which of their parts are learned."""

import pytest
from data_helpers import SAMPLE, byte_level_tokenizer, jsonl
from jinja2 import TemplateError

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import Turn, get_template, parse_record, template_names
from tove_llava.data.records import prepare_turns
from tove_llava.data.templates import Segment, Template, conversation, register_template
from tove_llava.data.tokenization import encode_turns
from tove_llava.llava.processing import jinja_template


class Llama:
    """A tokenizer's part that rendering needs."""

    bos_token, eos_token = "<s>", "</s>"


TOKENIZER = Llama()
BUILT_IN = {"v1", "plain", "llava_v1", "v1_mmtag", "llava_llama_2", "llama_2", "chat_template"}


@pytest.mark.parametrize("row", jsonl(SAMPLE / "conversations.jsonl"), ids=lambda row: row["record"]["id"])
def test_own_sample(row):
    template = get_template(row["template"])
    segments = template.render(prepare_turns(parse_record(row["record"]), template), TOKENIZER)
    assert "".join(segment.text for segment in segments) == row["prompt"]
    assert [segment.text for segment in segments if segment.supervised] == row["supervised"]


def test_aliases_are_one_template():
    assert get_template("vicuna_v1") is get_template("v1")
    assert get_template("vicuna_v1").name == "v1" and get_template(get_template("v1")) is get_template("v1")
    assert BUILT_IN | {"vicuna_v1"} <= set(template_names())
    with pytest.raises(ConfigError, match="unknown conversation template 'vicuna_v2'.*Did you mean 'vicuna_v1'"):
        get_template("vicuna_v2")


def test_a_name_cannot_be_registered_twice():
    with pytest.raises(ConfigError, match="registered twice"):

        @register_template("v1")
        class Another(Template):
            def render(self, turns, tokenizer):
                return []


@pytest.mark.parametrize("name", ["v1", "llava_v1", "v1_mmtag", "plain"])
def test_generation_prompts_end_at_the_colon_or_the_image(name):
    prompt = get_template(name).prompt([Turn("user", "Hi <image>"), Turn("assistant", None)], TOKENIZER)
    assert prompt == "<image>\n" if name == "plain" else prompt.endswith("USER: Hi <image> ASSISTANT:")


def test_empty_turns_are_only_their_role():
    texts = ["", "You said nothing.", "Hello?", ""]
    turns = [Turn(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]
    prompt = get_template("v1").prompt([Turn("system", "S."), *turns], TOKENIZER)
    assert prompt == "S. USER:ASSISTANT: You said nothing.</s>USER: Hello? ASSISTANT:"


def test_a_system_turn_replaces_the_templates_own():
    turns = [Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Yes.")]
    assert get_template("v1").prompt(turns, TOKENIZER) == "Be brief. USER: Hi ASSISTANT: Yes.</s>"
    assert "<<SYS>>\nBe brief.\n<</SYS>>" in get_template("llava_llama_2").prompt(turns, TOKENIZER)


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        ("v1", [Turn("assistant", "x")], "turn 1 is the assistant's"),
        ("v1", [Turn("user", "x")] * 2, "turn 2 is the user's"),
        ("v1", [Turn("user", "x"), Turn("system", "x")], "turn 2 is the system's"),
        ("v1", [Turn("user", "a"), Turn("assistant", None), Turn("user", "b")], "only the last turn"),
        *(("plain", [Turn("user", "<image>")] * count, "one question and one caption") for count in (0, 1, 3)),
    ],
)
def test_turns_that_do_not_suit_are_refused(name, turns, message):
    with pytest.raises(DataError, match=message):
        get_template(name).render(turns, TOKENIZER)


# -- roles, also in the form that an export carries -------------------------------------------------------------------

SAID = {"system": "S1.", "developer": "S2.", "user": "Q?", "assistant": "A."}


def shown(name, roles):
    """Render messages of these roles with the template, and with its jinja form."""
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = "<s>"
    messages = [(role, SAID.get(role, "x")) for role in roles]
    try:
        ours = get_template(name).prompt(conversation(messages), tokenizer)
    except DataError as error:
        ours = type(error)
    told = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in messages]
    try:
        text = jinja_template(name, tokenizer)
        exported = tokenizer.apply_chat_template(told, chat_template=text, tokenize=False)
    except TemplateError as error:
        exported = type(error)
    return ours, exported


@pytest.mark.parametrize("name", sorted({get_template(name).name for name in BUILT_IN} - {"plain"}))
def test_roles_mean_the_same_in_training_and_in_exports(name):
    ours, exported = shown(name, ["system", "developer", "user", "assistant", "user"])
    assert ours == exported and "S1.\n\nS2." in ours
    assert shown(name, ["developer", "user"])[1] == shown(name, ["developer", "user"])[0].replace("S1.", "S2.")
    for roles in (
        ["user", "tool"], ["user", "assistant", "tool"], ["User"], ["user", "user"], ["assistant", "user"],
        ["user", "assistant", "assistant"], ["user", "system"], ["user", "function", "user"],
    ):  # fmt: skip
        ours, exported = shown(name, roles)
        assert ours is DataError and issubclass(exported, TemplateError), roles


@pytest.mark.parametrize("name", sorted(BUILT_IN))
@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": {"text": "a"}},
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]},
        {"role": "system", "content": [{"type": "image"}]},
        {"role": "user", "content": "a", "tool_calls": [{}]},
    ],
)
def test_exported_templates_drop_nothing_in_silence(name, message):
    tokenizer = byte_level_tokenizer()
    with pytest.raises(TemplateError, match="not read|needs text"):
        tokenizer.apply_chat_template([message], chat_template=jinja_template(name, tokenizer), tokenize=False)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda text, reply: Segment(text.replace("<image>", ""), reply), "makes 0 image placeholders of 1"),
        (lambda text, reply: Segment(text + "<image>" * (not reply), reply), "makes 2 image placeholders of 1"),
        (lambda text, reply: Segment(text.upper(), reply), "turn 1: .*changes the text|image placeholders"),
        (lambda text, reply: Segment(text[: 5 if reply else None], reply), "turn 2: .*changes the text 'Red, mo"),
        (lambda text, reply: Segment(text if reply else "<image>", reply), "turn 1: .*or leaves it out"),
        (lambda text, reply: Segment(text, False), "turn 2: .*or leaves it out"),  # never learned
    ],
)  # fmt: skip
def test_what_a_template_of_anybody_s_loses_is_refused(changed, words):
    class Mine(Template):
        def render(self, turns, tokenizer):
            return [changed(turn.text or "", turn.role == "assistant") for turn in turns]

    turns = [Turn("user", "<image>\nWhich?"), Turn("assistant", "Red, mostly")]
    with pytest.raises(DataError, match=words):
        encode_turns(turns, byte_level_tokenizer(), Mine(), images=True)


def test_a_template_that_inherits_its_rendering_is_exported_with_its_own_system_text():
    class Brief(type(get_template("v1"))):
        system = 'Be "brief".'

    class Other(type(get_template("v1"))):
        def render(self, turns, tokenizer):
            return []

    tokenizer = byte_level_tokenizer()
    asked = [{"role": "user", "content": "a"}]
    text = jinja_template(Brief(), tokenizer)
    assert tokenizer.apply_chat_template(asked, chat_template=text, tokenize=False) == 'Be "brief". USER: a '
    Other.name = "other"
    assert jinja_template(Other(), tokenizer) is None


def test_chat_template_supervises_what_the_model_must_say():
    tokenizer = byte_level_tokenizer()
    turns = [Turn("user", "a"), Turn("assistant", "\nb<|im_end|>"), Turn("user", "c"), Turn("assistant", "d")]
    segments = get_template("chat_template").render(turns, tokenizer)
    assert [segment.text for segment in segments if segment.supervised] == ["\nb<|im_end|><|im_end|>", "d<|im_end|>"]
    assert "".join(segment.text for segment in segments) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\nb<|im_end|><|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    )
    opened = get_template("chat_template").prompt([*turns[:3], Turn("assistant", None)], tokenizer)
    assert opened.endswith("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
