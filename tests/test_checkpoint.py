"""What training saves, what loads, and what is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_parts import close, edit_manifest, logits
from train_parts import flags, write_parts, write_records
from transformers import AutoModelForCausalLM

from tove_llava import build_model, load_model, load_preset
from tove_llava.checkpoints.loading import load_processor, load_trained
from tove_llava.checkpoints.manifest import Manifest
from tove_llava.core.errors import CheckpointError
from tove_llava.train.arguments import parse
from tove_llava.train.run import main, run
from tove_llava.train.stages import freeze


@pytest.fixture(scope="module")
def root(kinds):
    return kinds


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def trainable_names(root, stage):
    preset = load_preset(str(root / "preset.yaml"))
    model, _ = build_model(preset, load_backbones=False)
    return freeze(model, preset.stage(stage)).names()


@pytest.mark.parametrize(("stage", "folder"), [("pretrain", "stage1"), ("finetune_lora", "lora"), ("finetune", "full")])
def test_saved_keys_are_the_trainable_keys(root, stage, folder):
    saved = {name.removeprefix("base_model.model.") for name in tensors(root / folder)}
    trained = {name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
               for name in trainable_names(root, stage)}  # fmt: skip
    assert saved == trained
    assert not [name for name in saved if "clip" in name or "backbone" in name]


def test_saved_values_are_trained_values(root):
    preset = load_preset(str(root / "preset.yaml"))
    untrained, _ = build_model(preset, load_backbones=False)
    start = dict(untrained.named_parameters())
    for folder in ("stage1", "lora", "full"):
        moved = [n for n, v in tensors(root / folder).items() if n in start and not torch.equal(v, start[n])]
        assert len(moved) > 10, folder


@pytest.mark.parametrize("folder", ["stage1", "lora", "full"])
def test_loading_gives_every_saved_tensor_back(root, folder):
    model, processor = load_model(root / folder)
    assert not model.training and model.tower.is_loaded
    present = {n.replace(".default.weight", ".weight"): p for n, p in model.named_parameters()}
    for name, value in tensors(root / folder).items():
        assert torch.equal(present[name.removeprefix("base_model.model.")], value), name
    assert processor.conversation_template == Manifest.read(root / folder).template
    assert torch.isfinite(logits(model)).all()


def test_loaded_model_is_the_trained_one(root):
    """The checkpoint of a model that is still in memory loads into the same function."""
    preset = load_preset(str(root / "preset.yaml"))
    model, _ = build_model(preset)
    load_trained(model, root / "stage1")
    loaded, _ = load_model(root / "stage1")
    assert torch.equal(logits(model.eval()), logits(loaded))


def test_merged_adapters_compute_the_same(root):
    separate, _ = load_model(root / "lora")
    merged, _ = load_model(root / "lora", merge_lora=True)
    base, _ = load_model(root / "stage1")
    close(logits(merged), logits(separate))
    assert not torch.allclose(logits(merged), logits(base), atol=1e-4)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_peft_reads_the_adapter(root):
    from peft import PeftModel

    base, _ = load_model(root / "lora", load_backbones=True)
    plain, _ = build_model(str(root / "preset.yaml"))
    with torch.no_grad():
        parameters = dict(plain.named_parameters())
        for name, value in load_file(root / "lora" / "trained.safetensors").items():
            parameters[name].copy_(value)
    wrapped = PeftModel.from_pretrained(plain, root / "lora").eval()
    close(logits(wrapped), logits(base))


def test_processor_survives(root):
    _, built = build_model(str(root / "preset.yaml"), template="v1", load_backbones=False)
    loaded = load_processor(root / "lora")
    text = "USER: <image>\nWhat is it? ASSISTANT: two  spaces</s>"
    assert loaded.tokenizer(text).input_ids == built.tokenizer(text).input_ids
    assert loaded.image_token_id == built.image_token_id and loaded.patch_size == 8
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    prompt = loaded.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.endswith("USER: <image>\nHi ASSISTANT:")


def test_self_contained_folder_needs_nothing_else(root, tmp_path):
    source = tmp_path / "parts"
    source.mkdir()
    write_parts(source)
    write_records(source, captions=4, count=4)
    output = tmp_path / "model"
    assert main(flags(source, "finetune_lora", output, "--max_steps", "1", "--self_contained", "True")) == 0
    before = logits(load_model(output)[0])
    shutil.rmtree(source)
    moved = tmp_path / "elsewhere"
    output.rename(moved)
    assert torch.equal(logits(load_model(moved)[0]), before)


def test_by_reference_folder_names_what_is_gone(root, tmp_path):
    copy = shutil.copytree(root / "stage1", tmp_path / "copy")
    edit_manifest(copy, {"source": f"hf:{tmp_path / 'gone'}"})
    with pytest.raises(CheckpointError, match="gone"):
        load_model(copy)


ONE_EXPERT = "[{name: segmentation, source: 'hf:%s', mode: features}]"


def test_language_model_that_has_changed_is_noticed(root, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(root / "lora", folder)
    shutil.copytree(root / "llm", tmp_path / "llm")
    assert Manifest.read(folder).language_fingerprint
    edit_manifest(folder, {"source": f"hf:{tmp_path / 'llm'}"})
    load_model(folder)
    weights = load_file(tmp_path / "llm" / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] = weights[name] + 0.01
    save_file(weights, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="its weights have changed"):
        load_model(folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vision.experts=" + ONE_EXPERT, "its experts are normal, segmentation, this model's segmentation"),
        ("vision.experts.normal.mode=features", "expert normal: mode 'map' against 'features'"),
        ("vision.projection_dim=12", "projection_dim 8 against 12"),
        ("vision.top_k=1", "top_k None against 1"),
    ],
)
def test_stage_two_refuses_another_tower(root, tmp_path, override, message):
    override = override.replace("%s", str(root / "segmentation"))
    arguments = flags(root, "finetune_lora", tmp_path / "x", "--pretrained", str(root / "stage1"), "--set", override)
    with pytest.raises(CheckpointError, match="another tower") as error:
        run(parse(arguments))
    assert message in str(error.value)
    assert not (tmp_path / "x").exists()


def test_stage_two_refuses_a_stage_two_folder(root, tmp_path):
    with pytest.raises(CheckpointError, match="stage 1's folder"):
        run(parse(flags(root, "finetune_lora", tmp_path / "x", "--pretrained", str(root / "lora"))))


def damaged(root, tmp_path, folder="stage1"):
    return shutil.copytree(root / folder, tmp_path / "damaged")


def test_incomplete_folder_is_refused(root, tmp_path):
    copy = damaged(root, tmp_path)
    (copy / "tove_llava.json").unlink()
    with pytest.raises(CheckpointError, match="written last"):
        load_model(copy)
    (copy / "checkpoint-4").mkdir()
    with pytest.raises(CheckpointError, match="unfinished run"):
        load_model(copy)
    with pytest.raises(CheckpointError, match="not a folder"):
        load_model(tmp_path / "nowhere")


def test_pickles_are_refused(root, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    torch.save({"model.mm_projector.0.weight": torch.zeros(2)}, folder / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        load_model(folder)


@pytest.mark.parametrize("folder", ["stage1", "lora"])
def test_truncated_weights_are_refused(root, tmp_path, folder):
    copy = damaged(root, tmp_path, folder)
    for file in copy.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-50])
        with pytest.raises(CheckpointError, match=file.name):
            load_model(copy)
        shutil.copy(root / folder / file.name, file)


def test_missing_and_foreign_tensors_are_refused(root, tmp_path):
    copy = damaged(root, tmp_path)
    file = copy / "trained.safetensors"
    whole = load_file(file)
    name = "model.vision_tower.fusion.output.weight"
    save_file({k: v for k, v in whole.items() if k != name}, file)
    with pytest.raises(CheckpointError, match="another tower"):
        load_model(copy)
    save_file({**whole, name: whole[name][:, :3].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"another tower.*\(16, 3\) against \(16, 8\)"):
        load_model(copy)
    save_file({**whole, "foreign": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="foreign"):
        load_model(copy)


def test_new_vocabulary_rows_are_the_same_in_every_load(root):
    first, _ = build_model(str(root / "preset.yaml"), load_backbones=False)
    second, _ = load_model(root / "stage1", load_backbones=False)
    for matrix in ("get_input_embeddings", "get_output_embeddings"):
        a, b = getattr(first, matrix)().weight, getattr(second, matrix)().weight
        assert a.shape[0] % 64 == 0 and torch.equal(a, b)
    language = AutoModelForCausalLM.from_pretrained(root / "llm")
    old = language.get_input_embeddings().weight
    assert torch.equal(first.get_input_embeddings().weight[: len(old)], old)
