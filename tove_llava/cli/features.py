"""Compute what the frozen tower sees in each image once, for several trainings over the same images.

Training then takes the folder with --feature_cache and runs no encoder. Worth it for sweeps and method studies on data
that fits on the disk: one image takes width x tokens x 4 bytes for CLIP and each expert's output beside it.
"""

import argparse

HELP = "compute the frozen encoders' output for a data set's images once, for training with --feature_cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="tiny", help="name of a preset or path of a .yaml file (default: tiny)")
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value", help="override a preset's key")
    parser.add_argument("--data", action="append", required=True, metavar="JSON", help="LLaVA records; may be repeated")
    parser.add_argument("--image-folder", required=True, metavar="DIR", help="folder that image paths start from")
    parser.add_argument("--out", required=True, metavar="DIR", help="the cache")
    parser.add_argument("--image-aspect-ratio", default="pad", choices=("pad", "square"), help="default: pad")
    parser.add_argument("--store", default="float32", choices=("float32", "float16"), help="dtype on disk")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    from tove_llava.data import load_records
    from tove_llava.llava.build import vision_config
    from tove_llava.logs import quiet_transformers
    from tove_llava.presets import load_preset
    from tove_llava.serve.generation import choose_device
    from tove_llava.tower import ToveVisionModel
    from tove_llava.train.features import fill_cache

    quiet_transformers()
    tower = ToveVisionModel(vision_config(load_preset(args.preset, args.set).vision)).eval()
    tower.to(choose_device(args.device)).load_backbones()
    names = dict.fromkeys(name for file in args.data for record in load_records(file) for name in record.images)
    size = fill_cache(
        args.out,
        tower,
        list(names),
        args.image_folder,
        aspect_ratio=args.image_aspect_ratio,
        batch_size=args.batch_size,
        dtype=args.store,
    )
    print(f"{args.out}: features of {len(names)} images, {size / 1e6:.0f} MB")
    return 0
