"""lmms-eval's model interfaces over :mod:`asking`. Importing this module needs lmms-eval."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.logs import quiet_transformers
from tove_llava.core.plugins import load_plugin
from tove_llava.data import Turn
from tove_llava.data.templates.base import role_of
from tove_llava.inference.generation import Answerer
from tove_llava.integrations.lmms_eval.asking import Request, answer, loss, user_turn


class _ToveLlava(lmms):  # type: ignore[misc]
    """The common part of both interfaces.

    Args:
        pretrained: any model folder that ``tove-llava eval`` takes.
        device: "cuda", "cpu", ...; by default a GPU, if any, and each process's own under ``accelerate``.
        dtype: float32, bfloat16, float16; by default the device decides.
        template: conversation template; by default the one that the folder records.
        batch_size: requests in the model at a time.
        plugin: a file with parts of your own; several go into the environment variable TOVE_PLUGINS.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        template: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        plugin: str | None = None,
    ) -> None:
        super().__init__()
        if plugin is not None:
            load_plugin(plugin)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"--batch_size must be a number of requests, not {batch_size!r}")
        quiet_transformers()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and device in (None, "cuda"):
            device = str(self.accelerator.device)
        self.batch_size = int(batch_size)
        answerer = Answerer.load(str(pretrained), device, dtype)
        self.answerer = answerer.with_template(template) if template else answerer

    def _answer(self, requests: Sequence[Request]) -> list[str]:
        with tqdm(total=len(requests), disable=self.rank != 0, desc="tove_llava", unit="q") as progress:
            return answer(self.answerer, requests, self.batch_size, progress.update)

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tove_llava answers single questions; tasks of several rounds are not supported")


class ToveLlavaSimple(_ToveLlava):
    """Tasks of a text and images; multiple choice by likelihood too."""

    is_simple = True

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer ``(context, settings, doc_to_visual, document, task, split)``."""
        asked = []
        for request in requests:
            context, settings, doc_to_visual, number, task, split = request.args
            asked.append(self._request(context, doc_to_visual(self._document(task, split, number)), settings))
        return self._answer(asked)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return mean negative log-probabilities: lmms-eval prefers the *lowest*."""
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="tove_llava", unit="option"):
            context, target, doc_to_visual, number, task, split = request.args
            document = self._document(task, split, number)
            words = target if isinstance(target, str) else target(document)
            results.append(loss(self.answerer, self._request(context, doc_to_visual(document), {}), words))
        return results

    @staticmethod
    def _request(context: str, visuals: Sequence[Any] | None, settings: dict[str, Any]) -> Request:
        images = [_image(visual) for visual in visuals or []]
        return Request([user_turn(context, len(images))], images, settings)


class ToveLlavaChat(_ToveLlava):
    """Tasks that give messages; lmms-eval chooses this by itself."""

    is_simple = False

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer ``(context, doc_to_messages, settings, document, task, split)``."""
        asked = []
        for request in requests:
            _, doc_to_messages, settings, number, task, split = request.args
            messages = ChatMessages(messages=doc_to_messages(self._document(task, split, number))).messages
            asked.append(_conversation(messages, settings))
        return self._answer(asked)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("options are scored through the simple interface; give --force_simple")


def _conversation(messages: Sequence[Any], settings: dict[str, Any]) -> Request:
    """Make a request of chat messages, each with its images in front."""
    turns, images = [], []
    for message in messages:
        texts, mine = [], []
        for part in message.content:
            if part.type == "text":
                texts.append(part.text)
            elif part.type == "image" and message.role == "user":
                mine.append(_image(part.url))
            else:
                raise DataError(f"a message of the {message.role} has {part.type!r}, which this model does not take")
        text = "\n".join(texts)
        turns.append(
            user_turn(text, len(mine)) if message.role == "user" else Turn(role_of(message.role, "a message"), text)
        )
        images += mine
    return Request(turns, images, settings)


def _image(visual: Any) -> Image.Image | str:
    if isinstance(visual, Image.Image | str):
        return visual
    raise DataError(f"an image or an image file is needed, found {type(visual).__name__}; video is not supported")
