"""Measure the hub's cost over plain CLIP in the fast step."""

from contextlib import ExitStack
from typing import Any

from common import Bench, target
from measuring import measure, ratio
from step_flops import step_flops_on_meta, without_experts
from step_parts import SharedModel, make_batch, packed
from step_paths import FastPath

from tove_llava.core.text import markdown_table
from tove_llava.llava.build import vision_config
from tove_llava.presets import load_preset
from tove_llava.tower import ToveVisionModel

# stage -> (tokens of text besides the image's, supervised ones, most times the step of only CLIP): captions, and
# the mean of LLaVA-1.5's mix
STAGES = {"pretrain": (32, 24, 1.14), "finetune_lora": (200, 100, 1.09)}
COUNTED = "vicuna-7b"  # from shapes, on any machine


def measure_beside_clip(bench: Bench, shared: SharedModel, name: str) -> dict[str, Any]:
    """Time a step with and without experts, in turn."""
    text, supervised, _ = STAGES[name]
    stage = bench.preset.stage(name)
    size = bench.args.batch or stage.arguments.get("per_device_train_batch_size", 8)
    with shared.step(stage) as step, ExitStack() as stack:
        towers = {"hub": step.model.tower, "clip": clip_alone(bench, step.model.tower)}
        stack.callback(setattr, step.model.model, "vision_tower", towers["hub"])
        batch = make_batch(step.model, size, text, bench.dtype, bench.args.seed, supervised=supervised)
        row, fast, now = packed(batch), FastPath(bench, step, stage), ""

        def prepare(label: str) -> None:
            nonlocal now
            if label == now:
                return
            path.close()
            step.model.model.vision_tower = towers[label]
            path.enter_context(fast.on([row["pixel_values"]]))
            now = label

        path = stack.enter_context(ExitStack())
        fast.fit_budget(batch, [row["pixel_values"]])
        samples = measure(
            dict.fromkeys(("hub", "clip"), lambda: step(row)),
            repeats=bench.args.mix_repeats,
            warmup=2,
            device=bench.device,
            prepare=prepare,
            is_over=bench.is_over,
        )
    found = {**ratio(samples["hub"], samples["clip"]), "hub": samples["hub"].median, "clip": samples["clip"].median}
    return {**found, "checkpointing": fast.kind, "execution": fast.execution, "fused_kernels": fast.kernels}


def clip_alone(bench: Bench, tower: ToveVisionModel) -> ToveVisionModel:
    """Build the preset's tower without experts, around the same CLIP.

    One whose experts are detached would still train its gate, so that parameters stay in step on all ranks.
    """
    config = vision_config(without_experts(bench.preset).vision, offline=True)
    alone = ToveVisionModel(config).to(tower.device, tower.dtype).train(tower.training)
    alone.frozen.clip = tower.frozen.clip
    return alone


def flops_beside_clip(name: str) -> dict[str, float]:
    """Count a step's operations with experts over those without."""
    text, supervised, _ = STAGES[name]
    preset = load_preset(COUNTED)
    hub, clip = (step_flops_on_meta(p, name, text, supervised) for p in (preset, without_experts(preset)))
    return {"value": hub / clip, "hub": hub, "clip": clip}


def clip_targets(bench: Bench, found: dict[str, Any], lost: dict[str, str]) -> list[dict[str, Any]]:
    """List the targets: times at true size, FLOPs anywhere."""
    rows = []
    for name, row in found.items():
        goal, time, flops = STAGES[name][2], row["time"], row["flops"]
        value = time["value"] if time and bench.device.type == "cuda" else None
        what = f"time of {name} with the hub over CLIP alone"
        rows.append(target(what, value, goal, at_least=False, reason=lost.get(time_part(name))))
        what = f"FLOPs of one step with the hub over CLIP alone, {COUNTED}, {name}"
        value, reason = flops and flops["value"], lost.get(flops_part(name), "not yet")
        rows.append(target(what, value, goal, at_least=False, reason=reason))
    return rows


def time_part(name: str) -> str:
    return f"{name} beside CLIP alone"


def flops_part(name: str) -> str:
    return f"operations of {name} beside CLIP alone"


def render_clip(preset: str, found: dict[str, Any]) -> str:
    """Write the page's section."""
    rows = []
    for name, row in found.items():
        time, flops = row["time"], row["flops"]
        if time:
            spread = f"{time['value']:.2f} ({time['paired_q1']:.2f} to {time['paired_q3']:.2f})"
            how = f"checkpointing {time['checkpointing']}, tower {time['execution']}"
            wanted = f"{STAGES[name][2]:g} at true size on a GPU"
            rows.append([f"{name}, time of a step, `{preset}`; {how}", spread, wanted])
        if flops:
            share = f"{flops['value']:.3f} ({flops['hub'] / 1e12:.1f} over {flops['clip'] / 1e12:.1f} TFLOP a sample)"
            rows.append([f"{name}, FLOPs of one step, `{COUNTED}`", share, f"{STAGES[name][2]:g}"])
    return "\n\n".join(
        [
            "## With the hub, over CLIP alone",
            markdown_table(["", "hub over CLIP alone", "at most"], rows),
            "The same code and model with and without its experts, one row without padding, one picture a record and "
            + ", ".join(f"{text} tokens of text ({name})" for name, (text, _, _) in STAGES.items())
            + ". In the small presets experts are large beside the language model.",
        ]
    )
