"""What a model is made of: each component's module, its graph inputs and its dynamic axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wanx.config import DiTConfig, ModelConfig, TextEncoderConfig, VAEConfig
from wanx.models.dit import WanDiT
from wanx.models.text_encoder import UMT5Encoder
from wanx.models.vae import History, WanVAE

Shape = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class GraphInput:
    """One input of a graph; a string in ``shape`` names a dynamic axis."""

    name: str
    shape: Shape
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class ComponentSpec:
    """One graph of the bundle.

    ``weights`` names the group of tensors that it reads, which several graphs may share.
    ``axes`` gives each dynamic axis a size to trace with; an axis such as ``"2*h"`` is derived.
    ``caches`` follow the inputs in the graph; the module takes them as one list.
    ``build`` makes the module; where ``blocks`` is not 0, the module has a stack of that many equal
    blocks, called ``blocks``, and ``build`` takes how many to make.
    """

    name: str
    weights: str
    build: Callable[..., nn.Module]
    inputs: tuple[GraphInput, ...]
    outputs: tuple[str, ...]
    axes: dict[str, int]
    caches: tuple[GraphInput, ...] = ()
    blocks: int = 0

    def module(self, blocks: int | None = None) -> nn.Module:
        """Build the module, with fewer ``blocks`` where that is asked for."""
        return self.build(blocks or self.blocks) if self.blocks else self.build()


class DecoderFirst(WanVAE):
    """Decode the first latent frame."""

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        """Return the frame and the past of every temporal layer."""
        history = History()
        return (self.decode(latent, history), *history.kept)


class DecoderRest(WanVAE):
    """Decode one more latent frame."""

    def forward(self, latent: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the frames and the new past of every temporal layer."""
        history = History(past)
        return (self.decode(latent, history), *history.kept)


def component_specs(config: ModelConfig) -> list[ComponentSpec]:
    """List the graphs of a model, in the order in which a run needs them."""
    return [
        text_encoder_spec(config.text_encoder),
        dit_spec(config.dit),
        *vae_decoder_specs(config.vae),
    ]


def text_encoder_spec(config: TextEncoderConfig) -> ComponentSpec:
    """Describe the text encoder: unpadded ids in, features out."""
    return ComponentSpec(
        name="text_encoder",
        weights="text_encoder",
        build=lambda blocks: UMT5Encoder(replace(config, num_layers=blocks)),
        blocks=config.num_layers,
        inputs=(GraphInput(name="ids", shape=(1, "n"), dtype=torch.int64),),
        outputs=("features",),
        axes={"n": 24},
    )


def dit_spec(config: DiTConfig) -> ComponentSpec:
    """Describe the denoiser: its only dynamic axis is the number of tokens L."""
    rope: Shape = ("L", config.head_dim // 2)
    return ComponentSpec(
        name="dit",
        weights="dit",
        build=lambda blocks: WanDiT(replace(config, num_layers=blocks)),
        blocks=config.num_layers,
        inputs=(
            GraphInput(name="tokens", shape=(1, "L", config.token_dim)),
            GraphInput(name="timestep", shape=(1,)),
            GraphInput(name="context", shape=(1, config.text_len, config.text_dim)),
            GraphInput(name="rope_cos", shape=rope),
            GraphInput(name="rope_sin", shape=rope),
        ),
        outputs=("velocity",),
        axes={"L": 96},
    )


def vae_decoder_specs(config: VAEConfig) -> list[ComponentSpec]:
    """Describe the two decoder graphs; the caches of ``rest`` are what either graph left."""
    axes = {"h": 6, "w": 10}
    latent = GraphInput(name="latent", shape=(1, config.z_dim, 1, "h", "w"))
    with FakeTensorMode():
        first = DecoderFirst(config)
        kept = first(torch.empty(1, config.z_dim, 1, axes["h"], axes["w"]))[1:]
    caches = tuple(
        GraphInput(
            name=f"cache_{i}",
            shape=(
                *past.shape[:3],
                _scaled("h", past.shape[3], axes),
                _scaled("w", past.shape[4], axes),
            ),
        )
        for i, past in enumerate(kept)
    )
    outputs = ("video", *(f"{cache.name}_next" for cache in caches))
    return [
        ComponentSpec(
            name="vae_decoder_first", weights="vae", build=lambda: DecoderFirst(config),
            inputs=(latent,), outputs=outputs, axes=axes,
        ),
        ComponentSpec(
            name="vae_decoder_rest", weights="vae", build=lambda: DecoderRest(config),
            inputs=(latent,), caches=caches, outputs=outputs, axes=axes,
        ),
    ]  # fmt: skip


def _scaled(axis: str, size: int, axes: dict[str, int]) -> str:
    factor = size // axes[axis]
    return axis if factor == 1 else f"{factor}*{axis}"


def expected_tensors(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Give, per group of weights, the name and shape of every tensor the checkpoint must have."""
    with torch.device("meta"):
        modules = {
            "dit": WanDiT(config.dit),
            "text_encoder": UMT5Encoder(config.text_encoder),
            "vae": WanVAE(config.vae),
        }
    return {
        group: {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
        for group, module in modules.items()
    }
