"""Comparisons, the record everything is made of, and judgements of them.

What training needs beside is imported by its own name, as it takes large libraries along:
`grm_jax.data.builders` (TFDS datasets), `grm_jax.data.pipeline` (batches that can be resumed) and
`grm_jax.data.packing` (token sequences in arrays).
"""

from grm_jax.data.comparison import (
    BadRecord,
    BestLabel,
    Comparison,
    Label,
    Message,
    PointwiseLabel,
    ScoresLabel,
    best_index,
    examples_path,
    from_record,
    read_comparisons,
    to_record,
    turns,
)
from grm_jax.data.judgement import Judgement, Sample
from grm_jax.data.output import LineWriter, provenance, to_line

__all__ = [
    "BadRecord",
    "BestLabel",
    "Comparison",
    "Judgement",
    "Label",
    "LineWriter",
    "Message",
    "PointwiseLabel",
    "Sample",
    "ScoresLabel",
    "best_index",
    "examples_path",
    "from_record",
    "provenance",
    "read_comparisons",
    "to_line",
    "to_record",
    "turns",
]
