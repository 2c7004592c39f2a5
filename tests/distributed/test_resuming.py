"""A run goes on with other devices: another mesh, more of them, fewer of them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmem import api
from jaxmem.distributed.mesh import make_mesh
from jaxmem.errors import ConfigError
from jaxmem.training import loop, metrics, run
from tests.training.test_run import folder, settings  # noqa: F401

STEPS = {"steps": 6, "checkpoint_every": 1, "checkpoint_seconds": 0.0, "eval_every": 0, "p_block": 0.5}
EVERYTHING = {"trainable": ["**", "!base/visual"], "evaluation": None}


def config(folder, output, mesh):  # noqa: F811
    wanted = settings(folder, output, **EVERYTHING, mesh=mesh)
    return wanted | {"loop": wanted["loop"] | STEPS, "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0.0}}


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):  # noqa: F811
    return run.train(config(folder, tmp_path_factory.mktemp("undisturbed"), {}))


@pytest.mark.parametrize(
    "first, second",
    [
        ({"fsdp": 2, "tensor": 2}, {"data": 2, "sequence": 2}),
        pytest.param({"fsdp": 2, "sequence": 2}, {}, marks=pytest.mark.slow),
    ],
)
def test_another_mesh_continues_the_same_run(folder, undisturbed, tmp_path, monkeypatch, first, second):  # noqa: F811
    place, calls = loop.place, []

    def dying(*arguments):
        calls.append(len(calls))
        if len(calls) == 4:
            raise RuntimeError("the machine was taken away")
        return place(*arguments)

    monkeypatch.setattr(loop, "place", dying)
    with pytest.raises(RuntimeError, match="taken away"):
        run.train(config(folder, tmp_path, first))
    again = run.train(config(folder, tmp_path, second))
    assert calls == list(range(7))  # three steps, the one that died, and the three that were left
    ours, known = ([line for line in metrics.read(one.output) if "loss" in line] for one in (again, undisturbed))
    assert [line["step"] for line in ours] == list(range(1, 7))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in known], rtol=2e-5)
    for one, other in zip(jax.tree.leaves(again.model.base), jax.tree.leaves(undisturbed.model.base), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=2e-5)


def test_a_model_on_a_mesh_answers_like_one_on_a_device(folder):  # noqa: F811
    chat = [{"role": "user", "content": [{"type": "text", "text": "the quick brown fox"}]}]
    plain = api.load(folder).attach("pvm", layers=(1,), latent=16, gate=0.2)
    model = api.load(folder, mesh=make_mesh(fsdp=2, tensor=2)).attach("pvm", layers=(1,), latent=16, gate=0.2)
    assert len(model.base["layers"]["ffn"]["up"]["kernel"].sharding.device_set) == 4
    want, found = (one.generate([chat, chat], max_new_tokens=5) for one in (plain, model))
    assert [one.tokens for one in found] == [one.tokens for one in want]
    np.testing.assert_allclose(model.logits(model.batch(chat)), plain.logits(plain.batch(chat)), atol=1e-5)
    with pytest.raises(ConfigError, match="mesh.tensor = 4 does not divide the decoder's 2 key heads; use 1, 2"):
        api.load(folder, mesh=make_mesh(tensor=4))
