"""Train and count this rank's images and encoder passes by micro-batch.

Images that were encoded and fused are counted, too.

Usage: python -m tower_calls_child FILE, where FILE holds the trainer's arguments; writes FILE.<rank>.
"""

import json
import os
import sys
from pathlib import Path

from tove_llava.experts import Expert
from tove_llava.tower import ToveVisionModel
from tove_llava.train.run import run_as_process
from tove_llava.train.trainer import ToveTrainer


def count(monkeypatch_set=setattr):
    """One entry a micro-batch; the same on the CPU as anywhere."""
    rows = []
    compute, expert, fuse = ToveTrainer.compute_loss, Expert.forward, ToveVisionModel.fuse
    encode = ToveVisionModel.encode

    def counted_compute(self, model, inputs, *args, **kwargs):
        pixels = inputs.get("pixel_values")
        rows.append({"images": 0 if pixels is None else len(pixels), "experts": 0, "encoded": 0, "fused": 0})
        rows[-1]["global"] = sum(self._window.images[self._window.step])
        return compute(self, model, inputs, *args, **kwargs)

    def counted_expert(self, pixels, *args, **kwargs):
        rows[-1]["experts"] += 1
        return expert(self, pixels, *args, **kwargs)

    def counted_encode(self, pixel_values, *args, **kwargs):
        rows[-1]["encoded"] += len(pixel_values)
        return encode(self, pixel_values, *args, **kwargs)

    def counted_fuse(self, features, *args, **kwargs):
        rows[-1]["fused"] += len(features.base)
        return fuse(self, features, *args, **kwargs)

    monkeypatch_set(ToveTrainer, "compute_loss", counted_compute)
    monkeypatch_set(Expert, "forward", counted_expert)
    monkeypatch_set(ToveVisionModel, "encode", counted_encode)
    monkeypatch_set(ToveVisionModel, "fuse", counted_fuse)
    return rows


if __name__ == "__main__":
    file = Path(sys.argv[1])
    rows = count()
    code = run_as_process(json.loads(file.read_text()))
    file.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(rows))
    sys.exit(code)
