"""``v1`` (Vicuna 1.1, LLaVA-1.5's instruction template)."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tove_llava.data.templates.base import Segment, Template, Turn, register_template, split_system


@register_template("v1", "vicuna_v1")
class V1(Template):
    """``SYSTEM USER: question ASSISTANT: answer</s>USER: ...``.

    A turn with an empty text is written as its role and colon alone, with no separator after it, as LLaVA does: after
    an empty answer there is nothing to learn.
    """

    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        system, turns = split_system(turns, self.system)
        segments = [Segment(system + " ")]
        for turn in turns:
            if turn.role == "user":
                segments.append(Segment(f"USER: {turn.text} " if turn.text else "USER:"))
            elif turn.text:
                segments += [Segment("ASSISTANT:"), Segment(f" {turn.text}{tokenizer.eos_token}", supervised=True)]
            else:
                segments.append(Segment("ASSISTANT:"))
        return segments
