"""Compare the time that detached experts save with their own share.

Experts are taken out one by one, in the preset's order, down to plain CLIP. Timed in turn within one run:

- the whole tower, and the tower with these experts masked (``detach_experts``);
- the tower of the smaller checkpoint that ``tove-llava detach`` writes: its configuration and its cut tensors, over the
  same encoders. Its tokens are the masked tower's, which is checked;
- each expert by itself, and the fusion with the experts that are left.

An expert's own time is its encoder's, plus what the fusion saves without it.

    python benchmarks/detached.py                                       # bundled weights
    python benchmarks/detached.py --preset vicuna-7b --device cuda      # true size, random weights
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from common import Bench, argument_parser, circumstances, milliseconds, run_command, target, write_results
from measuring import Samples, measure
from models import build_tower, vision_sources
from tower import to_unit_range

from tove_llava.analysis.detach import cut_state, reduced_config
from tove_llava.core.errors import ConfigError
from tove_llava.core.text import markdown_table
from tove_llava.experts import ExpertHub
from tove_llava.tower import ToveVisionModel

KINDS = ("masked", "written")
DISTANCE = 0.1  # of the fall from the share, as a share of the share
TARGET = "distance of the fall of the tower's time from the share of the experts taken out, {}"


def written_tower(tower: ToveVisionModel, experts: Sequence[str]) -> ToveVisionModel:
    """Build the tower of a checkpoint without experts, sharing the encoders."""
    small = ToveVisionModel(reduced_config(tower.config, experts)).eval()
    state = {name: value.cpu() for name, value in tower.fusion.state_dict().items()}
    small.fusion.load_state_dict(cut_state(tower.config, small.config, state))
    small.to(device=tower.device, dtype=tower.dtype)
    small.frozen.clip = tower.frozen.clip
    small.frozen.hub = ExpertHub(small.config.experts)
    for name in small.frozen.hub.names:
        small.frozen.hub.experts[name] = tower.frozen.hub[name]
    return small


def open_fusion(tower: ToveVisionModel, seed: int) -> None:
    """Move a fusion off its initial values, which give only CLIP."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in tower.fusion.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.05 * noise.to(parameter.device, parameter.dtype))


@torch.no_grad()
def benchmark(bench: Bench) -> None:
    weights = bench.weights(vision_sources(bench.preset))
    tower = build_tower(bench, weights)
    names = tower.active_experts
    if not names:
        raise ConfigError(f"preset {bench.preset.name!r} has no experts; there is nothing to take out")
    open_fusion(tower, bench.args.seed)
    batch, size = bench.args.batch, tower.config.image_size
    generator = torch.Generator().manual_seed(bench.args.seed)
    pixel_values = torch.randn(batch, 3, size, size, generator=generator).to(bench.device, bench.dtype)
    pixels, features = to_unit_range(tower, pixel_values), tower.encode(pixel_values)

    gone = {count: names[:count] for count in range(1, len(names) + 1)}
    written = {count: written_tower(tower, subset) for count, subset in gone.items()}
    contenders: dict[str, Callable[[], Any]] = {"whole": lambda: tower(pixel_values)}
    contenders |= {f"masked/{count}": contenders["whole"] for count in gone}
    contenders |= {f"written/{count}": (lambda small=small: small(pixel_values)) for count, small in written.items()}
    contenders |= {f"expert/{name}": (lambda name=name: tower.frozen.hub[name](pixels)) for name in names}
    contenders |= {f"fusion/{count}": (lambda: tower.fuse(features)) for count in (0, *gone)}

    def mask(contender: str) -> None:
        kind, _, count = contender.partition("/")
        tower.config.detached_experts = gone.get(int(count), []) if kind in ("masked", "fusion") else []

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if bench.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for count in gone:
        mask(f"masked/{count}")
        tokens = [run().last_hidden_state for run in (contenders["whole"], contenders[f"written/{count}"])]
        torch.testing.assert_close(*tokens, **tolerance)
    samples = measure(
        contenders, repeats=bench.args.repeats, warmup=bench.args.warmup, device=bench.device, prepare=mask
    )
    tower.config.detached_experts = []

    record = bench.record("detached", weights, batch=batch, image_size=size, tokens_per_image=tower.config.num_patches)
    record["samples"] = {name: taken.to_dict() for name, taken in samples.items()}
    medians = {clock: {n: getattr(taken, key) for n, taken in samples.items()} for clock, key in CLOCKS.items()}
    record["steps"] = [step(medians, subset) for subset in gone.values()]
    record["targets"] = [
        target(TARGET.format(kind), furthest(record["steps"], kind), DISTANCE, at_least=False) for kind in KINDS
    ]
    write_results(bench.args.output, record, render(record, samples))


CLOCKS = {"wall": "median", "cpu": "cpu_median"}


def step(medians: Mapping[str, Mapping[str, float]], gone: Sequence[str]) -> dict[str, Any]:
    """Compare the time that removing these experts saves with their cost.

    Args:
        medians: seconds by clock (``wall``, ``cpu``) and contender.

    Returns:
        by clock ``encoders`` (the removed experts' encoders) and ``share`` (with the fusion's saving too), as shares
        of the whole tower's time; and for each kind of smaller tower the fall, and the fall over the share.
    """
    found: dict[str, Any] = {"removed": list(gone)}
    for clock, seconds in medians.items():
        whole, count = seconds["whole"], len(gone)
        encoders = sum(seconds[f"expert/{name}"] for name in gone)
        share = (encoders + seconds["fusion/0"] - seconds[f"fusion/{count}"]) / whole
        entry: dict[str, Any] = {"encoders": encoders / whole, "share": share}
        for kind in KINDS:
            fall = 1 - seconds[f"{kind}/{count}"] / whole
            entry[kind] = {"fall": fall, "fall_over_share": fall / share}
        found[clock] = entry
    return found


def furthest(steps: Sequence[Mapping[str, Any]], kind: str, clock: str = "wall") -> float:
    """Return the largest relative distance of a fall from its share."""
    return max(abs(entry[clock][kind]["fall_over_share"] - 1) for entry in steps)


def render(record: dict[str, Any], samples: Mapping[str, Samples]) -> str:
    """Write the record as Markdown."""
    batch = record["settings"]["batch"]
    rows = [["none", *[milliseconds(samples["whole"].wall, batch)] * 2, "", "", "", "", ""]]
    for count, entry in enumerate(record["steps"], 1):
        wall = entry["wall"]
        rows.append(
            [
                ", ".join(entry["removed"]),
                *[milliseconds(samples[f"{kind}/{count}"].wall, batch) for kind in KINDS],
                *[f"{wall[kind]['fall']:.1%}" for kind in KINDS],
                f"{wall['share']:.1%} ({wall['encoders']:.1%})",
                *[f"{wall[kind]['fall_over_share']:.2f}" for kind in KINDS],
            ]
        )
    header = ["taken out", "masked: ms per image (quartiles)", "written: ms per image (quartiles)", "masked: fall"]
    header += ["written: fall", "share of the experts (of their encoders)", "masked: fall/share", "written: fall/share"]
    goals = [[row["name"], f"at most {row['target']:g}", f"{row['value']:.3g}"] for row in record["targets"]]
    cpu = ", ".join(f"{furthest(record['steps'], kind, 'cpu'):.3g} {kind}" for kind in KINDS)
    return "\n\n".join(
        [
            "# What detaching saves",
            circumstances(record),
            markdown_table(header, rows),
            markdown_table(["target", "wanted", "measured"], goals),
            f"In processor time: {cpu}.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images at a time (default: 16)")
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
