"""Find the model to serve when none is named."""

from pathlib import Path

from tove_llava.checkpoints.manifest import MANIFEST
from tove_llava.core.errors import CheckpointError

OUTPUTS = Path("outputs")
HOW_TO_MAKE_ONE = "tove-llava quickstart"


def newest_model(root: Path = OUTPUTS) -> Path | None:
    """Return the newest finished model under ``root``, no step checkpoint."""
    # The manifest is written last, so a folder that has one is complete.
    manifests = [file for file in root.glob(f"**/{MANIFEST}") if not file.parent.name.startswith("checkpoint-")]
    newest = max(manifests, key=lambda file: file.stat().st_mtime, default=None)
    return None if newest is None else newest.parent


def find_model(folder: str | Path | None) -> Path:
    """Return ``folder``, or by default the newest model of this checkout.

    Raises:
        CheckpointError: there is none; the message has the command that makes one.
    """
    if folder is not None:
        if not Path(folder).is_dir():
            raise CheckpointError(f"there is no model folder {folder}; give the folder that training wrote")
        return Path(folder)
    found = newest_model()
    if found is None:
        raise CheckpointError(f"no model is given (--model DIR) and none is in {OUTPUTS}/; make one: {HOW_TO_MAKE_ONE}")
    return found
