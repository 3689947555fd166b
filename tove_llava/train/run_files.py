"""The names of a run's files, and the state that they show; imports nothing heavy."""

from pathlib import Path

RUN_RECORD = "run.json"
STATE = "trainer_state.json"  # of the Trainer: in a finished run, and in each of its checkpoints
STAGING = "incomplete-checkpoint-"
CHECKPOINT = "checkpoint-"


def complete(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    numbered = []
    for path in run.glob(f"{CHECKPOINT}*"):
        number = path.name.removeprefix(CHECKPOINT)
        if path.is_dir() and number.isdigit():
            numbered.append((int(number), path))
    return [path for _, path in sorted(numbered)]


def incomplete(run: Path) -> list[Path]:
    """Return the folders that interrupted saves left."""
    return sorted(run.glob(f"{STAGING}*"))
