"""Write a checkpoint of any preset with random weights, to measure exports and runs with.

The original layout: a sharded bf16 DiT, umT5-xxl, VAE, and where the task has it CLIP without its
text half, as safetensors. The tokenizer is copied from a bundle, so prompts become ids of its small
vocabulary; sizes and shapes are those of the real model.

    python tools/synthesize.py t2v-1.3B /tmp/t2v-1.3B
    python tools/synthesize.py i2v-14B /tmp/i2v-14B --small-text-encoder
    python tools/synthesize.py tiny-vace /tmp/tiny-vace
    python tools/synthesize.py t2v-14B /tmp/t2v-14B --fp8-scaled --lora 64 --lora 64

``--small-text-encoder`` leaves umT5 with one layer and a small vocabulary, and ``--blocks`` the DiT
with so many, where the disk cannot hold everything twice. ``--fp8-scaled`` stores the linears of
the blocks in scaled 8-bit floats, as ComfyUI's files have them, and ``--lora RANK`` writes a LoRA
on all of them beside the checkpoint: ``FOLDER-lora-1.safetensors``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from wanx.builtin import builtin_bundle
from wanx.bundle.manifest import TOKENIZER
from wanx.config.models import PRESETS, ImageEncoderConfig, ModelConfig
from wanx.exporter.components import expected_tensors
from wanx.files.safetensors import SafetensorsWriter
from wanx.models.image_encoder import ImageEncoder

SHARD_BYTES = 9_900_000_000
STEMS = {
    "dit": "diffusion_pytorch_model",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
    "vae": "Wan2.1_VAE",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
}


def synthesize(
    config: ModelConfig, folder: Path, seed: int = 0, *, fp8_scaled: bool = False
) -> None:
    """Write a checkpoint of ``config`` into ``folder``."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    groups = expected_tensors(config)
    # The checkpoint holds the patch embeddings as 3-D convolutions.
    dit, patch = config.dit, config.dit.patch_size
    groups["dit"]["patch_embedding.weight"] = (dit.dim, dit.in_dim, *patch)
    if dit.vace_layers:
        groups["dit"]["vace_patch_embedding.weight"] = (dit.dim, dit.vace_in_dim, *patch)
    if config.image_encoder is not None:
        groups["image_encoder"] = clip_tensors(config.image_encoder)
    for group, shapes in groups.items():
        # Only the DiT is published in shards.
        shards = split(shapes) if group == "dit" else [shapes]
        index = {}
        for number, shard in enumerate(shards, 1):
            stem = STEMS[group]
            if len(shards) > 1:
                stem += f"-{number:05d}-of-{len(shards):05d}"
            path = folder / f"{stem}.safetensors"
            eight_bit = frozenset(filter(is_block_linear, shard)) if fp8_scaled else frozenset()
            write(path, shard, generator, eight_bit if group == "dit" else frozenset())
            index |= dict.fromkeys(shard, path.name)
            print(path, flush=True)
        if len(shards) > 1:
            text = json.dumps({"metadata": {}, "weight_map": index})
            (folder / f"{STEMS[group]}.safetensors.index.json").write_text(text)
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    shutil.copy(builtin_bundle() / TOKENIZER, tokenizer)
    (folder / "config.json").write_text(json.dumps(original_config(config)))


def clip_tensors(config: ImageEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Name the tensors of CLIP's vision half, with what no network reads behind its last layer."""
    with torch.device("meta"):
        whole = ImageEncoder(replace(config, num_layers=config.num_layers + 1))
    shapes = {f"visual.{name}": tuple(p.shape) for name, p in whole.named_parameters()}
    end = {"post_norm.weight": (config.dim,), "post_norm.bias": (config.dim,)}
    return shapes | {f"visual.{name}": shape for name, shape in end.items()}


def split(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Fill shards of at most ``SHARD_BYTES`` of bf16."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if filled and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def is_block_linear(name: str) -> bool:
    """True for the weight of a linear of a transformer block."""
    layers = r"(self_attn|cross_attn)\.(q|k|v|o|k_img|v_img)|ffn\.(0|2)"
    return bool(re.fullmatch(rf"(vace_)?blocks\.\d+\.({layers})\.weight", name))


def write(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    generator: np.random.Generator,
    eight_bit: frozenset[str] = frozenset(),
) -> None:
    """Write one shard: norms near one, everything else scaled so that activations stay finite."""
    block = generator.standard_normal(1 << 20, dtype=np.float32)
    header: list[tuple[str, str, tuple[int, ...]]] = [
        (name.replace(".weight", ".scale_weight"), "F32", ()) for name in sorted(eight_bit)
    ]
    header += [(name, "BF16", shape) for name, shape in shapes.items() if name not in eight_bit]
    header += [(name, "F8_E4M3", shapes[name]) for name in sorted(eight_bit)]
    # A sign and a magnitude, of which 127 is NaN.
    codes = np.abs(block * 32).clip(0, 126).astype(np.uint8) | np.signbit(block).view(np.uint8) << 7
    with SafetensorsWriter(path, header) as file:
        for name, dtype, shape in header:
            count = int(np.prod(shape))
            if dtype == "F32":
                file.write(np.float32(1e-4).tobytes())
                continue
            if dtype == "F8_E4M3":
                for start in range(0, count, len(codes)):
                    file.write(codes[: count - start].data)
                continue
            is_norm = len(shape) == 1 and ("norm" in name or "gamma" in name)
            fan_in = max(1, int(np.prod(shape[1:])))
            scale = np.float32(0.02 if is_norm else fan_in**-0.5)
            values = block * scale + np.float32(is_norm)
            # bf16 is the upper half of a float32; truncating is good enough for random numbers.
            raw = (values.view(np.uint32) >> 16).astype(np.uint16)
            start = int(generator.integers(1 << 19))
            written = 0
            while written < count:
                piece = raw[start : start + count - written]
                file.write(piece.data)
                written += len(piece)
                start = int(generator.integers(1 << 19))


def write_lora(config: ModelConfig, path: Path, rank: int, seed: int) -> None:
    """Write a LoRA on all linears of the blocks."""
    shapes = {}
    for name, shape in expected_tensors(config)["dit"].items():
        if is_block_linear(name):
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            shapes[f"{layer}.lora_down.weight"] = (rank, shape[1])
            shapes[f"{layer}.lora_up.weight"] = (shape[0], rank)
    write(path, shapes, np.random.default_rng(seed))


def original_config(config: ModelConfig) -> dict[str, object]:
    """The ``config.json`` of the original layout."""
    dit = config.dit
    control = {"vace_layers": list(dit.vace_layers), "vace_in_dim": dit.vace_in_dim}
    return {
        "_class_name": "VaceWanModel" if dit.vace_layers else "WanModel",
        "model_type": config.task, "dim": dit.dim,
        "ffn_dim": dit.ffn_dim, "freq_dim": dit.freq_dim, "num_heads": dit.num_heads,
        "num_layers": dit.num_layers, "in_dim": dit.in_dim, "out_dim": dit.out_dim,
        "text_len": dit.text_len, "eps": dit.eps, **(control if dit.vace_layers else {}),
    }  # fmt: skip


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small-text-encoder", action="store_true")
    parser.add_argument("--blocks", type=int, metavar="N")
    parser.add_argument("--fp8-scaled", action="store_true")
    parser.add_argument("--lora", type=int, action="append", default=[], metavar="RANK")
    arguments = parser.parse_args()
    config = PRESETS[arguments.preset]
    if arguments.small_text_encoder:
        text_encoder = replace(config.text_encoder, vocab_size=512, num_layers=1)
        config = replace(config, text_encoder=text_encoder)
    if arguments.blocks:
        hints = tuple(layer for layer in config.dit.vace_layers if layer < arguments.blocks)
        config = replace(
            config, dit=replace(config.dit, num_layers=arguments.blocks, vace_layers=hints)
        )
    synthesize(config, arguments.folder, fp8_scaled=arguments.fp8_scaled)
    for number, rank in enumerate(arguments.lora, 1):
        name = f"{arguments.folder.name}-lora-{number}.safetensors"
        write_lora(config, arguments.folder.with_name(name), rank, number)


if __name__ == "__main__":
    main()
