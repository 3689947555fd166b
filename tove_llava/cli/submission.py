"""Write a benchmark server's file from an answers file.

Lines of the answers file that are not JSON are named and left out; of lines with one id the last counts.
"""

import argparse

HELP = "write the file that a benchmark's own server scores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tove_llava.eval.benchmarks import BENCHMARKS
    from tove_llava.eval.server_files import Submitting

    names = [name for name in BENCHMARKS if issubclass(BENCHMARKS.get(name), Submitting)]
    parser.add_argument("--benchmark", required=True, metavar="NAME", help=f"one of: {', '.join(names)}")
    parser.add_argument("--predictions", required=True, metavar="FILE", help="answers, JSONL")
    parser.add_argument(
        "--questions",
        metavar="FILE",
        help="the benchmark's file of questions, or the folder of all benchmarks' data (gqa and mmvet need neither)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def run(args: argparse.Namespace) -> int:
    import sys
    from pathlib import Path

    from tove_llava.core.errors import ConfigError, DataError
    from tove_llava.core.files import check_writable, write_atomically
    from tove_llava.eval.benchmarks import get_benchmark
    from tove_llava.eval.rows import read_answers
    from tove_llava.eval.score_table import first_ids
    from tove_llava.eval.server_files import Submitting

    benchmark = get_benchmark(args.benchmark)
    if not isinstance(benchmark, Submitting):
        raise ConfigError(f"benchmark {args.benchmark!r} has no submission format; 'tove-llava score' scores it")
    out = Path(args.out)
    questions = Path(args.questions) if args.questions else None
    if out.suffix != benchmark.submission_suffix:
        raise ConfigError(f"--out must end in {benchmark.submission_suffix} for {args.benchmark}, not {out.name!r}")
    if out.exists() and not args.overwrite:
        raise DataError(f"{out} exists; give --overwrite to replace it, or another --out")
    check_writable(out)
    broken: list[int] = []
    answers = read_answers(args.predictions, broken)
    if questions is not None and questions.is_dir():
        questions = benchmark.submission_questions(questions)
    submission = benchmark.submission(answers, questions)
    write_atomically(out, submission.content)
    for number in broken:
        print(f"{args.predictions}, line {number}: not valid JSON; left out", file=sys.stderr)
    for name, ids in submission.notes.items():
        if ids:
            print(f"{len(ids)} {name}: {first_ids(ids)}", file=sys.stderr)
    if (whole := benchmark.submission_size) and submission.count < whole:
        print(
            f"warning: {out} answers {submission.count:,} of the {whole:,} questions of the test set; the server of "
            f"{args.benchmark} refuses such a file, or takes the others as wrong",
            file=sys.stderr,
        )
    print(f"wrote {out}")
    return 0
