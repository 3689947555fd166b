"""How fast records become batches: the training data set against the steps of LLaVA's own, record by record.

Both read the same JPEG files and the same records (LLaVA-1.5's mix, see llava_mix.py, or your own with --records and
--image-folder), with the same tokenizer and settings (template v1, pictures padded to 336). One process, one thread.

- ours: ``LlavaDataset`` and ``LlavaCollator``, as training calls them.
- LLaVA's steps: what ``LazySupervisedDataset`` does. With LLAVA_SRC naming its repository it is that class itself;
  without it a restatement: Pillow, ``expand2square``, transformers' Pillow ``CLIPImageProcessor``, and a tokenizer that
  encodes the conversation, and then each round and each question once more to find what is supervised.

    python benchmarks/data_path.py
    python benchmarks/data_path.py --tokenizer vicuna/tokenizer.model --records mix665k.json --image-folder data
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
from common import Bench, argument_parser, circumstances, measure, ratio, run_command, table, write_results
from llava_mix import describe, write_mix
from PIL import Image
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase

from tove_llava.data import ImageTransform, LlavaCollator, LlavaDataset, load_tokenizer
from tove_llava.data.images import CLIP_MEAN, pad_to_square
from tove_llava.errors import ConfigError

SIDE, TOKENS, IMAGE_ID = 336, 576, -200
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Record = dict[str, Any]
TITLES = {"ours": "ours", "original": "LLaVA's steps"}
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

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate(text.split("<image>")):
            ids += ([IMAGE_ID] if place else []) + self.tokenizer(part).input_ids[place > 0 :]
        return ids


def original(records: Path, images: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, str]:
    """LLaVA's own data set where LLAVA_SRC names its repository, else its restatement; and which it is."""
    source = os.environ.get("LLAVA_SRC")
    if source is None:
        return Restated(json.loads(records.read_text()), images, tokenizer), "restated"
    sys.path.insert(0, source)
    from llava import conversation
    from llava.train.train import DataArguments, LazySupervisedDataset

    conversation.default_conversation = conversation.conv_templates["v1"]
    settings = DataArguments(data_path=str(records), lazy_preprocess=True, is_multimodal=True, image_folder=str(images))
    settings.image_aspect_ratio = "pad"
    settings.mm_use_im_start_end = False
    settings.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    settings.image_processor.preprocess = settings.image_processor.__call__
    if not hasattr(tokenizer, "legacy"):
        tokenizer.legacy = False
    return LazySupervisedDataset(str(records), tokenizer, settings), f"its own code ({source})"


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
        dataset = LlavaDataset(records, images, tokenizer, "v1", ImageTransform(SIDE, "pad"), TOKENS, 2048)
        collate = LlavaCollator(0, len(tokenizer), TOKENS, packed=True)
        theirs, which = original(records, images, tokenizer)
        count = min(args.count, len(dataset))

        def ours() -> None:
            for start in range(0, count, args.batch):
                collate([dataset[index] for index in range(start, min(start + args.batch, count))])

        def each() -> None:
            for index in range(count):
                theirs[index]

        contenders: dict[str, Callable[[], None]] = {"ours": ours, "original": each}
        samples = measure(contenders, repeats=args.repeats, warmup=args.warmup, device=torch.device("cpu"))
    record = bench.record(
        "data_path", "no", records=count, batch=args.batch, original=which, tokenizer=Path(args.tokenizer).name,
        mix=describe() if args.records is None else Path(args.records).name,
    )  # fmt: skip
    record["contenders"] = {
        name: {**found.to_dict(), "records_per_core_second": count / found.cpu_median}
        for name, found in samples.items()
    }
    record["ratio"] = ratio(samples["original"], samples["ours"])
    record["target"] = {"value": TARGET, "met": record["ratio"]["cpu_time"] >= TARGET}
    write_results(args.output, record, markdown(record))


def markdown(record: dict[str, Any]) -> str:
    found, target = record["ratio"], record["target"]
    rows = [
        [TITLES[name], f"{row['records_per_core_second']:.1f}", f"{1e3 / row['records_per_core_second']:.2f}"]
        for name, row in record["contenders"].items()
    ]
    return "\n\n".join(
        [
            "# Data path",
            circumstances(record),
            table(["", "records per core-second", "ms a record"], rows),
            f"Ours makes **{found['cpu_time']:.2f} times** as many records per core-second "
            f"({found['value']:.2f} in wall-clock time, quartiles {found['paired_q1']:.2f} to {found['paired_q3']:.2f} "
            f"repeat by repeat). Target: {target['value']:g} times, {'met' if target['met'] else 'not met'}.",
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
