"""Measure each expert's gate weight, norm share, and the loss without it.

Writes contributions.json and bar plots to --out. Loss and answers are measured with all experts, without each one, and
without any. A record's question type is its 'category' key.
"""

import argparse

from tove_llava.cli._flags import (
    add_calibration,
    add_loading,
    add_model,
    calibration_samples,
    check_least,
    load_answerer,
)

HELP = "measure how much each expert contributes, overall and by question type"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_calibration(parser, required=True)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for contributions.json and the plots")
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    import json

    from tove_llava.analysis.contributions import measure_contributions, save_contributions
    from tove_llava.analysis.measure import tower_with_experts
    from tove_llava.analysis.plots import figure
    from tove_llava.core.files import check_writable

    check_least(args, "--batch-size", "--limit")
    check_writable(args.out)
    figure(1, 1)  # fails now, not at the end, where matplotlib is missing
    answerer = load_answerer(args)
    tower_with_experts(answerer)
    samples = calibration_samples(args, answerer)
    found = measure_contributions(answerer, samples, args.batch_size)
    record = save_contributions(found, args.out, answerer, args.model, samples, args.data)
    print(json.dumps(record, ensure_ascii=False) if args.json else found)
    return 0
