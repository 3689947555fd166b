"""The command line: its overview, its exit codes, and what it imports."""

import os
import subprocess
import sys
from importlib.metadata import version
from unittest.mock import Mock

import pytest

from tove_llava import cli
from tove_llava.cli import doctor
from tove_llava.core.errors import DataError


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=True).stdout


def test_overview_lists_every_verb_with_its_help():
    lines = [line.split() for line in python("-m", "tove_llava", "--help").splitlines()]
    for name, file in cli.verbs().items():
        assert cli.verb_help(file), f"{file} has no HELP"
        assert [name, *cli.verb_help(file).split()] in lines


def test_no_help_page_imports_a_heavy_library():
    program = """
import contextlib, io, sys
from tove_llava import cli
for words in ([], *([verb] for verb in cli.verbs())):
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    assert len(page.getvalue()) > 100, words
    heavy = {"torch", "transformers", "gradio", "deepspeed", "numpy", "PIL"} & set(sys.modules)
    assert not heavy, (words, heavy)
import tove_llava.eval.benchmarks.pope  # a scorer needs none either
assert not {"torch", "transformers"} & set(sys.modules)
"""
    python("-c", program)


def test_verbs_are_named_with_dashes_and_private_modules_are_none(tmp_path, monkeypatch):
    for name in ("merge_lora.py", "_shared.py", "__init__.py"):
        (tmp_path / name).write_text('HELP = "x"\n')
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "__init__.py"))
    assert list(cli.verbs()) == ["merge-lora"]


@pytest.mark.parametrize("verb", ["data", "score", "chat", "doctor", "no-verb"])
def test_arguments_that_are_no_utf8_are_named(verb):
    done = subprocess.run([sys.executable, "-m", "tove_llava", verb, "--file", b"na\xefve.json"], capture_output=True)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert rb"'na\udcefve.json' is not UTF-8 text" in done.stderr


def test_a_terminal_that_cannot_show_a_text_gets_its_escape(monkeypatch):
    program = "import sys; from tove_llava import cli; cli.overview = lambda: 'caf\xe9'; sys.exit(cli.main(['help']))"
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9\n")


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["evla"], 2, "", "Did you mean 'eval'?"),
        ([], 2, "", "doctor"),  # the overview
        (["--version"], 0, f"tove-llava {version('tove-llava')}\n", ""),
    ],
)
def test_a_verb_is_needed(capsys, arguments, code, out, err):
    assert cli.main(arguments) == code
    said = capsys.readouterr()
    assert said.out == out and err in said.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(DataError("record 3 is broken"), 2, "record 3 is broken"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_expected_ends_have_their_code_and_no_traceback(monkeypatch, capsys, error, code, words):
    monkeypatch.setattr(doctor, "run", Mock(side_effect=error))
    assert cli.main(["doctor"]) == code
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run", Mock(side_effect=ModuleNotFoundError("No module", name="peft.tuners")))
    assert cli.main(["doctor"]) == 2
    assert "pip install 'tove-llava[train]'" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "run", Mock(side_effect=ModuleNotFoundError("No module", name="users_own")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_flags_must_be_written_out():
    with pytest.raises(SystemExit) as exit_:
        cli.main(["score", "--bench", "pope", "--predictions", "a", "--ground-truth", "b"])
    assert exit_.value.code == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's")
@pytest.mark.parametrize("words", [["--version"], ["presets", "show", "tiny"]])
def test_a_full_disk_under_the_output_is_one_line(words):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tove_llava", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "could not be written: No space left on device" in done.stderr


def test_reader_that_leaves_early_is_no_error():
    program = (
        "from tove_llava.cli import doctor, main; doctor.run = lambda args: print('x' * 10**6); exit(main(['doctor']))"
    )
    pipe = f'{sys.executable} -c "{program}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
