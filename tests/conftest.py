"""Shared fixtures.

Golden data lies next to the repository; tests that need it skip where it is absent.
"""

import gc
import os
from pathlib import Path

import pytest

# Before torch is imported. One thread for each of pytest's processes: the models are tiny, threads would fight over the
# cores, and a run is compared with one of another process, which must round alike.
for _name, _value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(_name, _value)

gc.disable()  # until the libraries are imported

ROOT = Path(__file__).resolve().parents[1]

# Marks that transformers' common tests carry (test_transformers_common.py).
_MARKS_OF_TRANSFORMERS = (
    "accelerate_tests", "all_flash_attn_test", "executorch_export_test", "flash_attn_3_test", "flash_attn_4_test",
    "flash_attn_test", "generate", "onnx_export_test", "timeout", "torch_compile_test", "torch_export_test",
)  # fmt: skip


# They start first, so that no process has one of them left when the others are done.
_SLOWEST = (
    "test_docs", "test_train_global_batch", "test_hf", "test_merge", "test_benchmarks_step", "test_benchmarks",
    "test_export", "test_analysis_detach", "test_qlora", "test_experts_contract", "test_convert", "test_experts_hub",
    "test_memory", "test_export_remote_code", "test_data_cli",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would order the files by their numbers of tests
    for name in _MARKS_OF_TRANSFORMERS if os.environ.get("TRANSFORMERS_SRC") else ():
        config.addinivalue_line("markers", f"{name}: of transformers' tests")


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """Exclude imported objects from garbage collection.

    accelerate collects after each training, for half a second.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries report what they take for leaks


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each kind: stage1, lora and full; only read."""
    from stage_parts import train_stages

    more = ("--max_steps", "2")
    return train_stages(tmp_path_factory.mktemp("kinds"), lora=("finetune_lora", *more), full=("finetune", *more))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory):
    """One LLaVA in every layout; only read."""
    from convert_world import World

    return World(tmp_path_factory.mktemp("convert"))


@pytest.fixture(scope="session")
def conformance() -> Path:
    """The folder of golden data."""
    folder = ROOT.parent / "shared" / "conformance"
    if not folder.is_dir():
        pytest.skip(f"no golden data at {folder}")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(_SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def answerer(tmp_path_factory):
    """A small random model that answers; tests must restore their changes."""
    from answer_parts import make_answerer

    return make_answerer(tmp_path_factory.mktemp("answerer"))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep what is decoded out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
