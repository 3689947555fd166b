"""Compare the training data set's speed with that of LLaVA's own.

All read the same JPEG files and the same records (LLaVA-1.5's mix, see llava_mix.py, or your own with --records and
--image-folder), with the same tokenizer and settings (template v1, images padded to 336). One thread each.

- ours: ``LlavaDataset`` and ``LlavaCollator``, as training calls them, images resized by Pillow and by torch
  (``image_resize``).
- LLaVA's steps: what ``LazySupervisedDataset`` does. With LLAVA_SRC naming its repository it is that class itself, in a
  process of LLAVA_PYTHON, the interpreter of an environment with LLaVA's own package versions, and --tokenizer has to
  be a sentencepiece file. Without it a restatement: Pillow, ``expand2square``, transformers' Pillow
  ``CLIPImageProcessor``, and a tokenizer that encodes the conversation, and then each round and each question once more
  to find what is supervised.

    python benchmarks/data_path.py
    LLAVA_SRC=LLaVA LLAVA_PYTHON=llava-env/bin/python python benchmarks/data_path.py --tokenizer vicuna/tokenizer.model
"""

import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Bench, argument_parser, circumstances, run_command, target, write_results
from llava_child import LlavaChild
from llava_mix import describe, write_mix
from measuring import measure, ratio
from PIL import Image
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase

from tove_llava.core.errors import ConfigError
from tove_llava.core.text import markdown_table
from tove_llava.data import ImageTransform, LlavaCollator, LlavaDataset, load_tokenizer
from tove_llava.data.images import CLIP_MEAN
from tove_llava.data.resize import TOLERANCE, ImageResize, pad_to_square

SIDE, TOKENS, IMAGE_ID = 336, 576, -200
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Record = dict[str, Any]
TITLES = {"ours": "ours", "ours_torch": "ours, torch's resize", "original": "LLaVA's steps"}
TARGET = 3.0


class Restated:
    """The steps of LLaVA's data set, one record at a time."""

    def __init__(self, records: Sequence[Record], images: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.records, self.images, self.tokenizer = records, images, tokenizer
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        record = self.records[index]
        pixels = torch.zeros(3, SIDE, SIDE)
        if "image" in record:
            image = Image.open(self.images / record["image"]).convert("RGB")
            red, green, blue = (int(x * 255) for x in CLIP_MEAN)
            image = pad_to_square(image, (red, green, blue))
            pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        turns = copy.deepcopy(record["conversations"])
        rounds = [
            f"USER: {asked['value']} ASSISTANT: {said['value']}"
            for asked, said in zip(turns[::2], turns[1::2], strict=True)
        ]
        ids = self._ids(SYSTEM + " " + "</s>".join(rounds) + "</s>")
        for text in rounds:  # to find where each answer begins
            self._ids(text)
            self._ids(text.partition(" ASSISTANT: ")[0] + " ASSISTANT: ")
        return torch.tensor(ids), pixels

    def run(self) -> None:
        for index in range(len(self.records)):
            self[index]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate(text.split("<image>")):
            ids += ([IMAGE_ID] if place else []) + self.tokenizer(part).input_ids[place > 0 :]
        return ids


class Original:
    """LLaVA's own data set in its process; a call reads all records."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.child = LlavaChild("original_data.py", "LLaVA's data set", given, OMP_NUM_THREADS="1")
        self.versions, self.processor_seconds = self.child.made, 0.0

    def __call__(self) -> None:
        self.processor_seconds = float(self.child.ask("once more"))


def benchmark(bench: Bench) -> None:
    args = bench.args
    torch.set_num_threads(1)
    if (args.records is None) != (args.image_folder is None):
        raise ConfigError("--records and --image-folder go together")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "mix"
        records = args.records or write_mix(made, args.count, seed=args.seed)
        images = args.image_folder or made / "images"
        tokenizer = load_tokenizer(args.tokenizer)
        collate = LlavaCollator(0, len(tokenizer), TOKENS, packed=True)

        def ours(how: ImageResize) -> Callable[[], None]:
            transform = ImageTransform(SIDE, "pad", image_resize=how)
            dataset = LlavaDataset(records, images, tokenizer, "v1", transform, TOKENS, 2048)
            total = min(args.count, len(dataset))

            def run() -> None:
                for start in range(0, total, args.batch):
                    collate([dataset[index] for index in range(start, min(start + args.batch, total))])

            return run

        content = json.loads(records.read_text())
        count = min(args.count, len(content))
        source = os.environ.get("LLAVA_SRC")
        contenders: dict[str, Callable[[], None]] = {"ours": ours("pillow"), "ours_torch": ours("torch")}
        clocks = {}
        if source is None:
            restated, which = Restated(content[:count], images, tokenizer), "restated"
            contenders["original"] = restated.run
        else:
            given = {"source": source, "tokenizer": args.tokenizer, "records": str(records), "images": str(images)}
            its_own = Original({**given, "count": count, "side": SIDE})
            which = f"its own code, {its_own.versions}"
            contenders["original"], clocks["original"] = its_own, lambda: its_own.processor_seconds
        samples = measure(
            contenders, repeats=args.repeats, warmup=args.warmup, device=torch.device("cpu"), clocks=clocks
        )
        if source is not None:
            its_own.child.close()
    record = bench.record(
        "data_path", "no", records=count, batch=args.batch, original=which, tokenizer=Path(args.tokenizer).name,
        mix=describe() if args.records is None else Path(args.records).name,
    )  # fmt: skip
    record["contenders"] = {
        name: {**found.to_dict(), "records_per_core_second": count / found.cpu_median}
        for name, found in samples.items()
    }
    record["ratios"] = {name: ratio(samples["original"], samples[name]) for name in samples if name != "original"}
    record["targets"] = [
        target("records per core-second over LLaVA's steps", record["ratios"]["ours_torch"]["cpu_time"], TARGET)
    ]
    write_results(args.output, record, markdown(record))


def markdown(record: dict[str, Any]) -> str:
    rows = [
        [
            TITLES[name],
            f"{row['records_per_core_second']:.1f}",
            f"{1e3 / row['records_per_core_second']:.2f}",
            f"{record['ratios'][name]['cpu_time']:.2f}" if name in record["ratios"] else "1",
        ]
        for name, row in record["contenders"].items()
    ]
    found, goal = record["ratios"]["ours_torch"], record["targets"][0]
    return "\n\n".join(
        [
            "# Data path",
            circumstances(record),
            markdown_table(["", "records per core-second", "ms a record", "times LLaVA's steps"], rows),
            f"With torch's resize, whose levels differ from Pillow's by at most {TOLERANCE['torch']} of 255, ours "
            f"makes **{found['cpu_time']:.2f} times** as many records per core-second ({found['value']:.2f} in "
            f"wall-clock time, quartiles {found['paired_q1']:.2f} to {found['paired_q3']:.2f}). Target: "
            f"{goal['target']:g} times, {'met' if goal['value'] >= goal['target'] else 'not met'}.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=200, metavar="N", help="records (default: 200)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="records a batch (default: 16)")
    parser.add_argument("--records", type=Path, metavar="FILE", help="LLaVA records of your own")
    parser.add_argument("--image-folder", type=Path, metavar="DIR", help="of --records")
    parser.add_argument("--tokenizer", default="bundled:llm", metavar="DIR", help="folder, file or source")
    parser.set_defaults(repeats=5, warmup=1, device="cpu")
    args = parser.parse_args(argv)
    return run_command(lambda: benchmark(Bench(args)))


if __name__ == "__main__":
    sys.exit(main())
