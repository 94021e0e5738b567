"""Parts of a checkpoint: the weights of one network with its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from wanx.checkpoints import checkpoint_config as sizes
from wanx.checkpoints import image_encoder_checkpoint as image_encoder
from wanx.checkpoints.tokenizer_source import TokenizerSource
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.models import (
    PRESETS,
    DiTConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    VAEConfig,
)
from wanx.errors import UsageError

PartConfig = DiTConfig | TextEncoderConfig | VAEConfig | ImageEncoderConfig
_HEAD = 128  # width of a head in every published model
COMPONENTS = ("dit", "text_encoder", "vae", "image_encoder")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Weights of one network.

    Attributes:
        weights: of it.
        config: its sizes.
        tokenizer: that came in the same file, of a text encoder.
    """

    weights: ComponentWeights
    config: PartConfig
    tokenizer: TokenizerSource | None = None

    @property
    def component(self) -> str:
        """Name of the network, such as ``dit``."""
        return self.weights.component


def make_part(
    weights: ComponentWeights,
    told: Mapping[str, Any] | None = None,
    source: Path | None = None,
    tokenizer: TokenizerSource | None = None,
) -> Part:
    """Join the weights of a network with its sizes.

    Args:
        weights: of the network.
        told: sizes that a config file tells; None where there is no such file.
        source: that file, for messages; None is the first file of the weights.
        tokenizer: that came with them.

    Raises:
        CorruptInputError: tensors that tell sizes are missing, or the two disagree.
        UsageError: the network is not one of Wan2.1.
    """
    source = source or weights.files[0]
    facts = dict(told or {})
    if weights.component == "dit":
        facts = facts if told is not None else _sizes_of_a_preset(weights)
        return Part(weights=weights, config=sizes.dit_config(facts, weights, source))
    if weights.component == "text_encoder":
        config = sizes.text_encoder_config(facts, weights, source)
        return Part(weights=weights, config=config, tokenizer=tokenizer)
    if weights.component == "vae":
        vae = sizes.vae_config(facts, weights, source)
        return Part(weights=weights, config=vae if told is not None else _with_statistics(vae))
    if told is None:
        facts = image_encoder.published_sizes(weights)
    weights, images = image_encoder.drop_last_layer(weights, facts, source)
    return Part(weights=weights, config=images)


def _sizes_of_a_preset(weights: ComponentWeights) -> dict[str, Any]:
    """Sizes that no tensor tells, from the preset of the same width and depth.

    Raises:
        UsageError: there is no such preset, and the width is not that of a published model.
    """
    told = sizes.sizes_told_by_tensors(weights)
    task = sizes.infer_task(weights.tensors)
    told_of = {name: value for name, value in told.items() if name != "image_positions"}
    for preset in PRESETS.values():
        config = preset.dit
        if preset.task == task and all(getattr(config, k) == v for k, v in told_of.items()):
            unknown = (
                {f.name for f in fields(config)} - set(told) - {"image_frames", "image_tokens"}
            )
            return {name: getattr(config, name) for name in unknown}
    if told["dim"] % _HEAD:
        raise UsageError(
            f"{weights.files[0]} has a width of {told['dim']}, which is no number of heads of "
            f"{_HEAD} as in published models; put the config.json of its model beside it"
        )
    return {"num_heads": told["dim"] // _HEAD}


def _with_statistics(config: VAEConfig) -> VAEConfig:
    """Mean and deviation of the latents, which no tensor tells, as the preset of these sizes."""
    for preset in PRESETS.values():
        same = replace(preset.vae, latent_mean=config.latent_mean, latent_std=config.latent_std)
        if same == config:
            return preset.vae
    return config
