"""The fenced blocks of the pages in docs/, with their test comments.

The comment above a block says what a test does with it.

Above a block stands one of::

    <!-- test -->                     run it (bash, python)
    <!-- test: with A=b C=d -->       run it with b instead of the word A, and so on
    <!-- test: goes on -->            run it in the program of the python block before it
    <!-- test: file NAME -->          write it to a file of that name, for later blocks
    <!-- test: output -->             the run block before it prints these lines, in this order
    <!-- test: not run, REASON -->    a test cannot run it, for this reason

A block of language ``text`` needs none. ``<!-- test needs: scenes, model -->`` at a page's head names what its blocks
find in their working folder. None of this shows in a rendered page.
"""

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"

_BLOCK = re.compile(r"^([^\n]*)\n```+([\w-]*)[ ]*\n(.*?)^```[ ]*$", flags=re.M | re.S)
_MARK = re.compile(r"<!-- test(?:: (with|goes on|file|output|not run),? ?(.*?))? -->$")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    ``kind`` is the first word of its comment, "run" for the plain one, None without a comment.
    """

    page: str
    line: int
    language: str
    text: str
    kind: str | None
    argument: str = ""

    @property
    def where(self) -> str:
        return f"docs/{self.page}, line {self.line}"

    @property
    def is_run(self) -> bool:
        return self.kind in ("run", "with", "goes on")

    @property
    def runnable(self) -> str:
        """Return the text with the words of ``with`` replaced."""
        text = self.text
        for pair in self.argument.split() if self.kind == "with" else []:
            name, _, value = pair.partition("=")
            text = re.sub(rf"\b{re.escape(name)}\b", value, text)
        return text

    @property
    def file(self) -> str | None:
        return self.argument if self.kind == "file" else None


@dataclass(frozen=True)
class Page:
    name: str
    needs: frozenset[str]
    blocks: tuple[Block, ...]


def read_page(path: Path) -> Page:
    """Parse a page; refuse a fence that is not closed."""
    name = path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else path.name
    text = "\n" + path.read_text(encoding="utf-8")
    blocks = []
    for found in _BLOCK.finditer(text):
        mark = _MARK.match(found[1])
        kind = None if mark is None else mark[1] or "run"
        line = text.count("\n", 0, found.start(2))
        blocks.append(Block(name, line, found[2], found[3], kind, (mark and mark[2]) or ""))
    if len(re.findall(r"^```", text, flags=re.M)) != 2 * len(blocks):
        raise ValueError(f"{name}: a block is not closed, or has text after its language")
    needs = re.findall(r"^<!-- test needs: (.+?) -->$", text, flags=re.M)
    return Page(name, frozenset(", ".join(needs).split(", ")) - {""}, tuple(blocks))


def pages() -> list[Page]:
    """Read all pages, sorted by name."""
    return [read_page(path) for path in sorted(DOCS.rglob("*.md"))]
