"""Reading LLaVA's format, and its messages about unusable records."""

import json
import pickle

import pytest
from data_helpers import byte_level_tokenizer

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import Turn, get_template, load_records, parse_record, read_records
from tove_llava.data.data_files import DataFiles
from tove_llava.data.readers import json_array, jsonl, open_reader
from tove_llava.data.records import prepare_turns

V1, PLAIN, MMTAG = get_template("v1"), get_template("plain"), get_template("v1_mmtag")


def record(*values, image=None, first="human"):
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    conversations = [{"from": roles[index % 2], "value": value} for index, value in enumerate(values)]
    return {"id": "r1", "conversations": conversations} | ({"image": image} if image is not None else {})


def prepared(raw, template=V1):
    return [turn.text for turn in prepare_turns(parse_record(raw, 7, "data.json"), template)]


def test_json_and_jsonl_are_the_same(tmp_path):
    rows = [record("a", "b"), record("c\u2028d", "é")]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "bom.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    for name in ("a.json", "a.jsonl", "bom.json"):
        assert read_records(tmp_path / name) == rows
    assert [parsed.index for parsed in load_records(tmp_path / "a.json")] == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (b"[{]", "x.json, line 1: not valid JSON"),
        (b'{"id": 1}\n{"id": \n', "x.json, line 2: not valid JSON"),
        (b"\xff\xfe[1]", "not UTF-8 text .it is UTF-16"),
        (b'{"id": 1}{"id": 2}', "line 1: not valid JSON .Extra data"),
        (b'[{"id": 1},\n{"id": "x}]', "line 2: not valid JSON .the list does not end"),
        (b'[{"id": 1}]\n\n[{"id": 2}]', "line 3: not valid JSON .text after"),
        (b'[{"id": 1},\n\n]', "line 1: not valid JSON .Expecting value"),
        (
            b'[{"id": 1}\n{"id": 2}]',
            "line 2: not valid JSON .Extra data",
        ),
        (b"[" * 100_000 + b"]" * 100_000, "line 1: not valid JSON .nested more than 100 deep"),
        (b'{"id": 1}\n{"id": ' + b"9" * 5000 + b"}", "line 2: not valid JSON .a number of 5,000 digits"),
        (None, "no file .*x.json.*--data_path"),
    ],
)
def test_files_that_cannot_be_read(content, message, tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read_records(tmp_path)
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("text", "record 7 is a str"),
        ({"id": "r1"}, "has no 'conversations'"),
        ({"id": "r1", "conversations": []}, "at least one turn"),
        ({"id": "r1", "conversations": "hello"}, "at least one turn"),
        ({"id": "r1", "conversations": ["hello"]}, "turn 1 must be an object"),
        ({"id": "r1", "conversations": [{"from": "human"}]}, "turn 1 must be an object with 'from' and 'value'"),
        (record(None), "value of turn 1 must be a string, not None"),
        ({"id": "r1", "conversations": [{"from": "Human", "value": "x"}]}, "'Human'; a role is 'user' .or 'human'."),
        ({"id": "r1", "conversations": [{"from": ["human"], "value": "x"}]}, "a role is 'user'"),
        (record("x\ud800"), "turn 1 holds half of a surrogate pair"),
        *((record("x", image=image), "'image' must be a file name") for image in ("a\0.png", 3, ["a.png", 3], "")),
    ],
)
def test_malformed_records(raw, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_record(raw, 7, "data.json")
    assert str(caught.value).startswith("data.json: record 7")
    if isinstance(raw, dict):
        assert "(id 'r1')" in str(caught.value)


def test_ids_and_images_may_be_absent():
    assert parse_record({**record("a", "b"), "id": 12}).id == "12"
    assert parse_record({"conversations": record("a", "b")["conversations"]}, 3).where == "record 3"
    for image in (None, []):
        assert parse_record({**record("a", "b"), "image": image}).images == ()


def test_roles_alternate_and_a_first_turn_of_the_assistant_is_dropped():
    assert prepared(record("a", "b", "c", first="gpt")) == ["b", "c"]
    for raw, message in ((record("only me", first="gpt"), "no human turn"), (record("a", "b"), "turn 2 is the user's")):
        raw["conversations"][-1]["from"] = "gpt" if len(raw["conversations"]) == 1 else "human"
        with pytest.raises(DataError, match=f"data.json: record 7 .id 'r1'.: {message}"):
            prepared(raw)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("<image>What?", "<image>\nWhat?"),
        ("  Look <image> here. ", "<image>\nLook  here."),
        ("<image>\n", "<image>"),
        ("<image> and <image>", "<image>\nand"),
    ],
)
def test_one_image_moves_to_the_front_of_its_turn(text, expected):
    assert prepared(record(text, "b", image="a.png")) == [expected, "b"]
    assert prepared(record("hello", "b", text, "d", image=["a.png"])) == ["hello", "b", expected, "d"]


def test_several_images_in_one_turn_stay_where_they_are():
    text = "First <image>, then <image>: what changed?"
    assert prepared(record(text, "b", image=["a.png", "b.png"])) == [text, "b"]
    separate = record("What? <image>", "b", "And <image>?", "d", image=["a.png", "b.png"])
    assert prepared(separate) == ["<image>\nWhat?", "b", "<image>\nAnd ?", "d"]


def test_tags_go_around_each_image():
    assert prepared(record("What? <image>", "b", image="a.png"), MMTAG)[0] == "<Image><image></Image>\nWhat?"
    both = prepared(record("<image> <image>", "b", image=["a.png", "b.png"]), MMTAG)
    assert both[0] == "<Image><image></Image> <Image><image></Image>"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (record("What?", "b", image="a.png"), "0 <image> placeholders for 1 image;"),
        (record("<image> a", "b", "<image> c", "d", image="a.png"), "2 <image> placeholders for 1 image;"),
        (record("<image> a", "b", image=["a.png", "b.png"]), "1 <image> placeholder for 2 images;"),
        (record("<image> <image> <image>", "b", image=["a.png", "b.png"]), "3 <image> placeholders for 2 images;"),
        (record("<image>\nWhat?", "b"), "1 <image> placeholder for 0 images"),
        (record("What?\n<image>", "b"), "1 <image> placeholder for 0 images"),
        (record("<image>", "b", "What?", image="a.png", first="gpt"), "0 <image> placeholders for 1 image;"),
    ],
)
def test_placeholders_must_match_images(raw, message):
    with pytest.raises(DataError, match=f"data.json: record 7 .id 'r1'.: {message}.*its own file name"):
        prepared(raw)
    assert prepare_turns(parse_record(raw), V1, check_images=False)


def test_a_placeholder_that_is_talked_about_is_text():
    texts = ["What does <image> mean in a prompt?", "<image> marks its place."]
    assert prepared(record(*texts)) == texts


def test_plain_looks_at_no_roles():
    assert prepared(record("<image>", "a kite", image="a.png", first="gpt"), PLAIN) == ["<image>", "a kite"]
    turns = prepare_turns(parse_record(record("Say. <image>", "a kite", image="a.png")), PLAIN)
    assert turns == [Turn("user", "<image>\nSay."), Turn("assistant", "a kite")]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (record("<image>", "a", "b", image="a.png"), "one question and one answer, not 3 turns"),
        (record("hello", "a", image="a.png"), "needs <image> in the first turn"),
        (record("<image>", "a kite"), "1 <image> placeholder for 0 images"),
        (record("<image>", "a <image>", image="a.png"), "2 <image> placeholders for 1 image"),
    ],
)
def test_records_that_do_not_suit_plain(raw, message):
    with pytest.raises(DataError, match=f"record 7 .id 'r1'.: .*{message}"):
        prepared(raw, PLAIN)


RECORDS = [
    record("a", "b"),
    record('x "], [{" \\', "é\u2028🙂 \n}"),
    {**record("c", "d"), "other": [[1, {"k": []}], {}]},
]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("before", ["", "\ufeff", " \n"])
def test_records_are_found_wherever_a_block_ends(block, before, tmp_path, monkeypatch):
    for module in (json_array, jsonl):
        monkeypatch.setattr(module, "BLOCK", block)
    (tmp_path / "a.json").write_text(before + json.dumps(RECORDS, indent=1) + "\n", encoding="utf-8")
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in RECORDS)
    (tmp_path / "a.jsonl").write_bytes((before + lines).encode())
    for name in ("a.json", "a.jsonl"):
        reader = pickle.loads(pickle.dumps(open_reader(tmp_path / name)))
        assert list(reader) == RECORDS and reader[-1] == RECORDS[2] and reader[:2] == RECORDS[:2]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(RECORDS[0]) + "\n")
    reader = open_reader(file)
    file.write_text(json.dumps(RECORDS[1]) + "\n")
    with pytest.raises(DataError, match="has changed"):
        reader[0]


# -- dialects ---------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A kite."}]
EXPECTED = [Turn("user", "<image>\nWhat?"), Turn("assistant", "A kite.")]


def parts(*contents):
    return [{"role": "user", "content": list(contents)}, CHAT[1]]


TEXT, IMAGE = {"type": "text", "text": "What?"}, {"type": "image"}


@pytest.mark.parametrize(
    "raw",
    [
        {"messages": CHAT, "images": ["a.png"]},
        {"messages": CHAT, "images": "a.png"},
        {"messages": CHAT, "image_path": "a.png", "image": None, "videos": [], "tools": "x"},
        {"messages": CHAT, "images": [{"path": "a.png", "bytes": None}]},
        {"messages": parts(IMAGE, TEXT), "images": ["a.png"]},
        {"messages": parts({**IMAGE, "image": "a.png", "text": None}, {**TEXT, "image": None})},
        {"messages": parts({**IMAGE, "path": "a.png"}, TEXT)},
        {"conversations": CHAT, "image": "a.png"},
        {"messages": [{**CHAT[0], "images": ["a.png"], "weight": 1}, {**CHAT[1], "tool_calls": None}]},
        {"conversations": [{"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "A kite."}],
         "images": ["a.png"], "image_url": "https://example.org/a.png"},
    ],
)  # fmt: skip
def test_records_of_other_tools_are_read(raw):
    parsed = parse_record(raw)
    assert parsed.images == ("a.png",) and prepare_turns(parsed, V1) == EXPECTED


def test_several_images_in_typed_parts_keep_their_order():
    raw = {"messages": parts(IMAGE, TEXT, {**TEXT, "text": " Or"}, IMAGE), "images": ["a.png", "b.png"]}
    assert prepare_turns(parse_record(raw), V1)[0].text == "<image>\nWhat? Or\n<image>"


@pytest.mark.parametrize(
    "raw",
    [
        {"messages": [{"role": "system", "content": "Be brief."}, *CHAT], "image": "a.png"},
        {"conversations": CHAT, "image": "a.png", "system": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."}, *CHAT], "image": "a.png", "system": "Be brief."},
        {"messages": [{"role": "developer", "content": "Be brief."}, *CHAT], "image": "a.png"},
    ],
)
def test_system_texts_are_used(raw):
    parsed = parse_record(raw)
    prompt = V1.prompt(prepare_turns(parsed, V1), byte_level_tokenizer())
    assert prompt.startswith("Be brief. USER: <image>\nWhat? ASSISTANT: A kite.")
    assert [turn.text for turn in prepare_turns(parsed, PLAIN)] == ["<image>\nWhat?", "A kite."]


def test_consecutive_system_texts_are_joined():
    said = [{"role": role, "content": text} for role, text in (("system", "Be brief."), ("developer", "Be kind."))]
    raw = {"messages": [*said, *CHAT], "image": "a.png"}
    assert prepare_turns(parse_record(raw), V1)[0] == Turn("system", "Be brief.\n\nBe kind.")
    assert len(prepare_turns(parse_record(raw), PLAIN)) == 2
    with pytest.raises(DataError, match="turn 4 is the system's where the user's was expected"):
        prepare_turns(parse_record({"messages": [said[0], *CHAT, said[1]], "image": "a.png"}), V1)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"messages": CHAT, "video": "a.mp4"}, "'video' is not read"),
        ({"messages": [{**CHAT[0], "videos": ["a.mp4"]}, CHAT[1]], "image": "a.png"}, "'videos' is not read"),
        ({"messages": [{**CHAT[0], "image_url": "x"}, CHAT[1]]}, "'image_url' is not read"),
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{"id": 1}]}], "image": "a.png"}, "turn 2 calls a tool"),
        ({"messages": CHAT, "image": "a.png", "audios": ["a.wav"]}, "'audios' is not read"),
        ({"messages": CHAT, "image_url": "https://example.org/a.png"}, "'image_url' is not read.*'image'"),
        ({"messages": CHAT, "pixel_values": [1]}, "'pixel_values' is not read"),
        ({"messages": CHAT, "image": "a.png", "images": ["b.png"]}, "'image' and 'images' name different images"),
        ({"messages": parts({"type": "video", "video": "a.mp4"})}, "turn 1 has a part of type 'video'"),
        ({"messages": parts({"type": "image_url", "image_url": {"url": "x"}})}, "a part of type 'image_url'"),
        ({"messages": parts({**IMAGE, "url": "x"}, TEXT)}, "url"),
        ({"messages": parts({**IMAGE, "image": "a.png"}, TEXT), "images": ["b.png"]}, "both in the messages and next"),
        ({"messages": CHAT, "system": ["x"]}, "'system' must be text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1 is from 'tool'"),
        ({"conversations": [{"from": "\ud83d", "value": "x"}], "id": "\ud83d"}, r"turn 1 is from '\\ud83d'"),
        ({"\ud83d": 1}, r"no 'conversations' or 'messages' .keys: '\\ud83d'"),
        ({"messages": CHAT, "images": [3]}, "'images' must be a file name"),
    ],
)
def test_parts_that_nothing_reads_are_refused_by_name(raw, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_record(raw, 7, "data.json")
    str(caught.value).encode()


@pytest.mark.parametrize(
    "text",
    [
        "<video>\nWhat?",
        "What?\n<img>",
        "<|image_1|>\nWhat?",
        "Look: <img>a.png</img> What?",
        "<image_placeholder> What?",
    ],
)
def test_tags_of_other_tools_are_refused(text):
    with pytest.raises(DataError, match="is not read, only <image> is"):
        prepared(record(text, "b"))


def test_html_is_text():
    for text in ("<video>\n<source src='a'>\n</video>", 'Why does <img src="a.png"> fail?', "Explain the <audio> tag."):
        assert prepared(record(text, "b")) == [text, "b"]


def test_images_go_first_when_asked(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "What?"}], "images": ["a.png"]})
    )
    with pytest.raises(DataError, match="0 <image> placeholders for 1 image; .*--image_placeholder first"):
        prepare_turns(DataFiles(tmp_path / "a.jsonl")[0], V1)
    assert DataFiles(tmp_path / "a.jsonl", "first")[0].turns == (Turn("user", "<image>\nWhat?"),)
    with pytest.raises(ConfigError, match="'last'; choose one of written, first"):
        DataFiles(tmp_path / "a.jsonl", "last")
