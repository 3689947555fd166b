"""How fast the tower is: images/s, memory, and the share of the time that each expert takes.

Contenders, timed in turn within one run:

- ToVE: the tower, encoders and fusion.
- loop: the same encoders as public multi-encoder codebases run them, one whole network after another, eagerly: CLIP to
  its last layer with every hidden state kept, transformers through their last block, dense predictors with their
  decoder; then the same fusion. Attention kernels, dtype and device are the same.
- CLIP: CLIP alone, up to the layer whose tokens are used.

    python benchmarks/tower.py                                       # bundled weights
    python benchmarks/tower.py --preset vicuna-7b --device cuda      # true size, random weights
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from common import (
    MB,
    Bench,
    argument_parser,
    build_tower,
    circumstances,
    count_flops,
    count_parameters,
    fill_randomly,
    measure,
    milliseconds,
    peak_memory,
    ratio,
    run_command,
    table,
    vision_sources,
    weight_bytes,
    whole_clip,
    write_results,
)
from torch.nn import functional as F

from tove_llava.errors import ConfigError
from tove_llava.experts import Expert, build_expert
from tove_llava.tower import ToveVisionModel, TowerFeatures


class WholeEncoders:
    """The loop over whole encoders that the tower is compared with.

    Args:
        tower: whose encoders these are. What is whole in it already is used itself, not a copy.
        features: the tower's features of the images that will be run. The fusion gets its expert features from here,
            because a whole network does not hand out its encoder's tokens.
    """

    def __init__(self, tower: ToveVisionModel, features: TowerFeatures) -> None:
        self.tower, self.features = tower, features
        self.clip = whole_clip(tower)
        self.clip.load_state_dict(tower.frozen.clip.state_dict(), strict=False)  # the last block is random
        self.experts = {name: self._whole(tower.frozen.hub[name]) for name in tower.active_experts}

    def _whole(self, expert: Expert) -> Expert:
        if "map" not in expert.modes or expert.spec.mode == "map":
            return expert
        whole = build_expert(expert.spec.replace(mode="map", options={}, width=0, grid=(0, 0)))
        fill_randomly(whole, self.tower.device)
        return whole.to(device=self.tower.device, dtype=self.tower.dtype)

    def base(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """CLIP's tokens ``[B,N,d]``, as LLaVA takes them."""
        config = self.tower.config
        size = config.clip_config.image_size
        if config.image_size != size:
            pixel_values = F.interpolate(pixel_values.float(), (size, size), mode="bicubic", antialias=True)
            pixel_values = pixel_values.to(self.tower.dtype)
        states = self.clip(pixel_values, output_hidden_states=True).hidden_states
        return states[config.clip_layer][:, 1:]

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        base = self.base(pixel_values)
        pixels = to_unit_range(self.tower, pixel_values)
        for expert in self.experts.values():
            if "map" in expert.modes:
                expert(pixels)  # with its decoder
            else:
                expert.network(expert.condition(pixels))  # to its end
        return self.tower.fuse(TowerFeatures(base, self.features.experts)).last_hidden_state


def to_unit_range(tower: ToveVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """CLIP-normalised pixels -> 0..1, what experts take."""
    mean = torch.tensor(tower.config.image_mean, device=pixel_values.device).view(1, 3, 1, 1)
    std = torch.tensor(tower.config.image_std, device=pixel_values.device).view(1, 3, 1, 1)
    return (pixel_values.float() * std + mean).clamp(0, 1)


@torch.no_grad()
def benchmark(bench: Bench) -> None:
    weights = bench.weights(vision_sources(bench.preset))
    tower = build_tower(bench, weights)
    if not tower.active_experts:
        raise ConfigError(f"preset {bench.preset.name!r} has no experts; there is nothing to compare")
    batch, device = bench.args.batch, bench.device
    size = tower.config.image_size
    generator = torch.Generator().manual_seed(bench.args.seed)
    pixel_values = torch.randn(batch, 3, size, size, generator=generator).to(device, bench.dtype)
    pixels = to_unit_range(tower, pixel_values)

    features = tower.encode(pixel_values)
    loop = WholeEncoders(tower, features)
    torch.testing.assert_close(loop.base(pixel_values), features.base, rtol=2e-2, atol=2e-2)  # the same CLIP

    hub, names = tower.frozen.hub, tower.active_experts
    contenders = {
        "tove": lambda: tower(pixel_values),
        "loop": lambda: loop(pixel_values),
        "clip": lambda: tower.frozen.encode(pixel_values, [], strict=False),
    }
    parts = {
        "part/clip": contenders["clip"],
        **{f"part/{name}": (lambda expert=hub[name]: expert(pixels)) for name in names},
        "part/fusion": lambda: tower.fuse(features),
    }
    memory = {name: peak_memory(run, device) for name, run in contenders.items()}
    samples = measure(contenders | parts, repeats=bench.args.repeats, warmup=bench.args.warmup, device=device)

    flops = {name: count_flops(run) / batch for name, run in (contenders | parts).items()}
    held = {
        "tove": weight_bytes(tower.frozen.clip, hub, tower.fusion),
        "loop": weight_bytes(loop.clip, *loop.experts.values(), tower.fusion),
        "clip": weight_bytes(tower.frozen.clip),
    }
    modules = {"clip": tower.frozen.clip, **{name: hub[name] for name in names}, "fusion": tower.fusion}
    total = sum(samples[part].median for part in parts)
    total_cpu = sum(samples[part].cpu_median for part in parts)
    record = bench.record("tower", weights, batch=batch, image_size=size, tokens_per_image=tower.config.num_patches)
    record["contenders"] = {
        name: {
            **samples[name].to_dict(),
            "images_per_second": batch / samples[name].median,
            "gflop_per_image": flops[name] / 1e9,
            "weight_bytes": held[name],
            "peak_bytes_above_weights": memory[name],
        }
        for name in contenders
    }
    record["parts"] = {
        name: {
            **samples[f"part/{name}"].to_dict(),
            "share_of_time": samples[f"part/{name}"].median / total,
            "share_of_cpu_time": samples[f"part/{name}"].cpu_median / total_cpu,
            "gflop_per_image": flops[f"part/{name}"] / 1e9,
            "parameters": count_parameters(module),
            "weight_bytes": weight_bytes(module),
        }
        for name, module in modules.items()
    }
    record["ratios"] = {
        "loop_over_tove": ratio(samples["loop"], samples["tove"]),
        "tove_over_clip": ratio(samples["tove"], samples["clip"]),
        "parts_over_tove": total / samples["tove"].median,
    }
    write_results(bench.args.output, record, render(record))


TITLES = {"tove": "ToVE tower", "loop": "loop over whole encoders", "clip": "CLIP alone"}


def render(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    batch, ratios = record["settings"]["batch"], record["ratios"]
    speed = table(
        [
            "",
            "images/s",
            "ms per image (quartiles)",
            "CPU ms per image",
            "GFLOP per image",
            "weights MB",
            "peak above weights MB",
        ],
        [
            [
                TITLES[name],
                f"{row['images_per_second']:.4g}",
                milliseconds(row["wall_seconds"]["values"], batch),
                f"{row['cpu_seconds']['median'] * 1e3 / batch:.3g}",
                f"{row['gflop_per_image']:.4g}",
                f"{row['weight_bytes'] / MB:.4g}",
                f"{row['peak_bytes_above_weights'] / MB:.4g}",
            ]
            for name, row in record["contenders"].items()
        ],
    )
    shares = table(
        [
            "part",
            "share of the time",
            "of CPU time",
            "ms per image (quartiles)",
            "GFLOP per image",
            "parameters M",
            "weights MB",
        ],
        [
            [
                name,
                f"{row['share_of_time']:.1%}",
                f"{row['share_of_cpu_time']:.1%}",
                milliseconds(row["wall_seconds"]["values"], batch),
                f"{row['gflop_per_image']:.4g}",
                f"{row['parameters'] / 1e6:.4g}",
                f"{row['weight_bytes'] / MB:.4g}",
            ]
            for name, row in record["parts"].items()
        ],
    )
    loop, clip = ratios["loop_over_tove"], ratios["tove_over_clip"]
    return "\n\n".join(
        [
            "# The tower's speed",
            circumstances(record),
            speed,
            f"The tower is **{loop['value']:.2f} times** as fast as the loop (quartiles {loop['paired_q1']:.2f} to "
            f"{loop['paired_q3']:.2f} repeat by repeat; {loop['cpu_time']:.2f} in processor time), and takes "
            f"**{clip['value']:.2f} times** the time of CLIP alone ({clip['paired_q1']:.2f} to "
            f"{clip['paired_q3']:.2f}; {clip['cpu_time']:.2f} in processor time).",
            shares,
            f"Parts are timed one by one; together they take {ratios['parts_over_tove']:.2f} times the tower's time.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images at a time (default: 16)")
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
