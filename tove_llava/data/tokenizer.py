"""Load tokenizers with SentencePiece's own ids, and encode text piece by piece."""

import json
import weakref
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as _Generic

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.core.json_text import loads
from tove_llava.core.paths import check_folder
from tove_llava.core.safe_loading import from_pretrained, loading
from tove_llava.core.sources import Source
from tove_llava.data.sentencepiece_bpe import SPACE, corrected_llama, is_convertible, tokenizer_from_sentencepiece

IMAGE_PLACEHOLDER = "<image>"

# Two noncharacters: no text that may be interchanged contains them.
_NEVER = "\ufdd0image\ufdd1"


def load_tokenizer(folder: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, source or model id.

    A folder with LLaMA's kind of ``tokenizer.model`` is converted exactly (and saves as a folder without one); a
    ``tokenizer.json`` with LLaMA's vocabulary is corrected. Everything else is left to ``AutoTokenizer``.

    Args:
        folder: a folder, a ``.model`` file, a source (``bundled:llm``, ``gguf:...``), or a model id.
        **kwargs: arguments of ``AutoTokenizer.from_pretrained``, such as ``gguf_file``.

    Returns:
        A tokenizer with a fast backend, padding on the right.
    """
    path = Path(folder)
    if isinstance(folder, str) and ":" in folder and not path.exists():
        kwargs = {**Source.parse(folder).pretrained(), **kwargs}
        path = Path(folder := kwargs.pop("pretrained_model_name_or_path"))
    if path.is_dir():
        check_folder(path)
    with loading("the tokenizer", folder):
        tokenizer = _read(path, str(folder), kwargs)
    tokenizer.padding_side = "right"
    return tokenizer


def _read(path: Path, folder: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    if path.is_file() and path.suffix == ".model":
        return tokenizer_from_sentencepiece(path)
    model_file = path / "tokenizer.model"
    # Other families use this file name for other formats, with a complete tokenizer.json next to it.
    if model_file.is_file() and (is_convertible(model_file) or not (path / "tokenizer.json").is_file()):
        return tokenizer_from_sentencepiece(model_file)
    if path.is_absolute() and not path.exists():
        raise CheckpointError(f"there is no tokenizer folder {path}")
    kind = _Generic if _is_generic(path) else AutoTokenizer
    return corrected_llama(from_pretrained(kind, folder, "the tokenizer", **options))


def _is_generic(folder: Path) -> bool:
    """Recognise a folder whose tokenizer class takes ``tokenizer.json`` unchanged.

    AutoTokenizer looks at the model's type first: next to a Qwen2 it would rebuild any tokenizer as Qwen2's.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    return read_json_object(file).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


class TextEncoder:
    """Encodes text on its own, or as a continuation of other text.

    Strings of special tokens inside the text become their ids, as in LLaVA. Only the image placeholder is ordinary text
    here, because the caller handles images.

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
        description = loads(backend.to_str())
        _forget_placeholder(description)
        description["truncation"] = description["padding"] = None
        self._backend = Tokenizer.from_str(json.dumps(description))
        self._separator = tokenizer.eos_token
        length = len(self.encode(self._separator))
        if length != 1:
            raise ConfigError(f"the end-of-sequence token {self._separator!r} is not one token but {length}")
        if self._backend.encode(self._separator + "x", add_special_tokens=False).tokens[1].startswith(SPACE):
            raise ConfigError(
                "this tokenizer puts a space in front of text that follows a special token; load it with "
                "tove_llava.data.load_tokenizer from a folder that has LLaMA's tokenizer.model"
            )
        with_prefix = self._backend.encode("x", add_special_tokens=True).ids
        plain = self.encode("x")
        starts = [i for i in range(len(with_prefix)) if with_prefix[i : i + len(plain)] == plain]
        if not starts:
            raise ConfigError("the tokenizer encodes a text differently with and without special tokens")
        #: ids that the tokenizer puts in front of every sequence (LLaMA: BOS)
        self.prefix_ids: list[int] = with_prefix[: starts[0]]
        #: text in front of a text of its own, but not of a continuation (LLaMA: a space)
        self.text_prefix: str = " " if self.encode("x") != self.continuation("x") else ""

    def encode(self, text: str) -> list[int]:
        """Encode a text of its own, without BOS or EOS."""
        return self._backend.encode(text, add_special_tokens=False).ids if text else []

    def continuation(self, text: str) -> list[int]:
        """Encode ``text`` after other text, without a leading space marker."""
        return self.encode(self._separator + text)[1:] if text else []


def _forget_placeholder(description: dict[str, Any]) -> None:
    """Make the placeholder ordinary text in a backend's description; ids stay."""
    vocab = description["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else {piece for piece, _ in vocab}
    kept = []
    for token in description["added_tokens"]:
        if token["content"] != IMAGE_PLACEHOLDER:
            kept.append(token)
        elif IMAGE_PLACEHOLDER not in pieces:
            # Added tokens are numbered in order: removing one would renumber those after it.
            kept.append({**token, "content": _NEVER})
    description["added_tokens"] = kept


_encoders: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, TextEncoder]]" = weakref.WeakKeyDictionary()


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """Return the tokenizer's encoder, rebuilt only after tokens were added."""
    found = _encoders.get(tokenizer)
    if found is None or found[0] != len(tokenizer):
        found = (len(tokenizer), TextEncoder(tokenizer))
        _encoders[tokenizer] = found
    return found[1]
