"""Small denoisers with random weights beside the text encoder and the VAE of a built-in bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.peers import randomise
from wanx.builtin import builtin_bundle
from wanx.bundle.reader import Bundle, open_bundle
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.checkpoints.weights import ComponentWeights, open_weights
from wanx.config.models import PRESETS
from wanx.models.dit.model import WanDiT

Task = Literal["t2v", "i2v", "vace"]
Change = Callable[[dict[str, Tensor]], object]
_SIZES: dict[str, Any] = {
    "dim": 48, "ffn_dim": 72, "num_heads": 2, "num_layers": 2, "freq_dim": 32, "text_len": 40,
}  # fmt: skip
_PRESETS = {"t2v": "tiny", "i2v": "tiny-i2v", "vace": "tiny-vace"}
_BUNDLES = {"t2v": "tiny", "i2v": "tiny-i2v", "vace": "tiny-i2v"}  # vace needs its VAE encoder


def random_weights(task: Task = "t2v", seed: int = 0, **sizes: Any) -> dict[str, Tensor]:
    """Weights of a denoiser, float32, by original name."""
    torch.manual_seed(seed)
    config = replace(PRESETS[_PRESETS[task]].dit, **(_SIZES | _task_sizes(task) | sizes))
    return dict(randomise(WanDiT(config), seed).state_dict())


def small_model(
    folder: Path, task: Task = "t2v", change: Change | None = None, **sizes: Any
) -> tuple[Checkpoint, Bundle]:
    """A checkpoint whose denoiser is random, and a bundle with everything else.

    Args:
        folder: where the file of the weights is made.
        task: what the model is for.
        change: edits the weights before they are written.
        sizes: fields of :class:`wanx.config.models.DiTConfig` that differ.
    """
    preset = PRESETS[_PRESETS[task]]
    config = replace(preset, dit=replace(preset.dit, **(_SIZES | _task_sizes(task) | sizes)))
    weights = random_weights(task, **sizes)
    if change is not None:
        change(weights)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "dit.safetensors")
    tensors, files = open_weights(folder, "dit")
    root = builtin_bundle(_BUNDLES[task])
    whole = open_bundle(root, allow_hard_links=True, verify="size")
    bundle = Bundle(root, whole.manifest.model_copy(update={"config": config}), whole.hash)
    checkpoint = Checkpoint(
        source=folder,
        layout="original",
        config=config,
        components={"dit": ComponentWeights(component="dit", tensors=tensors, files=files)},
        tokenizer=bundle.tokenizer_path,
    )
    return checkpoint, bundle


def load_dit(checkpoint: Checkpoint) -> WanDiT:
    """The whole denoiser of :func:`small_model` in PyTorch."""
    dit = WanDiT(checkpoint.config.dit).eval().requires_grad_(False)
    data = {}
    for name, source in checkpoint.components["dit"].tensors.items():
        content = bytearray(b"".join(bytes(piece) for piece in source.iter_bytes()))
        data[name] = torch.frombuffer(content, dtype=torch.float32).reshape(source.shape)
    dit.load_state_dict(data)
    return dit


def record_inputs(dit: nn.Module) -> dict[str, list[Tensor]]:
    """Hook every linear and attention of the blocks; each call adds a copy of what it was given.

    Attentions give ``….attend.q``, ``.k`` and ``.v``.
    """
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            letters = [""] if isinstance(module, nn.Linear) else [".q", ".k", ".v"]
            for letter, value in zip(letters, inputs, strict=True):
                seen.setdefault(name + letter, []).append(value.clone())

        return record

    for name, module in dit.named_modules():
        inside = name.startswith(("blocks.", "vace_blocks."))
        if inside and (isinstance(module, nn.Linear) or name.endswith(".attend")):
            module.register_forward_pre_hook(hook(name))
    return seen


def _task_sizes(task: Task) -> dict[str, Any]:
    return {"vace_layers": (0, 1)} if task == "vace" else {}
