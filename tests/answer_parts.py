"""A small random LLaVA and small benchmark folders, for tests of answering."""

import json

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tower_parts import open_output, text_config, tower_config
from transformers import PreTrainedTokenizerFast

from tove_llava.checkpoints.manifest import Manifest
from tove_llava.checkpoints.saving import save_checkpoint
from tove_llava.inference.engine import Message
from tove_llava.inference.generation import Answerer
from tove_llava.llava import ToveLlavaConfig, ToveLlavaForConditionalGeneration
from tove_llava.llava.processing import build_processor


def byte_tokenizer():
    """Make a tokenizer of bytes, three special tokens and the image token."""
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def make_model(folder, seed=0, **vision):
    """Make model and processor; the sharpened output layer answers different inputs differently."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = ToveLlavaConfig(
        vision_config=tower_config(folder, **vision),
        text_config=text_config(vocab_size=len(tokenizer), max_position_embeddings=600, initializer_range=0.4),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = ToveLlavaForConditionalGeneration(config).eval()
    model.tower.load_backbones()
    if not vision:
        open_output(model.tower, scale=2.0)
    processor = build_processor(tokenizer, config.vision_config, image_token="<image>", template="v1")
    return model, processor


def save_model(folder, seed=0, **vision):
    """Save a checkpoint folder like one of full fine-tuning."""
    model, processor = make_model(folder / "parts", seed, **vision)
    manifest = Manifest("full", "finetune", "tiny", "v1", "pad", 512, {"source": "bundled:llm", "dtype": "float32"})
    save_checkpoint(folder / "model", model, processor, manifest, dict(model.state_dict()))
    return folder / "model"


def make_answerer(folder, **vision):
    return Answerer(*make_model(folder, **vision))


def picture(index=0, size=(40, 30)):
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def ask(text, *images):
    return [Message("user", text, images)]


def before_forward(answerer, monkeypatch, work):
    """Call ``work(input_ids)`` before each forward pass of the model."""
    real = answerer.model.forward

    def forward(*args, **kwargs):
        work(kwargs["input_ids"])
        return real(*args, **kwargs)

    monkeypatch.setattr(answerer.model, "forward", forward)


def make_scenes(root, images=4, questions_each=3):
    """``val_questions.jsonl`` and its images, as ``tove-llava scenes`` lays them out."""
    (root / "images").mkdir(parents=True)
    rows = []
    for index in range(images):
        name = f"val_{index:06d}.png"
        picture(index).save(root / "images" / name)
        for number in range(questions_each):
            text = f"What is number {number}" + " of them" * number + "?"
            category = ("count", "colour", "left_of")[number % 3]
            key = f"{index}-{number}"
            rows.append({"question_id": key, "image": name, "text": text, "answer": "red", "category": category})
    (root / "val_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
