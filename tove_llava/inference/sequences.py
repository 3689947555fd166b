"""Token sequences of different lengths in one key-value cache.

transformers' continuous batching takes only token ids, no images, so the batch is kept here; the model's own
``forward`` and the library's cache layers do the work. ``B`` sequences, ``T`` columns, ``V`` words.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tove_llava.tower import ToveVisionOutput

# Columns by which a full buffer grows: a copy every 32 steps costs little next to the steps.
GROWTH = 32


class _Layer(DynamicLayer):
    """Keys and values of one layer, with room for columns to come."""

    _keys: Tensor  # [B, heads, room, width]; ``keys`` and ``values`` are views of what is filled
    _values: Tensor

    @classmethod
    def filled(cls, keys: Tensor, values: Tensor, columns: int) -> "_Layer":
        """Make a layer of two buffers whose first ``columns`` are filled."""
        layer = cls()
        layer.lazy_initialization(keys, values)
        layer._keys, layer._values = keys, values
        layer._show(columns)
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys, self._values = key_states, value_states
            self._show(key_states.shape[-2])
            return self.keys, self.values
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._keys.shape[-2]:
            self._keys = _widened(self.keys, end + GROWTH)
            self._values = _widened(self.values, end + GROWTH)
        self._keys[..., start:end, :] = key_states
        self._values[..., start:end, :] = value_states
        self._show(end)
        return self.keys, self.values

    def _show(self, columns: int) -> None:
        self.keys, self.values = self._keys[..., :columns, :], self._values[..., :columns, :]


def _widened(states: Tensor, room: int) -> Tensor:
    batch, heads, columns, width = states.shape
    buffer = states.new_empty(batch, heads, room, width)
    buffer[..., :columns, :] = states
    return buffer


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Tell if every layer keeps all tokens, as :class:`Sequences` needs."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config.get_text_config()).layers)


class Sequences:
    """``B`` sequences that end at the last column; unused columns are masked."""

    def __init__(self, rows: int, layers: int, device: torch.device) -> None:
        self.cache = Cache(layers=[_Layer() for _ in range(layers)])
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=device)  # [B, T], 1 for a token
        self.lengths = [0] * rows  # tokens of each row
        self.spans = [0] * rows  # columns from each row's first token to the end

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def gather(cls, parts: Sequence[tuple["Sequences", Sequence[int]]], room: int = GROWTH) -> "Sequences":
        """Copy chosen rows of several batches, with repeats, into a new batch.

        Args:
            parts: batches, each with the rows to take.
            room: columns that can be added before memory must be moved.
        """
        parts = [(batch, rows) for batch, rows in parts if len(rows)]
        first = parts[0][0]
        total = sum(len(rows) for _, rows in parts)
        result = cls(total, len(first.cache.layers), first.mask.device)
        result.lengths = [batch.lengths[row] for batch, rows in parts for row in rows]
        result.spans = [batch.spans[row] for batch, rows in parts for row in rows]
        width = max(result.spans)
        if width == 0:
            return result
        starts = list(accumulate((len(rows) for _, rows in parts), initial=0))
        places = [torch.tensor(rows, device=first.mask.device) for _, rows in parts]
        result.mask = torch.zeros(total, width, dtype=torch.long, device=first.mask.device)
        for (batch, _), start, place in zip(parts, starts, places, strict=False):
            columns = min(width, batch.mask.shape[1])
            if columns:
                result.mask[start : start + len(place), width - columns :] = batch.mask[place, -columns:]
        for index, layer in enumerate(first.cache.layers):
            buffers: list[Tensor] = []
            for name in ("keys", "values"):
                _, heads, _, size = getattr(layer, name).shape
                # Zeros, because a masked NaN in old memory would still spoil a sum.
                buffer = getattr(layer, name).new_zeros(total, heads, width + room, size)
                for (batch, _), start, place in zip(parts, starts, places, strict=False):
                    states = getattr(batch.cache.layers[index], name)  # [b, heads, t, size]
                    columns = min(width, states.shape[-2])
                    buffer[start : start + len(place), :, width - columns : width] = states[place, :, -columns:]
                buffers.append(buffer)
            result.cache.layers[index] = _Layer.filled(buffers[0], buffers[1], width)
        return result

    def extend(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        valid: Tensor | None = None,
        images: Sequence[Tensor] = (),
        logits_to_keep: int = 1,
    ) -> Tensor:
        """Append tokens to every row and return the last tokens' logits.

        Args:
            ids: [B, L], padded on the left.
            valid: [B, L], 1 for a token and 0 for padding; all tokens by default.
            images: [N, D] of the image placeholders in ``ids``, in their order.
        """
        width = ids.shape[1]
        added = [width] * len(self) if valid is None else valid.sum(dim=1).tolist()
        valid = torch.ones_like(ids) if valid is None else valid
        before = torch.tensor(self.lengths, device=ids.device)[:, None]  # [B, 1]
        positions = (before + valid.cumsum(dim=1) - 1).clamp_min(0)  # [B, L]
        self.mask = torch.cat([self.mask, valid], dim=1)
        output = model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **as_images(images),
        )
        # An empty row begins with its first token.
        self.spans = [span + width if span else count for span, count in zip(self.spans, added, strict=True)]
        self.lengths = [length + count for length, count in zip(self.lengths, added, strict=True)]
        return output.logits.float()


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad ids to [B, L]; return them and their mask of tokens."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    valid = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row, dtype=torch.long)
        valid[index, longest - len(row) :] = 1
    return ids.to(device), valid.to(device)


def as_images(features: Sequence[Tensor]) -> dict[str, Any]:
    """Return the model's arguments for images [N, D] in placeholder order."""
    return {"mm_encoder_outputs": {"image": ToveVisionOutput(pooler_output=list(features))}} if features else {}
