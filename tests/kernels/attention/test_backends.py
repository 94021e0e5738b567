from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F

from tests.support.interpreter import DEVICE, GPU
from wanx.kernels import launch as launching
from wanx.kernels.aot_compile import record
from wanx.kernels.attention import eight_bit
from wanx.kernels.attention.backends import AttentionBackend, choose_backend
from wanx.kernels.attention.eight_bit import attention_8bit_reference, launch_attention_8bit
from wanx.kernels.attention.flash import launch_attention, unsupported_shapes
from wanx.kernels.launch import unsupported_tma
from wanx.kernels.launch_config import with_config

# batch, heads, head, queries, keys: fewer than a block, one more than it, exactly one, tails of Wan
SIZES = [
    (1, 2, 16, 5, 7),
    (2, 3, 64, 129, 257),
    (1, 2, 128, 128, 128),
    (1, 1, 128, 80, 376),
    (1, 1, 32, 120, 1),
]
NARROW_FEATURES = [(1, 2, 32, 5, 7), *SIZES[1:]]  # 8 bits need heads of 32
HALVES = [torch.bfloat16, torch.float16]
# What tuning tables may hold for Hopper.
TMA = {"BLOCK_Q": 128, "BLOCK_K": 128, "TMA": 1, "WARP_SPECIALIZE": 0, "num_warps": 8}
SPECIALIZED = TMA | {"WARP_SPECIALIZE": 1, "num_warps": 4, "num_stages": 2}
no_tma = pytest.mark.skipif(
    GPU and torch.cuda.get_device_capability() < (9, 0), reason="this GPU has no TMA"
)


def operands(size: tuple[int, ...], dtype: torch.dtype, offset: float = 0) -> list[Tensor]:
    """q, k and v; k and v are halves of longer rows. One channel of k lies far from zero."""
    batch, heads, head, queries, keys = size
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, heads * head, generator=generator)
    kv = torch.randn(batch, keys, 2 * heads * head, generator=generator)
    kv[..., 3] += offset
    return [q.to(dtype), *kv.to(dtype).chunk(2, -1)]


def exact(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    split = [t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(-2)


def on_device(tensors: list[Tensor]) -> list[Tensor]:
    q, k, v = tensors
    return [q.to(DEVICE), *torch.cat([k, v], -1).to(DEVICE).chunk(2, -1)]


def check_sixteen_bits(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, heads = operands(size, dtype), size[1]
    out = launch_attention(*on_device(tensors), heads, size[2] ** -0.5).cpu()
    assert out.dtype == dtype
    # Weights are rounded to the dtype, relative to the largest, and so is the result.
    bound = 3 * torch.finfo(dtype).eps
    error = (out.double() - exact(*tensors, heads)).abs().max() / tensors[2].abs().max().double()
    assert error <= bound


def check_eight_bits(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, heads = operands(size, dtype, offset=8), size[1]
    out = launch_attention_8bit(*on_device(tensors), heads, size[2] ** -0.5).cpu()
    wanted = exact(*tensors, heads)
    reference = attention_8bit_reference(*tensors, heads, size[2] ** -0.5)
    for found in (out, reference):
        cosine = torch.cosine_similarity(found.double().flatten(), wanted.flatten(), 0)
        assert cosine >= 0.999
    cosine = torch.cosine_similarity(out.double().flatten(), reference.double().flatten(), 0)
    assert cosine >= 0.9997


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_sixteen_bits(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check_sixteen_bits(size, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", NARROW_FEATURES)
def test_eight_bits(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check_eight_bits(size, dtype)


@no_tma
@pytest.mark.parametrize("choice", [TMA, SPECIALIZED], ids=["tma", "specialized"])
@pytest.mark.parametrize(("size", "narrow"), list(zip(SIZES, NARROW_FEATURES, strict=True)))
def test_blocks_that_tma_moves(
    size: tuple[int, ...], narrow: tuple[int, ...], choice: dict[str, int]
) -> None:
    with with_config("attention", choice), with_config("attention_8bit", choice):
        check_sixteen_bits(size, torch.bfloat16)
        check_eight_bits(narrow, torch.float16)


@no_tma
@pytest.mark.parametrize("launch", [launch_attention, launch_attention_8bit])
def test_slices_of_one_projection(launch: Callable[..., Tensor]) -> None:
    """q, k and v as thirds of its rows. Beyond the end TMA neither reads nor writes."""
    rows = torch.randn(2, 70, 3 * 64, generator=torch.Generator().manual_seed(0))
    packed = torch.full((2, 80, 3 * 64), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    packed[:, :70] = rows
    tensors = packed[:, :70].chunk(3, -1)
    assert unsupported_tma(*tensors) is None
    plain = launch(*tensors, 2, 0.2)
    with with_config("attention", TMA), with_config("attention_8bit", TMA):
        out = launch(*tensors, 2, 0.2)
    cosine = torch.cosine_similarity(out.double().flatten(), plain.double().flatten(), 0)
    assert cosine >= 0.9997


def test_rows_that_tma_cannot_move() -> None:
    """They are moved without it, by as many warps as would have shared the work."""
    apart = torch.zeros(1, 9, 36, dtype=torch.bfloat16, device="meta")
    for rows in (apart[..., :32], torch.zeros(1, 9, 40, dtype=torch.bfloat16)[..., 4:36]):
        assert "multiples of 16 bytes" in (unsupported_tma(rows) or "")
    aligned, bad = torch.zeros(1, 9, 32, dtype=torch.bfloat16, device="meta"), apart[..., :32]
    with with_config("attention", SPECIALIZED):
        (kept,) = record(90, launch_attention, aligned, aligned, aligned, 2, 0.2)
        (turned_off,) = record(90, launch_attention, aligned, bad, bad, 2, 0.2)
        (old,) = record(89, launch_attention, aligned, aligned, aligned, 2, 0.2)
    assert (kept.constants["TMA"], kept.options["num_warps"]) == (1, 4)
    for other in (turned_off, old):
        assert (other.constants["TMA"], other.constants["WARP_SPECIALIZE"]) == (0, 0)
        assert other.options == {"num_warps": 8, "num_stages": 2}


@pytest.mark.parametrize("programs", [True, False])
def test_a_program_has_tma_where_pytorch_gives_it_memory(
    programs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for slices of one projection whose batch and length are left open."""
    monkeypatch.setattr(launching, "PROGRAMS_HAVE_TMA", programs)
    left_open = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    )
    mode = FakeTensorMode(shape_env=ShapeEnv())
    packed = mode.from_tensor(torch.zeros(2, 9, 96), symbolic_context=left_open).bfloat16()
    reason = unsupported_tma(*packed.chunk(3, -1))
    assert reason is None if programs else "need PyTorch 2.12" in str(reason)
    assert not mode.shape_env.guards


@pytest.mark.parametrize("launch", [launch_attention, launch_attention_8bit])
def test_large_scores_do_not_overflow(launch: Callable[..., Tensor]) -> None:
    q, k, v = operands((1, 1, 32, 9, 40), torch.bfloat16)
    out = launch(*on_device([q * 60, k * 60, v]), 1, 1.0).cpu()
    assert out.isfinite().all()
    cosine = torch.cosine_similarity(
        out.double().flatten(), exact(q * 240, k * 60, v, 1).flatten(), 0
    )
    assert cosine >= 0.97  # one key takes it all; 8 bits may pick another of two close ones


def test_shapes_that_do_not_run() -> None:
    q, k, v = (torch.empty(1, n, 96) for n in (4, 6, 6))
    assert unsupported_shapes(q, k, v, 6) is None
    assert "48" in (unsupported_shapes(q, k, v, 2) or "")
    assert "[1, 4, 96]" in (unsupported_shapes(q, k, q, 6) or "")


def test_heads_that_do_not_run_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "unsupported_tensors", lambda *_, **__: None)
    q = torch.empty(1, 4, 256, dtype=torch.bfloat16)
    reasons = {heads: eight_bit.unsupported_reason(q, q, q, heads) for heads in (1, 2, 8, 16)}
    assert reasons[2] is reasons[8] is None
    assert "256" in str(reasons[1])
    assert "heads of 16" in str(reasons[16])


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a provider")
def test_the_processor_has_none() -> None:
    found = choose_backend(*operands(SIZES[0], torch.bfloat16), 2, bits=8)
    assert not isinstance(found, AttentionBackend)
    assert "not on cpu" in found
