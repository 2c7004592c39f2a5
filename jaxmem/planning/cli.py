"""`jaxmem plan`: what a training run would need on a pod, compiled or by arithmetic, before the pod is rented."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxmem import config as configs
from jaxmem.distributed import flags
from jaxmem.distributed.mesh import AXES, make_mesh
from jaxmem.errors import ConfigError
from jaxmem.planning import chips, gpu, report, scaling
from jaxmem.planning.advice import advice
from jaxmem.planning.architecture import backbone_of
from jaxmem.planning.batches import Shape
from jaxmem.planning.chips import Topology
from jaxmem.planning.measure import plan_program
from jaxmem.planning.programs import Program, programs
from jaxmem.planning.report import Plan, ProgramPlan
from jaxmem.training import stages
from jaxmem.training.settings import MeshConfig, TrainConfig


def main(
    *,
    config: Any,
    topology: Sequence[str],
    mesh: Sequence[str],
    tokens: int,
    patches: int,
    sweep: bool,
    scaling_svg: str | None,
    json: bool,
) -> int:
    """Plans a configuration on one or several topologies and meshes; returns 0 when everything fits, else 1.

    Args:
      config: as for `jaxmem train`; of one with `stages`, each stage is planned.
      topology: names such as "v5e:4x4"; several make a table.
      mesh: "fsdp=4,sequence=4"; several make a table; none takes the configuration's.
      tokens, patches: lengths of the batch; 0 takes the longest of the configuration's buckets.
      sweep: a table of one line per program, also for a single topology.
      scaling_svg: where to draw weak scaling: the batch grows with the chips.
      json: one JSON object, or a list of them for several plans.
    """
    built = configs.build(TrainConfig, config, "config")
    if not topology:
        raise ConfigError("plan needs --topology, such as --topology=v5e:4x4; it may be given several times")
    places = [chips.topology(name) for name in topology]
    meshes = [_mesh_sizes(words) for words in mesh] or [dataclasses.asdict(built.mesh)]
    if scaling_svg is not None and built.stages:
        raise ConfigError("--scaling_svg draws one run, and the configuration has stages; plan one of them")
    plans = []
    for place in places:
        for sizes in meshes:
            for stage, run in _runs(built).items():
                chosen = dataclasses.replace(run, mesh=MeshConfig(**sizes))
                if scaling_svg is not None:
                    rows = round(run.loop.batch_size / places[0].chips * place.chips)
                    chosen = dataclasses.replace(chosen, loop=dataclasses.replace(chosen.loop, batch_size=rows))
                print(" ".join(("planning", place.name, stage)).rstrip(), file=sys.stderr)
                shape = Shape.longest(run)
                shape = Shape(tokens or shape.tokens, patches or shape.patches)
                found = plan(chosen, place, shape)
                plans.append(dataclasses.replace(found, name=f"{stage}: {found.name}" if stage else found.name))
    table = len(plans) > 1 or sweep
    if json:
        print(report.as_json(plans[0]) if len(plans) == 1 else f"[{', '.join(map(report.as_json, plans))}]")
    else:
        print(report.sweep_text(plans) if table else report.as_text(plans[0]))
    if scaling_svg is not None:
        _scale(plans, Path(scaling_svg), quiet=json)
    return 0 if all(one.fits for one in plans) else 1


def _runs(config: TrainConfig) -> dict[str, TrainConfig]:
    """The stages of a configuration by name; one without a name where there are none.

    A stage whose backbone an earlier one is yet to train is planned with the one that both start from.
    """
    if not config.stages:
        return {"": config}
    runs = [
        run if not run.backbone or Path(run.backbone).is_dir() else dataclasses.replace(run, backbone=config.backbone)
        for run in stages.plan(config)
    ]
    return dict(zip(sorted(config.stages), runs, strict=True))


def plan(config: TrainConfig, topology: Topology, shape: Shape | None = None) -> Plan:
    """Everything that a run would do on a topology.

    Raises:
      ConfigError: mesh, rows, heads and devices do not divide one another; an unknown backbone.
    """
    config = config.resolved(topology.devices)
    sizes, compiled = dataclasses.asdict(config.mesh), topology.compiles
    mesh: Any = make_mesh(**sizes, devices=topology.abstract_devices()) if compiled else _abstract(sizes)
    shape = shape or Shape.longest(config)
    found = [
        _compiled(program, topology, mesh, flags.compiler_options("tpu", config.xla_flags, config.xla_extra_flags))
        if compiled
        else _by_arithmetic(program, config, shape, topology, sizes)
        for program in programs(config, mesh, shape)
    ]
    name = f"{config.backbone or 'tiny'}, rows of {shape.tokens} tokens and {shape.patches} patches"
    first = Plan(name, topology, sizes, tuple(found))
    return dataclasses.replace(first, advice=tuple(advice(first)))


def _compiled(program: Program, topology: Topology, mesh: Mesh, options: Mapping[str, Any]) -> ProgramPlan:
    """One program through the TPU compiler, with what rests beside it in the memory."""
    return plan_program(
        program.name,
        program.lower,
        program.arguments,
        topology,
        resting=program.resting,
        devices=mesh.size,
        model_flops=program.flops,
        tokens=program.tokens,
        unknown_trips=program.trips,
        branch_share=program.branch_share,
        options=options,
    )


def _by_arithmetic(
    program: Program, config: TrainConfig, shape: Shape, topology: Topology, sizes: Mapping[str, int]
) -> ProgramPlan:
    """One program on GPUs, whose compiler needs a GPU."""
    text = backbone_of(config).text
    learns = program.name in ("train step", "update")
    step = gpu.Step(
        tokens=program.tokens,
        model_flops=program.flops,
        layers=text.layers,
        width=text.width,
        kv_width=text.kv_heads * text.head_dim,
        remat=4 / 3 if learns else 1.0,
        passes=(3 if learns else 1) * round(program.trips[0] if program.trips else 1),
        micro_batches=config.loop.accumulate if learns or program.name == "score" else 1,
        workspace=config.loss_chunk * text.vocab * 4.0 / sizes["tensor"] if learns else 0.0,
    )
    return gpu.arithmetic(program.name, {**program.arguments, **program.resting}, step, topology, sizes)


def _abstract(sizes: Mapping[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, (AxisType.Auto,) * len(AXES))


def _mesh_sizes(words: str) -> dict[str, int]:
    """ "fsdp=4,tensor=2" -> sizes; ConfigError for anything else."""
    sizes = dict.fromkeys(AXES, 1)
    for word in words.split(","):
        axis, _, number = word.partition("=")
        configs.choose(sizes, axis.strip(), f"mesh axis in --mesh={words}")
        try:
            sizes[axis.strip()] = int(number)
        except ValueError as error:
            raise ConfigError(f"--mesh={words}: {word!r} is not AXIS=NUMBER, such as fsdp=4") from error
    return sizes


def _scale(plans: Sequence[Plan], path: Path, quiet: bool) -> None:
    """The table and the drawing of weak scaling, of the first program of every plan."""
    points = []
    for one in plans:
        counts = one.programs[-1].counts
        if counts is not None:
            points.append(scaling.Point(one.topology.name, one.topology.chips, counts.flops, counts.wire))
    if not quiet:
        print(scaling.table(points))
    path.write_text(scaling.chart(points), encoding="utf-8")
