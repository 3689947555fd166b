"""Calibration records over random images, and small checkpoints of every kind."""

import dataclasses
import json
import shutil

import torch
from answer_parts import picture
from train_parts import write_parts

from tove_llava import build_model, load_preset
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.checkpoints.saving import save_checkpoint
from tove_llava.train.stages import freeze

KINDS = {"trained": "pretrain", "lora": "finetune_lora", "full": "finetune"}
EXPERTS = ("normal", "segmentation", "extra")


def conversation(*texts):
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def write_records(root, images=4):
    """Write calibration.json and images/.

    Each image has two records, of three types; one reply is long, and one record has no image.
    """
    (root / "images").mkdir(parents=True)
    rows = []
    for index in range(2 * images):
        name = f"{index % images}.png"
        picture(index % images).save(root / "images" / name)
        reply = "a long reply that has more words than are counted" if index == 3 else ("yes", "No.")[index % 2]
        turns = conversation(f"<image>\nWhat is number {index}?", reply, "And then?", "nothing" * (1 + index % 2))
        category = ("count", "colour", "shape")[index % 3]
        rows.append({"id": f"r{index}", "image": name, "category": category, "conversations": turns})
    rows.append({"id": "text", "conversations": conversation("Hi", "yes")})
    (root / "calibration.json").write_text(json.dumps(rows))
    return root / "calibration.json"


def write_checkpoint(root, kind, *overrides, name="model", self_contained=False):
    """Save a checkpoint with random trained weights.

    ``extra`` is an expert whose source is ``root/extra``.
    """
    if not (root / "preset.yaml").exists():
        write_parts(root)
        shutil.copytree(root / "segmentation", root / "extra")
    entries = [
        {"name": "normal", "source": f"hf:{root / 'normal'}", "mode": "map"},
        {"name": "segmentation", "source": f"hf:{root / 'segmentation'}", "mode": "features"},
        {"name": "extra", "expert": "segmentation", "source": f"hf:{root / 'extra'}", "mode": "map"},
    ]
    given = [f"vision.experts={json.dumps(entries)}", *overrides]
    preset = load_preset(str(root / "preset.yaml"), given)
    stage = preset.stage(KINDS[kind])
    model, processor = build_model(preset, template=stage.template)
    names = set(freeze(model, stage).names())
    generator = torch.Generator().manual_seed(5)
    trained = {n: p.detach() for n, p in model.named_parameters() if n in names}
    for parameter in trained.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    manifest = Manifest(kind, KINDS[kind], "tiny", stage.template, "pad", 400, dataclasses.asdict(preset.language))
    save_checkpoint(root / name, model, processor, manifest, trained, self_contained=self_contained)
    return root / name
