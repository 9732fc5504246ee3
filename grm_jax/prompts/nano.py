r"""The language of the small comparisons in `grm_jax.data.nano`: its tokenizer and its teacher.

The prompt marks each line of a response with the response's number, as in `2c7`. A judgement names
the places it will check, says for each place what is right and what each response has, and takes
three points off a score for each slip it saw:

    Specific Criteria: b d
    Analysis:
    b should be b7: 1b7 ok 2b3 no 3b7 ok
    d should be d2: 1d2 ok 2d9 no 3d0 no
    Scores: \boxed{10, 4, 7}

The tokenizer spells any text in bytes, and what such prompts and judgements are made of in one
piece each, so that a prompt takes about 40 tokens and a judgement about 20.
"""

import itertools
import json
import random
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from grm_jax import grammar
from grm_jax.data import Comparison
from grm_jax.data.nano import ADDENDS, MAX_RESPONSES, PLACES, Problem, read_digits, read_problem
from grm_jax.errors import UsageError
from grm_jax.prompts.hub_tokenizer import tokenizer_from_folder
from grm_jax.prompts.templates import load_template, render
from grm_jax.prompts.tokenizer import Tokenizer

TEMPLATE = "nano"
PENALTY = 3
"""Points that a slip costs."""

_END = "<|end|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def nano_tokenizer() -> Tokenizer:
    """A token for every byte, for each piece of these prompts and judgements, and for each role."""
    with tempfile.TemporaryDirectory() as folder:
        # Read as any folder's tokenizer is, so that it is saved beside weights as any other.
        for name, content in _tokenizer_files().items():
            (Path(folder) / name).write_text(json.dumps(content))
        return tokenizer_from_folder(Path(folder))


def _tokenizer_files() -> Mapping[str, Mapping[str, Any]]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = tokenizers.Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    )
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    pieces = dict.fromkeys([*_prompt_pieces(), *_judgement_pieces()])
    # Added tokens are found before anything else, the longest first.
    engine.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    engine.add_special_tokens([*_ROLES, _END])
    return {
        "tokenizer.json": json.loads(engine.to_str()),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": _END,
            "chat_template": _CHAT_TEMPLATE,
        },
    }


def _prompt_pieces() -> Iterator[str]:
    """The lines of a problem and its responses, and all that the template puts around them."""
    lines = [f"{place}{digit}\n" for place in PLACES for digit in range(10)]
    yield from lines
    yield from (f"{number}{line}" for number in range(1, MAX_RESPONSES + 1) for line in lines)
    digits = tuple(0 for _ in PLACES)
    tasks = [Problem(addend, digits).text.partition("\n")[0] + "\n" for addend in ADDENDS]
    yield from tasks
    # The frame is what is left of a prompt whose messages and responses are one known character.
    mark = "\0"
    messages = [{"role": "user", "content": mark}]
    prompt = render(load_template(TEMPLATE), messages, [mark] * MAX_RESPONSES)[0]["content"]
    before, *between, after = re.split(rf"\d?{mark}\n", prompt)
    yield before
    for frame in between:
        yield from _frame_pieces(frame)
    yield from _frame_pieces(after)


def _frame_pieces(frame: str) -> Iterator[str]:
    """A frame in pieces that end with the delimiters of responses."""
    yield from re.findall(r"\[The End of Response \d+\]\n|(?:(?!\[The End).)+", frame, re.DOTALL)


def _judgement_pieces() -> Iterator[str]:
    """What the teacher writes, a decision a piece."""
    yield grammar.CRITERIA
    yield from (f" {place}" for place in PLACES)
    yield f"\n{grammar.ANALYSIS}"
    for place, digit in itertools.product(PLACES, range(10)):
        yield from _rightful(place, digit)
        for response in range(1, MAX_RESPONSES + 1):
            yield from (_verdict(response, place, digit, same) for same in (True, False))
    yield f"\n{grammar.SCORES} {grammar.BOX_OPEN}"
    for score in range(grammar.DEFAULT_LOW, grammar.DEFAULT_HIGH + 1):
        yield from (f"{score}, ", f"{score}{grammar.BOX_CLOSE}")


def _rightful(place: str, digit: int) -> tuple[str, str]:
    return f"\n{place} should be", f" {place}{digit}:"


def _verdict(response: int, place: str, digit: int, same: bool) -> str:
    return f" {response}{place}{digit} {'ok' if same else 'no'}"


@final
@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A judge by rule that is in a hurry: it sees the comparison, never the label.

    Attributes:
      checks: How often it checks one place, two, and so on; which ones is left to chance.
      miscompute: How often what it says is right at a place is one off.
      misread: How often it takes a right response for a wrong one at a place, or the reverse.
      misscore: How often it forgets a slip, or counts one too many, when it scores a response.
    """

    checks: tuple[float, ...] = (0.5, 0.3, 0.15, 0.05)
    miscompute: float = 0.03
    misread: float = 0.02
    misscore: float = 0.02

    def __post_init__(self) -> None:
        rates = (self.miscompute, self.misread, self.misscore, *self.checks)
        if not all(0 <= rate <= 1 for rate in rates) or abs(sum(self.checks) - 1) > 1e-6:
            raise UsageError("a teacher's rates must lie from 0 to 1, and those of checks add to 1")
        if len(self.checks) > len(PLACES):
            raise UsageError(f"a teacher cannot check {len(self.checks)} of {len(PLACES)} places")

    def judge(self, comparison: Comparison, rng: random.Random) -> str:
        """Writes a judgement.

        Args:
          comparison: From `grm_jax.data.nano.nano_comparisons`; responses are taken in its order.
          rng: Decides what is checked and where the teacher errs.

        Raises:
          UsageError: If the comparison is of another kind.
        """
        problem = read_problem(comparison.messages[-1]["content"])
        answers = [read_digits(response) for response in comparison.responses]
        count = rng.choices(range(1, len(self.checks) + 1), self.checks)[0]
        places = rng.sample(range(len(PLACES)), count)
        slips = [0] * len(answers)
        analysis = ""
        for place in places:
            right = problem.answer[place]
            if rng.random() < self.miscompute:
                right = (right + rng.choice((-1, 1))) % 10
            analysis += "".join(_rightful(PLACES[place], right))
            for response, answer in enumerate(answers):
                digit = answer[place]
                if rng.random() < self.misread:
                    # It sees what is right where it is not, and the reverse.
                    digit = right if digit != right else (right + rng.choice((-1, 1))) % 10
                slips[response] += digit != right
                analysis += _verdict(response + 1, PLACES[place], digit, digit == right)
        for response, seen in enumerate(slips):
            if rng.random() < self.misscore:
                slips[response] = seen + (rng.choice((-1, 1)) if seen else 1)
        scores = [max(grammar.DEFAULT_LOW, grammar.DEFAULT_HIGH - PENALTY * seen) for seen in slips]
        return (
            grammar.CRITERIA
            + "".join(f" {PLACES[place]}" for place in places)
            + f"\n{grammar.ANALYSIS}{analysis}\n{grammar.SCORES} "
            + grammar.BOX_OPEN
            + ", ".join(map(str, scores))
            + grammar.BOX_CLOSE
        )
