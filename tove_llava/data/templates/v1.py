"""``v1`` (Vicuna 1.1, LLaVA-1.5's instruction template) and its variants."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tove_llava.data.templates.base import Segment, Template, Turn, register_template, split_system


@register_template("v1", "vicuna_v1")
class V1(Template):
    """``SYSTEM USER: question ASSISTANT: answer</s>USER: ...``.

    A turn with an empty text is only its role and colon, without separator, as in LLaVA; nothing is learned after it.
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


@register_template("llava_v1")
class LlavaV1(V1):
    """``v1`` about a *human* rather than a *user*."""

    system = (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    )


@register_template("v1_mmtag")
class V1MmTag(V1):
    """``v1`` with another system text and ``<Image>`` tags."""

    # The missing space after "language." is LLaVA's.
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant is able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
        "The visual content will be provided with the following format: <Image>visual content</Image>."
    )
    image_wrapper = ("<Image>", "</Image>")
