"""The verbs ``data check`` and ``tokenize``, through the command's entry point."""

import json

import pytest
from data_helpers import byte_level_tokenizer, decode_spans, jsonl, train_sentencepiece, turns
from PIL import Image
from tower_parts import tower_config
from train_parts import write_parts
from transformers import AutoTokenizer

from tove_llava.cli import main
from tove_llava.data import load_tokenizer
from tove_llava.llava.processing import build_processor

GOOD = [
    {"id": "a", "image": "a.png", "conversations": turns("<image>\nWhat?", "A kite.")},
    {"id": "a", "image": "grey.png", "conversations": turns("<image>\nWhat?", "A drum.")},
    {"id": "t", "conversations": turns("Hello", "Hi.", "Well?", "Yes.")},
    {"id": "m", "image": ["a.png", "grey.png"], "conversations": turns("<image> <image>", "Two.")},
]
BAD = [
    {"id": "roles", "conversations": [{"from": "robot", "value": "x"}]},
    {"id": "count", "image": "a.png", "conversations": turns("What?", "A kite.")},
    {"id": "absent", "image": "absent.png", "conversations": turns("<image>\nWhat?", "A kite.")},
    {"id": "damaged", "image": "damaged.png", "conversations": turns("<image>\nWhat?", "A kite.")},
    {"id": "outside", "image": "../data.json", "conversations": turns("<image>\nWhat?", "A kite.")},
    {"id": "mute", "conversations": turns("Hello?", "")},
    {"id": "long", "conversations": turns("lantern " * 500, "Lost.")},
    "not a record",
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "images" / "grey.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "images" / "noise.png")
    (tmp_path / "images" / "damaged.png").write_bytes((tmp_path / "images" / "noise.png").read_bytes()[:900])
    train_sentencepiece(tmp_path / "tokenizer")
    return tmp_path


def run(folder, records, *flags):
    (folder / "data.json").write_text(json.dumps(records))
    paths = ["--data-path", str(folder / "data.json"), "--image-folder", str(folder / "images")]
    return main(["data", "check", *paths, "--workers", "1", *flags])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_good_data_set(folder, capsys, workers):
    flags = ["--tokenizer", str(folder / "tokenizer"), "--num-image-tokens", "9", "--workers", workers]
    assert run(folder, GOOD, *flags, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["bad"], report["problems"], report["counts"]) == (4, 0, [], {})
    assert (report["images"], report["image_modes"]) == (2, {"L": 1, "RGB": 1})
    assert (report["text_only"], report["multi_image"], report["turns"], report["duplicate_ids"]) == (1, 1, 4, 1)
    assert report["tokens"]["truncated"] == 0
    assert report["tokens"]["max"] > report["tokens"]["mean"] > report["tokens"]["mean_supervised"] > 0
    assert run(folder, GOOD) == 0
    assert capsys.readouterr().out.strip().endswith("all records are good")


def test_keys_that_nothing_reads_are_listed(folder, capsys):
    odd = {**GOOD[2], "source": "x", "conversations": [{**turn, "weight": 1} for turn in GOOD[2]["conversations"]]}
    assert run(folder, [*GOOD, odd, {**odd, "rating": 5}]) == 0
    assert "keys not read   source 2, conversations.weight 2, rating 1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"id": "x", "conversations": [{"from": "\\ud83d", "value": "x"}]}', "half of a surrogate pair"),
        (b'{"id": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
        (b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 100 deep"),
        (b'{"id": NaN}', "NaN is not a number"),
        (b'{"id": 1} {"id": 2}', "Extra data"),
        (b'{"id": "\xff"}', "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("verb", ["data check", "tokenize"])
def test_a_line_that_is_not_read_is_named_and_the_others_go_on(folder, capsys, verb, line, words):
    file = folder / "data.jsonl"
    file.write_bytes(json.dumps(GOOD[2]).encode() + b"\r\n" + line + b"\r\n" + json.dumps(GOOD[0]).encode())
    if verb == "tokenize":
        assert main(["tokenize", "--tokenizer", str(folder / "tokenizer"), "--records", str(file), "--json"]) == 0
        problems = [json.loads(row)["error"] for row in capsys.readouterr().out.splitlines()]
    else:
        paths = ["--data-path", str(file), "--image-folder", str(folder / "images")]
        assert main(["data", "check", *paths, "--json"]) == 2
        problems = [None, *(each["message"] for each in json.loads(capsys.readouterr().out)["problems"]), None]
    assert (
        problems[0] is None and problems[2] is None and f"{file}, line 2: not" in problems[1] and words in problems[1]
    )


def test_think_blocks_by_a_flag(folder, capsys):
    byte_level_tokenizer().save_pretrained(folder / "chatml")
    thought = turns("What?", "<think>\nRound.\n</think>\n\nA ball.")
    (folder / "records.json").write_text(json.dumps([{"id": "x", "conversations": thought}]))
    command = ["tokenize", "--tokenizer", str(folder / "chatml"), "--records", str(folder / "records.json")]
    learned = {}
    for how in ("refuse", "drop", "keep"):
        assert main([*command, "--template", "chat_template", "--reasoning", how, "--color", "never"]) == 0
        learned[how] = capsys.readouterr().out
    assert "begins with a think block" in learned["refuse"]
    assert "⟦A ball.<|im_end|>⟧" in learned["drop"] and "⟦<think>\nRound." in learned["keep"]
    assert main([*command, "--template", "chat_template", "--reasoning", "perhaps"]) == 2
    assert "refuse, drop, keep" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["1", "3"])
def test_every_problem_is_found(folder, capsys, workers):
    flags = ["--tokenizer", str(folder / "tokenizer"), "--model-max-length", "300", "--num-image-tokens", "9"]
    assert run(folder, GOOD + BAD, *flags, "--workers", workers, "--json") == 2
    report = json.loads(capsys.readouterr().out)
    ids = ["roles", "count", "absent", "damaged", "outside", "mute", "long", ""]
    kinds = ["structure", "conversation", "image", "image", "image", "length", "length", "structure"]
    found = [(problem["index"], problem["id"], problem["kind"]) for problem in report["problems"]]
    assert found == list(zip(range(4, 12), ids, kinds, strict=True))
    assert report["counts"] == {"structure": 2, "conversation": 1, "length": 2, "image": 3}
    assert report["bad"] == 8
    for problem in report["problems"]:
        assert f"data.json: record {problem['index']}" in problem["message"]


def test_the_table_names_records_and_counts(folder, capsys):
    assert run(folder, GOOD + BAD, "--show", "2") == 2
    out = capsys.readouterr().out
    assert "record 4 (id 'roles')" in out and "record 6" not in out and "and 5 more" in out
    assert out.strip().endswith("7 of 12 records cannot be trained on")


def test_one_bad_image_is_reported_for_each_of_its_records(folder, capsys):
    assert run(folder, [BAD[3], GOOD[0], {**BAD[3], "id": "again"}], "--json") == 2
    assert [problem["id"] for problem in json.loads(capsys.readouterr().out)["problems"]] == ["damaged", "again"]
    assert run(folder, [BAD[3]], "--no-decode") == 0 and run(folder, [BAD[2]], "--no-decode") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-folder", "/nowhere"], "no image folder /nowhere"),
        (["--template", "v7"], "unknown conversation template 'v7'"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--data-path", "/nowhere.json"], "no file /nowhere.json"),
        (["--tokenizer", "/nowhere"], "no tokenizer folder /nowhere"),
    ],
)
def test_wrong_flags(folder, capsys, flags, message):
    assert run(folder, GOOD, *flags) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out
    assert main(["data", "check", "--data-path", str(folder / "data.json")]) == 2
    assert "--image-folder" in capsys.readouterr().err


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def tokenize(folder, records, *flags):
    (folder / "data.json").write_text(json.dumps(records))
    return main(["tokenize", "--tokenizer", str(folder / "tokenizer"), "--records", str(folder / "data.json"), *flags])


def test_json_lines(folder, capsys):
    assert tokenize(folder, GOOD + BAD, "--json") == 0
    rows = lines(capsys)
    assert len(rows) == len(GOOD + BAD)
    assert set(rows[0]) == {"id", "input_ids", "labels", "error", "warning"}
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert rows[0]["input_ids"].count(-200) == 1
    assert decode_spans(tokenizer, rows[0]["labels"]) == [" A kite.</s>"]
    assert decode_spans(tokenizer, rows[2]["labels"]) == [" Hi.</s>", " Yes.</s>"]
    assert (rows[0]["error"], rows[0]["warning"]) == (None, None)
    assert rows[4]["input_ids"] is None and "from 'robot'" in rows[4]["error"]
    assert rows[5]["input_ids"] and "0 <image> placeholders for 1 image" in rows[5]["warning"]
    assert "nothing is supervised" in rows[9]["warning"]


def _hub_folder(model, folder):
    """Lay a LLaMA out as on the hub."""
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "pad_token": None}
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "tokenizer.model").write_bytes(model.read_bytes())


def _resaved_folder(model, folder):
    """Save transformers' own conversion, without the SentencePiece model."""
    _hub_folder(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    tokenizer.save_pretrained(folder)
    assert tokenizer("a  kite")["input_ids"] != load_tokenizer(model)("a  kite")["input_ids"]


def _checkpoint_folder(model, folder):
    tokenizer = load_tokenizer(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    (folder / "parts").mkdir()
    vision = tower_config(folder / "parts", names=(), fusion="none")
    build_processor(tokenizer, vision, image_token="<image>", template="v1").save_pretrained(folder)


FOLDERS = {
    "bare": lambda model, folder: (folder / "tokenizer.model").write_bytes(model.read_bytes()),
    "hub": _hub_folder,
    "resaved": _resaved_folder,
    "checkpoint": _checkpoint_folder,
}


def _through_the_command(tokenizer, records, folder, capsys, *flags):
    (folder / "rows.json").write_text(json.dumps(records))
    command = ["tokenize", "--tokenizer", str(tokenizer), "--records", str(folder / "rows.json"), "--json", *flags]
    assert main(command) == 0
    return lines(capsys)


@pytest.mark.parametrize("kind", FOLDERS)
def test_golden_rows_through_the_command(conformance, tmp_path, capsys, kind):
    """Compare every id and label.

    Three kinds of folders use only the two templates with most rows.
    """
    FOLDERS[kind](conformance / "llava" / "llama_tokenizer.model", tmp_path)
    rows = jsonl(conformance / "llava" / "tokenization.jsonl")
    equal = {"train": 0, "generate": 0}
    templates = {row["template"] for row in rows} - {"some_unknown_name"}
    for template in sorted(templates) if kind == "bare" else ("v1", "vicuna_v1"):
        trained = [row for row in rows if row["template"] == template and row["kind"] == "train"]
        records = [row["record"] for row in trained]
        printed = _through_the_command(tmp_path, records, tmp_path, capsys, "--template", template)
        for row, ours in zip(trained, printed, strict=True):
            assert ours["id"] == row["record"].get("id")
            if row["id"] == "system-role":  # LLaVA stops at it
                assert " Hi.</s>" in decode_spans(load_tokenizer(tmp_path), ours["labels"])
                continue
            if row["error"] or row["id"] == "gpt-only":
                assert row["id"] in ours["error"] and ours["input_ids"] is None
                continue
            assert ours["input_ids"] == row["input_ids"], row["id"]
            assert ours["error"] is None and len(ours["labels"]) == len(ours["input_ids"])
            if not row["mismatch"]:  # 2048: what follows is never fed, and one row's labels differ there
                assert ours["labels"][:2048] == row["labels"][:2048], row["id"]
                equal["train"] += 1
        asked = [row for row in rows if row["template"] == template and row["kind"] == "generate"]
        prompts = [{"id": row["id"], "image": "x.png", "conversations": turns(*row["turns"][:-1])} for row in asked]
        if prompts:
            flags = ["--template", template, "--generate"]
            printed = _through_the_command(tmp_path, prompts, tmp_path, capsys, *flags)
            assert [ours["input_ids"] for ours in printed] == [row["input_ids"] for row in asked]
            equal["generate"] += len(asked)
    assert equal == ({"train": 111, "generate": 24} if kind == "bare" else {"train": 85, "generate": 19})


def test_rows_are_cut_as_training_cuts_them(folder, capsys):
    records = [BAD[6], GOOD[0]]
    assert tokenize(folder, records, "--json", "--model-max-length", "90") == 0
    long, image = lines(capsys)
    assert len(long["input_ids"]) == len(long["labels"]) == 90
    assert "to 90" in long["warning"] and "nothing is supervised" in long["warning"]
    whole = len(image["input_ids"])
    assert image["labels"][-1] >= 0 and image["warning"] is None
    assert tokenize(folder, records, "--json", "--model-max-length", str(whole + 5), "--num-image-tokens", "9") == 0
    image = lines(capsys)[1]
    assert len(image["input_ids"]) == whole - 3  # its image takes 8 tokens more than ids


def test_generation_prompts(folder, capsys):
    asked = {"id": "q", "conversations": turns("<image>\nWhat?")}
    assert tokenize(folder, [{**asked, "image": "a.png"}, asked, *GOOD], "--generate", "--json", "--limit", "2") == 0
    image, text = lines(capsys)  # only the first records
    assert load_tokenizer(folder / "tokenizer").decode(image["input_ids"][-4:]).endswith(":")
    assert set(image["labels"]) == {-100} and -200 in image["input_ids"]
    assert "no 'image'" in text["warning"] and -200 not in text["input_ids"]


def test_text_marks_what_is_learnt(folder, capsys):
    assert tokenize(folder, [GOOD[0], BAD[0]]) == 0
    plain = capsys.readouterr().out
    assert "USER: <image>" in plain and "ASSISTANT:⟦ A kite.</s>⟧" in plain and "error: " in plain
    assert tokenize(folder, [GOOD[0]], "--color", "always") == 0
    assert "ASSISTANT:\033[1;32m A kite.</s>\033[0m" in capsys.readouterr().out


def test_another_tokenizer_with_its_chat_template(folder, capsys):
    byte_level_tokenizer().save_pretrained(folder / "bytes")
    assert tokenize(folder, GOOD, "--tokenizer", str(folder / "bytes"), "--template", "chat_template") == 0
    assert "assistant\n⟦A kite.<|im_end|>⟧" in capsys.readouterr().out


@pytest.mark.parametrize(("stage", "shape"), [("pretrain", (200_000, 1)), ("finetune", (14_000, 4))])
def test_check_and_training_refuse_the_same_image_in_the_same_words(tmp_path, capsys, stage, shape):
    """Also where a data worker meets it: its error comes without the loader's traceback."""
    preset = write_parts(tmp_path)
    Image.new("L", shape).save(tmp_path / "long.png")
    file = tmp_path / "records.json"
    file.write_text(json.dumps([{"image": "long.png", "conversations": turns("<image>\nWhat?", "A line.")}] * 8))
    template = "plain" if stage == "pretrain" else "v1"
    own = ["--data-path", str(file), "--image-folder", str(tmp_path), "--image-size", "32"]
    assert main(["data", "check", *own, "--template", template]) == 2
    said = f"long.png: {shape[0]} x {shape[1]} pixels: too long and thin to be brought to a square"
    assert said in capsys.readouterr().out
    where = ["--preset", str(preset), "--stage", stage, "--data_path", str(file), "--image_folder", str(tmp_path)]
    where += ["--output_dir", str(tmp_path / "out"), "--deepspeed", "none"]
    where += ["--dataloader_num_workers", "1"] if stage == "pretrain" else []
    assert main(["train", *where]) == 2
    trained = capsys.readouterr().err
    assert said in trained and not {"Traceback", "Caught"} & set(trained.split())
    other = {"plain": "v1", "v1": "plain"}[template]  # its stages shape images in the other way
    assert main(["data", "check", *own, "--template", other]) == (2 if stage == "pretrain" else 0)
