"""The study of compression: its table, and acceptance check 28 at the ratio where something is lost."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmem import config as configs
from jaxmem.analysis import compression
from jaxmem.analysis.compression import CompressionConfig
from jaxmem.errors import ConfigError

RECIPE = Path(__file__).parents[2] / "configs" / "digits_vr.py"


def recipe(**changes: Any) -> CompressionConfig:
    """The shipped study with some fields replaced."""
    spec = importlib.util.spec_from_file_location("digits_vr", RECIPE)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return configs.build(CompressionConfig, {**module.get_config().to_dict(), **changes}, "config")


def test_the_table_pairs_every_method_with_none_and_says_what_all_seeds_say() -> None:
    study = recipe(ratios=(2, 3))
    reads = {"none": (0.5, 0.6, 0.7), "vr_v1": (0.6, 0.65, 0.9), "deepstack": (0.4, 0.7, 0.7), "fastv": (0.5, 0.5, 0.5)}
    found = {"1/none": {str(seed): {"read": 0.9, "exact": 0.5} for seed in range(3)}}
    for ratio in (2, 3):
        for method in (*study.methods, "fastv"):
            values = reads.get(method, (0.3, 0.4, 0.5))
            found[f"{ratio}/{method}"] = {str(s): {"read": v, "exact": 0.1} for s, v in enumerate(values)}
    lines = compression.table(study, found).splitlines()
    names = lines[2].split()[1:]
    paired = lines[lines.index("paired difference to none, same seed, same boards") + 1]
    gains = paired.split(maxsplit=1)[1].replace(" +- ", "+-").split()
    shown = dict(zip([name for name in names if name != "none"], gains, strict=True))
    assert shown["vr_v1"].startswith("+0.117+-") and shown["deepstack"].startswith("+0.000+-")
    assert shown["fastv"].startswith("-0.100+-") and shown["vr_v2"].startswith("-0.200+-")
    text = "\n".join(lines)
    assert "vr_v1 against none reads: more at 2, more at 3." in text
    assert (
        "deepstack against none reads: no consistent change at 2" in text
        and "sva against none reads: less at 2" in text
    )


def test_a_study_needs_its_reference_and_a_compressed_model() -> None:
    with pytest.raises(ConfigError, match='methods needs "none"'):
        recipe(methods={"vr_v1": {"name": "vision_remember"}})
    with pytest.raises(ConfigError, match="name compressed models"):
        recipe(ratios=(1, 2))


@pytest.mark.slow
def test_check_28_vision_remember_reads_more_than_none_where_digits_share_tokens(tmp_path: Path) -> None:
    methods = {name: recipe().methods[name] for name in ("none", "vr_v1")}
    study = recipe(output=str(tmp_path), ratios=(3,), fastv=None, methods=methods)
    found = [compression.run_seed(study, seed) for seed in study.seeds]
    gains = np.array([one["3/vr_v1"]["read"] - one["3/none"]["read"] for one in found])
    assert (gains > 0).all(), gains  # +.015, +.013 and +.019 when it was written
