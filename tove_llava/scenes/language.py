"""Words for a scene: captions, exact descriptions, and questions with balanced answers.

For each question the answer is drawn first, and then a question that has it. So a model that does not see the image
stays at chance.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tove_llava.scenes.objects import COLOURS, SHAPES, Object, Scene
from tove_llava.scenes.world import HELD_OUT_PAIRS, MAX_RADIUS, MIN_RADIUS

COLUMNS, ROWS = "ABCDEF", "123456"  # places: column A is at the left, row 1 at the top
METRES = ("three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen")
SIZES = ("tiny", "small", "medium", "large", "huge")
SHORT_ANSWER = "Answer the question using a single word or phrase."  # LLaVA's wording for short answers

# How clear a difference must be for a question about it.
PLACE_MARGIN = 0.09  # of the image's side
DEPTH_RATIO = 1.18
SIZE_RATIO = 1.3

Asked = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class Question:
    category: str
    text: str
    answer: str


def place(item: Object) -> str:
    """Return the chessboard square (6 x 6) of the visible centroid: ``B4``."""
    column, row = (min(int(x * 6), 5) for x in (item.u, item.v))
    return COLUMNS[column] + ROWS[row]


def metres(item: Object) -> str:
    """Return the object's depth in whole metres, as a word."""
    return METRES[int(np.clip(round(item.depth), 3, 14)) - 3]


def size(item: Object) -> str:
    """Return one of five words for the object's real size."""
    return SIZES[min(int((item.radius - MIN_RADIUS) / (MAX_RADIUS - MIN_RADIUS) * len(SIZES)), len(SIZES) - 1)]


def describe(scene: Scene) -> str:
    """Describe objects from left to right, with place, depth and size."""
    return " ".join(f"{o.name} at {place(o)}, {metres(o)} metres, {size(o)}." for o in _left_to_right(scene))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Write one sentence as a person might, about some objects, without measures."""
    items = list(scene.objects)
    items = [items[i] for i in rng.permutation(len(items))]
    phrases = [_phrase(item, rng) for item in items]
    if len(items) >= 2 and rng.random() < 0.7:
        relation = _loose_relation(items[0], items[1])
        first = f"{phrases[0]} {relation} {phrases[1]}"
        rest = phrases[2:]
    else:
        first, rest = phrases[0], phrases[1:]
    sentence = first
    if rest:
        sentence += ", " + (", ".join(rest[:-1]) + " and " if len(rest) > 1 else "with ") + rest[-1]
    return sentence[0].upper() + sentence[1:] + "."


def ask(scene: Scene, rng: np.random.Generator, categories: tuple[str, ...] | None = None) -> list[Question]:
    """Ask at most one question per category, in random order."""
    found = []
    for category in categories or tuple(CATEGORIES):
        asked = CATEGORIES[category](scene, rng)
        if asked is not None:
            found.append(Question(category, *asked))
    return [found[i] for i in rng.permutation(len(found))]


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _left_to_right(scene: Scene) -> list[Object]:
    return sorted(scene.objects, key=lambda o: o.u)


def _phrase(item: Object, rng: np.random.Generator) -> str:
    words = [item.colour, item.shape]
    if rng.random() < 0.3:
        words.insert(0, item.material)
    if rng.random() < 0.3:
        words.insert(0, "big" if item.area > 0.03 else "small")
    return with_article(" ".join(words))


def _loose_relation(a: Object, b: Object) -> str:
    if abs(a.u - b.u) >= abs(a.v - b.v):
        return "to the left of" if a.u < b.u else "to the right of"
    return "above" if a.v < b.v else "below"


def _yes_no(rng: np.random.Generator) -> tuple[bool, str]:
    wanted = bool(rng.random() < 0.5)
    return wanted, "Yes" if wanted else "No"


def existence(scene: Scene, rng: np.random.Generator) -> Asked:
    wanted, answer = _yes_no(rng)
    if wanted:
        pair = scene.objects[int(rng.integers(len(scene.objects)))].pair
    else:
        pair = absent_pair(scene, rng, near=bool(rng.random() < 0.5))
    return f"Is there {with_article(' '.join(pair))} in the image?", answer


def absent_pair(scene: Scene, rng: np.random.Generator, near: bool) -> tuple[str, str]:
    """Draw a colour-shape pair that the scene lacks.

    With ``near``, colour and shape both occur in it if possible. Only the "novel" split asks about held-out pairs:
    elsewhere the answer would always be "No".
    """
    present = {o.pair for o in scene.objects}
    pool = [
        (c, s)
        for c in COLOURS
        for s in SHAPES
        if (c, s) not in present and (scene.split == "novel" or (c, s) not in HELD_OUT_PAIRS)
    ]
    if near:
        colours, shapes = {c for c, _ in present}, {s for _, s in present}
        pool = [p for p in pool if p[0] in colours and p[1] in shapes] or pool
    return pool[int(rng.integers(len(pool)))]


def counting(scene: Scene, rng: np.random.Generator) -> Asked:
    counts = {"How many objects are there?": len(scene.objects)}
    for colour in COLOURS:
        counts[f"How many {colour} objects are there?"] = sum(o.colour == colour for o in scene.objects)
    for shape in SHAPES:
        counts[f"How many {shape}s are there?"] = sum(o.shape == shape for o in scene.objects)
    answers = sorted(set(counts.values()))
    wanted = answers[int(rng.integers(len(answers)))]
    questions = [q for q, n in counts.items() if n == wanted]
    return questions[int(rng.integers(len(questions)))], str(wanted)


def colour(scene: Scene, rng: np.random.Generator) -> Asked | None:
    item = _unique(scene, rng, "shape")
    return None if item is None else (f"What color is the {item.shape}?", item.colour)


def shape(scene: Scene, rng: np.random.Generator) -> Asked | None:
    item = _unique(scene, rng, "colour")
    return None if item is None else (f"What shape is the {item.colour} object?", item.shape)


def _unique(scene: Scene, rng: np.random.Generator, key: str) -> Object | None:
    values = [getattr(o, key) for o in scene.objects]
    unique = [o for o, value in zip(scene.objects, values, strict=True) if values.count(value) == 1]
    return unique[int(rng.integers(len(unique)))] if unique else None


@dataclass(frozen=True)
class Comparison:
    """A measure of objects, its two words, and what differs clearly."""

    words: tuple[str, str]
    measure: Callable[[Object], float]
    clear: Callable[[float, float], bool]

    def relation(self, scene: Scene, rng: np.random.Generator) -> Asked | None:
        pair = self._pair(scene, rng)
        if pair is None:
            return None
        wanted, answer = _yes_no(rng)
        smaller_first = bool(rng.random() < 0.5)
        first, second = pair if smaller_first else pair[::-1]
        word = self.words[0] if smaller_first == wanted else self.words[1]
        return f"Is the {first.name} {word} the {second.name}?", answer

    def choice(self, scene: Scene, rng: np.random.Generator) -> Asked | None:
        pair = self._pair(scene, rng)
        if pair is None:
            return None
        which = int(rng.integers(2))
        named = pair if rng.random() < 0.5 else pair[::-1]
        return f"Which is {self.words[which]}, the {named[0].name} or the {named[1].name}?", pair[which].name

    def _pair(self, scene: Scene, rng: np.random.Generator) -> tuple[Object, Object] | None:
        """Draw a pair whose first member's measure is clearly smaller."""
        items = [(o, self.measure(o)) for o in scene.objects]
        pairs = [(a, b) for a, x in items for b, y in items if a is not b and self.clear(x, y)]
        return pairs[int(rng.integers(len(pairs)))] if pairs else None


LEFT_RIGHT = Comparison(("to the left of", "to the right of"), lambda o: o.u, lambda a, b: b - a > PLACE_MARGIN)
ABOVE_BELOW = Comparison(("above", "below"), lambda o: o.v, lambda a, b: b - a > PLACE_MARGIN)
FRONT_BEHIND = Comparison(("in front of", "behind"), lambda o: o.depth, lambda a, b: b / a > DEPTH_RATIO)
NEARER = replace(FRONT_BEHIND, words=("closer to the camera", "farther from the camera"))
BIGGER = Comparison(("smaller", "bigger"), lambda o: o.radius, lambda a, b: b / a > SIZE_RATIO)


def statement(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Make a VSR-style statement (Liu et al. 2023) about a direction."""
    asked = (LEFT_RIGHT, ABOVE_BELOW, FRONT_BEHIND)[int(rng.integers(3))].relation(scene, rng)
    if asked is None:
        return None
    claim = asked[0].removeprefix("Is the ").removesuffix("?")
    subject = next(o.name for o in scene.objects if claim.startswith(o.name))
    claim = f"The {subject} is {claim.removeprefix(subject).strip()}."
    return f"{claim} Is this true or false?", "True" if asked[1] == "Yes" else "False"


CATEGORIES: dict[str, Callable[[Scene, np.random.Generator], Asked | None]] = {
    **{"existence": existence, "counting": counting, "colour": colour, "shape": shape},
    **{"left_right": LEFT_RIGHT.relation, "above_below": ABOVE_BELOW.relation, "front_behind": FRONT_BEHIND.relation},
    **{"nearer": NEARER.choice, "bigger": BIGGER.choice, "statement": statement},
}
# Questions about one object's entry of the description teach the language model to read.
MEASURES: dict[str, Callable[[Object], Asked]] = {
    "place": lambda o: (f"Where is the {o.name}?", place(o)),
    "distance": lambda o: (f"How far is the {o.name}?", f"{metres(o)} metres"),
    "size": lambda o: (f"How big is the {o.name}?", size(o)),
}


def contrast(a: Object, b: Object) -> Asked:
    """Compare two objects in one word for each question type."""
    words = (
        "left" if a.u < b.u else "right",
        "above" if a.v < b.v else "below",
        "closer" if a.depth < b.depth else "farther",
        "smaller" if a.radius < b.radius else "bigger",
    )
    return f"How does the {a.name} compare with the {b.name}?", ", ".join(words)
