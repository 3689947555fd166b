"""Draw which expert each part of an image listens to.

Writes for each image a map of the expert with the largest gate weight and a heat map per expert, both over the image as
the model sees it (cropped or padded), and the weights as .npz (routing [g, g, columns], names).
"""

import argparse

from tove_llava.cli._flags import add_loading, add_model, load_answerer

HELP = "draw which expert each part of an image listens to"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", required=True, nargs="+", action="extend", metavar="FILE", help="one or more images")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the PNG and .npz files")
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    import json

    from tove_llava.analysis.routing_maps import routing_table, show_routing
    from tove_llava.core.files import check_writable

    check_writable(args.out)
    answerer = load_answerer(args)
    shown = show_routing(answerer, args.image, args.out)
    if args.json:
        rows = [
            {"image": str(image), "means": found.means, "chosen": found.chosen, "files": [str(file) for file in files]}
            for image, found, files in shown
        ]
        print(json.dumps({"model": args.model, "images": rows}, ensure_ascii=False))
        return 0
    print(routing_table(shown))
    print(f"{sum(len(files) for _, _, files in shown)} files in {args.out}")
    return 0
