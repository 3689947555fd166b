"""pycocoevalcap's two Java programs: the PTB tokenizer and METEOR.

The package's own wrappers are not used: they write temporary files into the installed package, assign captions to wrong
images after a caption with an unusual line end, and hang when METEOR dies.
"""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tove_llava.core.errors import ConfigError

_TOKENIZER = ("-cp", "stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer")
_METEOR = ("-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm")
_UTF8 = "-Dfile.encoding=UTF-8"  # before Java 18 the locale decides

# Every line end of the tokenizer; a caption is one line.
_LINE_ENDS = re.compile("[\n\r\v\f\x85\u2028\u2029]")


def check() -> None:
    """Raise ConfigError if Java or pycocoevalcap is missing."""
    _package()
    _java()


def tokenize(captions: Sequence[str]) -> list[str]:
    """Return each caption's lower-case Penn Treebank tokens, joined by spaces, without punctuation.

    Raises:
        ConfigError: Java or pycocoevalcap is missing, or the tokenizer failed.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    lines = [_LINE_ENDS.sub(" ", caption) for caption in captions]
    command = [_java(), _UTF8, *_TOKENIZER, "-preserveLines", "-lowerCase"]
    done = subprocess.run(
        command,
        cwd=_package() / "tokenizer",
        input="".join(f"{line}\n" for line in lines).encode("utf-8", "replace"),
        capture_output=True,
        check=False,
    )
    tokenized = done.stdout.decode("utf-8").split("\n")[:-1]
    if done.returncode != 0 or len(tokenized) != len(lines):
        reason = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise ConfigError(f"the caption tokenizer failed ({len(tokenized)} of {len(lines)} lines): {reason}")
    return [" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATIONS) for line in tokenized]


class Meteor:
    """A METEOR process, ended by leaving the ``with`` block."""

    def __enter__(self) -> "Meteor":
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        self._process = subprocess.Popen(
            [_java(), _UTF8, "-Xmx2G", *_METEOR],
            cwd=_package() / "meteor",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def statistics(self, candidate: str, references: Sequence[str]) -> str:
        """Return METEOR's counts for one tokenized candidate, for :meth:`evaluate`."""
        candidate = candidate.replace("|||", "").replace("  ", " ")
        self._write(" ||| ".join(("SCORE", *references, candidate)))
        return self._read()

    def evaluate(self, statistics: Sequence[str]) -> tuple[float, list[float]]:
        """Return the score of a corpus and of each caption."""
        self._write(" ||| ".join(("EVAL", *statistics)))
        singles = [float(self._read()) for _ in statistics]
        return float(self._read()), singles

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode("utf-8").strip()
        if not line:
            raise self._failure()
        return line

    def _failure(self) -> ConfigError:
        self._process.kill()
        self._process.wait()
        self._errors.seek(0)
        return ConfigError(f"METEOR failed: {self._errors.read().decode('utf-8', 'replace').strip()[-500:]}")


def _package() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("caption metrics need pycocoevalcap; install it: pip install 'tove-llava[eval]'")
    return Path(next(iter(found.submodule_search_locations)))


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise ConfigError(
            "caption metrics need Java (8 or newer) for their tokenizer and METEOR; install it: "
            "apt-get install default-jre-headless, or: conda install -c conda-forge openjdk"
        )
    return java
