"""Normal forms of short answers, for comparing them.

Three published programs do nearly the same; each is a function here, since their differences change scores:

* :func:`normalise_vqa`: the official VQA evaluation (GT-Vision-Lab/VQA, ``vqaEval.py``, under Python 2);
* :func:`normalise_evalai`: the "EvalAI" processor that TextVQA, LLaVA's conversions and its VizWiz numbers use
  (LLaVA, ``m4c_evaluator.py``), which first drops commas and question marks and splits off ``'s``;
* :func:`normalise_vizwiz`: the VizWiz challenge API, whose contractions carry back-ticks.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

from tove_llava.eval.scorer_data import scorer_data

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}

# A period goes when no digit follows. The reference passes a flag where re.sub takes a count, so only the first 32 go.
_PERIODS = 32

# The two readings of "digit": Python 2's patterns know ASCII digits, Python 3's those of all scripts.
_ASCII = re.compile(r"\d,\d", re.ASCII), re.compile(r"\.(?!\d)", re.ASCII)
_UNICODE = re.compile(r"\d,\d"), re.compile(r"\.(?!\d)")

_CACHE = 1 << 16  # answers repeat: ten people answer each of 200,000 questions


def flatten(text: str) -> str:
    """Replace newlines and tabs by spaces, and trim the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str, unicode_digits: bool = False) -> str:
    """Delete punctuation, or replace it by spaces.

    A mark is deleted everywhere if it touches a space anywhere in the text, or if the text has a comma between digits;
    else each one becomes a space. Of periods that no digit follows, the first 32 are deleted.
    """
    comma, period = _UNICODE if unicode_digits else _ASCII
    delete_all = comma.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        if mark in text:
            delete = delete_all or f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if delete else " ")
    return period.sub("", result, count=_PERIODS)


def canonical_words(text: str, contractions: Mapping[str, str]) -> str:
    """Write lower case, numbers as digits, no articles, contractions with apostrophes."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(_CACHE)
def normalise_vqa(text: str) -> str:
    """Return the official VQA form of a text that :func:`flatten` has processed."""
    return canonical_words(strip_punctuation(text), scorer_data("contractions"))


@lru_cache(_CACHE)
def normalise_evalai(text: str) -> str:
    """Return the EvalAI form of a raw text, as LLaVA's submissions have."""
    text = flatten(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())
    return canonical_words(strip_punctuation(text, unicode_digits=True), scorer_data("contractions"))


@lru_cache(_CACHE)
def normalise_vizwiz(text: str) -> str:
    """Return the VizWiz API's form of a raw text."""
    return canonical_words(strip_punctuation(flatten(text), unicode_digits=True), scorer_data("contractions_vizwiz"))
