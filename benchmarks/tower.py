"""How fast the tower is: images/s, memory, and the share of the time that each expert takes.

Contenders, timed in turn within one run:

- ToVE: the tower, encoders and fusion, as it runs by default, and by each further execution that it has
  (docs/speed.md).
- loop: the same encoders as public multi-encoder codebases run them, one whole network after another, eagerly: CLIP to
  its last layer with every hidden state kept, transformers through their last block, dense predictors with their
  decoder; then the same fusion. Attention kernels, dtype and device are the same.
- CLIP: CLIP alone, up to the layer whose tokens are used.

    python benchmarks/tower.py                                       # bundled weights
    python benchmarks/tower.py --preset vicuna-7b --device cuda      # true size, random weights
"""

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import (
    MB,
    Bench,
    Samples,
    argument_parser,
    build_tower,
    circumstances,
    count_flops,
    count_parameters,
    fill_randomly,
    matrix_product,
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
from transformers import CLIPVisionConfig, CLIPVisionModel

from tove_llava.errors import ConfigError
from tove_llava.experts import Expert, build_expert
from tove_llava.experts.cost import expert_cost
from tove_llava.llava.build import vision_config
from tove_llava.presets import load_preset
from tove_llava.tower import ToveVisionModel, TowerFeatures
from tove_llava.tower.execution import EXECUTIONS, execution_mode

# The project's targets: images/s over the loop's; the rest for the published models, of which the first needs no GPU.
OVER_LOOP = {"cpu": 1.3, "cuda": 2.0}
TRUE_SIZE, TFLOP_PER_IMAGE = "vicuna-7b", 1.3
SHARE_OF_MATRIX_PRODUCT, FUSION_SHARE = 0.55, 0.08


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


def counted_tflop(preset: str) -> float:
    """TFLOP per image of a preset's tower, from configurations alone: encoders are counted on the meta device."""
    config = vision_config(load_preset(preset).vision, offline=True)
    tower = ToveVisionModel(config).eval()
    features = tower.blank_inputs(tower.device, tower.dtype)["vision_features"]
    with torch.device("meta"):
        built = config.clip_config.to_dict() | {"num_hidden_layers": config.num_clip_layers}
        clip = CLIPVisionModel(CLIPVisionConfig(**built))
        pixels = torch.empty(1, 3, config.clip_config.image_size, config.clip_config.image_size)
    own = count_flops(lambda: clip(pixels)) + count_flops(lambda: tower.fuse(features))
    return (own + sum(expert_cost(build_expert(spec)).flops for spec in config.expert_specs)) / 1e12


def optimised(bench: Bench, tower: ToveVisionModel) -> dict[str, ToveVisionModel]:
    """Copies of the tower, one for each execution that the command line asks for."""
    names = [name for name in bench.args.executions.split(",") if name]
    for name in names:
        execution_mode(name)
    return {name: copy.deepcopy(tower).set_execution(name) for name in names}


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
    towers = {f"tove_{name}": other for name, other in optimised(bench, tower).items()}
    for name, other in towers.items():
        check_equal(name, other.encode(pixel_values), features)  # also compiles and records
    contenders: dict[str, Callable[[], Any]] = {
        "tove": lambda: tower(pixel_values),
        **{name: (lambda other=other: other(pixel_values)) for name, other in towers.items()},
        "loop": lambda: loop(pixel_values),
        "clip": lambda: tower.frozen.encode(pixel_values, [], strict=False),
    }
    parts = {
        "part/clip": contenders["clip"],
        **{f"part/{name}": (lambda expert=hub[name]: expert(pixels)) for name in names},
        "part/fusion": lambda: tower.fuse(features),
    }
    memory = {name: peak_memory(run, device) for name, run in contenders.items()}
    product, product_flops = matrix_product(device, bench.dtype)
    # The last ones are not the tower's: its fusion as the executions run it, and the ceiling.
    fusions = {f"fusion/{name}": (lambda other=other: other.fuse(features)) for name, other in towers.items()}
    further = {**fusions, "matrix_product": product}
    samples = measure(contenders | parts | further, repeats=bench.args.repeats, warmup=bench.args.warmup, device=device)

    flops = {name: count_flops(run) / batch for name, run in (contenders | parts).items() if name not in towers}
    whole = weight_bytes(tower.frozen.clip, hub, tower.fusion)
    flops |= dict.fromkeys(towers, flops["tove"])  # the same work; compiled code cannot be counted
    held = {
        **dict.fromkeys(["tove", *towers], whole),
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
        **{f"loop_over_{name}": ratio(samples["loop"], samples[name]) for name in towers},
    }
    record["figures"] = figures(samples, list(towers), flops["tove"] * batch, product_flops)
    record["targets"] = targets(record, device.type)
    write_results(bench.args.output, record, render(record))


def check_equal(name: str, actual: TowerFeatures, expected: TowerFeatures) -> None:
    """Nothing is faster by being different.

    Raises:
        AssertionError: features differ from those of the plain tower by more than rounding.
    """
    tolerance = 1e-4 if expected.base.dtype == torch.float32 else 2e-2
    for key, want in {"CLIP": expected.base, **expected.experts}.items():
        got = actual.base if key == "CLIP" else actual.experts[key]
        error = (got.float() - want.float()).norm() / want.float().norm()
        assert error <= tolerance, f"{name}: the features of {key} differ by {error:.2g} of their size"


def figures(samples: dict[str, Samples], towers: list[str], flops: float, product_flops: float) -> dict[str, Any]:
    """Of the fastest of the tower's executions: its name, speed over the loop's, and what it makes of the device.

    Args:
        flops: of the tower for one batch.
        product_flops: of the matrix product.
    """
    best = min(["tove", *towers], key=lambda name: samples[name].median)
    fusion = samples["part/fusion" if best == "tove" else best.replace("tove_", "fusion/tove_", 1)]
    achieved = flops / samples[best].median / 1e12
    ceiling = product_flops / samples["matrix_product"].median / 1e12
    return {
        "fastest": best,
        "over_loop": samples["loop"].median / samples[best].median,
        "achieved_tflops": achieved,
        "matrix_product_tflops": ceiling,
        "share_of_matrix_product": achieved / ceiling,
        "fusion_share_of_time": fusion.median / samples[best].median,
        "tflop_per_image_at_true_size": counted_tflop(TRUE_SIZE),
    }


def targets(record: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """What the project aims at; the value is None where it has to be measured on a GPU."""
    found = record["figures"]

    def on_gpu(key: str) -> float | None:
        return found[key] if device == "cuda" else None

    fastest = f"images/s of {TITLES[found['fastest']]} over the loop's"
    rows = [
        (fastest, found["over_loop"], OVER_LOOP[device], True),
        (f"TFLOP per image, {TRUE_SIZE}", found["tflop_per_image_at_true_size"], TFLOP_PER_IMAGE, False),
        (
            "share of the matrix-product ceiling, GPU",
            on_gpu("share_of_matrix_product"),
            SHARE_OF_MATRIX_PRODUCT,
            True,
        ),
        ("share of time of gate, projections and transfer, GPU", on_gpu("fusion_share_of_time"), FUSION_SHARE, False),
    ]
    return [dict(zip(("name", "value", "target", "at_least"), row, strict=True)) for row in rows]


TITLES = {
    "tove": "ToVE tower",
    **{f"tove_{name}": f"ToVE tower, {name}" for name in EXECUTIONS},
    "loop": "loop over whole encoders",
    "clip": "CLIP alone",
}


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
    goals = table(
        ["target", "wanted", "measured"],
        [
            [
                row["name"],
                f"{'at least' if row['at_least'] else 'at most'} {row['target']:g}",
                "not measured" if row["value"] is None else f"{row['value']:.3g}",
            ]
            for row in record["targets"]
        ],
    )
    found = record["figures"]
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
            f"Fastest: {TITLES[found['fastest']]}, **{found['over_loop']:.2f} times** as fast as the loop, "
            f"{found['achieved_tflops']:.3g} TFLOP/s, {found['share_of_matrix_product']:.0%} of the matrix product's "
            f"{found['matrix_product_tflops']:.3g}; gate, projections and transfer take "
            f"{found['fusion_share_of_time']:.1%} of its time. Executions are those of docs/speed.md, equal up to "
            "rounding. What they compile and record was made before; a CUDA graph's own memory is not in the table.",
            goals,
            shares,
            f"Parts are timed one by one; together they take {ratios['parts_over_tove']:.2f} times the tower's time.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images at a time (default: 16)")
    parser.add_argument(
        "--executions",
        default="concurrent,compiled",
        metavar="A,B",
        help="ways to run the tower beside the default one; compiling takes minutes for large models "
        "(default: concurrent,compiled)",
    )
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
