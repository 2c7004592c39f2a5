"""The digit-board experiment around a training run: measure, train (elsewhere), measure again, show.

`before` evaluates the fresh memory, whose gates are zero, and proves on real boards that this *is* the backbone, bit
for bit. `after` evaluates the trained memory, prints one table and writes `report.html`. What was measured is kept in
`experiment/`, under a fingerprint of the weights, so that a run that goes on measures nothing twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem import config as configs
from jaxmem.analysis import board_report
from jaxmem.analysis import report as html
from jaxmem.analysis.attention import image_mass
from jaxmem.api import Model
from jaxmem.data.boards import BoardDataset
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.evaluation.boards import BoardTest, Reading, evaluate
from jaxmem.training import metrics

REPORT = "report.html"
_KEPT = "experiment"


@dataclasses.dataclass(frozen=True)
class DigitBoards:
    """Settings of the experiment, config.experiment.

    Attributes:
      name: "digit_boards".
      test: what is evaluated, before and after.
      shown: boards in the report.
      proof: boards on which fresh memory and backbone are compared bit for bit.
    """

    name: str = "digit_boards"
    test: BoardTest = BoardTest()
    shown: int = 6
    proof: int = 8

    def before(self, model: Model, folder: str | Path) -> tuple[Reading, ...]:
        """Evaluates a model whose memory is fresh, and keeps the result in `folder`.

        Raises:
          ConfigError: the memory is not fresh: logits differ from the backbone's in at least one bit.
        """
        _keep(folder, "gate_zero", _fingerprint(model, self.proof), lambda: _prove(model, self))
        return _measured(self, model, folder, "off", "memory off")

    def after(self, model: Model, folder: str | Path, config: Mapping[str, Any]) -> Path:
        """Evaluates the trained memory, prints the table and writes the report.

        Args:
          model: the trained one.
          folder: the run's, in which `before` left its results and training its metrics.
          config: nested settings of the run, for the report.

        Returns:
          The path of the report.

        Raises:
          CheckpointError: `before` left nothing in the folder.
        """
        kept = _recall(folder, "off")
        if kept is None:
            raise CheckpointError(f"{_path(folder, 'off')}: the evaluation before training is missing; train again")
        off = [_reading(row) for row in kept["result"]]
        on = _measured(self, model, folder, "on", "memory on")
        history = metrics.read(folder)
        zero = _recall(folder, "gate_zero")
        same = bool(zero) and zero["base"] == _digest(model.base)
        table = board_report.results_table(off, on, (_zero_note(zero), _frozen_note(same)))
        html.show(table)
        facts = board_report.facts(model, history, off, on)
        page = board_report.page(self.test, self.shown, table, off, on, history, facts, config)
        path = html.write(page, Path(folder) / REPORT)
        print(f"report: {path}")
        return path


def open_experiment(section: Mapping[str, Any]) -> DigitBoards:
    """The experiment of config.experiment; ConfigError names an unknown key."""
    return configs.build(DigitBoards, section, "config.experiment")


def gate_zero(model: Model, boards: BoardDataset) -> dict[str, Any]:
    """Compares the logits of a model with those of its bare backbone.

    Returns:
      boards, numbers (how many logits were compared), equal (all bits), largest (absolute difference).
    """
    batch = model.batch([board.messages for board in boards], add_generation_prompt=False)
    with_memory, without = (np.asarray(one.logits(batch)) for one in (model, model.without_memory()))
    difference = float(np.abs(with_memory - without).max())
    equal = with_memory.tobytes() == without.tobytes()
    return {"boards": len(boards), "numbers": with_memory.size, "equal": equal, "largest": difference}


def _zero_note(zero: dict[str, Any] | None) -> str:
    if not zero:
        return "Gate 0 was not compared with the backbone."
    found = zero["result"]
    return (
        f"With gates at zero the model is its backbone bit for bit: all {found['numbers']:,} logits of"
        f" {found['boards']} boards are equal."
    )


def _frozen_note(same: bool) -> str:
    if not same:
        return "The backbone's weights are NOT those from before the training."
    return "After training the backbone's weights are unchanged, bit for bit (SHA-256)."


def _prove(model: Model, settings: DigitBoards) -> dict[str, Any]:
    found = gate_zero(model, dataclasses.replace(settings.test.dataset(max(settings.test.k)), size=settings.proof))
    if not found["equal"]:
        raise ConfigError(
            f"the experiment starts from a memory whose gates are zero, but logits differ from the backbone's by up to"
            f" {found['largest']:g}: leave config.memory_folder empty and the gates' initial value at 0"
        )
    print(
        f"gates at zero: all {found['numbers']:,} logits of {found['boards']} boards equal the backbone's, bit for bit"
    )
    return found


def _measured(settings: DigitBoards, model: Model, folder: str | Path, name: str, title: str) -> tuple[Reading, ...]:
    """The evaluation of these very weights: from the folder, or done now with a progress bar."""

    def measure() -> list[dict[str, Any]]:
        total = len(settings.test.conditions) * settings.test.boards
        with _bar(f"evaluating, {title}", total) as tick:
            return [dataclasses.asdict(row) for row in evaluate(model, settings.test, look=image_mass, tick=tick)]

    kept = _keep(folder, name, _fingerprint(model, dataclasses.asdict(settings.test)), measure)
    return tuple(_reading(row) for row in kept)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, a line at begin and end elsewhere."""
    from rich import console, progress

    out, began = console.Console(stderr=True, highlight=False), time.perf_counter()
    columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    if not out.is_terminal:
        out.print(f"{title}: {total} boards")
    with progress.Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
    if not out.is_terminal:
        out.print(f"{title}: {time.perf_counter() - began:.0f} s")


def _keep(folder: str | Path, name: str, fingerprint: dict[str, Any], make: Callable[[], Any]) -> Any:
    """The kept result if it is of the same weights and settings, else a new one, which is then kept."""
    old = _recall(folder, name)
    if old is not None and all(old.get(key) == value for key, value in fingerprint.items()):
        return old["result"]
    path = _path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = json.loads(json.dumps({**fingerprint, "result": make()}))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(made), encoding="utf-8")
    temporary.replace(path)
    return made["result"]


def _recall(folder: str | Path, name: str) -> dict[str, Any] | None:
    path = _path(folder, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _path(folder: str | Path, name: str) -> Path:
    return Path(folder) / _KEPT / f"{name}.json"


def _fingerprint(model: Model, settings: Any) -> dict[str, Any]:
    """What tells one measurement from another: weights and settings, as JSON gives them back."""
    found = {"base": _digest(model.base), "memory": _digest(model.memory), "settings": settings}
    return json.loads(json.dumps(found))


def _digest(tree: Any) -> str:
    """SHA-256 over all leaves of a tree, their paths included."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.asarray(jnp.asarray(leaf)).tobytes())
    return total.hexdigest()


def _reading(row: dict[str, Any]) -> Reading:
    """A Reading from its JSON form."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Reading(**fields)
