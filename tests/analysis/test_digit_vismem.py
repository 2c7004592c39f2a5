"""The VisMem experiment on digit boards: its table and claims, from made-up measurements, and one real measurement."""

from __future__ import annotations

import json

import pytest

import jaxmem
from jaxmem.analysis import digit_vismem
from jaxmem.errors import CheckpointError, ConfigError


def run_of(folder, memory, hidden_calls, seen_calls=0.25):
    """A run's measurements with given readings; everything else is the same in all runs."""
    read = {"off": 0.3, "memory": memory, "zero": 0.25, "noise": 0.2, "shuffle": 0.28}

    def where(sight, reads, calls):
        found = {f"{sight}/{name}": {"read": value, "short": 0.0, "long": 1.0} for name, value in reads.items()}
        return {**found, f"{sight}/called": {"read": 0.5, "short": calls / 2, "long": calls / 2}}

    before = {**where("seen", dict.fromkeys(read, 0.9), 0.2), **where("hidden", read, 0.2)}
    after = {**where("seen", dict.fromkeys(read, 0.9), seen_calls), **where("hidden", read, hidden_calls)}
    folder.mkdir()
    (folder / digit_vismem.KEPT).write_text(json.dumps({"before": before, "after": after}))
    return folder


def test_claims_say_what_was_measured(tmp_path):
    runs = [run_of(tmp_path / "a", 0.8, 0.75), run_of(tmp_path / "b", 0.6, 0.45)]
    text = digit_vismem.summary(runs)
    assert "hidden  memory              0.700 +- 0.141    1.000 +- 0.000" in text
    assert "helps where the image is hidden: yes; it changes reading by +0.400 +- 0.141 there and by +0.000" in text
    assert "what the memory says that helps: yes; the best memory without information reads 0.280 +- 0.000" in text
    assert "calls more where memory helps: yes; 0.600 +- 0.212 of the answers have a memory where the" in text


def test_claims_that_fail_say_so(tmp_path):
    runs = [run_of(tmp_path / "a", 0.2, 0.1), run_of(tmp_path / "b", 0.6, 0.45)]
    text = digit_vismem.summary(runs)
    assert "helps where the image is hidden: in some seeds" in text
    assert "calls more where memory helps: in some seeds" in text
    assert "the image is hidden: no; it changes reading by -0.100 there" in digit_vismem.summary(runs[:1])


def test_missing_measurements_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="before and after the stage is missing"):
        digit_vismem.read(tmp_path)
    with pytest.raises(ConfigError, match="unknown"):
        digit_vismem.open_experiment({"name": "digit_vismem", "bords": 3})
    with pytest.raises(ConfigError, match="the model has none"):
        digit_vismem.DigitVisMem().before(jaxmem.load(), tmp_path)


@pytest.mark.slow  # compiles twelve decoding loops
def test_a_measurement_of_every_condition(tmp_path):
    """On the tiny backbone: it reads nearly all that it sees and guesses what it does not, and a memory
    stands where it was asked for."""
    settings = digit_vismem.DigitVisMem(boards=8, batch_size=8)
    options = {"row_token": None, "invoke_bias": -50.0, "builder_length": 56, "text_cap": 24}
    model = jaxmem.load(dtype="float32").attach("vismem", **options)
    settings.before(model, tmp_path)
    found = json.loads((tmp_path / digit_vismem.KEPT).read_text())["before"]
    sights = (digit_vismem.SEEN, digit_vismem.HIDDEN)
    assert set(found) == {f"{sight}/{name}" for sight in sights for name in [*digit_vismem.conditions(model)]}
    assert found["seen/off"]["read"] >= 0.9 and found["hidden/off"]["read"] <= 0.4
    never = ("off", "called")
    assert all(one["short"] + one["long"] == 1 for name, one in found.items() if not name.endswith(never))
    assert all(found[f"{sight}/{name}"]["long"] == 0 for sight in sights for name in ("off", "called"))
    assert found["seen/called"]["read"] == found["seen/off"]["read"]
