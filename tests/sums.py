"""Comparisons that are short and tell themselves apart."""

from grm_jax.data import Comparison, from_record


def questions(count: int) -> list[Comparison]:
    """So many sums with two answers each."""
    return [
        from_record(
            {
                "id": str(number),
                "messages": [{"role": "user", "content": f"What is {number} + 1?"}],
                "responses": [str(number + 1), f"It is {number}."],
            }
        )
        for number in range(count)
    ]
