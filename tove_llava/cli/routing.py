"""Draw which expert each part of a picture listens to.

For each picture a map of the expert with the largest gate weight, a heat map per expert, both over the picture as the
model sees it (cropped or padded), and the weights themselves as .npz (routing [g, g, columns], names).
"""

import argparse

from tove_llava.cli._loading import add_loading_arguments, loading_options

HELP = "draw which expert each part of a picture listens to"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="folder that training wrote")
    parser.add_argument(
        "--image", required=True, nargs="+", action="extend", metavar="FILE", help="one or more pictures"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the PNG and .npz files")
    add_loading_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    import json

    from tove_llava.analysis.routing import routing_table, show_routing
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.inference.generation import Answerer
    from tove_llava.serve.models import find_model

    quiet_transformers()
    answerer = Answerer.load(find_model(args.model), **loading_options(args))
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
