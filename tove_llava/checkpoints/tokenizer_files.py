"""Read and write a tokenizer's files, with or without LLaVA's tokens."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tove_llava.checkpoints.parts import LanguagePart, LlavaParts
from tove_llava.checkpoints.tensors import write_json
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.llava import build
from tove_llava.presets import LanguagePreset

# Strings on which conversions of SentencePiece models differ.
PROBES = (
    "a plain sentence, with a comma.",
    " begins with a space",
    "  begins with two",
    "runs   of    spaces     here  ",
    "a line\nand another\n\n  indented\ttab",
    "naïve café, 北京, 😀🏽, ﷽, e\u0301, \u00a0, \u200b",
    "USER: What is it? ASSISTANT: two  cones</s>USER: And? ASSISTANT:",
    "</s> behind a special token",
    "",
    " ",
    "\n",
)

_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "chat_template.jinja", "vocab.json", "merges.txt")  # fmt: skip


def read_tokenizer(language: LanguagePart, folder: Path) -> PreTrainedTokenizerBase:
    """Read a language model's tokenizer from its source or a folder."""
    if language.tensors is None:
        return build.read_tokenizer(LanguagePreset(source=language.source, revision=language.revision))
    return build.read_tokenizer(LanguagePreset(source=f"hf:{folder.absolute()}"))


def legacy_remarks(language: LanguagePart) -> list[str]:
    """Remark where the original would encode a space after ``</s>``."""
    for folder in language.tokenizer_folders:
        file = folder / "tokenizer_config.json"
        settings = read_json_object(file) if file.is_file() else {}
        if (folder / "tokenizer.model").is_file() and settings.get("legacy") is not False:
            return [
                f"{file} does not say legacy: false, so the original puts one token more after each </s> of a "
                "conversation of several turns; here, as for Vicuna-1.5, there is none."
            ]
    return []


def foreign_tokens(parts: LlavaParts) -> list[str]:
    """List the tokens that the original does not have.

    They are the image token and one for padding; none if other tokens follow, which removal would renumber.
    """
    tokenizer, vocabulary = parts.tokenizer, parts.tokenizer.get_vocab()
    if parts.image_token not in vocabulary:
        return []
    names = {parts.image_token, tokenizer.pad_token} - {tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token}
    own = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    names = {name for name in names if name in vocabulary and vocabulary[name] >= own}
    others = max(index for name, index in vocabulary.items() if name not in names)
    return sorted(names) if names and min(vocabulary[name] for name in names) > others else []


def write_tokenizer(parts: LlavaParts, folder: Path, without: Sequence[str] = (), *, portable: bool = False) -> None:
    """Write the language model's tokenizer from the first matching folder.

    Args:
        without: tokens to leave out.
        portable: transformers 4 has to know its class. If it does, and no token goes, the files stay as they are.
    """
    for place in parts.language.tokenizer_folders:
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
            if (place / name).is_file():
                shutil.copyfile(place / name, folder / name)
        if without or (portable and _class_of(folder) == "TokenizersBackend"):
            _leave_out(folder, without)
        if _is_same(folder, parts.tokenizer, set(without)):
            return
    places = ", ".join(str(place) for place in parts.language.tokenizer_folders)
    raise CheckpointError(
        f"{parts.folder}: the language model's own tokenizer is not there any more (looked in {places})"
    )


def add_sentencepiece(parts: LlavaParts, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Add the language model's ``tokenizer.model``, as published folders have it.

    Args:
        tokenizer: the one in ``folder``; tokens that the SentencePiece model lacks go to ``added_tokens.json``.
    """
    file = next(
        (p / "tokenizer.model" for p in parts.language.tokenizer_folders if (p / "tokenizer.model").is_file()), None
    )
    if file is None:
        return
    shutil.copyfile(file, folder / file.name)
    own = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    added = {name: index for name, index in tokenizer.get_vocab().items() if index >= own}
    write_json(folder / "added_tokens.json", dict(sorted(added.items(), key=lambda item: item[1])))
    if not _is_same(folder, tokenizer, set()):  # another model's file
        (folder / file.name).unlink()
        (folder / "added_tokens.json").unlink()


def _is_same(folder: Path, tokenizer: PreTrainedTokenizerBase, without: set[str]) -> bool:
    """Return whether the tokenizer in ``folder`` gives the ids of ``tokenizer``."""
    try:
        found = build.read_tokenizer(LanguagePreset(source=f"hf:{folder.absolute()}"))
    except (CheckpointError, ConfigError):
        return False
    vocabulary = {name: index for name, index in tokenizer.get_vocab().items() if name not in without}
    if {name: index for name, index in found.get_vocab().items() if name not in without} != vocabulary:
        return False
    return all(found(text).input_ids == tokenizer(text).input_ids for text in PROBES)


def _class_of(folder: Path) -> Any:
    file = folder / "tokenizer_config.json"
    return read_json_object(file).get("tokenizer_class") if file.is_file() else None


def _leave_out(folder: Path, names: Sequence[str]) -> None:
    """Remove tokens from a tokenizer's files, and name a class known everywhere."""
    gone = set(names)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # LLaVA's, not the language model's
    if (folder / "tokenizer.json").is_file():
        data = read_json_object(folder / "tokenizer.json")
        data["added_tokens"] = [token for token in data.get("added_tokens", []) if token["content"] not in gone]
        write_json(folder / "tokenizer.json", data)
    if (folder / "added_tokens.json").is_file():
        added = read_json_object(folder / "added_tokens.json")
        kept = {name: index for name, index in added.items() if name not in gone}
        (folder / "added_tokens.json").unlink()
        if kept:
            write_json(folder / "added_tokens.json", kept)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            write_json(folder / name, _settings(read_json_object(folder / name), gone))
    file = folder / "tokenizer_config.json"
    settings = read_json_object(file) if file.is_file() else {}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right"}
    if (folder / "tokenizer.model").is_file():
        settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}  # the kind whose ids equal those used here
    write_json(file, settings)


def _settings(data: dict[str, Any], gone: set[str]) -> dict[str, Any]:
    """Return settings without some tokens."""

    def content(token: Any) -> Any:
        return token.get("content") if isinstance(token, dict) else token

    kept: dict[str, Any] = {}
    for key, value in data.items():
        if key == "added_tokens_decoder":
            kept[key] = {index: token for index, token in value.items() if content(token) not in gone}
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            listed = value.values() if isinstance(value, dict) else value or []
            kept["additional_special_tokens"] = [token for token in listed if content(token) not in gone]
        elif key not in ("processor_class", "backend", "is_local", "local_files_only") and (
            not isinstance(value, str | dict) or content(value) not in gone
        ):
            kept[key] = value
    return kept
