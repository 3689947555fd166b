"""Convert LLaMA's kind of SentencePiece BPE models into fast tokenizers.

The ids are SentencePiece's own: the conversion in transformers 5 differs in runs of spaces and in texts that begin with
a space. A tokenizer built here saves and loads as an ordinary ``tokenizer.json``.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object, read_text
from tove_llava.core.json_text import loads

SPACE = "▁"  # SentencePiece's marker of a space

# Piece types of sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# The 32,000 pieces of LLaMA's and Llama 2's vocabulary, joined by newlines (no piece contains one).
_LLAMA_PIECES = 32_000
_LLAMA_SHA256 = "0f97b4337921e6e7e9b4620fc73338ee570aecd3c16038bc23870a887e995045"


def tokenizer_from_sentencepiece(model_file: str | Path, **kwargs: Any) -> PreTrainedTokenizerFast:
    """Convert a SentencePiece BPE model into an equivalent fast tokenizer.

    As with ``legacy=False``, one space marker precedes each text, even one that begins with a space, but none follows a
    special token. The tokenizer settings in the files next to the model are read too.

    Args:
        model_file: the ``tokenizer.model`` file.
        **kwargs: further arguments of the tokenizer, such as ``model_max_length``.

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
                f"its id is {backend.token_to_id(token.content)}; the tokenizer files do not belong together"
            )
    if names["bos_token"] and settings.get("add_bos_token", True):
        _prepend(backend, names["bos_token"])
    options = {key: settings[key] for key in ("chat_template", "model_max_length") if settings.get(key)}
    return _fast_tokenizer(backend, {key: name for key, name in names.items() if name}, **{**options, **kwargs})


def _prepend(backend: Tokenizer, bos: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _fast_tokenizer(backend: Tokenizer, names: dict[str, str], **options: Any) -> PreTrainedTokenizerFast:
    if "unk_token" in names:
        names = {"pad_token": names["unk_token"], **names}  # as LLaVA does
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="right", clean_up_tokenization_spaces=False, **{**names, **options}
    )


def corrected_llama(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Correct a tokenizer with LLaMA's vocabulary to SentencePiece's ids.

    Other tokenizers stay. This is for folders with a ``tokenizer.json`` and no ``tokenizer.model``, as transformers 5
    saves them. That file lacks the pieces' scores, so only a vocabulary with known scores can be corrected: LLaMA's
    pieces of several spaces all have the lowest score, and the others are in the order of their ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = loads(backend.to_str()) if backend is not None else {}
    if not _is_llama_vocabulary(description.get("model", {})):
        return tokenizer
    description["model"]["merges"] = _spaces_last(description["model"]["merges"])
    description["model"]["unk_token"] = "<unk>"
    backend = Tokenizer.from_str(json.dumps(description))
    _use_sentencepiece_spaces(backend, add_prefix=True)
    if tokenizer.init_kwargs.get("add_bos_token") is not False:
        _prepend(backend, "<s>")
    names = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return _fast_tokenizer(
        backend,
        {key: str(name) for key, name in names.items() if name is not None},
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
    )


def _is_llama_vocabulary(model: dict[str, Any]) -> bool:
    vocab = model.get("vocab", {})
    if not isinstance(vocab, dict) or len(vocab) < _LLAMA_PIECES:
        return False
    pieces = sorted(vocab, key=vocab.__getitem__)[:_LLAMA_PIECES]
    return hashlib.sha256("\n".join(pieces).encode()).hexdigest() == _LLAMA_SHA256


def _spaces_last(merges: Iterable[Sequence[str]]) -> list[Sequence[str]]:
    """Move merge rules of space runs to the end; see :func:`_merges`."""
    runs, others = [], []
    for rule in merges:
        (runs if set("".join(rule)) == {SPACE} else others).append(rule)
    return others + sorted(runs, key=lambda rule: -len(rule[0]))


def is_convertible(model_file: Path) -> bool:
    """Recognise a SentencePiece BPE model that takes its input as it is."""
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
    """List merge rules in SentencePiece's order of preference.

    SentencePiece joins the neighbours whose *joined piece* has the highest score, the leftmost first among equals. A
    merge list is ranked by position, so every way to split each piece is listed, best pieces first. Pieces made of only
    spaces share one score: there "leftmost first" means that the run on the left keeps growing, so the rules with the
    longer left side come first.
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

    A single ``Metaspace(prepend_scheme="first")`` adds no marker to a text that already begins with a space. So the
    spaces become markers first. Then one step puts a plain space in front of the first section, and another turns that
    space into a marker.
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
    """Read the tokenizer settings in the files next to a ``tokenizer.model``."""
    settings: dict[str, Any] = {}
    added: dict[int, AddedToken] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings.update(read_json_object(folder / name))
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        flags = {key: bool(token.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "special")}
        added[int(index)] = AddedToken(_content(token), normalized=False, **flags)
    if (folder / "added_tokens.json").is_file():
        for token, index in read_json_object(folder / "added_tokens.json").items():
            added.setdefault(int(index), AddedToken(token, normalized=False, special=False))
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = read_text(folder / "chat_template.jinja", CheckpointError)
    settings["added"] = added
    if settings.get("model_max_length", 0) > 10**9:  # transformers' number for "no limit"
        del settings["model_max_length"]
    return settings
