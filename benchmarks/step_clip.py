"""What the hub costs beside CLIP alone: the same step, with the preset's experts and without any."""

import gc
from typing import Any

import torch
from common import Bench, build_llava, measure, ratio, table
from step_flops import step_flops_on_meta, without_experts
from step_parts import TrainingStep, make_batch

from tove_llava.presets import load_preset
from tove_llava.train.recomputation import FULL, NONE, set_checkpointing

# stage -> (tokens of text beside the picture's, supervised ones, most times the step of CLIP alone): captions, and
# the mean of LLaVA-1.5's mix
STAGES = {"pretrain": (32, 24, 1.14), "finetune_lora": (200, 100, 1.09)}
COUNTED = "vicuna-7b"  # by shapes, wherever this runs


def measure_beside_clip(bench: Bench, weights: str) -> dict[str, Any]:
    """Seconds of a step with and without experts, in turn; and FLOPs of both at the size of :data:`COUNTED`."""
    found = {}
    for name in (name for name in STAGES if name in bench.preset.stages):
        found[name] = {"time": _times(bench, weights, name), "flops": _flops(name)}
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _times(bench: Bench, weights: str, name: str) -> dict[str, float]:
    text, supervised, _ = STAGES[name]
    hub = bench.preset
    size = bench.args.batch or hub.stage(name).arguments.get("per_device_train_batch_size", 8)
    runs = {}
    try:
        for label, preset in (("hub", hub), ("clip", without_experts(hub))):
            bench.preset = preset
            step = TrainingStep(build_llava(bench, weights), preset.stage(name), bench.dtype)
            batch = make_batch(step.model, size, text, bench.dtype, bench.args.seed, supervised=supervised)
            set_checkpointing(step.model, FULL if bench.device.type == "cuda" else NONE)
            runs[label] = lambda step=step, batch=batch: step(batch)
    finally:
        bench.preset = hub
    repeats = {"repeats": bench.args.mix_repeats, "warmup": 2}
    samples = measure(runs, device=bench.device, **repeats)
    return {**ratio(samples["hub"], samples["clip"]), "hub": samples["hub"].median, "clip": samples["clip"].median}


def _flops(name: str) -> dict[str, float]:
    text, supervised, _ = STAGES[name]
    preset = load_preset(COUNTED)
    hub, clip = (step_flops_on_meta(p, name, text, supervised) for p in (preset, without_experts(preset)))
    return {"value": hub / clip, "hub": hub, "clip": clip}


def clip_targets(bench: Bench, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Times count at true size on a GPU alone; FLOPs anywhere."""
    rows = []
    for name, row in found.items():
        goal = {"target": STAGES[name][2], "at_least": False}
        time = row["time"]["value"] if bench.device.type == "cuda" else None
        rows.append({"name": f"time of {name} with the hub over CLIP alone", "value": time, **goal})
        what = f"FLOPs of one step with the hub over CLIP alone, {COUNTED}, {name}"
        rows.append({"name": what, "value": row["flops"]["value"], **goal})
    return rows


def render_clip(preset: str, found: dict[str, Any]) -> str:
    """The section of the page."""
    rows = []
    for name, row in found.items():
        time, flops = row["time"], row["flops"]
        spread = f"{time['value']:.2f} ({time['paired_q1']:.2f} to {time['paired_q3']:.2f})"
        rows.append([f"{name}, time of a step, `{preset}`", spread, f"{STAGES[name][2]:g} at true size on a GPU"])
        share = f"{flops['value']:.3f} ({flops['hub'] / 1e12:.1f} over {flops['clip'] / 1e12:.1f} TFLOP a sample)"
        rows.append([f"{name}, FLOPs of one step, `{COUNTED}`", share, f"{STAGES[name][2]:g}"])
    return "\n\n".join(
        [
            "## With the hub, over CLIP alone",
            table(["", "hub over CLIP alone", "at most"], rows),
            "The same code with and without experts, one picture a record and "
            + ", ".join(f"{text} tokens of text ({name})" for name, (text, _, _) in STAGES.items())
            + ". In the small presets experts are large beside the language model.",
        ]
    )
