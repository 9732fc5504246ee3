"""Bytes of shards, and the least time that a cost takes."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import partial_eval

from grm_jax.plan.chips import Topology
from grm_jax.plan.hlo import Cost
from grm_jax.plan.report import Bound
from grm_jax.plan.stages import Program


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
