"""One LLaVA in every layout, its conversions, and comparisons of their results."""

import torch
from convert_parts import (
    QUESTION,
    TOKENS,
    make_original,
    pixels,
    write_clip,
    write_language,
    write_lora,
    write_original,
    write_projector,
)
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from tove_llava import convert_checkpoint, load_model, open_llava

ROWS = 600  # of the original's embeddings; transformers' LLaVA has 640


class World:
    """One LLaVA in every layout."""

    def __init__(self, root):
        self.root, self.model = root, make_original()
        self.clip = write_clip(root / "clip", self.model)
        self.whole = write_original(root / "llava-whole", self.model, self.clip)
        self.base = write_language(root / "vicuna", self.model)
        self.projector = write_projector(root / "llava-projector", self.model, self.clip)
        self.lora, self.merged = write_lora(root / "llava-lora", self.model, self.clip)
        self.hf, self.tove = chain(self.whole, root, "llava-hf"), chain(self.whole, root, "tove")
        self.expected = self.model.logits(pixels())

    def merged_logits(self):
        """Compute the original's logits with the adapters in its weights."""
        model = make_original()
        model.language.load_state_dict({**model.language.state_dict(), **self.merged})
        return model.logits(pixels())


def chain(folder, work, *ways, **options):
    """Convert a folder through several formats; return the last folder.

    The options are for the first conversion.
    """
    for way in ways:
        number = len(list(work.glob("llava-lora-*")))
        convert_checkpoint(folder, folder := work / f"llava-lora-{number}-{way}", way, **options)
        options = {}
    return folder


def expanded(image_token):
    return torch.tensor([[t for i in QUESTION for t in ([image_token] * TOKENS if i == -200 else [i])]])


@torch.no_grad()
def logits(model):
    """Compute [positions, rows of the head] for the question of ``Original.logits``."""
    model = model[0] if isinstance(model, tuple) else model
    return model.eval()(input_ids=expanded(model.config.image_token_id), pixel_values=pixels()).logits[0]


def ours(folder, **options):
    """Return this package's logits, without rows that the original lacks."""
    return logits((open_llava if options else load_model)(folder, **options))[:, :ROWS]


def stock(folder, **keys):
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **keys)


def tensors(folder):
    """Read all tensors in a folder's files with only the libraries."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert not [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
