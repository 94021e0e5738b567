"""Whole checkpoints in both layouts: small networks that diffusers and transformers saved."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import (
    CLIP_FILE,
    OUR_CLIP,
    OUR_T5,
    OUR_VAE,
    TASKS,
    assert_refused,
    edit_json,
    tensor_bytes,
    write_diffusers,
    write_original,
    write_sparse,
)
from tests.support.users import not_root, public_folder
from wanx.checkpoints.checkpoint import Checkpoint, open_checkpoint
from wanx.config.models import PRESETS
from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.models.dit.model import WanDiT
from wanx.models.image_encoder import ImageEncoder
from wanx.models.text_encoder import UMT5Encoder
from wanx.models.vae import WanVAE


@pytest.fixture(scope="module", params=TASKS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A task, and one checkpoint for it in both layouts."""
    base = tmp_path_factory.mktemp(request.param)
    diffusers = write_diffusers(base / "diffusers", request.param)
    return request.param, diffusers, write_original(base / "original", diffusers, request.param)


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("t2v")
    diffusers = write_diffusers(base / "diffusers", "t2v")
    return {
        "diffusers": diffusers,
        "original": write_original(base / "original", diffusers, "t2v", "safetensors"),
    }


@pytest.fixture(params=["diffusers", "original"])
def copied(request: pytest.FixtureRequest, t2v: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint to damage, in each layout."""
    return Path(shutil.copytree(t2v[request.param], tmp_path / request.param))


@pytest.fixture
def diffusers(t2v: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(t2v["diffusers"], tmp_path / "diffusers"))


@pytest.fixture
def original(t2v: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(t2v["original"], tmp_path / "original"))


def networks(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.nn.Module]]:
    with torch.device("meta"):
        yield "dit", WanDiT(checkpoint.config.dit)
        yield "text_encoder", UMT5Encoder(checkpoint.config.text_encoder)
        yield "vae", WanVAE(checkpoint.config.vae)
        if checkpoint.config.image_encoder is not None:
            yield "image_encoder", ImageEncoder(checkpoint.config.image_encoder)


def test_both_layouts_are_the_same_model(pair: tuple[str, Path, Path]) -> None:
    task, *folders = pair
    first, second = (open_checkpoint(folder) for folder in folders)
    assert (first.layout, second.layout) == ("diffusers", "original")
    assert first.config == second.config
    assert first.config.task == task
    assert first.config.name == "custom"
    assert first.config.dit == TASKS[task][2]
    assert first.config.text_encoder == OUR_T5
    assert first.config.vae == OUR_VAE
    assert first.config.image_encoder == (OUR_CLIP if task in ("i2v", "flf2v") else None)
    bytes_of = tensor_bytes(first)
    assert bytes_of == tensor_bytes(second)
    assert first.nbytes == second.nbytes == sum(map(len, bytes_of.values()))
    assert first.tokenizer.path == folders[0] / "tokenizer" / "tokenizer.json"
    assert second.tokenizer.path == folders[1] / "google" / "umt5-xxl" / "tokenizer.json"


def test_the_tensors_are_those_of_our_networks(pair: tuple[str, Path, Path]) -> None:
    for folder in pair[1:]:
        checkpoint = open_checkpoint(folder)
        assert [component for component, _ in networks(checkpoint)] == list(checkpoint.components)
        for component, network in networks(checkpoint):
            expected = {name: tuple(p.shape) for name, p in network.named_parameters()}
            checkpoint.components[component].check(expected)


def test_defaults_follow_the_task(pair: tuple[str, Path, Path]) -> None:
    config = open_checkpoint(pair[1]).config
    assert config.defaults.shift == (16.0 if pair[0] in ("flf2v", "vace") else 5.0)
    assert config.defaults.negative_prompt.startswith("镜头") == (pair[0] in ("i2v", "flf2v"))


def test_sharded_diffusers_checkpoint(tmp_path: Path, t2v: dict[str, Path]) -> None:
    sharded = open_checkpoint(write_diffusers(tmp_path / "sharded", "t2v", shard="40KB"))
    assert all(len(weights.files) > 1 for weights in sharded.components.values())
    assert tensor_bytes(sharded) == tensor_bytes(open_checkpoint(t2v["diffusers"]))


def test_half_precision_is_read_as_stored(original: Path) -> None:
    path = original / "diffusion_pytorch_model.safetensors"
    save_file({n: t.to(torch.bfloat16) for n, t in load_file(path).items()}, path)
    checkpoint = open_checkpoint(original)
    assert {t.dtype for t in checkpoint.components["dit"].tensors.values()} == {"BF16"}
    assert {t.dtype for t in checkpoint.components["vae"].tensors.values()} == {"F32"}


@pytest.mark.parametrize("preset", ["t2v-1.3B", "t2v-14B", "i2v-14B", "flf2v-14B", "vace-14B"])
def test_published_sizes_get_the_name_of_their_preset(preset: str, tmp_path: Path) -> None:
    """At full size from headers alone: the data sections are holes in sparse files."""
    config = PRESETS[preset]
    parts = {}
    with torch.device("meta"):
        parts["diffusion_pytorch_model"] = WanDiT(config.dit)
        parts["models_t5_umt5-xxl-enc-bf16"] = UMT5Encoder(config.text_encoder)
        parts["Wan2.1_VAE"] = WanVAE(config.vae)
        if config.image_encoder is not None:
            # with the last layer, which is in the file and never read
            parts[CLIP_FILE] = ImageEncoder(
                dataclasses.replace(config.image_encoder, num_layers=33)
            )
    for stem, network in parts.items():
        prefix = "visual." if stem == CLIP_FILE else ""
        shapes = {f"{prefix}{n}": list(p.shape) for n, p in network.named_parameters()}
        for name in shapes.keys() & {"patch_embedding.weight", "vace_patch_embedding.weight"}:
            shapes[name] = [shapes[name][0], shapes[name][1] // 4, 1, 2, 2]
        write_sparse(tmp_path / f"{stem}.safetensors", shapes)
    dit = config.dit
    fields = ("dim", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "eps")
    values = {key: getattr(dit, key) for key in fields} | {"text_len": 512, "model_type": "t2v"}
    if dit.vace_layers:
        values |= {"vace_layers": list(dit.vace_layers), "vace_in_dim": dit.vace_in_dim}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path, task=config.task)
    assert checkpoint.config is config
    unread = "transformer.31."
    parameters = sum(
        p.numel()
        for network in parts.values()
        for name, p in network.named_parameters()
        if not name.startswith(unread)
    )
    assert checkpoint.nbytes == 2 * parameters


def test_tied_copies_and_unused_norms_are_dropped(diffusers: Path) -> None:
    path = diffusers / "text_encoder" / "model.safetensors"
    state = load_file(path)
    expected = tensor_bytes(open_checkpoint(diffusers))
    save_file(state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()}, path)
    assert tensor_bytes(open_checkpoint(diffusers)) == expected
    save_file({("encoder.embed_tokens.weight" if k == "shared.weight" else k): v
               for k, v in state.items()}, path)  # fmt: skip
    assert tensor_bytes(open_checkpoint(diffusers)) == expected
    path = diffusers / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(state | {"blocks.2.attn2.norm_added_q.weight": torch.ones(36)}, path)
    assert tensor_bytes(open_checkpoint(diffusers)) == expected


def test_a_tied_name_of_another_shape_is_not_dropped(diffusers: Path) -> None:
    path = diffusers / "text_encoder" / "model.safetensors"
    save_file(load_file(path) | {"encoder.embed_tokens.weight": torch.ones(2, 24)}, path)
    tensors = open_checkpoint(diffusers).components["text_encoder"].tensors
    assert "encoder.embed_tokens.weight" in tensors


def test_one_tensor_under_two_names(diffusers: Path) -> None:
    path = diffusers / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"blocks.0.norm3.weight": torch.ones(36)}, path)
    assert_refused(CorruptInputError, diffusers, "'blocks.0.norm3.weight' twice", "norm2")


def test_problems_are_told_in_the_names_of_the_files(diffusers: Path) -> None:
    path = diffusers / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["blocks.1.attn1.to_q.bias"], state["blocks.2.norm2.weight"]
    state["blocks.0.attn1.to_k.weight"] = torch.ones(36, 35)
    save_file(state | {"lora": torch.ones(1)}, path)
    checkpoint = open_checkpoint(diffusers)
    component, network = next(networks(checkpoint))
    expected = {name: tuple(p.shape) for name, p in network.named_parameters()}
    with pytest.raises(CorruptInputError) as caught:
        checkpoint.components[component].check(expected)
    for words in (
        "(4 in all)",
        "missing blocks.1.attn1.to_q.bias",
        "missing blocks.2.norm2.weight",
        "unexpected lora",
        "blocks.0.attn1.to_k.weight has shape [36, 35] instead of [36, 36]",
    ):
        assert words in str(caught.value)


def test_sources_that_are_no_checkpoint(tmp_path: Path, t2v: dict[str, Path]) -> None:
    assert_refused(UsageError, tmp_path / "none", "none does not exist", "give the folder")
    assert_refused(UsageError, tmp_path, "holds nothing", "Wan-AI/Wan2.1-*")
    (tmp_path / "movie.mp4").touch()
    assert_refused(UsageError, tmp_path, "holds only movie.mp4")
    assert_refused(UsageError, tmp_path / "movie.mp4", "is a file")
    part = t2v["diffusers"] / "text_encoder"
    assert_refused(UsageError, part, "holds only config.json, model.safetensors")


def test_a_part_of_a_diffusers_checkpoint_is_recognised(t2v: dict[str, Path]) -> None:
    for part in ("transformer", "vae"):
        assert_refused(
            UsageError, t2v["diffusers"] / part, f"{part} is one part of a Diffusers checkpoint"
        )


def test_everything_missing_is_named_at_once(original: Path, diffusers: Path) -> None:
    for name in ("Wan2.1_VAE.safetensors", "models_t5_umt5-xxl-enc-bf16.safetensors"):
        (original / name).unlink()
    shutil.rmtree(original / "google")
    assert_refused(
        CorruptInputError, original, "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth",
        "google/umt5-xxl/tokenizer.json",
    )  # fmt: skip
    (original / "config.json").unlink()
    assert_refused(CorruptInputError, original, "config.json is missing")
    for name in ("model_index.json", "vae/config.json", "tokenizer/tokenizer.json"):
        (diffusers / name).unlink()
    assert_refused(CorruptInputError, diffusers, "model_index.json, vae/config.json, tokenizer/")


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "vae"])
def test_missing_weights_of_a_part(name: str, diffusers: Path) -> None:
    for path in (diffusers / name).glob("*.safetensors"):
        path.unlink()
    assert_refused(CorruptInputError, diffusers, f"{name} holds neither")


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data + b"\0", "padded"),
        (lambda data: b"", "too few"),
    ],
)
def test_damaged_weights(
    number: int, damage: Callable[[bytes], bytes], words: str, copied: Path
) -> None:
    path = weight_files(copied)[number]
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(CorruptInputError, copied, str(path), words)


@pytest.mark.parametrize("text", ["", "[]", '{"dim": NaN}', "{", '{"dim": 1, "dim": 2}', "\xff"])
def test_damaged_configs(text: str, copied: Path) -> None:
    for path in copied.rglob("config.json"):
        path.write_text(text, encoding="latin-1")
    assert_refused(CorruptInputError, copied, "config.json", "JSON")


def test_a_tokenizer_that_git_lfs_left_behind(copied: Path) -> None:
    (path,) = copied.rglob("tokenizer.json")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    assert_refused(CorruptInputError, copied, "tokenizer.json", "git lfs pull")
    path.rename(path.with_name("spiece.model"))
    path.with_name("spiece.model").write_bytes(b"model")
    assert open_checkpoint(copied).tokenizer.path.name == "spiece.model"
    path.with_name("spiece.model").unlink()
    assert_refused(CorruptInputError, copied, "tokenizer.json or")


def test_an_unreadable_folder_is_one_line(copied: Path) -> None:
    with public_folder() as parent:
        folder = shutil.copytree(copied, parent / "copy")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        open_checkpoint(folder)  # imports what another user may not read
        with not_root():
            open_checkpoint(folder)
        folder.chmod(0)
        try:
            with not_root():
                assert_refused(WanxError, folder, "cannot read", str(folder), "ermission")
        finally:
            folder.chmod(0o700)


def test_an_unreadable_file_is_one_line(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert_refused(WanxError, copied, "cannot read", ".safetensors", "permission denied")


def test_the_task_must_be_the_one_asked_for(copied: Path) -> None:
    assert open_checkpoint(copied, task="t2v").config.task == "t2v"
    assert_refused(UsageError, copied, "for t2v, not i2v", task="i2v")


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"patch_size": [1, 1, 1]}, "patch_size = [1, 1, 1]"),
        ("transformer", {"qk_norm": "rms_norm"}, "qk_norm = 'rms_norm'"),
        ("transformer", {"qk_norm": None}, "qk_norm = None"),
        ("transformer", {"cross_attn_norm": False}, "cross_attn_norm = False"),
        ("transformer", {"added_kv_proj_dim": 7}, "added_kv_proj_dim = 7"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ("text_encoder", {"model_type": "t5"}, "model_type = 't5'"),
        ("text_encoder", {"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu'"),
        ("text_encoder", {"dense_act_fn": "silu"}, "dense_act_fn = 'silu'"),
        ("vae", {"is_residual": True}, "is_residual = True"),
        ("vae", {"patch_size": 2}, "patch_size = 2"),
        ("vae", {"attn_scales": [0.5]}, "attn_scales = [0.5]"),
        ("vae", {"in_channels": 12}, "in_channels = 12"),
        ("vae", {"decoder_base_dim": 256}, "decoder_base_dim = 256"),
        ("vae", {"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ("vae", {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "3 latent channels"),
    ],
)
def test_unsupported_values_are_named(
    part: str, changes: dict[str, Any], words: str, diffusers: Path
) -> None:
    edit_json(diffusers / part / "config.json", **changes)
    assert_refused(UsageError, diffusers, f"{part}/config.json", words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "ti2v"}, "model_type = 'ti2v'"),
        ({"_class_name": "WanModel_S2V"}, "WanModel_S2V"),
        ({"patch_size": [2, 2, 2]}, "patch_size"),
        ({"qk_norm": False}, "qk_norm"),
        ({"cross_attn_norm": False}, "cross_attn_norm"),
        ({"window_size": [4, 4]}, "window_size"),
    ],
)
def test_unsupported_values_of_the_original(
    changes: dict[str, Any], words: str, original: Path
) -> None:
    edit_json(original / "config.json", **changes)
    assert_refused(UsageError, original, "config.json", words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "transformer_2"),
        ({"expand_timesteps": True}, "expand_timesteps"),
    ],
)
def test_wan22_is_refused(changes: dict[str, Any], words: str, diffusers: Path) -> None:
    edit_json(diffusers / "model_index.json", **changes)
    assert_refused(UsageError, diffusers, "model_index.json", words, "Wan2.1")


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"num_layers": 4}, "num_layers 4 but the tensors have num_layers 3"),
        ("transformer", {"attention_head_dim": 10}, "dim 30 but the tensors have dim 36"),
        ("transformer", {"ffn_dim": 49, "text_dim": 25}, "ffn_dim 49, text_dim 25"),
        ("transformer", {"in_channels": 32}, "in_dim 32"),
        ("transformer", {"freq_dim": 16}, "freq_dim 16"),
        ("transformer", {"out_channels": 8}, "out_dim 8"),
        ("transformer", {"num_attention_heads": "3"}, "num_attention_heads = '3'"),
        ("transformer", {"num_attention_heads": True}, "num_attention_heads = True"),
        ("transformer", {"num_attention_heads": 0}, "num_attention_heads = 0"),
        ("transformer", {"num_attention_heads": 1 << 60}, "num_attention_heads"),
        ("transformer", {"num_attention_heads": ...}, "num_attention_heads = None"),
        ("transformer", {"num_attention_heads": 9, "attention_head_dim": 4}, None),
        ("transformer", {"num_attention_heads": 4, "attention_head_dim": 9}, "4 heads"),
        ("transformer", {"eps": 0}, "eps = 0"),
        ("transformer", {"eps": 1e400}, "JSON"),
        ("text_encoder", {"vocab_size": 51}, "vocab_size 51"),
        ("text_encoder", {"d_model": 25}, "dim 25"),
        ("text_encoder", {"num_heads": 2}, "num_heads 2"),
        ("text_encoder", {"d_kv": 12}, "head_dim 12"),
        ("text_encoder", {"num_layers": 1}, "num_layers 1"),
        ("text_encoder", {"relative_attention_num_buckets": 32}, "num_buckets 32"),
        ("text_encoder", {"relative_attention_max_distance": -1}, "max_distance = -1"),
        ("vae", {"base_dim": 8, "decoder_base_dim": None}, "base_dim 8"),
        ("vae", {"z_dim": 8}, "z_dim 8"),
        ("vae", {"dim_mult": [1, 3, 4]}, "multipliers (1, 3, 4)"),
        ("vae", {"temperal_downsample": [False, False]}, "temporal_downsample"),
        ("vae", {"temperal_downsample": [1, 0]}, "temperal_downsample"),
        ("vae", {"dim_mult": 3}, "dim_mult = 3"),
        ("vae", {"latents_mean": ["0"] * 16}, "latents_mean"),
        ("vae", {"latents_mean": [10**400] * 16}, "401 digits"),
        ("vae", {"latents_std": [0.0] * 16}, "not positive"),
    ],
)
def test_configs_must_be_sound_and_fit_the_tensors(
    part: str, changes: dict[str, Any], words: str | None, diffusers: Path
) -> None:
    edit_json(diffusers / part / "config.json", **changes)
    if words is None:
        assert open_checkpoint(diffusers).config.dit.num_heads == 9
    else:
        assert_refused(CorruptInputError, diffusers, f"{part}/config.json", words)


@pytest.mark.parametrize("layers", [[0], [2, 0], [0, 0], [0, 3], [1, 2], [], [0, -1], ["0"], 0])
def test_vace_layers_must_fit(layers: Any, tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "vace", "vace")
    edit_json(folder / "transformer" / "config.json", vace_layers=layers)
    assert_refused(CorruptInputError, folder, "vace_layers")


def test_vace_layers_default_to_every_second_block(tmp_path: Path) -> None:
    source = write_diffusers(tmp_path / "diffusers", "vace")
    folder = write_original(tmp_path / "original", source, "vace")
    edit_json(folder / "config.json", vace_layers=..., vace_in_dim=...)
    dit = open_checkpoint(folder).config.dit
    assert (dit.vace_layers, dit.vace_in_dim) == ((0, 2), 40)


@pytest.mark.parametrize(
    ("file", "name", "tensor", "words"),
    [
        ("diffusion_pytorch_model", "patch_embedding.weight", None, "lack patch_emb"),
        ("diffusion_pytorch_model", "head.head.weight", torch.ones(64), "2 positive sides"),
        ("diffusion_pytorch_model", "patch_embedding.weight", torch.ones(36, 16, 1, 4, 1), "patch"),
        ("Wan2.1_VAE", "conv2.weight", torch.ones(0, 16, 1, 1, 1), "positive sides"),
        ("Wan2.1_VAE", "encoder.downsamples.1.resample.1.weight", None, "residual.2.weight"),
        ("Wan2.1_VAE", "conv2.weight", torch.ones(8, 8, 1, 1, 1), "latent channels"),
        ("models_t5_umt5-xxl-enc-bf16", "token_embedding.weight", torch.ones(50, 22), "22"),
        ("models_t5_umt5-xxl-enc-bf16", "blocks.0.attn.q.weight", None, "lack blocks.0.attn.q"),
    ],
)
def test_tensors_that_tell_sizes(
    file: str, name: str, tensor: torch.Tensor | None, words: str, original: Path
) -> None:
    path = original / f"{file}.safetensors"
    state = load_file(path)
    state.pop(name)
    save_file(state | ({} if tensor is None else {name: tensor}), path)
    with pytest.raises(WanxError, match=words) as caught:
        open_checkpoint(original)
    assert caught.value.exit_code in (2, 5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [36, 48])
def test_more_input_channels_than_wan21_has(channels: int, original: Path) -> None:
    path = original / "diffusion_pytorch_model.safetensors"
    wide = {"patch_embedding.weight": torch.ones(36, channels, 1, 2, 2)}
    save_file(load_file(path) | wide, path)
    edit_json(original / "config.json", in_dim=channels)
    assert_refused(UsageError, original, f"{channels} input channels for task t2v", "only 16")


def test_a_stray_block_number_makes_no_giant_network(original: Path) -> None:
    path = original / "models_t5_umt5-xxl-enc-bf16.safetensors"
    state = load_file(path)
    save_file(state | {"blocks.999999999.norm1.weight": torch.ones(24)}, path)
    assert open_checkpoint(original).config.text_encoder.num_layers == 3


@pytest.mark.parametrize("told", ["i2v", "flf2v", "t2v"])
def test_the_tensors_tell_the_task(told: str, tmp_path: Path) -> None:
    """Some releases of FLF2V call themselves i2v."""
    source = write_diffusers(tmp_path / "diffusers", "flf2v")
    folder = write_original(tmp_path / "original", source, "flf2v")
    edit_json(folder / "config.json", model_type=told)
    assert open_checkpoint(folder, task="flf2v").config.task == "flf2v"
    assert_refused(UsageError, folder, "for flf2v, not i2v", task="i2v")


def test_parts_of_different_models(original: Path) -> None:
    path = original / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"text_embedding.0.weight": torch.ones(36, 23)}, path)
    assert_refused(CorruptInputError, original, "23 text features", "24")
