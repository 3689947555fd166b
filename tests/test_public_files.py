"""Files of public releases: every format, images inside, and bad records named."""

import base64
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tove_llava.core.errors import DataError
from tove_llava.eval.fields import TEXT
from tove_llava.eval.public_files import read_records, row_images

QUESTION = 'Which "one"?\nThis,\tor that\u2028?'


def png(width=4):
    buffer = io.BytesIO()
    Image.new("RGB", (width, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def write(file, rows):
    """Write rows in the format of a suffix; a sheet's cells are quoted where needed."""
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix in (".tsv", ".csv"):
        lines = [list(rows[0]), *(row.values() for row in rows)]
        mark = "\t" if file.suffix == ".tsv" else ","
        quoted = [mark.join('"' + str(cell).replace('"', '""') + '"' for cell in line) for line in lines]
        file.write_bytes("\n".join(quoted).encode())
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        file.write_text(json.dumps({"dataset_name": "x", "data": rows}))
    return file


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".tsv", ".csv", ".parquet"])
def test_every_format_gives_the_same_records(tmp_path, suffix):
    image = png() if suffix == ".parquet" else base64.b64encode(png()).decode()
    rows = [{"question": QUESTION, "A": "None", "image": image}, {"question": "N/A", "A": "nan", "image": image}]
    found = read_records(write(tmp_path / f"test{suffix}", rows), {"question": TEXT, "A": TEXT})
    assert [(row["question"], row["A"]) for _, row in found] == [(QUESTION, "None"), ("N/A", "nan")]
    assert len({place for place, _ in found}) == 2 and all(f"test{suffix}" in place for place, _ in found)
    for place, row in found:
        (opened,) = row_images(row, place, ("image",))
        assert opened.open().size == (4, 3)


def test_several_images_of_a_record_are_in_order(tmp_path):
    struct = {"bytes": png(5), "path": "1.png"}
    row = {"image_1": struct, "image_2": [struct, {"bytes": png(6), "path": None}], "image_3": None}
    ((place, found),) = read_records(write(tmp_path / "val.parquet", [row]))
    images = row_images(found, place, ("image_1", "image_2", "image_3"))
    assert [image.open().size[0] for image in images] == [5, 5, 6]
    assert images[2].name == f"{tmp_path.name}/val.parquet, record 1, image_2 2"


def test_names_are_files_of_a_folder_and_do_not_lead_out_of_it(tmp_path):
    assert row_images({"image": "a/1.png"}, "x", ("image",), tmp_path) == [tmp_path / "a" / "1.png"]
    with pytest.raises(DataError, match="leads out"):
        row_images({"image": "../1.png"}, "x", ("image",), tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.tsv", "question\tA\nwhich\tred\nwhich", "record 2: it has another number of cells"),
        ("a.tsv", "question\tA\nwhich\tred\tblue", "record 1: it has another number of cells"),
        ("a.csv", 'question,A\n"which,red', "a.csv, record 1: unexpected end"),
        ("a.jsonl", '{"question": "which"}\n\n{"question": ', "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", "[1]", "record 1: a JSON object is needed"),
        ("a.json", '{"rows": []}', "no list of questions"),
        ("a.json", '[{"question": "which"}, {"A": "red"}]', "record 2: the key 'question' is missing"),
        ("a.json", "[]", "holds no questions"),
        ("a.parquet", "PAR1", "a.parquet is damaged"),
    ],
)
def test_a_bad_record_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_records(tmp_path / name, {"question": TEXT})


def test_a_cell_holds_a_large_image(tmp_path):
    row = {"question": "which", "image": "x" * 200_000}
    ((_, found),) = read_records(write(tmp_path / "a.tsv", [row]))
    assert found == row


def test_an_empty_cell_is_no_image(tmp_path):
    assert row_images({"a": "", "b": None, "c": [""]}, "x", ("a", "b", "c", "absent"), tmp_path) == []


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"bytes": None, "path": "a.png"}, "name without the image's bytes"),
        (7, "must be an image, not 7"),
        (b"no image", "test.json, record 4, image is not an image"),
    ],
)
def test_an_image_that_does_not_open_is_named(image, words):
    with pytest.raises(DataError, match=words):
        row_images({"image": image}, "data/test.json, record 4", ("image",))[0].open()
