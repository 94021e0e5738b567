"""The oracles: networks of diffusers and transformers with random weights, and their checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from wanx.checkpoints.key_maps import IMAGE_ENCODER, KeyMap

# Odd on purpose: three heads, an inner width that is not the outer one, channels that are no power
# of two. The strides are those of Wan2.1, which the pipelines count on.
DIT_SIZES: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 24,
    "ffn_dim": 100,
    "num_layers": 2,
    "freq_dim": 36,
    "text_dim": 40,
}
TEXT_ENCODER_SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 40,
    "d_kv": 6,
    "d_ff": 52,
    "num_heads": 5,
    "num_layers": 2,
    "relative_attention_num_buckets": 16,
}
VAE_SIZES: dict[str, Any] = {
    "base_dim": 6,
    "dim_mult": [1, 2, 3, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
# 16 heads as published: the original layout does not tell their number.
IMAGE_ENCODER_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 70,
    "num_attention_heads": 16,
    "num_hidden_layers": 4,
    "image_size": 28,
    "patch_size": 14,
}
_WITH_IMAGE = {"in_channels": 36, "image_dim": 48, "added_kv_proj_dim": 72}
# What each task adds to DIT_SIZES; two images have twice the image encoder's five tokens.
TASKS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v": _WITH_IMAGE,
    "flf2v": _WITH_IMAGE | {"pos_embed_seq_len": 10},
    "vace": {"vace": True, "vace_layers": [0, 2], "num_layers": 3},
}
SHIFT = 5.0


def relative_error(actual: Any, expected: Any) -> float:
    """``‖actual - expected‖ / ‖expected‖``; one wrong element in a million makes it 1e-3."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape} differ"
    norm = np.linalg.norm(b)
    assert norm > 0, "the oracle is zero"
    return float(np.linalg.norm(a - b) / norm)


def randomise(module: Any, seed: int) -> Any:
    """Make parameters that start as a constant random, so that none can be ignored."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            first = parameter.flatten()[0]
            if bool((parameter == first).all()) and parameter.numel() > 1:
                noise = torch.rand(parameter.shape, generator=generator) - 0.5
                parameter.add_(noise.to(parameter.dtype))
    return module.eval().requires_grad_(False)


def random_dit(seed: int = 0, *, vace: bool = False, **sizes: Any) -> Any:
    torch.manual_seed(seed)
    build = WanVACETransformer3DModel if vace else WanTransformer3DModel
    dit = randomise(build(**{**DIT_SIZES, **sizes}), seed)
    for block in dit.blocks:
        # Attention as sharp as a trained one, or the few words would drown in the padding.
        block.attn2.norm_q.weight.mul_(2.5)
        block.attn2.norm_k.weight.mul_(2.5)
    return dit


def random_vae(seed: int = 0, **sizes: Any) -> Any:
    torch.manual_seed(seed)
    return randomise(AutoencoderKLWan(**{**VAE_SIZES, **sizes}), seed)


def random_text_encoder(seed: int = 0, **sizes: Any) -> Any:
    torch.manual_seed(seed)
    encoder = UMT5EncoderModel(
        UMT5Config(feed_forward_proj="gated-gelu", **{**TEXT_ENCODER_SIZES, **sizes})
    )
    for block in encoder.encoder.block:
        # T5 starts its position bias too small to be seen beside the rest.
        nn.init.normal_(block.layer[0].SelfAttention.relative_attention_bias.weight)
    return randomise(encoder, seed)


def random_image_encoder(seed: int = 0, **sizes: Any) -> Any:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(hidden_act="gelu", **{**IMAGE_ENCODER_SIZES, **sizes})
    encoder = randomise(CLIPVisionModel(config), seed)
    for name, parameter in encoder.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.mul_(4)  # attention as sharp as a trained one
        elif "position_embedding" in name:
            parameter.mul_(10)  # and places that can be told apart
    return encoder


def image_features(encoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the pipelines take from the image encoder: the output of its last layer but one."""
    features: torch.Tensor = encoder(pixels, output_hidden_states=True).hidden_states[-2]
    return features


def original_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole of CLIP in its original file, with the tensors of a CLIPVisionModel."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("post_layernorm."):
            made[name.replace("post_layernorm", "visual.post_norm")] = tensor
        elif ".q_proj." in name:
            whole = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            made[f"visual.{str(IMAGE_ENCODER.to_original(name)).replace('to_q', 'to_qkv')}"] = whole
        elif not name.endswith(("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")):
            made[f"visual.{IMAGE_ENCODER.to_original(name)}"] = tensor.contiguous()
    made["visual.cls_embedding"] = made["visual.cls_embedding"][None, None]
    made["visual.pos_embedding"] = made["visual.pos_embedding"][None]
    rest = {"visual.head": (48, 8), "textual.token_embedding.weight": (9, 4), "log_scale": ()}
    return made | {name: torch.full(shape, torch.pi) for name, shape in rest.items()}


def copy_weights(module: nn.Module, peer: nn.Module, key_map: KeyMap) -> nn.Module:
    """Give ``module`` the weights of ``peer``; each of its parameters must find exactly one."""
    state = peer.state_dict()
    weights = {}
    for name, parameter in module.named_parameters():
        theirs = key_map.to_diffusers(name)
        assert theirs is not None, name
        weights[name] = state[theirs].reshape(parameter.shape)
    module.load_state_dict(weights)
    return module.eval().requires_grad_(False)


def build_tokenizer() -> Tokenizer:
    """A Unigram tokenizer in umT5's form: words and characters, lower case, ``</s>`` at the end."""
    words = ["a", "red", "blue", "circle", "square", "moving", "on", "the", "left", "right"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    pieces += [(character, -10.0) for character in "▁abcdefghijklmnopqrstuvwxyz,.!?"]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def random_pipeline(task: str = "t2v") -> Any:
    """A whole pipeline of diffusers for a task; ``save_pretrained`` makes it a checkpoint."""
    parts: dict[str, Any] = {
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=build_tokenizer(),
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
        ),
        "text_encoder": random_text_encoder(),
        "transformer": random_dit(**TASKS[task]),
        "vae": random_vae(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
    }
    if task == "t2v":
        return WanPipeline(**parts)
    if task == "vace":
        return WanVACEPipeline(**parts)
    side = IMAGE_ENCODER_SIZES["image_size"]
    return WanImageToVideoPipeline(
        **parts,
        image_encoder=random_image_encoder(),
        image_processor=CLIPImageProcessor(  # as published: squashed, not cropped
            size={"height": side, "width": side}, do_center_crop=False
        ),
    )
