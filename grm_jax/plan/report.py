"""What a plan says, as data."""

import dataclasses
from typing import Any, Literal, final

from grm_jax.plan.chips import Topology
from grm_jax.plan.costs import Cost

Method = Literal["compiled", "analytic"]
Term = Literal["compute", "memory", "links", "network"]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one chip's main memory.

    Attributes:
      arguments: What the program is given.
      outputs: What it gives; some of it in the place of arguments.
      aliased: How much of it.
      temporaries: What it needs in between.
      code: The program itself.
      beside: What the run holds in memory meanwhile that this program does not touch.
      capacity: What the chip has.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    beside: int
    capacity: int

    @property
    def peak(self) -> int:
        """What the program needs at its worst."""
        inside = self.arguments + self.outputs - self.aliased
        return inside + self.temporaries + self.code

    @property
    def total(self) -> int:
        """With what lies beside it."""
        return self.peak + self.beside

    @property
    def fits(self) -> bool:
        """Whether the chip has that much."""
        return self.total <= self.capacity


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """One sort of collective in a program.

    Attributes:
      kind: As XLA calls it.
      chips: How many take part in each.
      across: Whether they are of different slices or nodes.
      count: How often it happens.
      payload: Bytes that are gathered, reduced or sent, for each chip.
      wire: Bytes that leave each chip.
      largest: The payload of the largest single one.
    """

    kind: str
    chips: int
    across: bool
    count: float
    payload: float
    wire: float
    largest: float


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time that a program can take, by what the chip can do in it.

    Attributes:
      compute: Seconds of products at the chip's peak.
      memory: Seconds of its main memory.
      links: Seconds of its links.
      network: Seconds of its share of the network.
    """

    compute: float
    memory: float
    links: float
    network: float

    @property
    def seconds(self) -> float:
        """Of the longest, if all are overlapped perfectly."""
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def binds(self) -> Term:
        """Which is the longest."""
        terms: dict[Term, float] = {
            "compute": self.compute,
            "memory": self.memory,
            "links": self.links,
            "network": self.network,
        }
        return max(terms, key=lambda term: terms[term])


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """One program.

    Attributes:
      name: What it is called.
      method: Whether its figures were read from the compiled program or counted on paper.
      memory: Of a chip.
      needs: What the compiler says a chip would have to hold, where that is more than it has and
        there is no program; else None.
      flops: Of a chip, in matrix products.
      analytic_flops: The same, counted on paper and shared out evenly.
      model_flops: What all chips have to compute at the least, over their number.
      moved: Bytes to and from a chip's memory.
      traffic: Its collectives.
      bound: The least time it can take.
      tokens: What all chips together learn from or write in one call.
      times: Calls in a step.
      loops: How many turns loops were taken to have whose end depends on data; 0 without such.
      seconds: That compiling took.
    """

    name: str
    method: Method
    memory: Memory
    needs: int | None
    flops: float
    analytic_flops: float
    model_flops: float
    moved: float
    traffic: tuple[Traffic, ...]
    bound: Bound
    tokens: int
    times: int
    loops: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether a chip can hold it."""
        return self.needs is None and self.memory.fits

    @property
    def total(self) -> int:
        """Bytes that a chip has to hold."""
        return self.memory.total if self.needs is None else self.needs + self.memory.beside

    @property
    def tokens_per_second(self) -> float:
        """At the bound."""
        return self.tokens / self.bound.seconds if self.bound.seconds else 0.0


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A change to the configuration that makes a stage fit.

    Attributes:
      overrides: For the command line.
      total: Bytes that a chip then has to hold.
    """

    overrides: tuple[str, ...]
    total: int


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class StageReport:
    """One stage.

    Attributes:
      name: In the configuration.
      kind: What it does.
      model: Which it trains.
      parameters: Of the model, all experts included.
      mesh: Sizes of its axes.
      state: Bytes that a chip holds throughout: parameters, optimiser, reference.
      programs: In the order in which a step runs them.
      change: The nearest change that fits; None if none is needed or was found.
      note: What there is to say where it does not fit.
    """

    name: str
    kind: str
    model: str
    parameters: int
    mesh: dict[str, int]
    state: int
    programs: tuple[ProgramReport, ...]
    change: Change | None = None
    note: str = ""

    @property
    def fits(self) -> bool:
        """Whether all of its programs do."""
        return all(program.fits for program in self.programs)

    @property
    def step_seconds(self) -> float:
        """The bound on a step."""
        return sum(program.times * program.bound.seconds for program in self.programs)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A plan.

    Attributes:
      config: What was planned.
      topology: For what.
      stages: Each of it.
    """

    config: str
    topology: Topology
    stages: tuple[StageReport, ...]

    @property
    def fits(self) -> bool:
        """Whether all stages do."""
        return all(stage.fits for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        return {
            "fits": self.fits,
            "config": self.config,
            "topology": self.topology.text,
            "chip": self.topology.chip.name,
            "chips": self.topology.chips,
            "slices": self.topology.slices,
            "stages": [_stage(stage) for stage in self.stages],
        }


def traffic_of(cost: Cost) -> tuple[Traffic, ...]:
    """The collectives of a cost, those with most bytes first."""
    found = [
        Traffic(
            kind=what.kind,
            chips=what.chips,
            across=what.across,
            count=traffic.count,
            payload=traffic.payload,
            wire=traffic.wire,
            largest=traffic.largest,
        )
        for what, traffic in cost.collectives.items()
    ]
    return tuple(sorted(found, key=lambda one: -one.wire))


def _stage(stage: StageReport) -> dict[str, Any]:
    return {
        "name": stage.name,
        "kind": stage.kind,
        "model": stage.model,
        "parameters": stage.parameters,
        "fits": stage.fits,
        "mesh": stage.mesh,
        "state_bytes": stage.state,
        "step_seconds": stage.step_seconds,
        "change": None if stage.change is None else dataclasses.asdict(stage.change),
        "note": stage.note,
        "programs": [_program(program) for program in stage.programs],
    }


def _program(program: ProgramReport) -> dict[str, Any]:
    memory = program.memory
    return {
        "name": program.name,
        "method": program.method,
        "fits": program.fits,
        "memory": {
            **dataclasses.asdict(memory),
            "peak": memory.peak if program.needs is None else program.needs,
            "total": program.total,
        },
        "flops": program.flops,
        "analytic_flops": program.analytic_flops,
        "model_flops": program.model_flops,
        "bytes_moved": program.moved,
        "collectives": [dataclasses.asdict(one) for one in program.traffic],
        "bound": {
            **dataclasses.asdict(program.bound),
            "seconds": program.bound.seconds,
            "binds": program.bound.binds,
        },
        "tokens": program.tokens,
        "tokens_per_second": program.tokens_per_second,
        "times": program.times,
        "assumed_loop_turns": program.loops,
        "compile_seconds": program.seconds,
    }
