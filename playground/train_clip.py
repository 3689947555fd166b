"""Train a tiny CLIP on playground scenes and their captions.

    python playground/train_clip.py --out tove_llava/bundled/clip

The folder holds both towers and the tokenizer in transformers' format. An interrupted run continues where it stopped.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scene_cache import CAPTIONS, SIZE, held_out, load_scenes
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from training import Run, train
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from tove_llava.scenes import Scene, caption, render, sample_scene
from tove_llava.scenes.objects import COLOURS, SHAPES
from tove_llava.scenes.world import scene_rng

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own
PATCH = 16
TEXT_LENGTH = 40  # tokens; the longest caption of five objects has 32
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>", "eos_token": "</s>"}
MAX_SCALE = 100.0  # of the logits, as in CLIP
SCENES = 16_000


def build_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """Build a lower-case tokenizer of the captions' words and punctuation."""
    normalizer = normalizers.Lowercase()
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))})
    # CLIPTextModel takes the first eos as the sentence's token, unless eos has the number 2; here it has 3.
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    ends = [(SPECIAL[key], vocabulary[SPECIAL[key]]) for key in ("bos_token", "eos_token")]
    tokenizer.post_processor = processors.TemplateProcessing(f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=TEXT_LENGTH, **SPECIAL)


def build(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "projection_dim": 128,
    }
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
        "projection_dim": 128,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    place_patches(model)
    return model


@torch.no_grad()
def place_patches(model: CLIPModel) -> None:
    """Start patch positions as sines and cosines of the patches' size.

    From small random positions, a contrastive loss over a few minutes keeps next to no trace of where a patch is (a
    linear probe of the tokens explained 8 % of the column), and a LLaVA on top cannot say where things are. A residual
    stream that starts larger keeps the layers from drowning the positions.
    """
    embeddings = model.vision_model.embeddings
    side, width = SIZE // PATCH, embeddings.embed_dim
    where = torch.arange(side) * (2 * math.pi / (2 * side))  # half a turn over the image at the lowest frequency
    waves = where[:, None] * torch.arange(1, width // 4 + 1).clamp(max=side)[None]  # [side, width/4]
    axis = torch.cat([waves.sin(), waves.cos()], dim=1)  # [side, width/2]
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).reshape(side * side, width)
    embeddings.position_embedding.weight[1:] = 0.7 * grid
    model.vision_model.pre_layrnorm.weight.fill_(3.0)


def normalised(images: np.ndarray, device: str) -> Tensor:
    """Convert uint8 [B,S,S,3] to normalised [B,3,S,S]."""
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (MEAN, STD))
    return (pixels - mean) / std


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return ids [B, longest]; the causal tower never sees the padding."""
    return tokenizer(texts, padding=True, return_tensors="pt").input_ids


def mirrored(text: str) -> str:
    """Return the caption of the mirrored image."""
    other = {"left": "right", "right": "left"}
    return " ".join(other.get(word, word) for word in text.split(" "))


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Compute CLIP's loss (Radford et al. 2021, arXiv 2103.00020, figure 3)."""
    logits = scale.exp().clamp(max=MAX_SCALE) * image.float() @ text.float().T  # [B,B]
    match = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2


@torch.inference_mode()
def evaluate(model: CLIPModel, tokenizer, count: int, seed: int, device: str = "cpu") -> dict[str, float]:
    """Measure retrieval among held-out scenes, and a linear probe's accuracy."""
    model.eval()
    scenes = [sample_scene(seed, "val", i) for i in range(count)]
    images = np.stack([view.image for view in held_out(count, seed)])
    texts = [caption(scene, scene_rng(seed, "val", i, purpose=1)) for i, scene in enumerate(scenes)]
    outputs = [
        model(
            input_ids=encode(texts[i : i + 100], tokenizer).to(device),
            pixel_values=normalised(images[i : i + 100], device),
        )
        for i in range(0, count, 100)
    ]
    similarity = torch.cat([o.image_embeds for o in outputs]) @ torch.cat([o.text_embeds for o in outputs]).T  # [n,n]
    metric = {}
    for group in sorted({min(100, count), count}):
        blocks = [similarity[i : i + group, i : i + group] for i in range(0, count - group + 1, group)]
        metric[f"image_to_text_r1_of_{group}"] = float(np.mean([_recall(block) for block in blocks]))
        metric[f"text_to_image_r1_of_{group}"] = float(np.mean([_recall(block.T) for block in blocks]))
    return {**metric, **probe(model, count, seed, device)}


def _recall(similarity: Tensor) -> float:
    return (similarity.argmax(1) == torch.arange(len(similarity), device=similarity.device)).float().mean().item()


def probe(model: CLIPModel, count: int, seed: int, device: str) -> dict[str, float]:
    """Measure a ridge classifier on patch tokens mostly on one object."""
    found = {}
    train_tokens, train_labels = _object_tokens(model, "parts", 2 * count, seed, device)
    test_tokens, test_labels = _object_tokens(model, "val", count, seed, device)
    side = range(SIZE // PATCH)
    for key, classes in (("colour", tuple(COLOURS)), ("shape", SHAPES), ("column", side), ("row", side)):
        truth = torch.tensor([classes.index(labels[key]) for labels in train_labels])
        wanted = torch.tensor([classes.index(labels[key]) for labels in test_labels])
        ridge = train_tokens.T @ train_tokens + 1e-2 * len(train_tokens) * torch.eye(train_tokens.shape[1])
        weights = torch.linalg.solve(ridge, train_tokens.T @ F.one_hot(truth, len(classes)).float())
        found[f"probe_{key}"] = float(((test_tokens @ weights).argmax(1) == wanted).float().mean())
        found[f"probe_{key}_majority"] = float((wanted == truth.mode().values).float().mean())
    return found


def _object_tokens(model: CLIPModel, split: str, count: int, seed: int, device: str) -> tuple[Tensor, list]:
    """Return standardised tokens [T, width + 1] (last: ones) and their labels."""
    grid = SIZE // PATCH
    tokens, labels = [], []
    for start in range(0, count, 100):
        scenes: list[Scene] = [sample_scene(seed, split, i) for i in range(start, min(start + 100, count))]
        views = [render(scene, SIZE) for scene in scenes]
        pixels = normalised(np.stack([view.image for view in views]), device)
        hidden = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].float().cpu()
        for scene, view, row in zip(scenes, views, hidden, strict=True):
            patches = view.instances.reshape(grid, PATCH, grid, PATCH).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
            for place, patch in enumerate(patches):
                share = np.bincount(patch[patch >= 0], minlength=len(scene.objects)) / patch.size
                if share.max() > 0.5:
                    tokens.append(row[place])
                    item = scene.objects[int(share.argmax())]
                    labels.append(
                        {"colour": item.colour, "shape": item.shape, "column": place % grid, "row": place // grid}
                    )
    stacked = torch.stack(tokens)
    return torch.cat([F.layer_norm(stacked, stacked.shape[-1:]), torch.ones(len(stacked), 1)], dim=1), labels


@torch.no_grad()
def rescale_tokens(model: CLIPModel, images: np.ndarray, device: str) -> None:
    """Scale the residual stream so that patch tokens have variance 1.

    The tokens are those before the last layer. Every layer reads the stream through a LayerNorm, so the model computes
    what it did. Trained fast, its tokens have the size 5 in each dimension, from which a new projector learns badly.
    """
    vision = model.vision_model
    tokens = vision(normalised(images, device), output_hidden_states=True).hidden_states[-2][:, 1:]
    scale = 1 / tokens.flatten(0, 1).var(dim=0).mean().sqrt()
    writers = [part for layer in vision.encoder.layers for part in (layer.self_attn.out_proj, layer.mlp.fc2)]
    for module in (vision.pre_layrnorm, *writers):
        module.weight.mul_(scale)
        module.bias.mul_(scale)


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(out)


def card(run: Run, args: argparse.Namespace, metric: dict[str, float], model: CLIPModel) -> str:
    rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in metric.items())
    place = "one GPU" if args.device.startswith("cuda") else f"{args.threads} thread(s) of a shared server CPU"
    vision = sum(p.numel() for p in model.vision_model.parameters()) / 1e6
    total = sum(p.numel() for p in model.parameters()) / 1e6
    settings = f"--steps {args.steps} --batch {args.batch} --scenes {args.scenes} --seed {args.seed}"
    return f"""---
license: apache-2.0
library_name: transformers
---

# Tiny CLIP

A CLIP for {SIZE}-pixel pictures of playground scenes: patches of {PATCH} pixels ({(SIZE // PATCH) ** 2} tokens),
{total:.1f} M parameters, of which {vision:.1f} M are the vision tower's; a word-level tokenizer of
{model.config.text_config.vocab_size} tokens for the text tower.

- **Data**: {args.scenes:,} scenes of the split "parts" (seed {args.seed}), which has none of the held-out
  colour-shape pairs, with {CAPTIONS} captions each (`tove_llava.scenes.caption`); half of the samples mirrored, "left"
  and "right" in their captions exchanged. No pictures, texts or weights of others.
- **Training**: contrastive, {run.steps:,} steps of {args.batch} pairs, {run.seconds:.0f} s on
  {place}; AdamW, cosine schedule; stored in fp16.
- **Licence**: Apache-2.0, as the project.
- **Command**: `python playground/train_clip.py --out tove_llava/bundled/clip {settings}`

## Held-out metric

{args.eval_scenes} scenes of the split "val" (seed {args.seed}), one caption each, with the stored weights.
`r1_of_n`: share of pictures (captions) whose own caption (picture) is the most similar of n. `probe_*`: a ridge
classifier on the patch tokens of the layer before the last, for tokens mostly on one object, fitted on other scenes;
`_majority` is the share of the commonest class, for comparison.

| metric | value |
| --- | --- |
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the weights and their card")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--eval-scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path, help="where an interrupted run resumes (playground/data/runs/clip)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    scenes = load_scenes(args.scenes, args.seed, with_captions=True)
    tokenizer = build_tokenizer([text for row in scenes.captions for text in row])
    model = build(tokenizer).to(args.device)
    print(f"clip: {sum(p.numel() for p in model.parameters()):,} parameters, {len(scenes.image):,} scenes", flush=True)

    def loss_of_step(step: int) -> Tensor:
        rng = np.random.default_rng([args.seed, step])
        rows = rng.choice(len(scenes.image), size=args.batch, replace=False)
        images, texts = scenes.image[rows], [scenes.captions[row][rng.integers(CAPTIONS)] for row in rows]
        for i in np.flatnonzero(rng.random(args.batch) < 0.5):
            images[i], texts[i] = images[i, :, ::-1].copy(), mirrored(texts[i])
        ids, pixels = encode(texts, tokenizer).to(args.device), normalised(images, args.device)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            out = model(input_ids=ids, pixel_values=pixels)
        return contrastive_loss(out.image_embeds, out.text_embeds, model.logit_scale)

    run = train(
        model,
        loss_of_step,
        steps=args.steps,
        batch=args.batch,
        learning_rate=args.learning_rate,
        weight_decay=0.1,
        state=args.state or Path(__file__).parent / "data" / "runs" / "clip",
        signature={key: getattr(args, key) for key in ("steps", "batch", "learning_rate", "scenes", "seed")},
    )
    model.eval()
    rescale_tokens(model, scenes.image[:500], args.device)
    save(model, tokenizer, args.out)
    stored = CLIPModel.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    metric = evaluate(stored, tokenizer, args.eval_scenes, args.seed, args.device)
    (args.out / "README.md").write_text(card(run, args, metric, stored))
    print(f"clip: {json.dumps(metric)}; wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
