"""Other language models than LLaMA's family train both stages and answer."""

from pathlib import Path

import pytest
import torch
import transformers
from train_parts import byte_tokenizer, flags, write_parts, write_records

from tove_llava.data import Turn
from tove_llava.inference.generation import Answerer
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
