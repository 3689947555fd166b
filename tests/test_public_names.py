"""The public names are documented: arguments, errors, and an example that runs."""

import doctest
import inspect
import re
import textwrap

import pytest
import torch
from answer_parts import picture
from plugin_parts import forgotten

import tove_llava
from tove_llava import testing

NAMES = [(tove_llava, name) for name in tove_llava.__all__ if name != "__version__"]
NAMES += [(testing, name) for name in testing.__all__ if "check" in name]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
EVERY_NAME = pytest.mark.parametrize(("module", "name"), NAMES, ids=[name for _, name in NAMES])


@pytest.fixture(scope="module")
def examples(tmp_path_factory, world, kinds):
    """What the examples may use besides the package."""
    folder = tmp_path_factory.mktemp("examples")
    model, processor = tove_llava.build_model("tiny")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    places = {"folder": folder / "model", "run": kinds / "full", "llava": world.whole}
    return {"tove_llava": tove_llava, "torch": torch, "image": picture(1, (40, 30)), **places}


def sections(text):
    """Split a docstring into its sections by their names."""
    parts = re.split(r"^(Args|Attributes|Returns|Raises|Example):\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@EVERY_NAME
def test_arguments_results_and_errors_are_documented(module, name):
    thing = getattr(module, name)
    found = sections(inspect.getdoc(thing))
    assert "Example" in found
    if isinstance(thing, type):
        return
    named = set(re.findall(r"^    ([\w, ]+):", found.get("Args", ""), flags=re.M))
    documented = {each.strip() for group in named for each in group.split(",")}
    assert set(inspect.signature(thing).parameters) == documented
    assert "Raises" in found and ("Returns" in found or inspect.getdoc(thing).startswith("Return "))


@EVERY_NAME
@pytest.mark.filterwarnings("ignore")
def test_the_example_runs(module, name, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = textwrap.dedent(sections(inspect.getdoc(getattr(module, name)))["Example"])
    globs = {**examples, "__name__": f"examples_of_{name}"}
    test = doctest.DocTestParser().get_doctest(text, globs, name, None, None)
    assert test.examples
    report = []
    with forgotten():
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert not report, "".join(report)
