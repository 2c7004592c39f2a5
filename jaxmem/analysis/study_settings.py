"""What a study is: arms that train, tests that all of them sit, and how one arm's settings follow from another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmem import config as configs
from jaxmem.errors import ConfigError
from jaxmem.evaluation.conditions import BoardTest
from jaxmem.training.settings import TrainConfig

WHOLE = ("memory", "lora")
"""Sections of a TrainConfig that an arm replaces as a whole; of all others it changes single keys."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
      title: its name in tables.
      train: what it changes of the study's base, nested like a TrainConfig; `WHOLE` sections are replaced.
      like: an earlier arm whose changes (its chosen variant's too) come before these.
      start_from: an earlier arm whose trained memory and backbone of the same seed this one goes on from.
      variants: further changes by name, of which one is chosen on validation boards with the first seed.
      seeds: () is the study's.
      trains: False measures the bare backbone.
      attention: also measure the image's share of the backbone's attention.
    """

    title: str
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    like: str = ""
    start_from: str = ""
    variants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    trains: bool = True
    attention: bool = False


@dataclasses.dataclass(frozen=True)
class Exam:
    """A board test and who sits it.

    Attributes:
      test: the boards; the seed of the arm is added to the test's.
      arms: names; () is all.
      seeds: how many of an arm's seeds sit it, from the first on; 0 is all.
    """

    test: BoardTest = BoardTest()
    arms: tuple[str, ...] = ()
    seeds: int = 0


@dataclasses.dataclass(frozen=True)
class Selection:
    """Validation of variants: boards of training digits that no arm trains on; `by` names a share of a Reading."""

    test: BoardTest = BoardTest(k=(128,), split="train", seed=1000)
    by: str = "read"
    steps: int = 0
    """Steps of a variant's trial; 0 is the arm's own number, and the chosen trial is then the arm's first seed."""


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """A study.

    Attributes:
      output: directory of all runs, measurements and results.
      base: a TrainConfig without `output`, `seed` and `seeds`, which every arm changes.
      order: names of the arms that run, in this order.
      arms: by name.
      tests: by name.
      selection: how variants are chosen.
      seeds: of the arms that name none. A seed drives initial weights, training boards (it is added to
        `data.boards.seed`) and test boards.
      boards: at most so many boards per test, arm and seed; 0 is no limit.
      steps: at most so many steps per run; 0 is no limit.
      margin: smallest difference of shares that a sentence calls one.
      reference: k at which arms are compared beyond the range of training.
      trained_k: longest k of the training boards.
      workers: processes that share the runs, each with cores of its own; 1 does all in this one.
    """

    output: str
    base: Mapping[str, Any]
    order: tuple[str, ...]
    arms: Mapping[str, Any]
    tests: Mapping[str, Any]
    selection: Selection = Selection()
    seeds: tuple[int, ...] = (0, 1, 2)
    boards: int = 0
    steps: int = 0
    margin: float = 0.02
    reference: int = 512
    trained_k: int = 128
    workers: int = 1


@dataclasses.dataclass(frozen=True)
class Study:
    """A checked StudyConfig: arms and tests as dataclasses, in order."""

    config: StudyConfig
    arms: Mapping[str, Arm]
    tests: Mapping[str, Exam]

    def seeds(self, name: str) -> tuple[int, ...]:
        """The seeds of an arm."""
        return self.arms[name].seeds or self.config.seeds

    def exams(self, name: str, seed: int) -> dict[str, BoardTest]:
        """The tests that an arm sits with a seed, with that seed's boards."""
        place = self.seeds(name).index(seed)
        chosen = {key: one for key, one in self.tests.items() if not one.arms or name in one.arms}
        return {key: self.limited(e.test, seed) for key, e in chosen.items() if not e.seeds or place < e.seeds}

    def limited(self, test: BoardTest, seed: int = 0) -> BoardTest:
        """A test with the study's limit of boards and a seed's boards."""
        boards = min(test.boards, self.config.boards or test.boards)
        return dataclasses.replace(test, boards=boards, batch_size=min(test.batch_size, boards), seed=test.seed + seed)


def open_study(config: Mapping[str, Any] | Any) -> Study:
    """A Study from a configuration.

    Raises:
      ConfigError: an unknown key, or arms and tests that do not fit together; the message names the key.
    """
    study = configs.build(StudyConfig, config, "config")
    for name in study.order:
        configs.choose(study.arms, name, "arm in config.order")
    arms = {name: configs.build(Arm, study.arms[name], f"config.arms.{name}") for name in study.order}
    tests = {name: configs.build(Exam, one, f"config.tests.{name}") for name, one in study.tests.items()}
    built = Study(study, arms, tests)
    for place, name in enumerate(study.order):
        _check(built, name, study.order[:place])
    for name, one in tests.items():
        for arm in one.arms:
            configs.choose(study.arms, arm, f"arm in config.tests.{name}.arms")
    _check_validation(built)
    return built


def resolve(
    study: Study, name: str, seed: int, output: str, variants: Mapping[str, str], steps: int = 0
) -> TrainConfig:
    """The training run of an arm with a seed.

    Args:
      study: gives base and arms.
      name: of the arm.
      seed: of weights and boards.
      output: the run's folder.
      variants: the variant chosen for each arm that has some.
      steps: another number of steps than the arm's; 0 keeps it.
    """
    section = merged(study.config.base, changes(study, name, variants))
    section = merged(section, {"output": output, "seed": seed, "experiment": None})
    config = configs.build(TrainConfig, section, f"config.arms.{name}.train")
    boards = dataclasses.replace(config.data.boards, seed=config.data.boards.seed + seed)
    steps = steps or config.loop.steps
    loop = dataclasses.replace(
        config.loop, steps=min(steps, study.config.steps or steps), progress=False, tensorboard=False, keep=1
    )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, boards=boards), loop=loop, seeds=())


def changes(study: Study, name: str, variants: Mapping[str, str]) -> dict[str, Any]:
    """All that an arm changes of the base: those of the arm it is like, its own, its chosen variant's."""
    arm = study.arms[name]
    found = changes(study, arm.like, variants) if arm.like else {}
    found = merged(found, arm.train)
    return merged(found, arm.variants[variants[name]]) if name in variants else found


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`old` with the keys of `new`, section by section; `WHOLE` sections are replaced."""
    result = dict(old)
    for key, value in new.items():
        inside = key not in WHOLE and isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
        result[key] = merged(old[key], value) if inside else value
    return result


def _check(study: Study, name: str, earlier: tuple[str, ...]) -> None:
    """References of an arm point to earlier arms that have its seeds."""
    arm = study.arms[name]
    for field in ("like", "start_from"):
        other = getattr(arm, field)
        if other and other not in earlier:
            raise ConfigError(f"config.arms.{name}.{field}: {other!r} is no arm before it in config.order")
    if arm.start_from and (missing := set(study.seeds(name)) - set(study.seeds(arm.start_from))):
        raise ConfigError(f"config.arms.{name}: arm {arm.start_from!r}, where it starts, has no seed {min(missing)}")
    if arm.start_from and not study.arms[arm.start_from].trains:
        raise ConfigError(f"config.arms.{name}.start_from: arm {arm.start_from!r} does not train; leave it empty")
    if arm.variants and not arm.trains:
        raise ConfigError(f"config.arms.{name}: variants of an arm that does not train")
    if not study.exams(name, study.seeds(name)[0]):
        raise ConfigError(f"config.arms.{name}: no test of config.tests is for it")


def _check_validation(study: Study) -> None:
    """No training board may be a validation board."""
    chosen = study.config.selection.test
    if chosen.split != "train":
        raise ConfigError("config.selection.test.split: variants are chosen on training digits, split='train'")
    for name, arm in study.arms.items():
        first = {key: next(iter(one.variants)) for key, one in study.arms.items() if one.variants}
        for seed in study.seeds(name) if arm.trains else ():
            if resolve(study, name, seed, "", first).data.boards.seed == chosen.seed:
                raise ConfigError(f"config.selection.test.seed {chosen.seed}: arm {name} trains on these very boards")
