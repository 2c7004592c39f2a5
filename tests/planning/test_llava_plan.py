"""What a plan takes a LLaVA-style run to be: batches as the collator makes them, and operations by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmem.backbones.published import PUBLISHED
from jaxmem.memory import vision_remember
from jaxmem.model import Spec
from jaxmem.planning.batches import Shape, abstract
from jaxmem.planning.needed import Needed
from tests.distributed import test_vr_meshes as world


def test_an_abstract_batch_has_the_fields_and_types_of_a_real_one() -> None:
    real = world.batch()
    rows, tokens = real.tokens.shape
    made = abstract((rows,), Shape(tokens, real.patches.shape[1], question=True), world.BACKBONE)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == np.asarray(b).dtype, made, real)
    assert jax.tree.all(same)


def test_patches_are_rounded_up_to_whole_tiles() -> None:
    assert abstract((1,), Shape(8, 17), world.BACKBONE).patches.shape[1] == 32


@pytest.mark.parametrize(("impl", "tera"), [("direct", 0.122), ("absorbed", 0.042)])
def test_a_second_look_takes_the_operations_of_its_formulas(impl: str, tera: float) -> None:
    """Five tiles of 144 tokens, as in the paper's size."""
    backbone = PUBLISHED["LLaVA-VR-2B"]
    memory = vision_remember.create(backbone, impl=impl)
    one, none = (Needed(Spec(backbone, some), {}, 784, 5 * 576).read_row() for some in ((memory,), ()))
    assert (one - none) / 1e12 == pytest.approx(tera, abs=0.001)


def test_the_tower_takes_what_a_clip_takes() -> None:
    """About 0.38 TFLOP for a tile of 336 pixels."""
    backbone = PUBLISHED["LLaVA-VR-2B"]
    per_tile = (Needed(Spec(backbone), {}, 8, 1152).read_row() - Needed(Spec(backbone), {}, 8, 576).read_row()) / 1e12
    assert per_tile == pytest.approx(0.37, abs=0.02)
