"""What a compiled program costs, read from its text: products, bytes moved and collectives.

XLA's own cost analysis counts the body of a loop once, however often it runs, and a training step
is loops in loops: micro-batches, layers, blocks of the vocabulary. So the text of the compiled
module is read here, and what stands in a loop is counted as often as the loop runs.

- FLOPs are those of matrix products and convolutions (two for each multiply-add), as is the custom
  when a chip's use is measured; all else a program computes is counted by the bytes it moves.
- Bytes moved are what every scheduled operation reads from and writes to the chip's main memory.
  What is fused stays inside; of an array that is only sliced or updated, the slice counts; what
  lies in a faster memory (a layout with `S(1)` on TPUs) does not.
- Collectives are counted by kind and by how many chips take part.

All numbers are those of one chip, since a compiled module is one chip's program.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

from grm_jax.plan.hlo import Array, Computation, Instruction, listed, parse, replica_groups

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# Operations that touch no memory by themselves: they name, or their parts are counted.
_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"),
        *("conditional", "after-all", "partition-id", "replica-id", "iota", "opt-barrier"),
        *("add-dependency", "domain", "async-start", "async-update", "async-done", "copy-done"),
    }
)
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})


class Collective(NamedTuple):
    """What distinguishes one sort of collective from another.

    Attributes:
      kind: One of `COLLECTIVES`.
      chips: How many take part in each.
      across: Whether these lie in different slices, so that it goes over the network.
    """

    kind: str
    chips: int
    across: bool


@dataclass(frozen=True)
class Traffic:
    """How often a collective happens and what each chip gives and takes.

    Attributes:
      count: How often.
      payload: Bytes of the larger of what goes in and what comes out.
      wire: Bytes that leave each chip if parts travel in a ring.
      largest: The payload of the largest single one.
    """

    count: float = 0
    payload: float = 0
    wire: float = 0
    largest: float = 0

    def plus(self, other: "Traffic", times: float) -> "Traffic":
        """With another so many times."""
        return Traffic(
            self.count + times * other.count,
            self.payload + times * other.payload,
            self.wire + times * other.wire,
            max(self.largest, other.largest),
        )


@final
@dataclass
class Cost:
    """What one chip does.

    Attributes:
      flops: In products.
      moved: Bytes.
      collectives: Their traffic.
      kernels: FLOPs that custom kernels state of themselves; part of `flops`.
      unknown: Loops whose number of turns the text does not tell.
    """

    flops: float = 0.0
    moved: float = 0.0
    collectives: dict[Collective, Traffic] = field(default_factory=dict)
    kernels: float = 0.0
    unknown: int = 0

    def add(self, other: "Cost", times: float = 1) -> None:
        """Adds another so many times."""
        self.flops += times * other.flops
        self.moved += times * other.moved
        self.kernels += times * other.kernels
        self.unknown += other.unknown
        for what, traffic in other.collectives.items():
            self.collectives[what] = self.collectives.get(what, Traffic()).plus(traffic, times)


def program_cost(
    text: str,
    *,
    turns: int = 1,
    unroll: bool = True,
    slice_of: Callable[[int], int] = lambda _: 0,
    kernel_flops: Callable[[Instruction, Sequence[Array]], float] = lambda *_: 0.0,
) -> Cost:
    """Reads the cost of a compiled module.

    Args:
      text: From `compiled.as_text()`.
      turns: How often loops run whose number of turns depends on data, such as decoding.
      unroll: Whether loops are multiplied out; otherwise each counts once, as XLA has it.
      slice_of: The slice in which a chip of the module's numbering lies.
      kernel_flops: FLOPs of a custom call with these operands.

    Returns:
      The cost of one chip.
    """
    computations, entry = parse(text)
    reader = _Reader(computations, turns, unroll, slice_of, kernel_flops)
    return reader.cost(entry, fused=False)


@final
class _Reader:
    """Adds up a module's computations, each with all that it calls."""

    def __init__(
        self,
        computations: Mapping[str, Computation],
        turns: int,
        unroll: bool,
        slice_of: Callable[[int], int],
        kernel_flops: Callable[[Instruction, Sequence[Array]], float],
    ) -> None:
        self._computations = computations
        self._turns = turns
        self._unroll = unroll
        self._slice_of = slice_of
        self._kernel_flops = kernel_flops
        self._known: dict[tuple[str, bool], Cost] = {}

    def cost(self, name: str, *, fused: bool) -> Cost:
        """Of a computation; of one that is fused no bytes are counted."""
        if (name, fused) not in self._known:
            total = Cost()
            known = {one.name: one.arrays for one in self._computations[name]}
            for one in self._computations[name]:
                self._add(total, one, known, fused)
            self._known[name, fused] = total
        return self._known[name, fused]

    def _add(
        self,
        total: Cost,
        one: Instruction,
        known: Mapping[str, tuple[Array, ...]],
        fused: bool,
    ) -> None:
        operands = [known.get(operand, ()) for operand in one.operands]
        match one.opcode:
            case "dot" | "ragged-dot":
                total.flops += _dot_flops(one, operands)
            case "convolution":
                total.flops += _convolution_flops(one, operands)
            case "while":
                times, sure = self._trips(one)
                total.unknown += not sure
                body = Cost()
                for part in one.called("body", "condition"):
                    body.add(self.cost(part, fused=fused))
                total.add(body, times)
            case "conditional":
                keys = ("branch_computations", "true_computation", "false_computation")
                branches = [self.cost(part, fused=fused) for part in one.called(*keys)]
                # One of them runs; which one is for the data to say, so the dearest counts.
                total.add(max(branches, key=lambda cost: (cost.flops, cost.moved), default=Cost()))
            case "fusion":
                for part in one.called("calls"):
                    inner = self.cost(part, fused=True)
                    total.add(_scattered(inner) if self._scatters(part) else inner)
            case "call" | "async-start":
                for part in one.called("calls", "to_apply", "called_computations"):
                    total.add(self.cost(part, fused=fused))
            case "custom-call":
                flat = [array for operand in operands for array in operand]
                flops = self._kernel_flops(one, flat)
                total.flops += flops
                total.kernels += flops
                for part in one.called("called_computations"):
                    total.add(self.cost(part, fused=True))
            case _:
                self._add_collective(total, one, operands)
        if not fused and one.opcode not in _FREE:
            total.moved += self._moved(one, operands)

    def _add_collective(
        self, total: Cost, one: Instruction, operands: Sequence[Sequence[Array]]
    ) -> None:
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return
        taken = sum(array.size for operand in operands for array in operand)
        # What starts a collective gives its operands back beside the results.
        given = sum(array.size for array in one.arrays)
        if one.opcode.endswith("-start") and kind != "all-reduce":
            arrays = one.arrays[len(operands) : 2 * len(operands)]
            given = sum(array.size for array in arrays) or given
        chips, across = self._group(one, kind)
        if chips < 2:
            return
        payload = max(taken, given)
        share = (chips - 1) / chips
        wire = {"all-reduce": 2 * share * taken, "collective-permute": taken}
        traffic = Traffic(1, payload, wire.get(kind, share * payload), payload)
        what = Collective(kind, chips, across)
        total.collectives[what] = total.collectives.get(what, Traffic()).plus(traffic, 1)

    def _scatters(self, name: str) -> bool:
        """Whether a fused computation gives a slice of a sum, as TPUs write a reduce-scatter."""
        body = self._computations[name]
        lines = {line.name: line for line in body}
        one = _root(body)
        for opcode in ("dynamic-slice", "all-reduce"):
            while one.opcode == "bitcast":
                one = lines[one.operands[0]]
            if one.opcode != opcode:
                return False
            one = lines[one.operands[0]]
        return True

    def _group(self, one: Instruction, kind: str) -> tuple[int, bool]:
        """How many chips take part, and whether they are of different slices."""
        if kind == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", one.attributes)
            groups = [] if pairs is None else listed(pairs[1] + "}")
            return 2, self._crosses(groups)
        groups = list(replica_groups(one.attributes))
        return max(map(len, groups), default=1), self._crosses(groups)

    def _crosses(self, groups: Iterable[Sequence[int]]) -> bool:
        return any(len({self._slice_of(chip) for chip in group}) > 1 for group in groups)

    def _trips(self, one: Instruction) -> tuple[float, bool]:
        """How often a loop runs, and whether the text says so."""
        if not self._unroll:
            return 1, True
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.attributes)
        if found:
            return int(found[1]), True
        limit = self._limit(one)
        return (self._turns, False) if limit is None else (limit, True)

    def _limit(self, one: Instruction) -> int | None:
        """The constant that a loop counts up to, where its condition is just that."""
        (name,) = one.called("condition")
        lines = {line.name: line for line in self._computations[name]}
        root = next(line for line in lines.values() if line.root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        limit = lines.get(root.operands[1])
        if limit is None or limit.opcode != "constant":
            return None
        value = _constant(limit)
        return None if value is None else -(-value // self._step(one, lines[root.operands[0]]))

    def _step(self, one: Instruction, counter: Instruction) -> int:
        """What a loop adds to its counter in a turn; 1 where its body does not say so plainly.

        A product whose operand comes round from chip to chip takes two parts of it in a turn.
        """
        (name,) = one.called("body")
        lines = {line.name: line for line in self._computations[name]}
        state = _root(self._computations[name])
        place = re.search(r"\bindex=(\d+)", counter.attributes)
        if place is None or state.opcode != "tuple":
            return 1
        following = lines[state.operands[int(place[1])]]
        if following.opcode != "add":
            return 1
        steps = (_constant(lines[operand]) for operand in following.operands)
        return next(filter(None, steps), 1)

    def _moved(self, one: Instruction, operands: Sequence[Sequence[Array]]) -> float:
        """Bytes that an operation reads and writes."""
        given = sum(array.size for array in one.arrays if not array.fast)
        taken = [sum(array.size for array in operand if not array.fast) for operand in operands]
        if one.opcode in _SLICES:
            return 2 * given + sum(taken[1:])
        if one.opcode == "dynamic-update-slice":
            return 2 * taken[1] + sum(taken[2:])
        if one.opcode == "copy-start":
            # It gives the copy, what is copied, and a token.
            return sum(taken) + (0 if one.arrays[0].fast else one.arrays[0].size)
        if one.opcode == "custom-call" and '"AllocateBuffer"' in one.attributes:
            return 0.0
        if one.opcode.endswith("-done"):
            return 0.0
        if one.opcode == "fusion":
            return self._moved_by_fusion(self._body(one), one.arrays, taken)
        if one.opcode.removesuffix("-start") in COLLECTIVES and one.opcode.endswith("-start"):
            return float(given)
        return given + sum(taken)

    def _read(self, body: Computation, name: str, whole: float) -> float:
        """Bytes that a fused computation reads of a value of `whole` bytes.

        Of what is sliced the slices count, and of what is updated in place nothing; fusions may be
        in fusions.
        """
        total = 0.0
        for use, position in _uses(body, name):
            if use.opcode in _SLICES and not position:
                total += sum(array.size for array in use.arrays)
            elif use.opcode == "fusion":
                inner = self._body(use)
                total += self._read(inner, _parameters(inner)[position].name, whole)
            elif use.opcode != "dynamic-update-slice" or position:
                return whole
        return min(total, whole)

    def _written(self, body: Computation, one: Instruction, whole: float) -> float:
        """Bytes that a fused computation writes of a value of `whole` bytes that it gives."""
        lines = {line.name: line for line in body}
        while one.opcode == "bitcast":
            one = lines[one.operands[0]]
        if one.opcode == "dynamic-update-slice":
            return sum(array.size for array in lines[one.operands[1]].arrays)
        if one.opcode == "fusion" and len(one.arrays) == 1:
            inner = self._body(one)
            return self._written(inner, _root(inner), whole)
        return whole

    def _moved_by_fusion(
        self, body: Computation, given: Sequence[Array], taken: Sequence[float]
    ) -> float:
        read = sum(
            self._read(body, parameter.name, taken[place])
            for place, parameter in _parameters(body).items()
            if place < len(taken) and taken[place]
        )
        root, lines = _root(body), {line.name: line for line in body}
        results = [lines[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(results) != len(given):  # several that an inner fusion gives at once
            return read + sum(array.size for array in given if not array.fast)
        pairs = zip(results, given, strict=True)
        return read + sum(
            self._written(body, result, array.size) for result, array in pairs if not array.fast
        )

    def _body(self, fusion: Instruction) -> Computation:
        (name,) = fusion.called("calls")
        return self._computations[name]


def _scattered(cost: Cost) -> Cost:
    """A cost whose sums go to each chip in part, and not whole to all."""
    found = Cost(cost.flops, cost.moved, {}, cost.kernels, cost.unknown)
    for what, traffic in cost.collectives.items():
        if what.kind == "all-reduce":
            what, traffic = (
                what._replace(kind="reduce-scatter"),
                dataclasses.replace(traffic, wire=traffic.wire / 2),
            )
        found.collectives[what] = traffic
    return found


def _constant(one: Instruction) -> int | None:
    """The whole number that an instruction is; None if it is none."""
    value = re.match(r"\((\d+)\)", one.attributes) if one.opcode == "constant" else None
    return int(value[1]) if value else None


def _root(body: Computation) -> Instruction:
    return next(line for line in body if line.root)


def _parameters(body: Computation) -> Mapping[int, Instruction]:
    """A computation's parameters by their numbers."""
    found = {}
    for line in body:
        number = re.match(r"\((\d+)\)", line.attributes) if line.opcode == "parameter" else None
        if number is not None:
            found[int(number[1])] = line
    return found


def _uses(body: Computation, name: str) -> list[tuple[Instruction, int]]:
    """What uses a value in the end, behind bitcasts, and as which operand."""
    found: list[tuple[Instruction, int]] = []
    for line in body:
        for position, operand in enumerate(line.operands):
            if operand == name:
                inside = line.opcode == "bitcast"
                found += _uses(body, line.name) if inside else [(line, position)]
    return found


def _dot_flops(one: Instruction, operands: Sequence[Sequence[Array]]) -> float:
    contracted = one.numbers("lhs_contracting_dims")
    if not operands or not operands[0]:
        return 0.0
    left = operands[0][0].shape
    depth = math.prod(left[axis] for axis in contracted)
    return 2.0 * math.prod(one.arrays[0].shape) * depth


def _convolution_flops(one: Instruction, operands: Sequence[Sequence[Array]]) -> float:
    """TPUs write products as convolutions, with windows where there are batch axes."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None or len(operands) < 2 or not operands[0] or not operands[1]:
        return 0.0
    left, right, out = operands[0][0].shape, operands[1][0].shape, one.arrays[0].shape
    inner = right[labels[2].index("i")]
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    taps = 1.0
    places = {letter: place for place, letter in enumerate(labels[1])}
    settings = _window(window[1]) if window else {}
    for letter, place in ((x, labels[2].index(x)) for x in labels[2] if x.isdigit()):
        axis = int(letter)
        taps *= (
            _valid_taps(
                left[places[letter]],
                right[place],
                out[labels[3].index(letter)],
                stride=_at(settings, "stride", axis, 1),
                low=_pad_low(settings, axis),
                spread=_at(settings, "lhs_dilate", axis, 1),
                step=_at(settings, "rhs_dilate", axis, 1),
            )
            / out[labels[3].index(letter)]
        )
    return 2.0 * math.prod(out) * inner * taps


def _window(text: str) -> Mapping[str, Sequence[str]]:
    pairs = (part.partition("=") for part in text.split())
    return {name: value.split("x") for name, _, value in pairs}


def _at(settings: Mapping[str, Sequence[str]], name: str, axis: int, otherwise: int) -> int:
    values = settings.get(name)
    return int(values[axis]) if values else otherwise


def _pad_low(settings: Mapping[str, Sequence[str]], axis: int) -> int:
    values = settings.get("pad")
    return int(values[axis].split("_")[0]) if values else 0


@functools.cache
def _valid_taps(
    size: int, window: int, out: int, *, stride: int, low: int, spread: int, step: int
) -> int:
    """Pairs of an output and a tap of the window that meet an element and not padding."""
    wide = (size - 1) * spread + 1
    total = 0
    for tap in range(window):
        offset = tap * step - low
        # Outputs `o` with `0 <= o * stride + offset < wide` and on an element.
        first = max(0, math.ceil(-offset / stride))
        last = min(out - 1, (wide - 1 - offset) // stride)
        if last < first:
            continue
        if spread == 1:
            total += last - first + 1
        else:
            total += sum(
                1 for place in range(first, last + 1) if (place * stride + offset) % spread == 0
            )
    return total
