"""Batches that workers send as one block of memory arrive unchanged."""

import pickle
from multiprocessing.reduction import ForkingPickler

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tove_llava.data.packed_batch import PackedBatch
from tove_llava.tower import TowerFeatures

DTYPES = [torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.bool, torch.uint8]


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, TowerFeatures):
        return type(found) is TowerFeatures and same(vars(found), vars(expected))
    return found == expected


@given(
    tensors=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans()), max_size=6
    )
)
def test_arrives_as_it_was(tensors):
    made = []
    for dtype, shape, turned in tensors:
        tensor = torch.randint(0, 2, shape).to(dtype)
        made.append(tensor.transpose(0, -1) if turned and shape else tensor)
    content = {"list": made, "text": "a", "none": None, "nested": {str(i): t for i, t in enumerate(made)}}
    assert same(pickle.loads(pickle.dumps(PackedBatch(content))), content)


def batch(_):
    features = TowerFeatures(torch.randn(2, 3, 4), {"depth": torch.randn(2, 1, 5, 5), "edge": torch.randn(2, 1, 2, 2)})
    return {"input_ids": torch.arange(7)[None], "vision_features": features, "images": 2}


def test_one_file_descriptor_a_batch(monkeypatch):
    handed = []
    monkeypatch.setattr(torch.multiprocessing.reductions, "reduce_storage", lambda s: handed.append(s) or (bytes, ()))
    ForkingPickler.register(torch.UntypedStorage, torch.multiprocessing.reductions.reduce_storage)
    try:
        ForkingPickler.dumps(PackedBatch(batch(None)))
    finally:
        monkeypatch.undo()
        ForkingPickler.register(torch.UntypedStorage, torch.multiprocessing.reductions.reduce_storage)
    assert len(handed) == 1


def packed(indices):
    torch.manual_seed(indices[0])
    return PackedBatch(batch(None))


def test_through_a_data_loader():
    found = list(DataLoader(range(3), batch_size=1, collate_fn=packed, num_workers=1))
    assert len(found) == 3
    for index, one in enumerate(found):
        torch.manual_seed(index)
        assert same(one, batch(None))
