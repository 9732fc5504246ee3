"""Chips and the ways they are put together, with no chip at hand.

A topology is written as `CHIP:SHAPE`: `v5p:4x4x8` is one slice of 128 chips, `v5e:16x16*2` two
slices of 256 joined by the data-centre network, `h100:8` eight GPUs and `cpu:8` eight simulated
devices.
"""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, final

import jax
from jax.experimental import topologies

from grm_jax.distributed import make_mesh
from grm_jax.errors import UsageError

Kind = Literal["tpu", "gpu", "cpu"]

GIB = 2**30


@final
@dataclass(frozen=True, kw_only=True)
class Chip:
    """What a maker publishes of a chip.

    Attributes:
      name: As in a topology.
      kind: Who compiles for it.
      flops: Products of bfloat16 matrices, dense, in a second.
      memory: Bytes of its main memory that a program can have.
      speed: Bytes a second to and from that memory.
      link: Bytes a second that it can send to chips of its slice or node, over all links at once.
      network: Bytes a second that it can send to other slices or nodes.
      node: Chips that `link` reaches; 0 for a whole slice.
      axes: Axes of a slice's shape.
      most: Chips of the largest slice.
      variant: How the compiler is told to join two cores, where it would not by itself.
    """

    name: str
    kind: Kind
    flops: float
    memory: float
    speed: float
    link: float
    network: float
    node: int = 0
    axes: int = 1
    most: int = 1 << 20
    variant: str | None = None


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; links one way, which is half of what is
# called bidirectional there; what a host sends to the network is shared by its chips. The memory is
# what libtpu's compiler itself says that programs have. GPUs: NVIDIA's data sheets of the SXM
# modules, dense; NVLink one way; one adapter of 200 (A100) or 400 Gb/s a GPU.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip(
                name="v4",
                kind="tpu",
                flops=275e12,
                memory=32 * GIB,
                speed=1228e9,
                link=300e9,
                network=6.25e9,
                axes=3,
                most=4096,
                variant="megacore",
            ),
            Chip(
                name="v5e",
                kind="tpu",
                flops=197e12,
                memory=15.75 * GIB,
                speed=819e9,
                link=200e9,
                network=3.125e9,
                axes=2,
                most=256,
            ),
            Chip(
                name="v5p",
                kind="tpu",
                flops=459e12,
                memory=95.74 * GIB,
                speed=2765e9,
                link=600e9,
                network=6.25e9,
                axes=3,
                most=6144,
            ),
            Chip(
                name="v6e",
                kind="tpu",
                flops=918e12,
                memory=31.25 * GIB,
                speed=1638e9,
                link=400e9,
                network=12.5e9,
                axes=2,
                most=256,
            ),
            Chip(
                name="a100",
                kind="gpu",
                flops=312e12,
                memory=80e9,
                speed=2039e9,
                link=300e9,
                network=25e9,
                node=8,
            ),
            Chip(
                name="h100",
                kind="gpu",
                flops=989.4e12,
                memory=80e9,
                speed=3350e9,
                link=450e9,
                network=50e9,
                node=8,
            ),
            Chip(
                name="h200",
                kind="gpu",
                flops=989.4e12,
                memory=141e9,
                speed=4800e9,
                link=450e9,
                network=50e9,
                node=8,
            ),
            Chip(
                name="b200",
                kind="gpu",
                flops=2250e12,
                memory=180e9,
                speed=8000e9,
                link=900e9,
                network=50e9,
                node=8,
            ),
            # A simulated device is no chip: its figures are those of nothing in particular, so that
            # bounds can be told apart in tests and never be taken for a machine's.
            Chip(
                name="cpu",
                kind="cpu",
                flops=1e11,
                memory=float(64 * GIB),
                speed=2e10,
                link=1e10,
                network=1e10,
            ),
        )
    }
)


@final
@dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips that are asked for.

    Attributes:
      text: As it was written.
      chip: What they are.
      shape: Of one slice.
      slices: How many of these.
    """

    text: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def reach(self) -> int:
        """Chips that are joined by links: those of a slice, or of a node."""
        return self.chip.node or math.prod(self.shape)


def parse_topology(text: str) -> Topology:
    """Reads a topology; see the module.

    Raises:
      UsageError: There is none such.
    """
    name, colon, rest = text.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        near = difflib.get_close_matches(name, CHIPS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"topology {text!r}: no chip {name!r} among {', '.join(CHIPS)}{hint}")
    form = "x".join("ABC"[: chip.axes])
    example = {1: "8", 2: "4x8", 3: "4x4x8"}[chip.axes]
    found = re.fullmatch(r"(\d+(?:x\d+)*)(?:\*(\d+))?", rest)
    if not colon or found is None:
        raise UsageError(
            f"topology {text!r}: write {name}:{form} as in {name}:{example}, and *S behind it for "
            "S slices"
        )
    shape = tuple(int(size) for size in found[1].split("x"))
    slices = int(found[2] or 1)
    if len(shape) != chip.axes or not all(shape) or not slices:
        raise UsageError(
            f"topology {text!r}: {name} has {chip.axes} axes of at least 1, as in {name}:{example}"
        )
    if slices > 1 and chip.kind != "tpu":
        raise UsageError(f"topology {text!r}: only TPUs have slices; write how many there are")
    if math.prod(shape) > chip.most:
        raise UsageError(
            f"topology {text!r}: a slice of {name} has at most {chip.most} chips; write *S behind "
            "a smaller shape to join S slices"
        )
    return Topology(text=text, chip=chip, shape=shape, slices=slices)


def devices_of(topology: Topology) -> Sequence[jax.Device]:
    """Devices to compile for.

    Those of TPUs are made by libtpu, which needs no TPU for it; it reads its settings from the
    environment, where those that are missing are filled in so that it asks no metadata server and
    minds no other process. Simulated devices must be there (`jax_num_cpu_devices`); they stand in
    for GPUs as well, for which nothing is compiled.

    Raises:
      UsageError: libtpu is not installed, it knows no such slice, or there are too few devices.
    """
    match topology.chip.kind:
        case "tpu":
            return _tpu_devices(topology)
        case _:
            devices = jax.devices("cpu")
            if len(devices) < topology.chips:
                raise UsageError(
                    f"topology {topology.text!r}: JAX was started with {len(devices)} devices; set "
                    f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.chips}"
                )
            return devices[: topology.chips]


# How libtpu is kept from looking for the machine that it is not on, and from saying so.
_QUIET: Mapping[str, str] = MappingProxyType(
    {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Compiling uses no chip, so several processes may do it, beside one that does use one.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
)


def _tpu_devices(topology: Topology) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "compiling for TPUs needs libtpu, which is not installed (it needs no TPU): install "
            "jax[tpu], or this package with its extra [tpu]"
        )
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    chip = topology.chip
    options: dict[str, object] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if chip.variant is not None:
        options["chip_config_name"] = chip.variant
    shape = "x".join(map(str, topology.shape))
    try:
        found = topologies.get_topology_desc(
            topology_name=f"{chip.name}:{shape}", platform="tpu", **options
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"topology {topology.text!r}: {reason}") from error
    return found.devices


def mesh_on(
    topology: Topology, shape: Mapping[str, int], devices: Sequence[jax.Device]
) -> jax.sharding.Mesh:
    """`make_mesh` on the devices of a topology.

    Raises:
      UsageError: As `make_mesh`, or the axes of the mesh do not follow those of the slice.
    """
    try:
        return make_mesh(shape, devices)
    except NotImplementedError as error:
        wanted = ", ".join(f"{axis}={size}" for axis, size in shape.items() if size != 1)
        raise UsageError(
            f"mesh {wanted} cannot be laid on {topology.text}: each of its axes must be a product "
            "of whole axes of the slice"
        ) from error
