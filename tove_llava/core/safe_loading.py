"""Load what transformers reads: no code of a checkpoint runs, and none of its files lies outside."""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, dynamic_module_utils
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from tove_llava.core.errors import CheckpointError, ConfigError, ToveError
from tove_llava.core.finite import check_finite
from tove_llava.core.hub_access import asking, silence
from tove_llava.core.model_sizes import check_sizes, read_model_config, stored_shapes
from tove_llava.core.paths import refuse_pickles
from tove_llava.core.sources import Source

_CODE = re.compile("trust_remote_code|requires you to execute")  # transformers' refusals of a repository's code


def from_pretrained(
    kind: Any, place: Source | str | os.PathLike[str] | None, what: str, advice: str = "", **options: Any
) -> Any:
    """Call a class's ``from_pretrained`` without running code of the place.

    Args:
        kind: a class of transformers, of peft or of this package.
        place: a source, folder or repository; None if ``options`` hold the weights.
        what: subject of the error, such as "the language model".
        advice: its end; what to do about missing or damaged files.
        options: arguments of ``from_pretrained``.

    Raises:
        CheckpointError: the place is missing, damaged, brings code, or names files outside it.
    """
    where: dict[str, Any] = {"pretrained_model_name_or_path": place}
    if isinstance(place, Source):
        where = place.pretrained()
    name = where["pretrained_model_name_or_path"]
    ours = kind.__module__.startswith("tove_llava")  # reads its folder in its own way
    if name is not None and os.path.isdir(name):
        read_model_config(Path(name))
        if isinstance(options.get("config"), PreTrainedConfig):
            check_sizes(options["config"].to_dict(), stored_shapes(Path(name)), name)
        if "gguf_file" not in where and issubclass(kind, (PreTrainedModel, _BaseAutoModelClass)) and not ours:
            _check_weights(Path(name))
            options["use_safetensors"] = True
    with loading(what, place, advice), asking(None if name is None or os.path.exists(name) else os.fspath(name)):
        loaded = kind.from_pretrained(**where, trust_remote_code=False, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    _forget_code(model)
    if isinstance(model, PreTrainedModel) and not ours:
        check_finite(model.named_parameters(), name or what)
    return loaded


@contextmanager
def loading(what: str, place: object, advice: str = "") -> Iterator[None]:
    """Turn every error of a library that reads a place into a CheckpointError."""
    try:
        with no_questions():
            yield
    except ConfigError as error:
        if place is None or str(place) in str(error):
            raise
        raise ConfigError(f"{place}: {error}") from error
    except (ToveError, torch.OutOfMemoryError):  # a full GPU is no damaged file
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        raise CheckpointError(f"{what} cannot be loaded from {place}: {_reason(error, place, advice)}") from error


@contextmanager
def no_questions() -> Iterator[None]:
    """Let transformers refuse code where it would ask on the terminal."""
    patience = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = patience


def _check_weights(folder: Path) -> None:
    refuse_pickles(folder)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds adapters and not their model; merge them into it, and name the result")


def _forget_code(loaded: Any) -> None:
    """Remove the names of code from a configuration, a model's, and those in it."""
    config = loaded if isinstance(loaded, PreTrainedConfig) else getattr(loaded, "config", None)
    if isinstance(config, PreTrainedConfig):
        config.__dict__.pop("auto_map", None)
        for part in config.sub_configs:
            _forget_code(getattr(config, part, None))


def _reason(error: BaseException, place: object, advice: str) -> str:
    """Explain a library's error, and say what to do."""
    if _CODE.search(str(error)):
        return (
            "it comes with code of its own, and no code of a checkpoint is run; take a model whose architecture "
            "transformers has itself"
        )
    chain: BaseException | None = error
    while chain is not None:  # a library may wrap torch's refusal
        if isinstance(chain, pickle.UnpicklingError):
            return (
                "a damaged file or a pickle of more than plain tensors, which is not opened: it could run code. "
                "Convert it to safetensors"
            )
        chain = chain.__cause__ or chain.__context__
    path = place.path if isinstance(place, Source) else Path(str(place))
    if path is not None and path.exists():
        return f"{summary(error)}. {advice or 'Its files are damaged, incomplete or of another architecture'}"
    why = silence() or summary(error)
    return f"{why}. {advice or 'Fetch it where there is a network, or name a local folder'}"


def summary(error: BaseException) -> str:
    """Return the first lines of an error's message."""
    lines = str(error).split("\n")[:3]  # torch names the first missing tensors on lines two and three
    return " ".join(line.strip() for line in lines).strip(" .") or type(error).__name__
