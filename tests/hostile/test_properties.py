"""Properties of the readers that everything hostile passes, by hypothesis."""

import json
import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tove_llava.core.errors import DataError, ToveError
from tove_llava.core.files import parse_json, parse_json_lines, read_text
from tove_llava.data.images import resolve_image
from tove_llava.inference.sampling import COLDEST, Sampling

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(values, st.booleans(), st.sampled_from([None, 1]))
def test_what_json_writes_is_read_as_it_was(value, ascii_only, indent):
    written = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert parse_json(written, "x.json") == value
    line = json.dumps(value, ensure_ascii=ascii_only)
    assert [row for _, row in parse_json_lines(f"{line}\n\n{line}", "x.jsonl")] == [value, value]


@given(st.binary(max_size=60))
@example(b"\xff\xfe{\x00")
@example(b'{"a": 1e999}')
@example(b'{"a": 1, "a": 2}')
@example(b'"\\ud800"')
@example(b"[" * 100_000)
@example(b"9" * 5000)
def test_any_bytes_are_json_or_an_error_that_names_file_and_line(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("json") / "x.json"
    file.write_bytes(content)
    try:
        value = parse_json(read_text(file), file)
    except DataError as error:
        assert "x.json, line " in str(error)
    else:
        assert value == json.loads(content.decode("utf-8-sig"))
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1,\n"b": 2,\n"a": 3}', "line 3: .*the key 'a' occurs twice"),
        ("\n" + "[" * 101 + "]" * 101, "line 2: .*nested more than 100 deep"),
        ('\n\n{"a": NaN}', "line 3: .*NaN is not a number"),
        ('{"a":\n1 2}', "line 2: .*delimiter"),
    ],
)
def test_json_that_a_later_step_cannot_take_is_refused_at_its_line(content, reason):
    with pytest.raises(DataError, match=reason):
        parse_json(content, "x.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    (root / "in" / "deep").mkdir(parents=True)
    for name in ("secret.png", "in/a.png", "in/deep/b.png"):
        (root / name).touch()
    (root / "in" / "link.png").symlink_to(root / "secret.png")
    (root / "in" / "away").symlink_to(root)
    return root / "in"


PARTS = ["..", ".", "a.png", "deep", "b.png", "link.png", "away", "secret.png", "", "/", "~", "\\", "C:"]


@given(st.lists(st.sampled_from(PARTS), max_size=6), st.sampled_from(["/", "\\", "//"]), st.booleans())
@settings(max_examples=300)
def test_no_name_leads_out_of_the_image_folder(folder, parts, separator, whole):
    name = separator.join(parts)
    name = f"{folder}/{name}" if whole else name
    try:
        found = resolve_image(folder, name)
    except DataError as error:
        assert "image " in str(error) and (str(folder) in str(error) or "absolute" in str(error))
    else:
        assert os.path.realpath(found).startswith(f"{os.path.realpath(folder)}/") and found.is_file()


numbers = st.integers() | st.floats()


@given(st.integers(), numbers, numbers, st.integers())
@example(1, 0.0, float("nan"), 0)
@example(1, float("inf"), 1.0, 0)
@example(1, 0.001, 1.0, 0)
def test_sampling_is_in_range_or_refused(tokens, temperature, top_p, least):
    try:
        made = Sampling(tokens, temperature, top_p, least)
    except ToveError as error:
        assert any(name in str(error) for name in ("max_new_tokens", "temperature", "top_p", "min_new_tokens"))
    else:
        assert (
            made.max_new_tokens >= 1
            and (made.temperature == 0 or COLDEST <= made.temperature <= 100)
            and 0 < made.top_p <= 1
        )
