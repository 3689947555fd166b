"""The data set and its batches."""

import json
import pickle

import numpy as np
import pytest
import torch
from data_helpers import decode_spans, save_odd_kinds, train_sentencepiece, turns
from hypothesis import example as also
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    Encoded,
    ImageTransform,
    LlavaCollator,
    LlavaDataset,
    load_tokenizer,
)
from tove_llava.data.dataset import truncate

TOKENS = 9  # an image's


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


RECORDS = [
    {"id": "one", "image": "red.png", "conversations": turns("<image>\nWhat?", "Red.")},
    {"id": "text", "conversations": turns("Hello", "Hi.", "Well?", "Yes.")},
    {"id": "two", "image": ["blue.png", "red.png"], "conversations": turns("<image> or <image>?", "Blue.")},
]


@pytest.fixture
def make(tmp_path, tokenizer):
    (tmp_path / "images").mkdir()
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (20, 10), colour).save(tmp_path / "images" / f"{name}.png")

    def build(records=None, **options):
        (tmp_path / "data.json").write_text(json.dumps(RECORDS if records is None else records))
        sizes = {"num_image_tokens": TOKENS, "model_max_length": 400, "image_transform": ImageTransform(12, "square")}
        keys = {"template": "v1", "image_folder": tmp_path / "images", **sizes, **options}
        return LlavaDataset(tmp_path / "data.json", tokenizer=tokenizer, **keys)

    return build


def test_examples(make, tokenizer):
    dataset = make()
    one, text, two = (dataset[index] for index in range(len(dataset)))
    assert one["input_ids"].dtype == one["labels"].dtype == torch.long
    assert one["pixel_values"].shape == (1, 3, 12, 12) and text["pixel_values"] is None
    assert decode_spans(tokenizer, text["labels"].tolist()) == [" Hi.</s>", " Yes.</s>"]
    assert (two["input_ids"] == IMAGE_TOKEN_INDEX).sum() == 2
    # in the order of the placeholders: blue, then red
    assert two["pixel_values"][0, 2, 0, 0] > two["pixel_values"][0, 0, 0, 0]
    assert two["pixel_values"][1, 0, 0, 0] > two["pixel_values"][1, 2, 0, 0]
    assert torch.equal(two["pixel_values"][1], one["pixel_values"][0])
    assert str(dataset.report) == "all 3 records are trained on"
    assert dataset.modality_lengths.tolist() == [3, -4, 4]


def test_batches(make, tokenizer):
    dataset = make()
    examples = [dataset[index] for index in range(3)]
    collate = LlavaCollator(pad_token_id=0, image_token_id=len(tokenizer), num_image_tokens=TOKENS)
    batch = collate(examples)
    lengths = [len(e["input_ids"]) + int((e["input_ids"] < 0).sum()) * (TOKENS - 1) for e in examples]
    assert batch["input_ids"].shape == (3, max(lengths))  # no needless padding
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["pixel_values"].shape == (3, 3, 12, 12)
    assert torch.equal(batch["pixel_values"][1:], examples[2]["pixel_values"])
    image = batch["input_ids"] == len(tokenizer)
    assert image.sum(1).tolist() == [TOKENS, 0, 2 * TOKENS]
    assert (batch["labels"][image] == IGNORE_INDEX).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all()
    for row, example in enumerate(examples):
        kept = batch["labels"][row][batch["labels"][row] >= 0]
        assert torch.equal(kept, example["labels"][example["labels"] >= 0])
        ids = batch["input_ids"][row, : lengths[row]]
        assert torch.equal(ids[ids != len(tokenizer)], example["input_ids"][example["input_ids"] >= 0])


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_a_text_batch(make, multiple):
    """LLaVA removes a genuine <unk> (id 0, its padding) from the text."""
    example = make([{"id": "unk", "conversations": turns("Say it", "It is <unk> here.")}])[0]
    batch = LlavaCollator(pad_token_id=0, image_token_id=999, num_image_tokens=1, multiple_of=multiple)([example])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "supervised", "image_positions"}  # no pixels
    length, width = len(example["input_ids"]), batch["input_ids"].shape[1]
    assert width % multiple == 0 and 0 <= width - length < multiple
    assert (example["input_ids"] == 0).any()
    assert batch["attention_mask"].tolist() == [[1] * length + [0] * (width - length)]


def test_a_collator_refuses_what_would_go_wrong_later():
    ids = torch.tensor([1, IMAGE_TOKEN_INDEX, 5])
    example = {"input_ids": ids, "labels": ids, "pixel_values": None}
    with pytest.raises(DataError, match="1 image placeholders and 0 images"):
        LlavaCollator(0, 9, 4)([example])
    with pytest.raises(DataError, match="contains the image token's id 5"):
        LlavaCollator(0, 5, 4)([{**example, "pixel_values": torch.zeros(1, 3, 2, 2)}])
    for keys in ({"num_image_tokens": 0}, {"multiple_of": 0}, {"multiple_of": 8, "packed": True}):
        with pytest.raises(ConfigError, match=next(iter(keys))):
            LlavaCollator(0, 5, **{"num_image_tokens": 1, **keys})
    # An image within an answer is not learned.
    batch = LlavaCollator(0, 9, 2)([{**example, "pixel_values": torch.zeros(1, 3, 2, 2)}])
    assert batch["labels"].tolist() == [[1, IGNORE_INDEX, IGNORE_INDEX, 5]]


def test_loader_workers(make):
    dataset, collate = make(), LlavaCollator(0, 999, TOKENS)
    options = {"batch_size": 2, "collate_fn": collate}
    pickle.loads(pickle.dumps((dataset, collate)))  # all that spawning needs; starting one takes long
    expected = list(DataLoader(dataset, **options))
    workers = list(DataLoader(dataset, **options, num_workers=2, multiprocessing_context="fork"))
    for ours, theirs in zip(workers, expected, strict=True):
        assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


@given(
    ids=st.lists(st.sampled_from([IMAGE_TOKEN_INDEX, 3, 4, 5]), max_size=40),
    limit=st.integers(1, 60),
    tokens=st.integers(1, 9),
)
def test_truncation(ids, limit, tokens):
    cut = truncate(Encoded(ids, list(ids)), limit, tokens).input_ids
    cost = [tokens if token == IMAGE_TOKEN_INDEX else 1 for token in ids]
    assert cut == ids[: len(cut)]
    assert sum(cost[: len(cut)]) <= limit
    assert len(cut) == len(ids) or sum(cost[: len(cut) + 1]) > limit  # and no more is cut than must be


def test_a_long_answer_is_cut_and_an_image_beyond_the_cut_left_out_with_its_pixels(make):
    dataset = make([{"id": "long", "image": "red.png", "conversations": turns("<image>\nTell.", "kite " * 999)}])
    batch = LlavaCollator(0, 999, TOKENS)([dataset[0]])
    assert batch["input_ids"].shape == (1, 400)
    assert (batch["labels"] >= 0).sum() > 50
    assert dataset.report.counts.total() == 0
    conversation = turns("Tell.", "kite " * 999, "And this? <image>", "Red.")
    example = make([{"id": "late", "image": "red.png", "conversations": conversation}])[0]
    assert example["pixel_values"] is None and IMAGE_TOKEN_INDEX not in example["input_ids"]
    assert len(example["input_ids"]) == 400


UNTRAINABLE = [
    {"id": "cut", "image": "red.png", "conversations": turns("<image>\n" + "stone lantern " * 400, "Lost.")},
    {"id": "mute", "conversations": turns("Hello?", "")},
    {"id": "open", "conversations": turns("Hello?")},
]


def test_records_without_supervision_are_left_out_and_counted(make):
    dataset = make([*RECORDS, *UNTRAINABLE])
    assert [record.id for record in dataset.records] == ["one", "text", "two"]
    assert dataset.report.total == 6
    assert dataset.report.left_out == {
        "the answers lie beyond model_max_length 400": ["cut"],
        "no answer to learn from": ["mute", "open"],
    }
    assert str(dataset.report).splitlines()[0] == "3 of 6 records are left out:"
    assert "2: no answer to learn from (mute, open)" in str(dataset.report)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"records": UNTRAINABLE}, DataError, "nothing is left to train on; 3 of 3 records are left out"),
        ({"unsupervised": "ignore"}, ConfigError, "'ignore'.*drop or error"),
        ({"template": "chat_template"}, ConfigError, "no chat template"),
        ({"image_folder": None}, DataError, "--image_folder"),
        ({"records": [{"id": "x", "conversations": turns("<image>", "Red.")}]}, DataError, r"record 0 \(id 'x'\): 1 "),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused_at_once(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
    assert len(make([RECORDS[1]], image_folder=None)) == 1  # text needs no image folder


@pytest.mark.parametrize("raw", UNTRAINABLE, ids=lambda raw: raw["id"])
def test_records_without_supervision_may_be_an_error(make, raw):
    with pytest.raises(DataError, match=rf"data.json: record 1 \(id '{raw['id']}'\): .*"):
        make([RECORDS[0], raw], unsupervised="error")


@settings(deadline=None, max_examples=60)
@given(
    question=st.lists(st.sampled_from(["a", " ", "kite ", "這", "🙂", "\n", "  ", "</s>"]), max_size=60).map("".join),
    limit=st.integers(50, 400),
    image=st.booleans(),
)
@also(question="🙂" * 60, limit=260, image=False)  # fits in characters, not in bytes
def test_what_is_kept_has_something_to_learn(tmp_path_factory, tokenizer, question, limit, image):
    """The shortcut that finds surviving answers without tokenizing decides rightly."""
    folder = tmp_path_factory.mktemp("data")
    raw = {"id": "x", "conversations": turns(("<image>\n" if image else "") + question, "Yes.")}
    raw |= {"image": "x.png"} if image else {}
    (folder / "data.json").write_text(json.dumps([raw, {"id": "short", "conversations": turns("a", "b")}]))

    def build(length):
        keys = {"num_image_tokens": TOKENS, "model_max_length": length, "check_files": False}
        return LlavaDataset(folder / "data.json", folder, tokenizer, "llava_v1", ImageTransform(12), **keys)

    whole = build(100_000)
    kept = truncate(whole.encode(whole.records[0]), limit, TOKENS).num_supervised > 0
    try:
        ids = [record.id for record in build(limit).records]
    except DataError:
        ids = []
    assert ("x" in ids) == kept


def _with_image(name):
    return [RECORDS[1], {"id": "bad", "image": name, "conversations": turns("<image>\nWhat?", "Red.")}]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.png", "there is no image 'absent.png'"),
        ("../data.json", "leads out of the image folder"),
        ("/etc/hostname", "absolute path"),
    ],
)
def test_images_are_looked_for_at_once_and_named(make, tmp_path, name, message):
    with pytest.raises(DataError, match=rf"data.json: record 1 \(id 'bad'\): .*{message}"):
        make(_with_image(name))
    lazy = make(_with_image(name), check_files=False)
    with pytest.raises(DataError, match=message):
        lazy[1]
    (tmp_path / "images" / "page.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"data.json: record 1 \(id 'bad'\): .*page.png is not an image"):
        make(_with_image("page.png"))[1]


def test_photographs_of_all_kinds_go_through(make, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (31, 45, 3), dtype=np.uint8)
    names = save_odd_kinds(Image.fromarray(noise), tmp_path / "images")
    records = [{"id": n, "image": n, "conversations": turns("<image>\nWhat?", "Noise.")} for n in names]
    for aspect_ratio in ("square", "pad"):
        dataset = make(records, image_transform=ImageTransform(12, aspect_ratio))
        batch = LlavaCollator(0, 999, TOKENS)([dataset[index] for index in range(len(dataset))])
        assert batch["pixel_values"].shape == (6, 3, 12, 12) and batch["pixel_values"].isfinite().all()
        assert (batch["pixel_values"].flatten(1).std(1) > 0.1).all()
