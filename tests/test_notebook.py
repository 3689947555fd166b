"""The notebook is its page, run: neither can change without the other."""

import base64
import io
import json

import numpy as np
import pytest
from docs_notebook import NOTEBOOK, make_notebook
from PIL import Image
from plugin_parts import forgotten


def pictures(notebook):
    """Take the images out of a notebook's outputs."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    encoded = [output["data"].pop("image/png") for output in outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), dtype=float) for text in encoded]


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_is_the_page_with_its_outputs():
    kept = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with forgotten():
        made = make_notebook()
    for old, new in zip(pictures(kept), pictures(made), strict=True):
        assert np.abs(old - new).mean() < 1
    assert kept == made, "run: python tests/docs_notebook.py"
