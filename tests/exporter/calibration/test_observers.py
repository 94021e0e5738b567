"""Statistics of activations against numpy on the raw values, merging, resuming and refusing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.exporter.calibration.observers import BINS, Observer, Observers, input_scale

PERCENTILES = (0.01, 1.0, 25.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999, 100.0)
TINY = float(torch.finfo(torch.float32).tiny)


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.standard_normal(shape)


def cauchy(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.standard_cauchy(shape)


def log_normal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.exp(12 * generator.standard_normal(shape))


def uniform(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.uniform(-3, 1, shape)


def mostly_zero(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.maximum(generator.standard_normal(shape) - 1, 0)


def denormal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.standard_normal(shape) * 1e-38


def one_value(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, -0.7)


def observed(*inputs: Tensor, name: str = "x") -> Observer:
    observer = Observer(name)
    for x in inputs:
        observer.update(x)
    return observer


def same(first: Observers, second: Observers) -> bool:
    a, b = first.state(), second.state()
    return list(a) == list(b) and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "draw", [normal, cauchy, log_normal, uniform, mostly_zero, denormal, one_value]
)
def test_percentiles_are_those_of_the_raw_values(
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray], dtype: torch.dtype
) -> None:
    values = np.clip(draw(np.random.default_rng(1), (3, 701, 37)), -60000, 60000)
    x = torch.from_numpy(values).to(dtype)
    observer = observed(*x)
    seen = x.float().abs().numpy().astype(np.float64)
    assert observer.count == seen.size
    assert observer.amax == observer.percentile(100) == seen.max()
    assert np.array_equal(observer.channel_amax.numpy(), seen.max(axis=(0, 1)))
    for q in PERCENTILES:
        exact = np.quantile(seen, q / 100, method="inverted_cdf")
        found = observer.percentile(q)
        # The upper edge of the bin: of 32 to the octave, or evenly spaced below 2^-126.
        assert exact <= found <= max(exact * (1 + 1 / 32), exact + 2.0**-131), q
        assert found <= observer.amax


def test_ranks_are_exact() -> None:
    observer = observed(2.0 ** torch.arange(10).reshape(5, 2))
    # Each value has a bin of its own, whose edge is 1/32 above it.
    for rank in range(1, 11):
        expected = min(2.0 ** (rank - 1) * (1 + 1 / 32), 512.0)
        assert observer.percentile(10 * rank) == expected
        assert observer.percentile(10 * rank - 0.5) == expected
    assert observer.percentile(1e-9) == 1 + 1 / 32
    thousand = observed(torch.tensor([1.0] * 999 + [4.0])[:, None])
    assert thousand.percentile(99.9) == 1 + 1 / 32
    assert thousand.percentile(99.91) == 4


def test_extremes_of_the_type_have_bins() -> None:
    top = torch.finfo(torch.float32).max
    observer = observed(torch.tensor([[0.0, -0.0, 1e-45, -top]]))
    assert observer.amax == observer.percentile(99) == top
    assert (int(observer.histogram[0]), int(observer.histogram[BINS - 1])) == (3, 1)
    smallest = observed(torch.full((4, 2), 1e-45))
    assert smallest.percentile(50) == smallest.amax == torch.tensor(1e-45).item()


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (0, 5), (70001, 5), (2, 200003)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_counts_each_value_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    observer = observed(x)
    assert torch.equal(x, before)
    assert observer.count == x.numel()
    if x.numel():
        rows = x.float().abs().reshape(-1, shape[-1])
        assert torch.equal(observer.channel_amax, rows.amax(0))
    else:
        assert observer.amax == observer.percentile(50) == 0


def test_views_and_inference_mode() -> None:
    x = torch.randn(8, 6, 10, generator=torch.Generator().manual_seed(3))
    view = x.transpose(0, 2)[::2]
    with torch.inference_mode():
        observer = observed(view)
    observer.update(view.clone().requires_grad_())
    copy = observed(view.contiguous(), view.contiguous())
    assert torch.equal(observer.histogram, copy.histogram)
    assert torch.equal(observer.channel_amax, copy.channel_amax)
    assert not observer.channel_amax.requires_grad


def test_planted_outliers_are_found() -> None:
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    calm = observed(x).outliers()
    assert calm.channels == 0
    assert 1 < calm.ratio < 1.3
    x[:, 7] *= 30
    x[17, 40] = -1000
    x[:, 50] *= 5  # stands out, but less than six times
    spread = observed(x)
    amax = x.abs().amax(0).numpy()
    found = spread.outliers()
    assert found.channels == np.count_nonzero(amax > 6 * np.median(amax)) == 2
    assert found.worst == 40
    exact = 1000 / float(np.quantile(x.abs().numpy(), 0.999, method="inverted_cdf"))
    assert exact / (1 + 1 / 32) <= found.ratio <= exact


def test_outliers_among_zeros() -> None:
    zeros = observed(torch.zeros(3, 4)).outliers()
    assert (zeros.ratio, zeros.channels, zeros.worst) == (1.0, 0, 0)
    one = observed(torch.tensor([[0.0, 0.0, 2.0]])).outliers()
    assert (one.channels, one.worst) == (1, 2)


@pytest.fixture
def inputs() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (name, torch.randn(9, size, generator=generator) * 10.0 ** (step - 3))
        for step in range(6)
        for name, size in (("blocks.10.ffn.2", 12), ("blocks.0.self_attn.q", 5))
    ]


def test_merging_is_seeing_everything(inputs: list[tuple[str, Tensor]]) -> None:
    whole, first, second = Observers(), Observers(), Observers()
    for i, (name, x) in enumerate(inputs):
        whole.observe(name, x)
        (first if i < 5 else second).observe(name, x)
    second.observe("blocks.1.ffn.0", torch.ones(2, 3))
    whole.observe("blocks.1.ffn.0", torch.ones(2, 3))
    kept = second.state()
    first.merge(second)
    first.merge(Observers())
    assert same(first, whole)
    first.observe("blocks.1.ffn.0", torch.ones(2, 3))
    assert same(second, Observers.from_state(kept))  # nothing is shared
    for name, point in whole.points.items():
        seen = torch.cat([x for n, x in inputs if n == name] or [torch.ones(2, 3)])
        assert point.count == seen.numel()
        assert torch.equal(point.channel_amax, seen.abs().amax(0))


@pytest.mark.parametrize("stop", [0, 1, 5, 11])
def test_resuming_is_as_if_uninterrupted(
    inputs: list[tuple[str, Tensor]], stop: int, tmp_path: Path
) -> None:
    whole, part = Observers(), Observers()
    for name, x in inputs:
        whole.observe(name, x)
    for name, x in inputs[:stop]:
        part.observe(name, x)
    part["blocks.0.self_attn.q"]  # a point that was made and has perhaps seen nothing
    save_file(part.state(), tmp_path / "part.safetensors")
    resumed = Observers.from_state(load_file(tmp_path / "part.safetensors"))
    assert same(resumed, part)
    for name, x in inputs[stop:]:
        resumed.observe(name, x)
    assert same(resumed, whole)
    save_file(resumed.state(), tmp_path / "resumed.safetensors")
    save_file(whole.state(), tmp_path / "whole.safetensors")
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("resumed", "whole")]
    assert files[0] == files[1]
    for name, point in whole.points.items():
        assert resumed.points[name].percentile(99) == point.percentile(99)
        assert resumed.points[name].outliers() == point.outliers()


def test_state_is_small() -> None:
    observers = Observers()
    observers.observe("x", torch.randn(1000, 8, generator=torch.Generator().manual_seed(1)))
    assert sum(tensor.nbytes for tensor in observers.state().values()) < 10_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("value", "word"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")]
)
def test_values_that_are_not_finite_are_refused(
    value: float, word: str, dtype: torch.dtype
) -> None:
    observers = Observers()
    observers.observe("blocks.3.ffn.2", torch.ones(2, 3, dtype=dtype))
    before = observers.state()
    x = torch.ones(2, 3, dtype=dtype)
    x[1, 2] = value
    with pytest.raises(WanxError, match=f"^{word} in the input of blocks.3.ffn.2 while calibrat"):
        observers.observe("blocks.3.ffn.2", x)
    assert same(observers, Observers.from_state(before))


def test_every_nan_is_refused() -> None:
    patterns = torch.tensor([0x7F80_0001, 0x7FC0_0000, 0x7FFF_FFFF, -1], dtype=torch.int32)
    for x in (patterns.view(torch.float32), (patterns >> 16).to(torch.int16).view(torch.bfloat16)):
        for value in x[x.isnan()]:
            with pytest.raises(WanxError, match=r"^NaN"):
                observed(value[None, None])


def test_another_width_is_refused() -> None:
    observers = Observers()
    observers.observe("blocks.0.ffn.2", torch.ones(2, 3))
    with pytest.raises(WanxError, match=r"blocks\.0\.ffn\.2 has 4 channels and had 3 before"):
        observers.observe("blocks.0.ffn.2", torch.ones(2, 4))
    other = Observers()
    other.observe("blocks.0.ffn.2", torch.ones(2, 5))
    with pytest.raises(WanxError, match="has 5 channels"):
        observers.merge(other)


@pytest.mark.parametrize("q", [0, -1, 100.1, math.nan, math.inf])
def test_percentiles_out_of_range(q: float) -> None:
    with pytest.raises(UsageError, match="choose above 0 and up to 100"):
        observed(torch.ones(2, 2)).percentile(q)


@pytest.mark.parametrize("limit", [127, 448])
def test_scales_map_the_percentile_to_the_limit(limit: float) -> None:
    x = torch.randn(500, 40, generator=torch.Generator().manual_seed(2))
    observer = observed(x)
    scale = input_scale(observer, limit)
    assert scale == np.float32(scale)
    assert scale == pytest.approx(float(x.abs().max()) / limit, rel=1e-7)
    assert int((x / scale).round().abs().max()) == limit
    clipped = input_scale(observer, limit, 99)
    assert clipped == pytest.approx(observer.percentile(99) / limit, rel=1e-7)
    assert float((x.abs() > clipped * limit).float().mean()) == pytest.approx(0.01, abs=0.002)


def with_amax(value: float) -> Observer:
    observer = observed(torch.ones(1, 2), name="blocks.3.ffn.2")
    observer.channel_amax = torch.tensor([0.5, value])
    return observer


@pytest.mark.parametrize(
    ("observer", "percentile", "words"),
    [
        (Observer("blocks.3.ffn.2"), 100, "nothing was seen at the input of blocks.3.ffn.2"),
        (observed(torch.zeros(3, 2), name="blocks.3.ffn.2"), 100, "was always 0"),
        (observed(torch.zeros(3, 2), name="blocks.3.ffn.2"), 99, "was always 0"),
        (with_amax(math.inf), 100, "reached inf"),
        (with_amax(math.nan), 100, "reached nan"),
        (observed(torch.full((3, 2), 126 * TINY), name="blocks.3.ffn.2"), 100, "underflows"),
        (observed(torch.eye(20), name="blocks.3.ffn.2"), 90, "in 90 % of its values, so its scale"),
    ],
)
def test_inputs_without_a_scale(observer: Observer, percentile: float, words: str) -> None:
    with pytest.raises(WanxError) as caught:
        input_scale(observer, 127, percentile)
    assert words in str(caught.value)
    assert str(caught.value).endswith("; leave it out with --skip-layers blocks.3.ffn.2")


def test_the_smallest_scale_that_is_allowed() -> None:
    assert input_scale(observed(torch.full((3, 2), 127 * TINY)), 127) == TINY
    with pytest.raises(WanxError, match="nothing was seen"):
        Observer("x").outliers()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x.bins": None}, "x.bins is missing"),
        ({"x.more": torch.zeros(1)}, "x.more is unknown"),
        ({"x": torch.zeros(1)}, "is missing"),
        ({"x.counts": torch.tensor([1, 5], dtype=torch.int32)}, "types"),
        ({"x.channel_amax": torch.zeros(1, 2)}, "types"),
        ({"x.counts": torch.tensor([1])}, "counts"),
        ({"x.counts": torch.tensor([0, 6])}, "counts"),
        ({"x.bins": torch.tensor([4064, 4064], dtype=torch.int32)}, "ascend"),
        ({"x.bins": torch.tensor([-1, 4064], dtype=torch.int32)}, "ascend"),
        ({"x.bins": torch.tensor([4064, BINS], dtype=torch.int32)}, "ascend"),
        ({"x.channel_amax": torch.tensor([1.0, 8.0])}, "largest value"),
        ({"x.channel_amax": torch.tensor([1.0, math.nan])}, "largest value"),
        ({"x.channel_amax": torch.tensor([-1.0, 2.0])}, "largest value"),
        ({"x.channel_amax": torch.zeros(0)}, "largest value"),
    ],
)
def test_a_damaged_state_is_refused(changes: dict[str, Tensor | None], words: str) -> None:
    observers = Observers()
    observers.observe("x", torch.tensor([[1.0, 2.0], [1.0, 1.0], [1.0, 1.0]]))
    state = {k: v for k, v in {**observers.state(), **changes}.items() if v is not None}
    with pytest.raises(CorruptInputError, match=words) as caught:
        Observers.from_state(state)
    assert "calibrate again" in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_counts_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(300, 70, generator=torch.Generator().manual_seed(4)).to(dtype)
    here, there = Observers(), Observers()
    here.observe("x", x)
    there.observe("x", x.cuda())
    assert there["x"].channel_amax.is_cuda
    assert same(here, there)
    resumed = Observers.from_state(there.state())
    resumed.observe("x", x.cuda())
    here.observe("x", x)
    there.merge(Observers.from_state(there.state()))
    assert same(resumed, here)
    assert same(there, here)
    assert there["x"].percentile(99) == here["x"].percentile(99)
    assert there["x"].outliers() == here["x"].outliers()
