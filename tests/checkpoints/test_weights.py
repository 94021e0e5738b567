"""Weight files: shards, .pth files, streaming, and what does not fit the network."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from wanx.checkpoints.tensors.pickle_file import read_pickle
from wanx.checkpoints.tensors.source import JoinedTensor, TensorSource
from wanx.checkpoints.weights import check_tensors, open_weights
from wanx.errors import CorruptInputError, UsageError

Tensors = dict[str, torch.Tensor]


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def joined(source: TensorSource, chunk: int = 1 << 20) -> bytes:
    return b"".join(bytes(piece) for piece in source.iter_bytes(chunk))


def tensors(seed: int = 0) -> Tensors:
    rng = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(33, 17, generator=rng),
        "h": torch.randn(5, 3, 2, generator=rng).to(torch.bfloat16),
        "f": torch.randn(7, generator=rng).half(),
        "s": torch.tensor(0.5),
        "e": torch.zeros(0, 4),
    }


def write_shards(folder: Path, index: dict[str, str] | None = None) -> dict[str, str]:
    """Two shards of :func:`tensors` and an index, or another one."""
    parts = {"m-00001-of-00002.safetensors": "wh", "m-00002-of-00002.safetensors": "fse"}
    for file, names in parts.items():
        save_file({name: tensors()[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index or weight_map})
    (folder / "m.safetensors.index.json").write_text(text)
    return weight_map


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CorruptInputError) as caught:
        open_weights(folder, "m")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert caught.value.exit_code == 5
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["single", "sharded", "shards without index", "pth"])
@pytest.mark.parametrize("chunk", [8, 64, 8 << 20])
def test_every_kind_yields_the_same_bytes(kind: str, chunk: int, tmp_path: Path) -> None:
    if kind == "single":
        save_file(tensors(), tmp_path / "m.safetensors")
    elif kind == "pth":
        torch.save(tensors(), tmp_path / "m.pth")
    else:
        write_shards(tmp_path)
    if kind == "shards without index":
        (tmp_path / "m.safetensors.index.json").unlink()
    sources, files = open_weights(tmp_path, "m")
    assert len(files) == (2 if "shard" in kind else 1)
    assert sources.keys() == tensors().keys()
    for name, tensor in tensors().items():
        source = sources[name]
        assert (source.name, source.shape) == (name, tuple(tensor.shape))
        assert source.dtype == {4: "F32", 2: "BF16" if name == "h" else "F16"}[tensor.itemsize]
        assert all(len(piece) <= chunk for piece in source.iter_bytes(chunk))
        assert joined(source, chunk) == to_bytes(tensor)
        assert source.nbytes == tensor.nbytes


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_streaming_holds_a_chunk_not_the_tensor(suffix: str, tmp_path: Path) -> None:
    tensor = torch.zeros(32 << 20)
    path = tmp_path / f"m.{suffix}"
    save_file({"w": tensor}, path) if suffix == "safetensors" else torch.save({"w": tensor}, path)
    source = open_weights(tmp_path, "m")[0]["w"]
    before = _anonymous_bytes()
    grown = []
    tracemalloc.start()
    for _ in source.iter_bytes(1 << 20):
        grown.append(_anonymous_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(grown) == 128
    assert peak < 2 << 20
    assert max(grown) < 64 << 20  # of 128 MiB; other threads and the allocator take some


def _anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def test_a_file_cut_while_streaming_is_noticed(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(100_000)}, tmp_path / "m.safetensors")
    source = open_weights(tmp_path, "m")[0]["w"]
    pieces = source.iter_bytes(1 << 16)
    next(pieces)
    os.truncate(tmp_path / "m.safetensors", 200_000)
    with pytest.raises(CorruptInputError, match="ended inside tensor 'w'"):
        list(pieces)


@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_converted_stream_equals_torch(target: str, tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "m.safetensors")
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[target]
    for name, source in open_weights(tmp_path, "m")[0].items():
        data = b"".join(bytes(piece) for piece in source.iter_converted(target, 64))
        assert data == to_bytes(tensors()[name].to(dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.fault("weights that are not finite")
def test_nan_is_refused_by_name(bad: float, tmp_path: Path) -> None:
    broken = tensors()
    broken["h"][4, 2, 1] = bad
    save_file(broken, tmp_path / "m.safetensors")
    sources = open_weights(tmp_path, "m")[0]
    list(sources["w"].iter_converted("BF16"))
    for target in ("BF16", "F32"):
        with pytest.raises(CorruptInputError, match=r"m\.safetensors: tensor 'h' holds NaN"):
            list(sources["h"].iter_converted(target, 8))


def test_numbers_too_large_for_fp16_name_tensor_and_way_out(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, -1e6])}, tmp_path / "m.safetensors")
    source = open_weights(tmp_path, "m")[0]["w"]
    with pytest.raises(UsageError, match=r"'w' does not fit F16: 1e\+06 .* bf16"):
        list(source.iter_converted("F16"))


def test_missing_weights_and_shards_are_named(tmp_path: Path) -> None:
    refused(tmp_path, "m.safetensors", "download")
    write_shards(tmp_path)
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "lacks 1 of 2", "m-00002-of-00002.safetensors")
    (tmp_path / "m.safetensors.index.json").unlink()
    refused(tmp_path, "1 of 2", "m-00002-of-00002.safetensors")


def test_shards_of_two_splits(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "m.safetensors.index.json").unlink()
    save_file({"x": torch.ones(1)}, tmp_path / "m-00003-of-00003.safetensors")
    refused(tmp_path, "holds 3 shards", "2 belong together")


def test_one_file_beside_an_index_is_ambiguous(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file(tensors(), tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="remove the one"):
        open_weights(tmp_path, "m")


@pytest.mark.parametrize(
    "name",
    [
        "../m.safetensors",
        "sub/../../m.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a\\..\\m.safetensors",
        "a\nb.safetensors",
        "a\0.safetensors",
        "~/m.safetensors",
    ],
)
@pytest.mark.fault("shard index out of the folder")
def test_index_paths_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(tensors(), tmp_path / "m.safetensors")
    write_shards(folder, {"w": name})
    with pytest.raises(CorruptInputError) as caught:
        open_weights(folder, "m")
    assert "\n" not in str(caught.value)
    assert "index.json" in str(caught.value)


@pytest.mark.parametrize("through", ["file", "folder", "loop"])
def test_links_out_of_the_folder_are_refused(through: str, tmp_path: Path) -> None:
    folder, outside = tmp_path / "checkpoint", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    save_file(tensors(), outside / "m.safetensors")
    if through == "file":
        (folder / "link.safetensors").symlink_to(outside / "m.safetensors")
        write_shards(folder, {"w": "link.safetensors"})
        refused(folder, "'link.safetensors'", "not a file of its folder")
    elif through == "folder":
        (folder / "sub").symlink_to(outside)
        write_shards(folder, {"w": "sub/m.safetensors"})
        refused(folder, "'sub/m.safetensors'", "not a file of its folder")
    else:
        (folder / "link.safetensors").symlink_to(folder / "link.safetensors")
        write_shards(folder, {"w": "link.safetensors"})
        refused(folder, "link.safetensors")


def test_links_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--Wan-AI--Wan2.1"
    folder, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    write_shards(folder)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{i:064x}")
        path.symlink_to(Path("../../blobs") / f"{i:064x}")
    sources, _ = open_weights(folder, "m")
    assert joined(sources["w"]) == to_bytes(tensors()["w"])
    other = tmp_path / "blobs"
    other.mkdir()
    save_file(tensors(), other / "x")
    (folder / "m-00001-of-00002.safetensors").unlink()
    (folder / "m-00001-of-00002.safetensors").symlink_to(other / "x")
    refused(folder, "not a file of its folder")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": ["m"]}', "weight_map"),
        ('{"weight_map": {"w": 1}}', "weight_map"),
        ('{"weight_map": {"w": ["m"]}}', "weight_map"),
        ('{"weight_map": {"w": "m", "w": "m"}}', "twice"),
        ("[", "JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_damaged_indexes(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(text)
    refused(tmp_path, "index.json", word)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    write_shards(tmp_path, weight_map | {"x": weight_map["w"]})
    refused(tmp_path, "1 of 6 tensors", "x in m-00001-of-00002.safetensors")
    write_shards(tmp_path, weight_map | {"w": weight_map["f"]})
    refused(tmp_path, "w in m-00002-of-00002.safetensors")
    write_shards(tmp_path)
    save_file({"f": torch.ones(1), "w": torch.ones(1)}, tmp_path / "m-00002-of-00002.safetensors")
    refused(tmp_path, "holds 'w', as m-00001-of-00002.safetensors already does")


def test_tensors_that_the_index_omits_still_count(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    write_shards(tmp_path, {name: file for name, file in weight_map.items() if name != "e"})
    assert open_weights(tmp_path, "m")[0].keys() == tensors().keys()


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.fault("pickle that runs code")
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"w": torch.ones(2), "x": Hostile(marker)}, tmp_path / "m.pth")
    refused(tmp_path, "m.pth", "system", "refused", "safetensors")
    assert not marker.exists()
    torch.load(tmp_path / "m.pth", weights_only=False)
    assert marker.exists()  # the attack was real


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ([torch.ones(1)], "list"),
        ({}, "dict"),
        (torch.ones(1), "Tensor"),
        ({"w": torch.ones(1), "epoch": 3}, "'epoch', a int"),
        ({1: torch.ones(1)}, "'1'"),
        ({"state_dict": {"w": torch.ones(1)}}, "'state_dict', a dict"),
        ({"w": torch.ones(1, dtype=torch.int64)}, "torch.int64"),
        ({"w": torch.eye(3).to_sparse()}, "sparse"),
        ({"w": torch.ones(1).expand(1 << 40)}, "no larger than its file"),
        ({"w": torch.empty(5, device="meta")}, "meta_tensor"),
    ],
)
def test_pickles_of_anything_but_tensors(state: Any, words: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "m.pth")
    refused(tmp_path, "m.pth", words)


def test_damaged_pickles(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save(tensors(), path)
    data = path.read_bytes()
    for cut in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        refused(tmp_path, "m.pth")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(tmp_path, "git lfs pull")
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    refused(tmp_path, "not a whole PyTorch archive", "safetensors")
    path.write_bytes(pickle.dumps({"w": 1}))
    refused(tmp_path, "not a whole PyTorch archive")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"not a pickle")
    refused(tmp_path, "cannot be read as tensors")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(1000))
    refused(tmp_path, "compressed")


def test_odd_but_honest_pickles(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = OrderedDict(
        transposed=base.T,
        strided=base[:, ::2],
        tied=base,
        parameter=torch.nn.Parameter(base[1]),
    )
    torch.save(state, tmp_path / "m.pth")
    sources = read_pickle(tmp_path / "m.pth")
    assert sources["transposed"].shape == (6, 4)
    for name, tensor in state.items():
        assert joined(sources[name], 8) == to_bytes(tensor)


def sources_of(folder: Path, state: Tensors) -> dict[str, TensorSource]:
    save_file(state, folder / "m.safetensors")
    return open_weights(folder, "m")[0]


@pytest.mark.fault("tensors that do not fit")
def test_all_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    found = sources_of(
        tmp_path,
        {
            "right": torch.ones(2, 3),
            "turned": torch.ones(3, 2),
            "extra": torch.ones(1),
            "eight": torch.ones(4, dtype=torch.int8),
        },
    )
    expected = {"right": (2, 3), "turned": (2, 3), "lost": (1,), "eight": (4,)}
    with pytest.raises(CorruptInputError) as caught:
        check_tensors("vae", expected, found, stored_name=lambda name: f"their.{name}")
    message = str(caught.value)
    assert "\n" not in message
    assert "vae" in message
    assert "(4 in all)" in message
    assert "missing their.lost" in message
    assert "unexpected extra" in message
    assert "turned has shape [3, 2] instead of [2, 3]" in message
    assert "eight is I8" in message
    check_tensors("vae", {"right": (2, 3)}, {"right": found["right"]})


def test_joined_tensors_are_their_bytes_in_order(tmp_path: Path) -> None:
    a, b = torch.randn(33, 5), torch.randn(2, 5)
    save_file({"a": a}, tmp_path / "m.safetensors")
    torch.save({"b": b}, tmp_path / "n.pth")
    one, two = open_weights(tmp_path, "m")[0]["a"], open_weights(tmp_path, "n")[0]["b"]
    whole = torch.cat([a, b, a])
    source = JoinedTensor.of(one, two, one)
    assert (source.dtype, source.shape, source.nbytes) == ("F32", (68, 5), 4 * 68 * 5)
    assert source.files == (tmp_path / "m.safetensors", tmp_path / "n.pth")
    assert (one.files, source.name) == ((one.file,), "a + b + a")
    for chunk in (8, 64, 1 << 20):
        assert joined(source, chunk) == to_bytes(whole)
    narrow = b"".join(bytes(piece) for piece in source.iter_converted("BF16", 64))
    assert narrow == to_bytes(whole.to(torch.bfloat16))


@pytest.mark.parametrize(
    "other",
    [torch.ones(2, 4), torch.ones(5), torch.ones(()), torch.ones(2, 5, dtype=torch.bfloat16)],
)
def test_tensors_that_do_not_make_one(other: torch.Tensor, tmp_path: Path) -> None:
    found = sources_of(tmp_path, {"a": torch.ones(2, 5), "b": other})
    with pytest.raises(CorruptInputError, match=r"m\.safetensors: the tensors a \+ b are F32") as e:
        JoinedTensor.of(found["a"], found["b"])
    assert "\n" not in str(e.value)
    with pytest.raises(CorruptInputError, match="do not make one"):
        JoinedTensor.of(found["b"], found["b"] if other.ndim == 0 else found["a"])


def test_a_part_that_is_not_finite_is_named(tmp_path: Path) -> None:
    found = sources_of(tmp_path, {"a": torch.ones(2, 5), "b": torch.full((1, 5), torch.nan)})
    with pytest.raises(CorruptInputError, match="tensor 'b' holds NaN"):
        list(JoinedTensor.of(found["a"], found["b"]).iter_converted("F32"))


def test_names_from_files_cannot_forge_lines_or_colours(tmp_path: Path) -> None:
    forged = "w\n\x1b[31mall is well"
    found = sources_of(tmp_path, {forged: torch.ones(1)})
    with pytest.raises(CorruptInputError) as caught:
        check_tensors("dit", {}, found)
    assert str(caught.value).isprintable()
    write_shards(tmp_path, {forged: "m-00001-of-00002.safetensors"})
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(CorruptInputError, match="1 of 1") as caught:
        open_weights(tmp_path, "m")
    assert str(caught.value).isprintable()


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    found = sources_of(tmp_path, {"w": torch.ones(1)})
    with pytest.raises(CorruptInputError, match=r"missing n9; and 15 more") as caught:
        check_tensors("dit", {f"n{i}": (1,) for i in range(24)}, found)
    assert len(str(caught.value)) < 500
    assert "(25 in all)" in str(caught.value)


@pytest.mark.parametrize("name", ["patch_embedding.weight", "vace_patch_embedding.weight"])
def test_the_patch_embedding_may_be_a_convolution(name: str, tmp_path: Path) -> None:
    found = sources_of(tmp_path, {name: torch.ones(3, 5, 1, 2, 2)})
    check_tensors("dit", {name: (3, 20)}, found)
    check_tensors("dit", {name: (3, 5, 1, 2, 2)}, found)
    with pytest.raises(CorruptInputError, match="instead"):
        check_tensors("dit", {name: (3, 24)}, found)
    other = {"head.weight": found[name]}
    with pytest.raises(CorruptInputError, match="instead"):
        check_tensors("dit", {"head.weight": (3, 20)}, other)
