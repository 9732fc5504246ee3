"""Records that are kept from training to measure what was learnt, and how it is measured."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jax.typing import ArrayLike

Record = TypeVar("Record")


def is_held_out(comparison_id: str, share: float) -> bool:
    """Whether a comparison is kept from training.

    That follows from its id alone, so all that is made of one comparison, such as its pairs or the
    judgements of it, is on one side, in every run and whatever else is in the data.

    Args:
      comparison_id: Its id.
      share: How many comparisons are kept, from 0 to 1; those of a smaller share are among those
        of a larger one.
    """
    digest = hashlib.blake2b(comparison_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def evenly(records: Sequence[Record], limit: int) -> list[Record]:
    """At most `limit` records, as far from one another as can be; all of them if it is 0."""
    if not limit or len(records) <= limit:
        return list(records)
    return [records[index * len(records) // limit] for index in range(limit)]


def auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """The chance that a positive item has a higher score than a negative one, ties as a half.

    The area under the ROC curve, by the statistic of Mann and Whitney, which integer scores with
    their many ties need. An item without a score (NaN) is a tie with every other.

    Args:
      scores: `f[n]`.
      positive: `bool[n]`.

    Returns:
      From 0 to 1; NaN if all items are of one kind.
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    pairs = int(positive.sum()) * int((~positive).sum())
    if pairs == 0:
        return float("nan")
    known = ~np.isnan(scores)
    kinds = positive[known]
    _, place, group = np.unique(scores[known], return_inverse=True, return_counts=True)
    # The mean rank of equal scores, from 1.
    ranks = (np.cumsum(group) - (group - 1) / 2)[place]
    positives = int(kinds.sum())
    compared = positives * (len(kinds) - positives)
    won = ranks[kinds].sum() - positives * (positives + 1) / 2
    return float((won + (pairs - compared) / 2) / pairs)
