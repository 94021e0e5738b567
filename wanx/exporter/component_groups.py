"""Components of a model, and the groups of weights that they read."""

from __future__ import annotations

from wanx.config.models import ModelConfig


def component_groups(config: ModelConfig) -> dict[str, str]:
    """Group of weights of each component, in the order in which a run needs them."""
    names = [
        "text_encoder",
        *([] if config.image_encoder is None else ["image_encoder"]),
        *([] if config.task == "t2v" else _chunked("vae_encoder_down", "vae_encoder_mid")),
        "dit",
        *_chunked("vae_decoder_mid", "vae_decoder_up"),
    ]
    return {name: "vae" if name.startswith("vae_") else name for name in names}


def _chunked(*names: str) -> list[str]:
    return [f"{name}_{chunk}" for name in names for chunk in ("first", "rest")]


def weight_groups(config: ModelConfig) -> dict[str, str]:
    """Groups of weights, each with a component whose files hold all of it."""
    return {group: component for component, group in component_groups(config).items()}
