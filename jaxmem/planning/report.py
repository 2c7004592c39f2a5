"""A plan: what each program of a run needs on a topology, for people and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmem.planning.chips import GIB, Topology
from jaxmem.planning.hlo import Counts
from jaxmem.planning.memory import Bytes
from jaxmem.planning.roofline import Roofline

_COSTS = ("flops", "moved_bytes", "sent_bytes")
COMPILED, ARITHMETIC = "compiled, not run", "by arithmetic, not compiled"


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program: a training step, a rollout, a prefill.

    Attributes:
      name: "update", "rollout".
      bytes: per device.
      counts: per device, with branches weighted; None where the compiler refused.
      most: per device, with the costliest branch always taken; None where it is the same or unknown.
      roofline: times; None where the compiler refused.
      compile_seconds: lowering and compilation.
      warnings: what the figures do not cover.
      label: COMPILED or ARITHMETIC.
    """

    name: str
    bytes: Bytes
    counts: Counts | None = None
    most: Counts | None = None
    roofline: Roofline | None = None
    compile_seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    label: str = COMPILED


@dataclasses.dataclass(frozen=True)
class Plan:
    """All programs of a configuration on one topology and mesh.

    Attributes:
      name: of the configuration.
      topology: what it would run on.
      mesh: devices per axis.
      programs: in the order in which they run.
      advice: what to change when it does not fit.
    """

    name: str
    topology: Topology
    mesh: Mapping[str, int]
    programs: tuple[ProgramPlan, ...]
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Do all programs fit?"""
        return all(program.bytes.fits for program in self.programs)

    @property
    def label(self) -> str:
        """How the figures were found."""
        return self.programs[0].label if self.programs else COMPILED


def as_json(plan: Plan) -> str:
    """One JSON object with the keys name, topology, mesh, programs, fits, advice and label."""
    return json.dumps(record(plan))


def record(plan: Plan) -> dict[str, Any]:
    """What `as_json` writes. Bytes and FLOPs are per device, times in seconds."""
    return {
        "name": plan.name,
        "topology": {
            "name": plan.topology.name,
            "chip": plan.topology.chip.name,
            "chips": plan.topology.chips,
            "devices": plan.topology.devices,
            "hosts": plan.topology.hosts,
            "memory": plan.topology.memory,
        },
        "mesh": dict(plan.mesh),
        "programs": [_program(program) for program in plan.programs],
        "fits": plan.fits,
        "advice": list(plan.advice),
        "label": plan.label,
    }


def _program(program: ProgramPlan) -> dict[str, Any]:
    counts, roof = program.counts, program.roofline
    found: dict[str, Any] = {
        "name": program.name,
        "fits": program.bytes.fits,
        "bytes": {**program.bytes.rows(), "total": program.bytes.total, "limit": program.bytes.limit},
        "compile_seconds": round(program.compile_seconds, 2),
        "warnings": list(program.warnings),
        "label": program.label,
    }
    if counts is not None:
        ordered = sorted(counts.collectives.values(), key=lambda each: -each.wire)
        found |= {"flops": counts.flops, "moved_bytes": counts.moved, "sent_bytes": counts.wire}
        found["largest"] = {name: dict(counts.largest(what, 10)) for what, name in enumerate(_COSTS)}
        found |= {"collectives": [dataclasses.asdict(each) for each in ordered], "kernels": dict(counts.kernels)}
    if program.most is not None:
        found["with_costliest_branches"] = {"flops": program.most.flops, "moved_bytes": program.most.moved}
    if roof is not None:
        found["seconds"] = {
            "compute": roof.compute,
            "memory": roof.memory,
            "interconnect": roof.interconnect,
            "roofline": roof.seconds,
            "serial": roof.serial,
        }
        found |= {"bound": roof.bound, "mfu": roof.mfu, "tokens": roof.tokens, "model_flops": roof.model_flops}
        found["tokens_per_second"] = roof.tokens_per_second
    return found


def as_text(plan: Plan) -> str:
    """Tables for people: a summary line per program, and what each is made of."""
    mesh = " x ".join(f"{axis}={count}" for axis, count in plan.mesh.items())
    topology = plan.topology
    what = f"{topology.chips} {topology.chip.name} chips, {topology.devices} devices, {topology.hosts} hosts"
    lines = [f"plan {plan.name} on {topology.name} ({what}), mesh {mesh}: {plan.label}", ""]
    lines += [f"  {summary(program)}" for program in plan.programs]
    for program in plan.programs:
        lines += ["", *_table(program)]
    lines += ["", "fits" if plan.fits else "does not fit", *(f"  - {line}" for line in plan.advice)]
    return "\n".join(lines)


def summary(program: ProgramPlan) -> str:
    """One line: does it fit, how much, how fast at best."""
    used = f"{program.name}: {program.bytes.total / GIB:.2f} of {program.bytes.limit / GIB:.2f} GiB per device"
    if not program.bytes.fits:
        return f"{used}, DOES NOT FIT"
    roof = program.roofline
    if roof is None:
        return used
    speed = f", {duration(roof.seconds)} at best ({roof.bound}-bound)"
    speed += f", MFU <= {roof.mfu:.1%}" if roof.model_flops else ""
    return used + speed + (f", {roof.tokens_per_second:,.0f} tokens/s" if roof.tokens else "")


def _table(program: ProgramPlan) -> list[str]:
    """Bytes by kind beside times and collectives, for one program."""
    left = [("bytes per device", "")] + [(kind, f"{n / GIB:.3f} GiB") for kind, n in program.bytes.rows().items()]
    left.append(("total", f"{program.bytes.total / GIB:.3f} GiB"))
    right = _work(program)
    height = max(len(left), len(right))
    left, right = left + [("", "")] * (height - len(left)), right + [""] * (height - len(right))
    lines = [f"{program.name}" + (f" (compiled in {program.compile_seconds:.0f} s)" if program.compile_seconds else "")]
    lines += [f"  {a:18}{b:>13}   {c}".rstrip() for (a, b), c in zip(left, right, strict=True)]
    return [*lines, *_largest(program), *(f"  note: {warning}" for warning in program.warnings)]


def _largest(program: ProgramPlan) -> list[str]:
    """The operations that move and send the most."""
    lines = []
    for what, verb in ((1, "moved"), (2, "sent")):
        found = program.counts.largest(what) if program.counts else []
        names = (f"{'/'.join(name.split('/')[-3:])} {size / GIB:,.2f} GiB" for name, size in found)
        lines += [f"  most bytes are {verb} by: {', '.join(names)}"] if found else []
    return lines


def _work(program: ProgramPlan) -> list[str]:
    counts, roof = program.counts, program.roofline
    if counts is None or roof is None:
        return []
    lines = [
        f"compute       {counts.flops:10.3e} FLOPs   {duration(roof.compute)}",
        f"memory        {counts.moved:10.3e} bytes   {duration(roof.memory)}",
        f"interconnect  {counts.wire:10.3e} bytes   {duration(roof.interconnect)}",
        f"together      {duration(roof.seconds)} when all overlaps, {duration(roof.serial)} when nothing does",
    ]
    if program.most is not None and program.most.flops > counts.flops:
        lines.append(f"at most       {program.most.flops:10.3e} FLOPs when every costly branch is taken")
    for each in sorted(counts.collectives.values(), key=lambda one: -one.wire):
        sent = f"sends {each.wire / 2**20:,.1f} MiB of {each.payload / 2**20:,.1f}"
        lines.append(f"{each.kind} over {each.group}: {each.count:,.0f} times, {sent}")
    return lines


def sweep_text(plans: Sequence[Plan]) -> str:
    """One line per topology, mesh and program; where plans differ in their names, each stands in front of its lines."""
    lines = [
        f"{'topology':14}{'mesh':34}{'program':12}{'fits':6}{'GiB':>8}{'of':>8}{'step':>11}{'MFU':>8}{'tokens/s':>13}"
    ]
    named = len({plan.name for plan in plans}) > 1
    for plan in plans:
        lines += [plan.name] if named else []
        mesh = " ".join(f"{axis}={count}" for axis, count in plan.mesh.items() if count > 1) or "one device"
        for program in plan.programs:
            size = f"{program.bytes.total / GIB:8.2f}{program.bytes.limit / GIB:8.2f}"
            fits = "yes" if program.bytes.fits else "NO"
            line = f"{plan.topology.name:14}{mesh:34}{program.name:12}{fits:6}{size}"
            if (roof := program.roofline) is not None:
                mfu = f"{roof.mfu:8.1%}" if roof.model_flops else f"{'':8}"
                line += f"{duration(roof.seconds):>11}{mfu}" + (
                    f"{roof.tokens_per_second:13,.0f}" if roof.tokens else ""
                )
            lines.append(line)
    labels = ", ".join(dict.fromkeys(plan.label for plan in plans))
    return "\n".join([*lines, f"{labels}; steps at the roofline: the best that the chips allow"])


def duration(seconds: float) -> str:
    """Seconds as "12.3 ms" or "4.56 s"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
