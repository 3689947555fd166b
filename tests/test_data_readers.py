"""Parquet files, Arrow folders, and the records and images in them."""

import io
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import train_sentencepiece
from PIL import Image

from tove_llava.cli import main
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import ImageTransform, LlavaDataset, load_tokenizer
from tove_llava.data.data_paths import data_paths, described, size_of
from tove_llava.data.readers import open_reader

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "grey": (90, 90, 90)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(name):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), COLOURS[name]).save(buffer, "PNG")
    return buffer.getvalue()


def messages(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS = [{"id": name, "messages": messages("<image>\nWhich?", name), "images": [f"{name}.png"]} for name in COLOURS]


def with_bytes(rows):
    return [{**row, "images": [{"bytes": png(row["id"]), "path": None}]} for row in rows]


def save_to_disk(rows, folder):
    """Write what Hugging Face's ``Dataset.save_to_disk`` writes, in two files."""
    folder.mkdir()
    table, names = pa.Table.from_pylist(rows), ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 1), table.slice(1)), strict=True):
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def save_parquet(rows, file):
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file


@pytest.fixture
def make(tmp_path):
    images, tokenizer = tmp_path / "images", load_tokenizer(train_sentencepiece(tmp_path / "tokenizer"))
    images.mkdir()
    for name in COLOURS:
        (images / f"{name}.png").write_bytes(png(name))
    return lambda path: LlavaDataset(path, images, tokenizer, "v1", ImageTransform(12), 9)


def test_every_format_and_place_of_the_images_gives_the_same_examples(make, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    expected = make(tmp_path / "rows.jsonl")
    (tmp_path / "parts").mkdir()
    save_parquet(ROWS[:2], tmp_path / "parts" / "train-0.parquet")
    save_parquet(ROWS[2:], tmp_path / "parts" / "train-1.parquet")
    paths = [save_parquet(ROWS, tmp_path / "a.parquet"), save_parquet(with_bytes(ROWS), tmp_path / "b.parquet")]
    paths += [save_to_disk(ROWS, tmp_path / "c"), save_to_disk(with_bytes(ROWS), tmp_path / "d"), tmp_path / "parts"]
    for path in paths:
        dataset = pickle.loads(pickle.dumps(make(path)))
        assert [record.id for record in dataset.records] == list(COLOURS)
        assert dataset.modality_lengths.tolist() == expected.modality_lengths.tolist()
        for ours, theirs in zip((dataset[k] for k in range(3)), (expected[k] for k in range(3)), strict=True):
            assert torch.equal(ours["input_ids"], theirs["input_ids"]) and torch.equal(ours["labels"], theirs["labels"])
            assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_parquet_is_decoded_once_and_again_when_it_changes(tmp_path, cache):
    file = save_parquet(ROWS, tmp_path / "a.parquet")
    for rows in (ROWS, ROWS, ROWS[:1]):
        if rows is not ROWS:
            save_parquet(rows, file)
        assert [row["id"] for row in open_reader(file)] == [row["id"] for row in rows]
    assert len(list(cache.rglob("*.arrow"))) == 2


def test_files_that_cannot_be_read(make, tmp_path, monkeypatch):
    whole = save_parquet(ROWS, tmp_path / "a.parquet").read_bytes()
    folder = save_to_disk(ROWS, tmp_path / "c")
    stream = folder / "data-00001-of-00002.arrow"
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    (tmp_path / "cut.arrow").write_bytes(stream.read_bytes()[:300])
    (tmp_path / "x.csv").write_text("image,text\na.png,red\n")
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    stream.unlink()
    for name, message in (
        ("cut.parquet", "cut.parquet is damaged or cut short"),
        ("cut.arrow", "cut.arrow is damaged or cut short"),
        ("x.csv", "x.csv is of a format that cannot be read .known: arrow_folder, json_array, jsonl, parquet"),
        ("c", "00001-of-00002.arrow is missing"),
        ("dict", "several splits; give the folder of one: train, test"),
        ("images", "a folder without data files"),
    ):
        with pytest.raises(DataError, match=message):
            open_reader(tmp_path / name)
    other = save_parquet([{"image": "red.png", "caption": "red"}], tmp_path / "other.parquet")
    with pytest.raises(DataError, match="other.parquet: record 0 has no .* .keys: 'image', 'caption'"):
        make(other)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a.parquet needs pyarrow: pip install 'tove-llava\[data\]'"):
        open_reader(tmp_path / "a.parquet")


def test_images_inside_a_file_are_checked(make, tmp_path, capsys):
    rows = with_bytes(ROWS)
    rows[1]["images"][0]["bytes"] = b"no image"
    assert main(["data", "check", "--data-path", str(save_parquet(rows, tmp_path / "a.parquet")), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 3 and [(p["index"], p["kind"]) for p in report["problems"]] == [(1, "image")]
    command = ["features", "--data", str(tmp_path / "a.parquet"), "--image-folder", "x", "--out", str(tmp_path / "y")]
    assert main(command) == 2 and "holds its images itself" in capsys.readouterr().err


# -- several files ----------------------------------------------------------------------------------------------------


def test_a_list_of_files_with_weights_is_one_data_set(make, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "b.json").write_text(json.dumps(ROWS[:2]))
    (tmp_path / "odd,name:0.5.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "mix.yaml").write_text("- a.jsonl\n- {path: b.json, weight: 0.5}\n")
    monkeypatch.chdir(tmp_path)
    for path in ("a.jsonl,b.json:0.5", "a.jsonl, ./b.json:.5", "mix.yaml"):
        dataset = make(path)
        assert (dataset.sizes, dataset.weights) == ([3, 2], [1, 0.5])
        assert [record.where.split(": ")[1] for record in dataset.records[2:]] == [
            "record 2 (id 'grey')", "record 0 (id 'red')", "record 1 (id 'blue')",
        ]  # fmt: skip
        assert described(path, whole=False) == "a.jsonl,b.json:0.5"
        assert size_of(path) == sum((tmp_path / name).stat().st_size for name in ("a.jsonl", "b.json"))
    assert data_paths("odd,name:0.5.jsonl") == [(Path("odd,name:0.5.jsonl"), 1)]
    assert described("odd,name:0.5.jsonl") == str(tmp_path / "odd,name:0.5.jsonl")
    assert len(make("odd,name:0.5.jsonl")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((f"a.jsonl:{w}", f"positive number such as 0.5, not .{w}") for w in ("0", "-1", "nan", "inf", "x")),
        ("a.jsonl,,b.jsonl", "an empty path"),
        (":0.5", "an empty path"),
        ("bad.yaml", "the weight must be a positive number such as 0.5, not True"),
        ("text.yaml", "must be a list of data files"),
    ],
)  # fmt: skip
def test_weights_that_are_none(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "bad.yaml").write_text("- {path: a.jsonl, weight: true}\n")
    (tmp_path / "text.yaml").write_text("a.jsonl\n")
    with pytest.raises(ConfigError, match=message):
        data_paths(text)
    assert main(["data", "check", "--data-path", "nowhere.jsonl:0.5"]) == 2
