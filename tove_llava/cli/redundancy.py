"""Measure how redundant the encoders are, by masking each (CUR, Information Gap).

Answers each benchmark with all encoders and without each one, as 'tove-llava eval' does; works with every fusion.
CUR = (accuracy with all - accuracy without it) / accuracy with all; the gap is the largest CUR minus the smallest
(arXiv 2507.03262). The same command continues a run that was interrupted; torchrun shares the work among GPUs.
"""

import argparse

from tove_llava.cli._flags import add_loading, add_model, check_least, loading_options, split_names
from tove_llava.cli.eval import DATA_ROOTS

HELP = "measure how redundant the encoders are on benchmarks, by masking each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--benchmark", required=True, metavar="A,B", help="benchmarks, as in 'tove-llava eval'")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for answers, redundancy.json and the plot")
    parser.add_argument("--encoders", metavar="A,B", default="", help="mask these (default: clip and every expert)")
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help=f"evaluation data (default: the first with the data of {', '.join(DATA_ROOTS)})",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="answer about N questions of each benchmark")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="questions at a time (default: 32)")
    parser.add_argument("--overwrite", action="store_true", help="delete the answers of an earlier run")
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from tove_llava.analysis.plots import figure, plot_redundancy
    from tove_llava.analysis.redundancy import check_scored, masking_conditions, redundancy, redundancy_table
    from tove_llava.core.files import check_writable, write_atomically
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.eval.conditions import FULL
    from tove_llava.eval.evaluate import Evaluation, evaluate

    check_least(args, "--batch-size", "--limit")
    roots = [args.data_root] if args.data_root else DATA_ROOTS
    masked = masking_conditions(args.model, split_names(args.encoders))
    check_scored(args.benchmark, roots)
    check_writable(args.out)
    figure(1, 1)  # fails now, not at the end, where matplotlib is missing
    quiet_transformers()
    evaluation = Evaluation(
        model=args.model,
        benchmarks=args.benchmark,
        data_roots=roots,
        conditions=[FULL, *masked.values()],
        output=args.out,
        batch_size=args.batch_size,
        limit=args.limit,
        overwrite=args.overwrite,
        loading=loading_options(args),
    )
    found = evaluate(evaluation)
    if found is None:
        return 0
    benchmarks = redundancy(found[0]["benchmarks"], masked)
    record = {"model": str(args.model), "encoders": list(masked), "limit": args.limit, "benchmarks": benchmarks}
    write_atomically(Path(args.out) / "redundancy.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    plot_redundancy(benchmarks, Path(args.out) / "redundancy.png")
    tables = "\n\n".join(redundancy_table(name, rows) for name, rows in benchmarks.items())
    print(json.dumps(record, ensure_ascii=False) if args.json else tables)
    return 0
