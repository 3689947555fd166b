"""LLaVA's own training step, run by step_llava.py in LLaVA's environment.

Its ``LlavaLlamaForCausalLM`` with its CLIP tower and projector, adapters of peft on the layers that its train.py finds,
gradient checkpointing as there; random weights. Reads one line of JSON with shapes and batches from its standard input,
and then takes a step on each batch for every line that follows, answering each with seconds and peak memory.
"""

import importlib.util
import json
import sys
import tempfile
import time
from contextlib import nullcontext

LEARNING_RATE = 1e-5  # the time does not depend on it


def main() -> None:
    say, sys.stdout = sys.stdout, sys.stderr  # what LLaVA prints is no answer
    given = json.loads(sys.stdin.readline())
    sys.path.insert(0, given["source"])
    import torch
    import transformers

    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    device, dtype = torch.device(given["device"]), getattr(torch, given["dtype"])
    model, attention = _build(given, device, dtype)
    batches = [_batch(rows, given, device, dtype) for rows in given["batches"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=device.type == "cuda")
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def step(batch: dict) -> None:
        with autocast:
            loss = model(**batch).loss
        loss.backward()
        if given["max_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(trained, given["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    _tell(say, {"versions": f"transformers {transformers.__version__}, {attention}",
                "adapters": sum("lora_A" in name for name, _ in model.named_parameters()),
                "trained": sum(p.numel() for p in trained)})  # fmt: skip
    for _ in sys.stdin:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
        _tell(say, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak_bytes": peak})


def _tell(say, answer: dict) -> None:
    say.write(json.dumps(answer) + "\n")
    say.flush()


def _build(given: dict, device, dtype):
    """Build the model as LLaVA's train() does for LoRA."""
    import torch
    import transformers.trainer
    from torch import nn

    if not hasattr(transformers.trainer, "ALL_LAYERNORM_LAYERS"):  # llava.train imports it; transformers 5 has no more
        transformers.trainer.ALL_LAYERNORM_LAYERS = [nn.LayerNorm]
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.model.multimodal_projector.builder import build_vision_projector
    from llava.train.train import find_all_linear_names
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, CLIPVisionModel

    clip = CLIPVisionConfig(**given["clip"])
    config = LlavaConfig(
        **given["language"], mm_hidden_size=clip.hidden_size, mm_projector_type="mlp2x_gelu", use_mm_proj=True,
        mm_vision_select_layer=given["clip_layer"], mm_vision_select_feature="patch", mm_patch_merge_type="flat",
        tokenizer_model_max_length=given["longest"], tune_mm_mlp_adapter=False, mm_use_im_start_end=False,
    )  # fmt: skip
    if importlib.util.find_spec("flash_attn") is not None and device.type == "cuda":
        config._attn_implementation = "flash_attention_2"
    torch.set_default_dtype(dtype)
    with device:
        model = LlavaLlamaForCausalLM(config)
    model.config.use_cache = False
    model.enable_input_require_grads()
    lora = LoraConfig(target_modules=find_all_linear_names(model), task_type="CAUSAL_LM", **given["lora"])
    adapted = get_peft_model(model, lora)
    with tempfile.TemporaryDirectory() as folder, device:  # after the adapters, so that CLIP has none
        clip.save_pretrained(folder)  # LLaVA's tower reads it from a folder; weights are made here
        tower = CLIPVisionTower(folder, config, delay_load=True)
        tower.vision_tower, tower.is_loaded = CLIPVisionModel(clip), True
        model.model.mm_projector = build_vision_projector(config)
    torch.set_default_dtype(torch.float32)
    model.model.vision_tower = tower.eval().requires_grad_(False)
    adapted.train().to(device)
    adapted.gradient_checkpointing_enable()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted, str(getattr(config, "_attn_implementation", "eager"))


def _batch(rows: list, given: dict, device, dtype) -> dict:
    """Make padded rows of ``[tokens of text, supervised ones, with an image]``.

    As its data set gives them: an image is one token, and a record without one has an image of zeros.
    """
    import torch

    width = max(text + picture for text, _, picture in rows)
    side = given["clip"]["image_size"]
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids, dtype=torch.bool)
    pixels = torch.zeros(len(rows), 3, side, side)
    for row, (text, supervised, picture) in enumerate(rows):
        length = text + picture
        ids[row, :length] = torch.arange(length) % given["language"]["vocab_size"]
        mask[row, :length] = True
        labels[row, length - supervised : length] = ids[row, length - supervised : length]
        if picture:
            ids[row, 1], labels[row, 1] = -200, -100
            pixels[row] = torch.randn(3, side, side)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask, "images": pixels.to(dtype)}
    return {name: value.to(device) for name, value in batch.items()}


if __name__ == "__main__":
    main()
