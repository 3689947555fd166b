"""The tower's configuration in LLaVA's own ``config.json``.

So a checkpoint is read as it was trained, also after a change of the preset that ``mm_vision_tower`` names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import read_json_object
from tove_llava.core.json_text import plain
from tove_llava.tower import ToveVisionConfig

RECORD = "tove_vision_config"  # key of LLaVA's config.json
# The used experts and their balance may change between stages; CLIP's source determines its architecture.
_FREE = {"detached_experts", "router_aux_loss_coef", "clip_config"}
_COMPARED = sorted(set(ToveVisionConfig.__annotations__) - _FREE)


def recorded_config(args: Any) -> ToveVisionConfig | None:
    """Return the tower that LLaVA's configuration ``args`` records, or None."""
    record = getattr(args, RECORD, None)
    return ToveVisionConfig.from_dict(dict(record)) if isinstance(record, Mapping) else record


def check_first_stage(adapter: str | None, config: ToveVisionConfig) -> None:
    """Compare the tower with the one recorded next to ``--pretrain_mm_mlp_adapter``, if any.

    Raises:
        CheckpointError: they differ in more than detached experts, or the record is damaged.
    """
    file = None if adapter is None else Path(adapter).with_name("config.json")
    if file is None or not file.is_file():
        return
    record = read_json_object(file).get(RECORD)
    if record is None:
        return
    saved, present = ToveVisionConfig.from_dict(record).to_dict(), config.to_dict()
    differences = [key for key in _COMPARED if plain(saved[key]) != plain(present[key])]
    if differences:
        raise CheckpointError(
            f"{adapter} was trained with another tower than --vision_tower names: they differ in "
            f"{', '.join(differences)}. Name the tower that {file} records, or train stage 1 again"
        )
