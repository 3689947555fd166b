"""Say for each of transformers' ``TrainingArguments`` whether a run honours, fixes or refuses it.

An argument that is in none of the three tables is refused too, until someone has looked at it.
"""

import copy
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import get_scheduler

from tove_llava.core.errors import ConfigError
from tove_llava.core.registry import closest

_HONOURED = """
output_dir per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps
learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay
adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha
bf16 fp16 tf32 gradient_checkpointing activation_checkpointing enable_jit_checkpoint use_cpu
torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica
include_num_input_tokens_seen skip_memory_metrics disable_tqdm
report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
save_strategy save_steps save_total_limit save_on_each_node ignore_data_skip
seed data_seed full_determinism
dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
deepspeed
"""
HONOURED = frozenset(_HONOURED.split())

FIXED: dict[str, tuple[Any, str]] = {
    "do_train": (True, "this command trains"),
    "average_tokens_across_devices": (True, "the loss is a mean over the tokens of all processes"),
    "logging_nan_inf_filter": (False, "a loss that is not finite ends the run"),
    "remove_unused_columns": (False, "records hold no columns"),
}

_VALIDATION = "the loss on held-out records is measured without it (--eval_data_path)"
_BEST = "OUTPUT_DIR/best holds the model with the lowest held-out loss (--eval_data_path, --keep_best)"
_HUB = "nothing is uploaded during training; upload the finished folder: hf upload OWNER/NAME OUTPUT_DIR"
_FSDP = "ZeRO-3 does this: --deepspeed zero3"
REFUSED = {
    "resume_from_checkpoint": "the same command resumes from the newest checkpoint in --output_dir",
    "label_smoothing_factor": "the loss is the cross-entropy of the tokens",
    "optim_target_modules": "optimizers of projected gradients are not supported",
    "use_cache": "training keeps no cache of keys and values",
    "use_liger_kernel": "liger does not know this model; give --fused_kernels True",
    "liger_kernel_config": "give --fused_kernels True",
    "gradient_checkpointing_kwargs": "--checkpointing names the kind",
    "activation_checkpointing_kwargs": "--checkpointing names the kind",
    "auto_find_batch_size": "a smaller batch changes the result; give --per_device_train_batch_size and "
    "--gradient_accumulation_steps",
    "accelerator_config": "batches and their copies are this trainer's",
    "parallelism_config": "processes share the records only",
    "train_sampling_strategy": "the order is random; --group_by_modality_length True groups records by length",
    "length_column_name": "--group_by_modality_length True takes the lengths of the records",
    "label_names": "a record has one kind of label",
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "debug": "a loss that is not finite is reported with its records",
    "do_eval": "--eval_data_path FILE measures the loss on held-out records",
    "do_predict": "tove-llava eval answers questions",
    "bf16_full_eval": _VALIDATION,
    "fp16_full_eval": _VALIDATION,
    "prediction_loss_only": _VALIDATION,
    "eval_do_concat_batches": _VALIDATION,
    "eval_use_gather_object": _VALIDATION,
    "eval_accumulation_steps": _VALIDATION,
    "include_for_metrics": _VALIDATION,
    "batch_eval_metrics": _VALIDATION,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "save_only_model": "a checkpoint to resume from needs the optimizer; --save_strategy no writes the model only",
    "restore_callback_states_from_checkpoint": "no callback of this trainer has a state",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "local_rank": "the launcher sets LOCAL_RANK",
}

_POSITIVE = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")
_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "torch_empty_cache_steps",
    "ddp_bucket_cap_mb",
    "ddp_timeout",
)
_FROM_ZERO = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "adam_epsilon",
    "neftune_noise_alpha",
    "eval_delay",
    "save_total_limit",
)
# Arguments that have an effect only beside a value of another one.
_STRATEGIES = {"save_steps": "save_strategy", "logging_steps": "logging_strategy", "eval_steps": "eval_strategy"}
_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")


def check_arguments(arguments: Mapping[str, Any], flags: Collection[str]) -> None:
    """Refuse arguments without an effect, and values that cannot be.

    Args:
        arguments: those that a preset or a flag gives.
        flags: names of those that a flag gives.

    Raises:
        ConfigError: an argument is refused, or its value is.
    """
    defaults = argument_defaults()
    for key, value in arguments.items():
        if key in HONOURED:
            continue
        if key in FIXED:
            right, why = FIXED[key]
            if value != right:
                raise ConfigError(f"--{key} {value}: {why}; leave the flag out")
        elif value != defaults[key] and (value or defaults[key]) and not _launchers(key, value):
            why = REFUSED.get(key, "this version of tove_llava does not know the flag")
            raise ConfigError(f"--{key} is not supported: {why}")
    _check_numbers(arguments)
    _check_reports(arguments.get("report_to"))
    _check_others(arguments, flags)


def argument_defaults() -> dict[str, Any]:
    """Return the arguments that this version of transformers has, with their defaults."""
    return {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(TrainingArguments)
        if f.init
    }


def _launchers(key: str, value: Any) -> bool:
    """Return True for the number that a launcher gives its process."""
    return key == "local_rank" and str(value) == os.environ.get("LOCAL_RANK")


def _check_numbers(arguments: Mapping[str, Any]) -> None:
    """Refuse numbers with which torch or transformers fail later, or train nothing."""
    given = {key: value for key, value in arguments.items() if value is not None}
    steps = given.get("max_steps", -1)
    rules = {
        "at least 1": [key for key in _COUNTS if key in given and given[key] < 1],
        "a number above 0": [key for key in _POSITIVE if key in given and not 0 < given[key] < math.inf],
        "a number from 0": [key for key in _FROM_ZERO if key in given and not 0 <= given[key] < math.inf],
        "from 0 to below 1": [key for key in ("adam_beta1", "adam_beta2") if not 0 <= given.get(key, 0) < 1],
        "from 0 to 4294967295": [key for key in ("seed", "data_seed") if not 0 <= given.get(key, 0) < 2**32],
        "at least 1 (or -1, for epochs)": ["max_steps"] if steps < 1 and steps != -1 else [],
    }
    for rule, keys in rules.items():
        for key in keys:
            raise ConfigError(f"--{key} must be {rule}, not {given[key]}")


def _check_reports(report_to: str | Sequence[str] | None) -> None:
    available = [*get_available_reporting_integrations(), "flyte", "all", "none"]  # flyte checks itself
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name not in INTEGRATION_TO_CALLBACK and name not in available:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise ConfigError(
                f"--report_to {name}: unknown.{closest(name, known)} Known: {', '.join(known)}, all, none"
            )
        if name not in available:
            raise ConfigError(f"--report_to {name}: the package is not installed (pip install {name})")


def _check_others(arguments: Mapping[str, Any], flags: Collection[str]) -> None:
    """Refuse flags whose effect another argument takes away."""
    for key, strategy in _STRATEGIES.items():
        chosen = arguments.get(strategy)
        if key in flags and chosen not in (None, "steps"):
            raise ConfigError(f"--{key} has no effect with {strategy} {chosen}; give --{strategy} steps")
    if arguments.get("save_strategy") == "best":
        raise ConfigError(f"--save_strategy best: {_BEST}; checkpoints to resume from are saved by steps or epoch")
    reports = arguments.get("report_to") or []
    for key in _TRACKIO:
        if key in flags and "trackio" not in reports and "all" not in reports:
            raise ConfigError(f"--{key} needs --report_to trackio")


class UnplacedArguments(TrainingArguments):
    """Training arguments that start neither communication nor DeepSpeed."""

    device = torch.device("cpu")


def check_parts(args: TrainingArguments) -> None:
    """Refuse an optimizer, a schedule or a data loader that cannot be made.

    Each is made once, of one number, by the library that makes it later.

    Raises:
        ConfigError: one of them cannot be made, or an argument does not reach it.
    """
    optim = args.optim.value
    with _refused(f"--optim {optim}" + (f", --optim_args {args.optim_args}" if args.optim_args else "")):
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = cls([torch.nn.Parameter(torch.zeros(1))], **options)
    for key in ("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"):
        plain = copy.copy(args)
        setattr(plain, key, argument_defaults()[key])
        if getattr(args, key) != getattr(plain, key) and Trainer.get_optimizer_cls_and_kwargs(plain) == (cls, options):
            raise ConfigError(f"--{key} has no effect with --optim {optim}; leave it out")
    schedule, own = args.lr_scheduler_type.value, args.lr_scheduler_kwargs
    if own and schedule in ("constant", "constant_with_warmup"):
        raise ConfigError(f"--lr_scheduler_kwargs has no effect with --lr_scheduler_type {schedule}; leave it out")
    with _refused(f"--lr_scheduler_type {schedule}, --lr_scheduler_kwargs {own}"):
        get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=10, scheduler_specific_kwargs=own)
    with _refused("--dataloader_... flags"):
        DataLoader(
            [0],  # type: ignore[arg-type]
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )


@contextmanager
def _refused(flag: str) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{flag}: {error}") from error
