"""``chat_template``: the chat template that the tokenizer ships."""

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data.templates.base import Segment, Template, Turn, register_template, split_system


@register_template("chat_template")
class ChatTemplate(Template):
    """The tokenizer's own template, whose answers are found by rendering prefixes.

    Each prefix that awaits an answer, with the generation prompt, must begin the rendering of the whole. The text that
    follows is the answer, up to the end-of-sequence token where the template writes one.
    """

    adds_bos = False  # the template writes its own

    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("the tokenizer ships no chat template; choose another conversation template, such as v1")
        _, checked = split_system(turns, "")
        open_turn = bool(checked) and checked[-1].role == "assistant" and checked[-1].text is None
        messages: list[dict[str, str | None]] = [
            {"role": turn.role, "content": turn.text} for turn in turns if turn.text is not None
        ]
        whole = _apply(tokenizer, messages, generation=open_turn)
        segments, done = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = _apply(tokenizer, messages[:index], generation=True)
            after = _apply(tokenizer, messages[: index + 1], generation=False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"the tokenizer's chat template renders turn {index + 1} differently once more turns follow, so "
                    "the answers in it cannot be found; choose another conversation template"
                )
            end = after.rfind(tokenizer.eos_token, len(before)) if tokenizer.eos_token else -1
            end = len(after) if end < 0 else end + len(tokenizer.eos_token)
            segments += [Segment(whole[done : len(before)]), Segment(whole[len(before) : end], supervised=True)]
            done = end
        segments.append(Segment(whole[done:]))
        return [segment for segment in segments if segment.text]


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str | None]], generation: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    except TemplateError as error:
        raise DataError(f"the tokenizer's chat template refuses the conversation: {error}") from error
