"""LLaVA records, conversation templates, tokens and labels, images, batches, sampling."""

from tove_llava.data.collator import LlavaCollator
from tove_llava.data.data_files import load_records, read_records
from tove_llava.data.dataset import LlavaDataset
from tove_llava.data.images import ImageTransform, open_image, to_rgb
from tove_llava.data.records import Record, parse_record
from tove_llava.data.sampler import LengthGroupedSampler, WeightedSampler
from tove_llava.data.templates import Turn, get_template, template_names
from tove_llava.data.tokenization import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    Encoded,
    encode_prompt,
    encode_record,
    encode_turns,
)
from tove_llava.data.tokenizer import IMAGE_PLACEHOLDER, load_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_PLACEHOLDER",
    "IMAGE_TOKEN_INDEX",
    "Encoded",
    "ImageTransform",
    "LengthGroupedSampler",
    "LlavaCollator",
    "LlavaDataset",
    "Record",
    "Turn",
    "WeightedSampler",
    "encode_prompt",
    "encode_record",
    "encode_turns",
    "get_template",
    "load_records",
    "load_tokenizer",
    "open_image",
    "parse_record",
    "read_records",
    "template_names",
    "to_rgb",
]
