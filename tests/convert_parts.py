"""Small random LLaVA-1.5s of the true architecture, in both published formats.

Nothing here uses this package's conversion: names and computation are written out.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from data_helpers import train_sentencepiece
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

IMAGE, PATCH, TOKENS = 32, 8, 16
QUESTION = [1, 29, 31, -200, 45, 99, 130, 7]  # ids with one image; all below every vocabulary used here


@dataclass
class Original:
    """The parts of the original's ``LlavaLlamaForCausalLM``."""

    clip: CLIPVisionModel
    projector: nn.Sequential
    language: nn.Module

    @torch.no_grad()
    def round(self):
        """Round the weights to half precision."""
        for part in (self.clip, self.projector, self.language):
            for parameter in part.parameters():
                parameter.copy_(parameter.half())

    @torch.no_grad()
    def logits(self, pixels, ids=QUESTION, layer=-2):
        """Compute [positions, vocabulary] as ``prepare_inputs_labels_for_multimodal`` and LLaMA do."""
        tokens = self.clip(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        image = self.projector(tokens)[0]  # [N, d]
        embed = self.language.get_input_embeddings()
        rows = [image if index == -200 else embed(torch.tensor([index])) for index in ids]
        return self.language(inputs_embeds=torch.cat(rows)[None]).logits[0]


def make_original(*, vocab=600, width=48, clip_width=32, seed=0, layers=2, clip_layers=3, tie=False, **language):
    torch.manual_seed(seed)
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=clip_width, intermediate_size=64, num_hidden_layers=clip_layers, num_attention_heads=2,
            image_size=IMAGE, patch_size=PATCH, initializer_factor=3.0,
        )
    )  # fmt: skip
    projector = nn.Sequential(nn.Linear(clip_width, width), nn.GELU(), nn.Linear(width, width))
    config = LlamaConfig(
        **{
            "vocab_size": vocab, "hidden_size": width, "intermediate_size": 80, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "pad_token_id": 0, "initializer_range": 0.2, "tie_word_embeddings": tie, **language,
        }
    )  # fmt: skip
    return Original(clip.eval(), projector.eval(), LlamaForCausalLM(config).eval())


def pixels(seed=5, size=IMAGE):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def write_clip(folder, model):
    """Write CLIP and its image processor, with ``vision_model`` in published names."""
    model.clip.save_pretrained(folder)
    named = {f"vision_model.{name}": value.contiguous() for name, value in model.clip.state_dict().items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    size = model.clip.config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(folder)
    return folder


def write_tokenizer(folder):
    """Write a SentencePiece tokenizer and a generation config like Vicuna-1.5's."""
    train_sentencepiece(folder)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {"add_bos_token": True, "add_eos_token": False, "legacy": False, "model_max_length": 2048,
                "padding_side": "right", "tokenizer_class": "LlamaTokenizer"}  # fmt: skip
    generation = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0, "temperature": 0.9}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "generation_config.json").write_text(json.dumps({**generation, "top_p": 0.6}))
    return folder


def original_config(model, clip, **changes):
    """Return the keys of liuhaotian/llava-v1.5-7b's ``config.json``."""
    llama = model.language.config
    config = {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False,
        "hidden_act": "silu", "hidden_size": llama.hidden_size, "image_aspect_ratio": "pad",
        "initializer_range": 0.02, "intermediate_size": llama.intermediate_size, "max_length": 4096,
        "max_position_embeddings": llama.max_position_embeddings, "mm_hidden_size": model.clip.config.hidden_size,
        "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": str(clip), "model_type": "llava",
        "num_attention_heads": llama.num_attention_heads, "num_hidden_layers": llama.num_hidden_layers,
        "num_key_value_heads": llama.num_key_value_heads, "pretraining_tp": 1, "rms_norm_eps": llama.rms_norm_eps,
        "rope_scaling": None, "rope_theta": llama.rope_parameters["rope_theta"],
        "tie_word_embeddings": llama.tie_word_embeddings, "torch_dtype": "float32", "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True,
        "vocab_size": llama.vocab_size,
    }  # fmt: skip
    return {**config, **changes}


def write_config(folder, model, clip, **changes):
    (folder / "config.json").write_text(json.dumps(original_config(model, clip, **changes)))
    return folder


def projector_tensors(model):
    return {f"model.mm_projector.{name}": value.clone() for name, value in model.projector.state_dict().items()}


def clip_tensors(model):
    prefix = "model.vision_tower.vision_tower.vision_model."
    return {prefix + name: value.clone() for name, value in model.clip.state_dict().items()}


def original_tensors(model, stored_clip=True):
    """Return a whole model's, under the names of ``parameter_names.json`` ("stage2_full")."""
    tensors = {name: value.clone() for name, value in model.language.state_dict().items()}
    if model.language.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {**tensors, **projector_tensors(model), **(clip_tensors(model) if stored_clip else {})}


def write_shards(folder, tensors, kind="bin", shards=3):
    """Write shards and index.

    ``kind`` is "bin", "old" (before torch 1.6) or "safetensors".
    """
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names, weight_map = list(tensors), {}
    for number in range(shards):
        chosen = {name: tensors[name].contiguous() for name in names[number::shards]}
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        if kind == "safetensors":
            save_file(chosen, folder / file, metadata={"format": "pt"})
        else:
            torch.save(chosen, folder / file, _use_new_zipfile_serialization=kind == "bin")
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_original(folder: Path, model, clip, *, kind="bin", stored_clip=True, extra=None, dtype=None, **config):
    """Write a folder like liuhaotian/llava-v1.5-7b."""
    folder.mkdir(parents=True)
    tensors = original_tensors(model, stored_clip)
    if dtype is not None:
        tensors = {name: value.to(dtype) for name, value in tensors.items()}
    write_shards(folder, {**tensors, **(extra or {})}, kind)
    write_config(folder, model, clip, **config)
    return write_tokenizer(folder)


def write_language(folder: Path, model):
    """Write only the language model, like lmsys/vicuna-7b-v1.5."""
    model.language.save_pretrained(folder)
    return write_tokenizer(folder)


def write_projector(folder: Path, model, clip, **config):
    """Write stage 1's output folder."""
    folder.mkdir(parents=True)
    torch.save(projector_tensors(model), folder / "mm_projector.bin")
    return write_config(folder, model, clip, model_type="llava_llama", **config)


def write_lora(folder: Path, model, clip, *, rank=4, pickled=False, seed=3, **config):
    """Write stage 2's LoRA folder; return it and the merged weights.

    These are the language model's weights with the adapters added.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    merged, adapter = {}, {}
    for name, module in model.language.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        a = torch.randn(rank, module.in_features, generator=generator) * 0.1
        b = torch.randn(module.out_features, rank, generator=generator) * 0.1
        adapter[f"base_model.model.{name}.lora_A.weight"], adapter[f"base_model.model.{name}.lora_B.weight"] = a, b
        merged[f"{name}.weight"] = module.weight.detach() + 3.0 * b @ a  # alpha / r
    if pickled:
        torch.save(adapter, folder / "adapter_model.bin")
    else:
        save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "lora_alpha": 3 * rank, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": rank,
        "revision": None, "task_type": "CAUSAL_LM",
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    others = {f"base_model.model.{name}": value for name, value in projector_tensors(model).items()}
    torch.save(others, folder / "non_lora_trainables.bin")
    return write_config(folder, model, clip, model_type="llava_llama", **config), merged
