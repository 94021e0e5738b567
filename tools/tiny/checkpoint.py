"""Write the trained networks as a checkpoint in the original layout of Wan2.1, and read them back.

    python tools/tiny/checkpoint.py WORK DESTINATION [--preset tiny-i2v]

Reads ``dit.pt``, ``latents.pt`` and ``decoder.pt`` (or else ``vae.pt``) from WORK. Tensors are
float32 and carry the names of the published checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_dit import TextToVelocity, build
from vocabulary import build_tokenizer

from wanx.config.models import PRESETS, VAEConfig
from wanx.models.vae import WanVAE

DIT = "diffusion_pytorch_model.safetensors"
VAE = "Wan2.1_VAE.safetensors"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.safetensors"
IMAGE_ENCODER = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"
TOKENIZER = "google/umt5-xxl/tokenizer.json"
PATCH_EMBEDDING = "patch_embedding.weight"


def write(work: Path, destination: Path, preset: str) -> None:
    """Build the checkpoint beside ``destination`` and put it there in one move."""
    averaged = torch.load(work / "dit.pt", weights_only=True)["averaged"]
    sharpened = work / "decoder.pt"
    source = sharpened if sharpened.exists() else work / "vae.pt"
    vae = torch.load(source, weights_only=True)["vae"]
    statistics = torch.load(work / "latents.pt", weights_only=True)
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / TOKENIZER).parent.mkdir(parents=True)
    config = PRESETS[preset].dit
    dit = _under(averaged, "dit.")
    # Published as a convolution over patches.
    patches = config.in_dim, *config.patch_size
    dit[PATCH_EMBEDDING] = dit[PATCH_EMBEDDING].reshape(-1, *patches)
    save_file(dit, partial / DIT)
    save_file(_under(averaged, "text_encoder."), partial / TEXT_ENCODER)
    save_file({name: tensor.contiguous() for name, tensor in vae.items()}, partial / VAE)
    if image_encoder := _under(averaged, "image_encoder."):
        visual = {f"visual.{name}": tensor for name, tensor in image_encoder.items()}
        # CLIP has one more layer than Wan2.1 reads, and so do its files.
        first, last = "visual.transformer.0.", f"visual.transformer.{layers_read(image_encoder)}."
        visual |= {
            name.replace(first, last): torch.zeros_like(tensor)
            for name, tensor in visual.items()
            if name.startswith(first)
        }
        save_file(visual, partial / IMAGE_ENCODER)
    build_tokenizer().save(str(partial / TOKENIZER))
    description = {
        "_class_name": "WanModel",
        "model_type": PRESETS[preset].task,
        "text_len": config.text_len,
        "in_dim": config.in_dim,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "text_dim": config.text_dim,
        "out_dim": config.out_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "eps": config.eps,
    }
    (partial / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    normalisation = {name: statistics[name].tolist() for name in ("mean", "std")}
    (partial / "latent_statistics.json").write_text(json.dumps(normalisation, indent=2) + "\n")
    shutil.rmtree(destination, ignore_errors=True)
    partial.rename(destination)


def layers_read(image_encoder: dict[str, Tensor]) -> int:
    """Number of layers in the state of an image encoder."""
    return len({name.split(".")[1] for name in image_encoder if name.startswith("transformer.")})


def read(folder: Path) -> tuple[TextToVelocity, WanVAE]:
    """The networks of a checkpoint written by ``write``, ready to sample from."""
    statistics = json.loads((folder / "latent_statistics.json").read_text())
    model = build("tiny")
    dit = load_file(folder / DIT)
    dit[PATCH_EMBEDDING] = dit[PATCH_EMBEDDING].flatten(1)
    model.dit.load_state_dict(dit)
    model.text_encoder.load_state_dict(load_file(folder / TEXT_ENCODER))
    vae = WanVAE(vae_config(statistics))
    vae.load_state_dict(load_file(folder / VAE))
    return model.eval(), vae.eval()


def vae_config(statistics: dict[str, list[float]]) -> VAEConfig:
    """The tiny VAE's sizes with measured latent statistics."""
    return dataclasses.replace(
        PRESETS["tiny"].vae,
        latent_mean=tuple(statistics["mean"]),
        latent_std=tuple(statistics["std"]),
    )


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.contiguous()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--preset", choices=("tiny", "tiny-i2v"), default="tiny")
    arguments = parser.parse_args()
    write(arguments.work, arguments.destination, arguments.preset)
