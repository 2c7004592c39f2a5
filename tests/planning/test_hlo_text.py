"""Shapes, layouts and instructions as the TPU compiler writes them."""

from jaxmem.planning.hlo_text import arrays, elements, parse

TUPLE = "(bf16[4,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/(s32[], pred[3,5]{0,1}), u4[7]{0:T(256)E(4)}, token[])"

TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=4

FileNames
1 "f.py"

%fused (p: f32[8,8]) -> (f32[8,8], s32[]) {
  %p = f32[8,8]{1,0} parameter(0)
  %c = s32[] constant(3)
  ROOT %t = (f32[8,8]{1,0}, s32[]) tuple(%p, /*index=1*/%c)
}

ENTRY %main.1_spmd (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0), metadata={op_name="x(1)"}
  %f = (f32[8,8]{1,0}, s32[]) fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/a = b"}
  ROOT %g = f32[8,8]{1,0} get-tuple-element(%f), index=0
}
"""


def test_arrays_of_a_nested_tuple():
    found = arrays(TUPLE)
    assert [(a.dtype, a.dims, a.space) for a in found] == [
        ("bf16", (4, 128), 1),
        ("s32", (), 0),
        ("pred", (3, 5), 0),
        ("u4", (7,), 0),
        ("token", (), 0),
    ]
    assert [a.size for a in found] == [1024, 4, 15, 4, 0]


def test_tiles_pad_what_is_stored():
    for shape, stored in (
        ("f32[10,3]{1,0:T(8,128)}", 4 * 16 * 128),
        ("f32[10,3]{0,1:T(8,128)}", 4 * 8 * 128),
        ("bf16[2,3,5]{2,0,1:T(4,128)(2,1)}", 2 * 3 * 4 * 128),
        ("f32[100]{0:T(1024)}", 4 * 1024),
        ("f32[10,3]{1,0}", 4 * 30),
        ("f8e4m3fn[16]", 16),
    ):
        assert arrays(shape)[0].stored == stored, shape


def test_elements_of_a_tuple():
    assert [len(part) for part in elements(TUPLE)] == [1, 2, 1, 1]
    assert [len(part) for part in elements("f32[2]{0}")] == [1]


def test_a_module():
    module = parse(TEXT)
    assert (module.name, module.devices, module.entry.name) == ("jit_f", 4, "main.1_spmd")
    assert list(module.computations) == ["fused", "main.1_spmd"]
    fusion = module.entry.instructions["f"]
    assert (fusion.opcode, fusion.operands, fusion.called("calls")) == ("fusion", ("x",), "fused")
    assert module.entry.root.opcode == "get-tuple-element"
    assert module.computations["fused"].root.operands == ("p", "c")
