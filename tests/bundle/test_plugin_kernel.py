from __future__ import annotations

import json
from typing import Any

import pytest

from wanx.bundle.plugin_kernel import (
    LARGEST,
    MAX_DESCRIPTION,
    Description,
    PluginKernel,
    Pointer,
    Value,
    Variant,
    evaluate,
    read_plugin_kernel,
)
from wanx.errors import CorruptInputError, EnvironmentMismatchError, WanxError

CODE = b"\x7fELF" + bytes(28)
VARIANT: dict[str, Any] = {
    "sm": 89,
    "function": "_kernel",
    "size": 32,
    "warps": 4,
    "shared": 1024,
    "arguments": [{"tensor": 0}, {"tensor": 1}, {"integer": ["b", 512, "*"]}, {"real": 0.5}],
    "grid": [[-1, "b", -1, "*", 4, "//", "*"], ["a"], [2]],
}
DESCRIPTION: dict[str, Any] = {
    "op": "Foo",
    "inputs": [{"dtype": "bf16", "shape": ["a", "b", 512]}],
    "outputs": [{"dtype": "fp8", "shape": ["a", "b", 512]}],
    "variants": [VARIANT],
}


def described(**changes: Any) -> bytes:
    return json.dumps(DESCRIPTION | changes).encode()


def varied(**changes: Any) -> bytes:
    return described(variants=[VARIANT | changes])


def test_a_kernel_survives_its_fields() -> None:
    kernel = read_plugin_kernel(described(), CODE)
    assert read_plugin_kernel(*kernel.fields()) == kernel


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 4096, 75600])
def test_sizes_follow_the_shapes(length: int) -> None:
    description = read_plugin_kernel(described(), CODE).description
    (variant,) = description.variants
    axes = description.axes_at([(3, length, 512)])
    assert axes == {"a": 3, "b": length}
    assert variant.grid_at(axes) == ((length + 3) // 4, 3, 2)
    assert variant.integers_at(axes) == {2: 512 * length}


@pytest.mark.parametrize("shape", [(3, 5, 511), (3, 5), (3, 5, 512, 1), ()])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    description = read_plugin_kernel(described(), CODE).description
    with pytest.raises(WanxError, match=r"Foo was compiled for \[a, b, 512\], not \["):
        description.axes_at([shape])
    with pytest.raises(WanxError, match="has 1 inputs, not 2"):
        description.axes_at([shape, shape])


def test_one_axis_has_one_size() -> None:
    value = Value(dtype="fp32", shape=("a", "a"))
    description = read_plugin_kernel(described(), CODE).description
    square = description.model_copy(update={"inputs": (value,)})
    assert square.axes_at([(4, 4)]) == {"a": 4}
    with pytest.raises(WanxError, match="was compiled for"):
        square.axes_at([(4, 5)])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scalar_may_have_axes(shape: tuple[int, ...]) -> None:
    inputs = [*DESCRIPTION["inputs"], {"dtype": "fp32", "shape": []}]
    description = read_plugin_kernel(described(inputs=inputs), CODE).description
    assert description.axes_at([(3, 5, 512), shape]) == {"a": 3, "b": 5}
    with pytest.raises(WanxError, match="was compiled for"):
        description.axes_at([(3, 5, 512), (2,)])


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (b"", "JSON"),
        (b"\xff", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"{" * (MAX_DESCRIPTION + 1), "bytes"),
        (described(schema_version=2), "schema_version"),
        (described(extra=1), "extra"),
        (described(op="a b"), "op"),
        (described(inputs=[]), "inputs"),
        (described(inputs=[{"dtype": "fp64", "shape": []}]), "dtype"),
        (described(outputs=[{"dtype": "fp8", "shape": ["c"]}]), "axis that no input has"),
        (described(variants=[VARIANT, VARIANT]), "one GPU"),
        (varied(size=33), "not 32 bytes"),
        (varied(size=0), "size"),
        (varied(function="x" * 200), "function"),
        (varied(warps=33), "warps"),
        (varied(shared=1 << 20), "shared"),
        (varied(arguments=[{"tensor": 2}]), "no tensor"),
        (varied(arguments=[{"tensor": 0, "offset": -16}]), "offset"),
        (varied(arguments=[{"integer": [1, 2]}]), "several values"),
        (varied(arguments=[{"integer": ["+"]}]), "lacks operands"),
        (varied(arguments=[{"integer": ["z"]}]), "axis z"),
        (varied(arguments=[{"integer": ["__import__('os')"]}]), "arguments"),
        (varied(arguments=[{"integer": [1] * 33}]), "arguments"),
        (varied(arguments=[{"integer": [LARGEST + 1]}]), "arguments"),
        (varied(arguments=[{"real": "1"}]), "arguments"),
        (varied(grid=[[1]]), "grid"),
    ],
)
def test_foreign_descriptions_are_refused_in_one_line(description: bytes, reason: str) -> None:
    with pytest.raises(CorruptInputError) as caught:
        read_plugin_kernel(description, CODE)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_code_that_is_none_is_refused() -> None:
    with pytest.raises(CorruptInputError, match="no compiled code"):
        read_plugin_kernel(described(), b"MZ" + bytes(30))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (("b", 0, "//"), "divides by zero"),
        ((LARGEST, LARGEST, "*", LARGEST, "*"), "past 64 bits"),
    ],
)
def test_expressions_are_bounded(expression: tuple[Any, ...], message: str) -> None:
    with pytest.raises(WanxError, match=message):
        evaluate(expression, {"b": 5})


def test_counts_that_no_gpu_takes_are_refused() -> None:
    (variant,) = read_plugin_kernel(described(), CODE).description.variants
    with pytest.raises(WanxError, match="blocks; choose a smaller size"):
        variant.grid_at({"a": 65536, "b": 8})
    with pytest.raises(WanxError, match="past 32 bits"):
        variant.integers_at({"a": 1, "b": 1 << 22})


@pytest.mark.parametrize(
    ("built", "gpu", "chosen"),
    [
        ((80, 89), 89, 89),
        ((80, 89), 86, 80),
        ((80, 86), 89, 86),
        ((89, 120), 120, 120),
        ((89, 120), 86, None),
        ((89, 120), 90, None),
        ((120,), 121, None),
        ((100,), 103, None),
    ],
)
def test_the_nearest_binary_runs(built: tuple[int, ...], gpu: int, chosen: int | None) -> None:
    variants = tuple(
        Variant(
            sm=sm, function=f"_sm{sm}", size=5, warps=1, shared=0,
            arguments=(Pointer(tensor=0),), grid=((1,), (1,), (1,)),
        )
        for sm in built
    )  # fmt: skip
    value = Value(dtype="fp32", shape=("a",))
    description = Description(op="Foo", inputs=(value,), outputs=(value,), variants=variants)
    code = b"".join(b"\x7fELF" + bytes([sm]) for sm in built)
    kernel = PluginKernel(description=description, code=code)
    if chosen is None:
        with pytest.raises(EnvironmentMismatchError, match=f"this GPU is sm{gpu}"):
            kernel.variant_for(gpu)
    else:
        variant, binary = kernel.variant_for(gpu)
        assert (variant.sm, binary[-1]) == (chosen, chosen)
