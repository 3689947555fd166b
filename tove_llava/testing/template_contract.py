"""The contract of a conversation template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import DataError
from tove_llava.data import Turn, load_tokenizer
from tove_llava.data.templates import Template, get_template
from tove_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode_prompt, encode_turns
from tove_llava.testing.contract import Contract, Skip, require

_SYSTEM = Turn("system", "You answer in rhyme.")
_QUESTIONS = ("<image>\nWhat is it?", "Which colour?", "Why?", "Really?", "The end?")
_REPLIES = ("A kite.", "Red: crimson", "12 + 3 = 15", "é, 猫 and 🙂", "Yes")


@dataclass
class _Subject:
    template: Template
    tokenizer: Any

    @property
    def conversations(self) -> list[list[Turn]]:
        """Return conversations of one, two and five turns, the longer ones with a system turn too."""
        counts = (1,) if self.template.single_turn else (1, 2, 5)
        plain = [
            [turn for pair in zip(_QUESTIONS[:count], _REPLIES, strict=False) for turn in _pair(*pair)]
            for count in counts
        ]
        return plain if self.template.single_turn else [*plain, *([_SYSTEM, *turns] for turns in plain)]


def _pair(question: str, reply: str) -> tuple[Turn, Turn]:
    return Turn("user", question), Turn("assistant", reply)


_contract: Contract[_Subject] = Contract()


def check_template(name: str, tokenizer: str = "bundled:llm") -> list[str]:
    """Check a registered conversation template against its contract.

    Args:
        name: registered name.
        tokenizer: source of the tokenizer to check it with.

    Returns:
        the rules that hold.

    Raises:
        ContractError: rules are broken; each is named, with the template's file and line.
        ConfigError: no template has that name.

    Example:
        >>> from tove_llava.testing import check_template
        >>> check_template("v1")[0]
        'contains every question and reply as it is'
    """
    template, loaded = get_template(name), load_tokenizer(tokenizer)
    return _contract.check(lambda: _Subject(template, loaded), f"template {name!r}", type(template))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Check a tokenizer's own chat template, as training uses it; see :func:`check_template`."""
    template = get_template("chat_template")
    return _contract.check(lambda: _Subject(template, tokenizer), "the tokenizer's chat template", type(template))


@_contract.rule("contains every question and reply as it is")
def _texts(subject: _Subject) -> None:
    for turns in subject.conversations:
        text, at = subject.template.prompt(turns, subject.tokenizer), 0
        for turn in turns:
            if turn.role == "user" and subject.template.single_turn:
                continue  # LLaVA's plain template keeps only the image
            words = (turn.text or "").removeprefix("<image>\n")
            found = text.find(words, at)
            require(found >= 0, f"{words!r} is missing, or not in order, in {text!r}")
            at = found + len(words)


@_contract.rule("learns every reply and its end, and nothing else")
def _supervision(subject: _Subject) -> None:
    for turns in subject.conversations:
        segments = subject.template.render(turns, subject.tokenizer)
        learned = [segment.text for segment in segments if segment.supervised]
        joined, replies = "".join(learned), [turn.text or "" for turn in turns if turn.role == "assistant"]
        rest = "".join(segment.text for segment in segments if not segment.supervised)
        for reply in replies:
            _, found, joined = joined.partition(reply)
            require(bool(found), f"the reply {reply!r} is not learned")
            ends = bool(joined) and not any(joined.startswith(other) for other in replies)
            require(ends, f"no end is learned after the reply {reply!r}: an answer would never stop")
        for question in (turn.text or "" for turn in turns if turn.role != "assistant"):
            require(question.removeprefix("<image>\n") not in "".join(learned), f"{question!r} is learned")
        require("<image>" in rest, "the image's placeholder is not in the unsupervised text")


@_contract.rule("begins a training text with exactly the prompt that generation will use")
def _prefix(subject: _Subject) -> None:
    if subject.template.single_turn:
        raise Skip  # stage 1's template, with which nobody chats
    for turns in subject.conversations:
        for end in (index for index, turn in enumerate(turns) if turn.role == "assistant"):
            prompt = encode_prompt(turns[:end], subject.tokenizer, subject.template)
            whole = encode_turns(turns, subject.tokenizer, subject.template, images=True)
            require(whole.input_ids[: len(prompt)] == prompt, f"before reply {turns[end].text!r} the ids differ")
            learned = whole.labels[len(prompt)]
            require(learned not in (IGNORE_INDEX, IMAGE_TOKEN_INDEX), "the reply's first token is not learned")


@_contract.rule("keeps one placeholder for each image")
def _images(subject: _Subject) -> None:
    for turns in subject.conversations:
        encoded = encode_turns(turns, subject.tokenizer, subject.template, images=True)
        require(encoded.num_images == 1, f"{encoded.num_images} placeholders for one image")


@_contract.rule("refuses a conversation in which a role speaks twice")
def _roles(subject: _Subject) -> None:
    if subject.template.single_turn:
        raise Skip
    question, reply = _pair("Which?", "This.")
    for turns in ([question, question, reply], [question, reply, reply]):
        try:
            subject.template.render(turns, subject.tokenizer)
        except DataError:
            continue
        raise AssertionError("takes two turns of one role; begin render with split_system(turns, ...)")
