"""Llama 2's chat format, with LLaVA's system text or its own."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tove_llava.data.templates.base import Segment, Template, Turn, register_template, split_system


@register_template("llava_llama_2")
class LlavaLlama2(Template):
    """``[INST] <<SYS>>...<</SYS>> question [/INST] answer </s><s>[INST] question [/INST] ...``."""

    system = (
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    )

    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        system, turns = split_system(turns, self.system)
        segments = []
        for index, turn in enumerate(turns):
            if turn.role == "user":
                start = tokenizer.bos_token or "" if index else ""  # the tokenizer itself begins the first round
                block = "" if index else f"<<SYS>>\n{system}\n<</SYS>>\n\n"
                segments.append(Segment(f"{start}[INST] {block}{turn.text} [/INST]"))
            elif turn.text:
                segments.append(Segment(f" {turn.text} {tokenizer.eos_token}", supervised=True))
        return segments


@register_template("llama_2")
class Llama2(LlavaLlama2):
    """``llava_llama_2`` with the system text of Llama 2's chat models."""

    # The two spaces after "while being safe." are LLaVA's.
    system = (
        "You are a helpful, respectful and honest assistant. "
        "Always answer as helpfully as possible, while being safe.  "
        "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
        "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
        "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
        "something not correct. If you don't know the answer to a question, please don't share false information."
    )
