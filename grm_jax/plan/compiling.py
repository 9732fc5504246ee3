"""Compiles the programs of a stage ahead of time and reads what they cost."""

import functools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from grm_jax.distributed import on_mesh, with_shardings
from grm_jax.errors import UsageError
from grm_jax.plan.chips import GIB, Topology
from grm_jax.plan.costs import Cost, program_cost
from grm_jax.plan.hlo import Array, Instruction
from grm_jax.plan.paper import count_on_paper
from grm_jax.plan.report import Memory, ProgramReport
from grm_jax.plan.sizes import argument_bytes, held_bytes, report_of
from grm_jax.plan.stages import Program, Stage, rows_on
from grm_jax.plan.work import kernel_flops

_NEEDS = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds"),
)
# Of a program for CPUs that will not run, only what comes before machine code is of interest.
_NO_CODE: Mapping[str, Any] = MappingProxyType(
    {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def plan_stage(
    stage: Stage,
    topology: Topology,
    *,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> tuple[ProgramReport, ...]:
    """Plans all programs of a stage, each with what the one before gives.

    Args:
      stage: The stage, on a mesh of the topology's devices.
      topology: What is compiled for.
      only: The names of those that are wanted; all if empty.
      say: Is told what is being done.
    """
    outputs: dict[str, Any] = {}
    reports = []
    for step in stage.steps:
        program = step(outputs)
        with on_mesh(program.mesh):
            if only and program.name not in only:
                shapes = jax.eval_shape(program.function, *program.arguments)
                outputs[program.name] = rows_on(shapes, program.mesh)
                continue
            say(f"{stage.name}: {program.name}")
            report, outputs[program.name] = plan_program(program, stage, topology)
            reports.append(report)
    return tuple(reports)


def plan_program(program: Program, stage: Stage, topology: Topology) -> tuple[ProgramReport, Any]:
    """Plans one program: compiles it, where there is a compiler.

    Args:
      program: The program.
      stage: Its stage. This is called on the mesh of the program.
      topology: What is compiled for.

    Returns:
      What it costs, and its outputs as `jax.ShapeDtypeStruct`s with shardings. Where the compiler
      finds that it cannot fit, costs are counted on paper.
    """
    began = time.perf_counter()
    traced = program.function.trace(*program.arguments)
    given = argument_bytes(program, traced.jaxpr)
    beside = held_bytes(stage.held) - given.held
    shapes = traced.out_info
    on_paper = functools.partial(count_on_paper, program, stage, topology, given, beside=beside)
    if topology.chip.kind == "gpu":
        return on_paper(), rows_on(shapes, program.mesh)
    try:
        options = _NO_CODE if topology.chip.kind == "cpu" else {}
        compiled = traced.lower().compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        needs = needed_bytes(str(error))
        if needs is None:
            raise
        return on_paper(needs=needs), rows_on(shapes, program.mesh)
    seconds = time.perf_counter() - began
    cost = read_cost(text_of(compiled), program, stage, topology)
    analysis = compiled.memory_analysis()
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        beside=beside,
        capacity=int(topology.chip.memory),
    )
    loops = program.turns if cost.unknown else 0
    report = report_of(
        program, stage, topology, cost, memory, method="compiled", loops=loops, seconds=seconds
    )
    return report, with_shardings(shapes, compiled.output_shardings)


def text_of(compiled: Any) -> str:
    """A compiled program's text.

    Raises:
      UsageError: libtpu and jaxlib are of versions that do not go together.
    """
    try:
        return str(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:100]
        raise UsageError(
            f"what libtpu compiled cannot be read ({reason}); install the version that goes with "
            "this JAX: jax[tpu]"
        ) from error


def read_cost(text: str, program: Program, stage: Stage, topology: Topology) -> Cost:
    """The cost of a compiled module's text on a topology's chips."""
    size = math.prod(topology.shape)

    def in_kernel(call: Instruction, operands: Sequence[Array]) -> float:
        # What is before and behind them says which tokens see which, in integers.
        wide = [array.shape for array in operands if array.dtype in ("bf16", "f32")]
        if not wide:
            return 0.0
        if call.name.startswith(("ragged-dot", "tgmm")):
            # Rows of experts that other chips have are skipped; each is taken to have as many.
            return 2.0 * math.prod(wide[0]) * wide[1][-1] / program.mesh.shape["expert"]
        # Queries come first; behind them keys and values.
        values = wide[2] if len(wide) > 2 else wide[-1]
        return kernel_flops(stage.config, call.name, call.attributes, wide[0], values)

    return program_cost(
        text,
        turns=program.turns,
        slice_of=lambda chip: chip // size,
        kernel_flops=in_kernel,
    )


def needed_bytes(message: str) -> int | None:
    """What a chip would have to hold, from the compiler's complaint; None if it is another one."""
    for form in _NEEDS:
        if (found := form.search(message)) is not None:
            return int(float(found[1]) * _UNITS[found[2]])
    return None
