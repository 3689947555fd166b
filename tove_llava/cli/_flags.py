"""Flags that several verbs share, and what is read from them."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from tove_llava.core.errors import ConfigError

if TYPE_CHECKING:
    from tove_llava.analysis.samples import Samples
    from tove_llava.data.templates import Template
    from tove_llava.inference.generation import Answerer


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --model; where it is not required, the newest model is taken."""
    text = "folder that training wrote, or hf:owner/name" + ("" if required else " (default: the newest in outputs/)")
    parser.add_argument("--model", required=required, metavar="DIR", help=text)


def add_template(parser: argparse._ActionsContainer, about: str = "") -> None:
    """Add the flags of :func:`prepared_template`."""
    parser.add_argument("--template", default="v1", help=f"conversation template (default: v1{about})")
    parser.add_argument(
        "--reasoning", metavar="HOW", help="think blocks with chat_template: refuse, drop or keep (default: refuse)"
    )
    parser.add_argument("--date", help="date for a chat template that asks for the time, such as 2024-07-26")


def prepared_template(args: argparse.Namespace, tokenizer: Any) -> "Template":
    """Return the template of --template, fit for the tokenizer; print what there is to say."""
    from tove_llava.data.templates import get_template

    template = get_template(args.template)
    template.prepare(tokenizer, args.reasoning, args.date)
    if about := template.check(tokenizer):
        print(f"chat template: {about}", file=sys.stderr)
    return template


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")


def add_host(parser: argparse.ArgumentParser) -> None:
    """Add --host."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1: this machine)")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :func:`loading_options`."""
    add_device(parser)
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: by the device)")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument(
        "--load-4bit", action="store_true", help="language model in 4 bits (NF4, or as it was trained); less memory"
    )
    bits.add_argument("--load-8bit", action="store_true", help="language model in 8 bits")
    parser.add_argument(
        "--tower-execution",
        default="eager",
        metavar="NAME",
        help="how CLIP and the experts are run: eager, concurrent (side by side), or compiled as well (default: eager)",
    )


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``Answerer.load`` and ``Engine.load``."""
    from tove_llava.presets import QuantizationPreset

    quantization = QuantizationPreset(bits=4 if args.load_4bit else 8) if args.load_4bit or args.load_8bit else None
    keys = ("device", "dtype", "tower_execution")
    return {"quantization": quantization, **{key: getattr(args, key) for key in keys}}


def load_answerer(args: argparse.Namespace) -> "Answerer":
    """Load the model of --model, quietly."""
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.inference.generation import Answerer
    from tove_llava.serve.models import find_model

    quiet_transformers()
    return Answerer.load(find_model(args.model), **loading_options(args))


def add_calibration(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the flags of :func:`calibration_samples`."""
    parser.add_argument(
        "--data",
        required=required,
        metavar="FILE",
        help="calibration records: LLaVA's JSON or JSONL, or questions as tove-llava scenes writes them",
    )
    parser.add_argument("--image-folder", metavar="DIR", help="where image names start (default: images/ next to FILE)")
    parser.add_argument("--limit", type=int, metavar="N", help="use N records, spread evenly over the file")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="records at a time (default: 16)")


def calibration_samples(args: argparse.Namespace, answerer: "Answerer") -> "Samples":
    """Read the calibration records."""
    from tove_llava.analysis.samples import load_samples

    return load_samples(args.data, args.image_folder, answerer, args.model, args.limit)


def check_least(args: argparse.Namespace, *flags: str, least: int = 1) -> None:
    """Raise ConfigError for a flag whose number is too small."""
    for flag in flags:
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None and value < least:
            raise ConfigError(f"{flag} must be at least {least}, not {value}")


def split_names(text: str) -> list[str]:
    """Split names that commas separate."""
    return [name.strip() for name in text.split(",") if name.strip()]


def add_image_placeholder(parser: Any) -> None:
    """Add the flag for records whose images have no placeholder."""
    parser.add_argument(
        "--image-placeholder",
        default="written",
        choices=("written", "first"),
        help="records with images and no <image>: refused (written, the default), or the images go first",
    )
