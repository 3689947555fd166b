import os

import pytest
import torch
from answer_parts import ask, byte_tokenizer, picture
from PIL import Image
from tower_parts import GRID, IMAGE, text_config
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tove_llava import cli
from tove_llava.checkpoints.manifest import MANIFEST
from tove_llava.core.errors import CheckpointError, DataError
from tove_llava.inference.engine import Engine, Message
from tove_llava.serve import models


@pytest.fixture(scope="module")
def engine(answerer):
    return Engine(answerer, name="tiny")


def test_a_chat_sees_a_photograph_upright_and_a_benchmark_sees_it_as_stored(engine, tmp_path):
    upright = picture(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view"
    upright.rotate(90, expand=True).save(tmp_path / "phone.png", exif=exif)
    answerer = engine.answerer
    assert torch.equal(engine.prepare(ask("What?", tmp_path / "phone.png")).pixels[0], answerer.pixels(upright))
    assert torch.equal(answerer.pixels(tmp_path / "phone.png"), answerer.pixels(upright.rotate(90, expand=True)))


def test_several_images_in_several_turns_keep_their_order(engine):
    images = picture(1), picture(2)
    chat, swapped = ([*ask("One", a), Message("assistant", "ok"), *ask("Two", b)] for a, b in (images, images[::-1]))
    asked = engine.prepare(chat)
    assert asked.prompt.count(engine.answerer.image_token_id) == 2 * 16 and len(asked.pixels) == 2
    assert all(torch.equal(p, engine.answerer.pixels(i)) for p, i in zip(asked.pixels, images, strict=True))
    assert engine.answer(chat, max_new_tokens=12) != engine.answer(swapped, max_new_tokens=12)


def test_placeholders_go_in_front_unless_the_text_has_them(engine):
    tokenizer = engine.answerer.tokenizer

    def prompt(text, *images):
        return tokenizer.decode(engine.prepare(ask(text, *images)).prompt).replace("<image>" * 16, "[image]")

    one = picture()
    assert "USER: [image]\nWhat? ASSISTANT:" in prompt("What?", one)
    assert "USER: [image]\n[image]\nWhat? ASSISTANT:" in prompt("What?", one, one)
    assert "USER: In [image], what? ASSISTANT:" in prompt("In <image>, what?", one)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "last message must be the user's"),
        ([Message("assistant", "hm")], "last message must be the user's"),
        ([Message("user", "  ")], "question is empty"),
        ([Message("robot", "x"), Message("user", "x")], "a role is"),
        ([Message("user", "x"), Message("user", "x")], "turn 2"),
        ([Message("user", "word " * 500)], "start a new one"),
        (ask("x", "no_such_file.png"), "no image file no_such_file.png"),
        (ask("<image> what?"), "placeholder"),
        (ask("<image> <image>", picture()), "2 times, but it has 1"),
    ],
)
def test_bad_conversations_are_explained_before_anything_runs(engine, messages, words):
    with pytest.raises(DataError, match=words):
        engine.stream(messages)


def test_the_answer_is_cut_to_what_the_model_can_hold(engine):
    room = engine.answerer.max_length
    asked = ask("x" * (room - 220))
    assert room - len(engine.prepare(asked).prompt) < 100
    engine.answer(asked, max_new_tokens=1000)


def test_the_newest_finished_model_is_served(tmp_path):
    assert models.newest_model(tmp_path) is None
    for age, name in enumerate(["new", "old", "new/checkpoint-100"]):
        (tmp_path / name).mkdir(parents=True)
        file = tmp_path / name / "tove_llava.json"
        file.write_text("{}")
        os.utime(file, (1000 - age if age < 2 else 2000,) * 2)
    (tmp_path / "unfinished").mkdir()
    assert models.newest_model(tmp_path) == tmp_path / "new"


def test_no_model_names_the_command_that_makes_one(tmp_path, monkeypatch, capsys):
    assert models.MANIFEST == MANIFEST
    monkeypatch.chdir(tmp_path)
    for verb in ("chat", "demo", "serve"):
        assert cli.main([verb]) == 2
        assert "tove-llava quickstart" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="nowhere"):
        models.find_model("nowhere")


def save_stock(folder):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=IMAGE, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(vocab_size=len(tokenizer), max_position_embeddings=600, initializer_range=0.4),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID**2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default").save_pretrained(folder)


def test_a_stock_llava_answers_as_its_own_generate_does(tmp_path):
    save_stock(tmp_path)
    stock = Engine.load(tmp_path, device="cpu")
    answerer = stock.answerer
    asked = stock.prepare(ask("What is it?", picture()))
    ids = torch.tensor([asked.prompt])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": asked.pixels[0][None]}
    output = answerer.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = answerer.tokenizer.decode(output[0, len(asked.prompt) :], skip_special_tokens=True).strip()
    assert stock.answer(ask("What is it?", picture()), max_new_tokens=8) == expected != ""
    assert stock.routing(picture()) is None


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json, line 1: not valid JSON"):
        Engine.load(tmp_path)
