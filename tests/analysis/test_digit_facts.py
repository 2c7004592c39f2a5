"""The experiment on facts: what it asks the model, how it scores, and what its table says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import jaxmem
from jaxmem.analysis import digit_facts
from jaxmem.data.facts import FactDataset
from jaxmem.errors import CheckpointError, ConfigError


def test_scores():
    rows = [FactDataset(items=(2,))[i] for i in range(4)]
    right = [row.answer for row in rows]
    digit = (rows[1].digits[0] + 1) % 10
    said = [right[0], f"{right[1][0]}{digit}={digit} #{digit}", right[2] + "1", ""]
    assert digit_facts.score(said, rows) == {"exact": 0.25, "read": 0.5}
    assert digit_facts.score(right, rows) == {"exact": 1.0, "read": 1.0}


def test_every_condition_reaches_the_model(tmp_path, monkeypatch, capsys):
    """Another question's vectors, zeros, or none; the same questions each time."""
    model = jaxmem.load(dtype="float32").attach("comem", latents=2, depth=1, heads=4, rank=2, suffix="")
    settings = digit_facts.open_experiment({"name": "digit_facts", "items": (1, 3), "questions": 4, "batch_size": 4})
    seen = []

    def generate(self, chats, *, items=None, **more):
        seen.append((chats, items))
        return [jaxmem.Completion(chat[-1]["content"], (), (), True) if items else jaxmem.Completion("", (), (), True)
                for chat in chats]  # fmt: skip

    monkeypatch.setattr(jaxmem.Model, "generate", generate)
    settings.before(model, tmp_path)
    settings.after(model, tmp_path, {})
    assert len(seen) == 2 * len(digit_facts.CONDITIONS)
    for start, count in ((0, 1), (4, 3)):
        off, memory, shuffled, zero = seen[start : start + 4]
        rows = [FactDataset("test", 5, (count,), size=4)[i] for i in range(4)]
        vectors = model.encode_items([item for row in rows for item in row.items], batch=4).reshape(4, count, 2, -1)
        np.testing.assert_allclose(np.stack(memory[1]), vectors, atol=1e-5)
        np.testing.assert_allclose(np.stack(shuffled[1]), np.roll(vectors, 1, axis=0), atol=1e-5)
        assert off[1] is None and not np.any(np.stack(zero[1]))
        assert off[0] == memory[0] == [row.question for row in rows]
    assert "luck): yes" in capsys.readouterr().out
    assert set(json.loads((tmp_path / digit_facts.KEPT).read_text())) == {
        f"{count}/{condition}" for count in (1, 3) for condition in digit_facts.CONDITIONS
    }


def test_the_table_judges_every_seed(tmp_path):
    def kept(name, memory, off):
        (tmp_path / name).mkdir()
        found = {
            f"{k}/{c}": {"exact": memory if c == "memory" else off} for k in (1, 10) for c in digit_facts.CONDITIONS
        }
        (tmp_path / name / digit_facts.KEPT).write_text(json.dumps(found))
        return tmp_path / name

    good, weak = kept("good", 0.98, 0.0), kept("weak", 0.9, 0.01)
    assert "with 1 to 10 items: yes" in digit_facts.summary([good])
    table = digit_facts.summary([good, weak])
    assert "with 1 to 10 items: in some seeds" in table and "0.940 +- 0.057" in table
    with pytest.raises(CheckpointError, match="did not end with the experiment"):
        digit_facts.summary([tmp_path])


def test_a_model_without_comem_is_refused(tmp_path):
    settings = dataclasses.replace(digit_facts.DigitFacts(), questions=2)
    with pytest.raises(ConfigError, match="measures a CoMEM"):
        settings.before(jaxmem.load(dtype="float32"), tmp_path)
