"""Train a tiny expert on playground scenes: depth, normals, edges or segmentation.

    python playground/train_expert.py --task depth --out tove_llava/bundled/depth

Each is a SegFormer for 96-pixel images whose output has a quarter of their resolution, in the format of any
transformers checkpoint, so that the hub's dense experts read it. An interrupted run continues where it stopped.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scene_cache import SIZE, held_out, load_scenes, metres, targets
from torch import Tensor
from training import Run, train
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from tove_llava.scenes import Rendering
from tove_llava.scenes.render import CLASSES, FAR, SKY

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as SegFormer's own checkpoints
DEPTH_LIMIT = 20.0  # metres; farther ground counts as sky
SCENES = 16_000


@dataclass(frozen=True)
class Task:
    """One kind of expert: its labels, loss and held-out metric."""

    labels: tuple[str, ...]
    loss: Callable[[Tensor, Tensor], Tensor]  # prediction and target, both [B, labels, g, g]
    measure: Callable[[Tensor, list[Rendering]], dict[str, float]]  # predictions [n, labels, g, g] in float32
    meaning: str  # of the output
    rule: str  # of the metric


def depth_loss(prediction: Tensor, target: Tensor) -> Tensor:
    # Close to the relative error of depth, but bounded where the inverse depth goes to zero.
    return ((prediction - target).abs() / (target + 0.1)).mean()


def normal_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(prediction, target, dim=1)).mean() + 0.5 * F.l1_loss(prediction, target)


def edge_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(prediction, target)


def segmentation_loss(prediction: Tensor, target: Tensor) -> Tensor:
    # Sky and ground fill most cells and are learned at once; the shapes are the hard part.
    weight = torch.tensor([1.0, 1.0, 4.0, 4.0, 4.0, 4.0], device=target.device)
    return F.cross_entropy(prediction, target / target.sum(1, keepdim=True), weight=weight)


def measure_depth(predictions: Tensor, views: list[Rendering]) -> dict[str, float]:
    truth = np.stack([view.depth for view in views])
    near = truth < DEPTH_LIMIT
    truth, found = truth[near], metres(_enlarge(predictions).squeeze(1).numpy())[near]
    ratio = np.maximum(truth / found, found / truth)
    return {
        "abs_rel": float((np.abs(found - truth) / truth).mean()),
        "delta_1.25": float((ratio < 1.25).mean()),
        "abs_rel_of_constant": float((np.abs(np.median(truth) - truth) / truth).mean()),
    }


def measure_normal(predictions: Tensor, views: list[Rendering]) -> dict[str, float]:
    truth = torch.from_numpy(np.stack([view.normals for view in views])).permute(0, 3, 1, 2)
    solid = torch.from_numpy(np.stack([view.instances != SKY for view in views]))
    cosine = F.cosine_similarity(F.normalize(_enlarge(predictions), dim=1), truth, dim=1)[solid]
    angles = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
    return {"mean_degrees": float(angles.mean()), "median_degrees": float(angles.median())}


def measure_edge(predictions: Tensor, views: list[Rendering]) -> dict[str, float]:
    truth = torch.from_numpy(np.stack([targets(view)["edge"] for view in views])).permute(0, 3, 1, 2).bool()
    probability = predictions.sigmoid()
    best = max(
        ((*_f1(probability > threshold, truth), threshold) for threshold in np.linspace(0.1, 0.9, 17)),
        key=lambda row: row[0],
    )
    return {"f1": best[0], "f1_no_tolerance": best[1], "threshold": round(float(best[2]), 2)}


def _f1(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Compute F1 with a tolerance of one cell (8 neighbours) and without.

    With tolerance, a found cell next to a true one is right, and a true one next to a found one is found.
    """

    def grown(cells: Tensor) -> Tensor:
        return F.max_pool2d(cells.float(), 3, stride=1, padding=1).bool()

    def score(right: Tensor, hit: Tensor) -> float:
        precision = right.sum().item() / max(1, found.sum().item())
        recall = hit.sum().item() / max(1, truth.sum().item())
        return 2 * precision * recall / max(1e-9, precision + recall)

    return score(found & grown(truth), truth & grown(found)), score(found & truth, found & truth)


def measure_segmentation(predictions: Tensor, views: list[Rendering]) -> dict[str, float]:
    truth = np.stack([view.classes for view in views])
    found = _enlarge(predictions).argmax(1).numpy()
    scores = {}
    for index, name in enumerate(CLASSES):
        union = ((truth == index) | (found == index)).sum()
        scores[f"iou_{name}"] = float(((truth == index) & (found == index)).sum() / max(1, union))
    return {"miou": float(np.mean(list(scores.values()))), **scores}


def _enlarge(maps: Tensor) -> Tensor:
    return F.interpolate(maps, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


TASKS = {
    "depth": Task(
        ("inverse_depth",),
        depth_loss,
        measure_depth,
        f"one channel, 2 m * (1/depth - 1/{FAR:.0f} m): linear in inverse depth, larger is nearer, 0 is the sky",
        f"at 96 px (prediction enlarged bilinearly), pixels nearer than {DEPTH_LIMIT:.0f} m:\n"
        "mean absolute relative error of depth in metres, without any alignment of scale or shift; share within a\n"
        "factor of 1.25; and the error of the median depth of all pictures, for comparison",
    ),
    "normal": Task(
        ("right", "up", "towards_viewer"),
        normal_loss,
        measure_normal,
        "three channels, normal in camera axes (right, up, towards the viewer), to be normalised;\n"
        "  (0, 0, -1) for the sky",
        "at 96 px (prediction enlarged bilinearly), pixels that are not sky:\nmean and median angle to the true normal",
    ),
    "edge": Task(
        ("edge",),
        edge_loss,
        measure_edge,
        "one channel, logit that the 4x4-pixel cell holds an edge (outline or crease of an object)",
        "cells of 4x4 pixels, one threshold for all pictures, the best of 0.10, 0.15, ... 0.90;\nf1 tolerates one cell "
        "(8 neighbours), f1_no_tolerance none",
    ),
    "segmentation": Task(
        CLASSES,
        segmentation_loss,
        measure_segmentation,
        "six channels, logits of " + ", ".join(CLASSES),
        "at 96 px (logits enlarged bilinearly): intersection over union, over all pictures together;\nmiou is its mean",
    ),
}


def build(task: Task) -> SegformerForSemanticSegmentation:
    config = SegformerConfig(
        hidden_sizes=[32, 48, 80, 112],
        depths=[1, 1, 2, 1],
        num_attention_heads=[1, 2, 4, 4],
        sr_ratios=[4, 2, 1, 1],  # 36 keys per query in the first three stages, 9 in the last
        mlp_ratios=[2, 2, 3, 3],
        decoder_hidden_size=64,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        id2label=dict(enumerate(task.labels)),
        label2id={label: index for index, label in enumerate(task.labels)},
    )
    return SegformerForSemanticSegmentation(config)


def normalised(images: np.ndarray, device: str) -> Tensor:
    """Convert uint8 [B,S,S,3] to normalised [B,3,S,S]."""
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (MEAN, STD))
    return (pixels - mean) / std


def augmented(images: np.ndarray, target: np.ndarray, task: str, rng: np.random.Generator) -> tuple:
    """Mirror half of the images (and their normals' x); change their brightness."""
    flip = rng.random(len(images)) < 0.5
    images, target = images.copy(), target.astype(np.float32)
    images[flip], target[flip] = images[flip, :, ::-1], target[flip, :, ::-1]
    if task == "normal":
        target[flip, ..., 0] *= -1
    gain = rng.uniform(0.8, 1.2, size=(len(images), 1, 1, 1)).astype(np.float32)
    return np.clip(images * gain, 0, 255).astype(np.uint8), target


@torch.inference_mode()
def evaluate(model: torch.nn.Module, task: str, count: int, seed: int, device: str = "cpu") -> dict[str, float]:
    """Compute a task's metric on ``count`` scenes that no part has seen."""
    model.eval()
    views = held_out(count, seed)
    images = np.stack([view.image for view in views])
    chunks = [model(normalised(images[i : i + 64], device)).logits.float().cpu() for i in range(0, count, 64)]
    return TASKS[task].measure(torch.cat(chunks), views)


def save(model: torch.nn.Module, out: Path) -> None:
    model.half().save_pretrained(out)
    preprocessor = {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_reduce_labels": False,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def card(task: str, run: Run, args: argparse.Namespace, metric: dict[str, float], parameters: int) -> str:
    rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in metric.items())
    place = "one GPU" if args.device.startswith("cuda") else f"{args.threads} thread(s) of a shared server CPU"
    return f"""---
license: apache-2.0
library_name: transformers
---

# Tiny {task} expert

A SegFormer of {parameters / 1e6:.2f} M parameters for {SIZE}-pixel pictures of playground scenes;
its output is {SIZE // 4} x {SIZE // 4}.

- **Output**: {TASKS[task].meaning}.
- **Data**: {args.scenes:,} scenes of the split "parts" (seed {args.seed}), which has none of the held-out
  colour-shape pairs; mirrored, brightness varied. Generated by `tove_llava.scenes`: no pictures, weights or
  annotations of others.
- **Training**: {run.steps:,} steps of {args.batch} pictures, {run.seconds:.0f} s on {place};
  AdamW, cosine schedule; stored in fp16.
- **Licence**: Apache-2.0, as the project.
- **Command**:
  `{_command(args)}`

## Held-out metric

{args.eval_scenes} scenes of the split "val" (seed {args.seed}), with the stored weights.
Rule: {TASKS[task].rule}.

| metric | value |
| --- | --- |
{rows}
"""


def _command(args: argparse.Namespace) -> str:
    settings = f"--steps {args.steps} --batch {args.batch} --scenes {args.scenes} --seed {args.seed}"
    return f"python playground/train_expert.py --task {args.task} --out tove_llava/bundled/{args.task} {settings}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=sorted(TASKS))
    parser.add_argument("--out", required=True, type=Path, help="folder for the weights and their card")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--eval-scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path, help="where an interrupted run resumes (playground/data/runs/<task>)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    task = TASKS[args.task]
    scenes = load_scenes(args.scenes, args.seed)
    images, target = scenes.image, getattr(scenes, args.task)
    model = build(task).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.task}: {parameters:,} parameters, {len(images):,} scenes", flush=True)

    def loss_of_step(step: int) -> Tensor:
        start, rows = step * args.batch, []
        while len(rows) < args.batch:  # the epochs' permutations, one after another
            epoch, offset = divmod(start + len(rows), len(images))
            order = np.random.default_rng([args.seed, epoch]).permutation(len(images))
            rows.extend(order[offset : offset + args.batch - len(rows)])
        batch, truth = augmented(images[rows], target[rows], args.task, np.random.default_rng([args.seed, step, 1]))
        truth = torch.from_numpy(truth).to(args.device).permute(0, 3, 1, 2)
        return task.loss(model(normalised(batch, args.device)).logits, truth)

    run = train(
        model,
        loss_of_step,
        steps=args.steps,
        batch=args.batch,
        learning_rate=args.learning_rate,
        weight_decay=0.05,
        state=args.state or Path(__file__).parent / "data" / "runs" / args.task,
        signature={key: getattr(args, key) for key in ("task", "steps", "batch", "learning_rate", "scenes", "seed")},
    )
    save(model, args.out)
    stored = SegformerForSemanticSegmentation.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    metric = evaluate(stored, args.task, args.eval_scenes, args.seed, args.device)
    (args.out / "README.md").write_text(card(args.task, run, args, metric, parameters))
    print(f"{args.task}: {json.dumps(metric)}; wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
