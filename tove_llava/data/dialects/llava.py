"""LLaVA's and ShareGPT's records: ``conversations``."""

from typing import Any

from tove_llava.data.dialects.base import DIALECTS, Content, chat_turns


@DIALECTS.register("conversations")
def read_conversations(conversations: Any) -> Content:
    """Read ``[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]``."""
    return chat_turns(conversations, "conversations")
