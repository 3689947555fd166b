"""Make docs/notebooks/tower.ipynb from docs/guides/tower.md: ``python tests/docs_notebook.py``.

The text of the page becomes text cells, and its python blocks code cells, run in one program in a folder of their own.
"""

import ast
import base64
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tove_llava.core.logs import keep_stdout_clean

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, NOTEBOOK = DOCS / "guides" / "tower.md", DOCS / "notebooks" / "tower.ipynb"
_BLOCK = re.compile(r"^<!-- test(?:: goes on)? -->\n```python\n(.*?)^```$", flags=re.M | re.S)


def make_notebook(page: Path = PAGE) -> dict[str, Any]:
    """Run the page's python and return the notebook with its outputs."""
    parts = _BLOCK.split(page.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = []
    keep_stdout_clean()
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        for number, text in enumerate(parts):
            cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}, "source": _lines(_prose(text))}
            if number % 2:
                outputs = _run(text, names)
                cell |= {"source": _lines(text), "execution_count": number // 2 + 1, "outputs": outputs}
                for output in outputs:
                    if output["output_type"] == "execute_result":
                        output["execution_count"] = number // 2 + 1
            if number % 2 or cell["source"]:
                cells.append({"cell_type": "code" if number % 2 else "markdown", **cell})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _run(text: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell; return what it prints, and the value of its last line."""
    tree = ast.parse(text)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        data: dict[str, Any] = {"text/plain": _lines(repr(value))}
        if isinstance(value, Image.Image):
            file = io.BytesIO()
            value.save(file, "PNG")
            data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["an image"]}
        outputs.append({"output_type": "execute_result", "metadata": {}, "data": data})
    return outputs


def _prose(text: str) -> str:
    """Return a text cell; its links start from the notebook's folder."""
    text = text.replace("; [the same as a notebook](../notebooks/tower.ipynb), with its outputs", "")
    return re.sub(r"\]\((?!\w+:|\.\./)", "](../guides/", text).strip("\n")


def _lines(text: str) -> list[str]:
    return text.rstrip("\n").splitlines(keepends=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    NOTEBOOK.parent.mkdir(exist_ok=True)
    NOTEBOOK.write_text(json.dumps(make_notebook(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
