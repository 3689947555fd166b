"""Small random parts of the true architectures, a preset, and training records."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

IMAGE = 32
ROOT = Path(__file__).resolve().parents[1]


def write_parts(root: Path) -> Path:
    """Write clip/, normal/, segmentation/, llm/ and preset.yaml; return the preset's path."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=IMAGE, patch_size=8)).save_pretrained(root / "clip")
    for name, labels in (("normal", 3), ("segmentation", 4)):
        config = SegformerConfig(
            num_labels=labels, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=8,
        )  # fmt: skip
        SegformerForSemanticSegmentation(config).save_pretrained(root / name)
        preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": IMAGE, "width": IMAGE}}
        (root / name / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    tokenizer = byte_tokenizer()
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")

    arguments = {
        "per_device_train_batch_size": 4, "learning_rate": 1.0e-2, "weight_decay": 0.0, "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": ["none"], "num_train_epochs": 1,
        "save_total_limit": 1, "disable_tqdm": True,
    }  # fmt: skip
    common = {"model_max_length": 400, "deepspeed": "zero2", "arguments": arguments}
    chat, lora = {"template": "v1", **common}, {"r": 4, "alpha": 8, "dropout": 0.0}
    experts = [
        {"name": "normal", "source": f"hf:{root / 'normal'}", "mode": "map"},
        {"name": "segmentation", "source": f"hf:{root / 'segmentation'}", "mode": "features"},
    ]
    stages = {
        "pretrain": {"train": "alignment", "template": "plain", "image_aspect_ratio": "square", **common},
        "finetune_lora": {"train": "lora", "group_by_modality_length": True, "lora": lora, **chat},
        "finetune": {"train": "full", "group_by_modality_length": True, **chat},
        "merge": {"train": "merge", "starts_from": "checkpoint", "merge": {"loss": "mse", "coefficient": 0.5},
                  "lora": dict(lora), **chat},
    }  # fmt: skip
    vision = {"clip": f"hf:{root / 'clip'}", "projection_dim": 8, "router_aux_loss_coef": 0.5, "experts": experts}
    language = {"source": f"hf:{root / 'llm'}", "dtype": "float32"}
    file = root / "preset.yaml"
    file.write_text(yaml.safe_dump({"vision": vision, "language": language, "stages": stages}))
    return file


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte tokenizer that begins with LLaMA's BOS.

    Its first tokens are <unk>, <s> and </s>.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def write_records(root: Path, *, captions: int = 16, pattern: str = "iiit", count: int = 16) -> None:
    """Write images/, captions.json (one image each) and instruct.json.

    ``pattern`` decides which of the latter's records have an image.
    """
    (root / "images").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    words = ["red", "blue", "a cone", "two spheres", "left of the box", "near"]
    for index in range(max(captions, count)):
        pixels = torch.randint(0, 256, (24 + index % 3, 36, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / "images" / f"{index}.png")

    def record(name: str, image: str | None, question: str, answer: str) -> dict[str, object]:
        mark = "" if image is None else "<image>\n"
        turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
        return {"id": name, "conversations": turns} | ({} if image is None else {"image": image})

    caption = [record(f"c{i}", f"{i}.png", "Describe.", " ".join(words[: 1 + i % 6])) for i in range(captions)]
    images = [f"{i}.png" if pattern[i % len(pattern)] == "i" else None for i in range(count)]
    instruct = [record(f"r{i}", images[i], "What is it?", words[i % 6]) for i in range(count)]
    (root / "captions.json").write_text(json.dumps(caption))
    (root / "instruct.json").write_text(json.dumps(instruct))


def write_inputs(root: Path, **records: Any) -> Path:
    """Write parts, preset and records; return their folder."""
    write_parts(root)
    write_records(root, **records)
    return root


def flags(root: Path, stage: str, output: Path, *more: str) -> list[str]:
    """Return one stage's command line over :func:`write_parts` and :func:`write_records`."""
    data = "captions.json" if stage == "pretrain" else "instruct.json"
    return [
        "--preset", str(root / "preset.yaml"), "--stage", stage, "--data_path", str(root / data),
        "--image_folder", str(root / "images"), "--output_dir", str(output), *more,
    ]  # fmt: skip


def losses(output: Path, *terms: str) -> list[list[float]]:
    """Return the named terms of each logged step, 0 for absent ones."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [[entry.get(term, 0.0) for term in terms] for entry in log if "lm_loss" in entry]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, those of a merged encoder included."""
    files = [*output.glob("*.safetensors"), *output.glob("clip/*.safetensors")]
    return {name: value for file in files for name, value in load_file(file).items()}


def environment(**changes: str) -> dict[str, str]:
    """Return child processes' variables: one thread, no accelerator, this checkout's package."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**inherited, **fixed, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **changes}


def launch(arguments: list[str], *, ranks: int = 2, module: str = "tove_llava.train.run", timeout: int = 600) -> str:
    """Run a module under the deepspeed launcher; return its output."""
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port()),
        "--no_local_rank", "--module", module, *arguments,
    ]  # fmt: skip
    code, output = run_group(command, timeout)
    assert code == 0, f"exit code {code}, and last:\n{output[-2500:]}"
    return output


def launch_torch(arguments: list[str], module: str) -> None:
    """Run a module on two ranks under torch's launcher.

    It starts faster than DeepSpeed's.
    """
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", module]
    code, output = run_group([sys.executable, *command, *arguments], 600)
    assert code == 0, output[-4000:]


def run_group(command: list[str], timeout: int) -> tuple[int, str]:
    """Run a command; end a hanging one with its child processes."""
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, text=True, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{output[-6000:]}") from None
    return process.returncode, output


def run_script(name: str, settings: dict[str, object], *words: str) -> str:
    """Run a training script in one process; return its output.

    Its settings are environment variables.
    """
    given = [f"{key}={value}" for key, value in {"NUM_GPUS": 1, **settings}.items()]
    brief = ["--report_to", "none", "--logging_steps", "1", "--save_strategy", "no"]
    brief += ["--per_device_train_batch_size", "2"]
    code, text = run_group(["env", *given, "bash", str(ROOT / "scripts" / name), *brief, *words], timeout=1800)
    assert code == 0, text[-6000:]
    return text


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
