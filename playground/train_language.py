"""Train the bundled tiny LLaMA and its tokenizer on playground text.

    python playground/train_language.py --out tove_llava/bundled/llm

A language model that is to read images should already be able to reason about a scene (as Vicuna can). The text is
scene descriptions, and LLaVA-format conversations about them. In most conversations the scene is not written out: it
is a *word grid*, 36 places in reading order, each holding the weighted sum of the embeddings of the words that are true
of that place. The model thus learns to read several words in one token, as projected vision tokens require. No image
and no vision feature takes part.

Runs on the CPU or a GPU; re-running the command continues from the last saved state.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tove_llava.data import encode_record, load_tokenizer
from tove_llava.data.records import parse_record
from tove_llava.data.templates import get_template
from tove_llava.scenes import ask, caption, describe, sample_scene
from tove_llava.scenes.language import (
    COLUMNS,
    MEASURES,
    METRES,
    ROWS,
    SHORT_ANSWER,
    SIZES,
    Question,
    contrast,
    metres,
    size,
)
from tove_llava.scenes.objects import COLOURS, SHAPES, Scene
from tove_llava.scenes.render import coverage
from tove_llava.scenes.world import scene_rng

GRID = 6  # places per side of a word grid: the vision tokens of the tiny CLIP
LENGTHS = {"caption": 112, "conversation": 448}  # tokens per sequence after a grid is expanded
DESCRIBE = "Describe the scene."
SEED = 20250400
BLURRED = 0.5  # share of the grids that lack words and are noisy
NOISE = 0.3  # largest standard deviation of the noise in each dimension; a word's embedding has about 0.1
EVALUATION = 20_000_000  # first scene index of the held-out text

# The words that may stand at a place, in the order of a grid's weights.
GRID_WORDS = (*COLUMNS, *ROWS, *COLOURS, *SHAPES, *METRES, *SIZES, "empty")
Optimizers = list[torch.optim.Optimizer]
WORD_INDEX = {word: i for i, word in enumerate(GRID_WORDS)}


@dataclass
class Sample:
    """A sequence: ``ids`` and ``weights`` [L], ``grid`` [36, words] at ``start``."""

    ids: list[int]
    weights: list[float]
    answers: list[str]
    grid: np.ndarray | None
    noise: float
    start: int


def train_tokenizer(folder: Path) -> None:
    """Train a SentencePiece BPE model that keeps each scene word whole."""
    lines = []
    v1 = get_template("v1")
    for i in range(6000):
        scene, rng = sample_scene(SEED, "parts", i), scene_rng(SEED, "parts", i, 1)
        turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": describe(scene)}]
        questions = [*ask(scene, rng), *drill(scene, rng, 2)]
        for q in questions:
            lines += [f"USER: {q.text} ASSISTANT: {q.answer}", f"USER: {q.text}\n{SHORT_ANSWER} ASSISTANT: {q.answer}"]
        lines += [caption(scene, rng), turns[1]["value"], f"USER: {DESCRIBE} ASSISTANT: {turns[1]['value']}"]
        if i % 10 == 0:
            lines += [v1.system]
    lines += [f"{word} " * 3 for word in GRID_WORDS] * 200
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in lines for line in text.split("\n")),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=768,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        user_defined_symbols=["<image>"],
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def grid_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the ids of a grid's words, as texts use them."""
    return torch.tensor([tokenizer.convert_tokens_to_ids(w if w in ROWS else "▁" + w) for w in GRID_WORDS])


def word_grid(scene: Scene, rng: np.random.Generator, blurred: bool = False) -> np.ndarray:
    """Return weights [36, words]: each place's column, row, and objects' words.

    Objects weigh what they fill. No vision token is exact, so weights are jittered and words sometimes dropped. A
    blurred grid lacks whole groups of words, so that a projector that has learned only one group is understood.
    """
    grid = np.zeros((GRID, GRID, len(GRID_WORDS)), dtype=np.float32)
    share = np.sqrt(coverage(scene, GRID))  # [6, 6, objects]
    for row in range(GRID):
        for column in range(GRID):
            grid[row, column, [WORD_INDEX[COLUMNS[column]], WORD_INDEX[ROWS[row]]]] = 0.7
    for item, part in zip(scene.objects, np.moveaxis(share, -1, 0), strict=True):
        for word in (item.colour, item.shape, metres(item), size(item)):
            grid[..., WORD_INDEX[word]] += part
    grid[..., WORD_INDEX["empty"]] = np.maximum(0.0, 1.0 - share.sum(-1))
    grid *= np.exp(0.15 * rng.standard_normal(grid.shape)) * (rng.random(grid.shape) > 0.04)
    if blurred:
        for group in (COLUMNS, ROWS, tuple(COLOURS), SHAPES, METRES, SIZES, ("empty",)):
            if rng.random() < 0.25:
                grid[..., [WORD_INDEX[word] for word in group]] = 0.0
    return grid.reshape(GRID * GRID, -1)


def conversation(
    scene: Scene,
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerBase,
    manner: str,
    rounds: int = 2,
    hints: float = 0.0,
    blurred: bool = False,
) -> Sample:
    """Make a sequence: "text", "grid", "described" (both) or "caption" (stage 1's).

    ``hints`` is the share of comparisons before which the two things to be compared are asked for; ``blurred`` takes
    words out of the grid and puts noise in.
    """
    template, turns = "v1", []
    if manner == "caption":
        template = "plain"
        turns = [("<image>", describe(scene))]
    else:
        asked = [q for _ in range(rounds) for q in [*ask(scene, rng), *drill(scene, rng)]]
        questions = [
            part for q in asked for part in ([*steps_towards(scene, q, rng), q] if rng.random() < hints else [q])
        ]
        if manner == "described":
            turns.append((f"<image>\n{DESCRIBE}", describe(scene)))
        opening = {"text": describe(scene) + "\n", "grid": "<image>\n", "described": ""}[manner]
        for i, q in enumerate(questions):
            text = f"{opening}{q.text}\n{SHORT_ANSWER}" if i == 0 else q.text
            turns.append((text, q.answer))
    messages = [
        {"from": who, "value": said} for turn in turns for who, said in zip(("human", "gpt"), turn, strict=True)
    ]
    raw = {"id": "", "conversations": messages}
    if manner != "text":
        raw["image"] = "grid"
    encoded = encode_record(parse_record(raw), tokenizer, template)
    background = 0.05 if manner == "text" else 0.02
    ids, weights, start = [], [], -1
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if token == -200:
            start = len(ids)
            ids += [0] * (GRID * GRID)
            weights += [0.0] * (GRID * GRID)
        else:
            ids.append(token)
            weights.append(1.0 if label >= 0 else background)
    grid = word_grid(scene, rng, blurred) if manner != "text" else None
    noise = rng.uniform(0.0, NOISE) if blurred else 0.0
    answers = [] if manner == "caption" else [q.category for q in questions]
    return Sample(ids, weights, answers, grid, noise, start)


def drill(scene: Scene, rng: np.random.Generator, count: int = 6) -> list[Question]:
    """Make questions of one look each: descriptions, colours, shapes, and contrasts."""
    questions = []
    for kind in rng.choice(list(DRILLS), p=list(DRILLS.values()), size=count):
        first, second = (scene.objects[i] for i in rng.permutation(len(scene.objects))[:2])
        if kind == "contrast":
            questions.append(Question(kind, *contrast(first, second)))
        elif kind in MEASURES:
            questions.append(Question(kind, *MEASURES[kind](first)))
        else:
            questions += ask(scene, rng, (kind,))
    return questions


DRILLS = {
    "place": 0.12,
    "distance": 0.12,
    "size": 0.12,
    "colour": 0.16,
    "shape": 0.08,
    "existence": 0.16,
    "contrast": 0.24,
}
COMPARED = {
    "left_right": "place",
    "above_below": "place",
    "front_behind": "distance",
    "nearer": "distance",
    "bigger": "size",
}


def steps_towards(scene: Scene, question: Question, rng: np.random.Generator) -> list[Question]:
    """Return the questions whose answers lead to a comparison's answer."""
    named = sorted((o for o in scene.objects if o.name in question.text), key=lambda o: question.text.index(o.name))
    if len(named) == 2 and rng.random() < 0.5:
        return [Question("contrast", *contrast(*named))]
    kind = COMPARED.get(question.category)
    return [Question(kind, *MEASURES[kind](item)) for item in named] if kind else []


MANNERS = {"text": 0.12, "grid": 0.68, "described": 0.2}


def batches(
    tokenizer: PreTrainedTokenizerBase, grid_ids: torch.Tensor, step: int, steps: int, size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches from a step on, each step with its own scenes.

    The curriculum: for the first third mostly descriptions (they teach reading a grid: every word of an answer is
    supervised), then mostly conversations, in which simpler questions at first lead up to comparisons. A batch of
    descriptions has as many tokens as one of conversations.
    """
    while True:
        rng = np.random.default_rng([SEED, step])
        kind = "caption" if rng.random() < (0.8 if step < 0.3 * steps else 0.15) else "conversation"
        count = size * LENGTHS["conversation"] // LENGTHS[kind]
        samples = []
        for index in range(step * size * 4, step * size * 4 + count):
            scene, rng = sample_scene(SEED, "parts", index), scene_rng(SEED, "parts", index, 2)
            manner = kind if kind == "caption" else str(rng.choice(list(MANNERS), p=list(MANNERS.values())))
            # Half of the comparisons have such questions at first, and ever fewer towards the end.
            hints = 0.5 * max(0.0, 1 - max(0.0, step / steps - 0.6) / 0.3)
            blurred = bool(rng.random() < BLURRED)
            samples.append(conversation(scene, rng, tokenizer, manner, hints=hints, blurred=blurred))
        yield collate(samples, grid_ids, LENGTHS[kind])
        step += 1


def collate(samples: list[Sample], grid_ids: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
    """Pad samples to ids and weights [B, L], and to grids."""
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    weights = torch.zeros(len(samples), length)
    grids = torch.zeros(len(samples), GRID * GRID, len(grid_ids))
    starts = torch.tensor([s.start for s in samples])
    noise = torch.tensor([s.noise for s in samples])
    for i, sample in enumerate(samples):
        n = min(len(sample.ids), length)
        ids[i, :n] = torch.tensor(sample.ids[:n])
        weights[i, :n] = torch.tensor(sample.weights[:n])
        if sample.grid is not None:
            grids[i] = torch.from_numpy(sample.grid)
    return {"ids": ids, "weights": weights, "grids": grids, "noise": noise, "starts": starts}


def embed(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], grid_ids: torch.Tensor) -> torch.Tensor:
    table = model.get_input_embeddings().weight
    embeds = torch.nn.functional.embedding(batch["ids"], table)  # [B, L, D]
    words = batch["grids"] @ table[grid_ids]  # [B, 36, D]
    words = words + batch["noise"][:, None, None] * torch.randn_like(words)
    rows = torch.nonzero(batch["starts"] >= 0).squeeze(1)
    places = batch["starts"][rows, None] + torch.arange(GRID * GRID, device=rows.device)  # [b, 36]
    return embeds.index_put((rows[:, None], places), words[rows].to(embeds.dtype))


def loss_of(model: LlamaForCausalLM, decoder, batch: dict[str, torch.Tensor], grid_ids: torch.Tensor):
    """Return the weighted cross-entropy, and which supervised tokens were right."""
    hidden = decoder(inputs_embeds=embed(model, batch, grid_ids), use_cache=False).last_hidden_state[:, :-1]
    targets, weights = batch["ids"][:, 1:], batch["weights"][:, 1:]
    kept = weights > 0
    logits = model.lm_head(hidden[kept]).float()
    losses = torch.nn.functional.cross_entropy(logits, targets[kept], reduction="none")
    loss = (losses * weights[kept]).sum() / weights.sum()
    supervised = weights[kept] == 1.0
    return loss, losses, supervised, (logits.argmax(-1) == targets[kept])[supervised]


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, decoder, tokenizer, grid_ids: torch.Tensor, device: str, scenes: int = 96
) -> dict:
    """Measure perplexity and, by type, the share of answers predicted whole."""
    model.eval()
    right: dict[str, list[bool]] = {}
    total, count = 0.0, 0
    for manner in ("text", "grid"):
        samples = [
            conversation(sample_scene(SEED, "parts", i), scene_rng(SEED, "parts", i, 2), tokenizer, manner)
            for i in range(EVALUATION, EVALUATION + scenes)
        ]
        for first in range(0, scenes, 32):
            chunk = samples[first : first + 32]
            batch = {k: v.to(device) for k, v in collate(chunk, grid_ids, LENGTHS["conversation"]).items()}
            hidden = decoder(inputs_embeds=embed(model, batch, grid_ids), use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1]).float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:], reduction="none")
            if manner == "text":
                written = batch["weights"][:, 1:] > 0
                total, count = total + float(losses[written].sum()), count + int(written.sum())
            hits = logits.argmax(-1) == batch["ids"][:, 1:]  # [B, L-1]
            for sample, hit, weight in zip(chunk, hits.tolist(), batch["weights"][:, 1:].tolist(), strict=True):
                spans, open_span = [], False
                for h, w in zip(hit, weight, strict=True):
                    if w == 1.0:
                        if not open_span:
                            spans.append(True)
                        spans[-1] &= h
                    open_span = w == 1.0
                for category, ok in zip(sample.answers, spans, strict=False):
                    right.setdefault(f"{manner}/{category}", []).append(ok)
    model.train()
    return {"perplexity": math.exp(total / count), **{k: float(np.mean(v)) for k, v in sorted(right.items())}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("playground/data/language"), help="where the state is kept")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=200, help="steps between states")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)

    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.model").exists():
        train_tokenizer(args.out)
    tokenizer = load_tokenizer(args.out)
    tokenizer.save_pretrained(args.out)
    grid_ids = grid_tokens(tokenizer)
    unknown = [w for w, i in zip(GRID_WORDS, grid_ids.tolist(), strict=True) if i == tokenizer.unk_token_id]
    if unknown:
        raise SystemExit(f"the tokenizer has no piece of its own for {unknown}")

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).to(args.device)
    decoder = torch.compile(model.model, dynamic=False)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    # Muon (Jordan et al. 2024) with its steps scaled to AdamW's size (Liu et al. 2025, arXiv 2502.16982), so that both
    # take one learning rate. On these lessons it needs a fraction of AdamW's steps.
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    warmup = 60
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1.0, (s + 1) / warmup) * (0.02 + 0.98 * max(0.0, 1 - s / args.steps))
        )
        for optimizer in optimizers
    ]
    state_file, log_file = args.work / "state.safetensors", args.work / "log.jsonl"
    step, seconds = 0, 0.0
    if state_file.exists():
        step, seconds = restore(state_file, model, optimizers, schedulers)
        print(f"continuing at step {step}", flush=True)
        if step >= args.steps:
            export(model, args.out)
            write_card(args.out, log_file, args, model.num_parameters())
    source = batches(tokenizer, grid_ids, step, args.steps, args.batch)
    bf16 = torch.autocast(args.device, torch.bfloat16)
    model.train()
    begun, running = time.time(), None
    while step < args.steps:
        batch = {k: v.to(args.device) for k, v in next(source).items()}
        with bf16:
            loss, _, _, hits = loss_of(model, decoder, batch, grid_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        now = (float(loss.detach()), float(hits.float().mean()))
        running = now if running is None else tuple(0.95 * r + 0.05 * n for r, n in zip(running, now, strict=True))
        if step % 10 == 0:
            spent = time.time() - begun
            rate = spent / max(1, (step % args.save_every) or args.save_every)
            eta = (args.steps - step) * rate / 60
            print(
                f"step {step}/{args.steps}  loss {running[0]:.3f}  answers {running[1]:.3f}  "
                f"{rate:.2f} s/step  ETA {eta:.0f} min",
                flush=True,
            )
        if step % args.save_every == 0 or step == args.steps:
            seconds += time.time() - begun
            with bf16:
                scores = evaluate(model, decoder, tokenizer, grid_ids, args.device)
            with log_file.open("a") as log:
                log.write(json.dumps({"step": step, "loss": running[0], "seconds": seconds, **scores}) + "\n")
            print(" ".join(f"{k} {v:.2f}" for k, v in scores.items()), flush=True)
            save(state_file, model, optimizers, step, seconds)
            export(model, args.out)
            write_card(args.out, log_file, args, model.num_parameters())
            begun = time.time()


def moments(optimizers: Optimizers) -> Iterator[tuple[str, torch.Tensor, dict]]:
    """Yield each trained tensor's name, itself, and its optimizer's state."""
    for i, optimizer in enumerate(optimizers):
        for j, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            yield f"optimizer.{i}.{j}.", p, optimizer.state[p]


def save(
    file: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    tensors = {f"model.{k}": v.detach().cpu().clone() for k, v in model.state_dict().items()}
    for name, _, state in moments(optimizers):
        tensors |= {name + key: value.detach().cpu().clone() for key, value in state.items()}
    fresh = file.with_suffix(".new")
    save_file(tensors, fresh, metadata={"step": str(step), "seconds": str(seconds)})
    fresh.replace(file)


def restore(
    file: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], schedulers
) -> tuple[int, float]:
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        about = handle.metadata()
    tensors = load_file(file)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    step = int(about["step"])
    for name, p, state in moments(optimizers):
        found = {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
        state |= {k: v if k == "step" else v.to(p.device) for k, v in found.items()}
    for scheduler in schedulers:
        for _ in range(step):
            scheduler.step()
    return step, float(about["seconds"])


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model in half precision."""
    half = {k: v.detach().to(torch.float16).cpu() for k, v in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)


def write_card(folder: Path, log: Path, args: argparse.Namespace, parameters: int) -> None:
    """Write the model card, with the log's last held-out scores."""
    entry = json.loads(log.read_text().splitlines()[-1])
    kinds = sorted(key[5:] for key in entry if key.startswith("grid/"))
    rows = "\n".join(f"| {k} | {100 * entry['text/' + k]:.0f} | {100 * entry['grid/' + k]:.0f} |" for k in kinds)
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: transformers
---

# Tiny LLaMA

A LLaMA of {parameters / 1e6:.1f} M parameters ({args.layers} layers of width {args.hidden}) and its SentencePiece
tokenizer, trained from nothing on text about playground scenes. It speaks of nothing else.

- **Data**: descriptions of scenes of the split "parts" and LLaVA-format conversations about them, made by
  `tove_llava.scenes`; no held-out colour-shape pair, no picture. In most conversations the scene stands as a *word
  grid*: 36 places, each with the weighted sum of the embeddings of the words that are true of it.
- **Training**: {entry["step"]:,} steps of {args.batch} conversations (or as many tokens of descriptions),
  {entry["seconds"]:,.0f} s on {args.threads} thread(s) of a shared server CPU; Muon for
  the layers' matrices and AdamW for the rest, linear decay; stored in fp16.
- **Licence**: Apache-2.0, as the project.
- **Command**: `python playground/train_language.py --out tove_llava/bundled/llm --steps {args.steps}
  --batch {args.batch} --lr {args.lr}`

## Held-out metric

Perplexity of unseen text: **{entry["perplexity"]:.2f}** (questions included, which are drawn at random). Share of
answers whose every token is the likeliest, in percent, on 96 unseen scenes written out as text, and as a word grid:

| question | text | word grid |
| --- | ---: | ---: |
{rows}
"""
    )


if __name__ == "__main__":
    main()
