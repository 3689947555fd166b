"""``plain``: stage 1's template, an image and its caption."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import DataError
from tove_llava.data.templates.base import Segment, Template, Turn, register_template
from tove_llava.data.tokenizer import IMAGE_PLACEHOLDER


@register_template("plain")
class Plain(Template):
    """The images, caption and a newline, without question text or end token."""

    single_turn = True

    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        question, caption = turns[:-1], turns[-1].text if turns else ""
        if len(question) != 1:
            raise DataError(f"the plain template takes one question and one caption, not {len(turns)} turns")
        images = (question[0].text or "").count(IMAGE_PLACEHOLDER)
        if images == 0:
            raise DataError(f"the plain template needs {IMAGE_PLACEHOLDER} in the first turn")
        if caption is None:
            return [Segment(IMAGE_PLACEHOLDER * images + "\n")]
        return [Segment(IMAGE_PLACEHOLDER * images), Segment(caption + "\n", supervised=True)]
