"""Token ids and labels against what haotian-liu/LLaVA's own code gives."""

import hashlib
import json

import pytest
import torch
from data_helpers import MENDED, decode_spans, jsonl
from transformers import AutoTokenizer

from tove_llava.core.errors import DataError
from tove_llava.data import (
    IGNORE_INDEX,
    LlavaCollator,
    Turn,
    encode_prompt,
    encode_record,
    get_template,
    load_tokenizer,
    parse_record,
)
from tove_llava.data.dataset import truncate
from tove_llava.data.records import prepare_turns


@pytest.fixture(scope="module")
def golden(conformance):
    return conformance / "llava"


@pytest.fixture(scope="module")
def rows(golden):
    return jsonl(golden / "tokenization.jsonl")


@pytest.fixture(scope="module")
def trained(rows):
    """Training rows that the original encodes.

    For "gpt-only" it feeds an empty conversation.
    """
    return [row for row in rows if row["kind"] == "train" and not row["error"] and row["id"] != "gpt-only"]


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load_tokenizer(golden / "llama_tokenizer.model")


def _template(row):
    return "v1" if row["template"] == "some_unknown_name" else row["template"]


def _encode(row, tokenizer):
    return encode_record(parse_record(row["record"]), tokenizer, _template(row), check_images=False)


def test_training_rows(trained, tokenizer):
    assert len(trained) == 131
    for row in trained:
        encoded = _encode(row, tokenizer)
        # Text-only rows are recorded after the cut at 2048.
        length = len(row["input_ids"])
        assert encoded.input_ids[:length] == row["input_ids"], row["id"]
        assert len(encoded.input_ids) == length or (length == 2048 and "image" not in row["record"]), row["id"]
        record = parse_record(row["record"])
        assert record.modality_length == row["modality_length"], row["id"]
        template = get_template(_template(row))
        prompt = template.prompt(prepare_turns(record, template, check_images=False), tokenizer)
        assert prompt == row["prompt"], row["id"]
        if row["mismatch"] is None and row["id"] != "long-image-mismatch-hidden":
            assert encoded.labels[:length] == row["labels"], row["id"]


def test_rows_that_the_original_masks_are_supervised_correctly(rows, tokenizer):
    masked = {row["id"]: row for row in rows if row.get("mismatch")}
    assert set(masked) == {*MENDED, "gpt-only", "long-text-mismatch-early"}
    for name, spans in MENDED.items():
        assert decode_spans(tokenizer, _encode(masked[name], tokenizer).labels) == spans, name
    long = masked["long-text-mismatch-early"]
    (span,) = decode_spans(tokenizer, _encode(long, tokenizer).labels)
    assert span == f" {long['record']['conversations'][1]['value']}</s>"


def test_the_tail_that_an_early_stop_masks_is_supervised(rows, tokenizer):
    (row,) = [row for row in rows if row["id"] == "long-image-mismatch-hidden"]
    labels = _encode(row, tokenizer).labels
    differing = [(ours, theirs) for ours, theirs in zip(labels, row["labels"], strict=True) if ours != theirs]
    assert all(theirs == IGNORE_INDEX for _, theirs in differing)
    assert tokenizer.decode([ours for ours, _ in differing]) == "It said ASSISTANT: done</s>"


def test_rows_that_the_original_refuses_are_refused(rows, tokenizer):
    refused = [row for row in rows if row["kind"] == "train" and row["error"] and row["id"] != "system-role"]
    assert len(refused) == 5  # a system turn, at which LLaVA stops, is read here
    for row in (*refused, *(row for row in rows if row["id"] == "gpt-only")):
        with pytest.raises(DataError, match="no human turn" if row["id"] == "gpt-only" else row["id"]):
            _encode(row, tokenizer)


def test_generation_rows(rows, tokenizer):
    asked = [row for row in rows if row["kind"] == "generate"]
    assert len(asked) == 24
    for row in asked:
        turns = [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(row["turns"])]
        assert get_template(row["template"]).prompt(turns, tokenizer) == row["prompt"], row["id"]
        assert encode_prompt(turns, tokenizer, row["template"]) == row["input_ids"], row["id"]
        assert encode_prompt(turns[:-1], tokenizer, row["template"]) == row["input_ids"], row["id"]


def test_a_prompt_begins_its_training_row(trained, tokenizer):
    """An inference prompt has the tokens that training showed before answers."""
    for row in (row for row in trained if row["template"] != "plain"):
        template, record = get_template(_template(row)), parse_record(row["record"])
        turns, images = prepare_turns(record, template, check_images=False), bool(record.images)
        whole = _encode(row, tokenizer).input_ids
        for index, turn in enumerate(turns):
            if turn.role == "assistant" and turn.text:
                prompt = encode_prompt(turns[:index], tokenizer, template, images=images)
                assert whole[: len(prompt)] == prompt, row["id"]


def test_saved_tokenizer_gives_the_same_ids(rows, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        for row in rows:
            if row.get("prompt") and "<image>" not in row["prompt"]:
                ids = again(row["prompt"])["input_ids"]
                assert ids[: len(row["input_ids"])] == row["input_ids"], row["id"]


def _example(row, tokenizer, tokens):
    encoded = truncate(_encode(row, tokenizer), 2048, tokens)
    ids, labels = torch.tensor(encoded.input_ids), torch.tensor(encoded.labels)
    pixels = torch.zeros(encoded.num_images, 3, 2, 2) if encoded.num_images else None
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def _spans(labels):
    """Find the half-open ranges of a row's supervised tokens."""
    edges = torch.diff((labels != IGNORE_INDEX).int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()
    return edges.view(-1, 2).tolist()


def test_every_row_with_its_image_expanded(trained, tokenizer):
    """An image takes 576 tokens, a row is cut at 2048."""
    collate = LlavaCollator(pad_token_id=0, image_token_id=32000, num_image_tokens=576)
    matching = [row for row in trained if not row["mismatch"]]
    assert len(matching) == 112
    for row in matching:
        golden, collated = row["after_image_expansion"], collate([_example(row, tokenizer, 576)])
        assert _spans(collated["labels"][0]) == golden["supervised_spans"], row["id"]
        if row["id"] != "long-image-placeholder-late":  # see test_an_image_that_does_not_fit_whole_is_left_out
            assert collated["attention_mask"].sum() == golden["length"], row["id"]


def _batch(batch, rows, tokenizer, tokens):
    by_id = {row["id"]: row for row in rows if row["kind"] == "train"}
    examples = [_example(by_id[name], tokenizer, tokens) for name in batch["members"]]
    image_id = -200 if tokens == 1 else 32000
    return LlavaCollator(pad_token_id=0, image_token_id=image_id, num_image_tokens=tokens)(examples)


def _sha(matrix):
    return hashlib.sha256(matrix.numpy().astype("<i8").tobytes()).hexdigest()


# Its first row has a genuine <unk>: the original masks it, takes the <unk> for padding and drops it.
MENDED_BATCH = "batch-unk-token"


def test_collated_batches(golden, rows, tokenizer):
    for batch in jsonl(golden / "batches.jsonl"):
        collated = _batch(batch, rows, tokenizer, tokens=1)
        assert collated["input_ids"].shape[1] == batch["padded_length"], batch["id"]
        assert _sha(collated["input_ids"]) == batch["input_ids_sha256"], batch["id"]
        if batch["id"] != MENDED_BATCH:
            assert _sha(collated["labels"]) == batch["labels_sha256"], batch["id"]


def test_merged_batches(golden, rows, tokenizer):
    compared = 0
    for batch in jsonl(golden / "batches.jsonl"):
        merged = batch["merged"]
        # The original runs out of images, masks supervised text or cuts through an image; see the next tests.
        if merged["error"] or batch["id"] in (MENDED_BATCH, "batch-placeholder-late"):
            continue
        collated = _batch(batch, rows, tokenizer, tokens=576)
        assert collated["attention_mask"].sum(1).tolist() == merged["valid_lengths"], batch["id"]
        for row, blocks in zip(collated["input_ids"], merged["image_blocks_per_row"], strict=True):
            expected = torch.zeros_like(row, dtype=torch.bool)
            for block in blocks:
                expected[block["start"] : block["end"]] = True
            assert torch.equal(row == 32000, expected), batch["id"]
        assert _sha(collated["labels"]) == merged["labels_sha256"], batch["id"]
        compared += 1
    assert compared == 7


def test_an_image_that_does_not_fit_whole_is_left_out(golden, rows, tokenizer):
    (batch,) = [row for row in jsonl(golden / "batches.jsonl") if row["id"] == "batch-placeholder-late"]
    collated = _batch(batch, rows, tokenizer, tokens=576)
    (block,) = batch["merged"]["image_blocks_per_row"][0]
    assert collated["attention_mask"].sum(1).tolist() == [block["start"], 631]
    assert collated["pixel_values"].shape[0] == 1  # the second row's
    # Nothing follows a cut image, so what is learnt is the same.
    assert [_spans(labels) for labels in collated["labels"]] == batch["merged"]["label_spans_per_row"]


def test_a_genuine_unk_stays_and_what_follows_it_is_supervised(golden, rows, tokenizer):
    (batch,) = [row for row in jsonl(golden / "batches.jsonl") if row["id"] == MENDED_BATCH]
    collated = _batch(batch, rows, tokenizer, tokens=576)
    dropped, whole = collated["attention_mask"].sum(1).tolist()
    assert [dropped - 1, whole] == batch["merged"]["valid_lengths"]
    first, second = [_spans(labels) for labels in collated["labels"]]
    assert first and second == batch["merged"]["label_spans_per_row"][1]
