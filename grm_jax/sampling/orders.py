"""In which order a sample sees the responses, from a hash and so from nothing else."""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, get_args

from grm_jax.errors import UsageError

OrderPolicy = Literal["shuffle", "balanced", "fixed"]
ORDER_POLICIES: tuple[str, ...] = get_args(OrderPolicy)


def response_orders(
    policy: str, *, record_id: str, num_responses: int, samples: int, seed: int
) -> list[tuple[int, ...]]:
    """The order in which each sample is shown the responses.

    Args:
      policy: `"shuffle"`: each sample has its own random order (the paper's way). `"balanced"`:
        orders are used equally often, as far as `samples` allows: within any N consecutive samples
        every response is at every place once, and within N! every order is used once. `"fixed"`:
        always the input order.
      record_id: The record's name.
      num_responses: N.
      samples: K.
      seed: The run's seed.

    Returns:
      K tuples; entry j of a tuple is the input index of the response shown at place j.

    Raises:
      UsageError: If there is no such policy.
    """
    everyone = range(num_responses)
    if policy == "fixed":
        return [tuple(everyone)] * samples
    if policy == "shuffle":
        return [_shuffled(everyone, seed, record_id, sample) for sample in range(samples)]
    if policy == "balanced":
        names = _shuffled(everyone, seed, record_id, "balanced")
        return [
            tuple(names[place] for place in _balanced(num_responses, sample))
            for sample in range(samples)
        ]
    raise UsageError(f"there is no order {policy!r}; choose one of {', '.join(ORDER_POLICIES)}")


def _shuffled(items: Sequence[int], *parts: object) -> tuple[int, ...]:
    def draw(item: int) -> bytes:
        text = "\0".join(str(part) for part in (*parts, item))
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()

    return tuple(sorted(items, key=draw))


def _balanced(size: int, sample: int) -> list[int]:
    """Rotation `sample % size` of the cyclic arrangement numbered `sample // size`."""
    number = (sample // size) % math.factorial(size - 1)
    rest = list(range(1, size))
    arrangement = [0]
    while rest:
        place, number = divmod(number, math.factorial(len(rest) - 1))
        arrangement.append(rest.pop(place))
    turn = sample % size
    return arrangement[turn:] + arrangement[:turn]
