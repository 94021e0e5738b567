"""Components of a model: modules, graph inputs and dynamic axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wanx.config.models import (
    DiTConfig,
    ImageEncoderConfig,
    ModelConfig,
    TextEncoderConfig,
    VAEConfig,
)
from wanx.models.dit.model import WanDiT
from wanx.models.image_encoder import ImageEncoder
from wanx.models.text_encoder import UMT5Encoder
from wanx.models.vae import History, WanVAE

Shape = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class GraphInput:
    """One input of a graph; strings in ``shape`` are dynamic axes: ``h`` or ``8*h``."""

    name: str
    shape: Shape
    dtype: torch.dtype = torch.float32

    def example(self, axes: Mapping[str, int], device: torch.device | str = "cpu") -> Tensor:
        """Zeros of this shape, given the size of each axis."""
        sizes = []
        for size in self.shape:
            if isinstance(size, str):
                factor, axis = split_axis(size)
                size = factor * axes[axis]
            sizes.append(size)
        return torch.zeros(sizes, dtype=self.dtype, device=device)


def split_axis(size: str) -> tuple[int, str]:
    """Split ``8*h`` into 8 and ``h``, and ``h`` into 1 and ``h``."""
    factor, _, axis = size.rpartition("*")
    return int(factor or 1), axis


def _scaled(factor: int, axis: str) -> str:
    return axis if factor == 1 else f"{factor}*{axis}"


@dataclass(frozen=True, kw_only=True)
class ComponentSpec:
    """One graph of the bundle.

    ``weights`` names the group of tensors that it reads, which several graphs may share.
    ``axes`` gives each dynamic axis a size to trace with; an axis such as ``"2*h"`` is derived.
    ``caches`` follow the inputs in the graph; the module takes them as one list.
    ``build`` makes the module; where ``blocks`` is not 0, the module has a stack of that many equal
    blocks, called ``stack``, and ``build`` takes how many to make.
    """

    name: str
    weights: str
    build: Callable[..., nn.Module]
    inputs: tuple[GraphInput, ...]
    outputs: tuple[str, ...]
    axes: dict[str, int]
    caches: tuple[GraphInput, ...] = ()
    blocks: int = 0
    stack: str = "blocks"

    def module(self, blocks: int | None = None) -> nn.Module:
        """Build the module, with all blocks or the first ``blocks``."""
        return self.build(blocks or self.blocks) if self.blocks else self.build()


class VaceDiT(WanDiT):
    """The denoiser with a control branch; its hints differ from block to block."""

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        timestep: Tensor,
        context: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        vace_tokens: Tensor,
        vace_scale: Tensor,
    ) -> Tensor:
        """Predict a velocity; see :class:`wanx.models.dit.model.WanDiT`."""
        return super().forward(
            tokens, timestep, context, rope_cos, rope_sin,
            vace_tokens=vace_tokens, vace_scale=vace_scale,
        )  # fmt: skip


class FirstChunk(WanVAE):
    """A part of the VAE for the first frame of a clip, or its latent."""

    def __init__(self, config: VAEConfig, part: str) -> None:
        super().__init__(config)
        self._part = part

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the part makes, and the past of every temporal layer."""
        history = History()
        return (getattr(self, self._part)(x, history), *history.kept)


class LaterChunk(FirstChunk):
    """The same part for the frames of each later latent."""

    def forward(self, x: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return what the part makes, and the new past of every temporal layer."""
        history = History(past)
        return (getattr(self, self._part)(x, history), *history.kept)


def component_specs(config: ModelConfig) -> list[ComponentSpec]:
    """List the graphs of a model, in the order in which a run needs them."""
    image = config.image_encoder
    return [
        text_encoder_spec(config.text_encoder),
        *([] if image is None else [image_encoder_spec(image)]),
        *([] if config.task == "t2v" else vae_encoder_specs(config.vae)),
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


def image_encoder_spec(config: ImageEncoderConfig) -> ComponentSpec:
    """Describe the image encoder: one image of CLIP's size in, features out."""
    pixels: Shape = (1, 3, config.image_size, config.image_size)
    return ComponentSpec(
        name="image_encoder",
        weights="image_encoder",
        build=lambda blocks: ImageEncoder(replace(config, num_layers=blocks + 1)),
        blocks=config.used_layers,
        stack="transformer",
        inputs=(GraphInput(name="pixels", shape=pixels),),
        outputs=("features",),
        axes={},
    )


def dit_spec(config: DiTConfig) -> ComponentSpec:
    """Describe the denoiser: its only dynamic axis is the number of tokens L."""
    rope: Shape = ("L", config.head_dim // 2)
    inputs = [
        GraphInput(name="tokens", shape=(1, "L", config.token_dim)),
        GraphInput(name="timestep", shape=(1,)),
        GraphInput(name="context", shape=(1, config.text_len, config.text_dim)),
        GraphInput(name="rope_cos", shape=rope),
        GraphInput(name="rope_sin", shape=rope),
    ]
    if config.image_dim is not None:
        images: Shape = (1, config.image_frames * config.image_tokens, config.image_dim)
        inputs.append(GraphInput(name="image_context", shape=images))
    spec = ComponentSpec(
        name="dit",
        weights="dit",
        build=lambda blocks: WanDiT(replace(config, num_layers=blocks)),
        blocks=config.num_layers,
        inputs=tuple(inputs),
        outputs=("velocity",),
        axes={"L": 96},
    )
    if not config.vace_layers:
        return spec
    control: Shape = (1, "L", config.vace_in_dim * config.patch_volume)
    hints = (
        GraphInput(name="vace_tokens", shape=control),
        GraphInput(name="vace_scale", shape=(len(config.vace_layers),)),
    )
    # Blocks with a hint are not equal to those without, so the whole of them is traced.
    return replace(spec, build=lambda: VaceDiT(config), blocks=0, inputs=(*spec.inputs, *hints))


def vae_encoder_specs(config: VAEConfig) -> list[ComponentSpec]:
    """Describe the encoder: what can be cut into tiles, then what sees whole frames."""
    sides = tuple(_scaled(config.spatial_stride, axis) for axis in "hw")
    first, later = (
        GraphInput(name="video", shape=(1, 3, frames, *sides))
        for frames in (1, config.temporal_stride)
    )
    features = _features(config)
    return [
        *_chunked_specs(config, "vae_encoder_down", "encode_down", first, later, "features"),
        *_chunked_specs(config, "vae_encoder_mid", "encode_mid", features, features, "latent"),
    ]


def vae_decoder_specs(config: VAEConfig) -> list[ComponentSpec]:
    """Describe the decoder: what sees whole frames, then what can be cut into tiles."""
    latent = GraphInput(name="latent", shape=(1, config.z_dim, 1, "h", "w"))
    features = _features(config)
    return [
        *_chunked_specs(config, "vae_decoder_mid", "decode_mid", latent, latent, "features"),
        *_chunked_specs(config, "vae_decoder_up", "decode_up", features, features, "video"),
    ]


def _features(config: VAEConfig) -> GraphInput:
    """Features of a latent frame, between the two halves of the encoder and of the decoder."""
    channels = config.base_dim * config.multipliers[-1]
    return GraphInput(name="features", shape=(1, channels, 1, "h", "w"))


def _chunked_specs(
    config: VAEConfig,
    name: str,
    part: str,
    first: GraphInput,
    later: GraphInput,
    output: str,
) -> list[ComponentSpec]:
    """Describe a graph for the first chunk and one for each later chunk, with caches between."""
    axes = {"h": 6, "w": 10}
    with FakeTensorMode():
        kept = FirstChunk(config, part)(first.example(axes))[1:]
    caches = tuple(
        GraphInput(
            name=f"cache_{i}",
            shape=(
                *past.shape[:3],
                _scaled(past.shape[3] // axes["h"], "h"),
                _scaled(past.shape[4] // axes["w"], "w"),
            ),
        )
        for i, past in enumerate(kept)
    )
    outputs = (output, *(f"{cache.name}_next" for cache in caches))
    chunks = {"first": (first, FirstChunk, ()), "rest": (later, LaterChunk, caches)}
    return [
        ComponentSpec(
            name=f"{name}_{chunk}", weights="vae", build=partial(module, config, part),
            inputs=(item,), caches=past, outputs=outputs, axes=axes,
        )
        for chunk, (item, module, past) in chunks.items()
    ]  # fmt: skip


def expected_tensors(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Give, per group of weights, the name and shape of every tensor the checkpoint must have."""
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {
            "dit": WanDiT(config.dit),
            "text_encoder": UMT5Encoder(config.text_encoder),
            "vae": WanVAE(config.vae),
        }
        if config.image_encoder is not None:
            modules["image_encoder"] = ImageEncoder(config.image_encoder)
    return {
        group: {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
        for group, module in modules.items()
    }
