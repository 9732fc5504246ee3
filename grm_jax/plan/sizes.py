"""Bytes of shards, and the report of a program whose cost is known."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import partial_eval

from grm_jax.plan.chips import Topology
from grm_jax.plan.costs import Cost
from grm_jax.plan.report import Bound, Memory, Method, ProgramReport, traffic_of
from grm_jax.plan.stages import Program, Stage
from grm_jax.plan.work import flops, model_flops


class Arguments(NamedTuple):
    """Bytes that a chip is given.

    Attributes:
      used: Of the arguments that the program reads; others never reach it.
      held: Of these, what is in memory throughout the run.
    """

    used: int
    held: int


def argument_bytes(program: Program, jaxpr: Any) -> Arguments:
    """What of the arguments a traced program reads, in bytes of one chip's shards.

    Args:
      program: The program.
      jaxpr: What it was traced to, a `ClosedJaxpr`. What it does not read in the end is dropped
        when it is compiled, by the rule that is asked here.
    """
    outputs = [True] * len(jaxpr.jaxpr.outvars)
    _, _, used = partial_eval.dce_jaxpr_consts(jaxpr.jaxpr, outputs)
    places = [
        (place in program.held, shard_bytes(leaf))
        for place, argument in enumerate(program.arguments)
        for leaf in jax.tree.leaves(argument)
    ]
    read = [one for one, kept in zip(places, used, strict=True) if kept]
    return Arguments(sum(size for _, size in read), sum(size for held, size in read if held))


def held_bytes(trees: Any) -> int:
    """Bytes of one chip's shards of all arrays in trees."""
    return sum(shard_bytes(leaf) for leaf in jax.tree.leaves(trees))


def shard_bytes(leaf: Any) -> int:
    """Bytes of one chip's part of an array; a plain number is whole everywhere."""
    sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
    shape = np.shape(leaf) if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def bound_of(cost: Cost, topology: Topology) -> Bound:
    """The least time in which the topology's chips can do all this."""
    chip = topology.chip
    near = sum(one.wire for what, one in cost.collectives.items() if not what.across)
    far = sum(one.wire for what, one in cost.collectives.items() if what.across)
    return Bound(
        compute=cost.flops / chip.flops,
        memory=cost.moved / chip.speed,
        links=near / chip.link,
        network=far / chip.network,
    )


def report_of(
    program: Program,
    stage: Stage,
    topology: Topology,
    cost: Cost,
    memory: Memory,
    *,
    method: Method,
    loops: int,
    needs: int | None = None,
    seconds: float = 0.0,
) -> ProgramReport:
    """What a program costs, beside what its work would cost by hand.

    Args:
      program: The program.
      stage: Its stage.
      topology: The chips.
      cost: Of one chip.
      memory: Of one chip.
      method: Where both are from.
      loops: How many turns loops were taken to have whose end depends on data.
      needs: What a compiler says that a chip would have to hold, if it does not fit.
      seconds: That compiling took.
    """
    return ProgramReport(
        name=program.name,
        method=method,
        memory=memory,
        needs=needs,
        flops=cost.flops,
        analytic_flops=flops(stage.config, program.work, topology.chip.kind) / topology.chips,
        model_flops=model_flops(stage.config, program.work) / topology.chips,
        moved=cost.moved,
        traffic=traffic_of(cost),
        bound=bound_of(cost, topology),
        tokens=program.tokens,
        times=program.times,
        loops=loops,
        seconds=seconds,
    )
