"""House rules for the package: lengths, names of files, and words."""

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

import tove_llava

PACKAGE = Path(tove_llava.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
SHARED_NAMES = {"__init__.py", "base.py"}  # a verb's file in cli/ has the verb's name, whatever room does the work
PROSE = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
FIRST_WORDS = re.compile(r"(What|Whether|Where|How)\b")


def named(file: Path, line: int = 1) -> str:
    return f"{file.relative_to(PACKAGE.parent)}:{line}"


def nodes(*kinds: type[ast.AST]) -> list[tuple[Path, ast.AST]]:
    trees = ((file, ast.parse(file.read_text())) for file in FILES)
    return [(file, node) for file, tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]


def test_files_have_at_most_400_lines():
    assert [named(file) for file in FILES if len(file.read_text().splitlines()) > 400] == []


def test_functions_have_at_most_70_lines():
    functions = nodes(ast.FunctionDef, ast.AsyncFunctionDef)
    assert [named(file, node.lineno) for file, node in functions if node.end_lineno - node.lineno >= 70] == []


def test_no_two_files_have_one_name():
    count = Counter(file.name for file in FILES if file.parent.name != "cli" and file.name not in SHARED_NAMES)
    assert [named(file) for file in FILES if count[file.name] > 1] == []


def test_a_docstring_begins_with_a_verb_or_a_noun():
    documented = nodes(ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first_lines = [(file, getattr(node, "lineno", 1), ast.get_docstring(node) or "") for file, node in documented]
    assert [named(file, line) for file, line, text in first_lines if FIRST_WORDS.match(text)] == []


@pytest.mark.parametrize("word", ["alone"])
def test_prose_has_no_banned_word(word):
    found = []
    for file in FILES:
        for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
            prose = token.type in PROSE
            if prose and (at := re.search(rf"\b{word}\b", token.string)):
                found.append(named(file, token.start[0] + token.string[: at.start()].count("\n")))
    assert found == []


def test_json_is_read_in_one_place():
    calls = [(file, node) for file, node in nodes(ast.Attribute) if file.name != "json_text.py"]
    read = [
        (file, node)
        for file, node in calls
        if node.attr in ("load", "loads") and getattr(node.value, "id", "") == "json"
    ]
    assert [named(file, node.lineno) for file, node in read] == []


# Files whose plain writes go into a folder that only then gets its name or its manifest, or into memory.
STAGED = {
    "ablation/job_processes.py", "analysis/detach.py", "analysis/plots.py", "checkpoints/clip.py",
    "checkpoints/formats/original.py", "checkpoints/formats/remote_code.py", "checkpoints/plugin_records.py",
    "checkpoints/saving.py", "checkpoints/tensors.py", "checkpoints/tokenizer_files.py", "core/files.py",
    "core/licences.py", "data/readers/parquet.py", "eval/report/write.py", "experts/dense_expert.py",
    "experts/edge.py", "scenes/writer.py", "train/feature_stores.py", "train/run.py",
    "train/step_checkpoints.py", "train/trainer.py",
}  # fmt: skip
WRITERS = {"write_text", "write_bytes", "save_file", "copyfile", "copy2", "copytree", "savefig"}


def is_plain_write(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    values = [getattr(node, "value", None) for node in [*call.args[:2], *(key.value for key in call.keywords)]]
    modes = [value for value in values if isinstance(value, str) and re.fullmatch(r"[rwx]?b?\+?[wx]?b?t?\+?", value)]
    opens = name in ("open", "fdopen") and any(set(mode) & set("wx+") for mode in modes)
    return name in WRITERS or opens


def test_files_are_replaced_whole():
    """Anything else is written by core/files.py, so that a kill leaves the old content or the new."""
    plain = {file.relative_to(PACKAGE).as_posix() for file, node in nodes(ast.Call) if is_plain_write(node)}
    assert sorted(plain - STAGED) == []


def test_asserts_are_only_for_the_type_checker():
    """PYTHONOPTIMIZE takes them out, so none of them may be a check."""

    def narrows(test: ast.expr) -> bool:
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return all(map(narrows, test.values))
        called = isinstance(test, ast.Call) and getattr(test.func, "id", "") == "isinstance"
        compared = isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot)
        return called or (compared and getattr(test.comparators[0], "value", 0) is None)

    assert [named(file, node.lineno) for file, node in nodes(ast.Assert) if not narrows(node.test)] == []
