"""A small run as a program of its own, to be killed: `python -m tests.training.survivor FOLDER [SETTING=NUMBER ...]`.

It prints "up" when it can be interrupted and ends with the exit code that the command has. Its state has some
megabytes, so that saving takes a while, and every step writes down which records it read. With `JAX_NUM_PROCESSES`
set it runs on all processes, the rows of each batch over them.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.checkpoints.native import CheckpointStore
from jaxmem.data.pipeline import Pipeline
from jaxmem.distributed import hosts
from jaxmem.errors import JaxmemError
from jaxmem.training import descent, loop, sft, trees
from jaxmem.training.loop import Job, LoopConfig
from jaxmem.training.optimizer import OptimizerConfig
from jaxmem.training.signals import Signals
from tests.training.tiny_run import VOCAB, assemble, encode

STEPS, CONFIG, ORDER = 24, OptimizerConfig(learning_rate=1e-2), "order.jsonl"
RECORDS = [{"seed": i, "answer": 1 + i % 4} for i in range(20)]


def tree(wide):
    """The embedding table that stays and the memory that trains, `wide` numbers of it only to be saved."""
    base = {"embed": jax.random.normal(jax.random.key(0), (VOCAB, 8))}
    return {"base": base, "memory": {"m": jnp.eye(8), "wide": jnp.ones((wide // 8, 8))}}


def forward(tree, batch, dropout):
    """[B, L, 8]; every row of the wide part is read by some token."""
    memory = tree["memory"]
    hidden = tree["base"]["embed"][batch.tokens] @ memory["m"] * memory["wide"][batch.tokens % len(memory["wide"])]
    return hidden, tree["base"]["embed"]


def work(folder, wide=400_000, pause=0.0, steps=STEPS, **settings):
    """(job, first state) of the run; `settings` are of the loop."""
    settings = {"batch_size": 4, "checkpoint_every": 3, "eval_every": 8, "checkpoint_seconds": 0} | settings
    config = LoopConfig(**settings, progress=False, tensorboard=False)
    trainable, frozen = trees.split(tree(int(wide)), "memory")
    state = descent.init_state(CONFIG, trainable, 1)
    data = Pipeline(RECORDS, encode, assemble, 4)
    place = _placing()
    state, frozen = place(state), place(frozen)
    train = sft.make_train_step(forward, CONFIG, steps, trainable)
    judge = sft.make_eval_step(forward)

    def step(state, rows, done):
        if hosts.first():
            with open(folder / ORDER, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": done + 1, "rows": rows.names}) + "\n")
        time.sleep(pause)
        return train(state, frozen, place(jax.tree.map(lambda leaf: leaf[None], rows.batch), rows=True))

    def evaluate(state):
        batches = [place(rows.batch) for rows in data.epoch()]
        return {f"eval/{k}": v for k, v in sft.evaluate(judge, state.trainable, frozen, batches).items()}

    return Job(config, int(steps), step, frozen, data, evaluate), state


def _placing():
    """(tree, rows over the processes?) -> the tree on the devices of all processes."""
    if hosts.count() == 1:
        return lambda tree, rows=False: jax.tree.map(jnp.asarray, tree)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))

    def one(leaf, rows):
        sharding = jax.NamedSharding(mesh, jax.P(None, "data") if rows else jax.P())
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf), False))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf)[index])

    return lambda tree, rows=False: jax.tree.map(lambda leaf: one(leaf, rows), tree)


def go(folder, **settings):
    """Runs to the end or to the signal; returns (state, last metrics)."""
    with Signals(wait=False):
        print("up", flush=True)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        job, state = work(folder, **settings)
        with CheckpointStore(folder / "checkpoints", {"run": 1}, every=job.config.checkpoint_every) as store:
            return loop.run(job, state, store, folder)


def main(folder, *settings):
    """The exit code of the program."""
    hosts.start(hosts.HostsConfig(timeout_s=60))
    named = {
        name: float(value) if name in ("pause", "checkpoint_seconds") else int(value)
        for name, value in (setting.split("=") for setting in settings)
    }
    try:
        with hosts.together():
            go(folder, **named)
    except JaxmemError as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
