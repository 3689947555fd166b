"""Orders of the grouped sampler: golden ones, and properties of any lengths."""

from collections import Counter
from typing import Any

import pytest
import torch
from data_helpers import SAMPLE, jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import LengthGroupedSampler, WeightedSampler

LENGTHS = st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=80)


def _draw(row: dict[str, Any]) -> list[int]:
    torch.manual_seed(row["seed"])
    keys = ("lengths", "batch_size", "world_size_times_accumulation", "group_by_modality")
    return list(LengthGroupedSampler(*(row[key] for key in keys)))


@pytest.mark.parametrize("golden", [True, False], ids=["conformance", "own sample"])
def test_golden_orders(request: pytest.FixtureRequest, golden: bool) -> None:
    folder = request.getfixturevalue("conformance") / "llava" if golden else SAMPLE
    rows = jsonl(folder / "sampler.jsonl")
    assert any(row["error"] for row in rows) and any(row["order"] for row in rows)
    assert not golden or len(rows) == 10
    for row in rows:
        if row["error"]:
            with pytest.raises(DataError, match="length 0"):
                _draw(row)
        else:
            assert _draw(row) == row["order"], row["id"]


@given(lengths=LENGTHS, batch_size=st.integers(1, 5), num_batches=st.integers(1, 4), by_modality=st.booleans())
def test_each_record_once(lengths: list[int], batch_size: int, num_batches: int, by_modality: bool) -> None:
    sampler = LengthGroupedSampler(lengths, batch_size, num_batches, by_modality, seed=3)
    assert sorted(sampler) == list(range(len(lengths))) == list(range(len(sampler)))


@given(lengths=LENGTHS, batch_size=st.integers(1, 5), num_batches=st.integers(1, 4))
def test_only_the_tail_mixes_modalities(lengths: list[int], batch_size: int, num_batches: int) -> None:
    order = list(LengthGroupedSampler(lengths, batch_size, num_batches, seed=3))
    size = batch_size * num_batches
    counts = Counter(length > 0 for length in lengths)
    if len(counts) == 1:
        return
    # The last megabatch of each modality is set aside, also where it is full.
    whole = sum((count - 1) // size for count in counts.values())
    for number in range(whole):
        signs = {lengths[index] > 0 for index in order[number * size : (number + 1) * size]}
        assert len(signs) == 1
    assert order[whole * size :] == sorted(order[whole * size :])


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 100))
def test_an_epoch_depends_only_on_seed_and_epoch(seed: int, epoch: int) -> None:
    lengths = [(-1) ** (index // 3) * (index % 17 + 1) for index in range(60)]

    def order(epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(lengths, 2, 3, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    before = torch.random.get_rng_state()
    first = order(epoch)
    assert torch.equal(before, torch.random.get_rng_state())  # nothing is drawn from the global generator
    torch.rand(3)
    assert order(epoch) == first != order(epoch + 1)


def test_iterating_twice_without_a_seed_draws_twice() -> None:
    torch.manual_seed(0)
    sampler = LengthGroupedSampler(list(range(1, 60)), 2, 2)
    assert list(sampler) != list(sampler)


def test_batches_side_by_side_cost_the_same() -> None:
    lengths = torch.randint(1, 200, (512,), generator=torch.Generator().manual_seed(0)).tolist()

    def spread(order: list[int]) -> float:
        totals = torch.tensor([lengths[index] for index in order]).view(-1, 4, 8).sum(2)  # [megabatch, device]
        return float((totals.max(1).values - totals.min(1).values).float().mean())

    assert spread(list(LengthGroupedSampler(lengths, 8, 4, seed=0))) < spread(list(range(512))) / 10


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_sizes_must_be_positive(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        LengthGroupedSampler([1, 2], *sizes)


def test_weights_are_shares_of_an_epoch_and_all_records_get_their_turn():
    sampler = WeightedSampler([10, 7, 0], [0.3, 2.5, 1], seed=5)
    epochs = []
    for epoch in range(10):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert list(sampler) == epochs[-1] and len(epochs[-1]) == len(sampler) == 3 + 18
        assert len({i for i in epochs[-1] if i < 10}) == 3
    assert len({tuple(epoch) for epoch in epochs}) == 10
    seen = Counter(index for epoch in epochs for index in epoch)
    assert [seen[index] for index in range(10)] == [3] * 10
    assert {seen[index] for index in range(10, 17)} <= {25, 26} and max(seen) == 16
    assert list(WeightedSampler([10, 7, 0], [0.3, 2.5, 1], seed=5)) == epochs[0]
    assert list(WeightedSampler([10, 7, 0], [0.3, 2.5, 1], seed=6)) != epochs[0]


def test_weighted_records_are_grouped_by_modality():
    lengths = [length if length % 3 else -length for length in range(1, 41)]
    sampler = WeightedSampler([20, 20], [2, 0.5], 1, LengthGroupedSampler(lengths, 2, 2))
    order = list(sampler)
    assert sorted(order) == sorted(sampler.draw().tolist()) and len(order) == 50
    signs = [{lengths[index] > 0 for index in order[start : start + 4]} for start in range(0, 40, 4)]
    assert all(len(sign) == 1 for sign in signs)
