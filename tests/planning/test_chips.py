"""Topologies by name, and what is wrong with a name."""

import pytest

from jaxmem.errors import ConfigError
from jaxmem.planning.chips import CHIPS, topology


@pytest.mark.parametrize(
    "name, chips, devices, hosts",
    [
        ("v5e:4x4", 16, 16, 4),
        ("v6e:16x16", 256, 256, 64),
        ("v5p:4x4x4", 64, 64, 16),
        ("v5p:2x2x1", 4, 4, 1),
        ("v5p:8x16x16", 2048, 2048, 512),
        ("tpu7x:2x2x2", 8, 16, 2),
        ("v4:2x2x1", 4, 4, 1),
        ("v5e:1x1", 1, 1, 1),
        ("h100:8", 8, 8, 1),
        ("h200:2x8", 16, 16, 2),
    ],
)
def test_counts(name, chips, devices, hosts):
    found = topology(name)
    assert (found.chips, found.devices, found.hosts) == (chips, devices, hosts)


@pytest.mark.parametrize(
    "name, says",
    [
        ("v9:4x4", "v4, v5e, v5p"),
        ("v5e", "write CHIP:SHAPE"),
        ("v5e:3x5", "v5e:2x4, v5e:4x4"),
        ("v5e:32x32", "v5e:16x16"),
        ("v5p:4x4", "near it are"),
        ("v5p:5x4x4", "v5p:4x4x4"),
        ("h100:16", "1 to 8 GPUs per node"),
        ("h100:0x8", "1 to 8 GPUs per node"),
    ],
)
def test_names_that_are_wrong(name, says):
    with pytest.raises(ConfigError, match=says):
        topology(name)


def test_gpus_have_no_abstract_devices():
    with pytest.raises(ConfigError, match="arithmetic"):
        topology("h100:8").abstract_devices()


def test_figures_have_the_right_order():
    """A slip of a unit would show as an odd balance of FLOPs and bytes."""
    for chip in CHIPS.values():
        assert 100 < chip.flops / chip.bandwidth < 700, chip.name
        assert 3 < chip.bandwidth / chip.interconnect < 14, chip.name
        assert 15e9 < chip.memory / chip.devices < 200e9, chip.name
