"""Low-rank matrices beside the linears of the built-in model, and the files that hold them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from train_dit import TextToVelocity, build

from tools.repackage import tensors_of
from wanx.exporter.source import open_source
from wanx.models.vae import WanVAE

TARGETS = ("q", "k", "v", "o", "0", "2")  # of attentions and of the feed-forward network


class LoraLinear(nn.Module):
    """A linear with a product of two small matrices beside it, scaled by ``alpha / rank``."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.alpha = alpha
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(rank))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Output with the product of strength 1."""
        scale = self.alpha / len(self.down)
        return self.linear(x) + scale * F.linear(F.linear(x, self.down), self.up)


def built_in() -> tuple[TextToVelocity, WanVAE]:
    """Give the built-in text-to-video model with its weights, frozen, and its VAE."""
    source = open_source("tiny")
    vae, model = WanVAE(source.config.vae), build("tiny")
    vae.load_state_dict(tensors_of(source.components["vae"]))
    for module, component in ((model.dit, "dit"), (model.text_encoder, "text_encoder")):
        weights = tensors_of(source.components[component])
        if component == "dit":
            weights["patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
        module.load_state_dict(weights)
    return model.requires_grad_(False), vae.eval()


def with_lora(model: TextToVelocity, rank: int, alpha: float) -> dict[str, LoraLinear]:
    """Put a LoRA beside every linear of the blocks; returns them by the names of the linears."""
    found = {}
    for name, module in list(model.dit.named_modules()):
        for child, linear in module.named_children():
            inside = name.startswith("blocks.") and child in TARGETS
            if inside and isinstance(linear, nn.Linear):
                found[f"{name}.{child}"] = LoraLinear(linear, rank, alpha)
                setattr(module, child, found[f"{name}.{child}"])
    return found


def save_lora(loras: dict[str, LoraLinear], output: Path) -> None:
    """Write the file, with names as ComfyUI has them."""
    file = {}
    for name, lora in loras.items():
        file[f"diffusion_model.{name}.lora_down.weight"] = lora.down.detach().bfloat16()
        file[f"diffusion_model.{name}.lora_up.weight"] = lora.up.detach().bfloat16()
        file[f"diffusion_model.{name}.alpha"] = torch.tensor(lora.alpha)
    save_file(file, output)
