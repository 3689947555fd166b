"""Make a language model's own chat template fit for training.

A model that is trained on whole conversations needs two properties of its template:

* *prefixes stay*: the prompt at which an answer is generated begins the text that is trained, in every turn;
* *answers end*: each answer is followed by one token that says so.

Many shipped templates lack them: Qwen3 removes the think block of earlier answers, gpt-oss ends only the last answer
with its end token. For those a *linear form* is made: the strings that the template puts around a system text, a
question and an answer, found by rendering probes, and written down as a template of their own. Both kinds are frozen:
the date is a fixed one, and the switch for thinking is set. The result is jinja, is saved with a checkpoint, and gives
the same prompt everywhere. Shipped templates are untrusted: they run in transformers' sandbox, and probes have
a limited length.
"""

import datetime
import json
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.core.json_text import loads

REASONING = ("refuse", "drop", "keep")
DATE = "2024-07-26"  # what Llama 3's template takes where there is no clock
_HEADER = re.compile(r"\{#- tove_llava chat format: (\{.*?\}) -#\}")
_FLATTENED = "set content.text = content.text + part['text']"  # in the templates of checkpoints without such a header
_MEMORY = 2**29  # bytes that one template may take
_STEPS = 3_000_000  # lines of Python that one template may take; the largest shipped one takes 1.2 million to compile

_WRAP = """\
{%- set wrapped = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set wrapped.messages = wrapped.messages + [{'role': message['role'], 'content': [{'type': 'text', \
'text': message['content']}]}] -%}
{%- endfor -%}
{%- set messages = wrapped.messages -%}
"""

Render = Callable[..., str]  # (*texts of roles, generation) -> text; see _renderer


@dataclass(frozen=True)
class ChatFormat:
    """A template that is fit for training.

    Attributes:
        text: the jinja template, complete and frozen.
        end: the token that ends every answer.
        reasoning: what becomes of a record's think blocks: refuse, drop or keep.
        date: the date that the template is given, ISO.
        form: "shipped", "linear", or "as trained" by an older version of this package.
    """

    text: str
    end: str
    reasoning: str = "refuse"
    date: str = DATE
    form: str = "shipped"


_formats: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, ChatFormat]]" = weakref.WeakKeyDictionary()


def chat_format(tokenizer: PreTrainedTokenizerBase, reasoning: str = "refuse", date: str = DATE) -> ChatFormat:
    """Make the training form of a tokenizer's chat template.

    Args:
        tokenizer: its ``chat_template`` is the language model's own, or was made here and says its options itself.
        reasoning: ``refuse`` records with think blocks, ``drop`` the blocks, or ``keep`` (learn) them.
        date: ISO date for templates that ask for the time.

    Raises:
        ConfigError: there is no template, it lacks the properties in a way that cannot be cured, or an option is wrong.
    """
    shipped = _shipped(tokenizer)
    made = _HEADER.search(shipped)
    if made is not None:
        return _read_header(made.group(1), shipped, tokenizer)
    if _FLATTENED in shipped:  # an older checkpoint's, to be used as it was trained
        return ChatFormat(shipped, tokenizer.eos_token, form="as trained")
    known = _formats.get(tokenizer)
    if known is not None and known[0] == shipped and (known[1].reasoning, known[1].date) == (reasoning, date):
        return known[1]
    if reasoning not in REASONING:
        raise ConfigError(f"language.reasoning must be one of {', '.join(REASONING)}, not {reasoning!r}")
    made_now = _make(tokenizer, shipped, reasoning, date)
    _formats[tokenizer] = (shipped, made_now)
    return made_now


def render(tokenizer: PreTrainedTokenizerBase, text: str, messages: list[dict[str, Any]], generation: bool) -> str:
    """Render messages with a template; DataError if the template fails."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=text, tokenize=False, add_generation_prompt=generation
        )
    except MemoryError as error:
        raise DataError("the tokenizer's chat template builds a text that takes all memory") from error
    except Exception as error:  # a template of anybody's raises anything
        raise DataError(f"the tokenizer's chat template refuses the conversation: {error}") from error


def _shipped(tokenizer: PreTrainedTokenizerBase) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ConfigError("the tokenizer ships no chat template; choose another conversation template, such as v1")
    return template


def _read_header(header: str, text: str, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    try:
        found = ChatFormat(text, **loads(header))
        if not all(isinstance(value, str) for value in asdict(found).values()):
            raise TypeError("a value is no text")
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the chat template's first line is damaged ({error}); take the model's own template"
        ) from error
    if found.end not in _added_tokens(tokenizer):
        raise ConfigError(f"the chat template ends answers with {found.end!r}, which is no token of this tokenizer")
    return found


def _make(tokenizer: PreTrainedTokenizerBase, shipped: str, reasoning: str, date: str) -> ChatFormat:
    try:
        with _limited_steps(), _limited_memory():
            return _first_fit(tokenizer, shipped, reasoning, date)
    except _EndlessError:
        fault = "it does not come to an end"
    except DataError as error:
        fault = str(error)
    raise ConfigError(
        f"this tokenizer's chat template cannot be trained on: {fault}. Choose another conversation template; v1 works "
        "with every model"
    )


def _first_fit(tokenizer: PreTrainedTokenizerBase, shipped: str, reasoning: str, date: str) -> ChatFormat:
    faults = []
    for frozen in (_frozen(shipped, reasoning, date), _frozen(_WRAP + shipped, reasoning, date)):
        shown = _renderer(tokenizer, frozen)
        try:
            parts = _Parts.of(shown, _added_tokens(tokenizer), reasoning)
        except DataError as error:
            faults.append(error)
            continue
        if reasoning != "keep" and parts.describes(shown):
            return _headed(ChatFormat(frozen, parts.end, reasoning, date, "shipped"))
        return _headed(ChatFormat(parts.linear(), parts.end, reasoning, date, "linear"))
    raise faults[0]


def _headed(found: ChatFormat) -> ChatFormat:
    options = {key: value for key, value in asdict(found).items() if key != "text"}
    header = json.dumps(options, ensure_ascii=False).replace("-#}", "-# }")
    return ChatFormat(f"{{#- tove_llava chat format: {header} -#}}\n{found.text}", **options)


def _frozen(template: str, reasoning: str, date: str) -> str:
    """Set a template's switches for thinking, and give it a fixed date."""
    thinks = "true" if reasoning == "keep" else "false"
    front = f"{{%- set enable_thinking = {thinks} -%}}{{%- set thinking = {thinks} -%}}\n"
    if "strftime_now" in template:
        try:
            day = datetime.date.fromisoformat(date)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"language.date must be a date such as {DATE}, not {date!r}") from error
        asked = re.findall(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", template)
        days = {form: day.strftime(form) for _, form in asked}
        front += f"{{%- macro strftime_now(form) -%}}{{{{ {json.dumps(days)}[form] }}}}{{%- endmacro -%}}\n"
    return front + template


def _renderer(tokenizer: PreTrainedTokenizerBase, text: str) -> Render:
    def shown(*texts: str, generation: bool = False) -> str:
        """Render texts whose first letter is the role: s, u or a."""
        roles = {"s": "system", "u": "user", "a": "assistant"}
        messages = [{"role": roles[words[0]], "content": words} for words in texts]
        return render(tokenizer, text, messages, generation)

    return shown


# Probes: no template changes such words, and each occurs once.
_S, _U1, _A1, _U2, _A2, _U3, _A3 = ("sQz0x", "uQz1x", "aQz1x", "uQz2x", "aQz2x", "uQz3x", "aQz3x")


@dataclass(frozen=True)
class _Parts:
    """The strings that a template puts around texts."""

    begin: str  # before the first question, without a system text
    system: tuple[str, str] | None  # around a system text; None where the template takes none
    close: str  # after a question; the opening begins with it
    opening: str  # from a question to its answer
    end: str  # the token that ends an answer
    later: str  # from there to the next question
    last: str  # after the last answer's end

    @classmethod
    def of(cls, shown: Render, tokens: frozenset[str], reasoning: str) -> "_Parts":
        """Find the strings by rendering probes; DataError names what cannot be found."""
        begin, opening, after = _split(shown(_U1, _A1), _U1, _A1)
        end = _first_token(after, tokens)
        if end is None:
            raise DataError(
                f"it ends an answer with {after[:40]!r}, which begins with no token of this tokenizer, so that answers "
                "would not stop"
            )
        between = _split(shown(_U1, _A1, _U2, generation=True), _A1, _U2)[1]
        there = _first_token(between, tokens)
        if there is None:
            raise DataError(f"it puts {between[:40]!r} between an answer and the next question, without an end token")
        prompt = _split(shown(_U1, generation=True), _U1)[1]
        if reasoning == "keep":  # the record's own think block follows
            opening = re.sub(r"<think>\s*$", "", prompt)
        closed = _split(shown(_U1), _U1)[1]
        try:
            whole = shown(_S, _U1, _A1)
            front, middle, _ = _split(whole, _S, _U1)
            system = front, middle
        except DataError:
            system = None
        return cls(
            begin=begin,
            system=system,
            close=closed if opening.startswith(closed) else "",
            opening=opening,
            end=end,
            later=between[between.index(there) + len(there) :],
            last=after[after.index(end) + len(end) :],
        )

    def describes(self, shown: Render) -> bool:
        """Return True if the template has both properties, and is what the strings say."""
        if self.system is None:
            return False
        for texts in ((_U1, _A1), (_U1, _A1, _U2, _A2), (_U1, _A1, _U2, _A2, _U3, _A3), (_S, _U1, _A1, _U2, _A2)):
            for turn in range(len(texts)):
                if texts[turn][0] != "a":
                    continue
                if shown(*texts[:turn], generation=True) != self.text(texts[:turn]) + self.opening:
                    return False
                if shown(*texts[: turn + 1]) != self.text(texts[: turn + 1]) + self.last:
                    return False
        return True

    def text(self, texts: tuple[str, ...]) -> str:
        """Write a conversation, without the opening of an answer to come."""
        assert self.system is not None
        written = self.system[0] + texts[0] + self.system[1] if texts[0][0] == "s" else self.begin
        questions = 0
        for words in texts:
            if words[0] == "u":
                written += (self.later if questions else "") + words
                questions += 1
            elif words[0] == "a":
                written += self.opening + words + self.end
        return written

    def linear(self) -> str:
        """Write the template as jinja that puts these strings around every turn."""
        front, middle = self.system or (self.begin, "\n\n")  # without a place for it, it begins the first question
        quoted = {
            name: json.dumps(value, ensure_ascii=False)
            for name, value in {
                "begin": self.begin, "front": front, "middle": middle, "close": self.close, "end": self.end,
                "later": self.later, "last": self.last, "opening": self.opening,
                "rest": self.opening.removeprefix(self.close),
            }.items()
        }  # fmt: skip
        return _LINEAR % quoted


_LINEAR = """\
{%%- set state = namespace(role='', questions=0) -%%}
{%%- for message in messages -%%}
{%%- set content = message['content'] | trim -%%}
{%%- if message['role'] == 'system' and loop.first -%%}
{{- %(front)s + content + %(middle)s -}}
{%%- elif message['role'] == 'user' and state.role in ('', 'system', 'assistant') -%%}
{{- (%(later)s if state.questions else ('' if state.role == 'system' else %(begin)s)) + content + %(close)s -}}
{%%- set state.questions = state.questions + 1 -%%}
{%%- elif message['role'] == 'assistant' and state.role == 'user' -%%}
{{- %(rest)s + content + %(end)s -}}
{%%- else -%%}
{{- raise_exception('a conversation is a system turn, if any, then questions and answers in turns, not ' \
+ message['role'] + ' after ' + (state.role or 'nothing')) -}}
{%%- endif -%%}
{%%- set state.role = message['role'] -%%}
{%%- endfor -%%}
{%%- if add_generation_prompt and state.role == 'user' -%%}
{{- %(rest)s -}}
{%%- elif state.role == 'assistant' -%%}
{{- %(last)s -}}
{%%- endif -%%}
"""


def _split(text: str, *words: str) -> list[str]:
    """Split a rendering at words that each occur once, in order."""
    parts = []
    for word in words:
        if text.count(word) != 1:
            raise DataError(f"it renders a turn's text {text.count(word)} times, or changes it")
        before, _, text = text.partition(word)
        parts.append(before)
    return [*parts, text]


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    return frozenset(token for token in (*added, tokenizer.eos_token) if token)


def _first_token(text: str, tokens: frozenset[str]) -> str | None:
    """Return the longest token with which a text begins, white space aside."""
    begins = [token for token in tokens if text.lstrip().startswith(token)]
    return max(begins, key=len, default=None)


class _EndlessError(BaseException):
    """Raised within a template, which must not catch it."""


@contextmanager
def _limited_steps() -> Iterator[None]:
    """Stop a template that does not come to an end."""
    left, before = _STEPS, sys.gettrace()

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _EndlessError
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Give a template little memory: jinja computes ``'a' * 10**9`` when it compiles it. Linux only."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        yield
        return
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(statm.read_text().split()[0]) * resource.getpagesize() + _MEMORY
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
