"""A model on paper of LLaVA-1.5's step on many GPUs.

It gives a step's seconds and memory on 1, 8 and 64 GPUs under ZeRO-2 and ZeRO-3; it measures nothing. One GPU's share
of its peak is from benchmarks/results (train_step-<preset>-cuda.json), or else assumed, as the tables say.

    python benchmarks/scaling_model.py            # the tables of docs/background/scaling.md
    python benchmarks/scaling_model.py --write    # puts them there
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common import RESULTS
from llava_mix import MIX
from step_parts import PEAK_TFLOPS
from work import Work

from tove_llava.core.text import GIB, markdown_table
from tove_llava.presets import Preset, load_preset
from tove_llava.train.memory import Run, largest_batch, training_memory
from tove_llava.train.shapes import Shape, stage_shape

PAGE = Path(__file__).resolve().parents[1] / "docs" / "background" / "scaling.md"
BEGIN, END = "<!-- begin: python benchmarks/scaling_model.py --write -->", "<!-- end -->"
PRESETS = ("vicuna-7b", "vicuna-13b")
STAGES = ("pretrain", "finetune_lora", "finetune")
LEVELS = ("zero2", "zero3")

# -- assumptions ------------------------------------------------------------------------------------------------------

DEVICE = "NVIDIA H100 80GB HBM3"
MEMORY = 81_559 * 2**20  # bytes
SHARE = 0.45  # of the peak
NODE = 8  # GPUs
NVLINK, ADAPTER = 450e9, 50e9  # bytes/s sent
ACHIEVED = 0.8
HOP = 3e-6  # seconds
OVERLAP = 0.8
GATHER_BUCKET = 500_000_000  # numbers
CAPTION, LONGEST_CAPTION = 32, 128  # tokens
TOKENS_PER_WORD, SYSTEM_PROMPT, TURN = 1.3, 45, 10


@dataclass(frozen=True)
class Records:
    """The records of a stage; the mean one, but for ``longest``.

    Attributes:
        batch: records of a step, on all devices together.
        text, supervised: tokens.
        pictures: of a record.
        longest: tokens of the longest record, which memory has to hold; None for the stage's limit.
    """

    batch: int
    text: int
    supervised: int
    pictures: float = 1.0
    longest: int | None = None


def records(preset: Preset, stage: str) -> Records:
    """Describe the recipe's records, with its published global batches."""
    if preset.stage(stage).train == "alignment":
        return Records(256, CAPTION, CAPTION - 1, longest=LONGEST_CAPTION)
    total = sum(part.thousands for part in MIX)
    text = supervised = pictures = 0.0
    for part in MIX:
        question, answer = (TOKENS_PER_WORD * sum(words) / 2 for words in (part.question, part.answer))
        share, turns = part.thousands / total, sum(part.turns) / 2
        text += share * turns * (question + answer + TURN)
        supervised += share * turns * answer
        pictures += share * part.picture
    return Records(128, round(text) + SYSTEM_PROMPT, round(supervised), pictures)


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes of :data:`NODE`, joined by 400 Gb/s ``adapters``."""

    devices: int
    adapters: int = NODE

    @property
    def speed(self) -> float:
        """Return each GPU's bytes/s in a ring, by the slowest link."""
        between = math.inf if self.devices <= NODE else self.adapters * ADAPTER
        return ACHIEVED * min(NVLINK, between)

    def collective(self, size: float, messages: int = 1) -> float:
        """Time an all-gather or reduce-scatter of ``size`` bytes, by rings."""
        others = self.devices - 1
        return size * others / self.devices / self.speed + messages * others * HOP

    def __str__(self) -> str:
        return f"{self.devices}" + (f", {self.adapters} adapter a node" if self.adapters < NODE else "")


CLUSTERS = (Cluster(1), Cluster(8), Cluster(64), Cluster(64, adapters=1))


def measured_share(folder: Path, preset: str, stage: str) -> tuple[float, str]:
    """Return one GPU's share of the peak, and its source.

    A stage without a figure of its own takes that of LoRA, a preset without a record that of vicuna-7b.
    """
    for name in (preset, "vicuna-7b"):
        file = folder / f"train_step-{name}-cuda.json"
        if not file.is_file():
            continue
        stages = json.loads(file.read_text(encoding="utf-8"))["stages"]
        for key in (stage, "finetune_lora"):
            if stages.get(key, {}).get("mfu"):
                return stages[key]["mfu"], f"measured: {key} in {file.name}"
    return SHARE, "assumed"


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Communication:
    """Seconds of a step that can overlap arithmetic, and that cannot."""

    beside: float
    alone: float


@dataclass(frozen=True)
class Step:
    """One optimiser step on a cluster.

    Attributes:
        batch, accumulation: records of a device at a time, and how many times.
        compute: seconds of arithmetic.
        communication: seconds of links at work.
        exposed: seconds of these during which the arithmetic waits.
        samples: a second, on all devices.
        efficiency: of a device, relative to one GPU that only computes.
        memory: bytes of a device.
        fits: in :data:`MEMORY`.
    """

    batch: int
    accumulation: int
    compute: float
    communication: float
    exposed: float
    samples: float
    efficiency: float
    memory: int
    fits: bool

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def communication(level: str, shape: Shape, cluster: Cluster, micro_steps: int) -> Communication:
    """Time what ZeRO sends in a step, in 16 bits.

    Every device holds the frozen encoders. ZeRO-2 sends trained parts' gradients at each micro-step, and their new
    weights once. ZeRO-3 sends, at each micro-step, these gradients and twice all weights but the encoders'.
    """
    if cluster.devices == 1:
        return Communication(0.0, 0.0)
    bucket = shape.hidden**2  # what transformers makes of "auto"
    gradients = micro_steps * cluster.collective(2 * shape.trained, math.ceil(shape.trained / bucket))
    if level == "zero2":
        gather = cluster.collective(2 * shape.trained, math.ceil(shape.trained / GATHER_BUCKET))
        return Communication(gradients, gather)
    gather = 2 * micro_steps * cluster.collective(2 * shape.registered, shape.layers)
    first = gather / shape.layers  # there is nothing yet to compute during the first layer's
    return Communication(gradients + gather - first, first)


def model_step(
    preset: Preset, stage: str, shape: Shape, level: str, cluster: Cluster, *, flops: float, share: float
) -> Step:
    """Model one step of a stage.

    Args:
        flops: of the mean record.
        share: of the peak that one GPU reaches.
    """
    data = records(preset, stage)
    own = data.batch // cluster.devices
    length = None if data.longest is None else shape.image_tokens + data.longest
    run = Run.of(preset, stage, devices=cluster.devices, deepspeed=level, length=length)
    run = Run(run.devices, run.deepspeed, min(run.batch, own), run.length)
    fitting = largest_batch(preset, stage, shape, run, MEMORY)
    run = Run(run.devices, run.deepspeed, fitting or 1, run.length)
    alone = flops / (share * PEAK_TFLOPS[DEVICE] * 1e12)  # seconds a record on one GPU
    sent = communication(level, shape, cluster, own // run.batch)
    compute = own * alone
    hidden = min(OVERLAP * sent.beside, compute)
    exposed = sent.beside + sent.alone - hidden
    samples = data.batch / (compute + exposed)
    return Step(
        batch=run.batch,
        accumulation=own // run.batch,
        compute=compute,
        communication=sent.beside + sent.alone,
        exposed=exposed,
        samples=samples,
        efficiency=samples * alone / cluster.devices,
        memory=training_memory(preset, stage, shape, run).total,
        fits=bool(fitting),
    )


# -- the page ---------------------------------------------------------------------------------------------------------


@lru_cache
def counted(name: str) -> dict[str, tuple[Shape, float]]:
    """Count each stage's shape, and the operations of its mean record."""
    preset = load_preset(name)
    work = Work(preset)
    found = {}
    for stage in STAGES:
        data = records(preset, stage)
        positions = data.text + round(data.pictures * work.image_tokens)
        flops = work.record(stage, positions=positions, scored=data.supervised, pictures=data.pictures)
        found[stage] = (stage_shape(preset, stage), flops)
    return found


def assumptions(folder: Path) -> str:
    """Format the table of the model's assumptions."""
    first, second = (records(load_preset(PRESETS[0]), stage) for stage in ("pretrain", "finetune"))
    shares = {}
    for name in PRESETS:
        for stage in STAGES:
            share, source = measured_share(folder, name, stage)
            shares.setdefault(f"{share:.1%} ({source})", []).append(f"{name} {stage}")
    told = next(iter(shares)) if len(shares) == 1 else "; ".join(f"{k}: {', '.join(v)}" for k, v in shares.items())
    rows = [
        ("peak of a GPU, dense bfloat16", f"{PEAK_TFLOPS[DEVICE]} TFLOP/s", "H100 SXM5, [published][h100]"),
        (
            "share of it that one GPU reaches",
            told,
            "of needed operations; what is recomputed takes time, and is not one",
        ),
        ("share at smaller micro-batches", "the same", "optimistic at 2 records a GPU"),
        ("memory of a GPU", f"{MEMORY / GIB:.1f} GiB", "what the driver reports of 80 GB"),
        ("NVLink 4", f"{NVLINK / 1e9:.0f} GB/s each way", "18 links, 900 GB/s both ways together, [published][h100]"),
        ("InfiniBand NDR", f"{ADAPTER / 1e9:.0f} GB/s each way", "an adapter of 400 Gb/s"),
        ("node", f"{NODE} GPUs, {NODE} adapters", "as [DGX H100][dgx]; and, for comparison, one adapter a node"),
        ("share of a link's speed", f"{ACHIEVED:.0%}", "assumed"),
        ("latency", f"{HOP * 1e6:.0f} us a hop", "assumed; a message makes n - 1 hops among n GPUs"),
        (
            "collectives",
            "rings",
            "each GPU sends (n - 1) / n of what is gathered or reduced, at the slowest link's speed",
        ),
        ("numbers sent", "2 bytes", "DeepSpeed reduces and gathers in the model's bfloat16"),
        ("ZeRO-2 sends", "2 T", "gradients of what trains (each micro-step), its new weights (each step)"),
        ("ZeRO-3 sends", "2 P + T", "all weights forward and backward, gradients of what trains (each micro-step)"),
        ("frozen encoders", "never sent", "CLIP and the experts are whole on every GPU"),
        ("overlap", f"{OVERLAP:.0%}", "assumed, of what can run during arithmetic"),
        ("not during arithmetic", "", "ZeRO-2's new weights; the weights of ZeRO-3's first layer"),
        ("messages", f"width^2 numbers; {GATHER_BUCKET:,}; a layer", "gradients; new weights; ZeRO-3's weights"),
        ("global batch", f"{first.batch} in stage 1, {second.batch} in stage 2", "LLaVA-1.5's"),
        ("mean record of stage 1", f"1 image, {first.text} tokens", "assumed"),
        (
            "mean record of stage 2",
            f"{second.pictures:.2f} images, {second.text} tokens, {second.supervised} of them supervised",
            f"estimate of `benchmarks/llava_mix.py`, {TOKENS_PER_WORD} tokens a word, {TURN} more a turn, "
            f"{SYSTEM_PROMPT} for the system prompt",
        ),
        (
            "longest record, for memory",
            f"{LONGEST_CAPTION} tokens and the image in stage 1, the limit of 2048 tokens in stage 2",
            "bytes as in [memory](../reference/memory.md)",
        ),
    ]
    return markdown_table(["what", "value", "source or remark"], rows, left=3)


def results(name: str, folder: Path) -> str:
    """Format the table of a preset."""
    preset, rows = load_preset(name), []
    for stage, (shape, flops) in counted(name).items():
        share, _ = measured_share(folder, name, stage)
        for level in LEVELS:
            for cluster in CLUSTERS:
                step = model_step(preset, stage, shape, level, cluster, flops=flops, share=share)
                rows.append([f"{stage}, {level}", str(cluster), *_cells(step)])
    header = ["stage", "GPUs", "records", "compute s", "links s", "exposed s", "step s", "samples/s", "efficiency"]
    return markdown_table([*header, "GiB a GPU", "fits"], rows)


def _cells(step: Step) -> list[str]:
    seconds = (step.compute, step.communication, step.exposed, step.seconds)
    return [
        f"{step.batch} x {step.accumulation}",
        *(f"{value:.3f}" for value in seconds),
        f"{step.samples:,.1f}",
        f"{step.efficiency:.0%}",
        f"{step.memory / GIB:.1f}",
        "yes" if step.fits else "**no**",
    ]


def generated(folder: Path = RESULTS) -> str:
    """Write the tables between the page's marks."""
    parts = [assumptions(folder)]
    for name in PRESETS:
        work = ", ".join(f"{stage} {flops / 1e12:.1f}" for stage, (_, flops) in counted(name).items())
        parts += [f"## {name}", f"TFLOP of the mean record: {work}.", results(name, folder)]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--write", action="store_true", help="replace the tables of docs/background/scaling.md")
    args = parser.parse_args(argv)
    text = generated(args.results)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page[: page.index(BEGIN)], page[page.index(END) :]
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{after}", encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
