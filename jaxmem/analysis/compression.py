"""`jaxmem study --config=configs/digits_vr.py`: what few vision tokens cost, and what a second look gives back.

For every seed a tower learns digits (`jaxmem.assets.tiny_llava`), a projector averages its patches to fewer tokens
(DeCo), and the model behind the tower trains on digit boards, once for each ratio and method: alone, with Vision
Remember, and with what it is compared with. Arms of one seed and ratio start from the same weights and see the same
boards in the same order. FastV trains nothing: it drops tokens of the model without compression. Accuracy is measured
on the same unseen boards.

The same command goes on where an earlier one stopped: runs resume, and what was measured is kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem import api
from jaxmem import config as configs
from jaxmem.analysis import forgetting
from jaxmem.analysis.digit_vismem import spread
from jaxmem.assets import tiny_llava
from jaxmem.assets.tiny_llava import TowerConfig
from jaxmem.checkpoints.assemble import IMAGE, assemble
from jaxmem.checkpoints.weights import write_json
from jaxmem.errors import ConfigError
from jaxmem.evaluation.boards import evaluate
from jaxmem.evaluation.conditions import BoardTest
from jaxmem.training.run import train
from jaxmem.training.seeds import COMPILED, share_programs
from jaxmem.training.settings import TrainConfig

KEPT, ATTENTION, RESULTS = "read.json", "attention.json", "results.json"
LOOKED = 64
"""Boards whose attention is measured."""
ALONE, PRUNED = "none", "fastv"
Shares = dict[str, float]
"""{"read", "exact"}: of digits (teacher forcing), and of final answers (free and greedy)."""


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """The study.

    Attributes:
      name: "compression".
      output: directory of all runs and results.
      seeds: of tower, projector, memories, boards of training and of the test.
      ratios: patches per token and side of the compressed models; 1 is trained too, alone.
      methods: by name, the memory that an arm has ({} is none), as in a TrainConfig.
      fastv: settings of FastV without `keep`, which is the number of tokens at each ratio; None leaves it out.
      tower: how the towers learn.
      train: sections of a TrainConfig, without output, backbone, memory and seed.
      test: the boards.
    """

    output: str
    train: Mapping[str, Any]
    methods: Mapping[str, Any]
    name: str = "compression"
    seeds: tuple[int, ...] = (0, 1, 2)
    ratios: tuple[int, ...] = (2, 3, 4)
    fastv: Mapping[str, Any] | None = None
    tower: TowerConfig = TowerConfig()
    test: BoardTest = BoardTest()

    def __post_init__(self) -> None:
        """Raises ConfigError for a study without its reference."""
        if self.methods.get(ALONE, None) is None or self.methods[ALONE]:
            raise ConfigError(f'methods needs "{ALONE}": {{}}, the model that all others are compared with')
        if min(self.ratios, default=1) < 2:
            raise ConfigError(f"ratios {self.ratios}: name compressed models, from 2 on; ratio 1 is measured anyway")


def main(config: Any) -> int:
    """Runs what is missing, prints the table and writes `results.json`; returns the exit code."""
    study = configs.build(CompressionConfig, config, "config")
    share_programs(Path(study.output) / COMPILED)
    found: dict[str, dict[str, Shares]] = {}
    for seed in study.seeds:
        for arm, shares in run_seed(study, seed).items():
            found.setdefault(arm, {})[str(seed)] = shares
    looked = {seed: forgetting_of(study, seed) for seed in study.seeds}
    settings = json.loads(json.dumps(_plain(study)))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    results = {"config": settings, "digest": digest, "arms": found, "attention": looked}
    write_json(Path(study.output) / RESULTS, results)
    print(table(study, found))
    print(forgetting_table(study, looked))
    return 0


def _plain(study: CompressionConfig) -> dict[str, Any]:
    """The settings as JSON takes them."""
    return {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in dataclasses.asdict(study).items()
    }


def arms(study: CompressionConfig) -> list[tuple[int, str]]:
    """(ratio, method) of everything that trains."""
    return [(1, ALONE), *((ratio, method) for ratio in study.ratios for method in study.methods)]


def run_seed(study: CompressionConfig, seed: int) -> dict[str, Shares]:
    """ "r/method" -> shares, of all arms of a seed."""
    folder = Path(study.output) / f"seed_{seed}"
    parts = _parts(study, folder, seed)
    found = {}
    for ratio, method in arms(study):
        found[f"{ratio}/{method}"] = _arm(study, parts, folder / f"r{ratio}" / method, ratio, method, seed)
    if study.fastv is not None:
        found |= _pruned(study, folder, seed)
    return found


def _parts(study: CompressionConfig, folder: Path, seed: int) -> Path:
    """Decoder and tower of a seed."""
    parts = folder / "parts"
    if not tiny_llava.has_parts(parts / "decoder"):
        tiny_llava.write_decoder(parts / "decoder")
    if not tiny_llava.has_parts(parts / "tower"):
        right = tiny_llava.write_tower(parts / "tower", study.tower, seed)
        print(f"seed {seed}: the tower tells {right:.3f} of its training boards' digits", flush=True)
    return parts


def backbone(study: CompressionConfig, parts: Path, ratio: int, seed: int) -> Path:
    """The folder of a model that nothing has trained yet; the same for all methods."""
    whole = parts.parent / f"r{ratio}" / "start"
    if not tiny_llava.has_parts(whole):
        section = {"name": "avgpool", "ratio": ratio} if ratio > 1 else {"name": "mlp"}
        template = (parts / "decoder" / "chat_template.jinja").read_text(encoding="utf-8")
        template = template.replace("<|image_pad|>", IMAGE)  # what the decoder knows, with the new placeholder
        given: dict[str, Any] = {"projector": section, "aspect": "single", "seed": seed, "chat_template": template}
        maps = tiny_llava.load_maps(parts / "tower", study.tower)
        assemble(parts / "decoder", parts / "tower", whole, weights=maps, **given)
    return whole


def _arm(study: CompressionConfig, parts: Path, folder: Path, ratio: int, method: str, seed: int) -> Shares:
    """Trains and measures one arm, unless that was done."""
    kept = folder / KEPT
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    memory = dict(study.methods[method]) or None
    sections = {key: dict(value) if isinstance(value, Mapping) else value for key, value in study.train.items()}
    boards = dict(sections["data"]["boards"])
    data = {**sections["data"], "boards": boards | {"seed": boards.get("seed", 0) + seed}}
    about = {"output": str(folder), "backbone": str(backbone(study, parts, ratio, seed)), "memory": memory}
    run = configs.build(TrainConfig, {**sections, **about, "data": data, "seed": seed}, "config.train")
    return _measured(study, train(run).model, kept, seed)


def _measured(study: CompressionConfig, model: api.Model, kept: Path, seed: int) -> Shares:
    """The shares of a model, kept in a file."""
    test = dataclasses.replace(study.test, seed=study.test.seed + seed)
    (reading,) = evaluate(model, test)
    shares = {"read": reading.read, "exact": reading.exact}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, shares)
    print(f"seed {seed}, {kept.parent.relative_to(study.output)}: read {shares['read']:.3f}", flush=True)
    return shares


def _pruned(study: CompressionConfig, folder: Path, seed: int) -> dict[str, Shares]:
    """FastV on the uncompressed model, with as many tokens left as each ratio has."""
    found, settings = {}, dict(study.fastv or {})
    for ratio in study.ratios:
        kept = folder / f"r{ratio}" / PRUNED / KEPT
        if kept.is_file():
            found[f"{ratio}/{PRUNED}"] = json.loads(kept.read_text(encoding="utf-8"))
            continue
        model = api.load(folder / "r1" / ALONE / "backbone", study.train.get("dtype"))
        start = api.load(folder / f"r{ratio}" / "start")
        tokens = start.spec.backbone.vision.projector.tokens
        model = model.attach(PRUNED, keep=tokens, **settings)
        found[f"{ratio}/{PRUNED}"] = _measured(study, model, kept, seed)
    return found


def forgetting_of(study: CompressionConfig, seed: int) -> dict[str, dict[str, Any]]:
    """ "r/method" -> what `forgetting.measure` says of the arms of a seed that look at the tower again, and of those
    without memory; kept in files."""
    found, folder = {}, Path(study.output) / f"seed_{seed}"
    boards = dataclasses.replace(study.test, seed=study.test.seed + seed, boards=LOOKED).dataset(study.test.k[0])
    chats = [boards[place].messages for place in range(LOOKED)]
    for ratio, method in arms(study):
        memory = study.methods[method]
        if memory and memory["name"] != "vision_remember":
            continue
        run = folder / f"r{ratio}" / method
        kept = run / ATTENTION
        if not kept.is_file():
            model = api.load(run / "backbone", study.train.get("dtype"), memory=run / "memory" if memory else None)
            write_json(kept, dataclasses.asdict(forgetting.measure(model, chats)))
        found[f"{ratio}/{method}"] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def forgetting_table(study: CompressionConfig, looked: Mapping[int, Mapping[str, Any]]) -> str:
    """Mass and density on vision tokens by layer: means over the seeds."""
    names = list(looked[study.seeds[0]])
    mean = lambda name, key: np.mean([looked[seed][name][key] for seed in study.seeds], axis=0)  # noqa: E731
    words = lambda values, scale: " ".join(f"{scale * value:6.3f}" for value in values)  # noqa: E731
    lines = ["", "attention of answers on vision tokens, by layer: mass, and density (mass per token, x 100)"]
    for name in names:
        mass, density = words(mean(name, "mass"), 1), words(mean(name, "density"), 100)
        lines.append(f"{name:14s} mass {mass}   density {density}")
    return "\n".join(lines)


def table(study: CompressionConfig, found: Mapping[str, Mapping[str, Shares]]) -> str:
    """Digits read, by ratio and method: mean and sample standard deviation over the seeds, and paired differences."""
    methods = [*study.methods, *([PRUNED] if study.fastv is not None else [])]
    read = lambda arm: np.array([found[arm][str(seed)]["read"] for seed in study.seeds])  # noqa: E731
    lines = [f"digits read, {len(study.seeds)} seeds; without compression {spread(read(f'1/{ALONE}'))}", ""]
    lines.append("ratio  " + "".join(f"{method:>22s}" for method in methods))
    for ratio in study.ratios:
        lines.append(f"{ratio:5d}  " + "".join(f"{spread(read(f'{ratio}/{one}')):>22s}" for one in methods))
    lines += ["", f"paired difference to {ALONE}, same seed, same boards"]
    for ratio in study.ratios:
        gains = [read(f"{ratio}/{one}") - read(f"{ratio}/{ALONE}") for one in methods]
        shown = ["" if one == ALONE else spread(gain, "+") for one, gain in zip(methods, gains, strict=True)]
        lines.append(f"{ratio:5d}  " + "".join(f"{gain:>22s}" for gain in shown))
    return "\n".join([*lines, "", *_sentences(study, read)])


def _sentences(study: CompressionConfig, read: Any) -> list[str]:
    """What the table says, claim by claim: a difference counts where all seeds have its sign."""
    said = []
    for method in study.methods:
        if method == ALONE:
            continue
        words = []
        for ratio in study.ratios:
            gain = read(f"{ratio}/{method}") - read(f"{ratio}/{ALONE}")
            word = "more" if (gain > 0).all() else "less" if (gain < 0).all() else "no consistent change"
            words.append(f"{word} at {ratio}")
        said.append(f"{method} against {ALONE} reads: {', '.join(words)}.")
    said.append(
        f"One task, one tiny model, {study.test.boards} boards a seed: this shows whether the mechanism works, not what"
        " it gives a large model."
    )
    return said
