"""``llama_2``: Llama 2's chat format with its own system text."""

from tove_llava.data.templates.base import register_template
from tove_llava.data.templates.llava_llama_2 import LlavaLlama2


@register_template("llama_2")
class Llama2(LlavaLlama2):
    """As ``llava_llama_2``, with the system text that Llama 2's chat models were tuned with."""

    # The two spaces after "while being safe." are LLaVA's.
    system = (
        "You are a helpful, respectful and honest assistant. "
        "Always answer as helpfully as possible, while being safe.  "
        "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
        "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
        "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
        "something not correct. If you don't know the answer to a question, please don't share false information."
    )
