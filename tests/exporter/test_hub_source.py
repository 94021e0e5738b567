"""Exports from the hub: the same bundles as from a folder, and of a plan only the headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import wanx
from tests.support.hub_server import COMMIT, Hub
from tests.support.layouts import assert_same_weights, stored_tensors, write_original
from tools.repackage import tensors_of, write_dit, write_others
from wanx.builtin import builtin_bundle
from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.exporter.source import open_source

NAME = "owner/name"


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as little at once of the small files here as of large ones."""
    monkeypatch.setattr("wanx.hub.remote_file._BUFFER", 4096)


def quick(source: str | None, output: Path | None = None, **options: Any) -> Any:
    """Options of an export that records nothing."""
    from wanx.exporter.calibration.options import CalibrationOptions

    return {
        "source": source, "output": output, "calibration": CalibrationOptions(golden_steps=0),
    } | options  # fmt: skip


@pytest.fixture(scope="module")
def layouts(
    peer_of: Callable[[str], Any], checkpoint_of: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:  # fmt: skip
    base = tmp_path_factory.mktemp("layouts")
    return {
        "diffusers": checkpoint_of("i2v"),
        "original": write_original(peer_of("i2v"), base / "original", "i2v"),
    }


# What a repository has beside a checkpoint, and no export reads.
BESIDE = ("README.md", "assets/logo.png", "examples/a.mp4", "flax_model.msgpack", "LICENSE.txt")


def publish(hub: Hub, folder: Path, *more: str) -> None:
    repo = hub.add_folder(NAME, folder)
    repo.files |= dict.fromkeys((*BESIDE, *more), b"x" * 9000)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_checkpoint_from_the_hub(
    layout: str, layouts: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    duplicates = {
        "diffusers": ("transformer/diffusion_pytorch_model.pth", "vae/model.bin", "unet/x.bin"),
        "original": ("diffusion_pytorch_model.pth", "xlm-roberta-large/sentencepiece.bpe.model"),
    }
    publish(hub, layouts[layout], *duplicates[layout])
    planned = wanx.plan_export(**quick(NAME))
    assert planned.hub is not None
    whole = sum(len(data) for data in hub.repos[NAME].files.values())
    assert sum(hub.sent.values()) < 0.2 * planned.hub.nbytes
    assert 0.5 * whole < planned.hub.missing_bytes == planned.hub.nbytes < whole
    assert not list((tmp_path / "hub").rglob("*.safetensors"))

    bundle = wanx.export(**quick(NAME, tmp_path / "bundle"))
    assert not hub.fetched() & {*BESIDE, *duplicates[layout]}
    local = wanx.export(**quick(str(layouts[layout]), tmp_path / "local"))
    assert_same_weights(stored_tensors(bundle), stored_tensors(local))
    assert bundle.manifest.provenance.source == f"{NAME}@{COMMIT}"
    weights = wanx.plan_export(**quick(NAME)).estimate.weight_bytes
    assert planned.estimate.weight_bytes == weights
    hub.sent.clear()
    wanx.export(**quick(f"hf://{NAME}@{COMMIT}", tmp_path / "again"))
    assert not hub.sent


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_copies_in_fewer_bits(
    precision: str, checkpoint_of: Callable[[str], Path], hub: Hub, tmp_path: Path
) -> None:
    """The copy in bf16 is taken, unless fp32 is asked for, on the hub and from a folder."""
    folder = Path(shutil.copytree(checkpoint_of("t2v"), tmp_path / "checkpoint"))
    for part in ("transformer", "text_encoder"):
        (whole,) = (folder / part).glob("*.safetensors")
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(whole).items()}
        save_file(tensors, whole.with_suffix(".bf16.safetensors"))
    publish(hub, folder)
    bundles = [
        wanx.export(**quick(source, tmp_path / f"b{number}", precision=precision))
        for number, source in enumerate((NAME, str(folder)))
    ]
    assert_same_weights(*map(stored_tensors, bundles))
    taken = [name for name in hub.fetched() if name.startswith("transformer/diff")]
    variant = "" if precision == "fp32" else ".bf16"
    assert taken == [f"transformer/diffusion_pytorch_model{variant}.safetensors"]
    assert bundles[0].manifest.precision == ("fp32" if precision == "fp32" else "bf16")


@pytest.mark.parametrize("form", ["plain", "fp8_scaled", "fp8_scaled_new", "Q8_0"])
def test_parts_and_loras_from_the_hub(form: str, hub: Hub, tmp_path: Path) -> None:
    """Single files in every format, whose headers are enough for a plan."""
    folder, checkpoint = tmp_path / "files", open_source("tiny")
    tensors = tensors_of(checkpoint.components["dit"])
    dit = write_dit(tensors, folder / "diffusion_models", "tiny", form)
    list(write_others(checkpoint, folder))
    shape = tensors["blocks.0.ffn.0.weight"].shape
    lora = {
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.ones(shape[0], 2),
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.ones(2, shape[1]),
        "diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(0.5),
    }
    save_file(lora, folder / "lora.safetensors")
    hub.add_folder(NAME, folder)
    files = {path.stem: path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    tokenizer = str(checkpoint.tokenizer.path)

    def options(root: str) -> dict[str, Any]:
        parts = {
            "dit": f"{root}/{dit.relative_to(folder).as_posix()}",
            "vae": f"{root}/{next(f for f in files.values() if f.startswith('vae/'))}",
            "text_encoder": f"{root}/{next(f for f in files.values() if f.startswith('text'))}",
        }
        return quick(
            None, parts=wanx.PartPaths(**parts, tokenizer=tokenizer),
            loras=[f"{root}/lora.safetensors:0.5"],
        )  # fmt: skip

    remote, local = options(f"hf://{NAME}"), options(str(folder))
    planned = wanx.plan_export(**remote)
    assert planned.estimate == wanx.plan_export(**local).estimate
    assert hub.sent["lora.safetensors"] == len(hub.repos[NAME].files["lora.safetensors"])
    first, second = (
        wanx.export(**given | {"output": tmp_path / f"b{number}"})
        for number, given in enumerate((remote, local))
    )
    assert_same_weights(stored_tensors(first), stored_tensors(second))
    assert first.manifest.provenance.loras == second.manifest.provenance.loras


def test_parts_that_are_given_are_not_downloaded(
    checkpoint_of: Callable[[str], Path], hub: Hub, tmp_path: Path
) -> None:
    folder = checkpoint_of("t2v")
    publish(hub, folder)
    wanx.export(
        **quick(NAME, tmp_path / "b", parts=wanx.PartPaths(text_encoder=folder / "text_encoder"))
    )
    assert not [name for name in hub.fetched() if name.startswith("text_encoder/")]
    assert [name for name in hub.fetched() if name.startswith("tokenizer/")]


def test_a_bundle_as_the_source(hub: Hub, tmp_path: Path) -> None:
    hub.add_folder(NAME, builtin_bundle())
    bundle = wanx.export(**quick(NAME, tmp_path / "b"))
    assert_same_weights(stored_tensors(bundle), stored_tensors(wanx.inspect("tiny")))


@pytest.mark.fault("repository without a checkpoint")
def test_repositories_of_other_things(hub: Hub, tmp_path: Path) -> None:
    single = "split_files/diffusion_models/wan.safetensors"
    cases = {
        "owner/files": ({single: b"x"}, f"give the one that is meant: --dit hf://owner/files/{single}"),
        "owner/nothing": ({"README.md": b"x"}, "owner/nothing holds no checkpoint of Wan2.1"),
    }  # fmt: skip
    from tests.support.hub_server import Repo

    for name, (content, words) in cases.items():
        hub.repos[name] = Repo(files=content)
        with pytest.raises(UsageError) as caught:
            wanx.plan_export(name)
        assert words in str(caught.value)
    with pytest.raises(UsageError, match=r"owner/files has no file x\.gguf; it has split"):
        wanx.plan_export(parts=wanx.PartPaths(dit="hf://owner/files/x.gguf"))
    with pytest.raises(UsageError, match="--revision v1 is of a source on the hub"):
        wanx.plan_export("tiny", revision="v1")
    with pytest.raises(UsageError, match="name two revisions"):
        wanx.plan_export("owner/files@v1", revision="v2")


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_what_is_wrong_is_said_before_the_download(
    layout: str, layouts: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    publish(hub, layouts[layout])
    files = hub.repos[NAME].files
    missing = next(name for name in files if "clip" in name or name.startswith("image_encoder/m"))
    data = files.pop(missing)
    with pytest.raises(CorruptInputError, match=r"lacks|holds neither"):
        wanx.export(**quick(NAME, tmp_path / "b"))
    files[missing] = data
    with pytest.raises(UsageError, match="is a checkpoint for i2v, not t2v"):
        wanx.export(**quick(NAME, tmp_path / "b", task="t2v"))
    assert not list((tmp_path / "hub").rglob("*.safetensors"))
    assert sum(hub.sent.values()) < 0.2 * sum(map(len, files.values()))


@pytest.mark.fault("disk too small for a download")
def test_the_disk_is_checked_before_the_download(
    checkpoint_of: Callable[[str], Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, checkpoint_of("t2v"))
    monkeypatch.setattr("wanx.hub.download._RESERVE", 1 << 60)
    with pytest.raises(WanxError, match=r"owner/name brings .* and .* beside them, and the disk"):
        wanx.export(**quick(NAME, tmp_path / "b"))
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


@pytest.mark.parametrize("named", ["file", "folder", "repository"])
def test_what_lies_beside_a_lora_is_read(named: str, hub: Hub, tmp_path: Path) -> None:
    """PEFT's config has the alpha, without which the factor would be another."""
    folder = tmp_path / "lora" / "style"
    folder.mkdir(parents=True)
    shape = tensors_of(open_source("tiny").components["dit"])["blocks.0.ffn.0.weight"].shape
    layer = "base_model.model.blocks.0.ffn.0"
    lora = {f"{layer}.lora_A.weight": torch.ones(2, shape[1])}
    save_file(lora | {f"{layer}.lora_B.weight": torch.ones(shape[0], 2)},
              folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 32}))
    hub.add_folder(NAME, tmp_path / "lora")
    names = {"file": "/style/adapter_model.safetensors", "folder": "/style", "repository": ""}
    remote = wanx.export(**quick("tiny", tmp_path / "a", loras=[f"hf://{NAME}{names[named]}"]))
    local = wanx.export(**quick("tiny", tmp_path / "b", loras=[str(folder)]))
    assert_same_weights(stored_tensors(remote), stored_tensors(local))


def test_parts_of_several_files(
    checkpoint_of: Callable[[str], Path], hub: Hub, tmp_path: Path
) -> None:
    """A folder of a part, and a transformer whose config lies beside it."""
    folder = checkpoint_of("t2v")
    publish(hub, folder)
    parts = {
        "dit": f"hf://{NAME}/transformer/diffusion_pytorch_model.safetensors",
        "text_encoder": f"hf://{NAME}/text_encoder",
        "vae": f"hf://{NAME}/vae",
        "tokenizer": f"hf://{NAME}/tokenizer",
    }
    made = wanx.export(**quick(None, tmp_path / "a", parts=wanx.PartPaths(**parts)))
    whole = wanx.export(**quick(str(folder), tmp_path / "b"))
    assert_same_weights(stored_tensors(made), stored_tensors(whole))
    assert made.manifest.config == whole.manifest.config


def test_what_stands_in_the_way_is_said_before_the_download(
    checkpoint_of: Callable[[str], Path], hub: Hub, tmp_path: Path
) -> None:
    publish(hub, checkpoint_of("t2v"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(UsageError, match="exists and is not a wanx bundle"):
        wanx.export(**quick(NAME, tmp_path / "out"))
    del hub.repos[NAME].files["vae/config.json"]
    with pytest.raises(CorruptInputError) as caught:
        wanx.export(**quick(NAME, tmp_path / "b"))
    assert str(caught.value) == (
        "hf://owner/name lacks vae/config.json; use a repository that is complete"
    )
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_shards_beside_a_whole_file(layouts: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    """Only one of the two copies comes."""
    publish(hub, layouts["original"], "diffusion_pytorch_model.safetensors")
    wanx.export(**quick(NAME, tmp_path / "b"))
    assert "diffusion_pytorch_model.safetensors" not in hub.fetched()
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    (snapshot / "diffusion_pytorch_model.safetensors").touch()
    wanx.plan_export(**quick(NAME))


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.fault("repository without a checkpoint")
def test_pickles_alone(layout: str, layouts: dict[str, Path], hub: Hub) -> None:
    publish(hub, layouts[layout])
    files = hub.repos[NAME].files
    for name in [n for n in files if n.endswith((".safetensors", ".pth", ".index.json"))]:
        files[name.partition(".")[0] + ".bin"] = files.pop(name)
    with pytest.raises(UsageError, match=r"has its transformer in .*\.bin.* alone"):
        wanx.plan_export(**quick(NAME))


def test_the_manifest_of_another_program(
    checkpoint_of: Callable[[str], Path], hub: Hub, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint_of("t2v"), tmp_path / "checkpoint"))
    (folder / "manifest.json").write_text('{"name": "an extension"}')
    publish(hub, folder)
    for source in (NAME, str(folder)):
        assert wanx.plan_export(**quick(source)).resolved.checkpoint.layout == "diffusers"


def test_headers_that_cannot_be_stored(
    checkpoint_of: Callable[[str], Path], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, checkpoint_of("t2v"))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wanx.exporter.hub_source.sparse_copy", full)
    with pytest.raises(WanxError, match=r"cannot be stored in .*: No space left .* set TMPDIR"):
        wanx.plan_export(**quick(NAME))
