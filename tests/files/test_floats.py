"""Conversions and the search for NaN against torch, over every pattern of the 16-bit formats."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from wanx.files.floats import NUMPY, convert, convert_chunk, has_nonfinite

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PAIRS = [(a, b) for a in TYPES for b in TYPES]


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def hard_numbers() -> torch.Tensor:
    """float32 numbers around every rounding decision of both 16-bit formats."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = torch.cat([every.view(TYPES[t]).float() for t in ("F16", "BF16")])
    values = values[values.isfinite()]
    bits = values.view(torch.int32)
    ties = torch.cat([bits | half for half in (0, 0x1000, 0x8000)])  # halfway in F16, in BF16
    near = torch.cat([ties - 1, ties, ties + 1]).view(torch.float32)
    noise = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    scales = 10.0 ** torch.linspace(-46, 38, 100_000)
    return torch.cat([near, noise * scales, noise])


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_rounds_as_torch(source: str, target: str) -> None:
    numbers = hard_numbers().to(TYPES[source])
    expected = numbers.to(TYPES[target])
    fits = numbers.isfinite() & expected.isfinite()
    numbers, expected = numbers[fits], expected[fits]
    assert len(numbers) > 100_000
    assert (numbers.abs() < 1e-40).any() == (source != "F16")
    assert bytes(convert_chunk(to_bytes(numbers), source, target)) == to_bytes(expected)


@pytest.mark.parametrize(
    ("source", "target", "largest"),
    [
        ("F32", "F16", 0x477FEFFF),  # next: 65520, halfway between 65504 and infinity
        ("F32", "BF16", 0x7F7F7FFF),  # next: 3.3962e38, halfway between 3.3895e38 and infinity
        ("BF16", "F16", 0x477F),  # 65280; next: 65536
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_is_an_error(source: str, target: str, largest: int, sign: int) -> None:
    integer = torch.int32 if source == "F32" else torch.int16
    fits, overflows = (
        sign * torch.tensor([bits], dtype=integer).view(TYPES[source])
        for bits in (largest, largest + 1)
    )
    assert overflows.isfinite().all()
    assert overflows.to(TYPES[target]).isinf().all()
    chunk = convert_chunk(to_bytes(fits), source, target)
    assert bytes(chunk) == to_bytes(fits.to(TYPES[target]))
    with pytest.raises(OverflowError, match="above the largest number"):
        convert_chunk(to_bytes(torch.cat([fits, overflows])), source, target)


def test_equal_types_are_not_copied() -> None:
    chunk = bytearray(8)
    assert convert_chunk(chunk, "BF16", "BF16") is chunk


@pytest.mark.parametrize("dtype", TYPES)
def test_every_16_bit_pattern_is_judged_as_torch_does(dtype: str) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    if dtype == "F32":  # every upper half, with lower halves that only NaN may carry
        tensors = torch.cat([patterns << 16, (patterns << 16) | 1]).view(torch.float32)
    else:
        tensors = patterns.to(torch.int16).view(TYPES[dtype])
    data = memoryview(to_bytes(tensors))
    width = tensors.element_size()
    found = [has_nonfinite(data[i : i + width], dtype) for i in range(0, len(data), width)]
    assert found == (~tensors.isfinite()).tolist()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("position", [0, 262_143, 262_144, 524_288, 999_998, 999_999])
def test_one_bad_number_is_found_anywhere(dtype: str, position: int) -> None:
    numbers = torch.randn(1_000_000).to(TYPES[dtype])
    assert not has_nonfinite(to_bytes(numbers), dtype)
    for bad in (torch.nan, torch.inf, -torch.inf):
        numbers[position] = bad
        assert has_nonfinite(to_bytes(numbers), dtype)


def test_nothing_is_finite_and_halves_of_elements_are_refused() -> None:
    assert not has_nonfinite(b"", "F32")
    assert bytes(convert_chunk(b"", "F32", "F16")) == b""
    with pytest.raises(ValueError, match="multiple"):
        has_nonfinite(bytes(6), "F32")
    with pytest.raises(ValueError, match="multiple"):
        convert_chunk(bytes(3), "F16", "F32")


@pytest.mark.parametrize("dtype", TYPES)
def test_the_search_keeps_up_with_a_disk(dtype: str) -> None:
    chunk = to_bytes(torch.randn(1 << 20).to(TYPES[dtype]))
    # Times in turn of the search and of one plain pass over the bytes, which no disk outruns.
    times = [
        (_seconds(lambda: has_nonfinite(chunk, dtype)),
         _seconds(lambda: np.frombuffer(chunk, np.uint8).max()))
        for _ in range(20)
    ]  # fmt: skip
    search, plain = (min(column) for column in zip(*times, strict=True))
    assert search < 8 * plain


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_unaligned_views_are_read() -> None:
    numbers = np.array([1.0, np.inf], dtype="<f4").tobytes()
    view = memoryview(b"\0" + numbers)[1:]
    assert has_nonfinite(view, "F32")
    assert not has_nonfinite(view[:4], "F32")


def interesting() -> torch.Tensor:
    """Float32 of every exponent, with ties, zeros, infinities and subnormal numbers."""
    every_half = torch.arange(1 << 16, dtype=torch.int32)
    # All bfloat16, the middle between each and the next, and both neighbours of that.
    bits = torch.cat([(every_half << 16) + low for low in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    halves = every_half.to(torch.int16).view(torch.float16).float()
    ties = halves * (1 + 2**-11)
    near = torch.nextafter(ties, torch.full_like(ties, torch.inf))
    return torch.cat([bits.view(torch.float32), halves, ties, near])


def as_bits(values: torch.Tensor, name: str) -> np.ndarray:
    width = {"F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}[name]
    return values.to(TYPES[name]).view(width).numpy().view(NUMPY[name])


@pytest.mark.parametrize("wanted", TYPES)
@pytest.mark.parametrize("found", TYPES)
def test_it_rounds_as_pytorch_does(found: str, wanted: str) -> None:
    values = interesting().to(TYPES[found])
    made = convert(as_bits(values, found), found, wanted)
    assert made.dtype == NUMPY[wanted]
    correct = as_bits(values, wanted)
    nan = values.isnan().numpy()
    width = np.dtype(f"u{made.itemsize}")
    np.testing.assert_array_equal(made.view(width)[~nan], correct.view(width)[~nan])
    assert np.isnan(convert(made[nan], wanted, "F32")).all()
    assert nan.any()


def test_other_types_are_refused() -> None:
    for pair in (("I8", "F32"), ("F32", "F8_E4M3"), ("BF16", "I64")):
        with pytest.raises(ValueError, match=f"{pair[0]} does not become {pair[1]}"):
            convert(np.zeros(2, NUMPY[pair[0]]), *pair)
    whole = np.zeros(2, np.int8)
    assert convert(whole, "I8", "I8") is whole
