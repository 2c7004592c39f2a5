"""The digit recipes, short: a configuration file for tests/distributed/test_two_hosts.py."""

from pathlib import Path

from ml_collections import ConfigDict

from jaxmem.config import load

CONFIGS = Path(__file__).parents[2] / "configs"


def get_config(kind: str) -> ConfigDict:
    return {"supervised": supervised, "reinforced": reinforced}[kind]()


def supervised() -> ConfigDict:
    config = load(str(CONFIGS / "digits_quickstart.py")).to_dict()
    config["experiment"] = None
    config["data"]["boards"] |= {"k": (0,), "n": (4,)}
    config["loop"] |= {"steps": 12, "batch_size": 8, "accumulate": 2, "eval_every": 6}
    return evaluated(config, 20)


def reinforced() -> ConfigDict:
    config = load(str(CONFIGS / "digits_pvm_grpo.py")).to_dict()
    config["seeds"] = ()
    config["data"]["boards"] |= {"k": (32,)}
    config["data"]["buckets"]["tokens"] = (80,)
    config["loop"] |= {"steps": 8}
    return evaluated(config, 8)


def evaluated(config: dict, size: int) -> ConfigDict:
    boards = {**config["data"]["boards"], "split": "test", "size": size}
    config["evaluation"] = {**config["data"], "boards": boards}
    config["loop"] |= {"checkpoint_every": 2, "checkpoint_seconds": 0.0}
    return ConfigDict(config)
