"""Two kinds of tokenizers, and an oracle for LLaVA's rules."""

import io
import json
from itertools import groupby
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SAMPLE = Path(__file__).parent / "data"

_CORPUS = [
    "USER: What is the colour of the bicycle? ASSISTANT: Red.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "There are 12 sheep, 3 boats and 45 kites in the picture.",
    "def area(w, h):    return  w * h",
    "    if w < 0:",
    "        return None",
    "            pass" + " " * 16,
    "[INST] What is it? [/INST] A compass.",
    "a quiet harbour at dusk, two wooden boats on the sand",
] * 20

# What the golden rows' answers are where the original masks the whole row, or its tail, because its count went wrong.
MENDED = {
    "question-empty-text": [" Nothing was asked.</s>"],
    "question-empty-second": [" Hi.</s>", " You said nothing.</s>"],
    "answer-has-assistant-spaced": [" The log says ASSISTANT: hello there</s>"],
    "answer-has-assistant-second-turn": [" Nothing yet.</s>", " It reads ASSISTANT: ready</s>"],
    "question-has-assistant": [" I am finished.</s>"],
    "answer-has-eos": [" first</s>second</s>"],
    "answer-has-eos-end": [" done</s></s>"],
    "answer-has-eos-end-multi": [" done</s></s>", " done</s>"],
    "question-has-eos": [" It ends a sequence.</s>"],
    "answer-has-unk": [" It is <unk> here.</s>"],
    "answer-has-unk-image": [" <unk></s>"],
    "question-has-unk": [" Yes.</s>", " Yes.</s>"],
    "answer-empty": [],
    "answer-empty-last": [" Hi.</s>"],
    "ends-with-human": [" Hi.</s>"],
    "human-only": [],
    "l2-inst-in-answer": [" It shows [/INST] twice. </s>"],
    "l2-empty-answer": [],
}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_sentencepiece(folder, **options):
    """A small LLaMA-like SentencePiece model, saved as ``tokenizer.model``."""
    settings = dict.fromkeys(("byte_fallback", "split_digits", "allow_whitespace_only_pieces"), True)
    settings |= {"model_type": "bpe", "vocab_size": 600, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    settings |= {"character_coverage": 1.0, "minloglevel": 2}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS), model_writer=model, **{**settings, **options}
    )
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.getvalue())
    for piece in proto.pieces:
        if set(piece.piece) == {"▁"}:
            piece.score = -1e9  # as in LLaMA's own model, where all runs of spaces share one score
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    return file


def byte_level_tokenizer():
    """A small byte-level BPE tokenizer with a chat template, as SmolLM2's is."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator([*_CORPUS, "\n\n"] * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def sentencepiece_oracle(processor, prompt, images):
    """Encode as LLaVA does, each text between images separately.

    A text after a special token gets no leading space.
    """
    specials = {"<s>": 1, "</s>": 2, "<unk>": 0}
    anchor = "\n"  # encoded in front of a text and taken off again, so that no space is put there
    ids = [1]
    for number, chunk in enumerate(prompt.split("<image>") if images else [prompt]):
        ids += [-200] if number else []
        first = True
        while chunk:
            found = min(((chunk.find(s), s) for s in specials if s in chunk), default=(len(chunk), ""))
            text, special = chunk[: found[0]].replace("▁", " "), found[1]
            if text and first:
                ids += processor.encode(text)
            elif text:
                ids += processor.encode(anchor + text)[len(processor.encode(anchor)) :]
            ids += [specials[special]] if special else []
            chunk, first = chunk[found[0] + len(special) :], False
    return ids


def decode_spans(tokenizer, labels):
    """Return the text of each supervised run, as a continuation."""
    spans = [[*run] for supervised, run in groupby(labels, lambda label: label >= 0) if supervised]
    eos = tokenizer.eos_token
    return [tokenizer.decode([tokenizer.eos_token_id, *span])[len(eos) :] for span in spans]


def turns(*values):
    """A record's conversation, the human first."""
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save_odd_kinds(image, folder):
    """Write an image in odd formats; return the names.

    They are grey, with alpha, CMYK, with a palette, with 16 bits, and turned by EXIF.
    """
    turned = Image.Exif()
    turned[0x0112] = 6
    image.convert("L").save(folder / "grey.jpg")
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("P").save(folder / "palette.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    image.save(folder / "turned.jpg", exif=turned)
    return ["grey.jpg", "alpha.png", "cmyk.jpg", "palette.png", "deep.png", "turned.jpg"]
