"""Keep the record by which a finished or interrupted run is recognised."""

import json
import os
from pathlib import Path
from typing import Any

from tove_llava.checkpoints.manifest import MANIFEST, Manifest
from tove_llava.core.errors import CheckpointError
from tove_llava.core.files import read_json_object, write_atomically
from tove_llava.core.json_text import plain
from tove_llava.core.plugins import file_plugins
from tove_llava.data.data_paths import described
from tove_llava.train.run_files import RUN_RECORD, complete
from tove_llava.train.run_settings import Settings

# Lines of a model card about a stage: name there -> key of the run's record.
_CARD_LINES = {
    "trains": "settings.train",
    "template": "settings.template",
    "pictures": "settings.image_aspect_ratio",
    "epochs": "arguments.num_train_epochs",
    "steps at most": "arguments.max_steps",
    "learning rate": "arguments.learning_rate",
    "learning rate, projector": "settings.projector_learning_rate",
    "learning rate, tower": "settings.tower_learning_rate",
    "schedule": "arguments.lr_scheduler_type",
    "warm-up": "arguments.warmup_steps",
    "weight decay": "arguments.weight_decay",
    "batch per process": "arguments.per_device_train_batch_size",
    "gradient accumulation": "arguments.gradient_accumulation_steps",
    "processes": "world_size",
    "DeepSpeed": "deepspeed",
    "LoRA rank": "settings.lora.r",
    "LoRA alpha": "settings.lora.alpha",
    "balance loss": "vision.router_aux_loss_coef",
    "seed": "arguments.seed",
}


def run_record(settings: Settings) -> dict[str, Any]:
    """Return the settings and surroundings that decide the outcome of a run."""
    record = settings.record()
    record["deepspeed"] = Path(settings.deepspeed_file() or "none").stem
    record["world_size"] = int(os.environ.get("WORLD_SIZE", "1"))
    record["plugins"] = {plugin.name: plugin.version for plugin in file_plugins()} or None
    if settings.pretrained is not None:
        record["pretrained_fingerprint"] = Manifest.read(settings.pretrained).fingerprint
    return record


def write_record(output_dir: Path, record: dict[str, Any]) -> None:
    """Write the record into a run's folder."""
    write_atomically(output_dir / RUN_RECORD, json.dumps(record, indent=2) + "\n")


def is_finished(output_dir: Path, record: dict[str, Any]) -> bool:
    """Return True if a folder holds the finished run of these settings.

    Raises:
        CheckpointError: it holds a run of other settings; the message names the keys that differ.
    """
    file = output_dir / RUN_RECORD
    finished, begun = (output_dir / MANIFEST).is_file(), bool(complete(output_dir))
    if not file.is_file():
        if finished or begun:
            raise CheckpointError(f"{output_dir} holds a model but no {RUN_RECORD}; choose another --output_dir")
        return False
    old = read_json_object(file)
    new = plain(record)
    if finished or not begun:  # nothing to resume: the number of processes is free
        old, new = ({k: v for k, v in r.items() if k != "world_size"} for r in (old, new))
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))  # a new setting's None is no change
    if keys and (finished or begun):
        shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in keys)
        raise CheckpointError(
            f"{output_dir} holds a run with other settings ({shown}). Choose another --output_dir, remove that folder, "
            "or give the settings it was started with"
        )
    return finished


def stage_history(settings: Settings, records: int, chat_template: str = "") -> list[dict[str, Any]]:
    """Return data and recipe of the stages so far, without local paths.

    Args:
        chat_template: the form in which the tokenizer's own template was used, if it was.
    """
    record = run_record(settings)
    earlier = Manifest.read(settings.pretrained).history if settings.pretrained is not None else []
    lines = {name: record[key] for name, key in _CARD_LINES.items() if record.get(key) is not None}
    lines |= {"chat template": chat_template} if chat_template else {}
    data = described(settings.data_path, whole=False)
    return [*earlier, {"stage": settings.stage_name, "data": data, "records": records, **lines}]
