"""The mapping table engine against plain numpy, without any file."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.checkpoints import table
from jaxmem.checkpoints.table import (
    Reshape,
    Rule,
    Transpose,
    View,
    expected,
    flatten,
    unflatten,
    view,
    write_tree,
)
from jaxmem.checkpoints.weights import open_file, write_file

CASES = {
    "plain": ((5, 3), ()),
    "transpose": ((5, 3), (Transpose(),)),
    "convolution": ((6, 3, 2, 2, 2), (Reshape((3, 2, 2, 2), (24,)), Transpose())),
    "scalar": ((1,), (Reshape((1,), ()),)),
}
STACKS = {
    "one": (),
    "layers": (("i", (0, 1, 2)),),
    "slots": (("i", (7, 3)),),
    "experts": (("i", (0, 1)), ("e", (4, 2, 9))),
}


def counted(array: np.ndarray) -> tuple[View, list[int]]:
    """A view of an array, and a list of how many numbers each read took."""
    taken: list[int] = []

    def box(index):
        taken.append(array[index].size)
        return array[index]

    return View(array.shape, array.dtype, box), taken


def family(shape, stack, seed=0) -> dict[str, np.ndarray]:
    """Random tensors named t.<i>.<e>..."""
    rng = np.random.default_rng(seed)
    names = ["t" + "".join(f".{v}" for v in values) for values in itertools.product(*(v for _, v in stack))]
    return {name: rng.standard_normal(shape).astype(np.float32) for name in names}


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize(("shape", "operations"), CASES.values(), ids=CASES)
def test_rule_is_its_own_inverse(shape, operations, stack):
    tensors = family(shape, stack)
    rule = Rule("a/b", "t" + "".join(f".{{{name}}}" for name, _ in stack), operations, stack)
    source = rule.read({name: view(array) for name, array in tensors.items()})
    leaf = source.read()
    assert leaf.shape == source.shape
    assert source.shape[: len(stack)] == tuple(len(values) for _, values in stack)
    for place in (leaf, jnp.asarray(leaf)):  # numpy and jax leaves write alike
        written = dict(rule.write(view(place)))
        assert list(written) == list(tensors)
        for name, array in tensors.items():
            assert written[name].shape == array.shape
            np.testing.assert_array_equal(written[name].read(), array)


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize(("shape", "operations"), CASES.values(), ids=CASES)
def test_every_box_equals_the_slice_of_the_whole(shape, operations, stack):
    tensors = family(shape, stack)
    rule = Rule("a", "t" + "".join(f".{{{name}}}" for name, _ in stack), operations, stack)
    source = rule.read({name: view(array) for name, array in tensors.items()})
    whole, rng = source.read(), np.random.default_rng(1)
    for _ in range(20):
        starts = [int(rng.integers(0, size)) for size in whole.shape]
        box = tuple(slice(a, int(rng.integers(a + 1, n + 1))) for a, n in zip(starts, whole.shape, strict=True))
        np.testing.assert_array_equal(source.read(box), whole[box])
        for name, part in rule.write(view(whole)):
            cut = tuple(slice(n // 2, n) for n in part.shape)
            np.testing.assert_array_equal(part.read(cut), tensors[name][cut])


def test_a_box_reads_only_what_it_needs():
    sources = {f"t.{i}": counted(np.arange(40.0).reshape(8, 5)) for i in range(4)}
    rule = Rule("a", "t.{i}", (Transpose(),), (("i", (0, 1, 2, 3)),))
    block = rule.read({name: source for name, (source, _) in sources.items()}).read(
        (slice(1, 3), slice(0, 5), slice(2, 4))
    )
    assert block.shape == (2, 5, 2)
    assert [taken for _, taken in sources.values()] == [[], [10], [10], []]


@pytest.mark.parametrize("piece", [1 << 24, 10_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(700, 130), (3, 130, 700), (2, 300, 513)])
def test_arrays_larger_than_a_piece_are_copied_whole(monkeypatch, shape, dtype, piece):
    monkeypatch.setattr(table, "_PIECE", piece)
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    swapped = Transpose().read(view(array)).read()
    assert swapped.flags.c_contiguous
    np.testing.assert_array_equal(swapped, np.swapaxes(array, -1, -2))
    every_other = view(array[..., ::2]).read()
    assert every_other.flags.c_contiguous
    np.testing.assert_array_equal(every_other, array[..., ::2])


def test_files_are_left_alone_once_read(tmp_path):
    path, stack = tmp_path / "a.safetensors", (("i", (0, 1)),)
    arrays = {"t.0": np.ones((6, 5), np.float32), "t.1": np.full((6, 5), 2, np.float32), "u": np.ones(3, np.float32)}
    write_file(path, [(name, view(array)) for name, array in arrays.items()])
    tensors = open_file(path)
    read = [rule.read(tensors).read() for rule in (Rule("a", "t.{i}", (Transpose(),), stack), Rule("b", "u"))]
    path.write_bytes(bytes(path.stat().st_size))  # the same file, emptied: the maps see it
    assert tensors["u"].read().tolist() == [0, 0, 0]
    np.testing.assert_array_equal(read[0], np.stack([np.ones((5, 6)), np.full((5, 6), 2)]))
    assert read[1].tolist() == [1, 1, 1]


def test_jax_on_a_cpu_takes_what_was_read_as_it_is(tmp_path):
    write_file(tmp_path / "a.safetensors", [("t", view(np.ones((64, 48), np.float32)))])
    read = Transpose().read(open_file(tmp_path / "a.safetensors")["t"]).read()
    assert jax.device_put(read).unsafe_buffer_pointer() == read.ctypes.data


def test_cast_rounds_to_nearest_even():
    source = view(np.array([1 + 2**-8, 1 + 3 * 2**-8, 3.0e38], np.float32)).cast("bfloat16")
    assert source.dtype == jnp.bfloat16
    assert source.read().tolist() == [1.0, 1 + 2**-6, float(jnp.bfloat16(3.0e38))]


def test_sharded_leaf_writes_like_a_whole_one():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    leaf = np.arange(3 * 8 * 6, dtype=np.float32).reshape(3, 8, 6)
    placed = jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor")))
    rule = Rule("a", "t.{i}", (Transpose(),), (("i", (0, 1, 2)),))
    for index, (_, tensor) in enumerate(rule.write(view(placed))):
        np.testing.assert_array_equal(tensor.read(), leaf[index].T)


def test_expected_reads_nothing_and_disagreements_are_named():
    rules = (Rule("a/kernel", "t.{i}", (Transpose(),), (("i", (0, 1)),)), Rule("b", "u"))
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((2, 3, 4), "float32")}, "b": jax.ShapeDtypeStruct((5,), "float32")}
    assert expected(rules, shapes) == {"t.0": (4, 3), "t.1": (4, 3), "u": (5,)}
    with pytest.raises(ValueError, match="differ at b, c"):
        list(write_tree(rules, {"a": shapes["a"], "c": shapes["b"]}))
    with pytest.raises(ValueError, match=r"a/kernel: shape \(3, 3, 4\), but its rule stacks 2"):
        list(write_tree(rules, {"a": {"kernel": jax.ShapeDtypeStruct((3, 3, 4), "float32")}, "b": shapes["b"]}))


def test_flatten_and_unflatten():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
