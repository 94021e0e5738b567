"""The same weights from every layout and type of checkpoint, and from a bundle itself."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

import wanx.exporter.export as exporter
from tests.support.components import run_dit, run_image_encoder, run_vae_decoder
from tests.support.layouts import assert_same_weights, graph_files, stored_tensors, write_original
from tests.support.peers import image_features, relative_error
from wanx.bundle.reader import Bundle
from wanx.exporter.options import ExportOptions


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_original_layout(
    precision: str,
    peer: WanPipeline,
    bundles: Callable[[str], Bundle],
    export_quickly: Callable[..., Bundle],
    tmp_path: Path,
) -> None:
    source = write_original(peer, tmp_path / "original")
    bundle = export_quickly(source, tmp_path / "bundle", precision=precision)
    assert bundle.manifest.provenance.source_layout == "original"
    assert bundle.manifest.config == bundles(precision).manifest.config
    assert_same_weights(stored_tensors(bundle), stored_tensors(bundles(precision)))


@pytest.mark.parametrize(
    ("task", "suffix"), [("i2v", "pth"), ("flf2v", "safetensors"), ("vace", "pth")]
)
def test_original_layout_of_other_tasks(
    task: str,
    suffix: str,
    peer_of: Callable[[str], Any],
    bundle_of: Callable[[str, str], Bundle],
    export_quickly: Callable[..., Bundle],
    tmp_path: Path,
) -> None:
    source = write_original(peer_of(task), tmp_path / "original", task, suffix)
    bundle, expected = export_quickly(source, tmp_path / "bundle"), bundle_of(task, "fp32")
    assert bundle.manifest.provenance.source_layout == "original"
    assert bundle.manifest.config == expected.manifest.config
    assert bundle.manifest.task == task
    assert_same_weights(stored_tensors(bundle), stored_tensors(expected))
    assert set(graph_files(bundle)) == set(graph_files(expected))


@pytest.mark.parametrize("task", ["i2v", "flf2v", "vace"])
def test_exporting_a_bundle_of_another_task_again(
    task: str,
    bundle_of: Callable[[str, str], Bundle],
    export_quickly: Callable[..., Bundle],
    tmp_path: Path,
) -> None:
    bundle = bundle_of(task, "fp32")
    again = export_quickly(bundle.root, tmp_path / "again", task=task)
    assert again.manifest.files == bundle.manifest.files
    assert again.manifest.components == bundle.manifest.components
    assert again.manifest.config == bundle.manifest.config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_image_encoder_keeps_its_type(
    dtype: torch.dtype,
    checkpoint_of: Callable[[str], Path],
    peer_of: Callable[[str], Any],
    export_quickly: Callable[..., Bundle],
    tmp_path: Path,
) -> None:
    """Sharded here, so that q, k and v of a layer can lie in different files."""
    source = shutil.copytree(checkpoint_of("i2v"), tmp_path / "narrow")
    encoder = copy.deepcopy(peer_of("i2v").image_encoder).to(dtype)
    shutil.rmtree(source / "image_encoder")
    encoder.save_pretrained(source / "image_encoder", max_shard_size="12KB")
    assert len(list((source / "image_encoder").glob("*.safetensors"))) > 3
    bundle = export_quickly(source, tmp_path / "bundle", precision="fp32")
    name = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert set(bundle.manifest.components["image_encoder"].storage) == {name}
    pixels = np.random.default_rng(0).standard_normal((1, 3, 28, 28), dtype=np.float32)
    expected = image_features(encoder.float(), torch.from_numpy(pixels))
    assert relative_error(run_image_encoder(bundle, pixels), expected) <= 1e-5


def test_sharded_diffusers_layout(
    checkpoint: Path,
    peer: WanPipeline,
    bundle_fp32: Bundle,
    export_quickly: Callable[..., Bundle],
    tmp_path: Path,
) -> None:
    source = tmp_path / "sharded"
    shutil.copytree(checkpoint, source)
    shutil.rmtree(source / "transformer")
    peer.transformer.save_pretrained(source / "transformer", max_shard_size="200KB")
    assert len(list((source / "transformer").glob("*.safetensors"))) > 2
    bundle = export_quickly(source, tmp_path / "bundle", precision="fp32")
    assert_same_weights(stored_tensors(bundle), stored_tensors(bundle_fp32))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_checkpoint_keeps_its_bytes(
    precision: str,
    checkpoint: Path,
    bundles: Callable[[str], Bundle],
    export_quickly: Callable[..., Bundle],
    tmp_path: Path,
) -> None:
    """``auto`` stores what the checkpoint stores; fp32 widens it without changing a value."""
    source = tmp_path / "narrow"
    shutil.copytree(checkpoint, source)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for folder in ("transformer", "text_encoder"):
        (path,) = (source / folder).glob("*.safetensors")
        narrow = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        save_file(narrow, path, metadata={"format": "pt"})
    kept = export_quickly(source, tmp_path / "kept")
    assert kept.manifest.precision == precision
    narrow_weights = stored_tensors(bundles(precision))
    assert_same_weights(stored_tensors(kept), narrow_weights)
    widened = export_quickly(source, tmp_path / "wide", precision="fp32")
    assert_same_weights(stored_tensors(widened), {n: t.float() for n, t in narrow_weights.items()})


def test_a_checkpoint_of_mixed_types(
    checkpoint: Path, peer: WanPipeline, export_quickly: Callable[..., Bundle], tmp_path: Path
) -> None:
    """Each tensor keeps its type, whatever its neighbours have, and the VAE always does."""
    source = shutil.copytree(checkpoint, tmp_path / "mixed")
    parts = {name: copy.deepcopy(getattr(peer, name)) for name in ("transformer", "vae")}
    for name, module in parts.items():
        (path,) = (source / name).glob("*.safetensors")
        tensors = load_file(path)
        for key, parameter in module.named_parameters():
            if parameter.ndim > 1:
                tensors[key] = tensors[key].to(torch.bfloat16)
                parameter.copy_(tensors[key])
        save_file(tensors, path, metadata={"format": "pt"})
    bundle = export_quickly(source, tmp_path / "bundle")
    components = bundle.manifest.components
    assert all(
        set(components[c].storage) == {"BF16", "F32"} for c in ("dit", "vae_decoder_up_rest")
    )
    assert set(components["text_encoder"].storage) == {"F32"}
    assert bundle.manifest.precision == "bf16"

    generator = np.random.default_rng(0)
    x = generator.standard_normal((16, 2, 4, 6), dtype=np.float32)
    context = generator.standard_normal((1, 512, 40), dtype=np.float32)
    velocity = parts["transformer"](
        torch.from_numpy(x[None]), torch.tensor([500.0]), torch.from_numpy(context)
    ).sample[0]
    assert relative_error(run_dit(bundle, x, 500.0, context), velocity) <= 1e-5
    mean, std = (
        torch.tensor(parts["vae"].config[key]).view(1, -1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    video = parts["vae"].decode(torch.from_numpy(x[None]) * std + mean).sample[0]
    assert relative_error(run_vae_decoder(bundle, x), video) <= 1e-5


def test_exporting_a_bundle_again(bundle_fp32: Bundle, tmp_path: Path) -> None:
    """A bundle is a checkpoint too; a second trace gives the same graphs to the byte."""
    again = exporter.export(ExportOptions(source=bundle_fp32.root, output=tmp_path / "again"))
    assert again.manifest.provenance.source_layout == "bundle"
    assert again.manifest.files == bundle_fp32.manifest.files
    assert again.manifest.components == bundle_fp32.manifest.components
    assert again.manifest.config == bundle_fp32.manifest.config
    assert again.manifest.precision == bundle_fp32.manifest.precision


def test_converting_a_bundle(
    bundle_fp32: Bundle,
    bundles: Callable[[str], Bundle],
    export_quickly: Callable[..., Bundle],
    tmp_path: Path,
) -> None:
    """A bundle in fp32 can become one in bf16, equal to the one from the checkpoint."""
    bundle = export_quickly(bundle_fp32.root, tmp_path / "bf16", precision="bf16")
    assert_same_weights(stored_tensors(bundle), stored_tensors(bundles("bf16")))


def test_graphs_depend_on_the_architecture_alone(
    bundle_fp32: Bundle, peer: WanPipeline, export_quickly: Callable[..., Bundle], tmp_path: Path
) -> None:
    """Other weights of the same sizes have the same graphs, so that engines can be shared."""
    source = tmp_path / "other"
    write_original(peer, source)
    path = source / "Wan2.1_VAE.pth"
    torch.save({n: t * 1.5 for n, t in torch.load(path).items()}, path)
    bundle = export_quickly(source, tmp_path / "bundle", precision="fp32")
    weights = "weights/vae.safetensors"
    assert bundle.manifest.files[weights] != bundle_fp32.manifest.files[weights]
    assert set(graph_files(bundle)) == set(graph_files(bundle_fp32))


def test_progress(checkpoint: Path, export_quickly: Callable[..., Bundle], tmp_path: Path) -> None:
    """Each stage counts up to its total."""
    told: dict[str, list[tuple[int, int, str]]] = {}

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        told.setdefault(stage, []).append((done, total, unit))

    bundle = export_quickly(checkpoint, tmp_path / "bundle", progress=progress)
    stages = {"write dit", "write text_encoder", "write vae", "trace graphs", "golden steps"}
    assert set(told) == stages
    for stage, steps in told.items():
        assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
        done, total, unit = steps[-1]
        assert done == total
        if unit == "bytes":
            weights = load_file(bundle.root / "weights" / f"{stage.split()[1]}.safetensors")
            assert total == sum(tensor.nbytes for tensor in weights.values())
