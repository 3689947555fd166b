"""A working folder like a clone's root, in which the blocks of a page are run one after another."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from docs_pages import Block, Page
from docs_server import CLIENT

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds a block; a page that hangs must end


class Server:
    """The process that runs the pages' Python programs (:mod:`docs_server`), and executables that use it."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "bin"
        self.programs.mkdir(parents=True)
        address = str(folder / "socket")
        for name in ("tove-llava", "python", "python3"):
            prefix = ["-m", "tove_llava"] if name == "tove-llava" else []
            text = CLIENT.format(python=sys.executable, prefix=prefix, address=address)
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)
        command = [sys.executable, str(ROOT / "tests" / "docs_server.py"), address, "docs_warm"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=self.environment(), cwd=folder, **pipes)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def environment(self) -> dict[str, str]:
        """One thread, one process, no accelerator, no hub; this checkout's package."""
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        path = os.pathsep.join([str(self.programs), str(Path(sys.executable).parent), inherited.get("PATH", "")])
        fixed = {
            "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "NUM_GPUS": "1", "PATH": path,
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg",
        }  # fmt: skip
        return {**inherited, **fixed}

    def close(self) -> None:
        self.process.kill()  # it holds nothing that wants closing
        self.process.communicate()


def make_clone(folder: Path, scenes: Path | None = None, model: Path | None = None) -> Path:
    """A folder that looks like a clone's root: everything linked, but data and outputs its own.

    Args:
        scenes: playground scenes, linked as ``playground/data/scenes``.
        model: a checkpoint folder, linked as ``outputs/tiny/finetune_lora``.
    """
    own = {"outputs", "data", ".venv", ".git", ".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
    folder.mkdir(parents=True)
    # Scripts find the root by way of their own folder, so that has to be a real one.
    for part in (folder, *(folder / name for name in ("scripts", "eval", "playground"))):
        part.mkdir(exist_ok=True)
        for entry in (ROOT / part.relative_to(folder)).iterdir():
            if entry.name not in own and not (part == folder and entry.name in ("scripts", "eval", "playground")):
                (part / entry.name).symlink_to(entry)
    (folder / "playground" / "data").mkdir()
    if scenes is not None:
        (folder / "playground" / "data" / "scenes").symlink_to(scenes)
    if model is not None:
        (folder / "outputs" / "tiny").mkdir(parents=True)
        (folder / "outputs" / "tiny" / "finetune_lora").symlink_to(model)
    return folder


class BlockError(AssertionError):
    """A block did not do what its page says."""


def run_page(page: Page, folder: Path, environment: dict[str, str]) -> None:
    """Runs a page's blocks in order.

    Raises:
        BlockError: one failed; the message names page and line, and has its output.
    """
    printed = ""
    for block, *rest in programs(page.blocks):
        if block.file is not None:
            target = folder / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif block.is_output:
            check_output(block, printed)
        elif block.is_run:
            printed = run_block(block, folder, environment, rest)


def programs(blocks: Iterable[Block]) -> list[list[Block]]:
    """The blocks, each with those that go on with it."""
    found: list[list[Block]] = []
    for block in blocks:
        if not block.goes_on:
            found.append([block])
        elif found and found[-1][0].is_run and found[-1][0].language == block.language == "python":
            found[-1].append(block)
        else:
            raise BlockError(f"{block.where}: it goes on, but the block before it is not a python block that is run")
    return found


def run_block(block: Block, folder: Path, environment: dict[str, str], rest: Sequence[Block] = ()) -> str:
    """What a block, and those that go on with it, print to the standard output."""
    if block.language == "python":
        command = ["python", str(write_program([block, *rest], folder))]
    elif block.language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", block.runnable]
    else:
        raise BlockError(f"{block.where}: a block of language {block.language!r} cannot be run; bash and python can")
    process = subprocess.Popen(
        ["env", *command], cwd=folder, env=environment, text=True, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, errors = process.communicate()
        errors += f"\nno end after {TIMEOUT} s"
    if process.returncode:
        raise BlockError(
            f"{block.where}: the block failed with exit code {process.returncode}\n\n{block.runnable}\n"
            f"--- stdout\n{out[-3000:]}\n--- stderr\n{errors[-3000:]}"
        )
    return out


def write_program(blocks: Sequence[Block], folder: Path) -> Path:
    """A file that runs python blocks, each from a file of its own, so that a traceback has its line."""
    files = [folder / f"block_at_line_{block.line}.py" for block in blocks]
    for block, file in zip(blocks, files, strict=True):
        file.write_text(block.runnable, encoding="utf-8")
    if len(files) == 1:
        return files[0]
    program = folder / f"blocks_from_line_{blocks[0].line}.py"
    lines = [f"exec(compile(open({str(file)!r}).read(), {str(file)!r}, 'exec'))\n" for file in files]
    program.write_text("".join(lines), encoding="utf-8")
    return program


def check_output(block: Block, printed: str) -> None:
    """Compares what the page shows with what was printed; ``...`` stands for anything, within a line or for lines."""
    rest = iter([line.rstrip() for line in printed.splitlines()])
    for shown in block.text.splitlines():
        if shown.strip() in ("", "..."):
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in shown.rstrip().split("...")))
        if not any(pattern.fullmatch(line) for line in rest):
            raise BlockError(f"{block.where}: the line {shown!r} is not in what the block before it prints:\n{printed}")
