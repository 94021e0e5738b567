"""Ops that fuse others: their kernels, ONNX functions and registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
from interpreter import DEVICE
from onnx import TensorProto, helper
from torch import Tensor

from wanx.kernels.adaln import launch_adaln
from wanx.kernels.adaln_quantize import (
    AdaLNQuantize,
    AdaLNQuantizeRows,
    adaln_quantize_reference,
    adaln_quantize_rows_reference,
)
from wanx.kernels.gelu_quantize import (
    GeluQuantize,
    GeluQuantizeRows,
    gelu_quantize_reference,
    gelu_quantize_rows_reference,
)
from wanx.kernels.quantize import launch_quantize
from wanx.kernels.registry import NODES
from wanx.kernels.residual_adaln import (
    ResidualAdaLN,
    ResidualAdaLNQuantize,
    residual_adaln,
    residual_adaln_quantize_reference,
    residual_adaln_reference,
)
from wanx.kernels.rms_norm_rope import launch_rms_norm_rope
from wanx.kernels.rms_norm_rope_quantize import (
    RMSNormRopeQuantize,
    rms_norm_rope_quantize_reference,
)

EPS = 0.05
E4M3 = torch.float8_e4m3fn
EIGHT_BITS = [torch.int8, E4M3]
SHAPES = [(1, 1, 8), (2, 5, 96), (1, 9, 130)]


def samples(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def modulation(batch: int, dim: int, seed: int) -> Tensor:
    return samples(batch, 1, dim, seed=seed)


def adaln64(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return centred / deviation * (1 + scale) + shift


def gelu64(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def require_rounded(q: Tensor, exact: Tensor) -> None:
    """Off by one step at most, and that rarely; ``exact`` in steps, in fp64."""
    q = q.cpu()
    if q.dtype == torch.int8:
        error = (q.double() - exact.clamp(-128, 127)).abs() - 0.5
    else:
        exact = exact.clamp(-448, 448)
        step = torch.exp2(exact.abs().clamp_min(2.0**-6).log2().floor() - 3)
        error = (q.double() - exact).abs() / step - 0.5
    assert error.max() <= 0.01


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(DEVICE) for tensor in tensors)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_adaln_kernel(
    shape: tuple[int, int, int],
    x_type: torch.dtype,
    batch: int,
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    """Modulation of the whole batch or of each of its members."""
    batch, dim = min(batch, shape[0]), shape[-1]
    x, z = samples(*shape).to(x_type), samples(*shape, seed=1).to(torch.bfloat16)
    gate, scale, shift = (modulation(batch, dim, seed) for seed in (2, 3, 4))
    exact = x.double() + z.double() * gate.double()
    y = adaln64(exact, scale.double(), shift.double())
    arguments = on_device(x, scale, shift)
    z_gate = dict(zip(("z", "gate"), on_device(z, gate), strict=True))
    updated, out, _ = launch_adaln(*arguments, EPS, dtype=torch.bfloat16, **z_gate)
    assert (updated.dtype, out.dtype) == (x_type, torch.bfloat16)
    assert_rounded_once(updated.cpu(), exact)
    assert_rounded_once(out.cpu(), y)
    for dtype in EIGHT_BITS:
        step = torch.tensor(0.02)
        updated, q, _ = launch_adaln(
            *arguments, EPS, dtype=dtype, q_scale=step.to(DEVICE), **z_gate
        )
        assert_rounded_once(updated.cpu(), exact)
        require_rounded(q, y / step.double())


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_adaln_quantize_kernel(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, step = samples(*shape), torch.tensor(0.02)
    scale, shift = (modulation(shape[0], shape[-1], seed) for seed in (3, 4))
    exact = adaln64(x.double(), scale.double(), shift.double())
    arguments = on_device(x, scale, shift)
    _, q, _ = launch_adaln(*arguments, EPS, dtype=dtype, q_scale=step.to(DEVICE))
    require_rounded(q, exact / step.double())
    require_rounded(adaln_quantize_reference(x, scale, shift, step, EPS, dtype), exact / 0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_adaln_quantize_rows_kernel(shape: tuple[int, int, int]) -> None:
    x, scale, shift = samples(*shape), *(modulation(1, shape[-1], seed) for seed in (3, 4))
    exact = adaln64(x.double(), scale.double(), shift.double())
    steps = exact.abs().amax(-1, keepdim=True) / 448
    _, q, rows = launch_adaln(*on_device(x, scale, shift), EPS, dtype=E4M3, by_row=True)
    for out, found in (
        (q.cpu(), rows.cpu()),
        adaln_quantize_rows_reference(x, scale, shift, EPS),
    ):
        torch.testing.assert_close(found.double(), steps, rtol=1e-5, atol=0)
        require_rounded(out, exact / steps)


def test_nan_stays_in_its_token() -> None:
    x, scale, shift = samples(1, 5, 24), modulation(1, 24, 1), modulation(1, 24, 2)
    step = torch.tensor(0.02, device=DEVICE)
    run = {"dtype": E4M3, "q_scale": step}
    clean = launch_adaln(*on_device(x, scale, shift), EPS, **run)[1].cpu().float()
    x[0, 3, 5] = torch.nan
    out = launch_adaln(*on_device(x, scale, shift), EPS, **run)[1].cpu().float()
    assert out[0, 3].isnan().all()
    kept = [0, 1, 2, 4]
    assert torch.equal(out[:, kept], clean[:, kept])


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 4, 130)])
def test_gelu_quantize_kernel(shape: tuple[int, ...]) -> None:
    x = samples(*shape) * 3
    exact = gelu64(x.double())
    for dtype in EIGHT_BITS:
        step = torch.tensor(0.05)
        q, _ = launch_quantize(*on_device(x, step), dtype, gelu=True)
        require_rounded(q, exact / step.double())
        require_rounded(gelu_quantize_reference(x, step, dtype), exact / step.double())
    q, rows = launch_quantize(x.to(DEVICE), None, E4M3, gelu=True)
    steps = exact.abs().amax(-1, keepdim=True) / 448
    for out, found in ((q.cpu(), rows.cpu()), gelu_quantize_rows_reference(x)):
        torch.testing.assert_close(found.double(), steps, rtol=1e-5, atol=0)
        require_rounded(out, exact / steps)


def rope_arguments() -> tuple[tuple[Tensor, ...], int]:
    heads, head, length = 3, 16, 5
    dim = heads * head
    q, k, _ = samples(2, length, 3 * dim).chunk(3, -1)  # rows lie apart
    weights = samples(dim, seed=1), samples(dim, seed=2)
    tables = samples(length, head // 2, seed=3), samples(length, head // 2, seed=4)
    return (q, k, *weights, *tables), heads


def rope64(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    pairs = torch.view_as_complex(normed.unflatten(-1, (heads, -1, 2)).contiguous())
    turned = pairs * torch.complex(cos, sin)[:, None]
    return torch.view_as_real(turned).flatten(-3)


def test_rms_norm_rope_quantize_kernel() -> None:
    (q, k, q_weight, k_weight, cos, sin), heads = rope_arguments()
    steps = torch.tensor(0.03), torch.tensor(0.05)
    packed = torch.cat([q, k], -1).to(DEVICE).chunk(2, -1)
    others = on_device(q_weight, k_weight, cos, sin)
    q8, k8 = launch_rms_norm_rope(*packed, *others, heads, EPS, (*on_device(*steps),))
    expected = rms_norm_rope_quantize_reference(
        q, k, q_weight, k_weight, cos, sin, *steps, heads, EPS
    )
    for x, weight, step, *found in zip(
        (q, k), (q_weight, k_weight), steps, (q8, k8), expected, strict=True
    ):
        exact = rope64(x.double(), weight.double(), cos.double(), sin.double(), heads)
        for out in found:
            require_rounded(out, exact / step.double())


def run_function(
    function: Any, inputs: dict[str, Tensor], outputs: int, **attributes: Any
) -> list[Tensor]:
    """Run an ONNX function in ONNX Runtime; results come as fp32."""
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(
        function.name, list(inputs), [f"{n}.raw" for n in names], domain="wanx", **attributes
    )
    widen = [helper.make_node("Cast", [f"{n}.raw"], [n], to=TensorProto.FLOAT) for n in names]
    model = helper.make_model(
        helper.make_graph(
            [node, *widen],
            "op",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
                for name, value in inputs.items()
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        ),
        functions=[function.to_function_proto()],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("wanx", 1)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {name: value.contiguous().numpy() for name, value in inputs.items()}
    return [torch.from_numpy(value) for value in session.run(names, feeds)]


def require_close(found: Tensor, reference: Tensor) -> None:
    """Equal but for one step in a few places, where fp32 sums differ."""
    wide = reference.float()
    assert ((found != wide).float().mean()) <= 0.02
    assert (
        (found - wide).abs() <= wide.abs() / 7 + 2.0**-9 + (reference.dtype == torch.int8)
    ).all()


@pytest.mark.parametrize("dtype", [(torch.int8, 3), (E4M3, 17)], ids=["int8", "e4m3"])
def test_onnx_functions_with_a_static_scale(dtype: tuple[torch.dtype, int]) -> None:
    torch_type, onnx_type = dtype
    x, z, step = samples(2, 5, 24), samples(2, 5, 24, seed=1), torch.tensor(0.02)
    gate, scale, shift = (modulation(2, 24, seed) for seed in (2, 3, 4))
    (q,) = run_function(
        AdaLNQuantize, {"x": x, "scale": scale, "shift": shift, "q_scale": step}, 1,
        eps=EPS, dtype=onnx_type,
    )  # fmt: skip
    require_close(q, adaln_quantize_reference(x, scale, shift, step, EPS, torch_type))
    inputs = {"x": x, "z": z, "gate": gate, "scale": scale, "shift": shift}
    updated, q = run_function(
        ResidualAdaLNQuantize, inputs | {"q_scale": step}, 2, eps=EPS, dtype=onnx_type
    )
    expected = residual_adaln_quantize_reference(x, z, gate, scale, shift, step, EPS, torch_type)
    torch.testing.assert_close(updated, expected[0])
    require_close(q, expected[1])
    (q,) = run_function(GeluQuantize, {"x": x, "scale": step}, 1, dtype=onnx_type)
    require_close(q, gelu_quantize_reference(x, step, torch_type))


def test_other_onnx_functions() -> None:
    x, z = samples(2, 5, 24), samples(2, 5, 24, seed=1)
    gate, scale, shift = (modulation(2, 24, seed) for seed in (2, 3, 4))
    q, rows = run_function(AdaLNQuantizeRows, {"x": x, "scale": scale, "shift": shift}, 2, eps=EPS)
    expected = adaln_quantize_rows_reference(x, scale, shift, EPS)
    require_close(q, expected[0])
    torch.testing.assert_close(rows, expected[1])
    q, rows = run_function(GeluQuantizeRows, {"x": x}, 2)
    expected = gelu_quantize_rows_reference(x)
    require_close(q, expected[0])
    torch.testing.assert_close(rows, expected[1])
    inputs = {"x": x, "z": z, "gate": gate, "scale": scale, "shift": shift}
    for found, wanted in zip(
        run_function(ResidualAdaLN, inputs, 2, eps=EPS),
        residual_adaln_reference(x, z, gate, scale, shift, EPS),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
    arguments, heads = rope_arguments()
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin", "q_scale", "k_scale")
    values = (*arguments, torch.tensor(0.03), torch.tensor(0.05))
    for found, wanted in zip(
        run_function(
            RMSNormRopeQuantize, dict(zip(names, values, strict=True)), 2, num_heads=heads, eps=EPS
        ),
        rms_norm_rope_quantize_reference(*values, heads, EPS),
        strict=True,
    ):
        require_close(found, wanted)


def test_ops() -> None:
    x, z = samples(2, 5, 24), samples(2, 5, 24, seed=1)
    gate, scale, shift = (modulation(2, 24, seed) for seed in (2, 3, 4))
    step, ops = torch.tensor(0.02), torch.ops.wanx
    rope, heads = rope_arguments()
    for overload, arguments in (
        (ops.adaln_quantize.default, (x, scale, shift, step, EPS, E4M3)),
        (ops.adaln_quantize_rows.default, (x, scale, shift, EPS)),
        (ops.residual_adaln.default, (x, z, gate, scale, shift, EPS)),
        (ops.residual_adaln_quantize.default, (x, z, gate, scale, shift, step, EPS, torch.int8)),
        (ops.rms_norm_rope_quantize.default, (*rope, step, step, heads, EPS)),
        (ops.gelu_quantize.default, (x, step, E4M3)),
        (ops.gelu_quantize_rows.default, (x,)),
    ):
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))
        assert overload in NODES


def test_residual_adaln_has_a_gradient(check_op: Callable[..., None]) -> None:
    x, z = samples(2, 5, 24), samples(2, 5, 24, seed=1)
    gate, scale, shift = (modulation(2, 24, seed) for seed in (2, 3, 4))

    def formula(x: Tensor, z: Tensor, gate: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return x + z * gate, adaln64(x + z * gate, *rest)

    check_op(
        torch.ops.wanx.residual_adaln.default,
        (x, z, gate, scale, shift, EPS),
        lambda *tensors: residual_adaln(*tensors, eps=EPS),
        formula,
    )
