"""A working folder like a clone's root, for a page's blocks."""

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
OWN = ("scripts", "eval", "playground")  # scripts find the root by way of their folder, so a clone has real ones
LEFT_OUT = ("outputs", "data", ".venv", ".git", ".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache")


class Server:
    """The process that runs the pages' Python programs (:mod:`docs_server`).

    Executables in the working folder use it.
    """

    def __init__(self, folder: Path, hidden: Sequence[str] = ()) -> None:
        """Start the process, in ``folder``; its programs cannot import what is ``hidden``."""
        self.programs = folder / "bin"
        self.programs.mkdir(parents=True)
        address = str(folder / "socket")
        for name in ("tove-llava", "python", "python3"):
            prefix = ["-m", "tove_llava"] if name == "tove-llava" else []
            text = CLIENT.format(python=sys.executable, prefix=prefix, address=address)
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)
        command = [sys.executable, str(ROOT / "tests" / "docs_server.py"), address, *hidden]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**self.environment(), "HF_MODULES_CACHE": str(folder / "modules")}
        self.process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **pipes)
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
        os.killpg(self.process.pid, 9)  # with programs that a block left running
        self.process.communicate()


def make_clone(folder: Path, scenes: Path | None = None, model: Path | None = None) -> Path:
    """Make a folder like a clone's root.

    It links to everything except data and outputs.

    Args:
        scenes: playground scenes, linked as ``playground/data/scenes``.
        model: a checkpoint folder, linked as ``outputs/tiny/finetune_lora``.
    """
    for part in (folder, *(folder / name for name in OWN)):
        part.mkdir(parents=True)
        for entry in (ROOT / part.relative_to(folder)).iterdir():
            if entry.name not in LEFT_OUT and not (part == folder and entry.name in OWN):
                (part / entry.name).symlink_to(entry)
    for target, link in ((scenes, "playground/data/scenes"), (model, "outputs/tiny/finetune_lora")):
        if target is not None:
            (folder / link).parent.mkdir(parents=True)
            (folder / link).symlink_to(target)
    return folder


class BlockError(AssertionError):
    """A block did not do what its page says."""


def run_page(page: Page, folder: Path, environment: dict[str, str]) -> None:
    """Run a page's blocks in order.

    Raises:
        BlockError: one failed; the message names page and line, and has its output.
    """
    printed = ""
    for block, *rest in programs(page.blocks):
        if block.file is not None:
            target = folder / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif block.kind == "output":
            check_output(block, printed)
        elif block.is_run:
            printed = run_block(block, folder, environment, rest)


def programs(blocks: Iterable[Block]) -> list[list[Block]]:
    """Put each block together with those that go on with it."""
    found: list[list[Block]] = []
    for block in blocks:
        if block.kind != "goes on":
            found.append([block])
        elif found and found[-1][0].is_run and found[-1][0].language == block.language == "python":
            found[-1].append(block)
        else:
            raise BlockError(f"{block.where}: it goes on, but the block before it is not a python block that is run")
    return found


def run_block(block: Block, folder: Path, environment: dict[str, str], rest: Sequence[Block] = ()) -> str:
    """Run a block with its continuations; return their standard output."""
    if block.language == "python":
        # Empty lines before each block give a traceback the page's line numbers.
        text = ""
        for part in (block, *rest):
            text += "\n" * (part.line - text.count("\n")) + part.runnable
        program = folder / f"block_at_line_{block.line}.py"
        program.write_text(text, encoding="utf-8")
        command = ["python", str(program)]
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


def check_output(block: Block, printed: str) -> None:
    """Compare the page's text with the printed text.

    ``...`` stands for anything, within a line or for lines.
    """
    rest = iter([line.rstrip() for line in printed.splitlines()])
    for shown in block.text.splitlines():
        if shown.strip() in ("", "..."):
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in shown.rstrip().split("...")))
        if not any(pattern.fullmatch(line) for line in rest):
            raise BlockError(f"{block.where}: the line {shown!r} is not in what the block before it prints:\n{printed}")
