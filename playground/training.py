"""The shared loop of the parts' trainings: resumable, with schedule and progress."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SAVE_EVERY = 60.0  # seconds
REPORT_EVERY = 15.0  # seconds
WARMUP = 0.05  # share of all steps


@dataclass
class Run:
    """A training's steps, and its seconds over all its sessions."""

    steps: int
    seconds: float


def train(
    model: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    state: Path,
    signature: dict,
) -> Run:
    """Train by AdamW with a cosine schedule, warm-up, and clipping at 1.

    Args:
        model: trained in place.
        loss_of_step: the loss of one step; everything random in it has to follow from the step's number, so that a
            resumed training is the uninterrupted one.
        batch: samples of a step, for the progress line.
        state: folder from which an interrupted training resumes and to which it saves itself every minute.
        signature: settings; a state of other settings is an error.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    first, seconds = _resume(state, model, optimizer, signature)
    model.train()
    started = reported = saved = time.time()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _share(step, steps)
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        now = time.time()
        if now - reported > REPORT_EVERY or step + 1 == steps:
            rate = (step + 1 - first) / (now - started)
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.4f}  {rate * batch:.0f} samples/s  "
                f"ETA {(steps - step - 1) / rate:.0f} s",
                flush=True,
            )
            reported = now
        if now - saved > SAVE_EVERY or step + 1 == steps:
            _save(state, model, optimizer, signature, step + 1, seconds + now - started)
            saved = now
    return Run(steps, seconds + time.time() - started)


def _share(step: int, steps: int) -> float:
    """Return the learning rate's share of its peak."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _save(state: Path, model: nn.Module, optimizer, signature: dict, step: int, seconds: float) -> None:
    state.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, state / f"model-{step}.safetensors")
    torch.save(optimizer.state_dict(), state / f"optimizer-{step}.pt")
    progress = {"step": step, "seconds": seconds, "signature": signature}
    unfinished = state / "progress.json.part"
    unfinished.write_text(json.dumps(progress))
    os.replace(unfinished, state / "progress.json")  # from here on the new files count
    for file in state.glob("*-*.*"):
        if file.stem.split("-")[-1] != str(step):
            file.unlink()


def _resume(state: Path, model: nn.Module, optimizer, signature: dict) -> tuple[int, float]:
    file = state / "progress.json"
    if not file.exists():
        return 0, 0.0
    progress = json.loads(file.read_text())
    if progress["signature"] != signature:
        raise SystemExit(
            f"{state} holds a training of other settings ({progress['signature']}, now {signature}); "
            "delete it or give another --state"
        )
    step = progress["step"]
    model.load_state_dict(load_file(state / f"model-{step}.safetensors"))
    optimizer.load_state_dict(torch.load(state / f"optimizer-{step}.pt", weights_only=True))
    print(f"resuming at step {step} from {state}", flush=True)
    return step, progress["seconds"]
