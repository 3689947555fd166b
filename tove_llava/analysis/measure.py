"""One pass over calibration data, with any subsets of the experts.

The frozen part runs once per image (:meth:`ToveVisionModel.encode`). Its features are fused for each subset, and the
language model reads the result. ``B`` records in a batch, ``N`` vision tokens an image, ``K`` experts.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from tove_llava.analysis.samples import Sample
from tove_llava.core.errors import ConfigError
from tove_llava.data import LlavaCollator
from tove_llava.eval.rules.exact_match import normalise
from tove_llava.inference.generation import Answerer
from tove_llava.tower import FUSIONS, ToveVisionConfig, ToveVisionModel, ToveVisionOutput, TowerFeatures
from tove_llava.tower.fusion.base import Fusion

Subset = tuple[str, ...]  # the experts that are left out
MIN_NEW_TOKENS = 16  # as long as an answer to a question about scenes may be


@dataclass
class Measurement:
    """Results of a pass over samples; lists have one entry a sample.

    Attributes:
        tokens: supervised tokens.
        losses: by subset, the LM loss summed over a sample's supervised tokens.
        right: by subset, True where the greedy answer is the reference's first reply; None where that is not short.
        gate_weights: by image and attached expert, the mean gate weight over tokens; empty for a fusion without a gate.
        norm_shares: by image and attached expert, the mean of ``|G_k P_k| / |T'|`` over tokens.
    """

    tokens: list[int] = field(default_factory=list)
    losses: dict[Subset, list[float]] = field(default_factory=dict)
    right: dict[Subset, list[bool | None]] = field(default_factory=dict)
    gate_weights: dict[Path, dict[str, float]] = field(default_factory=dict)
    norm_shares: dict[Path, dict[str, float]] = field(default_factory=dict)


def tower_with_experts(answerer: Answerer) -> ToveVisionModel:
    """Return the model's tower; refuse one whose experts' parts are not separate.

    Raises:
        ConfigError: the model has no experts, all of them are detached, or its fusion adds no separate part per expert.
    """
    tower = answerer.tower
    if not isinstance(tower, ToveVisionModel) or not tower.fusion.uses_experts or not tower.config.experts:
        raise ConfigError(
            "this model has no experts: its vision tower is plain CLIP. Give a model trained with experts"
        )
    if not tower.config.attached_experts:
        raise ConfigError(f"all experts of this model are detached ({', '.join(tower.config.expert_names)})")
    check_fusion(tower.config)
    return tower


def check_fusion(config: ToveVisionConfig) -> None:
    """Raise ConfigError unless the fusion sums one part per expert."""
    if FUSIONS.get(config.fusion).transfers is Fusion.transfers:
        raise ConfigError(
            f"fusion {config.fusion!r} does not add one part per expert to CLIP's tokens, so experts cannot be "
            "compared with each other or removed from its checkpoint; this works for tove, top1, add and replace"
        )


@contextmanager
def without(tower: ToveVisionModel, names: Sequence[str]) -> Iterator[None]:
    """Detach only these experts in a ``with`` block, then undo that."""
    before = list(tower.config.detached_experts)
    tower.detach_experts(names)
    try:
        yield
    finally:
        tower.config.detached_experts = before


@torch.inference_mode()
def measure(
    answerer: Answerer, samples: Sequence[Sample], subsets: Sequence[Subset], *, batch_size: int = 16, label: str = ""
) -> Measurement:
    """Measure loss and answers under every subset, gate weights and norm shares.

    Args:
        samples: those that share an image should be neighbours: an image's features are kept while they are needed.
        subsets: experts to leave out, ``()`` for none of them.
        label: title of the progress bar.

    Raises:
        ConfigError: as in :func:`tower_with_experts`, or the model does not have these experts.
        DataError: an image cannot be read.
    """
    tower = tower_with_experts(answerer)
    subsets = list(dict.fromkeys(subsets))
    for subset in subsets:
        tower.config.check_expert_names(subset)
    result = Measurement(losses={subset: [] for subset in subsets}, right={subset: [] for subset in subsets})
    store = _Store(answerer, tower, samples, batch_size, result)
    collate = LlavaCollator(answerer.tokenizer.pad_token_id or 0, answerer.image_token_id, answerer.num_image_tokens)
    longest = max(len(answerer.tokenizer.encode(sample.reply)) for sample in samples)
    interval = 0.5 if sys.stderr.isatty() else 15.0
    with tqdm(total=len(samples), desc=label, unit="record", mininterval=interval) as progress:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            files = list(dict.fromkeys(file for sample in batch for file in sample.images))
            features = store.take(files)
            inputs = collate([sample.example for sample in batch])
            result.tokens += (inputs["labels"][:, 1:] >= 0).sum(dim=1).tolist()
            for subset in subsets:
                with without(tower, subset):
                    vision = answerer.model.get_image_features(
                        pixel_values=None, features=features, return_dict=True
                    ).pooler_output
                tokens = dict(zip(files, vision, strict=True))  # [N, D] by image
                result.losses[subset] += _losses(answerer, inputs, [tokens[f] for s in batch for f in s.files])
                result.right[subset] += _answers(answerer, batch, tokens, max(MIN_NEW_TOKENS, longest + 2))
            store.release(batch)
            progress.update(len(batch))
    return result


class _Store:
    """Features of the frozen part, kept until their last use."""

    def __init__(
        self, answerer: Answerer, tower: ToveVisionModel, samples: Sequence[Sample], batch_size: int, into: Measurement
    ) -> None:
        self.answerer, self.tower, self.batch_size, self.into = answerer, tower, batch_size, into
        self.uses = Counter(file for sample in samples for file in sample.images)
        self.waiting = list(self.uses)  # in the order of first use
        self.known: dict[Path, TowerFeatures] = {}

    def take(self, files: Sequence[Path]) -> TowerFeatures:
        """Return the features of these images, in this order."""
        while any(file not in self.known for file in files):
            self._encode(self.waiting[: self.batch_size])
            del self.waiting[: self.batch_size]
        return TowerFeatures.cat([self.known[file] for file in files])

    def release(self, batch: Sequence[Sample]) -> None:
        """Drop the features that only these samples needed."""
        for file in [file for sample in batch for file in sample.images]:
            self.uses[file] -= 1
            if not self.uses[file]:
                del self.known[file]

    def _encode(self, files: Sequence[Path]) -> None:
        pixels = torch.stack([self.answerer.pixels(file) for file in files])  # [B,3,S,S]
        features = self.tower.encode(pixels.to(self.answerer.device, self.answerer.model.dtype))
        gate_weights, norm_shares = image_statistics(self.tower, features)
        for row, file in enumerate(files):
            self.known[file] = features.map(lambda x, row=row: x[row : row + 1].clone())  # type: ignore[misc]
            self.into.gate_weights[file] = {name: values[row].item() for name, values in gate_weights.items()}
            self.into.norm_shares[file] = {name: values[row].item() for name, values in norm_shares.items()}


def image_statistics(tower: ToveVisionModel, features: TowerFeatures) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return mean gate weights and norm shares, ``[B]`` by attached expert."""
    fused = tower.fuse(features)
    names = tower.config.expert_names
    weights = {} if fused.routing is None else {
        name: fused.routing[..., names.index(name)].mean(dim=1) for name in tower.config.attached_experts
    }  # fmt: skip
    parts: Mapping[str, Tensor] = tower.fusion.transfers(features.base, features.experts, usable=features.usable)
    assert fused.last_hidden_state is not None
    length = fused.last_hidden_state.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)  # [B,N]
    return weights, {name: (part.float().norm(dim=-1) / length).mean(dim=1) for name, part in parts.items()}


def _losses(answerer: Answerer, inputs: Mapping[str, Tensor], images: list[Tensor]) -> list[float]:
    """Sum each row's loss over its supervised tokens."""
    labels = inputs["labels"][:, 1:]  # the token that each position predicts
    supervised = labels >= 0
    kept = supervised.any(dim=0).nonzero().squeeze(1)  # positions whose logits are needed
    device = answerer.device
    logits = answerer.model(
        input_ids=inputs["input_ids"].to(device),
        attention_mask=inputs["attention_mask"].to(device),
        mm_encoder_outputs={"image": ToveVisionOutput(pooler_output=images)},
        logits_to_keep=kept.to(device),
        use_cache=False,
    ).logits.float()  # [B, kept, vocabulary]
    wanted = labels[:, kept].masked_fill(~supervised[:, kept], -100).to(device)
    loss = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")  # 0 where unsupervised
    return loss.double().sum(dim=1).tolist()


def _answers(
    answerer: Answerer, batch: Sequence[Sample], tokens: Mapping[Path, Tensor], max_new_tokens: int
) -> list[bool | None]:
    """Compare greedy answers with the references, normalised as for scenes."""
    asked = [sample for sample in batch if sample.prompt is not None]
    if not asked:
        return [None] * len(batch)
    texts = iter(
        answerer.generate(
            [sample.prompt for sample in asked if sample.prompt is not None],
            [tokens[file] for sample in asked for file in sample.prompt_files],
            max_new_tokens,
        )
    )
    return [None if sample.prompt is None else normalise(next(texts)) == normalise(sample.reply) for sample in batch]
