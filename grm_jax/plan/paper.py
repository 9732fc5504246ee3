"""A program's cost counted on paper, for chips that nothing here compiles for.

Bytes of arguments are exact. All else is an estimate in the terms of the decoder: what a layer
holds while it is computed, what is kept for the gradient, and the collectives that one would write
by hand. Reports say so.
"""

import math
from typing import NamedTuple, final

import jax

from grm_jax.models import DecoderConfig
from grm_jax.models.kernels import ROWS
from grm_jax.plan.chips import Topology
from grm_jax.plan.costs import Collective, Cost, Traffic
from grm_jax.plan.report import Memory, ProgramReport
from grm_jax.plan.sizes import Arguments, report_of, shard_bytes
from grm_jax.plan.stages import Program, Stage
from grm_jax.plan.work import Decoded, Pass, flops


@final
class _Shape(NamedTuple):
    """What the estimates depend on.

    Attributes:
      config: The decoder's.
      rows: Over how many chips rows are shared out: `data`, `fsdp` and `expert`.
      copies: `data`.
      parts: `fsdp`.
      tensor: `tensor`.
      experts: `expert`.
      accumulate: Micro-batches.
      chunk: Entries of the vocabulary at a time.
      params: Bytes of one chip's part of what learns.
      frozen: Of what does not.
      weights: Bytes of all parameters in the type they are computed in.
    """

    config: DecoderConfig
    rows: int
    copies: int
    parts: int
    tensor: int
    experts: int
    accumulate: int
    chunk: int
    params: int
    frozen: int
    weights: int


def count_on_paper(
    program: Program,
    stage: Stage,
    topology: Topology,
    arguments: Arguments,
    *,
    beside: int,
    needs: int | None = None,
) -> ProgramReport:
    """Estimates what a program costs.

    Args:
      program: The program.
      stage: Its stage.
      topology: The chips.
      arguments: Bytes of its arguments.
      beside: Bytes that the run holds besides.
      needs: What a compiler says that it takes, if one was asked.
    """
    shape = _shape(stage, program)
    given = sum(map(shard_bytes, jax.tree.leaves(program.gives)))
    cost = Cost(
        flops=flops(stage.config, program.work, topology.chip.kind) / topology.chips,
        moved=_moved(shape, program) + given,
    )
    for what, traffic in _collectives(shape, program, topology).items():
        if what.chips > 1:
            cost.collectives[what] = traffic
    if given and topology.chips > 1:
        # What is to lie elsewhere may come from any chip.
        what = Collective("all-to-all", topology.chips, topology.chips > topology.reach)
        cost.collectives[what] = Traffic(1, given, given, given)
    # A step gives a state in the place of the one that it takes.
    learns = any(one.learns for one in program.work.passes)
    replaced = arguments.held if learns else 0
    memory = Memory(
        arguments=arguments.used,
        outputs=replaced + given,
        aliased=replaced,
        temporaries=int(_temporaries(shape, program)),
        code=0,
        beside=beside,
        capacity=int(topology.chip.memory),
    )
    loops = program.turns if program.turns > 1 else 0
    return report_of(
        program, stage, topology, cost, memory, method="analytic", loops=loops, needs=needs
    )


def _shape(stage: Stage, program: Program) -> _Shape:
    sizes = program.mesh.shape
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((stage.params, stage.frozen)))
    return _Shape(
        config=stage.config,
        rows=sizes["data"] * sizes["fsdp"] * sizes["expert"],
        copies=sizes["data"],
        parts=sizes["fsdp"],
        tensor=sizes["tensor"],
        experts=sizes["expert"],
        accumulate=stage.accumulate,
        chunk=stage.chunk,
        params=sum(map(shard_bytes, jax.tree.leaves(stage.params))),
        frozen=sum(map(shard_bytes, jax.tree.leaves(stage.frozen))),
        weights=whole * _width(stage.config),
    )


def _width(config: DecoderConfig) -> int:
    """Bytes of a number that is computed with."""
    return 4 if config.dtype == "float32" else 2


def _layer_weights(shape: _Shape) -> float:
    """Bytes of a layer's kernels on a chip once they are gathered."""
    return shape.weights / shape.config.num_layers / shape.tensor / shape.experts


def _pass_rows(shape: _Shape, one: Pass) -> float:
    """Rows that a chip has at a time."""
    parts = shape.accumulate if one.learns or one.logits else 1
    return max(one.rows / parts / shape.rows, 1.0)


def _token_bytes(shape: _Shape) -> float:
    """Bytes of a token's activations in one layer on a chip, none of which are thrown away."""
    c = shape.config
    wide, hidden = 6, c.mlp_dim
    if c.experts is not None:
        # A chip has room for all that its experts may be sent, by all chips that keep others: rows
        # in the type that is computed with, and products in float32.
        places = c.experts.per_token * shape.experts
        wide, hidden = wide + 3 * places, places * c.experts.mlp_dim + c.experts.shared_dim
    split = 2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim + 3 * hidden
    return _width(c) * (wide * c.width + split / shape.tensor)


def _temporaries(shape: _Shape, program: Program) -> float:
    c, work = shape.config, program.work
    most = 0.0
    for one in work.passes:
        tokens = _pass_rows(shape, one) * one.tokens
        # A layer at work, and the next one's kernels on their way.
        need = 2 * tokens * _token_bytes(shape) + 2 * _layer_weights(shape)
        if one.logits:
            targets = _pass_rows(shape, one) * one.targets
            need += 4 * 4 * targets * min(shape.chunk, c.vocab_size) / shape.tensor
        # Scores of a block of the branches' queries, and what becomes of them.
        scores = one.branches * min(one.behind, ROWS) * (one.length + one.behind)
        need += 2 * 4 * _pass_rows(shape, one) * scores * c.num_heads / shape.tensor
        if one.learns:
            kept = _width(c) * c.width if c.remat else _token_bytes(shape)
            need += c.num_layers * tokens * kept
            # The sum of gradients, and that of a micro-batch.
            need += 2 * shape.params
        most = max(most, need)
    if work.decoded is not None:
        most = max(most, _decoding(shape, work.decoded))
    return most


def _decoding(shape: _Shape, one: Decoded) -> float:
    c = shape.config
    prompts = max(one.prompts / shape.rows, 1.0)
    samples = prompts * one.samples
    heads = min(shape.tensor, c.cache_heads[0])
    cache = _width(c) * c.cache_width * (prompts * one.prompt + samples * one.tokens) / heads
    cast = (shape.params + shape.frozen) / 4 * _width(c)
    return cache + cast + _layer_weights(shape) * 2 + 3 * 4 * samples * c.vocab_size / shape.tensor


def _moved(shape: _Shape, program: Program) -> float:
    """Every kernel once for each pass, and each token's activations twice in every layer."""
    c, work = shape.config, program.work
    weights = shape.weights / shape.tensor / shape.experts
    total = 0.0
    for one in work.passes:
        turns = (3 + c.remat if one.learns else 1) * (
            shape.accumulate if one.learns or one.logits else 1
        )
        rows = max(one.rows / shape.rows, 1.0)
        total += turns * weights
        each = 2 * _token_bytes(shape) * (3 + c.remat if one.learns else 1)
        total += c.num_layers * rows * one.tokens * each
        if one.learns:
            # Parameters, both moments and the gradient, read and written.
            total += 8 * shape.params
    if work.decoded is not None:
        one_decoded = work.decoded
        prompts = max(one_decoded.prompts / shape.rows, 1.0)
        heads = min(shape.tensor, c.cache_heads[0])
        cached = _width(c) * c.cache_width / heads
        each = prompts * (one_decoded.prompt + one_decoded.samples * one_decoded.tokens) * cached
        total += one_decoded.tokens * (weights + each)
    return total


def _collectives(shape: _Shape, program: Program, topology: Topology) -> dict[Collective, Traffic]:
    c, work = shape.config, program.work
    found: dict[Collective, Traffic] = {}

    def add(kind: str, chips: int, inner: int, count: float, payload: float) -> None:
        # The mesh's last axes are neighbours, so a group reaches as far as what lies inside it.
        what = Collective(kind, chips, chips * inner > topology.reach)
        wire = payload * (chips - 1) / chips * (2 if kind == "all-reduce" else 1)
        found[what] = found.get(what, Traffic()).plus(Traffic(1, payload, wire, payload), count)

    def met(tokens: float, times: float) -> None:
        """Sums behind attention and the MLP; tokens to experts that are elsewhere, and back."""
        payload = tokens * c.width * _width(c)
        add("all-reduce", shape.tensor, shape.experts, 2 * times, payload)
        if c.experts is not None:
            for kind in ("all-gather", "reduce-scatter"):
                add(kind, shape.experts, 1, times, payload * shape.experts)

    inner = shape.tensor * shape.experts
    layer = _layer_weights(shape)
    for one in work.passes:
        parts = shape.accumulate if one.learns or one.logits else 1
        turns = parts * (2 if one.learns else 1)
        add("all-gather", shape.parts, inner, turns * c.num_layers, layer)
        tokens = max(one.rows / parts / shape.rows, 1.0) * one.tokens
        times = parts * (2 + c.remat if one.learns else 1) * c.num_layers
        met(tokens, times)
        if one.learns:
            whole = shape.params * shape.parts
            add("reduce-scatter", shape.parts, inner, parts, whole)
            add("all-reduce", shape.copies, inner * shape.parts, parts, shape.params)
    if work.decoded is not None:
        turns, samples = work.decoded.tokens, work.decoded.prompts * work.decoded.samples
        add("all-gather", shape.parts, inner, turns * c.num_layers, layer)
        rows = max(samples / shape.rows, 1.0)
        met(rows, turns * c.num_layers)
    return found
