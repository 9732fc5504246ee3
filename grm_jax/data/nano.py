"""Small comparisons that can be checked by rule: the data of the experiment on a laptop.

A problem names six digits, `a` to `f`, and asks to add a number to each and keep the last digit.
Each response lists six digits. One response is right; every other one has slips in one to three
places, so that a judge who looks at a place or two often sees no difference, and one who looks at
more of them, or asks several times, sees it. Everything is drawn from a seed, there is no end to
it, and which split a problem belongs to follows from a hash of the problem itself, so that no split
shares one with another.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from grm_jax.data.comparison import BestLabel, Comparison
from grm_jax.errors import UsageError

Split = Literal["train", "valid", "test"]

PLACES = "abcdef"
ADDENDS = (1, 2, 3, 4, 5)
MIN_RESPONSES = 2
MAX_RESPONSES = 3
# How often a wrong response has slips in one, two and three places.
_SLIPS = (0.45, 0.3, 0.25)
# Of this many parts of all problems, one is for tests and one for trying settings out.
_PARTS = 20
_DIGITS = re.compile("\n".join(f"{place}([0-9])" for place in PLACES))
_TASK = "Add {} to each digit and keep the last digit:"
_PROBLEM = re.compile(re.escape(_TASK).replace(r"\{\}", "([0-9])") + r"\n(.*)", re.DOTALL)


class Problem(NamedTuple):
    """What the user asks for.

    Attributes:
      addend: The number to add.
      digits: The digit at each of `PLACES`.
    """

    addend: int
    digits: tuple[int, ...]

    @property
    def answer(self) -> tuple[int, ...]:
        """The right digit at each place."""
        return tuple((digit + self.addend) % 10 for digit in self.digits)

    @property
    def text(self) -> str:
        """The user's message."""
        return f"{_TASK.format(self.addend)}\n{write_digits(self.digits)}"


def write_digits(digits: tuple[int, ...]) -> str:
    """A line for each place, such as `c7`."""
    return "\n".join(f"{place}{digit}" for place, digit in zip(PLACES, digits, strict=True))


def read_digits(text: str) -> tuple[int, ...]:
    """The digits of a problem or response, as `write_digits` lists them.

    Raises:
      UsageError: If the text is anything else.
    """
    match = _DIGITS.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} does not list a digit for each of {', '.join(PLACES)}")
    return tuple(map(int, match.groups()))


def read_problem(text: str) -> Problem:
    """The problem that a user's message poses.

    Raises:
      UsageError: If the message is no such problem.
    """
    match = _PROBLEM.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a problem of this kind")
    return Problem(int(match[1]), read_digits(match[2]))


def split_of(problem: Problem) -> Split:
    """The split that a problem belongs to: one in 20 is `valid`, one in 20 is `test`."""
    digest = hashlib.blake2b(problem.text.encode(), digest_size=8).digest()
    match int.from_bytes(digest) % _PARTS:
        case 0:
            return "test"
        case 1:
            return "valid"
        case _:
            return "train"


def nano_comparisons(split: Split, *, seed: int) -> Iterator[Comparison]:
    """Draws comparisons without end.

    Args:
      split: Which problems to draw.
      seed: The same seed draws the same comparisons. Problems of one split may come up again under
        another seed, and with other responses.

    Yields:
      Comparisons of two or three responses, in random order, whose label names the right one.

    Raises:
      UsageError: If there is no such split.
    """
    if split not in get_args(Split):
        raise UsageError(f"no split {split!r}; choose one of {', '.join(get_args(Split))}")
    return _draw(split, seed)


def _draw(split: Split, seed: int) -> Iterator[Comparison]:
    rng = random.Random(f"{split} {seed}")
    for number in itertools.count():
        problem = _problem(rng)
        while split_of(problem) != split:
            problem = _problem(rng)
        count = rng.randint(MIN_RESPONSES, MAX_RESPONSES)
        answers = [problem.answer]
        while len(answers) < count:
            answer = _with_slips(problem.answer, rng)
            if answer not in answers:
                answers.append(answer)
        best = rng.randrange(count)
        answers[0], answers[best] = answers[best], answers[0]
        yield Comparison(
            id=f"nano-{split}-{seed}-{number}",
            messages=({"role": "user", "content": problem.text},),
            responses=tuple(map(write_digits, answers)),
            source="nano",
            subset=f"{count} responses",
            label=BestLabel(best),
        )


def _problem(rng: random.Random) -> Problem:
    return Problem(rng.choice(ADDENDS), tuple(rng.randrange(10) for _ in PLACES))


def _with_slips(answer: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    wrong = list(answer)
    count = rng.choices(range(1, len(_SLIPS) + 1), _SLIPS)[0]
    for place in rng.sample(range(len(PLACES)), count):
        wrong[place] = (wrong[place] + rng.randint(1, 9)) % 10
    return tuple(wrong)
