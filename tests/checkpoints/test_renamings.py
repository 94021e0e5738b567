"""Checkpoints that fit after a systematic change of names: the message says which, and it works."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import assert_refused, write_diffusers, write_original
from wanx.checkpoints.checkpoint import open_checkpoint
from wanx.checkpoints.renamings import tensor_renaming
from wanx.errors import CorruptInputError
from wanx.exporter.export import check

DIT = "diffusion_pytorch_model"
T5 = "models_t5_umt5-xxl-enc-bf16"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("t2v")
    diffusers = write_diffusers(base / "diffusers", "t2v")
    original = write_original(base / "original", diffusers, "t2v", "safetensors")
    return {"diffusers": diffusers, "original": original}


@pytest.fixture
def copied(written: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda layout: Path(shutil.copytree(written[layout], tmp_path / layout))


def rename_tensors(path: Path, rename: Callable[[str], str]) -> None:
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "prefix",
    ["model.diffusion_model.", "module.", "_orig_mod.", "_orig_mod.module.", "wan_1_3b."],
)
@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("original", f"{DIT}.safetensors"),
        ("original", f"{T5}.safetensors"),
        ("original", "Wan2.1_VAE.safetensors"),
        ("diffusers", f"transformer/{DIT}.safetensors"),
        ("diffusers", "text_encoder/model.safetensors"),
        ("diffusers", f"vae/{DIT}.safetensors"),
    ],
)
def test_prefixes(layout: str, file: str, prefix: str, copied: Callable[[str], Path]) -> None:
    folder = copied(layout)
    rename_tensors(folder / file, lambda name: prefix + name)
    assert_refused(CorruptInputError, folder, f"{prefix!r} removed from the start of its names")
    rename_tensors(folder / file, lambda name: name.removeprefix(prefix))
    check(open_checkpoint(folder))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("inner", ["_orig_mod", "module"])
@pytest.mark.parametrize("after", [r"blocks\.\d+", r"blocks\.\d+\.\w*attn\w*"])
def test_wrapped_blocks(layout: str, inner: str, after: str, copied: Callable[[str], Path]) -> None:
    folder = copied(layout)
    path = folder / ("transformer" if layout == "diffusers" else "") / f"{DIT}.safetensors"
    rename_tensors(path, lambda name: re.sub(rf"^({after})\.", rf"\1.{inner}.", name))
    with pytest.raises(CorruptInputError, match=f"'{inner}.' removed from its names"):
        check(open_checkpoint(folder))


def test_diffusers_names_in_the_original_layout(
    copied: Callable[[str], Path], written: dict[str, Path]
) -> None:
    folder = copied("original")
    shutil.copy(
        written["diffusers"] / "text_encoder" / "model.safetensors", folder / f"{T5}.safetensors"
    )
    assert_refused(CorruptInputError, folder, "its names are those of Diffusers")


def test_an_incomplete_checkpoint_is_still_called_so(copied: Callable[[str], Path]) -> None:
    """The end of another tensor's name is no sign of a prefix."""
    folder = copied("original")
    path = folder / "Wan2.1_VAE.safetensors"
    tensors = load_file(path)
    del tensors["conv1.weight"], tensors["conv2.weight"]
    assert "decoder.conv1.weight" in tensors
    save_file(tensors, path)
    assert_refused(CorruptInputError, folder, "use a complete Wan2.1 checkpoint")
    assert tensor_renaming("vae", ["conv1.weight"], ["decoder.conv1.weight", "other"]) is None


def as_pickle(source: Path, target: Path) -> None:
    tensors: dict[str, Tensor] = load_file(source)
    torch.save(tensors, target)
    source.unlink()


@pytest.mark.parametrize(
    ("layout", "folder", "stem"),
    [
        ("original", "", DIT),
        ("original", "", T5),
        ("original", "", "Wan2.1_VAE"),
        ("diffusers", "transformer", DIT),
        ("diffusers", "text_encoder", "model"),
        ("diffusers", "vae", DIT),
    ],
)
@pytest.mark.parametrize("name", ["{}.non_ema.safetensors", "{}.fp32.safetensors", "{}.bin"])
def test_the_name_that_the_message_gives_works(
    layout: str, folder: str, stem: str, name: str, copied: Callable[[str], Path]
) -> None:
    source = copied(layout)
    before = source / folder / f"{stem}.safetensors"
    variant = source / folder / name.format(stem)
    if variant.suffix == ".bin":
        as_pickle(before, variant)
    else:
        before.rename(variant)
    with pytest.raises(CorruptInputError) as caught:
        open_checkpoint(source)
    match = re.search(r"; rename (\S+) to (\S+)$", str(caught.value))
    assert match, caught.value
    assert match[1] == variant.name
    variant.rename(variant.with_name(match[2]))
    open_checkpoint(source)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model.int8-00001-of-00002.safetensors"], "without '.int8'"),
        (["model.safetensors.index.int8.json"], "to model.safetensors.index.json"),
        (["model.int8.safetensors.index.json"], "to model.safetensors.index.json"),
        (["pytorch_model.bin"], "rename pytorch_model.bin to model.pth"),
        (["pytorch_model-00001-of-00002.bin"], "as model.safetensors"),
        (["model.int8.bin"], "to model.pth"),
    ],
)
def test_other_variants(names: list[str], words: str, copied: Callable[[str], Path]) -> None:
    folder = copied("diffusers")
    (folder / "text_encoder" / "model.safetensors").unlink()
    for name in names:
        (folder / "text_encoder" / name).write_bytes(b"")
    assert_refused(CorruptInputError, folder, words)
