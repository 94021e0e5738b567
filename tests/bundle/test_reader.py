from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from tests.support.paths import ROOT
from wanx.bundle.publish import record_files, write_manifest
from wanx.bundle.reader import (
    Bundle,
    Component,
    Manifest,
    Provenance,
    open_bundle,
    read_bundle,
    verify_bundle,
)
from wanx.config.models import PRESETS
from wanx.errors import CorruptInputError, EnvironmentMismatchError, UsageError, WanxError
from wanx.files.checksum import sha256_file

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def write_graph(path: Path, location: str, offset: int, length: int) -> None:
    """Graph of y = x @ w with w [2, 3] in an external file."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=WEIGHT.shape)
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        weight.external_data.add(key=key, value=str(value))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "dit",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def sign(
    root: Path,
    *,
    graph: str = "graphs/dit.onnx",
    engine: str = "engines/onnxruntime-cpu/dit.onnx",
) -> None:
    """Write the manifest that fits the files as they are now, as an attacker would."""
    write_manifest(
        root,
        Manifest(
            wanx_version="0.1.0",
            config=PRESETS["tiny"],
            precision="fp32",
            target="cpu",
            components={
                "dit": Component(
                    graph=graph,
                    engines={"cpu": engine} if (root / engine).exists() else {},
                    weights=("weights/dit.safetensors",),
                    storage={"F32": 1},
                    nodes=1,
                    inputs=("x",),
                    outputs=("y",),
                )
            },
            provenance=Provenance(
                source="tests",
                source_layout="wanx",
                source_sha256="0" * 64,
                tools={"onnx": onnx.__version__},
                created=datetime.now(UTC),
            ),
            files=record_files(root),
        ),
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small, whole bundle; the cache of verified files is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "b"
    for folder in ("graphs", "weights", "tokenizer"):
        (root / folder).mkdir(parents=True)
    weights = root / "weights/dit.safetensors"
    save_file({"w": WEIGHT}, weights)
    write_graph(
        root / "graphs/dit.onnx",
        "weights/dit.safetensors",
        weights.stat().st_size - WEIGHT.nbytes,
        WEIGHT.nbytes,
    )
    (root / "tokenizer/tokenizer.json").write_text("{}")
    sign(root)
    return root


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files count as written long ago, so that their digests are remembered."""
    monkeypatch.setattr("wanx.files.checksum._SETTLED_NS", -1)


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def refused(root: Path, **options: Any) -> str:
    with pytest.raises(CorruptInputError) as caught:
        open_bundle(root, **options)
    message = str(caught.value)
    assert message.startswith((f"{root}: ", f"{root}/manifest.json: "))
    assert message.isprintable()
    return message


def test_a_whole_bundle_opens(root: Path) -> None:
    bundle = open_bundle(root)
    assert isinstance(bundle, Bundle)
    assert bundle.root == root
    assert bundle.hash == hashlib.sha256((root / "manifest.json").read_bytes()).hexdigest()
    assert bundle.graph_path("dit") == root / "graphs/dit.onnx"
    assert bundle.tokenizer_path == root / "tokenizer/tokenizer.json"
    listed = [p for p in root.rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert bundle.size_bytes == sum(p.stat().st_size for p in listed)
    assert open_bundle(str(root), verify="full") == bundle
    assert open_bundle(root, verify="size") == bundle == read_bundle(root)
    assert verify_bundle(read_bundle(root))
    assert not any(check.problem for check in verify_bundle(read_bundle(root)))


def test_onnxruntime_finds_the_weights_from_the_bundle_root(root: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(root)
    )
    model = open_bundle(root).graph_path("dit").read_bytes()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = np.array([[1.0, 2.0]], np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x @ WEIGHT)


def test_relative_paths_and_links_to_the_folder_work(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root.parent / "latest").symlink_to("b")
    monkeypatch.chdir(root.parent)
    assert open_bundle("b").root == root
    assert open_bundle("latest").root == root


def test_a_missing_component_or_tokenizer_is_named(root: Path) -> None:
    with pytest.raises(UsageError, match=r"no component 'image_encoder' in this t2v .* has dit"):
        open_bundle(root).graph_path("image_encoder")
    (root / "tokenizer/tokenizer.json").unlink()
    sign(root)
    with pytest.raises(CorruptInputError, match=r"tokenizer\.json is not in the manifest"):
        _ = open_bundle(root).tokenizer_path


@pytest.mark.parametrize("path", ["nothing", "b/manifest.json", "a\0b"])
def test_what_is_no_folder_is_a_usage_error(root: Path, path: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_bundle(f"{root.parent}/{path}")
    assert str(caught.value).isprintable()


def test_a_folder_without_manifest_is_not_a_bundle(root: Path) -> None:
    (root / "manifest.json").unlink()
    assert "not a wanx bundle" in refused(root)


@pytest.mark.parametrize("verify", ["auto", "full", "size"])
@pytest.mark.parametrize(
    "name", ["graphs/dit.onnx", "weights/dit.safetensors", "tokenizer/tokenizer.json"]
)
@pytest.mark.fault("missing file")
def test_missing_truncated_and_padded_files(root: Path, name: str, verify: str) -> None:
    path = root / name
    data = path.read_bytes()
    for wrong in (data[:-1], data + b"\0", b""):
        path.write_bytes(wrong)
        found = refused(root, verify=verify)
        assert f"{name} has {len(wrong)} bytes, the manifest says {len(data)}" in found
    path.unlink()
    assert f"{name} is missing" in refused(root, verify=verify)
    path.mkdir()
    assert f"{name} is not a file" in refused(root, verify=verify)
    path.rmdir()
    os.mkfifo(path)
    assert f"{name} is not a file" in refused(root, verify=verify)


def test_a_missing_folder(root: Path) -> None:
    shutil.rmtree(root / "weights")
    assert "weights/dit.safetensors is missing" in refused(root)
    (root / "weights").write_bytes(b"")
    assert "weights/dit.safetensors is missing" in refused(root)


@pytest.mark.parametrize("verify", ["auto", "full"])
@pytest.mark.parametrize(
    "name", ["graphs/dit.onnx", "weights/dit.safetensors", "tokenizer/tokenizer.json"]
)
@pytest.mark.fault("flipped bit")
def test_one_flipped_bit(root: Path, name: str, verify: str) -> None:
    flip(root / name)
    digest = hashlib.sha256((root / name).read_bytes()).hexdigest()
    found = refused(root, verify=verify)
    assert f"{name} is damaged: its SHA-256 is {digest[:12]}" in found


@pytest.mark.fault("weights outside the bundle")
def test_symbolic_links_are_refused(root: Path) -> None:
    outside = root.parent / "outside"
    weights = root / "weights/dit.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)
    assert "weights/dit.safetensors is a symbolic link" in refused(root)
    weights.unlink()
    weights.symlink_to("../../nothing")
    assert "is a symbolic link" in refused(root)


def test_a_linked_folder_is_refused(root: Path) -> None:
    (root / "weights").rename(root.parent / "elsewhere")
    (root / "weights").symlink_to("../elsewhere")
    assert "weights is a symbolic link" in refused(root)


def test_a_linked_manifest_is_refused(root: Path) -> None:
    (root / "manifest.json").rename(root.parent / "m")
    (root / "manifest.json").symlink_to("../m")
    assert "manifest.json is a symbolic link" in refused(root)


def test_a_manifest_that_is_a_pipe_does_not_hang(root: Path) -> None:
    (root / "manifest.json").unlink()
    os.mkfifo(root / "manifest.json")
    assert "manifest.json is not a file" in refused(root)


@pytest.mark.fault("hard-linked weights")
def test_hard_links_are_refused_but_for_the_installed_bundle(root: Path) -> None:
    os.link(root / "weights/dit.safetensors", root.parent / "other")
    assert "weights/dit.safetensors has 2 hard links" in refused(root)
    assert open_bundle(root, allow_hard_links=True).root == root
    assert not any(
        check.problem for check in verify_bundle(read_bundle(root), allow_hard_links=True)
    )
    shutil.copytree(root, root.parent / "copy")
    assert open_bundle(root.parent / "copy")


@pytest.mark.parametrize(
    "name", ["engines/dit.plan", "graphs/evil.onnx", "weights/sub/x.safetensors", "graphs/.x"]
)
def test_foreign_files_are_refused(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b"native code")
    assert f"'{name}' is not in the manifest" in refused(root)
    (root / name).unlink()
    (root / name).symlink_to("/etc")
    assert f"'{name}' is not in the manifest" in refused(root)


def test_a_foreign_file_beside_listed_engines_is_refused(root: Path) -> None:
    (root / "engines/k/dit").mkdir(parents=True)
    (root / "engines/k/dit/plan.json").write_text("{}")
    sign(root, engine="engines/k/dit/plan.json")
    for name in ("engines/k/dit/block.engine", "engines/k/other/block.engine"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"native code")
        assert f"'{name}' is not in the manifest" in refused(root)
        (root / name).unlink()


def test_a_foreign_folder_behind_a_link_is_refused(root: Path) -> None:
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (root / "engines").symlink_to(elsewhere)
    assert "'engines' is not in the manifest" in refused(root)


def test_foreign_names_cannot_write_to_the_terminal(root: Path) -> None:
    (root / os.fsdecode(b"graphs/a\x1b[2J\xff\n")).write_bytes(b"")
    assert "\\x1b[2J" in refused(root)


def test_files_beside_the_bundle_folders_do_not_matter(root: Path) -> None:
    (root / "README.md").write_text("mine")
    (root / "engines").mkdir()
    assert open_bundle(root)


def test_newer_and_damaged_manifests(root: Path) -> None:
    path = root / "manifest.json"
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps(document | {"schema_version": 3}))
    with pytest.raises(EnvironmentMismatchError, match=r"schema 3, this one reads 1\): upgrade"):
        open_bundle(root)
    path.write_text(json.dumps(document)[:-9])
    assert "manifest.json" in refused(root)
    path.write_bytes(b" " * (9 << 20))
    assert "larger than" in refused(root)


ESCAPES = [
    "../outside", "weights/../../outside", "/etc/passwd", "..\\outside", "C:\\x", "outside", "",
    "weights/other.safetensors", "./weights/dit.safetensors", "weights//dit.safetensors",
    "weights/dit.safetensors\0", "graphs/dit.onnx", "*/_ORT_MEM_ADDR_/*", "\x1b[2J",
]  # fmt: skip


@pytest.mark.parametrize("location", ESCAPES)
@pytest.mark.fault("weights outside the bundle")
def test_external_data_outside_the_components_weights(root: Path, location: str) -> None:
    """The manifest may be the attacker's, so hashes that fit prove nothing."""
    (root / "weights/other.safetensors").write_bytes(bytes(99))
    write_graph(root / "graphs/dit.onnx", location, 0, 24)
    sign(root)
    for verify in ("auto", "size"):
        found = refused(root, verify=verify)
        assert f"graphs/dit.onnx reads {location!r}, which is not among its weights" in found


def test_an_engine_that_is_a_graph_is_checked_like_one(root: Path) -> None:
    engine = root / "engines/onnxruntime-cpu/dit.onnx"
    engine.parent.mkdir(parents=True)
    shutil.copy(root / "graphs/dit.onnx", engine)
    sign(root)
    assert open_bundle(root).manifest.components["dit"].engines
    write_graph(engine, "../outside", 0, 24)
    sign(root)
    assert "engines/onnxruntime-cpu/dit.onnx reads '../outside'" in refused(root)


GRAPH_NAMES = ["dit", "dit.bin", "dit.ONNX", "dit.ort", "dit.onnx.json", "plan.json", "deep/er/x"]


@pytest.mark.parametrize("name", GRAPH_NAMES)
@pytest.mark.parametrize("used_as", ["graph", "engine"])
@pytest.mark.parametrize(
    "location", ["tokenizer/evil.bin", "engines/k/evil.bin", "weights/other.safetensors", "../out"]
)
@pytest.mark.fault("graph under another name")
def test_a_graph_is_checked_whatever_its_name(
    root: Path, name: str, used_as: str, location: str
) -> None:
    folder = {"graph": "graphs", "engine": "engines/k"}[used_as]
    path = root / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / "graphs/dit.onnx", path)
    if used_as == "graph":
        (root / "graphs/dit.onnx").unlink()
    sign(root, **{used_as: f"{folder}/{name}"})
    assert open_bundle(root, verify="full")

    (root.parent / "outside").write_bytes(bytes(99))
    (root / location).parent.mkdir(parents=True, exist_ok=True)
    os.link(root.parent / "outside", root / location)
    write_graph(path, location, 0, 24)
    sign(root, **{used_as: f"{folder}/{name}"})
    (root.parent / "outside").unlink()  # else the hard link itself is the problem
    assert f"{folder}/{name} reads {location!r}, which is not among its weights" in refused(root)
    problems = {check.path: check.problem for check in verify_bundle(read_bundle(root))}
    assert "which is not among its weights" in str(problems[f"{folder}/{name}"])

    path.write_bytes(b"ORTM, a format of ONNX Runtime's own")
    sign(root, **{used_as: f"{folder}/{name}"})
    assert f"{folder}/{name}: graph damaged" in refused(root)


@pytest.mark.parametrize(("offset", "length"), [(0, 10**6), (10**6, 0), (10**18, 10**18), (90, 24)])
def test_external_data_past_the_end(root: Path, offset: int, length: int) -> None:
    write_graph(root / "graphs/dit.onnx", "weights/dit.safetensors", offset, length)
    sign(root)
    assert f"graphs/dit.onnx reads up to byte {offset + length} of weights/dit" in refused(root)


def test_a_graph_that_is_not_onnx(root: Path) -> None:
    (root / "graphs/dit.onnx").write_bytes(b"ORTM is not protobuf")
    sign(root)
    assert "graphs/dit.onnx: graph damaged" in refused(root)


def test_verify_reports_every_damaged_file(root: Path) -> None:
    flip(root / "weights/dit.safetensors")
    flip(root / "tokenizer/tokenizer.json")
    (root / "graphs/dit.onnx").unlink()
    (root / "graphs/evil.onnx").write_bytes(b"")
    found = {check.path: check.problem or "" for check in verify_bundle(read_bundle(root))}
    assert list(found) == sorted(found)
    assert len(found) == 4
    assert "damaged" in found["weights/dit.safetensors"]
    assert "damaged" in found["tokenizer/tokenizer.json"]
    assert "missing" in found["graphs/dit.onnx"]
    assert "not in the manifest" in found["graphs/evil.onnx"]


def test_verify_tells_good_files_from_bad(root: Path) -> None:
    flip(root / "weights/dit.safetensors")
    assert [check.path for check in verify_bundle(read_bundle(root)) if check.problem] == [
        "weights/dit.safetensors"
    ]
    assert [check.path for check in verify_bundle(read_bundle(root))] == sorted(
        read_bundle(root).manifest.files
    )


def test_verify_checks_graphs_whose_hash_fits(root: Path) -> None:
    write_graph(root / "graphs/dit.onnx", "../outside", 0, 24)
    sign(root)
    assert [check.path for check in verify_bundle(read_bundle(root)) if check.problem] == [
        "graphs/dit.onnx"
    ]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that get hashed from here on."""
    names: list[str] = []

    def spy(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
        names.append(path.name)
        return sha256_file(path, on_bytes)

    monkeypatch.setattr("wanx.bundle.integrity.sha256_file", spy)
    return names


@pytest.mark.usefixtures("settled")
def test_auto_hashes_again_only_what_changed(root: Path, hashed: list[str]) -> None:
    sizes: list[int] = []
    bundle = open_bundle(root, on_bytes=sizes.append)
    assert sorted(hashed) == ["dit.onnx", "dit.safetensors", "tokenizer.json"]
    assert sum(sizes) == bundle.size_bytes

    hashed.clear()
    sizes.clear()
    open_bundle(root, on_bytes=sizes.append)
    assert hashed == []
    assert sum(sizes) == bundle.size_bytes

    flip(root / "weights/dit.safetensors")
    assert "weights/dit.safetensors is damaged" in refused(root)
    assert hashed == ["dit.safetensors"]

    flip(root / "weights/dit.safetensors")
    hashed.clear()
    open_bundle(root)
    assert hashed == ["dit.safetensors"]

    hashed.clear()
    open_bundle(root, verify="full")
    assert len(hashed) == 3
    hashed.clear()
    open_bundle(root, verify="size")
    assert hashed == []


@pytest.mark.usefixtures("settled")
def test_stamps_do_not_vouch_for_another_manifest(root: Path, hashed: list[str]) -> None:
    """A digest is remembered, not a verdict: the manifest at hand still decides."""
    open_bundle(root)
    path = root / "manifest.json"
    document = json.loads(path.read_bytes())
    document["files"]["weights/dit.safetensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(document))
    hashed.clear()
    assert "weights/dit.safetensors is damaged" in refused(root)
    assert hashed == []


@pytest.mark.fault("read-only bundle")
def test_opening_writes_nothing_into_a_read_only_bundle(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    for path in before:
        path.chmod(stat.S_IREAD | stat.S_IEXEC)
    try:
        assert open_bundle(root, verify="full")
        assert not any(check.problem for check in verify_bundle(read_bundle(root)))
        assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before
    finally:
        for path in before:
            path.chmod(0o755)


def test_a_disk_error_is_a_problem_of_the_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, on_bytes: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("wanx.bundle.integrity.sha256_file", fail)
    assert "cannot be read (Input/output error)" in refused(root)


def test_an_unreadable_place_is_one_line(root: Path) -> None:
    with pytest.raises(WanxError, match="cannot be read: File name too long"):
        open_bundle(root / ("x" * 300))


def test_needs_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, wanx.bundle.reader, wanx.bundle.publish; "
        "print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")
