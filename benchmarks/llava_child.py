"""LLaVA's own code, run by LLAVA_PYTHON from LLAVA_SRC in its process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tove_llava.core.errors import ConfigError


class LlavaChild:
    """A process that answers each line with one line.

    Args:
        script: file in this folder.
        title: name of its work, for errors.
        given: what it needs first; :attr:`made` is its answer.

    Raises:
        ConfigError: the process ended, here or in :meth:`ask`.
    """

    def __init__(self, script: str, title: str, given: dict[str, Any], **environment: str) -> None:
        command = [os.environ.get("LLAVA_PYTHON", sys.executable), str(Path(__file__).with_name(script))]
        env, pipe, self._title = {**os.environ, **environment}, subprocess.PIPE, title
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        try:
            self.made = self.ask(json.dumps(given))
        except ConfigError:
            self.close()
            raise

    def ask(self, line: str) -> str:
        """Send a line, and return the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the error below reports its end
        answer = self._process.stdout.readline()
        if not answer:
            raise ConfigError(
                f"{self._title} ended with exit code {self._process.wait()}; its messages are above. LLAVA_PYTHON must "
                "be the interpreter of an environment that can import its train.py"
            )
        return answer.strip()

    def close(self) -> None:
        """Close its standard input, which ends it."""
        self._process.communicate()
