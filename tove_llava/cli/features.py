"""Compute the frozen encoders' output once, for later trainings.

Training reads the folder with --feature_cache and then runs no encoder. An image takes width x tokens x 4 bytes for
CLIP and for each expert's output in float32, half of that in float16, and 1.13 bytes a value in int8. The same command
continues an interrupted one; several processes fill one cache with --share 0/4 to --share 3/4.
"""

import argparse
import re

from tove_llava.cli._flags import add_device, check_least
from tove_llava.core.errors import ConfigError

HELP = "compute the frozen encoders' output for a data set's images once, for training with --feature_cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="tiny", help="name of a preset or path of a .yaml file (default: tiny)")
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value", help="override a preset's key")
    parser.add_argument("--data", action="append", required=True, metavar="JSON", help="records; may be repeated")
    parser.add_argument("--image-folder", required=True, metavar="DIR", help="folder that image paths start from")
    parser.add_argument("--out", required=True, metavar="DIR", help="the cache")
    parser.add_argument("--image-aspect-ratio", default="pad", choices=("pad", "square"), help="default: pad")
    parser.add_argument("--dtype", default="float32", help="encoders compute in: float32 (default), bfloat16, float16")
    parser.add_argument("--store", default="float32", metavar="NAME", help="float32 (default), float16 or int8")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="this process's part of the shards, such as 0/4")
    parser.add_argument("--shard-images", type=int, default=256, metavar="N", help="images of one file (default: 256)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads that open images (default: 4)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.data.data_files import image_names
    from tove_llava.inference.generation import choose_device
    from tove_llava.llava.build import torch_dtype, vision_config
    from tove_llava.presets import load_preset
    from tove_llava.tower import ToveVisionModel
    from tove_llava.train.feature_filling import fill_cache

    quiet_transformers()
    share = _share(args.share)
    check_least(args, "--shard-images", "--batch-size", "--workers")
    dtype = torch_dtype(args.dtype)
    tower = ToveVisionModel(vision_config(load_preset(args.preset, args.set).vision)).eval()
    tower.to(choose_device(args.device), dtype)
    names = dict.fromkeys(name for file in args.data for name in image_names(file))
    keys = ("store", "batch_size", "shard_images", "workers")
    options = {key: getattr(args, key) for key in keys} | {"aspect_ratio": args.image_aspect_ratio, "share": share}
    filled = fill_cache(args.out, tower, list(names), args.image_folder, **options)
    rest = f"; {filled.missing} shards of other shares are still missing" if filled.missing else ""
    print(f"{args.out}: features of {len(names)} images, {filled.size / 1e6:.0f} MB{rest}")
    return 0


def _share(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(f"--share {text}: give I/N with I from 0 to N-1, such as 0/4")
    return int(found[1]), int(found[2])
