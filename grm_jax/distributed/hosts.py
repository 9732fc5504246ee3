"""Several hosts as one: how processes find each other, and how they end together.

Each host runs the same command. Whoever starts them says who they are in the environment:

- Cloud TPU and GKE say it by themselves, and so do SLURM (`srun`) and Open MPI (`mpirun`);
- anybody else sets `JAX_COORDINATOR_ADDRESS` (host and port of process 0), `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID`, and `JAX_LOCAL_DEVICE_IDS` where a process is to have some of a host's devices.

A process that dies takes the others with it: they notice by the connection that breaks, or by a
heartbeat that stays away, and end rather than wait. The same command then goes on from the last
checkpoint.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from grm_jax.errors import UsageError

HEARTBEAT = 40
"""Seconds without a sign of life after which a process is taken for dead."""

START = 300
"""Seconds that processes wait for each other at the start."""

FINISH = 30
"""Seconds that processes wait for each other at the end."""

LOST = 1
"""Exit status of a process that ends because of another."""

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_OPEN_MPI_URI = "OMPI_MCA_orte_hnp_uri"


class Place(NamedTuple):
    """A process among others; what is None is left for JAX to find out.

    Attributes:
      coordinator: Host and port of process 0.
      processes: How many there are.
      number: Which this is, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    number: int | None = None


def place_of(environment: Mapping[str, str]) -> Place:
    """Reads from the environment which process this is.

    Args:
      environment: Such as `os.environ`.

    Raises:
      UsageError: What is said is incomplete or no number.
    """
    address, *numbers = _EXPLICIT
    coordinator = environment.get(address)
    if any(name in environment for name in numbers):
        missing = [name for name in _EXPLICIT if not environment.get(name)]
        if missing:
            raise UsageError(
                f"{' and '.join(missing)} must be set too: processes are told who they are by "
                f"{', '.join(_EXPLICIT)}"
            )
        return _checked(environment, coordinator, *numbers)
    if all(name in environment for name in _OPEN_MPI) and _OPEN_MPI_URI not in environment:
        # From version 5 on, Open MPI no longer tells where the first process is.
        if not coordinator:
            raise UsageError(
                f"Open MPI does not say where process 0 is; set {address} to its host and a free "
                "port, as in mpirun -x JAX_COORDINATOR_ADDRESS=host0:12345"
            )
        return _checked(environment, coordinator, *_OPEN_MPI)
    return Place(coordinator)


def _checked(
    environment: Mapping[str, str], coordinator: str | None, count: str, index: str
) -> Place:
    values = {}
    for name in (count, index):
        if not environment[name].isdecimal():
            raise UsageError(f"{name} is {environment[name]!r}; it must be a whole number")
        values[name] = int(environment[name])
    if values[index] >= values[count]:
        raise UsageError(
            f"{index} is {values[index]}, but there are {values[count]} processes ({count}), "
            "counted from 0"
        )
    return Place(coordinator, values[count], values[index])


def join() -> None:
    """Joins the other processes; to be called before anything else is asked of JAX.

    Raises:
      UsageError: The environment does not say who this process is, or the others do not come.
    """
    place = place_of(os.environ)
    try:
        jax.distributed.initialize(
            coordinator_address=place.coordinator,
            num_processes=place.processes,
            process_id=place.number,
            initialization_timeout=START,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=FINISH,
        )
    except ValueError as error:
        raise UsageError(
            f"nothing says which process of how many this is ({error}); start it by srun, mpirun "
            f"or on a TPU pod, or set {', '.join(_EXPLICIT)}"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the other processes cannot be reached: {reason}") from error


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends this process at once if something fails while it is one of several.

    Without it, a process whose partner is gone would wait for it at the end as well, and one that
    fails alone would leave the others waiting. A `UsageError` passes, as all processes come to the
    same.
    """
    try:
        yield
    except (UsageError, KeyboardInterrupt):
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        reason = " ".join(str(error).split())[:200]
        print(
            f"grm-jax: process {jax.process_index()} of {jax.process_count()} ends: {reason}; "
            "if it speaks of a connection or a peer, another host died. The same command, on all "
            "hosts, goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(LOST)
