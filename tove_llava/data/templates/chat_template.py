"""``chat_template``: the chat template that the tokenizer ships."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data.templates.base import Segment, Template, Turn, alternating, register_template
from tove_llava.data.templates.chat_format import DATE, ChatFormat, chat_format, render

_REASONING = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)


@register_template("chat_template")
class ChatTemplate(Template):
    """The tokenizer's own template in the form that :func:`chat_format` makes of it.

    The prompt at which an answer is generated, an empty think block included, is not learned. The answer is, and the
    token that ends it.
    """

    adds_bos = False  # the template writes its own

    def prepare(self, tokenizer: PreTrainedTokenizerBase, reasoning: str | None, date: str | None) -> None:
        form = chat_format(tokenizer, reasoning or "refuse", date or DATE)
        if form.form != "as trained" and (form.reasoning, form.date) != (
            reasoning or form.reasoning,
            date or form.date,
        ):
            raise ConfigError(
                f"this tokenizer's chat template is a trained one, with reasoning {form.reasoning} and the date "
                f"{form.date}; leave these options out, or take the language model's own tokenizer"
            )
        tokenizer.chat_template = form.text

    def check(self, tokenizer: PreTrainedTokenizerBase) -> str:
        form = chat_format(tokenizer)
        if form.form == "as trained":
            return ""
        kind = "as shipped" if form.form == "shipped" else "in a linear form, the same in every turn"
        return f"the tokenizer's own, {kind}; answers end with {form.end}; think blocks: {form.reasoning}"

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        return [chat_format(tokenizer).end, *super().end_tokens(tokenizer)]

    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        form = chat_format(tokenizer)
        turns = alternating(turns)
        open_turn = bool(turns) and turns[-1].role == "assistant" and turns[-1].text is None
        messages = [
            {"role": turn.role, "content": _without_reasoning(turn, index, form)}
            for index, turn in enumerate(turns)
            if turn.text is not None
        ]
        whole = render(tokenizer, form.text, messages, open_turn)
        segments: list[Segment] = []
        written = done = 0  # what is in segments; what has been compared with the turns
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                done = _end_of(message["content"], whole, done, index)
                continue
            before = render(tokenizer, form.text, messages[:index], True)
            reply = _end_of(message["content"], whole, len(before) if whole.startswith(before) else done, index)
            end = whole.find(form.end, reply)
            inside = whole[len(before) : reply].removesuffix(message["content"].strip())
            if not whole.startswith(before) or inside.strip() or end < 0:
                raise DataError(
                    f"turn {index + 1}: the tokenizer's chat template writes something else around this answer than "
                    "around others; choose another conversation template"
                )
            done = end + len(form.end)
            segments += [Segment(whole[written : len(before)]), Segment(whole[len(before) : done], supervised=True)]
            written = done
        segments.append(Segment(whole[written:]))
        return [segment for segment in segments if segment.text]


def _end_of(text: str, whole: str, start: int, index: int) -> int:
    """Return where a turn's text ends in the rendering; DataError if it is not there."""
    found = whole.find(text.strip(), start)
    if found < 0:
        raise DataError(
            f"turn {index + 1}: the tokenizer's chat template changes the text {text.strip()[:60]!r}; choose another "
            "conversation template"
        )
    return found + len(text.strip())


def _without_reasoning(turn: Turn, index: int, form: ChatFormat) -> str:
    text = turn.text or ""
    if turn.role != "assistant" or form.reasoning == "keep" or not re.match(r"\s*<think>", text):
        return text
    if form.reasoning == "refuse":
        raise DataError(
            f"turn {index + 1}: the answer begins with a think block. Learn it (language.reasoning: keep, in the "
            "preset) or leave it out (drop)"
        )
    return without_reasoning(text)


def without_reasoning(text: str) -> str:
    """Return an answer's text without the think block that it begins with."""
    return _REASONING.sub("", text, count=1)
