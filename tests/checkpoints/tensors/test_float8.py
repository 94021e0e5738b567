"""8-bit floats against PyTorch, and the scales beside them in both spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wanx.checkpoints.tensors.float8 import Float8Tensor
from wanx.checkpoints.weights import open_files
from wanx.errors import CorruptInputError, UsageError, WanxError

TYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def codes(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def numbers(source: Any, dtype: str, chunk: int = 1 << 10) -> torch.Tensor:
    data = b"".join(bytes(piece) for piece in source.iter_converted(dtype, chunk))
    return torch.frombuffer(bytearray(data), dtype=STORED[dtype]).reshape(source.shape)


def marked(layer: str, form: str = "float8_e4m3fn") -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps({"format": form}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("stored", STORED)
def test_every_code_is_what_pytorch_says(dtype: torch.dtype, stored: str, tmp_path: Path) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every[every.float().isfinite()]
    path = write(tmp_path / "w.safetensors", {"a.weight": finite})
    (source,) = open_files([path])[0].values()
    assert (source.dtype, source.storage, source.stored_bytes) == ("F32", "BF16", len(finite))
    assert torch.equal(numbers(source, stored), finite.float().to(STORED[stored]))
    whole = b"".join(bytes(piece) for piece in source.iter_bytes(64))
    assert torch.equal(torch.frombuffer(bytearray(whole), dtype=torch.float32), finite.float())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("chunk", [8, 1 << 10, 1 << 20])
def test_scales_are_rounded_once(
    dtype: torch.dtype, stored: str, rows: bool, chunk: int, tmp_path: Path
) -> None:
    weight = codes(dtype, (37, 11))
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand((37,) if rows else (), generator=generator) * 0.01 + 1e-3
    path = write(
        tmp_path / "w.safetensors",
        {"a.weight": weight, "a.scale_weight": scale, "scaled_fp8": torch.zeros(2)},
    )
    (source,) = open_files([path])[0].values()
    exact = weight.double() * scale.double().reshape(-1, 1)
    found = numbers(source, stored, chunk)
    torch.testing.assert_close(found, nearest(exact, STORED[stored]), rtol=0, atol=0)


def nearest(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 once, to even: of the three neighbours of a double rounding the nearest."""
    if dtype == torch.float32:
        return exact.float()
    guess = exact.to(dtype)
    bits = guess.view(torch.int16)
    candidates = torch.stack([(bits + step).view(dtype) for step in (-1, 0, 1)])
    distance = (candidates.double() - exact).abs().nan_to_num(torch.inf)
    best = distance.amin(0)
    tied = (distance == best).sum(0) > 1
    even = torch.where((candidates.view(torch.int16) & 1) == 0, distance, torch.inf)
    index = torch.where(tied, even.argmin(0), distance.argmin(0))
    return candidates.gather(0, index[None])[0]


@pytest.mark.parametrize("stored", ["BF16", "F16"])
def test_rounding_twice_would_show(stored: str, tmp_path: Path) -> None:
    """Products just beside the middle of two 16-bit numbers, which float32 takes for the middle."""
    weight = torch.full((4, 1), 1.125).to(torch.float8_e4m3fn)
    spacing = 2.0**-8 if stored == "BF16" else 2.0**-11
    tie = (1 + spacing) / 1.125
    scales = torch.tensor([tie, np.nextafter(np.float32(tie), np.float32(2)), 1.0, 2.0])
    path = write(tmp_path / "w.safetensors", {"a.weight": weight, "a.weight_scale": scales})
    (source,) = open_files([path])[0].values()
    exact = weight.double() * scales.double().reshape(-1, 1)
    assert torch.equal(numbers(source, stored), nearest(exact, STORED[stored]))


@pytest.mark.parametrize("spelling", ["old", "new", "header"])
def test_both_spellings(spelling: str, tmp_path: Path) -> None:
    """What is about activations, and what marks the format, is no weight; norms stay."""
    weight, norm = codes(torch.float8_e4m3fn, (8, 4)), torch.ones(4, dtype=torch.bfloat16)
    scale, metadata = torch.tensor(0.5), {}
    tensors = {"x.a.weight": weight, "x.norm.weight": norm}
    if spelling == "old":
        tensors |= {"x.a.scale_weight": scale, "x.a.scale_input": scale}
        tensors |= {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    else:
        tensors |= {"x.a.weight_scale": scale.reshape(1), "x.a.input_scale": scale}
        if spelling == "new":
            tensors |= {"x.a.comfy_quant": marked("x.a")}
        else:
            layers = {"layers": {"x.a": {"format": "float8_e4m3fn"}}}
            metadata = {"_quantization_metadata": json.dumps(layers)}
    found, _ = open_files([write(tmp_path / "w.safetensors", tensors, **metadata)])
    assert found.keys() == {"x.a.weight", "x.norm.weight"}
    assert torch.equal(numbers(found["x.a.weight"], "F32"), weight.float() * 0.5)
    assert found["x.norm.weight"].storage == "BF16"
    assert isinstance(found["x.a.weight"], Float8Tensor)


def test_scales_may_lie_in_another_shard(tmp_path: Path) -> None:
    weight = codes(torch.float8_e4m3fn, (8, 4))
    one = write(tmp_path / "1.safetensors", {"a.weight": weight, "scaled_fp8": torch.zeros(2)})
    two = write(tmp_path / "2.safetensors", {"a.scale_weight": torch.tensor(2.0)})
    found, files = open_files([one, two])
    assert files == (one, two)
    assert torch.equal(numbers(found["a.weight"], "F32"), weight.float() * 2)


E4M3 = torch.zeros(4, 4).to(torch.float8_e4m3fn)
BAD: list[tuple[str, dict[str, torch.Tensor], type[WanxError], str]] = [
    (
        "no scale",
        {"a.weight": E4M3, "scaled_fp8": torch.zeros(2)},
        CorruptInputError,
        "'a.weight' is in 8 bits of a scaled file and has no scale",
    ),
    (
        "no weight",
        {"a.scale_weight": torch.ones(()), "b.weight": E4M3},
        CorruptInputError,
        "has scales without weights, 'a.scale_weight' first",
    ),
    (
        "other rows",
        {"a.weight": E4M3, "a.scale_weight": torch.ones(3)},
        CorruptInputError,
        r"'a.scale_weight' is F32 \[3\], and 'a.weight' with \[4, 4\] takes one scale or one",
    ),
    (
        "columns",
        {"a.weight": E4M3, "a.scale_weight": torch.ones(1, 4)},
        CorruptInputError,
        r"'a.scale_weight' is F32 \[1, 4\], and 'a.weight'",
    ),
    (
        "blocks",
        {"a.weight": E4M3, "a.scale_weight": torch.ones(2, 2)},
        CorruptInputError,
        r"'a.scale_weight' is F32 \[2, 2\]",
    ),
    (
        "two scales",
        {"a.weight": E4M3, "a.scale_weight": torch.ones(()), "a.weight_scale": torch.ones(1)},
        CorruptInputError,
        "has two scales for one weight, 'a.scale_weight' and 'a.weight_scale'",
    ),
    (
        "a mark with a prefix",
        {"m.a.weight": E4M3, "m.scaled_fp8": torch.zeros(2)},
        CorruptInputError,
        "'m.a.weight' is in 8 bits of a scaled file and has no scale",
    ),
    (
        "no mark",
        {"a.weight": E4M3, "a.scale_weight": torch.ones(()), "b.weight": E4M3},
        CorruptInputError,
        "'b.weight' is in 8 bits of a scaled file and has no scale",
    ),
    (
        "another format",
        {
            "a.weight": E4M3,
            "a.weight_scale": torch.ones(()),
            "a.comfy_quant": marked("a", "float8_e5m2"),
        },
        CorruptInputError,
        "'a.weight' is F8_E4M3, and the file says float8_e5m2",
    ),
    (
        "integers",
        {"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.weight_scale": torch.ones(())},
        UsageError,
        "'a.weight' is I8 with a scale, which wanx does not read; use a file in float8_e4m3fn or",
    ),
    (
        "scaled bf16",
        {"a.weight": torch.zeros(4, 4).bfloat16(), "a.weight_scale": torch.tensor(2.0)},
        UsageError,
        "'a.weight' is BF16 with a scale",
    ),
    (
        "other format",
        {"a.weight": E4M3, "a.weight_scale": torch.ones(()), "a.comfy_quant": marked("a", "nvfp4")},
        UsageError,
        "'a.comfy_quant' is in the format 'nvfp4', which wanx does not read",
    ),
    (
        "no format",
        {"a.weight": E4M3, "a.comfy_quant": torch.zeros(3, dtype=torch.uint8)},
        CorruptInputError,
        "'a.comfy_quant' does not say how the layer is stored",
    ),
]


@pytest.mark.parametrize(
    ("tensors", "kind", "text"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
@pytest.mark.fault("8-bit weights without their scales")
def test_what_is_refused(
    tensors: dict[str, torch.Tensor], kind: type[WanxError], text: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=text) as caught:
        open_files([write(tmp_path / "w.safetensors", tensors)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"layers": 3}', '{"layers": {"a": 1}}', "[" * 200_000]
)
def test_a_header_that_says_nothing(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", {"a.weight": E4M3}, _quantization_metadata=text)
    with pytest.raises(CorruptInputError, match=r"w\.safetensors") as caught:
        open_files([path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["code", "scale", "product"])
@pytest.mark.fault("weights that are not finite")
def test_what_is_not_finite(what: str, tmp_path: Path) -> None:
    weight, scale = codes(torch.float8_e4m3fn, (4, 4)), torch.tensor(1.0)
    if what == "code":
        weight.view(torch.uint8)[2, 1] = 0x7F
    elif what == "scale":
        scale = torch.tensor(torch.nan)
    else:
        scale = torch.tensor(3e38)
    path = write(tmp_path / "w.safetensors", {"a.weight": weight, "a.scale_weight": scale})
    (source,) = open_files([path])[0].values()
    with pytest.raises((CorruptInputError, UsageError), match=r"NaN or infinity|does not fit F16"):
        numbers(source, "F16")
