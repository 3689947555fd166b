"""Measure the chat under many clients: first-token time and throughput.

Contenders, in turn within one run, on the same model, questions and images:

- together: the engine as it serves, up to --batch answers in one batch, which others join between two tokens.
- one by one: the same engine with one answer at a time; the others wait in the queue.

All clients ask at the same moment, each about an image of its own, from threads of this process; there is no network.
Times are those of a client, from asking (its image is decoded then) to the first piece of text, or to the last.
Answers have a fixed length, for the sake of equal work.

    python benchmarks/serve_load.py                                          # bundled weights, 50 clients
    python benchmarks/serve_load.py --preset vicuna-7b --device cuda --answer-tokens 128
"""

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import Bench, argument_parser, circumstances, run_command, write_results
from eval_throughput import build_answerer, write_data
from measuring import measure, ratio
from models import vision_sources

from tove_llava.core.errors import ConfigError
from tove_llava.core.text import markdown_table
from tove_llava.eval.benchmarks import Question
from tove_llava.inference.engine import Engine, Message, Sampling

TITLES = {"together": "together", "single": "one by one"}


class Crowd:
    """Clients that ask all at once; what each saw of every run."""

    def __init__(self, engine: Engine, questions: Sequence[Question], tokens: int) -> None:
        self.engine, self.questions, self.sampling = engine, questions, Sampling(tokens)
        self.first: list[list[float]] = []  # by run, by client: seconds to the first piece
        self.whole: list[list[float]] = []
        self.texts: list[str] = []

    def __call__(self) -> None:
        count = len(self.questions)
        first, whole, self.texts = [0.0] * count, [0.0] * count, [""] * count
        errors: list[Exception] = []
        start = threading.Barrier(count)

        def client(index: int) -> None:
            question = self.questions[index]
            start.wait()
            asked = time.perf_counter()
            try:
                for piece in self.engine.ask([Message("user", question.text, [question.image])], self.sampling):
                    first[index] = first[index] or time.perf_counter() - asked
                    self.texts[index] += piece
            except Exception as error:
                errors.append(error)
            whole[index] = time.perf_counter() - asked

        threads = [threading.Thread(target=client, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        self.first.append(first)
        self.whole.append(whole)


def benchmark(bench: Bench) -> None:
    args = bench.args
    for flag in ("clients", "answer_tokens"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(args, flag)}")
    weights = bench.weights([*vision_sources(bench.preset), bench.preset.language.source])
    answerer = build_answerer(bench, weights)
    answerer.end_ids = []  # no answer ends before its length
    side = bench.preset.vision.image_size or answerer.transform.image_size
    size = (2 * side, 3 * side // 2)
    record = bench.record(
        "serve_load",
        weights,
        clients=args.clients,
        batch=args.batch,
        answer_tokens=args.answer_tokens,
        picture_size=list(size),
        image_tokens=answerer.num_image_tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        questions = write_data(Path(folder), args.clients, 1, size, args.seed)
        with (
            Engine(answerer, max_batch=args.batch, max_waiting=args.clients) as together,
            Engine(answerer, max_batch=1, max_waiting=args.clients) as single,
        ):
            crowds = {
                name: Crowd(engine, questions, args.answer_tokens)
                for name, engine in (("together", together), ("single", single))
            }
            contenders: dict[str, Callable[[], Any]] = dict(crowds)
            samples = measure(contenders, repeats=args.repeats, warmup=args.warmup, device=bench.device)
    record["contenders"] = {
        name: {
            **samples[name].to_dict(),
            "questions_per_second": args.clients / samples[name].median,
            "tokens_per_second": args.clients * args.answer_tokens / samples[name].median,
            "first_token_seconds": seen([time for run in crowd.first[-args.repeats :] for time in run]),
            "answer_seconds": seen([time for run in crowd.whole[-args.repeats :] for time in run]),
            "same_answers": sum(a == b for a, b in zip(crowd.texts, crowds["single"].texts, strict=True))
            / args.clients,
        }
        for name, crowd in crowds.items()
    }
    record["ratio"] = ratio(samples["single"], samples["together"])
    write_results(args.output, record, render(record))


def seen(times: Sequence[float]) -> dict[str, float]:
    """Return the median and the 95th percentile of clients' times."""
    high = statistics.quantiles(times, n=20, method="inclusive")[-1] if len(times) > 1 else times[0]
    return {"median": statistics.median(times), "p95": high}


def render(record: dict[str, Any]) -> str:
    """Write the record as Markdown."""
    settings, together = record["settings"], record["ratio"]
    rows = [
        [
            TITLES[name],
            *(f"{row['first_token_seconds'][key]:.3g}" for key in ("median", "p95")),
            *(f"{row['answer_seconds'][key]:.3g}" for key in ("median", "p95")),
            f"{row['questions_per_second']:.3g}",
            f"{row['tokens_per_second']:.3g}",
            f"{row['same_answers']:.0%}",
        ]
        for name, row in record["contenders"].items()
    ]
    header = ["", "first token s", "95 %", "answer s", "95 %", "answers/s", "tokens/s", "same"]
    return "\n\n".join(
        [
            f"# {settings['clients']} clients of the chat at once",
            circumstances(record),
            markdown_table(header, rows),
            f"Together the engine answers **{together['value']:.2f} times** as many questions (quartiles "
            f"{together['paired_q1']:.2f} to {together['paired_q3']:.2f} repeat by repeat; {together['cpu_time']:.2f} "
            "in processor time).",
            "Medians and 95 % are over all clients of all repeats. An answer has "
            f"{settings['answer_tokens']} tokens. The last column has the share of answers that are, word for word, "
            "those of one by one.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.set_defaults(repeats=5, warmup=1)
    parser.add_argument("--clients", type=int, default=50, metavar="N", help="that ask at once (default: 50)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="answers at a time (default: 16)")
    parser.add_argument("--answer-tokens", type=int, default=16, metavar="N", help="length of an answer (default: 16)")
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
