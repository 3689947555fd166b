"""Say how much each expert contributes: its gate weight, its norm share, and what is lost without it.

Writes contributions.json and bar plots to --out. The frozen part of the tower runs once per image; loss and answers are
taken with all experts, without each one, and without any. The records' 'category' key, where they have one, is their
question type.
"""

import argparse

from tove_llava.cli._loading import add_loading_arguments, loading_options

HELP = "say how much each expert contributes, overall and by question type"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="folder that training wrote")
    add_data_arguments(parser, required=True)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for contributions.json and the plots")
    add_loading_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object instead of tables")


def add_data_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The flags that choose calibration records; other verbs have them too."""
    parser.add_argument(
        "--data",
        required=required,
        metavar="FILE",
        help="calibration records: LLaVA's JSON or JSONL, or questions as tove-llava scenes writes them",
    )
    parser.add_argument("--image-folder", metavar="DIR", help="where image names start (default: images/ beside FILE)")
    parser.add_argument("--limit", type=int, metavar="N", help="use N records, spread evenly over the file")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="records at a time (default: 16)")


def run(args: argparse.Namespace) -> int:
    import json

    from tove_llava.analysis.contributions import measure_contributions, save_contributions
    from tove_llava.analysis.measure import tower_with_experts
    from tove_llava.analysis.plots import figure
    from tove_llava.analysis.samples import load_samples
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.inference.generation import Answerer
    from tove_llava.serve.models import find_model

    check_counts(args)
    quiet_transformers()
    figure(1, 1)  # says now, not at the end, that matplotlib is missing
    answerer = Answerer.load(find_model(args.model), **loading_options(args))
    tower_with_experts(answerer)
    samples = load_samples(args.data, args.image_folder, answerer, args.model, args.limit)
    found = measure_contributions(answerer, samples, args.batch_size)
    record = save_contributions(found, args.out, answerer, args.model, samples, args.data)
    print(json.dumps(record, ensure_ascii=False) if args.json else found)
    return 0


def check_counts(args: argparse.Namespace) -> None:
    """Raises ConfigError for numbers that cannot be meant."""
    from tove_llava.core.errors import ConfigError

    for flag, value in (("--batch-size", args.batch_size), ("--limit", args.limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1, not {value}")
