"""The benchmark of the data path at toy size: its records, and that both contenders read the same."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tove_llava.data import ImageTransform, LlavaDataset, load_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import data_path
        import llava_mix

        yield data_path, llava_mix
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("data_path", "llava_mix", "common"):
            sys.modules.pop(name, None)


def test_it_measures_both_and_says_so(modules, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAVA_SRC", raising=False)
    threads = torch.get_num_threads()
    try:
        assert modules[0].main(["--count", "6", "--repeats", "2", "--batch", "4", "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "data_path-tiny-cpu.json").read_text())
    page = (tmp_path / "data_path-tiny-cpu.md").read_text()
    rows = {name: row["cpu_seconds"]["median"] for name, row in record["contenders"].items()}
    for name in ("ours", "ours_torch"):
        assert record["ratios"][name]["cpu_time"] == pytest.approx(rows["original"] / rows[name])
        assert record["contenders"][name]["records_per_core_second"] == pytest.approx(6 / rows[name])
    (target,) = record["targets"]
    assert target["value"] == record["ratios"]["ours_torch"]["cpu_time"] and target["target"] == 3
    assert (target["value"] >= 3) == ("3 times, met" in page)
    assert record["settings"]["original"] == "restated" and "158 LLaVA instructions" in page
    assert modules[0].main(["--records", "x.json", "--output", str(tmp_path)]) == 2


def test_an_original_that_cannot_be_run_is_an_error(modules, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LLAVA_SRC", str(tmp_path))
    threads = torch.get_num_threads()
    try:
        assert modules[0].main(["--count", "2", "--output", str(tmp_path)]) == 2
    finally:
        torch.set_num_threads(threads)
    assert "exit code 1" in (said := capfd.readouterr().err) and "No module named 'llava'" in said


def test_contenders_read_the_same(modules, tmp_path):
    data_path, llava_mix = modules
    records = llava_mix.write_mix(tmp_path / "mix", 12, size=(80, 60), pictures=3)
    tokenizer = load_tokenizer("bundled:llm")
    ours = LlavaDataset(records, records.parent / "images", tokenizer, "v1", ImageTransform(336, "pad"), 576, 8192)
    theirs = data_path.Restated(json.loads(records.read_text()), records.parent / "images", tokenizer)
    pictures = 0
    for index in range(12):
        example, (ids, pixels) = ours[index], theirs[index]
        texts = [tokenizer.decode(x[x >= 0]).split() for x in (example["input_ids"], ids)]
        assert texts[0] == texts[1] and (example["input_ids"] < 0).sum() == (ids < 0).sum()
        if example["pixel_values"] is not None:
            pictures += 1
            assert torch.equal(example["pixel_values"][0], pixels)
    assert 0 < pictures < 13


def test_the_mix_has_the_shares_it_says(modules, tmp_path):
    llava_mix = modules[1]
    file = llava_mix.write_mix(tmp_path / "mix", 2000, size=(16, 12), pictures=2)
    records = json.loads(file.read_text())
    total = sum(part.thousands for part in llava_mix.MIX)
    for part in llava_mix.MIX:
        own = [record for record in records if record["id"].startswith(f"{part.name}-")]
        assert abs(len(own) / 2000 - part.thousands / total) < 0.04
        for record in own[:20]:
            assert part.turns[0] <= len(record["conversations"]) / 2 <= part.turns[1]
            assert ("image" in record) == part.picture == record["conversations"][0]["value"].startswith("<image>")
