import os
import subprocess
from pathlib import Path

import pytest
from answer_parts import make_scenes, save_model

from tove_llava.eval.benchmarks import BENCHMARKS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("eval", "scripts", "playground")
SCRIPTS = sorted([*(file for folder in FOLDERS for file in ROOT.glob(f"{folder}/*.sh")), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_scripts_are_valid_shell_that_stops_at_the_first_error(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text or not text.startswith("#!"), "what is read by another script leaves it to that"


def test_every_benchmark_has_its_script():
    for name in [*BENCHMARKS, "all"]:
        assert f"--benchmark {name} " in (ROOT / "eval" / f"{name}.sh").read_text()


def run(script, *arguments, cwd):
    # The dummy experts of the tests must be registered in the process that loads the model.
    (cwd / "sitecustomize.py").write_text("import tower_parts\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{cwd}:{ROOT / 'tests'}"}
    return subprocess.run(
        ["bash", str(ROOT / script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_script_evaluates_a_folder_from_any_directory(tmp_path):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("the script uses .venv, and there is none")
    save_model(tmp_path)
    make_scenes(tmp_path / "playground" / "data" / "scenes")
    done = run("eval/scenes.sh", "model", "--limit", "6", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[0] == "overall"
    assert (tmp_path / "model" / "eval" / "scenes" / "full" / "answers.jsonl").is_file()


def test_script_without_a_model_says_how_it_is_called(tmp_path):
    done = run("eval/pope.sh", cwd=tmp_path)
    assert done.returncode != 0 and "usage: bash eval/pope.sh MODEL_DIR" in done.stderr
