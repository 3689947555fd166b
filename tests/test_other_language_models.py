"""Other language models than LLaMA's family train both stages and answer."""

from pathlib import Path

import pytest
import torch
import transformers
from stage_parts import close, logits
from train_parts import byte_tokenizer, flags, write_parts, write_records

from tove_llava import load_model, load_preset
from tove_llava.cli import main as command
from tove_llava.data import Turn
from tove_llava.inference.generation import Answerer
from tove_llava.llava.build import build_on_meta
from tove_llava.train.run import main

# The model, and further keys of its configuration.
FAMILIES = {
    "mistral": ("Mistral", {}), "qwen2": ("Qwen2", {}), "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8}), "gemma3": ("Gemma3", {"head_dim": 8}), "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}), "gpt_neox": ("GPTNeoX", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_parts(folder)
    write_records(folder, captions=4, count=4)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_both_stages_and_an_answer(root: Path, tmp_path: Path, family: str) -> None:
    name, more = FAMILIES[family]
    model_class = getattr(transformers, f"{name}ForCausalLM")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = model_class.config_class(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more,
    )  # fmt: skip
    model_class(config).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    chosen = ["--set", f"language.source=hf:{tmp_path / 'llm'}", "--max_steps", "1"]
    assert main(flags(root, "pretrain", tmp_path / "stage1", *chosen)) == 0
    stage2 = ["--pretrained", str(tmp_path / "stage1"), *chosen]
    assert main(flags(root, "finetune_lora", tmp_path / "model", *stage2)) == 0
    answerer = Answerer.load(tmp_path / "model", "cpu", "float32")
    assert answerer.model.config.text_config.model_type in (family, f"{family}_text")
    ids = answerer.encode([Turn("user", "<image>\nWhat is it?")], 1)
    features = answerer.features(answerer.pixels(root / "images" / "0.png")[None])
    (text,) = answerer.generate([ids], features, max_new_tokens=4)
    assert isinstance(text, str)


ODD = {
    # A tokenizer without pad and unk, as Llama 3's; one whose pad is its eos; a model with rows for more tokens.
    "no_pad_no_unk": ({"unk_token": None, "pad_token": None}, 0),
    "pad_is_eos": ({"unk_token": None, "pad_token": "</s>"}, 0),
    "rows_to_spare": ({"pad_token": "<unk>"}, 100),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("odd", ODD)
def test_logits_stay_through_lora_merge_and_reload(root, tmp_path, odd, tied):
    tokens, spare = ODD[odd]
    tokenizer = byte_tokenizer()
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer) + spare, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    chosen = ["--set", f"language.source=hf:{tmp_path / 'llm'}", "--max_steps", "2", "--learning_rate", "0.05"]
    assert main(flags(root, "pretrain", tmp_path / "stage1", *chosen)) == 0
    stage2 = ["--pretrained", str(tmp_path / "stage1"), *chosen]
    assert main(flags(root, "finetune_lora", tmp_path / "lora", *stage2)) == 0
    assert command(["merge-lora", "--model", str(tmp_path / "lora"), "--out", str(tmp_path / "merged")]) == 0
    assert main(flags(root, "finetune", tmp_path / "full", *stage2)) == 0
    models = {name: load_model(tmp_path / name)[0] for name in ("lora", "merged", "full")}
    folded, _ = load_model(tmp_path / "lora", merge_lora=True)
    expected = logits(models["lora"])
    close(logits(folded), expected)
    close(logits(models["merged"]), expected)
    preset = load_preset(str(root / "preset.yaml"), [f"language.source=hf:{tmp_path / 'llm'}"])
    planned = build_on_meta(preset)
    for model in (models["full"], models["merged"], planned):
        assert model.get_input_embeddings().weight.shape == models["lora"].get_input_embeddings().weight.shape
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    models["full"].save_pretrained(tmp_path / "again")
    again = type(models["full"]).from_pretrained(tmp_path / "again")
    close(logits(again.eval()), logits(models["full"]))
