"""Small checkpoints to export, and a child process for their folders.

The child can import neither this package nor an expert's library.
"""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from answer_parts import byte_tokenizer
from docs_runner import Server
from tower_parts import open_output, text_config, tower_config
from train_parts import environment
from transformers import AutoModelForImageTextToText, AutoProcessor

from tove_llava.checkpoints.manifest import Manifest
from tove_llava.checkpoints.saving import save_checkpoint
from tove_llava.data import Turn
from tove_llava.inference.engine import Engine, Message
from tove_llava.inference.generation import Answerer
from tove_llava.llava import ToveLlavaConfig, ToveLlavaForConditionalGeneration
from tove_llava.llava.processing import build_processor

QUESTION = "What is it?"
HIDDEN = ("tove_llava", "timm", "open_clip", "peft", "kornia", "torchvision")

# Loads an exported folder with stock classes, asks one question about one image, and saves what it saw.
CHILD = """
import json, sys

hidden = set(json.loads(sys.argv[5]))
sys.modules.update(dict.fromkeys(hidden))  # None: cannot be found, cannot be imported
import PIL, torch, transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

folder, picture, question, out = sys.argv[1:5]
trust = {"trust_remote_code": True} if json.loads(sys.argv[6]) else {}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32", **trust).eval()
processor = AutoProcessor.from_pretrained(folder, backend="pil")
chat = [{"role": "user", "content": [{"type": "image", "image": Image.open(picture)},
                                     {"type": "text", "text": question}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**inputs).logits
output = model.generate(**inputs, max_new_tokens=16)
text = processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
torch.save({"logits": logits, "ids": inputs["input_ids"], "pixels": inputs["pixel_values"], "text": text,
            "module": type(model).__module__, "config": type(config).__name__,
            "tower": type(model.model.vision_tower).__name__,
            "versions": {library.__name__: str(library.__version__) for library in (torch, transformers, PIL)},
            "hidden": [name for name in sys.modules if name.split(".")[0] in hidden and sys.modules[name]]}, out)
"""


def checkpoint(folder, *, tokenizer=None, template="v1", ratio="pad", detached=(), vision=None, text=None, **tower):
    """Write a full-training checkpoint, with random gate and output layer.

    ``vision``: a ToveVisionConfig; without one, ``tower`` are the keys of tower_parts' own. ``text``: keys of the
    language model's configuration.
    """
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 800, "initializer_range": 0.4}
    config = ToveLlavaConfig(
        vision_config=tower_config(folder / "parts", **tower) if vision is None else vision,
        text_config=text_config(**sizes, **(text or {})),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = ToveLlavaForConditionalGeneration(config).eval()
    model.tower.load_backbones()
    if model.tower.fusion.uses_experts:
        open_output(model.tower, scale=2.0)
    model.tower.detach_experts(detached)
    processor = build_processor(tokenizer, config.vision_config, image_token="<image>", template=template)
    manifest = Manifest("full", "finetune", "tiny", template, ratio, 512, {"source": "bundled:llm", "dtype": "float32"})
    save_checkpoint(folder / "model", model, processor, manifest, dict(model.state_dict()))
    return folder / "model"


@cache
def elsewhere():
    """Start a process without this package that forks for each program.

    A fresh process would import for six seconds.
    """
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    server = Server(folder, HIDDEN)
    atexit.register(server.close)
    return server


def run_elsewhere(program, arguments, work):
    """Run a program without this package and return what it prints."""
    file = Path(work) / "program.py"
    file.write_text(program, encoding="utf-8")
    server = elsewhere()
    command = [server.programs / "python", file, *arguments]
    done = subprocess.run(command, env=server.environment(), cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def ask_elsewhere(folder, picture, question, work, *, trust=False, python=None, hidden=HIDDEN):
    """Return logits, ids, pixels and text from a process without this package.

    With ``python`` or ``hidden`` it is a fresh process.
    """
    out = Path(work) / "seen.pt"
    arguments = [str(folder), str(picture), question, str(out), json.dumps(hidden), json.dumps(trust)]
    if python is None and hidden == HIDDEN:
        run_elsewhere(CHILD, arguments, work)
    else:
        settings = environment(HF_MODULES_CACHE=str(Path(work) / "modules"), HF_HUB_OFFLINE="1", PYTHONPATH="")
        command = [python or sys.executable, "-c", CHILD, *arguments]
        done = subprocess.run(command, env=settings, cwd=work, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


def ask_stock(folder, file, question):
    """Return the stock model of this process, and :func:`ask_elsewhere`'s results."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    content = [{"type": "image", "url": str(file)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        logits = model(**inputs).logits
    output = model.generate(**inputs, max_new_tokens=16)
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return model, {"logits": logits, "ids": inputs["input_ids"], "pixels": inputs["pixel_values"], "text": text}


def both_logits(own_folder, seen, file, question):
    """Return the original's logits for the question, and an engine.

    Ids and pixels must be equal.
    """
    answerer = Answerer.load(own_folder, "cpu", "float32")
    ids = torch.tensor([answerer.encode([Turn("user", f"<image>\n{question}")], 1)])
    pixels = answerer.pixels(file)[None]
    assert ids.tolist() == seen["ids"].tolist()
    assert torch.equal(pixels, seen["pixels"])
    with torch.no_grad():
        return answerer.model(input_ids=ids, pixel_values=pixels).logits, Engine(answerer)


def compare(model, seen, file, question=QUESTION):
    """Assert that a folder's logits and answer equal ``seen``; return the logits."""
    logits, engine = both_logits(model, seen, file, question)
    torch.testing.assert_close(logits, seen["logits"], rtol=1e-5, atol=1e-5)
    assert engine.answer([Message("user", question, [file])], max_new_tokens=16) == seen["text"]
    return logits


def compare_in_clean_environment(model, out, file, question, work, trust=False):
    """Compare an exported folder with the model in this environment.

    The folder runs in the environment that TOVE_CLEAN_PYTHON names.

    TOVE_CLEAN_PYTHON: an interpreter with only torch, transformers and pillow; scripts/clean_room.sh makes one.
    """
    python = os.environ.get("TOVE_CLEAN_PYTHON")
    if not python:
        pytest.skip("TOVE_CLEAN_PYTHON names no interpreter")
    for name in HIDDEN:
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
        found = subprocess.run([python, "-c", probe], cwd=work, env=environment(PYTHONPATH=""))
        assert found.returncode == 0, f"{name} is installed there"
    seen = ask_elsewhere(out, file, question, work, trust=trust, python=python, hidden=())
    logits = compare(model, seen, file, question)
    versions = ", ".join(f"{name} {version}" for name, version in seen["versions"].items())
    print(f"{versions}: {seen['tower']}, logits differ by at most {(logits - seen['logits']).abs().max():.2g}")


def run_card(folder, picture, work):
    """Run the README.md's code without this package; return its output."""
    card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    assert "FOLDER" in code and "picture.jpg" in code
    (Path(work) / "picture.jpg").write_bytes(Path(picture).read_bytes())
    return run_elsewhere(f"FOLDER = {str(folder)!r}\n" + code, [], work)
