"""`grm-jax plan`: a plan as JSON and as tables, and calls that are wrong."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from grm_jax.cli.plan import duration, show, size
from grm_jax.plan import Change, Memory, ProgramReport, Report, StageReport, parse_topology
from grm_jax.plan.report import Bound, Traffic
from tests.cli.conftest import Call

CONFIG = """
from tests.plan.small import small


def get_config():
    return small("rft", mesh__fsdp=-1, mesh__tensor=1, model__name={name!r}, **{changes!r})
"""


def write(folder: Path, name: str = "small", **changes: object) -> Path:
    path = folder / "config.py"
    path.write_text(CONFIG.format(name=name, changes=changes))
    return path


def test_a_plan_as_json(call: Call, tmp_path: Path) -> None:
    outcome = call("plan", "--config", write(tmp_path), "--topology", "cpu:8", "--json")
    assert outcome.status == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["fits"] is True
    assert (found["topology"], found["chips"]) == ("cpu:8", 8)
    (stage,) = found["stages"]
    assert stage["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "expert": 1}
    (program,) = stage["programs"]
    assert program["name"] == "update"
    assert program["method"] == "compiled"
    assert program["memory"]["peak"] >= program["memory"]["arguments"] > 0
    assert program["flops"] > 0
    assert program["bytes_moved"] > 0
    assert {one["kind"] for one in program["collectives"]} >= {"all-gather"}
    assert program["bound"]["binds"] in ("compute", "memory", "links", "network")
    assert outcome.err == "grm-jax: rft: update\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v5p:4x4"), "v5p has 3 axes of at least 1, as in v5p:4x4x8"),
        (("--topology", "tpu"), "no chip 'tpu' among v4"),
        (("--topology", "cpu:8", "--stage", "rl"), "no stage 'rl' can be planned; there are rft"),
        (("--topology", "cpu:8", "--config.mesh.tensor=3"), "needs a multiple of 3 devices"),
        (("--topology", "cpu:8", "--config.batch.rows=12"), "need a multiple of 16"),
        (("--topology", "cpu:8", "--config.batch.row=12"), "no key 'batch.row'"),
    ],
)
def test_calls_that_are_wrong(
    arguments: tuple[str, ...], message: str, call: Call, tmp_path: Path
) -> None:
    outcome = call("plan", "--config", write(tmp_path), *arguments)
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_model_whose_shape_is_not_known(call: Call, tmp_path: Path) -> None:
    config = write(tmp_path, name="hf:somebody/something", model__shape={}, model__tokenizer="")
    outcome = call("plan", "--config", config, "--topology", "cpu:8")
    assert outcome.status == 2
    assert "--config.model.name=FOLDER" in outcome.err


MEMORY = Memory(
    arguments=3 << 30,
    outputs=2 << 30,
    aliased=2 << 30,
    temporaries=1 << 30,
    code=0,
    beside=1 << 30,
    capacity=4 << 30,
)
PROGRAM = ProgramReport(
    name="update",
    method="compiled",
    memory=MEMORY,
    needs=None,
    flops=2e12,
    analytic_flops=2e12,
    model_flops=1e12,
    moved=5e9,
    traffic=(
        Traffic(
            kind="all-gather", chips=8, across=True, count=92, payload=4e9, wire=3.5e9, largest=4e9
        ),
    ),
    bound=Bound(compute=0.02, memory=0.002, links=0.0, network=0.5),
    tokens=1000,
    times=1,
    loops=0,
    seconds=3.0,
)


def test_a_plan_for_people() -> None:
    stage = StageReport(
        name="rft",
        kind="rft",
        model="hf:a/b",
        parameters=2_000_000_000,
        mesh={"data": 2, "fsdp": 8, "tensor": 1, "expert": 1},
        state=4 << 30,
        programs=(PROGRAM,),
        change=Change(overrides=("--config.batch.accumulate=2",), total=3 << 30),
    )
    report = Report(config="c.py", topology=parse_topology("v5e:4x4"), stages=(stage,))
    out = io.StringIO()
    show(report, Console(file=out, width=200, color_system=None))
    text = out.getvalue()
    assert "c.py does not fit" in text
    assert "2.00B parameters, mesh data=2, fsdp=8" in text
    assert "8 of several slices" in text
    assert "fits with --config.batch.accumulate=2 (3 GiB of a chip)" in text
    (line,) = [line for line in text.splitlines() if "compiled" in line]
    assert "network" in line
    assert "2,000" in line
    assert " no " in line
    found = report.to_dict()
    assert found["fits"] is False
    assert found["stages"][0]["change"]["overrides"] == ("--config.batch.accumulate=2",)
    assert found["stages"][0]["programs"][0]["memory"]["total"] == 5 << 30


def test_what_a_chip_must_hold() -> None:
    assert (MEMORY.peak, MEMORY.total, MEMORY.fits) == (4 << 30, 5 << 30, False)
    assert PROGRAM.bound.seconds == 0.5
    assert PROGRAM.bound.binds == "network"
    # Where a compiler gave up, what it said counts.
    gave_up = dataclasses.replace(PROGRAM, needs=9 << 30)
    assert gave_up.total == 10 << 30
    assert not dataclasses.replace(
        gave_up, memory=dataclasses.replace(MEMORY, capacity=20 << 30)
    ).fits


def test_numbers_for_people() -> None:
    assert [size(count) for count in (12, 2048, 3 << 20, 95.74 * 2**30, 8 << 40)] == [
        "12 B",
        "2 KiB",
        "3 MiB",
        "95.74 GiB",
        "8 TiB",
    ]
    assert [duration(s) for s in (2e-6, 0.0123, 4.567)] == ["2 us", "12.3 ms", "4.57 s"]
