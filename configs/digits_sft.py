"""The digit boards with the paper's plain Stage I, for comparison with `digits_quickstart.py`.

    jaxmem train --config=configs/digits_sft.py

No visual-key blocking, N(0, 0.02^2) initialisation, one learning rate. On a backbone that sees its short samples well
a memory gets little gradient this way; the difference between the two reports is what blocking is for.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxmem.config import load


def get_config() -> ConfigDict:
    config = ConfigDict(load(str(Path(__file__).with_name("digits_quickstart.py"))).to_dict())
    config.output = "runs/digits_sft"
    config.memory.initialiser = "normal"
    config.loop.p_block = 0.0
    config.optimizer.multipliers = ()
    return config
