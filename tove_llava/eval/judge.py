"""A language model that judges answers, at an endpoint with OpenAI's protocol.

Every reply is kept in a file before it is used, under a digest of the model and the whole request: an interrupted run
continues where it stopped, and a second run costs nothing.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import threading
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tove_llava.core.errors import ConfigError, ServiceError, ToveError
from tove_llava.eval.benchmarks import Benchmark, Score
from tove_llava.eval.rows import AppendFile, read_jsonl
from tove_llava.eval.score_table import first_ids
from tove_llava.inference.reasoning import spoken

T = TypeVar("T")

URL, MODEL, KEY = "TOVE_JUDGE_URL", "TOVE_JUDGE_MODEL", "TOVE_JUDGE_KEY"
HOW = f"give --judge-url and --judge-model, or set {URL} and {MODEL}"
_TIMEOUT = 180.0  # seconds
_ROOM = 4096  # tokens for the thoughts and the reply of a model that counts both
_OPTIONAL = ("temperature", "max_completion_tokens", "max_tokens")
_MOST_UNREAD = 0.1  # share of the replies; a score with more of them says nothing
_CHARACTERS_PER_TOKEN = 4  # for the estimate


@dataclass(frozen=True)
class Request:
    """One question to the judge."""

    messages: tuple[Mapping[str, str], ...]
    temperature: float
    max_tokens: int

    @property
    def characters(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


#: yields requests, is sent the replies, and returns a verdict
Exchange = Generator[Request, str, T]


class OnlyEstimated(ToveError):
    """The calls were counted, as asked, and none was made."""


class _Stopped(Exception):
    """Another exchange has failed."""


@dataclass
class Judge:
    """A model at an endpoint, with a file of its replies.

    Args:
        url: the endpoint's base address: what comes before ``/chat/completions``.
        model: the model's name there.
        cache: JSONL file of replies; made when the first call is.
        price: of a million tokens, read and written, in any currency; for the estimate.
        estimate_only: say what the calls would cost, and make none.
        workers: requests at a time.
        retries: repetitions of a call that fails; the client waits longer each time, or as long as the server says.
    """

    url: str
    model: str
    cache: Path
    price: tuple[float, float] | None = None
    estimate_only: bool = False
    workers: int = 4
    retries: int = 6
    calls: int = field(default=0, init=False)
    cached: int = field(default=0, init=False)
    refused: set[str] = field(default_factory=set, init=False)  # parameters that the endpoint does not take

    def hold(self, exchanges: Sequence[Exchange[T]]) -> list[T]:
        """Hold all exchanges, several at once, and return verdicts in order.

        Raises:
            ConfigError: the client is not installed.
            DataError: the file of replies is damaged.
            OnlyEstimated: instead of the first call, if ``estimate_only``.
            ServiceError: the endpoint refuses or fails; the replies so far are kept.
        """
        known = self._known()
        opened = [(exchange, next(exchange)) for exchange in exchanges]
        self._announce([request for _, request in opened if _digest(self.model, request) not in known])
        client = self._client()
        lock, stop = threading.Lock(), threading.Event()
        with AppendFile(self.cache) as file, ThreadPoolExecutor(self.workers) as pool:

            def ask(request: Request) -> str:
                key = _digest(self.model, request)
                with lock:
                    if key in known:
                        self.cached += 1
                        return known[key]
                if stop.is_set():
                    raise _Stopped
                reply = self._call(client, request)
                with lock:
                    file.append([{"key": key, "model": self.model, "reply": reply}])
                    known[key] = reply
                    self.calls += 1
                return reply

            def finish(exchange: Exchange[T], request: Request) -> T:
                try:
                    while True:
                        request = exchange.send(ask(request))
                except StopIteration as end:
                    return end.value
                except ServiceError:
                    stop.set()
                    raise

            running = [pool.submit(finish, exchange, request) for exchange, request in opened]
            try:
                return [future.result() for future in running]
            except _Stopped:
                failures = (future.exception() for future in running)
                raise next(error for error in failures if isinstance(error, ServiceError)) from None
            finally:
                stop.set()  # also after an interrupt: drops the calls not yet made

    def _known(self) -> dict[str, str]:
        if not self.cache.exists():
            return {}
        with AppendFile(self.cache):
            pass  # cuts off a last line that a killed run did not finish
        return {row["key"]: row["reply"] for row in read_jsonl(self.cache, required=("key", "reply"))}

    def _announce(self, requests: Sequence[Request]) -> None:
        """Print the cost of the calls, before the first one."""
        read = sum(request.characters for request in requests) // _CHARACTERS_PER_TOKEN
        written = sum(request.max_tokens for request in requests)
        cost = ""
        if self.price is not None:
            amount = (read * self.price[0] + written * self.price[1]) / 1e6
            cost = f", {amount:.2f} at most by the given prices"
        text = (
            f"judge {self.model}: {len(requests)} calls to make, about {read} tokens to read (at "
            f"{_CHARACTERS_PER_TOKEN} characters a token), at most {written} to write{cost}; replies in {self.cache}"
        )
        if self.estimate_only:
            raise OnlyEstimated(text)
        print(text, file=sys.stderr)

    def _client(self) -> Any:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ConfigError("a judge needs the package openai: pip install 'tove-llava[eval]'") from error
        key = os.environ.get(KEY) or os.environ.get("OPENAI_API_KEY") or "none"  # a local server wants none
        return OpenAI(base_url=self.url, api_key=key, max_retries=self.retries, timeout=_TIMEOUT)

    def _call(self, client: Any, request: Request) -> str:
        from openai import OpenAIError

        try:
            reply = self._complete(client, request).choices[0].message.content
        except OpenAIError as error:
            raise ServiceError(
                f"the judge at {self.url} failed: {error}. Replies so far are in {self.cache}, and the same command "
                f"goes on from there. A key is read from {KEY} or OPENAI_API_KEY"
            ) from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ServiceError(f"the judge at {self.url} sent no chat completion; is the address right?") from error
        return reply if isinstance(reply, str) else ""

    def _complete(self, client: Any, request: Request) -> Any:
        """Call the endpoint, without those of the request's parameters that it refuses."""
        from openai import BadRequestError, UnprocessableEntityError

        while True:
            body = asdict(request)
            if "max_tokens" in self.refused:
                # Such models also count the tokens of their thoughts.
                body["max_completion_tokens"] = max(body["max_tokens"], _ROOM)
            body = {key: value for key, value in body.items() if key not in self.refused}
            try:
                return client.chat.completions.create(model=self.model, **body)
            except (BadRequestError, UnprocessableEntityError) as error:
                named = next((key for key in _OPTIONAL if key in body and key in f"{error.param} {error}"), None)
                if named is None:
                    raise
                self.refused.add(named)


def _digest(model: str, request: Request) -> str:
    return hashlib.sha256(json.dumps([model, asdict(request)], sort_keys=True).encode()).hexdigest()


class JudgedBenchmark(Benchmark):
    """A benchmark scored by :attr:`judge`; without one the scores are unavailable."""

    max_new_tokens = 1024
    judge: Judge | None = None

    def score(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> Score:
        matched = self.match(predictions, truth)

        def unavailable(reason: str) -> Score:
            return Score({}, len(truth), {}, matched.notes(), unavailable={"scores": reason})

        if self.judge is None:
            return unavailable(f"no judge; {HOW}")
        try:
            score = self.verdicts(self.judge, truth, matched.texts)
        except OnlyEstimated as estimate:
            return unavailable(str(estimate))
        self._check_read(score.extras["unparsed_replies"], len(truth))
        judge = {"model": self.judge.model, "calls": self.judge.calls, "cached": self.judge.cached}
        if self.judge.refused:
            judge["left_out"] = sorted(self.judge.refused)
        extras = {**score.extras, **matched.notes(), "judge": judge}
        return Score(score.scores, score.count, score.rows, extras, score.details, score.marks, rule=score.rule)

    def _check_read(self, unread: Sequence[Any], count: int) -> None:
        assert self.judge is not None
        if len(unread) > _MOST_UNREAD * count:
            raise ServiceError(
                f"{len(unread)} of {count} replies of the judge {self.judge.model} could not be read, so the score "
                f"would say nothing (questions {first_ids(unread)}). The replies are in {self.judge.cache}; choose "
                "another judge, or delete the file to ask again"
            )

    @abstractmethod
    def verdicts(self, judge: Judge, truth: Sequence[Mapping[str, Any]], texts: Sequence[str | None]) -> Score:
        """Have the answers judged, and sum up the verdicts.

        Args:
            texts: the answers in the ground truth's order; None where one is missing.

        Returns:
            a score with ``unparsed_replies`` in its extras: ids of questions whose verdict could not be read.
        """


_LABEL = re.compile(r"^(?:the\s+)?(?:final\s+)?(?:score|grade|rating|correctness)\s*(?:is|:|=)*\s*", re.IGNORECASE)


def verdict_line(reply: str) -> str:
    """Return the first line of a reply without think block, Markdown and a label such as "Score:"."""
    lines = (re.sub(r"[*_`#]", "", line).strip() for line in spoken(reply).answer.split("\n"))
    return _LABEL.sub("", next((line for line in lines if line), ""))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add flags for :func:`judge_from`."""
    group = parser.add_argument_group("judged benchmarks")
    group.add_argument("--judge-url", metavar="URL", help=f"base address of a chat endpoint (default: ${URL})")
    group.add_argument("--judge-model", metavar="NAME", help=f"the judge's name there (default: ${MODEL})")
    group.add_argument(
        "--judge-cache", metavar="FILE", help="its replies (default: next to the answers, with the model's name)"
    )
    group.add_argument(
        "--judge-price", metavar="READ,WRITTEN", help="price of a million tokens, for the estimate of the cost"
    )
    group.add_argument("--judge-estimate", action="store_true", help="print the estimate and stop")


def judge_from(args: argparse.Namespace, answers: Path) -> Judge | None:
    """Make the judge of a command line and the environment, if any.

    Args:
        answers: the file of answers to judge; the replies are kept next to it.

    Raises:
        ConfigError: only one of address and model is given, or the price is none.
    """
    url = args.judge_url or os.environ.get(URL)
    model = args.judge_model or os.environ.get(MODEL)
    if not url and not model:
        return None
    if not url or not model:
        raise ConfigError(f"a judge needs an address and a model; {HOW}")
    if args.judge_cache:
        cache = Path(args.judge_cache)
    else:
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in model)
        cache = Path(f"{answers}.judge-{name}.jsonl")
    return Judge(url, model, cache, _price(args.judge_price), args.judge_estimate)


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--judge-price wants two numbers with a comma between them, not {text!r}") from None
    return read, written
