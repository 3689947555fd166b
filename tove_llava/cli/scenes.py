"""Render playground scenes: small 3-D worlds with exact captions and questions.

The same seed writes the same bytes. The same command leaves existing scenes as they are.
"""

import argparse
from pathlib import Path

HELP = "render playground scenes with captions and questions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must be new or empty")
    parser.add_argument("--train", type=int, default=0, metavar="N", help="training scenes")
    parser.add_argument("--val", type=int, default=0, metavar="N", help="held-out scenes, with evaluation questions")
    parser.add_argument(
        "--novel", type=int, default=0, metavar="N", help="scenes with colour-shape pairs never trained on"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--size", type=int, default=96, metavar="PIXELS", help="side of an image (default 96)")
    parser.add_argument("--format", default="png", choices=("png", "jpg"), help="image format (default png)")
    parser.add_argument("--maps", action="store_true", help="also write depth, normals, masks and edges as PNG")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from tove_llava.scenes.writer import Request, write_scenes

    counts = {"train": args.train, "val": args.val, "novel": args.novel}
    request = Request(counts=counts, seed=args.seed, size=args.size, image_format=args.format, maps=args.maps)
    with tqdm(total=sum(counts.values()), unit="scene", desc="scenes", mininterval=0.5) as bar:
        written = write_scenes(request, args.out, lambda done, total, seconds: bar.update(done - bar.n))
    print(f"{args.out}: {'written' if written else 'already there'}, {sum(counts.values())} scenes")
    return 0
