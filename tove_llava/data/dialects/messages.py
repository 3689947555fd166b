"""Records of chat libraries (TRL, LLaMA-Factory): ``messages``."""

from typing import Any

from tove_llava.data.dialects.base import DIALECTS, Content, chat_turns


@DIALECTS.register("messages")
def read_messages(messages: Any) -> Content:
    """Read ``[{"role": "user", "content": text or typed parts}, {"role": "assistant", "content": ...}]``."""
    return chat_turns(messages, "messages")
