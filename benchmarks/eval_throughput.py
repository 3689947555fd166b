"""Compare our evaluation's questions/s with asking one at a time.

Contenders, in turn within one run, on the same model, image files and prompts:

- one by one: as LLaVA's ``model_vqa_loader`` does. A DataLoader's worker processes open the images, the model gets one
  question at a time, ``generate`` encodes its image and uses a cache; answers are written without waiting for the disk.
- runner: ``run_benchmark`` as ``tove-llava eval`` calls it, with all that it does (images opened in threads, batches,
  shared prefixes, answers on disk at once).
- runner, nothing shared: every prompt computed as a whole.

Answers have a fixed length, since random weights never stop by themselves.

    python benchmarks/eval_throughput.py                                     # bundled weights
    python benchmarks/eval_throughput.py --preset vicuna-7b --device cuda --questions 256 --batch 64
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bench, argument_parser, circumstances, lost_table, run_command, target, write_results
from measuring import MB, measure, peak_memory, ratio
from models import build_llava, is_local, vision_sources
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tove_llava.core.errors import ConfigError
from tove_llava.core.text import markdown_table
from tove_llava.eval.benchmarks import Benchmark, Question, Score
from tove_llava.eval.conditions import FULL
from tove_llava.eval.question_loader import prompt_ids
from tove_llava.eval.rows import Row
from tove_llava.eval.runner import Settings, run_benchmark
from tove_llava.eval.tasks import Decoding, Task
from tove_llava.inference.generation import Answerer
from tove_llava.llava.build import prepare_processor
from tove_llava.presets import load_preset

WORDS = ("red", "green", "small", "large", "left", "right", "box", "ball", "behind", "above", "number", "colour")
TARGET = 4.0
TITLES = {"single": "one by one", "runner": "runner", "whole": "runner, nothing shared"}


class Synthetic(Benchmark):
    """Questions of several lengths about made images."""

    max_new_tokens = 1

    def question_file(self, root: Path) -> Path:
        return root / "questions.jsonl"

    def questions(self, root: Path) -> list[Question]:
        return [
            Question(row["question_id"], row["text"], root / row["image"])
            for row in map(json.loads, self.question_file(root).read_text().splitlines())
        ]

    def ground_truth(self, root: Path) -> list[Row] | None:
        return None

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        raise NotImplementedError("only the speed matters")


def write_data(root: Path, count: int, each: int, size: tuple[int, int], seed: int) -> list[Question]:
    """Write ``count`` questions, ``each`` of them about one JPEG."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        name = f"{index // each}.jpg"
        if index % each == 0:
            coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(root / name, quality=90)
        words = " ".join(draw.choice(WORDS, size=draw.integers(6, 15)))
        text = f"What is {words}?\nAnswer the question using a single word or phrase."
        rows.append({"question_id": index, "text": text, "image": name})
    benchmark = Synthetic()
    benchmark.question_file(root).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return benchmark.questions(root)


class _Inputs(Dataset):
    """Each question's ids and pixels, as LLaVA's loader prepares them."""

    def __init__(self, answerer: Answerer, questions: Sequence[Question]) -> None:
        self.prompts = [prompt_ids(answerer, question) for question in questions]
        self.images = [question.image for question in questions]
        self.transform = answerer.transform

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(self.prompts[index]), self.transform.open(self.images[index])


class OneByOne:
    """The loop of ``model_vqa_loader``; workers start once, before the clock does."""

    def __init__(self, answerer: Answerer, questions: Sequence[Question], workers: int, tokens: int, out: Path) -> None:
        self.answerer, self.questions, self.tokens, self.out = answerer, questions, tokens, out
        self.loader = DataLoader(
            _Inputs(answerer, questions), batch_size=1, num_workers=workers, persistent_workers=workers > 0
        )

    @torch.inference_mode()
    def __call__(self) -> list[str]:
        model, tokenizer = self.answerer.model, self.answerer.tokenizer
        texts = []
        with open(self.out, "w", encoding="utf-8") as out:
            for question, (ids, pixels) in zip(self.questions, self.loader, strict=True):
                output = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=torch.ones_like(ids, device=model.device),
                    pixel_values=pixels.to(model.device, model.dtype),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=self.tokens,
                    min_new_tokens=self.tokens,
                    eos_token_id=self.answerer.end_ids,
                    pad_token_id=self.answerer.pad_id,
                    use_cache=True,
                )
                text = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)[0].strip()
                texts.append(text)
                out.write(json.dumps({"question_id": question.question_id, "text": text}) + "\n")
        return texts


def runner(
    answerer: Answerer, questions: Sequence[Question], tokens: int, batch: int, share: bool
) -> Callable[[], list[str]]:
    """Run our runner on the questions, in a new folder each time."""
    settings = Settings(batch_size=batch, share=share)
    decoding = Decoding(tokens, min_new_tokens=tokens)
    task = Task("synthetic", Synthetic(), Path(), decoding, list(questions), list(questions), truth=None)

    def answer() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            run = run_benchmark(answerer, task, folder, FULL, settings, label=None)
        return [row["text"] for row in run.rows]

    return answer


def build_answerer(bench: Bench, weights: str) -> Answerer:
    """Build the preset's model; a missing tokenizer is the tiny preset's."""
    model = build_llava(bench, weights).eval()
    preset = bench.preset if is_local(bench.preset.language.source) else load_preset("tiny")
    processor = prepare_processor(preset, model.config.vision_config, "v1")
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ConfigError(f"the preset's vocabulary must have at least {len(processor.tokenizer)} words")
    return Answerer(model, processor, "v1", "pad")


def benchmark(bench: Bench) -> dict[str, Any]:
    args = bench.args
    lengths = [int(word) for word in args.answer_tokens.split(",")]
    if min(lengths, default=0) < 1:
        raise ConfigError(f"--answer-tokens must be numbers of at least 1, not {args.answer_tokens!r}")
    weights = bench.weights([*vision_sources(bench.preset), bench.preset.language.source])
    answerer = build_answerer(bench, weights)
    side = bench.preset.vision.image_size or answerer.transform.image_size
    size = (2 * side, 3 * side // 2)
    record = bench.record(
        "eval_throughput",
        weights,
        questions=args.questions,
        single=args.single,
        batch=args.batch,
        loader_workers=args.loader_workers,
        picture_size=list(size),
        image_tokens=answerer.num_image_tokens,
    )
    record["cases"] = []
    with tempfile.TemporaryDirectory() as folder:
        for each in (1, args.per_picture):
            root = Path(folder) / str(each)
            root.mkdir()
            questions = write_data(root, args.questions, each, size, args.seed)
            for tokens in lengths:
                name = f"answers of {tokens} tokens, {each} a picture"
                row = bench.attempt(record, name, partial(case, bench, answerer, questions, each, tokens, root))
                record["cases"] += [] if row is None else [row]
                _save(bench, record)
    print(render(record))
    return record


def _save(bench: Bench, record: dict[str, Any]) -> None:
    """Save the results so far; the target needs every case."""
    lost, name = record["not_measured"], "evaluation: questions/s over one question at a time"
    values = [entry["ratios"]["runner_over_single"]["value"] for entry in record["cases"]]
    slowest = min(values) if values and not lost else None
    record["targets"] = [target(name, slowest, TARGET, reason=next(iter(lost.values()), None))]
    for entry in record["cases"][:1]:
        record["settings"]["prompt_tokens"] = entry["prompt_tokens"]
    write_results(bench.args.output, record, render(record), show=False)


def case(
    bench: Bench, answerer: Answerer, questions: Sequence[Question], each: int, tokens: int, root: Path
) -> dict[str, Any]:
    """Measure all contenders on answers of one length."""
    args = bench.args
    single = questions[: args.single]
    contenders = {
        "single": OneByOne(answerer, single, args.loader_workers, tokens, root / "answers.jsonl"),
        "runner": runner(answerer, questions, tokens, args.batch, share=True),
        "whole": runner(answerer, questions, tokens, args.batch, share=False),
    }
    counts = {"single": len(single), "runner": len(questions), "whole": len(questions)}
    texts: dict[str, list[str]] = {}
    memory = {
        name: peak_memory(lambda name=name, run=run: texts.update({name: run()}), bench.device)
        for name, run in contenders.items()
    }
    samples = measure(contenders, repeats=args.repeats, warmup=args.warmup, device=bench.device, is_over=bench.is_over)
    for name, sample in samples.items():  # seconds of one question
        sample.wall = [seconds / counts[name] for seconds in sample.wall]
        sample.cpu = [seconds / counts[name] for seconds in sample.cpu]
    lengths = [len(prompt_ids(answerer, question)) for question in questions]
    return {
        "questions_per_picture": each,
        "answer_tokens": tokens,
        "prompt_tokens": [min(lengths), max(lengths)],
        "contenders": {
            name: {
                **samples[name].to_dict(),
                "questions_per_second": 1 / samples[name].median,
                "peak_bytes_above_weights": memory[name],
                "same_answers": _agreement(texts[name], texts["single"]),
            }
            for name in contenders
        },
        "ratios": {f"{name}_over_single": ratio(samples["single"], samples[name]) for name in ("runner", "whole")}
        | {"runner_over_whole": ratio(samples["whole"], samples["runner"])},
    }


def _agreement(texts: Sequence[str], others: Sequence[str]) -> float:
    """Return the share of equal answers among the first questions."""
    return sum(a == b for a, b in zip(texts, others, strict=False)) / len(others)


def render(record: dict[str, Any]) -> str:
    """Write the record as Markdown."""
    settings = record["settings"]
    parts = ["# The evaluation's speed", circumstances(record), *lost_table(record)]
    for entry in record["cases"]:
        each, single = entry["questions_per_picture"], entry["ratios"]["runner_over_single"]
        whole = entry["ratios"]["runner_over_whole"]
        parts.append(
            f"## Answers of {entry['answer_tokens']} tokens, "
            + ("each question about a picture of its own" if each == 1 else f"{each} questions about each picture")
        )
        parts.append(
            markdown_table(
                ["", "questions/s", "ms a question (quartiles)", "CPU ms a question", "peak above weights MB", "same"],
                [
                    [
                        TITLES[name],
                        f"{row['questions_per_second']:.3g}",
                        f"{row['wall_seconds']['median'] * 1e3:.3g} ({row['wall_seconds']['q1'] * 1e3:.3g} to "
                        f"{row['wall_seconds']['q3'] * 1e3:.3g})",
                        f"{row['cpu_seconds']['median'] * 1e3:.3g}",
                        f"{row['peak_bytes_above_weights'] / MB:.4g}",
                        f"{row['same_answers']:.0%}",
                    ]
                    for name, row in entry["contenders"].items()
                ],
            )
        )
        parts.append(
            f"The runner answers **{single['value']:.2f} times** as many questions as one by one (quartiles "
            f"{single['paired_q1']:.2f} to {single['paired_q3']:.2f} repeat by repeat; {single['cpu_time']:.2f} in "
            f"processor time), and {whole['value']:.2f} times as many as without sharing ({whole['cpu_time']:.2f} in "
            "processor time)."
        )
    if not record["cases"]:
        return "\n\n".join(parts)
    shortest, longest = settings["prompt_tokens"]
    parts.append(
        f"Prompts have {shortest} to {longest} tokens, {settings['image_tokens']} of them the image's. The last column "
        "has the share of answers that are, word for word, those of one by one. Processor time is that of the main "
        "process with its threads; the workers of one by one's loader are not in it."
    )
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, limit=True)
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="questions at a time (default: 32)")
    parser.add_argument("--questions", type=int, default=64, metavar="N", help="for the runner (default: 64)")
    parser.add_argument("--single", type=int, default=8, metavar="N", help="for one by one (default: 8)")
    parser.add_argument("--answer-tokens", default="5,64", metavar="A,B", help="lengths of the answers (default: 5,64)")
    parser.add_argument(
        "--per-picture", type=int, default=8, metavar="N", help="questions about a picture, in the second part"
    )
    parser.add_argument(
        "--loader-workers",
        type=int,
        default=max(1, min(4, (os.cpu_count() or 1) - 1)),
        metavar="N",
        help="of one by one (default: 4, as LLaVA has, or as many as there are other cores)",
    )
    parser.set_defaults(repeats=5, warmup=0)
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
