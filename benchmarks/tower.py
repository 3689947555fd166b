"""Measure the tower: images/s, memory, and each expert's share of the time.

Contenders, timed in turn within one run:

- ToVE: the tower, encoders and fusion, as it runs by default, and by each further execution that it has
  (docs/guides/train.md).
- loop: the same encoders as public multi-encoder codebases run them, one whole network after another, eagerly: CLIP to
  its last layer with every hidden state kept, transformers through their last block, dense predictors with their
  decoder; then the same fusion. Attention kernels, dtype and device are the same.
- CLIP: only CLIP, up to the layer whose tokens are used.

Each execution's features are compared with the plain tower's; one that differs by more than rounding does not count.
A contender that fails is listed with its reason; the others are measured.

    python benchmarks/tower.py                                       # bundled weights
    python benchmarks/tower.py --preset vicuna-7b --device cuda      # true size, random weights
"""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from common import (
    Bench,
    argument_parser,
    circumstances,
    lost_table,
    milliseconds,
    run_command,
    target,
    targets_table,
    write_results,
)
from measuring import MB, Samples, count_flops, matrix_product, measure, peak_memory, ratio, synchronize, without_tf32
from models import build_tower, count_parameters, fill_randomly, vision_sources, weight_bytes, whole_clip
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, CLIPVisionModel

from tove_llava.core.errors import ConfigError
from tove_llava.core.text import markdown_table
from tove_llava.experts import Expert, build_expert
from tove_llava.experts.cost import expert_cost
from tove_llava.llava.build import vision_config
from tove_llava.presets import load_preset
from tove_llava.tower import ToveVisionModel, TowerFeatures
from tove_llava.tower.execution import EXECUTIONS, execution_mode

# The project's targets: images/s over the loop's; the rest for the published models, of which the first needs no GPU.
OVER_LOOP = {"cpu": 1.3, "cuda": 2.0}
TRUE_SIZE, TFLOP_PER_IMAGE = "vicuna-7b", 1.3
TRUE_SIZE_WORK = f"TFLOP per image, {TRUE_SIZE}"
SHARE_OF_MATRIX_PRODUCT, FUSION_SHARE = 0.55, 0.08
# Relative to the features' size. In 16 bits the plain tower rounds too (EVA-02-L by itself is 1.6e-2 off float32): an
# execution may be FARTHER times as far from float32 as the plain tower, plus SLACK.
EXACT, FARTHER, SLACK = 1e-5, 1.1, 1e-3
PROFILED = 5  # runs


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
        """Return CLIP's tokens ``[B,N,d]``, as LLaVA takes them."""
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
    """Convert CLIP-normalised pixels to 0..1, which experts take."""
    mean = torch.tensor(tower.config.image_mean, device=pixel_values.device).view(1, 3, 1, 1)
    std = torch.tensor(tower.config.image_std, device=pixel_values.device).view(1, 3, 1, 1)
    return (pixel_values.float() * std + mean).clamp(0, 1)


def counted_tflop(preset: str) -> float:
    """Count the TFLOP per image of a tower from shapes."""
    config = vision_config(load_preset(preset).vision, offline=True)
    tower = ToveVisionModel(config).eval()
    features = tower.blank_inputs(tower.device, tower.dtype)["vision_features"]
    with torch.device("meta"):
        built = config.clip_config.to_dict() | {"num_hidden_layers": config.num_clip_layers}
        clip = CLIPVisionModel(CLIPVisionConfig(**built))
        pixels = torch.empty(1, 3, config.clip_config.image_size, config.clip_config.image_size)
    own = count_flops(lambda: clip(pixels)) + count_flops(lambda: tower.fuse(features))
    return (own + sum(expert_cost(build_expert(spec)).flops for spec in config.expert_specs)) / 1e12


Encoded = dict[str, torch.Tensor]


def optimised(tower: ToveVisionModel, pixel_values: torch.Tensor, name: str) -> ToveVisionModel:
    """Copy the tower under another execution, compiled and recorded."""
    other = copy.deepcopy(tower).set_execution(name)
    other.encode(pixel_values)
    return other


def encoded(features: TowerFeatures) -> Encoded:
    """Return every encoder's output in float32."""
    return {name: value.float() for name, value in {"CLIP": features.base, **features.experts}.items()}


def exact_features(tower: ToveVisionModel, pixel_values: torch.Tensor) -> Encoded | None:
    """Return the plain tower's float32 output; None if it has that."""
    if tower.dtype == torch.float32:
        return None
    with without_tf32():
        return encoded(copy.deepcopy(tower).float().encode(pixel_values.float()))


def compare(actual: TowerFeatures, plain: TowerFeatures, exact: Encoded | None) -> dict[str, Any]:
    """Compare an execution's features with the exact ones, by encoder.

    Errors are relative to the features' size. In float32 the plain tower's features count as exact (see :data:`EXACT`).
    In 16 bits two ways of rounding differ more from each other than from the truth, so both are compared with float32.
    """
    got, own = encoded(actual), encoded(plain)
    distance = {name: _distance(got[name], (exact or own)[name]) for name in own}
    allowed = {name: EXACT if exact is None else FARTHER * _distance(own[name], exact[name]) + SLACK for name in own}
    worst = max(own, key=lambda name: distance[name] / allowed[name])
    return {
        "equal": all(distance[name] <= allowed[name] for name in own),  # not where a value is NaN
        "compared_with": "plain tower" if exact is None else "float32",
        "worst": worst,
        "distance": distance,
        "allowed": allowed,
    }


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class Towers:
    """The tower, its optimised copies, the loop, and how each is timed.

    Attributes:
        contenders, parts: what is compared; the parts make up the tower.
        further: the fusion of each copy, and the matrix product.
        copies: names of contenders that are optimised copies.
        equality: by copy, as :func:`compare` returns it.
    """

    def __init__(self, bench: Bench, tower: ToveVisionModel, record: dict[str, Any], executions: Sequence[str]) -> None:
        batch, size = bench.args.batch, tower.config.image_size
        generator = torch.Generator().manual_seed(bench.args.seed)
        pixel_values = torch.randn(batch, 3, size, size, generator=generator).to(bench.device, bench.dtype)
        pixels, features = to_unit_range(tower, pixel_values), tower.encode(pixel_values)
        self.tower = tower
        self.loop = bench.attempt(record, TITLES["loop"], lambda: whole_loop(tower, features, pixel_values))
        exact = bench.attempt(record, "float32 features", partial(exact_features, tower, pixel_values))
        made: dict[str, ToveVisionModel] = {}
        self.equality: dict[str, Any] = {}
        for name in executions:
            key = f"tove_{name}"
            other = bench.attempt(record, TITLES[key], partial(optimised, tower, pixel_values, name))
            if other is not None:
                made[key] = other
                if exact is not None or tower.dtype == torch.float32:
                    self.equality[key] = compare(other.encode(pixel_values), features, exact)
        loop = self.loop
        self.contenders: dict[str, Callable[[], Any]] = {
            "tove": lambda: tower(pixel_values),
            **{name: partial(other, pixel_values) for name, other in made.items()},
            **({} if loop is None else {"loop": partial(loop, pixel_values)}),
            "clip": lambda: tower.frozen.encode(pixel_values, [], strict=False),
        }
        hub = tower.frozen.hub
        self.parts = {
            "part/clip": self.contenders["clip"],
            **{f"part/{name}": partial(hub[name], pixels) for name in tower.active_experts},
            "part/fusion": lambda: tower.fuse(features),
        }
        product, self.product_flops = matrix_product(bench.device, bench.dtype)
        self.further = {f"fusion/{name}": partial(other.fuse, features) for name, other in made.items()}
        self.further["matrix_product"] = product
        self.copies = list(made)

    def keep(self, samples: Mapping[str, Samples]) -> None:
        """Leave out what could not be measured."""
        self.contenders = {name: run for name, run in self.contenders.items() if name in samples}
        self.parts = {name: run for name, run in self.parts.items() if name in samples}
        self.copies = [name for name in self.copies if name in samples and f"fusion/{name}" in samples]

    def weights(self) -> dict[str, int]:
        """Return the bytes of each contender."""
        tower, loop = self.tower, self.loop
        whole = weight_bytes(tower.frozen.clip, tower.frozen.hub, tower.fusion)
        return {
            **dict.fromkeys(["tove", *self.copies], whole),
            "loop": 0 if loop is None else weight_bytes(loop.clip, *loop.experts.values(), tower.fusion),
            "clip": weight_bytes(tower.frozen.clip),
        }


@torch.no_grad()
def benchmark(bench: Bench) -> dict[str, Any]:
    args = bench.args
    executions = [name for name in args.executions.split(",") if name]
    for name in executions:
        execution_mode(name)
    weights = bench.weights(vision_sources(bench.preset))
    tower = build_tower(bench, weights)
    if not tower.active_experts:
        raise ConfigError(f"preset {bench.preset.name!r} has no experts; there is nothing to compare")
    config = tower.config
    record = bench.record(
        "tower", weights, batch=args.batch, image_size=config.image_size, tokens_per_image=config.num_patches
    )
    towers, lost = Towers(bench, tower, record, executions), {}
    samples = measure(
        towers.contenders | towers.parts | towers.further,
        repeats=args.repeats,
        warmup=args.warmup,
        device=bench.device,
        lost=lost,
        is_over=bench.is_over,
    )
    record["not_measured"] |= {TITLES.get(name, name): reason for name, reason in lost.items()}
    towers.keep(samples)
    whole_tflop = bench.attempt(record, TRUE_SIZE_WORK, partial(counted_tflop, TRUE_SIZE))
    _fill(record, bench, towers, samples, whole_tflop)
    if args.profile:
        runs = {name: towers.contenders[name] for name in ("tove", "loop") if name in towers.contenders}
        record["profile"] = bench.attempt(
            record, "profile", lambda: {name: profile_kinds(run, bench.device) for name, run in runs.items()}
        )
    record["targets"] = targets(record, bench.device.type)
    write_results(args.output, record, render(record))
    return record


def _fill(
    record: dict[str, Any], bench: Bench, towers: Towers, samples: dict[str, Samples], whole_tflop: float | None
) -> None:
    """Add contenders, parts, ratios and figures to a record."""
    tower, batch, copies = towers.tower, bench.args.batch, towers.copies
    memory = {name: peak_memory(run, bench.device) for name, run in towers.contenders.items()}
    counted = {name: run for name, run in (towers.contenders | towers.parts).items() if name not in copies}
    flops = {name: count_flops(run) / batch for name, run in counted.items()}
    flops |= dict.fromkeys(copies, flops["tove"])  # the same work; compiled code cannot be counted
    held = towers.weights()
    record["equality"] = towers.equality
    record["contenders"] = {
        name: {
            **samples[name].to_dict(),
            "images_per_second": batch / samples[name].median,
            "gflop_per_image": flops[name] / 1e9,
            "weight_bytes": held[name],
            "peak_bytes_above_weights": memory[name],
        }
        for name in towers.contenders
    }
    total = sum(samples[part].median for part in towers.parts)
    total_cpu = sum(samples[part].cpu_median for part in towers.parts)
    modules = {"clip": tower.frozen.clip, "fusion": tower.fusion}
    modules |= {name: tower.frozen.hub[name] for name in tower.active_experts}
    record["parts"] = {}
    for part in towers.parts:
        name = part.removeprefix("part/")
        record["parts"][name] = {
            **samples[part].to_dict(),
            "share_of_time": samples[part].median / total,
            "share_of_cpu_time": samples[part].cpu_median / total_cpu,
            "gflop_per_image": flops[part] / 1e9,
            "parameters": count_parameters(modules[name]),
            "weight_bytes": weight_bytes(modules[name]),
        }
    over_loop = ["tove", *copies] if "loop" in samples else []
    record["ratios"] = {
        "tove_over_clip": ratio(samples["tove"], samples["clip"]),
        "parts_over_tove": total / samples["tove"].median,
        **{f"loop_over_{name}": ratio(samples["loop"], samples[name]) for name in over_loop},
    }
    equal = [name for name in copies if towers.equality.get(name, {}).get("equal")]
    record["figures"] = figures(samples, equal, flops["tove"] * batch, towers.product_flops)
    record["figures"]["tflop_per_image_at_true_size"] = whole_tflop


def whole_loop(tower: ToveVisionModel, features: TowerFeatures, pixel_values: torch.Tensor) -> WholeEncoders:
    """Build the loop, with the same CLIP."""
    loop = WholeEncoders(tower, features)
    torch.testing.assert_close(loop.base(pixel_values), features.base, rtol=2e-2, atol=2e-2)
    return loop


def figures(samples: dict[str, Samples], towers: list[str], flops: float, product_flops: float) -> dict[str, Any]:
    """Name the fastest execution; compute its gain and utilisation.

    Args:
        towers: executions whose features are equal to the plain tower's.
        flops: of the tower for one batch.
        product_flops: of the matrix product.
    """
    best = min(["tove", *towers], key=lambda name: samples[name].median)
    fusion = samples["part/fusion" if best == "tove" else f"fusion/{best}"]
    achieved = flops / samples[best].median / 1e12
    ceiling = product_flops / samples["matrix_product"].median / 1e12
    return {
        "fastest": best,
        "over_loop": samples["loop"].median / samples[best].median if "loop" in samples else None,
        "achieved_tflops": achieved,
        "matrix_product_tflops": ceiling,
        "share_of_matrix_product": achieved / ceiling,
        "fusion_share_of_time": fusion.median / samples[best].median,
    }


def targets(record: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """List the targets, None where only a GPU can measure one."""
    found, lost = record["figures"], record["not_measured"]

    def on_gpu(key: str) -> float | None:
        return found[key] if device == "cuda" else None

    fusion = "share of time of gate, projections and transfer, GPU"
    return [
        target(
            f"images/s of {TITLES[found['fastest']]} over the loop's",
            found["over_loop"],
            OVER_LOOP[device],
            reason=lost.get(TITLES["loop"]),
        ),
        target(
            TRUE_SIZE_WORK,
            found["tflop_per_image_at_true_size"],
            TFLOP_PER_IMAGE,
            at_least=False,
            reason=lost.get(TRUE_SIZE_WORK),
        ),
        target("share of the matrix-product ceiling, GPU", on_gpu("share_of_matrix_product"), SHARE_OF_MATRIX_PRODUCT),
        target(fusion, on_gpu("fusion_share_of_time"), FUSION_SHARE, at_least=False),
    ]


# Operators by what they do; all others are counted under "rest". Convolutions and attention come as one call here.
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"),
    "convolutions": ("convolution", "mkldnn_convolution", "cudnn_convolution", "thnn_conv2d", "slow_conv2d"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "softmax"),
    "norms": ("layer_norm", "group_norm", "batch_norm", "rms_norm"),
    "copies": ("copy_", "clone", "contiguous", "cat", "index", "fill_", "zero_"),
}


def kind_of(operator: str) -> str:
    """Return an operator's kind by its profile name (``aten::addmm``)."""
    name = operator.rpartition("::")[2].lstrip("_")
    for kind, names in KINDS.items():
        if any(name == known or (len(known) > 8 and known in name) for known in names):
            return kind
    return "rest"


def profile_kinds(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Measure each kind of operator's own share of the time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorder:
        for _ in range(PROFILED):
            run()
        synchronize(device)
    spent = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in recorder.key_averages():
        if event.key.startswith("aten::"):
            on_gpu = device.type == "cuda"
            spent[kind_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: time / total for kind, time in spent.items()}


TITLES = {
    "tove": "ToVE tower",
    **{f"tove_{name}": f"ToVE tower, {name}" for name in EXECUTIONS},
    "loop": "loop over whole encoders",
    "clip": "CLIP alone",
}


def render(record: dict[str, Any]) -> str:
    """Write the record as Markdown."""
    batch, ratios = record["settings"]["batch"], record["ratios"]
    speed = []
    for name, row in record["contenders"].items():
        speed.append([TITLES[name], f"{row['images_per_second']:.4g}", *_per_image(row, batch)])
        speed[-1] += [f"{row[key] / MB:.4g}" for key in ("weight_bytes", "peak_bytes_above_weights")]
    shares = []
    for name, row in record["parts"].items():
        time, _, work = _per_image(row, batch)
        shares.append([name, f"{row['share_of_time']:.1%}", f"{row['share_of_cpu_time']:.1%}", time, work])
        shares[-1] += [f"{row['parameters'] / 1e6:.4g}", f"{row['weight_bytes'] / MB:.4g}"]
    found = record["figures"]
    loop, clip = ratios.get("loop_over_tove"), ratios["tove_over_clip"]
    beside = (
        ""
        if loop is None
        else (
            f"is **{loop['value']:.2f} times** as fast as the loop (quartiles {loop['paired_q1']:.2f} to "
            f"{loop['paired_q3']:.2f} repeat by repeat; {loop['cpu_time']:.2f} in processor time), and "
        )
    )
    time, work = "ms per image (quartiles)", "GFLOP per image"
    over = "" if loop is None else f"**{found['over_loop']:.2f} times** as fast as the loop, "
    return "\n\n".join(
        [
            "# The tower's speed",
            circumstances(record),
            *lost_table(record),
            markdown_table(
                ["", "images/s", time, "CPU ms per image", work, "weights MB", "peak above weights MB"], speed
            ),
            f"The tower {beside}takes "
            f"**{clip['value']:.2f} times** the time of CLIP alone ({clip['paired_q1']:.2f} to "
            f"{clip['paired_q3']:.2f}; {clip['cpu_time']:.2f} in processor time).",
            f"Fastest: {TITLES[found['fastest']]}, {over}"
            f"{found['achieved_tflops']:.3g} TFLOP/s, {found['share_of_matrix_product']:.0%} of the matrix product's "
            f"{found['matrix_product_tflops']:.3g}; gate, projections and transfer take "
            f"{found['fusion_share_of_time']:.1%} of its time. Executions are those of docs/guides/train.md. "
            "What they compile and record was made before; the memory of a CUDA graph is not in the table.",
            *_equality(record["equality"]),
            targets_table(record["targets"]),
            markdown_table(
                ["part", "share of the time", "of CPU time", time, work, "parameters M", "weights MB"], shares
            ),
            f"Parts are timed one by one; together they take {ratios['parts_over_tove']:.2f} times the tower's time.",
            *_profile(record.get("profile")),
        ]
    )


def _per_image(row: dict[str, Any], batch: int) -> list[str]:
    cpu = f"{row['cpu_seconds']['median'] * 1e3 / batch:.3g}"
    return [milliseconds(row["wall_seconds"]["values"], batch), cpu, f"{row['gflop_per_image']:.4g}"]


def _equality(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in found.items():
        distance, allowed = row["distance"][row["worst"]], row["allowed"][row["worst"]]
        state = "equal" if row["equal"] else "**different**, and does not count"
        rows.append([TITLES[name], f"{distance:.1e} ({row['worst']})", f"{allowed:.1e}", row["compared_with"], state])
    return [markdown_table(["features, relative to their size", "off by", "at most", "from", ""], rows)] if rows else []


def _profile(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    kinds = list(next(iter(found.values())))
    rows = [[TITLES[name], *(f"{shares[kind]:.0%}" for kind in kinds)] for name, shares in found.items()]
    return ["Share of the time that operators take themselves, by kind:", markdown_table(["", *kinds], rows)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, limit=True)
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images at a time (default: 16)")
    parser.add_argument(
        "--executions",
        default="concurrent,compiled",
        metavar="A,B",
        help="ways to run the tower beside the default one; compiling takes minutes for large models "
        "(default: concurrent,compiled)",
    )
    parser.add_argument("--profile", action="store_true", help="also what kinds of operators take the time")
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
