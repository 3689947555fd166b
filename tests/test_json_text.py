"""The one reader of JSON: the right value, or a fault with its line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tove_llava.core.errors import DataError
from tove_llava.core.files import parse_json_lines, read_json
from tove_llava.core.json_text import DEPTH, DIGITS, JsonError, loads

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=VALUES, escaped=st.booleans(), indent=st.sampled_from([None, 1]), mark=st.sampled_from(["", "\ufeff"]))
def test_every_sound_value_comes_back(value, escaped, indent, mark):
    text = mark + json.dumps(value, ensure_ascii=escaped, indent=indent)
    for read in (text, text.encode(), text.replace("\n", "\r\n")):
        assert loads(read) == value


@pytest.mark.parametrize(
    "text, reason, line",
    [
        (b'{"a": "\xff"}', "not UTF-8", 1),
        ('{"a":\n "x \\ud83d y"}', "half of a surrogate pair", 2),
        ('{"a": 1,\n"\\udc00": 2}', "half of a surrogate pair", 2),
        ('["\\uD83D"]', "half of a surrogate pair", 1),
        ('["\\\\ud83d",\n\n"\\ud83d\\ud83d"]', "half of a surrogate pair", 3),
        ('{"a": [1,\n NaN]}', "NaN is not a number", 2),
        ('["NaN", -Infinity]', "-Infinity is not a number", 1),
        ("[1e400]", "1e400 is not a number", 1),
        ("[1,\n-" + "9" * 5000 + "]", "a number of 5,001 digits", 2),
        ("9" * (10**6), "digits", 1),
        ("9" * (DIGITS + 1), "digits", 1),
        ('{"a": {"b": 1},\n"b": [{"c": 1, "c": 2}]}', "the key 'c' occurs twice", 2),
        ("[\n" * (DEPTH + 1) + "]" * (DEPTH + 1), "nested more than 100 deep", 101),
        ('{"a":' * (DEPTH + 1) + "1" + "}" * (DEPTH + 1), "nested more than 100 deep", 1),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 100 deep", 1),
        ("[1] [2]", "Extra data", 1),
        ("", "Expecting value", 1),
        ("\ufeff\n{", "Expecting property name", 2),
        ("{'a': 1}", "Expecting property name", 1),
        ('["a\tb"]', "Invalid control character", 1),
        ("[1]\0", "Extra data", 1),
    ],
)
def test_faults_have_a_reason_and_a_line(text, reason, line):
    with pytest.raises(JsonError, match=reason) as caught:
        loads(text)
    assert caught.value.line == line


def test_what_looks_like_a_fault_and_is_none():
    deep = "[" * DEPTH + "]" * DEPTH
    for text in (
        deep,
        "9" * DIGITS,
        json.dumps(["[" * 500, "{" * 500]),
        '["NaN", "\\ud83d\\ude00", "\\\\ud83d"]',
        '[{"a": 1}, {"a": 2}]',
    ):
        assert loads(text) == json.loads(text)
    assert loads('{"a": 1, "a": 2}', unique=False) == {"a": 2}
    assert loads("[Infinity]", finite=False) == [float("inf")]


def test_files_name_themselves_and_the_line(tmp_path):
    file = tmp_path / "a.json"
    for content, words in (
        (b'[\n"\\ud800"]', "a.json, line 2: not valid JSON .half of a surrogate pair"),
        ("[1]".encode("utf-16"), "a.json, line 1: not UTF-8 text .it is UTF-16; save it as UTF-8"),
        ("[1]".encode("utf-16-le"), "a.json, line 1: not valid JSON"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_json(file)
    file.write_bytes(b"\xef\xbb\xbf[1]\r\n")
    assert read_json(file) == [1]
    lines = '\ufeff{"a": 1}\r\n\r\n\ufeff{"a": 2}\n{"a": NaN}\n{"a": 3}'  # two files with their marks, joined
    broken = []
    assert [value["a"] for _, value in parse_json_lines(lines, "b.jsonl", broken=broken)] == [1, 2, 3] and broken == [4]
    with pytest.raises(DataError, match="b.jsonl, line 4: not valid JSON .NaN"):
        list(parse_json_lines(lines, "b.jsonl"))
