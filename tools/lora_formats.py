"""Write a LoRA again under the names that trainers and programs give its tensors.

    python tools/lora_formats.py tools/tiny/growing.safetensors /tmp/loras
    wanx export tiny --lora /tmp/loras/growing-kohya.safetensors

The file has pairs ``diffusion_model.LAYER.lora_down.weight`` and ``lora_up.weight`` with an
``alpha`` for each. Where a format has none, its factor goes into the up matrix.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from wanx.checkpoints import key_maps

Tensors = dict[str, torch.Tensor]
PREFIX = "diffusion_model."


def layers(lora: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Down and up matrices and alpha over the rank, by layer."""
    found = {}
    for name, down in lora.items():
        if name.endswith(".lora_down.weight"):
            stem = name.removesuffix(".lora_down.weight")
            factor = float(lora[f"{stem}.alpha"]) / len(down)
            found[stem.removeprefix(PREFIX)] = down, lora[f"{stem}.lora_up.weight"], factor
    return found


def _pairs(lora: Tensors, name: Callable[[str], str], down: str, up: str) -> Tensors:
    """A format without alphas."""
    found = {}
    for layer, (first, second, factor) in layers(lora).items():
        found[f"{name(layer)}.{down}"] = first
        found[f"{name(layer)}.{up}"] = (second.double() * factor).to(second.dtype)
    return found


def comfyui(lora: Tensors) -> Tensors:
    """As ComfyUI and LightX2V have it."""
    return _pairs(lora, lambda layer: f"{PREFIX}{layer}", "lora_A.weight", "lora_B.weight")


def kohya(lora: Tensors) -> Tensors:
    """As kohya's and musubi's trainers write it, with alphas."""
    found = {}
    for layer, (down, up, factor) in layers(lora).items():
        stem = f"lora_unet_{layer.replace('.', '_')}"
        found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        found[f"{stem}.alpha"] = torch.tensor(factor * len(down))
    return found


def diffusers(lora: Tensors) -> Tensors:
    """As Diffusers saves it, with its names of layers."""

    def name(layer: str) -> str:
        renamed = key_maps.DIT.to_diffusers(f"{layer}.weight")
        assert renamed is not None, layer
        return f"transformer.{renamed.removesuffix('.weight')}"

    return _pairs(lora, name, "lora_A.weight", "lora_B.weight")


def peft(lora: Tensors) -> Tensors:
    """As PEFT saves an adapter, here without its config."""
    return _pairs(lora, lambda layer: f"base_model.model.{layer}", "lora_A.weight", "lora_B.weight")


def diffsynth(lora: Tensors) -> Tensors:
    """As DiffSynth-Studio writes it."""
    return _pairs(
        lora, lambda layer: f"pipe.dit.{layer}", "lora_A.default.weight", "lora_B.default.weight"
    )


FORMATS = {
    "comfyui": comfyui, "kohya": kohya, "diffusers": diffusers, "peft": peft,
    "diffsynth": diffsynth,
}  # fmt: skip


def main() -> None:
    """Parse the command line and write a file for each format."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lora", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lora = load_file(arguments.lora)
    for form in arguments.format:
        path = arguments.folder / f"{arguments.lora.stem}-{form}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in FORMATS[form](lora).items()}
        save_file(tensors, path)
        print(path)


if __name__ == "__main__":
    main()
