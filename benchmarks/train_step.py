"""Measure a training step: samples/s, tokens/s, memory, and FLOP utilisation.

One process, without DeepSpeed: forward, backward, gradient clipping and AdamW, with a stage's freezing policy,
objective, parameter groups and precision (float32 for what trains, autocast for the rest). Three tables: each stage on
one synthetic batch; stage 2 on records like LLaVA-1.5's, against the original recipe's settings (step_mix.py); and what
the experts cost over plain CLIP (step_clip.py).

Model FLOP utilisation (MFU) counts what the step needs and nothing else: matrix products, convolutions and attention,
two operations per multiply-add, of one forward pass of everything, of the gradients of activations from the loss down
to the lowest trained layer, and of the gradients of trained weights. Not counted: recomputation (of checkpointed
activations, of attention scores, of the gate for the balance loss), gradients of frozen weights, element-wise work,
the optimiser. Attention is counted whole, without a discount for the causal mask, as is customary. The divisor is the
device's published dense peak where this file knows it (or --peak-tflops gives it), and always also a large matrix
product measured beside it.

The model is built once for all parts. A part that fails is listed with its reason, and the others are measured;
results are saved after each part.

    python benchmarks/train_step.py                                       # bundled weights
    python benchmarks/train_step.py --preset vicuna-7b --device cuda      # true size, random weights
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from common import (
    Bench,
    argument_parser,
    circumstances,
    lost_table,
    milliseconds,
    run_command,
    targets_table,
    write_results,
)
from measuring import GB, held_memory, matrix_product, measure, peak_memory, ratio
from models import count_parameters, vision_sources
from step_clip import (
    STAGES,
    clip_targets,
    flops_beside_clip,
    flops_part,
    measure_beside_clip,
    render_clip,
    time_part,
)
from step_mix import MIX, QLORA_MEMORY, QUANTISED, check_mix, measure_mix, measure_qlora, mix_targets, render_mix
from step_parts import SharedModel, TrainingStep, make_batch, utilisation, with_features

from tove_llava.core.errors import ConfigError
from tove_llava.core.text import markdown_table
from tove_llava.tower.execution import execution_mode
from tove_llava.train.recomputation import KINDS, NONE, set_checkpointing

PARTS = ("stages", "mix", "clip", "qlora")


def measure_stage(bench: Bench, shared: SharedModel, name: str) -> dict[str, Any]:
    """Apply the stage to the model and measure it."""
    stage = bench.preset.stage(name)
    with shared.step(stage) as step:
        try:
            return _stage_row(bench, step, bench.args.checkpointing or stage.kept, name)
        finally:
            set_checkpointing(step.model, NONE)


def _stage_row(bench: Bench, step: TrainingStep, checkpointing: str, name: str) -> dict[str, Any]:
    args, device, model = bench.args, bench.device, step.model
    size = args.batch or bench.preset.stage(name).arguments.get("per_device_train_batch_size", 8)
    batch = make_batch(model, size, args.text_tokens, bench.dtype, args.seed)
    length = batch["input_ids"].shape[1]

    flops = step.needed_flops({key: value[:1] for key, value in batch.items()})  # of one sample
    set_checkpointing(model, checkpointing)
    step(batch)  # makes the optimiser's state
    resident = held_memory(device) if device.type == "cuda" else step.resident_bytes()
    peak = peak_memory(lambda: step(batch), device)
    ready = with_features(batch, step.encode(batch["pixel_values"]))
    product, product_flops = matrix_product(device, bench.dtype)
    samples = measure(
        {"step": lambda: step(batch), "step_without_encoders": lambda: step(ready), "matrix_product": product},
        repeats=args.repeats,
        warmup=args.warmup,
        device=device,
        is_over=bench.is_over,
    )
    return {
        "batch": size,
        "sequence_length": length,
        "image_tokens": model.config.vision_config.num_patches,
        "checkpointing": checkpointing,
        "trained_parameters": {part: sum(p.numel() for p in ps.values()) for part, ps in step.trainable.parts.items()},
        "parameters": count_parameters(model, model.tower.frozen.clip, model.tower.frozen.hub),
        "timings": {key: value.to_dict() for key, value in samples.items()},
        "samples_per_second": size / samples["step"].median,
        "tokens_per_second": size * length / samples["step"].median,
        "encoders_share_of_time": 1 - ratio(samples["step_without_encoders"], samples["step"])["value"],
        "memory": {"resident_bytes": resident, "peak_bytes_above_resident": peak, "peak_bytes": resident + peak},
        **utilisation(bench, samples, {key: value * size for key, value in flops.items()}, product_flops),
    }


def benchmark(bench: Bench) -> dict[str, Any]:
    names = _check(bench)
    weights = bench.weights([*vision_sources(bench.preset), bench.preset.language.source])
    shared = SharedModel(bench, weights)
    record = bench.record("train_step", weights, text_tokens=bench.args.text_tokens, processes=1, deepspeed="no")
    record["flop_convention"] = " ".join(__doc__.split("\n\n")[2].split())
    record |= {"stages": {}, "targets": []}

    def save(*, show: bool = False) -> None:
        if "mix" in record:
            lost = record["not_measured"]
            record["targets"] = mix_targets(bench, record["mix"], record["qlora"], lost) + clip_targets(
                bench, record["beside_clip"], lost
            )
        write_results(bench.args.output, record, render(record), show=show)

    parts = bench.args.parts
    for name in names if "stages" in parts else ():
        if row := bench.attempt(record, f"stage {name}", partial(measure_stage, bench, shared, name)):
            record["stages"][name] = row
        save()
    if parts != ["stages"]:
        record |= {"mix": None, "qlora": None, "beside_clip": {}}
        if "mix" in parts:
            record["mix"] = bench.attempt(record, MIX, partial(measure_mix, bench, shared, record))
            save()
        for name in (name for name in STAGES if name in bench.preset.stages and "clip" in parts):
            row = record["beside_clip"][name] = {"time": None, "flops": None}
            row["flops"] = bench.attempt(record, flops_part(name), partial(flops_beside_clip, name))
            row["time"] = bench.attempt(record, time_part(name), partial(measure_beside_clip, bench, shared, name))
            save()
        on_gpu = bench.device.type == "cuda"  # a CPU has no such limit
        if "qlora" in parts and on_gpu and QUANTISED in bench.preset.stages:
            record["qlora"] = bench.attempt(record, QLORA_MEMORY, partial(measure_qlora, bench, shared))
    save(show=True)
    return record


def _check(bench: Bench) -> list[str]:
    """List the stages to measure.

    Raises:
        ConfigError: a flag cannot be followed; nothing is built yet.
    """
    args = bench.args
    if args.text_tokens < 2:
        raise ConfigError(f"--text-tokens must be at least 2, not {args.text_tokens}")
    names: list[str] = args.stages.split(",")
    for name in names:
        bench.preset.stage(name)
    if args.execution is not None:
        execution_mode(args.execution)
    args.parts = ["stages"] if args.no_mix else args.parts.split(",")
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise ConfigError(f"--parts {unknown[0]}: no such part; known: {', '.join(PARTS)}")
    if "mix" in args.parts:
        check_mix(bench)
    return names


def _again(checkpointing: str) -> str:
    return "" if checkpointing == NONE else f" ({checkpointing} checkpointing)"


def render(record: dict[str, Any]) -> str:
    """Write the record as Markdown."""
    stages = record["stages"]
    speed = markdown_table(
        ["stage", "batch x length", "samples/s", "tokens/s", "ms per step (quartiles)", "CPU ms per step", "encoders"],
        [
            [
                name,
                f"{row['batch']} x {row['sequence_length']}{_again(row['checkpointing'])}",
                f"{row['samples_per_second']:.4g}",
                f"{row['tokens_per_second']:.4g}",
                milliseconds(row["timings"]["step"]["wall_seconds"]["values"]),
                f"{row['timings']['step']['cpu_seconds']['median'] * 1e3:.3g}",
                f"{row['encoders_share_of_time']:.0%}",
            ]
            for name, row in stages.items()
        ],
    )
    work = markdown_table(
        ["stage", "needed GFLOP per step", "TFLOP/s", "matrix product TFLOP/s", "share of it", "MFU", "peak memory GB"],
        [
            [
                name,
                f"{row['needed_gflop_per_step']['all']:.4g}",
                f"{row['achieved_tflops']:.3g}",
                f"{row['matrix_product_tflops']:.3g}",
                f"{row['share_of_matrix_product']:.1%}",
                "no published peak" if row["mfu"] is None else f"{row['mfu']:.1%}",
                f"{row['memory']['peak_bytes'] / GB:.3g}",
            ]
            for name, row in stages.items()
        ],
    )
    return "\n\n".join(
        [
            "# One training step",
            circumstances(record),
            *lost_table(record),
            speed,
            "Tokens are positions of the language model, image tokens included; none is padding. *encoders* is the "
            "share of the step's time that the frozen CLIP and experts take: what is saved when their output is given.",
            work,
            *([render_mix(record["mix"], record["qlora"])] if record.get("mix") else []),
            *([render_clip(record["preset"], record["beside_clip"])] if record.get("beside_clip") else []),
            targets_table(record["targets"]),
            record["flop_convention"],
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, limit=True)
    parser.add_argument(
        "--stages",
        default="pretrain,finetune_lora",
        metavar="A,B",
        help="of the preset (default: pretrain,finetune_lora)",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="samples (default: the stage's, per device)")
    parser.add_argument("--text-tokens", type=int, default=128, metavar="N", help="beside the image's (default: 128)")
    parser.add_argument("--checkpointing", choices=KINDS, help="of the stages' table (default: the stage's)")
    parser.add_argument("--mix-batches", type=int, default=4, metavar="N", help="micro-batches of the mix (default: 4)")
    parser.add_argument("--mix-repeats", type=int, default=5, metavar="N", help="timed runs over them (default: 5)")
    parser.add_argument("--tokenizer", metavar="DIR", help="of the mix: folder or source (default: a table of lengths)")
    parser.add_argument(
        "--execution", metavar="NAME", help="of the tower on the fast path (default: concurrent on a GPU, else eager)"
    )
    parser.add_argument(
        "--checkpointing-gib", type=float, metavar="X", help="of selective checkpointing (default: what is free)"
    )
    parser.add_argument("--no-mix", action="store_true", help="--parts stages")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="published peak of the device in this dtype")
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
