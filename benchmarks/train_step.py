"""What one training step costs: samples/s, tokens/s, memory, and how much of the device's arithmetic it uses.

One process, without DeepSpeed: forward, backward, gradient clipping and AdamW on one synthetic batch, with a stage's
freezing policy, objective, parameter groups and precision (float32 for what trains, autocast for the rest).

Model FLOP utilisation (MFU) counts what the step needs and nothing else: matrix products, convolutions and attention,
two operations per multiply-add, of one forward pass of everything, of the gradients of activations from the loss down
to the lowest trained layer, and of the gradients of trained weights. Not counted: recomputation (of checkpointed
activations, of attention scores, of the gate for the balance loss), gradients of frozen weights, element-wise work,
the optimiser. Attention is counted whole, without a discount for the causal mask, as is customary. The divisor is the
device's published dense peak where this file knows it (or --peak-tflops gives it), and always also a large matrix
product measured beside it.

    python benchmarks/train_step.py                                       # bundled weights
    python benchmarks/train_step.py --preset vicuna-7b --device cuda      # true size, random weights
"""

import gc
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from common import (
    GB,
    Bench,
    Samples,
    argument_parser,
    build_llava,
    circumstances,
    count_flops,
    count_parameters,
    matrix_product,
    measure,
    milliseconds,
    peak_memory,
    ratio,
    run_command,
    table,
    vision_sources,
    weight_bytes,
    write_results,
)
from torch import nn

from tove_llava.errors import ConfigError
from tove_llava.llava import ToveLlavaForConditionalGeneration
from tove_llava.presets import StagePreset
from tove_llava.tower import TowerFeatures
from tove_llava.train.stages import Trainable, freeze, parameter_groups

# Published dense bfloat16 and float16 TFLOP/s, by the name that the driver gives.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
}
LEARNING_RATE = 1e-5  # the time does not depend on it


class TrainingStep:
    """One optimiser step of a stage on one batch; calling it takes the step and returns the loss.

    Args:
        model: on its device, with backbones. The stage's freezing policy is applied to it.
        stage: of the preset.
        dtype: of the computation; what trains is float32.
    """

    def __init__(self, model: ToveLlavaForConditionalGeneration, stage: StagePreset, dtype: torch.dtype) -> None:
        self.model, self.dtype = model.train(), dtype
        self.device = next(model.parameters()).device
        self.trainable: Trainable = freeze(model, stage)
        model.to(self.device)  # adapters too
        for parameter in self.trainable.parameters():
            parameter.data = parameter.data.float()
        groups = parameter_groups(
            self.trainable, learning_rate=LEARNING_RATE, weight_decay=stage.arguments.get("weight_decay", 0.0)
        )
        self.optimizer = torch.optim.AdamW(groups, fused=self.device.type == "cuda")
        self.max_grad_norm = stage.arguments.get("max_grad_norm", 1.0)

    def precision(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def forward(self, batch: dict[str, Any], *, add_aux_loss: bool = True) -> torch.Tensor:
        with self.precision():
            return self.model(**batch, add_aux_loss=add_aux_loss, use_cache=False).loss

    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        loss = self.forward(batch)
        loss.backward()
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(list(self.trainable.parameters()), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def encode(self, pixel_values: torch.Tensor) -> TowerFeatures:
        with self.precision():
            return self.model.tower.encode(pixel_values)

    def needed_flops(self, batch: dict[str, Any]) -> dict[str, int]:
        """FLOPs of one step on the batch, by the convention above; checkpointing has to be off."""
        features = self.encode(batch["pixel_values"])
        rest = with_features(batch, features)
        encoders = count_flops(lambda: self.encode(batch["pixel_values"]))
        trained = count_flops(lambda: self.forward(rest, add_aux_loss=False).backward())
        forward = count_flops(lambda: self.forward(rest, add_aux_loss=False))
        self.optimizer.zero_grad(set_to_none=True)
        return {"frozen_encoders": encoders, "forward": forward, "backward": trained - forward}

    def resident_bytes(self) -> int:
        """Weights, backbones and optimiser state between two steps."""
        frozen = self.model.tower.frozen
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return weight_bytes(self.model, frozen.clip, frozen.hub) + sum(t.numel() * t.element_size() for t in state)


def make_batch(
    model: ToveLlavaForConditionalGeneration, size: int, text_tokens: int, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """``size`` samples of one image and ``text_tokens`` tokens of text, the second half of which is supervised."""
    device, vision = next(model.parameters()).device, model.config.vision_config
    generator = torch.Generator().manual_seed(seed)
    image = model.config.image_token_index
    text = torch.randint(3, model.config.text_config.vocab_size - 1, (size, text_tokens), generator=generator)
    text += text >= image  # any word but the image's
    images = torch.full((size, vision.num_patches), image)
    input_ids = torch.cat([text[:, :1], images, text[:, 1:]], dim=1)  # [B, N + text_tokens]
    labels = input_ids.clone()
    labels[:, : -(text_tokens // 2)] = -100
    pixels = torch.randn(size, 3, vision.image_size, vision.image_size, generator=generator)
    return {
        "input_ids": input_ids.to(device),
        "attention_mask": torch.ones_like(input_ids).to(device),
        "labels": labels.to(device),
        "pixel_values": pixels.to(device, dtype),
    }


def with_features(batch: dict[str, Any], features: TowerFeatures) -> dict[str, Any]:
    """The batch with the frozen encoders' output in place of its images."""
    return {**{k: v for k, v in batch.items() if k != "pixel_values"}, "vision_features": features}


def measure_stage(bench: Bench, weights: str, name: str) -> dict[str, Any]:
    """Builds the model, applies the stage and measures it."""
    stage, args, device = bench.preset.stage(name), bench.args, bench.device
    size = args.batch or stage.arguments.get("per_device_train_batch_size", 8)
    checkpointing = stage.arguments.get("gradient_checkpointing", False)
    if args.checkpointing is not None:
        checkpointing = args.checkpointing == "on"
    model = build_llava(bench, weights)
    step = TrainingStep(model, stage, bench.dtype)
    batch = make_batch(model, size, args.text_tokens, bench.dtype, args.seed)
    length = batch["input_ids"].shape[1]

    flops = step.needed_flops({key: value[:1] for key, value in batch.items()})  # of one sample
    if checkpointing:
        enable_checkpointing(model)
    step(batch)  # makes the optimiser's state
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else step.resident_bytes()
    peak = peak_memory(lambda: step(batch), device)
    ready = with_features(batch, step.encode(batch["pixel_values"]))
    product, product_flops = matrix_product(device, bench.dtype)
    samples = measure(
        {"step": lambda: step(batch), "step_without_encoders": lambda: step(ready), "matrix_product": product},
        repeats=args.repeats,
        warmup=args.warmup,
        device=device,
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


def utilisation(
    bench: Bench, samples: dict[str, Samples], flops: dict[str, int], product_flops: float
) -> dict[str, Any]:
    """Needed FLOPs per step and what share of the device's peak and of the measured ceiling they are."""
    achieved = sum(flops.values()) / samples["step"].median / 1e12
    ceiling = product_flops / samples["matrix_product"].median / 1e12
    peak = bench.args.peak_tflops
    if peak is None and bench.device.type == "cuda" and bench.dtype in (torch.bfloat16, torch.float16):
        peak = PEAK_TFLOPS.get(torch.cuda.get_device_name(bench.device))
    return {
        "needed_gflop_per_step": {
            **{key: value / 1e9 for key, value in flops.items()},
            "all": sum(flops.values()) / 1e9,
        },
        "achieved_tflops": achieved,
        "matrix_product_tflops": ceiling,
        "published_peak_tflops": peak,
        "mfu": None if peak is None else achieved / peak,
        "share_of_matrix_product": achieved / ceiling,
    }


def enable_checkpointing(model: nn.Module) -> None:
    """Under its name in newer transformers, else its older one."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def benchmark(bench: Bench) -> None:
    if bench.args.text_tokens < 2:
        raise ConfigError(f"--text-tokens must be at least 2, not {bench.args.text_tokens}")
    names = bench.args.stages.split(",")
    for name in names:
        bench.preset.stage(name)  # a typo is told before anything is built
    weights = bench.weights([*vision_sources(bench.preset), bench.preset.language.source])
    stages = {}
    for name in names:
        stages[name] = measure_stage(bench, weights, name)
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    record = bench.record("train_step", weights, text_tokens=bench.args.text_tokens, processes=1, deepspeed="no")
    record["flop_convention"] = " ".join(__doc__.split("\n\n")[2].split())
    record["stages"] = stages
    write_results(bench.args.output, record, render(record))


def render(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    stages = record["stages"]
    speed = table(
        ["stage", "batch x length", "samples/s", "tokens/s", "ms per step (quartiles)", "CPU ms per step", "encoders"],
        [
            [
                name,
                f"{row['batch']} x {row['sequence_length']}{' (checkpointed)' if row['checkpointing'] else ''}",
                f"{row['samples_per_second']:.4g}",
                f"{row['tokens_per_second']:.4g}",
                milliseconds(row["timings"]["step"]["wall_seconds"]["values"]),
                f"{row['timings']['step']['cpu_seconds']['median'] * 1e3:.3g}",
                f"{row['encoders_share_of_time']:.0%}",
            ]
            for name, row in stages.items()
        ],
    )
    work = table(
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
            speed,
            "Tokens are positions of the language model, image tokens included; none is padding. *encoders* is the "
            "share of the step's time that the frozen CLIP and experts take: what is saved when their output is given.",
            work,
            record["flop_convention"],
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--stages",
        default="pretrain,finetune_lora",
        metavar="A,B",
        help="of the preset (default: pretrain,finetune_lora)",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="samples (default: the stage's, per device)")
    parser.add_argument("--text-tokens", type=int, default=128, metavar="N", help="beside the image's (default: 128)")
    parser.add_argument("--checkpointing", choices=("on", "off"), help="of activations (default: the stage's)")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="published peak of the device in this dtype")
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
