"""The VisMem experiment on digit boards: its table and claims, from made-up measurements, and one real measurement."""

from __future__ import annotations

import json

import pytest

import jaxmem
from jaxmem.analysis import digit_vismem
from jaxmem.errors import CheckpointError, ConfigError


def run_of(folder, far_memory, far_calls, near_calls=0.25):
    """A run's measurements with given readings; everything else is the same in all runs."""
    read = {"off": 0.3, "memory": far_memory, "zero": 0.25, "noise": 0.2, "shuffle": 0.28}

    def at(words, reads, calls):
        found = {f"{words}/{name}": {"read": value, "short": 0.0, "long": 1.0} for name, value in reads.items()}
        return {**found, f"{words}/called": {"read": 0.5, "short": calls / 2, "long": calls / 2}}

    before = {**at(0, dict.fromkeys(read, 0.9), 0.2), **at(256, read, 0.2)}
    after = {**at(0, dict.fromkeys(read, 0.9), near_calls), **at(256, read, far_calls)}
    folder.mkdir()
    (folder / digit_vismem.KEPT).write_text(json.dumps({"before": before, "after": after}))
    return folder


def test_claims_say_what_was_measured(tmp_path):
    runs = [run_of(tmp_path / "a", 0.8, 0.75), run_of(tmp_path / "b", 0.6, 0.45)]
    text = digit_vismem.summary(runs)
    assert "   256  memory              0.700 +- 0.141    1.000 +- 0.000" in text
    assert "helps far from the image: yes; it changes reading by +0.400 +- 0.141 at 256 words and by +0.000" in text
    assert "what the memory says that helps: yes; the best memory without information reads 0.280 +- 0.000" in text
    assert "calls more where memory helps: yes; 0.600 +- 0.212 of the answers at 256 words" in text


def test_claims_that_fail_say_so(tmp_path):
    runs = [run_of(tmp_path / "a", 0.2, 0.1), run_of(tmp_path / "b", 0.6, 0.45)]
    text = digit_vismem.summary(runs)
    assert "helps far from the image: in some seeds" in text
    assert "calls more where memory helps: in some seeds" in text
    assert "helps far from the image: no; it changes reading by -0.100 at" in digit_vismem.summary(runs[:1])


def test_missing_measurements_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="before and after the stage is missing"):
        digit_vismem.read(tmp_path)
    with pytest.raises(ConfigError, match="unknown"):
        digit_vismem.open_experiment({"name": "digit_vismem", "bords": 3})
    with pytest.raises(ConfigError, match="the model has none"):
        digit_vismem.DigitVisMem().before(jaxmem.load(), tmp_path)


def test_a_measurement_of_every_condition(tmp_path):
    """On the tiny backbone: it reads nearly all near the image, and a memory stands where it was asked for."""
    settings = digit_vismem.DigitVisMem(k=(0, 16), boards=8, batch_size=8)
    options = {"row_token": None, "invoke_bias": -50.0, "builder_length": 56, "text_cap": 24}
    model = jaxmem.load(dtype="float32").attach("vismem", **options)
    settings.before(model, tmp_path)
    found = json.loads((tmp_path / digit_vismem.KEPT).read_text())["before"]
    assert set(found) == {f"{k}/{name}" for k in (0, 16) for name in [*digit_vismem.conditions(model)]}
    assert found["0/off"]["read"] >= 0.9
    never = ("off", "called")
    assert all(one["short"] + one["long"] == 1 for name, one in found.items() if not name.endswith(never))
    assert all(found[f"{k}/{name}"]["long"] == 0 for k in (0, 16) for name in ("off", "called"))
    assert found["0/called"]["read"] == found["0/off"]["read"]
