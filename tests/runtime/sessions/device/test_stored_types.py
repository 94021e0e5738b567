"""Conversions of stored numbers against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wanx.runtime.sessions.device.stored_types import NUMPY, as_float32, as_input, convert

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    return values.to(TORCH[name]).view(width).numpy().view(NUMPY[name])


@pytest.mark.parametrize("wanted", TORCH)
@pytest.mark.parametrize("found", TORCH)
def test_it_rounds_as_pytorch_does(found: str, wanted: str) -> None:
    values = interesting().to(TORCH[found])
    made = convert(as_bits(values, found), found, wanted)
    assert made.dtype == NUMPY[wanted]
    correct = as_bits(values, wanted)
    nan = values.isnan().numpy()
    width = np.dtype(f"u{made.itemsize}")
    np.testing.assert_array_equal(made.view(width)[~nan], correct.view(width)[~nan])
    assert np.isnan(as_float32(made[nan], wanted)).all()
    assert nan.any()


def test_other_types_are_refused() -> None:
    for pair in (("I8", "F32"), ("F32", "F8_E4M3"), ("BF16", "I64")):
        with pytest.raises(ValueError, match=f"{pair[0]} does not become {pair[1]}"):
            convert(np.zeros(2, NUMPY[pair[0]]), *pair)  # type: ignore[index]
    whole = np.zeros(2, np.int8)
    assert convert(whole, "I8", "I8") is whole


def test_inputs_are_dense_and_keep_their_shape() -> None:
    array = np.arange(12, dtype=np.float64).reshape(3, 4).T
    for name in TORCH:
        made = as_input(array, name)  # type: ignore[arg-type]
        assert made.shape == (4, 3)
        assert made.flags.c_contiguous
        np.testing.assert_array_equal(as_float32(made, name), array)
        assert as_input(np.array(2.0), name).shape == ()  # type: ignore[arg-type]
    numbers = as_input(np.array([[1, 2]], np.int32), "I64")
    assert numbers.dtype == np.int64


def test_what_is_read_is_a_copy() -> None:
    array = np.ones(3, np.float32)
    made = as_float32(array, "F32")
    array[:] = 2
    assert made.tolist() == [1, 1, 1]
