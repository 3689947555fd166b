"""``tove-llava export --format hf-llava``: written folder, equal model, and refusals."""

import errno
import json
import os
import subprocess

import pytest
import torch
from answer_parts import picture
from export_parts import QUESTION, ask_elsewhere, ask_stock, checkpoint, compare, compare_in_clean_environment, run_card
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from train_parts import flags, write_parts, write_records
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from tove_llava import load_model
from tove_llava.checkpoints import conversion, exports
from tove_llava.checkpoints.conversion import export_model
from tove_llava.cli import main
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.data import Turn, encode_prompt, get_template, load_tokenizer
from tove_llava.inference.engine import Engine, Message
from tove_llava.inference.generation import Answerer
from tove_llava.train.run import main as train

ALL = ("depth", "edge", "normal")


@pytest.fixture(scope="module")
def detached(tmp_path_factory):
    """A ToVE checkpoint with all experts detached, and its export."""
    root = tmp_path_factory.mktemp("detached")
    model = checkpoint(root, detached=ALL)
    export_model(model, root / "out")
    picture(3, (40, 24)).save(root / "wide.png")
    return root


@pytest.mark.parametrize("ratio", ["pad", "square"])
@pytest.mark.parametrize("tower", [{"detached": ALL}, {"fusion": "none"}, {"fusion": "none", "names": ()}])
def test_stock_classes_compute_the_same(tmp_path, tower, ratio):
    model = checkpoint(tmp_path, ratio=ratio, **tower)
    assert export_model(model, tmp_path / "out") == []
    picture(3, (40, 24)).save(tmp_path / "wide.png")
    compare(model, ask_stock(tmp_path / "out", tmp_path / "wide.png", QUESTION)[1], tmp_path / "wide.png")


def test_our_own_answers_from_the_exported_folder_are_the_same(tmp_path):
    model = checkpoint(tmp_path, detached=ALL, template="llava_v1", ratio="square")
    export_model(model, tmp_path / "out")
    message = Message("user", QUESTION, [picture(3, (40, 24))])
    own, exported = Engine.load(model, "cpu"), Engine.load(tmp_path / "out", "cpu")
    assert exported.answerer.template is get_template("llava_v1")
    assert exported.answerer.transform.aspect_ratio == "square"
    assert own.answer([message], max_new_tokens=12) == exported.answer([message], max_new_tokens=12)


def test_adapters_are_merged(tmp_path):
    write_parts(tmp_path)
    write_records(tmp_path, captions=4, count=4)
    options = ["--max_steps", "2", "--set", "vision.fusion=none", "--set", "vision.experts=[]"]
    assert train(flags(tmp_path, "finetune_lora", tmp_path / "lora", *options)) == 0
    export_model(tmp_path / "lora", tmp_path / "out")
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "lora" in name]
    file = tmp_path / "images" / "0.png"
    compare(tmp_path / "lora", ask_stock(tmp_path / "out", file, QUESTION)[1], file)


def test_folder_says_what_it_is(detached):
    out = detached / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and config["model_type"] == "llava"
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert config["vision_config"]["num_hidden_layers"] == 2  # the parts' CLIP has three; layer -2 is used
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-1, "default")
    assert (config["conversation_template"], config["image_aspect_ratio"]) == ("v1", "pad")
    assert "auto_map" not in config
    [image] = AutoTokenizer.from_pretrained(out)("<image>", add_special_tokens=False).input_ids
    assert config["image_token_index"] == image and config["image_seq_length"] == 16
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2 and generation["do_sample"] is False
    # transformers 4's generate() refuses token_type_ids, which its tokenizers make by default.
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert "<s>" not in (out / "chat_template.jinja").read_text()  # which this tokenizer does not write
    card = (out / "README.md").read_text()
    assert "ASSISTANT:" in card and "bundled:llm" in card and "Apache-2.0" in card
    for file in out.iterdir():
        assert os.stat(file).st_mode & 0o044 == 0o044, file
        if file.suffix != ".safetensors":
            assert str(detached) not in file.read_text(), file


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_rotary_settings_have_the_names_of_transformers_4_too(tmp_path, scaling):
    rope = {"rope_theta": 100_000.0, **scaling}
    out = tmp_path / "out"
    export_model(checkpoint(tmp_path, fusion="none", text={"rope_parameters": rope}), out)
    text = json.loads((out / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 100_000.0 and text.get("rope_scaling") == (scaling if len(scaling) > 1 else None)
    assert AutoConfig.from_pretrained(out).text_config.rope_parameters == rope


def test_code_of_the_card_runs(detached, tmp_path):
    assert run_card(detached / "out", detached / "wide.png", tmp_path)


# What vLLM's LlavaForConditionalGeneration and SGLang's read: docs/guides/export.md has the sources.
PREFIXES = ("language_model.model.", "multi_modal_projector.linear_", "vision_tower.vision_model.")
HEAD = "language_model.lm_head.weight"
CLIP_NAMES = ("embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
              "pre_layrnorm.weight", "encoder.layers.0.self_attn.q_proj.weight", "encoder.layers.0.mlp.fc1.bias",
              "encoder.layers.1.layer_norm2.bias", "post_layernorm.weight")  # fmt: skip
LLAMA_NAMES = ("embed_tokens.weight", "norm.weight", "layers.0.self_attn.q_proj.weight",
               "layers.1.mlp.down_proj.weight", "layers.0.input_layernorm.weight",
               "layers.1.post_attention_layernorm.weight")  # fmt: skip


def test_weights_have_the_names_that_servers_read(detached):
    with safe_open(detached / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata()["format"] == "pt"
    assert [name for name in names if not name.startswith(PREFIXES) and name != HEAD] == []
    expected = {PREFIXES[2] + name for name in CLIP_NAMES} | {PREFIXES[0] + name for name in LLAMA_NAMES}
    expected |= {f"{PREFIXES[1]}{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")} | {HEAD}
    assert expected - names == set()
    assert not [name for name in names if name.startswith("vision_tower.vision_model.encoder.layers.2.")]
    _, info = LlavaForConditionalGeneration.from_pretrained(detached / "out", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])


def test_dtype(detached, tmp_path):
    export_model(detached / "model", tmp_path / "half", dtype="bfloat16")
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("begins", [True, False])
def test_who_writes_the_beginning_of_a_chat(begins):
    tokenizer = load_tokenizer("bundled:llm")
    template = exports.chat_template("v1", tokenizer, begins=begins)
    talk = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=not begins)["input_ids"]
    assert text.startswith("<s>") == begins and ids == encode_prompt([Turn("user", QUESTION)], tokenizer, "v1")


@pytest.mark.parametrize(("words", "begins"), [((), True), (("--bos", "tokenizer"), False)])
def test_the_flag_says_who_writes_it(monkeypatch, words, begins):
    asked = []
    monkeypatch.setattr(conversion, "export_model", lambda *args, **keys: asked.append(keys["chat_begins"]) or [])
    assert main(["export", "--model", "in", "--out", "out", *words]) == 0
    assert asked == [begins]


def test_higher_resolution_is_said_to_differ(tmp_path):
    model = checkpoint(tmp_path, detached=ALL, image_size=64)
    [remark] = export_model(model, tmp_path / "out")
    assert "64 pixels" in remark and remark in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["crop_size"]["height"] == 32


# -- prompts and token ids ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bundled", "llama"])
def llama(request, tmp_path_factory):
    """A training LLaMA tokenizer, and the exported one in stock transformers."""
    source = "bundled:llm"
    if request.param == "llama":
        source = request.getfixturevalue("conformance") / "llava" / "llama_tokenizer.model"
    root = tmp_path_factory.mktemp(request.param)
    model = checkpoint(root, tokenizer=load_tokenizer(source), fusion="none", names=())
    export_model(model, root / "out")
    _, processor = load_model(model, load_backbones=False)
    return processor.tokenizer, AutoTokenizer.from_pretrained(root / "out")


TEXTS = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from([" ", "  ", "     ", "\n", "<image>", "<s>", "</s>", "<unk>", "▁", "A cone", " two", "USER: "]),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_token_ids_are_the_trainings_own(llama, text):
    own, exported = llama
    assert exported(text).input_ids == own(text).input_ids
    assert exported(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids


def golden_rows(conformance):
    rows = [json.loads(line) for line in (conformance / "llava" / "tokenization.jsonl").read_text().splitlines()]
    return [row for row in rows if row["prompt"] is not None]


def test_golden_rows(llama, conformance):
    own, exported = llama
    rows = golden_rows(conformance)
    for row in rows:
        with_images = "image" in row.get("record", {"image": 0}) or row["template"] == "plain"
        texts = row["prompt"].split("<image>") if with_images else [row["prompt"].replace("<image>", "")]
        for text in texts:
            assert exported(text).input_ids == own(text).input_ids, row["id"]
        # The bundled vocabulary has other ids, and the card lists the text that differs.
        if own.vocab_size < 32000 or not with_images and "<image>" in row["prompt"]:
            continue
        ids = exported(texts[0]).input_ids
        for text in texts[1:]:
            ids += [-200, *exported(text, add_special_tokens=False).input_ids]
        assert ids[: len(row["input_ids"])] == row["input_ids"], row["id"]
    assert len(rows) == 156


def test_golden_prompts_through_the_chat_template(llama, conformance):
    """A server makes the golden ids of an image-first request."""
    _, exported = llama
    if exported.vocab_size < 32000:
        pytest.skip("the golden ids are LLaMA's")
    image, compared = exported.convert_tokens_to_ids("<image>"), set()
    for row in golden_rows(conformance):
        if row["kind"] != "generate" or row["template"] != "vicuna_v1":
            continue
        chat = []
        for index, text in enumerate(row["turns"][:-1]):
            pictures = [{"type": "image"}] * text.startswith("<image>\n")
            parts = [*pictures, {"type": "text", "text": text.removeprefix("<image>\n")}]
            chat.append({"role": ("user", "assistant")[index % 2], "content": parts})
        if "<image>" in "".join(part.get("text", "") for message in chat for part in message["content"]):
            continue  # the card lists images elsewhere than in front
        text = exported.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = exported(text, add_special_tokens=False).input_ids
        assert [-200 if token == image else token for token in ids] == row["input_ids"], row["id"]
        compared.add(row["id"])
    assert {"gen-vqa", "gen-image-only", "gen-multi-turn-3", "gen-text-only", "gen-empty-question"} <= compared
    assert len(compared) == 15


def test_a_stock_llavas_prompts_are_the_golden_ones(conformance, tmp_path):
    """Evaluation and chat use SentencePiece's ids for hub-like folders."""
    model_file = conformance / "llava" / "llama_tokenizer.model"
    model = checkpoint(tmp_path, tokenizer=load_tokenizer(model_file), fusion="none", names=())
    folder = tmp_path / "out"
    export_model(model, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    (folder / "added_tokens.json").write_text('{"<image>": 32000}')
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    answerer = Answerer.load(folder, "cpu", "float32")
    stock_tokenizer = AutoTokenizer.from_pretrained(folder)
    differs = 0
    for row in golden_rows(conformance):
        turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(row.get("turns", [])[:-1])]
        if row["template"] != "vicuna_v1" or not turns:
            continue
        ids = answerer.encode(turns, row["num_image_placeholders"])
        expected = [[32000] * answerer.num_image_tokens if token == -200 else [token] for token in row["input_ids"]]
        assert ids == sum(expected, []), row["id"]
        differs += stock_tokenizer(row["prompt"]).input_ids != row["input_ids"]
    assert differs


PLAIN_TEXT = st.text(min_size=1, max_size=20).filter(
    lambda text: text == text.strip() and not any(mark in text for mark in "<>[]▁")
)


@pytest.mark.parametrize("template", ["v1", "llava_v1", "v1_mmtag", "llava_llama_2", "llama_2", "plain"])
def test_chat_template_is_the_training_prompt(tmp_path, template):
    tokenizer = load_tokenizer("bundled:llm")
    model = checkpoint(tmp_path, tokenizer=tokenizer, template=template, fusion="none", names=())
    export_model(model, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    image, own = processor.image_token_id, load_model(model, load_backbones=False)[1].tokenizer
    before, after = get_template(template).image_wrapper
    single = get_template(template).single_turn

    @settings(max_examples=25, deadline=None)
    @given(texts=st.lists(PLAIN_TEXT, min_size=3, max_size=3))
    def check(texts):
        roles = ["user", "assistant", "user"][: 1 if single else 3]
        turns = [Turn(role, text) for role, text in zip(roles, texts, strict=False)]
        turns[0] = Turn("user", f"{before}<image>{after}\n{texts[0]}")
        chat = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in zip(roles, texts, strict=False)]
        chat[0]["content"].insert(0, {"type": "image", "image": picture()})
        got = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        expected = [16 * [image] if token == -200 else [token] for token in encode_prompt(turns, own, template)]
        assert got["input_ids"][0] == sum(expected, [])

    check()


# -- what is refused, and what is left behind --------------------------------------------------------------------------


def test_attached_experts_are_refused(tmp_path):
    model = checkpoint(tmp_path, detached=("edge",))
    with pytest.raises(ConfigError, match="depth, normal") as error:
        export_model(model, tmp_path / "out")
    for way in ("tove-llava merge", "tove-llava detach", "remote-code"):
        assert way in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_tower_that_is_more_than_clip_is_refused(detached, tmp_path, monkeypatch):
    from tove_llava.tower.fusion.tove_gate import ToveFusion

    whole = ToveFusion.forward

    def changed(self, base, *args, **kwargs):
        return whole(self, base, *args, **kwargs)._replace(tokens=base * 1.01)

    monkeypatch.setattr(ToveFusion, "forward", changed)
    with pytest.raises(CheckpointError, match="not its CLIP's"):
        export_model(detached / "model", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_used_targets_and_unknown_formats_are_refused(detached, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("used", "file"):
        assert main(["export", "--model", str(detached / "model"), "--out", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
    assert (tmp_path / "used" / "mine.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="hf-llava, llava-hf, original, remote-code, tove"):
        export_model(detached / "model", tmp_path / "new", "gguf")
    (tmp_path / "empty").mkdir()
    assert main(["export", "--model", str(detached / "model"), "--out", str(tmp_path / "empty")]) == 0
    with pytest.raises(ConfigError, match="--dtype does not apply to the format original"):
        export_model(detached / "model", tmp_path / "new", "original", dtype="float32")


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_export_leaves_only_folders_in_use(detached, tmp_path, monkeypatch, error, foreign):
    def fail(processor, folder, **kwargs):
        assert (folder / "model.safetensors").is_file()  # in the middle: the weights are written already
        if foreign:
            (tmp_path / "new" / "mine.txt").write_text("mine")
        raise error

    monkeypatch.setattr("transformers.LlavaProcessor.save_pretrained", fail)
    (tmp_path / "old").mkdir()
    for parent in ("new/folders", "old"):
        with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
            export_model(detached / "model", tmp_path / parent / "out")
        if isinstance(error, OSError):
            assert "No space left" in str(caught.value)
    left = ["mine.txt", "new", "old"] if foreign else ["old"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == left


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [4, 60, 150])
def test_full_disk_leaves_nothing(detached, tmp_path, kilobytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        with pytest.raises(CheckpointError, match="could not be written.*Make room"):
            export_model(detached / "model", disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def test_loads_without_this_package(detached, tmp_path):
    file = detached / "wide.png"
    seen = ask_elsewhere(detached / "out", file, QUESTION, tmp_path)
    assert seen["hidden"] == [] and seen["module"] == "transformers.models.llava.modeling_llava"
    compare(detached / "model", seen, file)


@pytest.mark.slow
def test_loads_in_an_environment_of_its_own(detached, tmp_path):
    compare_in_clean_environment(detached / "model", detached / "out", detached / "wide.png", QUESTION, tmp_path)
