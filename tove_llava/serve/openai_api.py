"""An OpenAI-compatible endpoint: ``transformers serve`` with a guard in front.

transformers loads, queues, generates and speaks the protocol. This module prepares the folder, registers the model's
class, and adds the guard (:mod:`tove_llava.serve.guard`).
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tove_llava.checkpoints.manifest import MANIFEST
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.core.files import read_json_object
from tove_llava.serve.guard import Guard

PORT = 8000  # transformers serve's


def serve_openai(
    model: str | Path, host: str, port: int | None = None, device: str | None = None, dtype: str | None = None
) -> None:
    """Serve a model folder, under the folder's name, until interrupted.

    Raises:
        ConfigError: packages of ``transformers serve`` are missing, or the address is taken.
        CheckpointError: the folder holds no model.
    """
    serve = _server_class()
    from tove_llava.inference.generation import choose_device, choose_dtype

    where = choose_device(device)
    kind = str(choose_dtype(dtype, where)).removeprefix("torch.")
    port = PORT if port is None else port
    _check_address(host, port)
    with _servable(Path(model).absolute()) as folder, _inside(folder.parent):
        print(f"serving {folder.name} on http://{host}:{port}/v1 (loading)", flush=True)
        # Pinned by a relative name, so that requests need not know the folder's path.
        serve(force_model=folder.name, host=host, port=port, device=str(where), dtype=kind, non_blocking=True)


def _server_class() -> Any:
    """Return transformers' server with this package's models, behind the guard."""
    try:
        from transformers import AutoModelForMultimodalLM
        from transformers.cli.serve import Serve
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise ConfigError(f"this transformers cannot serve ({error}); this was tried with transformers 5.23") from error
    if not is_serve_available():
        raise ConfigError(
            "the packages of transformers serve are missing; install them: pip install 'transformers[serving]'"
        )

    from tove_llava.llava import ToveLlavaConfig, ToveLlavaForConditionalGeneration

    # The server asks this table which classes read images, and loads them by their Auto class.
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[ToveLlavaConfig.model_type] = ToveLlavaForConditionalGeneration.__name__
    AutoModelForMultimodalLM.register(ToveLlavaConfig, ToveLlavaForConditionalGeneration, exist_ok=True)

    class Guarded(Serve):  # type: ignore[misc]
        """``non_blocking`` has transformers call :meth:`start_server`, once everything is loaded."""

        def start_server(self) -> None:
            config = self.server.config
            config.app = Guard(config.app, self._model_manager.force_model)
            self.server.run()

    return Guarded


def _check_address(host: str, port: int) -> None:
    """Check the address before the model is loaded, which may take minutes."""
    import socket

    try:
        with socket.create_server((host, port), reuse_port=False):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(f"the server cannot listen on {host}:{port}: {error}; choose --port") from error


@contextmanager
def _servable(model: Path) -> Iterator[Path]:
    """Put the model in a folder that stock code opens.

    A folder that training wrote is exported (adapters merged, chat template for servers); others are linked.
    """
    name = model.name.replace("@", "-").replace(":", "-") or "model"  # which mean something in a model's name
    with tempfile.TemporaryDirectory(prefix="tove-llava-") as parent:
        folder = Path(parent) / name
        if (model / MANIFEST).is_file():
            from tove_llava.checkpoints.conversion import export_model

            export_model(model, folder, "remote-code")
        else:
            _check_exported(model)
            folder.symlink_to(model, target_is_directory=True)
        yield folder


def _check_exported(model: Path) -> None:
    """Refuse a folder that ``transformers serve`` cannot read."""
    from tove_llava.checkpoints.loading import is_stock_llava

    if is_stock_llava(model):
        return
    try:
        kind = read_json_object(model / "config.json")["model_type"]
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{model} holds no model that can be served: {error!r}") from error
    if kind != "tove_llava":
        raise CheckpointError(f"{model} has another format; convert it first: tove-llava convert --model {model}")


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
