"""A training step on records like LLaVA-1.5's, against the original recipe.

Both train the same model, with the same optimiser, on the same micro-batches, in turn (step_paths.py).

- ours: sequences in one row, logits only at supervised positions, selective checkpointing (a GPU) or none (a CPU),
  fused kernels where they can run, and the tower's encoders side by side (a GPU).
- the original recipe: rows padded to the longest, all logits, in float32 in the loss, every layer computed once more
  in the backward pass, encoders one after another. A restatement of LLaVA-1.5's settings on this model.
- LLaVA's own code (step_llava.py), where LLAVA_SRC names its folder, on the same micro-batches after the others.

Micro-batches are what one of 8 devices gets from LLaVA's sampler, which groups records by modality and length. Their
lengths come from a committed table (mix_lengths.py), or with --tokenizer from records that are made and tokenised here.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Bench, target
from llava_mix import write_mix
from measuring import GB, Samples, held_memory, measure, peak_memory, ratio
from mix_lengths import DrawnMix, Length, read_lengths
from step_flops import RecordFlops, record_flops
from step_llava import LlavaStep, is_there
from step_parts import SharedModel, TrainingStep, utilisation_of
from step_paths import MEMORY_GB, FastPath, original_recipe

from tove_llava.core.errors import ConfigError
from tove_llava.core.text import markdown_table
from tove_llava.data import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    ImageTransform,
    LengthGroupedSampler,
    LlavaCollator,
    LlavaDataset,
    load_tokenizer,
)
from tove_llava.llava import ToveLlavaForConditionalGeneration
from tove_llava.llava.quantization import quantize, set_compute_dtype
from tove_llava.train.recomputation import FULL

DEVICES, PICTURES = 8, 16
STAGE, QUANTISED = "finetune_lora", "finetune_qlora"
FASTER, MFU, LORA_GB, QLORA_GB = 2.0, 0.45, MEMORY_GB, 20.0  # targets
LORA_BATCH, QLORA_BATCH = 16, 4
QLORA_GIB = 5.0  # for the layers' activations, of 20 GB (docs/reference/memory.md)
OURS, ORIGINAL = "ours", "original"
TITLES = {OURS: "ours", ORIGINAL: "the original recipe, restated"}
LORA_MEMORY, QLORA_MEMORY = "memory of LoRA", "memory of QLoRA"  # parts, besides the mix itself
MIX, LLAVA = "the mix", "LLaVA's own step"


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
    """Make ``count`` micro-batches of ``size`` records from different parts of the epoch."""
    with _mix(bench, model, size * DEVICES * (count + 2)) as records:
        order = list(LengthGroupedSampler(records.modality_lengths, size, DEVICES, seed=bench.args.seed))
        starts = range(0, count * size * DEVICES, size * DEVICES)
        return [_micro_batch(bench, model, [records[i] for i in order[start : start + size]]) for start in starts]


def longest_batch(bench: Bench, model: ToveLlavaForConditionalGeneration, size: int, longest: int) -> MicroBatch:
    """Make the largest micro-batch: full-length records, all text supervised."""
    record = Length(words=longest, tokens=longest, supervised=longest, picture=True)
    records = _drawn(model, [record] * size, longest)
    return _micro_batch(bench, model, [records[i] for i in range(size)])


def check_mix(bench: Bench) -> None:
    """Raise ConfigError for impossible flags, before anything is built."""
    for flag in ("mix_batches", "mix_repeats"):
        if getattr(bench.args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(bench.args, flag)}")
    if bench.args.tokenizer is not None:
        load_tokenizer(bench.args.tokenizer)
    bench.preset.stage(STAGE)


@contextmanager
def _mix(bench: Bench, model: ToveLlavaForConditionalGeneration, count: int) -> Iterator[Any]:
    """Return ``count`` records, as the training data set gives them."""
    stage, vision, seed = bench.preset.stage(STAGE), model.config.vision_config, bench.args.seed
    if bench.args.tokenizer is None:
        yield _drawn(model, read_lengths().draw(count, seed), stage.model_max_length)
        return
    transform = ImageTransform(vision.image_size, "pad", mean=vision.image_mean, std=vision.image_std)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "mix"
        file = write_mix(root, count, pictures=PICTURES, seed=seed)
        tokenizer = load_tokenizer(bench.args.tokenizer)
        yield LlavaDataset(
            file, root / "images", tokenizer, "v1", transform, vision.num_image_tokens, stage.model_max_length
        )


def _drawn(model: ToveLlavaForConditionalGeneration, lengths: list[Length], longest: int) -> DrawnMix:
    vision = model.config.vision_config
    return DrawnMix(lengths, _words(model), vision.image_size, vision.num_image_tokens, longest)


def _words(model: ToveLlavaForConditionalGeneration) -> int:
    return min(model.config.image_token_index, model.config.text_config.vocab_size)


def _micro_batch(bench: Bench, model: ToveLlavaForConditionalGeneration, examples: list[Any]) -> MicroBatch:
    examples = [_fold(example, model) for example in examples]
    tokens = model.config.vision_config.num_image_tokens
    collators = (LlavaCollator(0, model.config.image_token_index, tokens, packed=packed) for packed in (True, False))
    packed, padded = (_to(collate(examples), bench) for collate in collators)
    del padded["supervised"]  # the original computes all logits
    lengths = packed["cu_seq_lens_q"].diff().tolist()
    supervised = [int((row[1:] != IGNORE_INDEX).sum()) for row in padded["labels"]]
    return MicroBatch(packed, padded, lengths, supervised, [x["pixel_values"] is not None for x in examples])


def _fold(example: Any, model: ToveLlavaForConditionalGeneration) -> Any:
    """Bring ids into the model's vocabulary; only the loss changes."""
    for key, special in (("input_ids", IMAGE_TOKEN_INDEX), ("labels", IGNORE_INDEX)):
        ids = example[key]
        example[key] = torch.where(ids == special, ids, ids % _words(model))
    return example


def _to(batch: dict[str, Any], bench: Bench) -> dict[str, Any]:
    moved = {k: v.to(bench.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    if "pixel_values" in moved:
        moved["pixel_values"] = moved["pixel_values"].to(bench.dtype)
    return moved


class Contenders:
    """Two ways to step the same model; :meth:`prepare` chooses one."""

    def __init__(self, bench: Bench, step: TrainingStep, batches: list[MicroBatch], stage: str = STAGE) -> None:
        self.bench, self.step, self.batches = bench, step, batches
        self.fast = FastPath(bench, step, bench.preset.stage(stage))
        self._stack, self._now = ExitStack(), ""

    def prepare(self, name: str) -> None:
        """Set the model to a contender before the clock starts."""
        if name == self._now:
            return
        self.close()
        self._stack.enter_context(self.fast.on(self._pictures()) if name == OURS else original_recipe(self.step))
        self._now = name

    def close(self) -> None:
        """Restore the model."""
        self._stack.close()
        self._now = ""

    def run(self, name: str, batches: list[MicroBatch] | None = None) -> None:
        """Take one optimiser step on each micro-batch."""
        for batch in self.batches if batches is None else batches:
            self.step(batch.packed if name == OURS else batch.padded)

    def fit_budget(self) -> None:
        """Fit the budget; see :meth:`FastPath.fit_budget`."""
        self.fast.fit_budget(self.batches[0].padded, self._pictures())

    def _pictures(self) -> list[torch.Tensor]:
        return [batch.packed["pixel_values"] for batch in self.batches if any(batch.pictures)]

    def longest(self) -> MicroBatch:
        return max(self.batches, key=lambda batch: batch.padded_positions)


def measure_mix(bench: Bench, shared: SharedModel, record: dict[str, Any]) -> dict[str, Any]:
    """Measure samples per second, memory and utilisation of both."""
    args, stage = bench.args, bench.preset.stage(STAGE)
    size = args.batch or stage.arguments.get("per_device_train_batch_size", 8)
    with shared.step(stage) as step:
        batches = micro_batches(bench, step.model, size, args.mix_batches)
        flops = record_flops(step)
        both = Contenders(bench, step, batches)
        try:
            both.fit_budget()
            lost: dict[str, str] = {}
            samples = measure(
                {name: lambda name=name: both.run(name) for name in TITLES},  # type: ignore[misc]
                repeats=args.mix_repeats,
                warmup=1,
                device=bench.device,
                prepare=both.prepare,
                lost=lost,
                is_over=bench.is_over,
            )
            record["not_measured"] |= {f"{MIX}: {TITLES[name]}": reason for name, reason in lost.items()}
            needed = sum(_needed(flops, batch) for batch in batches)
            rows = {name: _row(bench, both, name, found, needed, size) for name, found in samples.items()}
            full = bench.attempt(record, LORA_MEMORY, lambda: _full_length(bench, both, size, stage.model_max_length))
        finally:
            both.close()
        bench.free()
        llava = None
        if is_there():
            llava = bench.attempt(record, LLAVA, lambda: _llava(bench, step.model, batches, samples.get(OURS)))
        return {
            "records": "LLaVA-1.5's mix (llava_mix.py)",
            "lengths": read_lengths().tokenizer if args.tokenizer is None else Path(args.tokenizer).name,
            "batch": size,
            "micro_batches": len(batches),
            "image_tokens": step.model.config.vision_config.num_image_tokens,
            "mean_length": sum(map(sum, (b.lengths for b in batches))) / (size * len(batches)),
            "longest": max(max(b.lengths) for b in batches),
            "original": "restated",
            "fused_kernels": both.fast.kernels,
            "execution": {OURS: both.fast.execution, ORIGINAL: "eager", "fallback": both.fast.fallback},
            "checkpointing": {OURS: both.fast.kind, ORIGINAL: FULL},
            "checkpointing_gib": both.fast.budget,
            "needed_tflop": needed / 1e12,
            "contenders": rows,
            "full_length": full,
            "llava": llava,
            "ratio": None if lost else ratio(samples[ORIGINAL], samples[OURS]),
        }


def _llava(
    bench: Bench, model: ToveLlavaForConditionalGeneration, batches: list[MicroBatch], ours: Samples | None
) -> dict[str, Any]:
    """Measure LLaVA's own code on the same micro-batches."""
    pictured = model.config.vision_config.num_image_tokens
    rows = []
    for batch in batches:
        records = zip(batch.lengths, batch.supervised, batch.pictures, strict=True)
        rows.append([(length - pictured * picture, scored, picture) for length, scored, picture in records])
    child = LlavaStep(bench, model, bench.preset.stage(STAGE), rows)
    try:
        samples, peak = child.measure(bench.args.mix_repeats, bench.is_over)
    finally:
        child.close()
    return {
        **child.made,
        **samples.to_dict(),
        "samples_per_second": sum(map(len, rows)) / samples.median,
        "peak_bytes": peak,
        "over_ours": None if ours is None else samples.median / ours.median,
    }


def _full_length(bench: Bench, both: Contenders, size: int, longest: int) -> dict[str, Any]:
    """Measure our peak memory on a micro-batch of full-length records."""
    batch = longest_batch(bench, both.step.model, size, longest)
    both.prepare(OURS)
    both.run(OURS, [batch])  # what grows once has grown
    resident = _resident(bench, both.step)
    above = peak_memory(lambda: both.run(OURS, [batch]), bench.device)
    return {"batch": size, "positions": sum(batch.lengths), "peak_bytes": resident + above}


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
        return held_memory(bench.device)
    return step.resident_bytes()


def measure_qlora(bench: Bench, shared: SharedModel) -> dict[str, Any]:
    """Measure a QLoRA step's peak memory; the model is consumed."""
    stage = bench.preset.stage(QUANTISED)
    model = shared.take()
    quantize(model, stage.quantization, compute_dtype=bench.dtype, device=bench.device)
    set_compute_dtype(model, bench.dtype)
    step = TrainingStep(model, stage, bench.dtype)
    batch = longest_batch(bench, model, QLORA_BATCH, stage.model_max_length)
    both = Contenders(bench, step, [batch], QUANTISED)
    both.fast.budget = QLORA_GIB
    try:
        found = _full_length(bench, both, QLORA_BATCH, stage.model_max_length)
    finally:
        both.close()
    return {**found, "checkpointing_gib": QLORA_GIB}


def mix_targets(
    bench: Bench, mix: dict[str, Any] | None, qlora: dict[str, Any] | None, lost: dict[str, str]
) -> list[dict[str, Any]]:
    """List targets with values, or None and this run's reason."""
    on_gpu, name, found = bench.device.type == "cuda", bench.preset.name, mix or {"contenders": {}}
    ours, full, compared = found["contenders"].get(OURS), found.get("full_length"), found.get("ratio")
    lora = full["peak_bytes"] / GB if on_gpu and full and full["batch"] == LORA_BATCH else None
    llava = found.get("llava")
    broken = next((reason for part, reason in lost.items() if part.startswith(MIX)), None)
    mfu = ours["mfu"] if on_gpu and ours else None
    tried = broken if on_gpu else None
    return [
        target(
            f"samples/s over the original recipe's, {name}, LLaVA-1.5's mix",
            llava["over_ours"] if llava else compared and compared["value"], FASTER, reason=broken,
        ),
        target(f"MFU of stage 2, {name}, LLaVA-1.5's mix", mfu, MFU, reason=tried),
        target(
            f"peak memory of LoRA at micro-batch {LORA_BATCH}, GB", lora, LORA_GB, at_least=False,
            reason=lost.get(LORA_MEMORY, tried),
        ),
        target(
            f"peak memory of QLoRA at micro-batch {QLORA_BATCH}, GB", qlora and qlora["peak_bytes"] / GB, QLORA_GB,
            at_least=False, reason=lost.get(QLORA_MEMORY),
        ),
    ]  # fmt: skip


def render_mix(mix: dict[str, Any], qlora: dict[str, Any] | None) -> str:
    """Write the page's section."""
    rows = [
        [
            TITLES[name],
            f"{row['samples_per_second']:.4g}",
            f"{row['positions']} ({row['positions_that_are_padding'] / row['positions']:.0%} padding)",
            f"{row['achieved_tflops']:.3g}",
            "no published peak" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['memory']['peak_bytes'] / GB:.3g}",
        ]
        for name, row in mix["contenders"].items()
    ]
    found, full, execution = mix["ratio"], mix["full_length"], mix["execution"]
    kernels = "fused kernels" if mix["fused_kernels"] else "no fused kernels (they need CUDA and liger-kernel)"
    limit = "" if mix["checkpointing_gib"] is None else f" within {mix['checkpointing_gib']} GiB"
    fallback = "" if execution["fallback"] is None else f" ({execution['fallback']})"
    parts = [
        "## Stage 2 on LLaVA-1.5's mix",
        f"{mix['micro_batches']} micro-batches of {mix['batch']} records, their lengths by the tokenizer "
        f"{mix['lengths']}: {mix['image_tokens']} positions a picture, {mix['mean_length']:.0f} a record on average, "
        f"{mix['longest']} the longest. Ours: one row without padding, logits at supervised positions, checkpointing "
        f"{mix['checkpointing'][OURS]}{limit}, {kernels}, tower {execution[OURS]}{fallback}. The original recipe: "
        "padded rows, all logits, every layer computed twice, tower eager.",
        markdown_table(["", "samples/s", "positions", "needed TFLOP/s", "MFU", "peak memory GB"], rows),
    ]
    if found is not None:
        parts.append(
            f"Ours takes **{found['value']:.2f} times** as many samples a second (quartiles {found['paired_q1']:.2f} "
            f"to {found['paired_q3']:.2f} repeat by repeat; processor time {found['cpu_time']:.2f})."
        )
    if mix["llava"] is not None:
        row = mix["llava"]
        memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / GB:.3g} GB at most"
        over = "" if row["over_ours"] is None else f": ours takes **{row['over_ours']:.2f} times** as many"
        parts.append(
            f"LLaVA's own code ({row['versions']}; CLIP alone, no experts) on the same micro-batches takes "
            f"{row['samples_per_second']:.4g} samples a second{memory}{over}."
        )
    for name, row in (("LoRA", full), ("QLoRA", qlora)):
        if row is not None:
            parts.append(
                f"{name} with {row['batch']} records of full length, {row['positions']} positions and all text "
                f"supervised: {row['peak_bytes'] / GB:.3g} GB at most."
            )
    return "\n\n".join(parts)
