"""The fenced blocks of the pages in docs/, and what the comment above each says is to be done with it.

Above a block stands one of::

    <!-- test -->                     it is run (bash, python)
    <!-- test: with A=b C=d -->       it is run with b in the place of the word A, and so on
    <!-- test: goes on -->            it is run in the program of the python block before it
    <!-- test: file NAME -->          it is written to a file of that name, for later blocks
    <!-- test: output -->             what the run block before it prints: these lines, in this order
    <!-- test: not run, REASON -->    it cannot be run by a test, and why

A block of language ``text`` needs none. ``<!-- test needs: scenes, model -->`` at a page's head names what its blocks
find in their working folder. None of this shows in a rendered page.
"""

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"

_MARK = re.compile(r"<!-- test(?:: (?P<what>.+?))? -->$")
_NEEDS = re.compile(r"<!-- test needs: (?P<names>.+?) -->$")
_FENCE = re.compile(r"(?P<indent> *)```+(?P<language>[\w-]*)\s*$")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``mark`` is the comment's text; empty for a plain run, None without a comment."""

    page: str
    line: int
    language: str
    text: str
    mark: str | None

    @property
    def where(self) -> str:
        return f"docs/{self.page}, line {self.line}"

    @property
    def is_run(self) -> bool:
        return self.mark == "" or self.goes_on or self.mark is not None and self.mark.startswith("with ")

    @property
    def goes_on(self) -> bool:
        """Whether it uses what the python block before it has defined."""
        return self.mark == "goes on"

    @property
    def runnable(self) -> str:
        """The text that is run."""
        text = self.text
        for pair in (self.mark or "").removeprefix("with ").split():
            name, _, value = pair.partition("=")
            text = re.sub(rf"\b{re.escape(name)}\b", value, text)
        return text

    @property
    def file(self) -> str | None:
        """The name of the file that it is."""
        return self.mark.removeprefix("file ") if self.mark and self.mark.startswith("file ") else None

    @property
    def is_output(self) -> bool:
        return self.mark == "output"

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return self.mark.removeprefix("not run, ") if self.mark and self.mark.startswith("not run, ") else None


@dataclass(frozen=True)
class Page:
    name: str
    needs: frozenset[str]
    blocks: tuple[Block, ...]


def read_page(path: Path) -> Page:
    """Parse a page; refuse a fence that is not closed."""
    name = path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else path.name
    blocks, needs, open_block, lines = [], set(), None, path.read_text(encoding="utf-8").splitlines()
    body: list[str] = []
    for number, line in enumerate(lines, start=1):
        fence = _FENCE.match(line)
        if open_block is not None:
            if line.strip() == "```":
                language, at, mark = open_block
                blocks.append(Block(name, at, language, "".join(f"{x}\n" for x in body), mark))
                open_block, body = None, []
            else:
                body.append(line)
        elif fence:
            above = _MARK.search(lines[number - 2].strip()) if number > 1 else None
            open_block = (fence["language"], number, None if above is None else above["what"] or "")
        elif found := _NEEDS.match(line.strip()):
            needs |= {name.strip() for name in found["names"].split(",")}
    if open_block is not None:
        raise ValueError(f"{name}: the block that line {open_block[1]} opens is not closed")
    return Page(name, frozenset(needs), tuple(blocks))


def pages() -> list[Page]:
    """Read all pages, sorted by name."""
    return [read_page(path) for path in sorted(DOCS.rglob("*.md"))]
