"""Write a checkpoint again in the formats that people share: single files, 8 bits, GGUF.

    python tools/repackage.py tiny /tmp/models --dit fp8_scaled
    wanx export --comfyui /tmp/models --dit tiny-fp8_scaled --tokenizer …/tokenizer.json

The folder is laid out as ComfyUI's. The transformer is stored as ``--dit`` says; the text encoder
and the image encoder have the names of transformers, the VAE those of the original, all in the
types that they had.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.torch import save_file

from wanx.checkpoints import key_maps
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.checkpoints.tensors.source import TensorSource
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.number_formats import BY_SAFETENSORS
from wanx.exporter.source import open_source

Tensors = dict[str, torch.Tensor]
PREFIX = "model.diffusion_model."


def tensors_of(weights: ComponentWeights) -> Tensors:
    """All tensors of a network by original name, in the types that they are stored in."""
    return {name: _tensor(source) for name, source in weights.tensors.items()}


def _tensor(source: TensorSource) -> torch.Tensor:
    data = bytearray(b"".join(bytes(piece) for piece in source.iter_bytes()))
    dtype = getattr(torch, BY_SAFETENSORS[source.dtype].torch)
    return torch.frombuffer(data, dtype=dtype).reshape(source.shape)


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """True for weights that files of 8 bits store in 8 bits: those of linears in blocks."""
    return "blocks." in name and name.endswith(".weight") and tensor.ndim == 2


def in_diffusers_names(tensors: Tensors, key_map: key_maps.KeyMap = key_maps.DIT) -> Tensors:
    """Rename tensors to those of Diffusers or transformers."""
    return {key_map.to_diffusers(name) or name: tensor for name, tensor in tensors.items()}


def with_prefix(tensors: Tensors) -> Tensors:
    """As ComfyUI's files of diffusion models have it."""
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def fp8(tensors: Tensors) -> Tensors:
    """Linears in 8-bit floats, cast and no more."""
    return {
        name: tensor.to(torch.float8_e4m3fn) if is_linear(name, tensor) else tensor
        for name, tensor in tensors.items()
    }


def fp8_scaled(tensors: Tensors) -> Tensors:
    """Linears in 8-bit floats with a scale each, in the spelling of 2025."""
    found: Tensors = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if not is_linear(name, tensor):
            found[name] = tensor
            continue
        scale = tensor.float().abs().max() / 448
        found[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        found[f"{name.removesuffix('weight')}scale_weight"] = scale
        found[f"{name.removesuffix('weight')}scale_input"] = torch.ones(())
    return found


def fp8_scaled_new(tensors: Tensors) -> Tensors:
    """The same in the spelling of 2026."""
    found: Tensors = {}
    mark = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    for name, tensor in fp8_scaled(tensors).items():
        stem, _, last = name.rpartition(".")
        if last == "scale_weight":
            found |= {f"{stem}.weight_scale": tensor, f"{stem}.comfy_quant": mark.clone()}
        elif last not in ("scale_input", "scaled_fp8"):
            found[name] = tensor
    return found


SAFETENSORS: Mapping[str, Callable[[Tensors], Tensors]] = {
    "plain": dict,
    "prefix": with_prefix,
    "diffusers": in_diffusers_names,
    "fp8": fp8,
    "fp8_scaled": fp8_scaled,
    "fp8_scaled_prefix": lambda tensors: with_prefix(fp8_scaled(tensors)),
    "fp8_scaled_new": lambda tensors: with_prefix(fp8_scaled_new(tensors)),
}
GGUF = {"Q8_0": Kind.Q8_0, "Q4_K": Kind.Q4_K}


def write_gguf(tensors: Tensors, path: Path, kind: Kind, architecture: str = "wan") -> None:
    """Write linears in blocks of a kind, or in fp16 where they are none, the rest in fp32."""
    numbers, _ = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if not is_linear(name, tensor):
            writer.add_tensor(name, values)
        elif values.shape[1] % numbers:
            writer.add_tensor(name, values.astype(np.float16))
        elif kind == Kind.Q4_K:
            writer.add_tensor(name, quantize_q4_k(values), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for act in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{act}_to_file")()
    writer.close()


def quantize_q4_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blocks of 256 numbers of 4 bits, with scales and offsets of 6 bits for each 32.

    The package gguf reads this type and does not write it. y = d * scale * q - dmin * offset; in
    bytes: d and dmin in fp16, 12 of scales and offsets, 128 of numbers, two in a byte
    (``block_q4_K`` in ggml-common.h).
    """
    parts = values.reshape(-1, 8, 32)
    low = np.minimum(parts.min(2), 0)
    step = (parts.max(2) - low) / 15
    d = (step.max(1, keepdims=True) / 63).astype(np.float16)
    dmin = (-low.min(1, keepdims=True) / 63).astype(np.float16)
    wide, wide_min = (np.where(x > 0, x, 1).astype(np.float32) for x in (d, dmin))
    scale = np.clip(np.round(step / wide), 0, 63).astype(np.uint8)
    offset = np.clip(np.round(-low / wide_min), 0, 63).astype(np.uint8)
    actual = np.where(scale > 0, scale * d.astype(np.float32), 1)[..., None]
    shift = (offset * dmin.astype(np.float32))[..., None]
    q = np.clip(np.round((parts + shift) / actual), 0, 15).astype(np.uint8)
    packed = np.concatenate(
        [
            scale[:, :4] | (scale[:, 4:] >> 4) << 6,
            offset[:, :4] | (offset[:, 4:] >> 4) << 6,
            (scale[:, 4:] & 15) | (offset[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    nibbles = (q[:, 0::2] | q[:, 1::2] << 4).reshape(len(q), 128)
    blocks = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed, nibbles], axis=1)
    return blocks.reshape(len(values), -1)


def write_dit(tensors: Tensors, folder: Path, name: str, form: str) -> Path:
    """Write a transformer in one form."""
    folder.mkdir(parents=True, exist_ok=True)
    if form in GGUF:
        path = folder / f"{name}.gguf"
        write_gguf(tensors, path, GGUF[form])
    else:
        path = folder / f"{name}.safetensors"
        save(SAFETENSORS[form](tensors), path)
    return path


def save(tensors: Tensors, path: Path) -> None:
    """Write a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def write_others(checkpoint: Checkpoint, folder: Path) -> Iterator[Path]:
    """Write the other parts as ComfyUI's folder of models has them."""
    text = in_diffusers_names(
        tensors_of(checkpoint.components["text_encoder"]), key_maps.TEXT_ENCODER
    )
    save(text, folder / "text_encoders" / "umt5.safetensors")
    yield folder / "text_encoders" / "umt5.safetensors"
    save(tensors_of(checkpoint.components["vae"]), folder / "vae" / "wan_2.1_vae.safetensors")
    yield folder / "vae" / "wan_2.1_vae.safetensors"
    if images := checkpoint.components.get("image_encoder"):
        path = folder / "clip_vision" / "clip_vision_h.safetensors"
        save(clip(tensors_of(images)), path)
        yield path


def clip(tensors: Tensors) -> Tensors:
    """CLIP's vision tower as transformers names it, with its last layer, which nobody reads."""
    found: Tensors = {}
    last = 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("transformer."))
    again = {
        name.replace(f"transformer.{last - 1}.", f"transformer.{last}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"transformer.{last - 1}.")
    }
    for name, tensor in (tensors | again).items():
        parts: Mapping[str, Any] = {name: tensor}
        if "to_qkv" in name:
            names = (name.replace("to_qkv", f"to_{x}") for x in "qkv")
            parts = dict(zip(names, tensor.chunk(3), strict=True))
        for part, value in parts.items():
            axes = key_maps.LEADING_AXES["image_encoder"].get(part, 0)
            renamed = key_maps.IMAGE_ENCODER.to_diffusers(part) or part
            found[f"vision_model.{renamed}"] = value.reshape(value.shape[axes:]).clone()
    return found


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a checkpoint, a bundle that is not quantised, or tiny")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dit", nargs="+", choices=[*SAFETENSORS, *GGUF], default=["plain"])
    arguments = parser.parse_args()
    checkpoint = open_source(arguments.source)
    tensors = tensors_of(checkpoint.components["dit"])
    for form in arguments.dit:
        name = f"{checkpoint.config.name}-{form}"
        print(write_dit(tensors, arguments.folder / "diffusion_models", name, form))
    for path in write_others(checkpoint, arguments.folder):
        print(path)


if __name__ == "__main__":
    main()
