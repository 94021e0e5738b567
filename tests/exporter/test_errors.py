"""What an export refuses: one line that says what to do, and everything left as it was."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wanx
import wanx.exporter.export as exporter
from tests.support.peers import DIT_SIZES, TASKS, random_dit
from wanx.bundle.publish import write_manifest
from wanx.bundle.reader import Bundle, open_bundle
from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.exporter.options import ExportOptions

Refused = Callable[..., str]
DIM = DIT_SIZES["num_attention_heads"] * DIT_SIZES["attention_head_dim"]


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def refused(export_quickly: Callable[..., Bundle]) -> Refused:
    """Export, expect an error of one line and no sign of an output; return the message."""

    def act(kind: type[WanxError], source: Path, output: Path, **options: Any) -> str:
        before = contents(output.parent)
        with pytest.raises(WanxError) as caught:
            export_quickly(source, output, **options)
        assert type(caught.value) is kind
        assert contents(output.parent) == before
        message = str(caught.value)
        assert "\n" not in message
        return message

    return act


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.mark.fault("tensors that do not fit")
def test_all_wrong_tensors_are_listed_at_once(
    broken: Path, tmp_path: Path, refused: Refused
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["blocks.1.attn1.to_k.bias"]
        del tensors["proj_out.bias"]
        tensors["blocks.0.ffn.net.2.bias"] = torch.zeros(DIM + 1)
        tensors["surprise"] = torch.zeros(2)
        tensors["blocks.0.attn2.to_q.weight"] = torch.zeros(DIM, DIM, dtype=torch.int32)

    edit(broken / "transformer", change)
    message = refused(CorruptInputError, broken, tmp_path / "bundle")
    assert "5 in all" in message
    for problem in (
        "missing blocks.1.attn1.to_k.bias",
        "missing proj_out.bias",
        f"blocks.0.ffn.net.2.bias has shape [{DIM + 1}] instead of [{DIM}]",
        "unexpected surprise",
        "blocks.0.attn2.to_q.weight is I32",
    ):
        assert problem in message


@pytest.mark.parametrize("folder", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.fault("weights that are not finite")
def test_a_tensor_that_is_not_finite(
    value: float, folder: str, broken: Path, tmp_path: Path, refused: Refused
) -> None:
    names = []

    def change(tensors: dict[str, Tensor]) -> None:
        names.append(max(tensors, key=lambda name: tensors[name].numel()))
        tensors[names[0]].view(-1)[-1] = value

    edit(broken / folder, change)
    message = refused(CorruptInputError, broken, tmp_path / "bundle")
    assert names[0] in message
    assert str(broken / folder) in message


def test_numbers_too_large_for_fp16(broken: Path, tmp_path: Path, refused: Refused) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["proj_out.bias"][3] = 70000

    edit(broken / "transformer", change)
    message = refused(UsageError, broken, tmp_path / "bundle", precision="fp16")
    assert "proj_out.bias" in message
    assert "bf16" in message


@pytest.mark.parametrize(
    "options", [{"precision": "fp4"}, {"precision": ""}, {"precision": "F32"}, {"target": "tpu"}]
)
def test_unknown_options(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        ExportOptions(output=tmp_path / "bundle", **options)
    (value,) = options.values()
    assert f" {value} is not available; choose " in str(caught.value)


@pytest.mark.parametrize("task", ["i2v", "flf2v", "vace"])
def test_another_transformer_alone_makes_no_other_task(
    task: str, broken: Path, tmp_path: Path, refused: Refused
) -> None:
    shutil.rmtree(broken / "transformer")
    random_dit(**TASKS[task]).save_pretrained(broken / "transformer")
    if task == "vace":  # which needs nothing besides
        assert exporter.plan(ExportOptions(source=broken)).resolved.checkpoint.config.task == "vace"
    else:
        message = refused(CorruptInputError, broken, tmp_path / "bundle")
        assert "lacks image_encoder/config.json" in message


def test_problems_of_an_image_encoder_are_told_in_its_own_names(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, refused: Refused
) -> None:
    source = shutil.copytree(checkpoint_of("i2v"), tmp_path / "broken")
    layer = "encoder.layers.0"

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{layer}.layer_norm1.bias"]
        del tensors["embeddings.class_embedding"]
        tensors[f"{layer}.self_attn.q_proj.bias"] = torch.zeros(47)
        tensors["surprise"] = torch.zeros(2)

    edit(source / "image_encoder", change)
    message = refused(CorruptInputError, source, tmp_path / "bundle")
    for problem in (
        "the image_encoder weights do not fit their network (4 in all)",
        f"missing {layer}.layer_norm1.bias",
        "missing embeddings.class_embedding",
        f"{layer}.self_attn.v_proj.bias has shape [143] instead of [144]",
        "unexpected surprise",
    ):
        assert problem in message


def test_a_part_of_a_joined_tensor_that_is_not_finite(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, refused: Refused
) -> None:
    source = shutil.copytree(checkpoint_of("i2v"), tmp_path / "broken")
    name = "encoder.layers.1.self_attn.k_proj.weight"
    edit(source / "image_encoder", lambda tensors: tensors[name].view(-1)[-1].fill_(torch.nan))
    message = refused(CorruptInputError, source, tmp_path / "bundle")
    assert f"tensor '{name}' holds NaN" in message


def test_a_checkpoint_for_another_task_than_asked(
    checkpoint: Path, bundle_fp32: Bundle, tmp_path: Path, refused: Refused
) -> None:
    for source in (checkpoint, bundle_fp32.root):
        message = refused(UsageError, source, tmp_path / "bundle", task="i2v")
        assert "for t2v, not i2v" in message


def test_a_bundle_for_another_task_than_asked(
    bundle_of: Callable[[str, str], Bundle], tmp_path: Path, refused: Refused
) -> None:
    message = refused(UsageError, bundle_of("vace", "fp32").root, tmp_path / "bundle", task="i2v")
    assert "for vace, not i2v" in message


def test_a_bundle_without_a_component_is_no_source(
    bundle_of: Callable[[str, str], Bundle], tmp_path: Path, refused: Refused
) -> None:
    bundle = bundle_of("i2v", "fp32")
    source = shutil.copytree(bundle.root, tmp_path / "part")
    components = dict(bundle.manifest.components)
    del components["image_encoder"]
    write_manifest(source, bundle.manifest.model_copy(update={"components": components}))
    message = refused(CorruptInputError, source, tmp_path / "bundle")
    assert "no image_encoder" in message


def test_sources_that_are_none(tmp_path: Path, refused: Refused) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("")
    for source in (tmp_path / "missing", empty, file):
        assert str(source) in refused(UsageError, source, tmp_path / "bundle")


def test_a_quantised_bundle_is_no_source(
    bundle_fp32: Bundle, tmp_path: Path, refused: Refused
) -> None:
    source = shutil.copytree(bundle_fp32.root, tmp_path / "quantised")
    write_manifest(source, bundle_fp32.manifest.model_copy(update={"precision": "int8"}))
    assert "quantised to int8" in refused(UsageError, source, tmp_path / "bundle")


@pytest.mark.fault("flipped bit")
def test_a_damaged_bundle_is_no_source(
    bundle_fp32: Bundle, tmp_path: Path, refused: Refused
) -> None:
    source = shutil.copytree(bundle_fp32.root, tmp_path / "damaged")
    path = source / "weights" / "dit.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "dit.safetensors" in refused(CorruptInputError, source, tmp_path / "bundle")


@pytest.mark.fault("target that exists")
def test_an_existing_bundle_is_kept_without_force(
    checkpoint: Path,
    bundle_fp32: Bundle,
    export_quickly: Callable[..., Bundle],
    tmp_path: Path,
    refused: Refused,
) -> None:
    output = shutil.copytree(bundle_fp32.root, tmp_path / "bundle")
    assert "--force" in refused(UsageError, checkpoint, output)
    replaced = export_quickly(checkpoint, output, precision="bf16", force=True)
    assert replaced.manifest.precision == "bf16"
    assert open_bundle(output).hash == replaced.hash
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_is_no_bundle_is_never_replaced(
    checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    output = tmp_path / "holiday"
    output.mkdir()
    (output / "photo.jpg").write_bytes(b"precious")
    assert "not a wanx bundle" in refused(UsageError, checkpoint, output, force=True)


def test_a_failed_replacement_leaves_the_old_bundle(
    broken: Path, bundle_fp32: Bundle, tmp_path: Path, refused: Refused
) -> None:
    output = shutil.copytree(bundle_fp32.root, tmp_path / "bundles" / "bundle")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["conv_in.bias" if "conv_in.bias" in tensors else "decoder.conv_in.bias"][0] = float(
            "nan"
        )

    edit(broken / "vae", change)
    refused(CorruptInputError, broken, output, force=True)
    assert open_bundle(output, verify="full").hash == bundle_fp32.hash


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RuntimeError("bug"), WanxError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_nothing_is_left_when_tracing_stops(
    error: BaseException,
    raised: type[BaseException],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(spec: object) -> None:
        raise error

    monkeypatch.setattr("wanx.exporter.trace_component.trace", stop)
    output = tmp_path / "sub" / "bundle"
    with pytest.raises(raised):
        exporter.export(ExportOptions(source=checkpoint, output=output, graph_cache=False))
    assert list((tmp_path / "sub").iterdir()) == []


def test_public_function_raises_the_same_errors(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(wanx.UsageError, match="--precision fp5"):
        wanx.export(checkpoint, tmp_path / "bundle", precision="fp5")
    with pytest.raises(wanx.UsageError, match="does not exist"):
        wanx.export(tmp_path / "missing", tmp_path / "bundle")


@pytest.mark.parametrize("megabytes", [1, 16])
@pytest.mark.fault("out of memory")
def test_running_out_of_memory_names_the_component(tmp_path: Path, megabytes: int) -> None:
    """A real limit on the address space, which torch may meet anywhere and wrap in anything."""
    program = (
        "import re, resource, sys\n"
        "from wanx.cli import main\n"
        "import wanx.exporter.trace_component as tracing\n"
        "trace = tracing.trace\n"
        "def limited(spec):\n"
        "    if spec.name == 'dit':\n"
        "        status = open('/proc/self/status').read()\n"
        "        size = int(re.search(r'VmSize:\\s+(\\d+)', status)[1]) << 10\n"
        f"        limit = size + ({megabytes} << 20)\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "    return trace(spec)\n"
        "tracing.trace = limited\n"
        "sys.argv = ['wanx', 'export', 'tiny', '-o', 'bundle', '-q', '--no-graph-cache']\n"
        "main()\n"
    )
    for _ in range(5):
        # A thread that finds no memory for its stack would end the process in C++.
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        # CPython 3.11 itself may crash in its garbage collector then, about once in ten times.
        if result.returncode != -signal.SIGSEGV:
            break
    assert result.returncode == 1, result.stderr
    assert re.fullmatch(r"error: (not enough memory to|cannot) trace \w+.*\n", result.stderr)
    assert list(tmp_path.iterdir()) == []
