"""Tensor names: the original Wan2.1 checkpoints against the Diffusers layout.

Each table pairs an original name with its Diffusers name, without the leaf (``.weight``, ``.bias``,
``.gamma``) unless only one of the two has it; ``{n}`` stands for any number. The maps are pure
renames: no tensor is split or transposed, and ``CONCATENATED`` lists those that Diffusers keeps in
parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

_LEAVES = ("weight", "bias", "gamma")


class KeyMap:
    """A one-to-one renaming between the two layouts, made from pairs of templates."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Index pairs of (original, Diffusers) templates."""
        pairs = list(pairs)
        self._to_diffusers = dict(pairs)
        self._to_original = {diffusers: original for original, diffusers in pairs}
        assert len(pairs) == len(self._to_diffusers) == len(self._to_original), "not one-to-one"

    def to_original(self, name: str) -> str | None:
        """Original name of a Diffusers tensor; None if the table does not have it."""
        return _rename(self._to_original, name)

    def to_diffusers(self, name: str) -> str | None:
        """Diffusers name of an original tensor; None if the table does not have it."""
        return _rename(self._to_diffusers, name)


def _rename(table: Mapping[str, str], name: str) -> str | None:
    if name in table:
        return table[name]
    parts = name.split(".")
    leaf = f".{parts.pop()}" if parts[-1] in _LEAVES else ""
    stem = ".".join(parts)
    if stem in table:
        return table[stem] + leaf
    for i, part in enumerate(parts):
        if part.isdecimal() and part.isascii():
            template = ".".join((*parts[:i], "{n}", *parts[i + 1 :]))
            if template in table:
                return table[template].replace("{n}", part) + leaf
    return None


def _attention(original: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for leaf in ("q", "k", "v"):
        yield f"{original}.{leaf}", f"{diffusers}.to_{leaf}"
        if leaf != "v":
            yield f"{original}.norm_{leaf}", f"{diffusers}.norm_{leaf}"
    yield f"{original}.o", f"{diffusers}.to_out.0"


def _dit_block(stack: str) -> Iterator[tuple[str, str]]:
    block = f"{stack}.{{n}}"
    yield from _attention(f"{block}.self_attn", f"{block}.attn1")
    yield from _attention(f"{block}.cross_attn", f"{block}.attn2")
    for original, diffusers in (
        ("modulation", "scale_shift_table"),
        ("norm3", "norm2"),  # the affine norm before cross attention; the others hold no tensor
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
        ("cross_attn.k_img", "attn2.add_k_proj"),
        ("cross_attn.v_img", "attn2.add_v_proj"),
        ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ):
        yield f"{block}.{original}", f"{block}.{diffusers}"


DIT = KeyMap(
    (
        ("patch_embedding", "patch_embedding"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
        ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
        ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        *_dit_block("blocks"),
        ("head.modulation", "scale_shift_table"),
        ("head.head", "proj_out"),
        ("vace_patch_embedding", "vace_patch_embedding"),
        *_dit_block("vace_blocks"),
        ("vace_blocks.{n}.before_proj", "vace_blocks.{n}.proj_in"),
        ("vace_blocks.{n}.after_proj", "vace_blocks.{n}.proj_out"),
    )
)

_T5_ATTENTION = "encoder.block.{n}.layer.0.SelfAttention"
_T5_FEED_FORWARD = "encoder.block.{n}.layer.1.DenseReluDense"
TEXT_ENCODER = KeyMap(
    (
        ("token_embedding", "shared"),
        ("blocks.{n}.norm1", "encoder.block.{n}.layer.0.layer_norm"),
        *((f"blocks.{{n}}.attn.{leaf}", f"{_T5_ATTENTION}.{leaf}") for leaf in "qkvo"),
        ("blocks.{n}.pos_embedding.embedding", f"{_T5_ATTENTION}.relative_attention_bias"),
        ("blocks.{n}.norm2", "encoder.block.{n}.layer.1.layer_norm"),
        ("blocks.{n}.ffn.gate.0", f"{_T5_FEED_FORWARD}.wi_0"),
        ("blocks.{n}.ffn.fc1", f"{_T5_FEED_FORWARD}.wi_1"),
        ("blocks.{n}.ffn.fc2", f"{_T5_FEED_FORWARD}.wo"),
        ("norm", "encoder.final_layer_norm"),
    )
)

# As GGUF files call them, after llama.cpp.
TEXT_ENCODER_GGUF = KeyMap(
    (
        ("token_embedding", "token_embd"),
        ("blocks.{n}.norm1", "enc.blk.{n}.attn_norm"),
        *((f"blocks.{{n}}.attn.{leaf}", f"enc.blk.{{n}}.attn_{leaf}") for leaf in "qkvo"),
        ("blocks.{n}.pos_embedding.embedding", "enc.blk.{n}.attn_rel_b"),
        ("blocks.{n}.norm2", "enc.blk.{n}.ffn_norm"),
        ("blocks.{n}.ffn.gate.0", "enc.blk.{n}.ffn_gate"),
        ("blocks.{n}.ffn.fc1", "enc.blk.{n}.ffn_up"),
        ("blocks.{n}.ffn.fc2", "enc.blk.{n}.ffn_down"),
        ("norm", "enc.output_norm"),
    )
)

_CLIP_LAYER = "encoder.layers.{n}"
IMAGE_ENCODER = KeyMap(
    (
        ("cls_embedding", "embeddings.class_embedding"),
        ("pos_embedding", "embeddings.position_embedding.weight"),
        ("patch_embedding", "embeddings.patch_embedding"),
        ("pre_norm", "pre_layrnorm"),
        ("transformer.{n}.norm1", f"{_CLIP_LAYER}.layer_norm1"),
        *((f"transformer.{{n}}.attn.to_{x}", f"{_CLIP_LAYER}.self_attn.{x}_proj") for x in "qkv"),
        ("transformer.{n}.attn.proj", f"{_CLIP_LAYER}.self_attn.out_proj"),
        ("transformer.{n}.norm2", f"{_CLIP_LAYER}.layer_norm2"),
        ("transformer.{n}.mlp.0", f"{_CLIP_LAYER}.mlp.fc1"),
        ("transformer.{n}.mlp.2", f"{_CLIP_LAYER}.mlp.fc2"),
    )
)


def _vae_residual(original: str, diffusers: str) -> Iterator[tuple[str, str]]:
    yield f"{original}.residual.0", f"{diffusers}.norm1"
    yield f"{original}.residual.2", f"{diffusers}.conv1"
    yield f"{original}.residual.3", f"{diffusers}.norm2"
    yield f"{original}.residual.6", f"{diffusers}.conv2"
    yield f"{original}.shortcut", f"{diffusers}.conv_shortcut"


def _vae_resample(original: str, diffusers: str) -> Iterator[tuple[str, str]]:
    yield f"{original}.resample.1", f"{diffusers}.resample.1"
    yield f"{original}.time_conv", f"{diffusers}.time_conv"


def _vae_ends(half: str) -> Iterator[tuple[str, str]]:
    yield f"{half}.conv1", f"{half}.conv_in"
    yield from _vae_residual(f"{half}.middle.0", f"{half}.mid_block.resnets.0")
    for leaf in ("norm", "to_qkv", "proj"):
        yield f"{half}.middle.1.{leaf}", f"{half}.mid_block.attentions.0.{leaf}"
    yield from _vae_residual(f"{half}.middle.2", f"{half}.mid_block.resnets.1")
    yield f"{half}.head.0", f"{half}.norm_out"
    yield f"{half}.head.2", f"{half}.conv_out"


def vae_key_map(stages: int, num_res_blocks: int) -> KeyMap:
    """Names of a VAE whose decoder has ``num_res_blocks + 1`` residual blocks in each stage.

    The original numbers the decoder's blocks and upsamplers in one flat list, Diffusers by stage.

    Args:
        stages: number of resolutions, the length of ``VAEConfig.multipliers``.
        num_res_blocks: ``VAEConfig.num_res_blocks``.
    """

    def pairs() -> Iterator[tuple[str, str]]:
        yield from (("conv1", "quant_conv"), ("conv2", "post_quant_conv"))
        yield from _vae_ends("encoder")
        yield from _vae_residual("encoder.downsamples.{n}", "encoder.down_blocks.{n}")
        yield from _vae_resample("encoder.downsamples.{n}", "encoder.down_blocks.{n}")
        yield from _vae_ends("decoder")
        blocks = num_res_blocks + 1
        for stage in range(stages):
            first = stage * (blocks + 1)
            for j in range(blocks):
                original = f"decoder.upsamples.{first + j}"
                yield from _vae_residual(original, f"decoder.up_blocks.{stage}.resnets.{j}")
            if stage < stages - 1:
                original = f"decoder.upsamples.{first + blocks}"
                yield from _vae_resample(original, f"decoder.up_blocks.{stage}.upsamplers.0")

    return KeyMap(pairs())


# What stands in front of every name that a component's network reads, in some files or all.
PREFIXES = {"image_encoder": ("visual.", "vision_model.")}

# Tensors that the original holds whole and Diffusers in parts: the last part of the name, and its
# parts' in the order in which they lie along the first axis.
CONCATENATED = {"image_encoder": {"to_qkv": ("to_q", "to_k", "to_v")}}

# Axes of size one that lead a tensor of the original and are not there in Diffusers.
LEADING_AXES = {"image_encoder": {"cls_embedding": 2, "pos_embedding": 1}}

# Tensors that a checkpoint may hold twice: the first name is a copy of the second.
TIED = {"text_encoder": {"encoder.embed_tokens.weight": "shared.weight"}}

# Tensors that no network reads, by component: a pattern of the stored name, and why it is there.
IGNORED = {
    "dit": ((r"(vace_)?blocks\.\d+\.attn2\.norm_added_q\.weight", "an unused norm of diffusers"),),
    "text_encoder": ((r"spiece_model", "the tokenizer, in the bytes of a tensor"),),
    "image_encoder": (
        (r"textual\..+|log_scale", "CLIP's other half and its temperature"),
        (r"visual\.(post_norm\.(weight|bias)|head)", "what follows the last layer"),
        (r"(vision_model\.)?post_layernorm\.(weight|bias)", "the same in transformers"),
        (r"visual_projection\.weight", "and its projection"),
        (r"(vision_model\.)?embeddings\.position_ids", "a table of 0, 1, 2, …"),
    ),
}
