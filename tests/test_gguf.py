"""Language models from GGUF files become, and stay, ordinary weights."""

import json

import pytest
import torch
from train_parts import flags, write_parts, write_records
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM

from tove_llava.checkpoints.conversion import export_model
from tove_llava.llava.build import read_language_model
from tove_llava.presets import LanguagePreset
from tove_llava.train.run import main

gguf = pytest.importorskip("gguf")

MARK = {"_model_name_or_path": "A Title", "quantization_config": {"quant_method": "gguf", "gguf_file": "llm.gguf"}}
BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(model, file):
    """Write a half-precision LLaMA as a GGUF file, with full-precision norms."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    settings = {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size, "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads, "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": 10_000.0, "name": "A Title",
    }  # fmt: skip
    for key, value in settings.items():
        getattr(writer, f"add_{key}")(value)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in BLOCK.items()}
    for name, value in model.state_dict().items():
        value = value.half() if value.ndim > 1 else value
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", value.numpy())
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    write_parts(folder)
    write_records(folder, captions=4, count=4)
    write_gguf(LlamaForCausalLM.from_pretrained(folder / "llm"), folder / "llm.gguf")
    language = [f"--set=language.source=gguf:{folder / 'llm.gguf'}", f"--set=language.tokenizer=hf:{folder / 'llm'}"]
    bare = ["--set=vision.fusion=none", "--set=vision.experts=[]"]
    more = ["--max_steps", "1", "--self_contained", "True", *language, *bare]
    for stage in ("finetune", "finetune_lora"):
        assert main(flags(folder, stage, folder / stage, *more)) == 0
    return folder


def marks(text_config):
    return {"quantization_config", "_model_name_or_path"} & set(text_config)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def open_and_save(folder, **trust):
    """Load a folder as ordinary weights in transformers and save it again."""
    model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
    assert getattr(model, "hf_quantizer", None) is None and not marks(config_of(folder)["text_config"])
    model.save_pretrained(folder.parent / "again")


def test_language_model_is_an_ordinary_one(root, tmp_path):
    model = read_language_model(LanguagePreset(source=f"gguf:{root / 'llm.gguf'}", dtype="float32"))
    assert not marks(vars(model.config))
    model.save_pretrained(tmp_path / "llm")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert getattr(again, "hf_quantizer", None) is None
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("stage", ["finetune", "finetune_lora"])
def test_checkpoint_and_export_have_no_mark(root, tmp_path, stage):
    assert not marks(config_of(root / stage)["text_config"])
    export_model(root / stage, tmp_path / "out")
    open_and_save(tmp_path / "out")
    if stage == "finetune_lora":
        assert not marks(config_of(root / stage / "language"))


@pytest.mark.parametrize("format", ["hf-llava", "remote-code"])
@pytest.mark.parametrize("stage", ["finetune", "finetune_lora"])
def test_marks_of_older_checkpoints_are_not_handed_on(root, tmp_path, stage, format, request):
    config = config_of(root / stage)
    request.addfinalizer(lambda: (root / stage / "config.json").write_text(json.dumps(config)))
    marked = {**config, "text_config": {**config["text_config"], **MARK}}
    (root / stage / "config.json").write_text(json.dumps(marked))
    export_model(root / stage, tmp_path / "out", format)
    open_and_save(tmp_path / "out", **({"trust_remote_code": True} if format == "remote-code" else {}))
