"""Parts from single files and from ComfyUI's folders, in every form that people share."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import (
    TASKS,
    tensor_bytes,
    write_diffusers,
    write_original,
    write_sparse,
)
from tools.repackage import (
    GGUF,
    PREFIX,
    SAFETENSORS,
    is_linear,
    quantize_q4_k,
    save,
    tensors_of,
    write_dit,
    write_gguf,
    write_others,
)
from wanx.checkpoints.checkpoint import Checkpoint, PartPaths, open_checkpoint
from wanx.checkpoints.key_maps import DIT, TEXT_ENCODER_GGUF
from wanx.checkpoints.layouts.files import open_part, open_parts
from wanx.checkpoints.tokenizer_source import TokenizerFile
from wanx.config.models import PRESETS, DiTConfig
from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.exporter.components import expected_tensors
from wanx.exporter.source import open_source


class Model:
    """A checkpoint in the original layout, and its parts beside each other."""

    def __init__(self, base: Path, task: str) -> None:
        diffusers = write_diffusers(base / "diffusers", task)
        self.folder = write_original(base / "original", diffusers, task, "safetensors")
        self.diffusers = diffusers
        self.checkpoint = open_checkpoint(self.folder)
        self.tensors = tensors_of(self.checkpoint.components["dit"])
        self.comfyui = base / "models"
        list(write_others(self.checkpoint, self.comfyui))
        self.tokenizer = self.checkpoint.tokenizer.path
        # Which tells the number of heads, as these are narrower than published ones.
        (self.comfyui / "diffusion_models").mkdir()
        shutil.copy(self.folder / "config.json", self.comfyui / "diffusion_models")

    def dit(self, form: str) -> Path:
        name = f"wan-{form}"
        return write_dit(self.tensors, self.comfyui / "diffusion_models", name, form)


@pytest.fixture(scope="module", params=TASKS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("t2v"), "t2v")


def from_comfyui(model: Model, form: str, **parts: Any) -> Checkpoint:
    return open_checkpoint(
        None,
        parts=PartPaths(
            comfyui=model.comfyui, dit=Path(model.dit(form).stem), tokenizer=model.tokenizer,
            **parts,
        ),
    )  # fmt: skip


def values(checkpoint: Checkpoint, component: str = "dit") -> dict[str, torch.Tensor]:
    found = {}
    for name, source in checkpoint.components[component].tensors.items():
        data = b"".join(bytes(piece) for piece in source.iter_converted("F32"))
        found[name] = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(source.shape)
    return found


@pytest.mark.parametrize("form", ["plain", "prefix", "diffusers"])
def test_parts_are_those_of_the_checkpoint(form: str, model: Model) -> None:
    found = from_comfyui(model, form)
    assert tensor_bytes(found) == tensor_bytes(model.checkpoint)
    assert found.layout == "ComfyUI"
    ours, theirs = found.config, model.checkpoint.config
    for name in ("task", "dit", "text_encoder", "vae"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("form", [form for form in SAFETENSORS if form.startswith("fp8")])
def test_eight_bits_are_what_the_file_says(form: str, t2v: Model) -> None:
    found = values(from_comfyui(t2v, form))
    assert found.keys() == t2v.tensors.keys()
    for name, tensor in t2v.tensors.items():
        expected = tensor.float()
        if is_linear(name, tensor):
            scale = torch.ones(()) if form == "fp8" else expected.abs().max() / 448
            expected = (expected / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("form", GGUF)
def test_gguf_files(form: str, tmp_path: Path) -> None:
    """Of the built-in model, whose rows are whole blocks of 32, and some of 256."""
    tensors = tensors_of(open_source("tiny").components["dit"])
    path = write_dit(tensors, tmp_path, "dit", form)
    part = open_part("dit", path)
    assert part.weights.tensors.keys() == tensors.keys()
    kinds = set()
    for tensor in gguf.GGUFReader(path).tensors:
        kinds.add(tensor.tensor_type.name)
        source = part.weights.tensors[tensor.name]
        data = b"".join(bytes(piece) for piece in source.iter_converted("F32"))
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("f4")
        assert data == expected.tobytes()
        assert source.shape == tensors[tensor.name].shape
    assert form in kinds


def test_blocks_of_4_bits_are_near_what_they_store() -> None:
    drawn = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)).numpy()
    back = gguf.quants.dequantize(quantize_q4_k(drawn), gguf.GGMLQuantizationType.Q4_K)
    assert ((back - drawn) ** 2).mean() < 0.008 * (drawn**2).mean()


def test_a_text_encoder_in_gguf(t2v: Model, tmp_path: Path) -> None:
    """With names of llama.cpp, and a prefix of none."""
    checkpoint = t2v.checkpoint
    tensors = tensors_of(checkpoint.components["text_encoder"])
    renamed = {TEXT_ENCODER_GGUF.to_diffusers(name) or name: t for name, t in tensors.items()}
    assert not set(renamed) & set(tensors)
    write_gguf(renamed, tmp_path / "umt5.gguf", GGUF["Q8_0"], "t5encoder")
    parts = PartPaths(text_encoder=tmp_path / "umt5.gguf", tokenizer=t2v.tokenizer)
    found = open_checkpoint(t2v.folder, parts=parts)
    assert found.config.text_encoder == checkpoint.config.text_encoder
    assert values(found, "text_encoder").keys() == tensors.keys()
    assert found.components["dit"].files == checkpoint.components["dit"].files


def test_everything_in_one_file(t2v: Model, tmp_path: Path) -> None:
    tensors = {PREFIX + name: tensor for name, tensor in t2v.tensors.items()}
    (encoder, vae) = sorted(t2v.comfyui.glob("[tv]*/*.safetensors"))
    for path, prefix in ((encoder, "text_encoders.umt5xxl.transformer."), (vae, "vae.")):
        tensors |= {prefix + name: tensor for name, tensor in load_file(path).items()}
    tensors["text_encoders.umt5xxl.transformer.spiece_model"] = torch.zeros(8, dtype=torch.uint8)
    save(tensors, tmp_path / "all.safetensors")
    shutil.copy(t2v.folder / "config.json", tmp_path)
    found = open_checkpoint(tmp_path / "all.safetensors", parts=PartPaths(tokenizer=t2v.tokenizer))
    assert tensor_bytes(found) == tensor_bytes(t2v.checkpoint)
    assert found.layout == "single file"


@pytest.mark.parametrize("kind", ["file", "shards", "diffusers", "link"])
def test_a_part_of_another_place(kind: str, t2v: Model, tmp_path: Path) -> None:
    """By its file or folder, through links too; the tokenizer stays the source's."""
    other = {name: tensor * 2 for name, tensor in t2v.tensors.items()}
    path = write_dit(other, tmp_path, "dit", "diffusers" if kind == "diffusers" else "plain")
    if kind == "shards":
        names = sorted(other)
        for number in range(2):
            shard = {n: load_file(path)[n] for n in names[number::2]}
            save_file(shard, tmp_path / f"model-{number + 1:05d}-of-00002.safetensors")
        index = {n: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, n in enumerate(names)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        path.unlink()
        path = tmp_path
    elif kind == "diffusers":
        shutil.copy(t2v.diffusers / "transformer" / "config.json", tmp_path)
        path = tmp_path
    elif kind == "link":
        (tmp_path / "hub").mkdir()
        shutil.copy(t2v.folder / "config.json", tmp_path / "hub")
        (tmp_path / "hub" / "dit.safetensors").symlink_to(path)
        path = tmp_path / "hub" / "dit.safetensors"
    if kind in ("file", "shards"):
        shutil.copy(t2v.folder / "config.json", tmp_path)
    found = open_checkpoint(t2v.folder, parts=PartPaths(dit=path))
    for name, tensor in values(found).items():
        assert torch.equal(tensor, other[name].float())
    assert found.tokenizer == TokenizerFile(path=t2v.tokenizer)
    assert found.config.dit == t2v.checkpoint.config.dit


def test_diffusers_reads_the_same_from_a_file(t2v: Model) -> None:
    """``from_single_file``, which takes original names."""
    config = str(t2v.diffusers / "transformer")
    path = t2v.dit("prefix")
    theirs = WanTransformer3DModel.from_single_file(str(path), config=config)
    ours = open_part("dit", path)
    state = theirs.state_dict()
    for name, source in ours.weights.tensors.items():
        data = b"".join(bytes(piece) for piece in source.iter_converted("F32"))
        found = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(source.shape)
        torch.testing.assert_close(found, state[DIT.to_diffusers(name) or name], rtol=0, atol=0)


def test_what_comfyui_keeps_beside_it_is_no_candidate(t2v: Model, tmp_path: Path) -> None:
    """Encoders and VAEs of other models, damaged files, and notes."""
    models = Path(shutil.copytree(t2v.comfyui, tmp_path / "models"))
    (models / "text_encoders" / "README.md").write_text("put encoders here")
    (models / "text_encoders" / "cut.safetensors").write_bytes(b"\x00" * 20)
    save(
        {"text_model.embeddings.weight": torch.zeros(2)}, models / "text_encoders" / "c.safetensors"
    )
    one_table = {
        name: tensor
        for name, tensor in load_file(models / "text_encoders" / "umt5.safetensors").items()
        if "relative_attention_bias" not in name or ".0." in name.partition("layer")[0]
    }
    save(one_table, models / "text_encoders" / "t5xxl.safetensors")
    save({"decoder.conv_in.weight": torch.zeros(2)}, models / "vae" / "sdxl.safetensors")
    wan22 = load_file(models / "vae" / "wan_2.1_vae.safetensors")
    wan22["decoder.upsamples.0.upsamples.0.residual.2.weight"] = torch.zeros(2)
    save(wan22, models / "vae" / "wan2.2_vae.safetensors")
    t2v.dit("plain")
    shutil.copytree(
        t2v.comfyui / "diffusion_models", models / "diffusion_models", dirs_exist_ok=True
    )
    parts = PartPaths(comfyui=tmp_path, dit=Path("wan-plain"), tokenizer=t2v.tokenizer)
    found = open_checkpoint(None, parts=parts)
    assert tensor_bytes(found) == tensor_bytes(t2v.checkpoint)


def parts_of(t2v: Model, **parts: Any) -> PartPaths:
    t2v.dit("plain")
    return PartPaths(comfyui=t2v.comfyui, tokenizer=t2v.tokenizer, **parts)


REFUSED: list[tuple[str, Any, type[WanxError], str]] = [
    ("a name", lambda m, p: (None, parts_of(m, dit=Path("wan-plan"))), UsageError,
     "has no diffusion model called wan-plan; did you mean wan-plain.safetensors"),
    ("no name", lambda m, p: (None, parts_of(m)), UsageError, "takes the name of a diffusion mod"),
    ("no folder", lambda m, p: (None, PartPaths(comfyui=p / "x")), UsageError, "is no folder"),
    ("another folder", lambda m, p: (None, PartPaths(comfyui=p)), CorruptInputError,
     "has no folder diffusion_models"),
    ("both", lambda m, p: (m.folder, parts_of(m)), UsageError, "takes no source beside it"),
    ("the folder itself", lambda m, p: (m.comfyui, PartPaths()), UsageError,
     "is ComfyUI's folder of models; choose one with --comfyui .* --dit NAME"),
    ("another part", lambda m, p: (m.folder, PartPaths(vae=m.dit("plain"))), UsageError,
     "holds a transformer, not a VAE; give it with --dit"),
    ("parts alone", lambda m, p: (None, PartPaths(dit=m.dit("plain"))), UsageError,
     "what was given has no text encoder; give one with --text-encoder, such as hf://Comfy-Org/"),
    ("one file", lambda m, p: (m.dit("plain"), PartPaths()), CorruptInputError,
     "wan-plain.safetensors has no text encoder; give one"),
    ("a missing file", lambda m, p: (m.folder, PartPaths(dit=p / "no.safetensors")),
     CorruptInputError, "no.safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "kind", "text"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_is_refused(
    given: Any, kind: type[WanxError], text: str, t2v: Model, tmp_path: Path
) -> None:
    source, parts = given(t2v, tmp_path)
    with pytest.raises(kind, match=text) as caught:
        open_checkpoint(source, parts=parts)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("two files for one part")
def test_two_files_for_one_part(t2v: Model, tmp_path: Path) -> None:
    models = Path(shutil.copytree(t2v.comfyui, tmp_path / "models"))
    write_dit(t2v.tensors, models / "diffusion_models", "wan", "plain")
    shutil.copy(models / "vae" / "wan_2.1_vae.safetensors", models / "vae" / "again.safetensors")
    parts = PartPaths(comfyui=models, dit=Path("wan"), tokenizer=t2v.tokenizer)
    with pytest.raises(UsageError, match=r"has 2 files for --vae: vae/again.* choose one with --v"):
        open_checkpoint(None, parts=parts)
    chosen = PartPaths(**(parts.__dict__ | {"vae": models / "vae" / "again.safetensors"}))
    assert open_checkpoint(None, parts=chosen).components["vae"].files[0].stem == "again"


@pytest.mark.fault("part that is nowhere")
def test_no_tokenizer(t2v: Model) -> None:
    t2v.dit("plain")
    parts = PartPaths(comfyui=t2v.comfyui, dit=Path("wan-plain"))
    with pytest.raises(
        CorruptInputError, match=r"brings no tokenizer; give tokenizer.json or spie"
    ):
        open_checkpoint(None, parts=parts)


def test_a_file_of_another_model(tmp_path: Path) -> None:
    save_file({"unet.x.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"holds no network of Wan2\.1: its tensors are"):
        open_parts(tmp_path / "w.safetensors")


def test_heads_that_no_published_model_has(t2v: Model, tmp_path: Path) -> None:
    path = write_dit(t2v.tensors, tmp_path, "dit", "plain")
    with pytest.raises(UsageError, match=r"no number of heads of 128 .*; put the config.json"):
        open_part("dit", path)


@pytest.mark.parametrize(
    "preset", ["t2v-1.3B", "i2v-14B", "flf2v-14B", "vace-1.3B", "vace-14B", "tiny"]
)
def test_sizes_of_published_models_need_no_config(preset: str, tmp_path: Path) -> None:
    """Told by names and shapes alone; the bytes are a hole in a file."""
    config = PRESETS[preset]
    shapes = {name: list(shape) for name, shape in expected_tensors(config)["dit"].items()}
    for name, channels in (
        ("patch_embedding.weight", config.dit.in_dim),
        ("vace_patch_embedding.weight", config.dit.vace_in_dim),
    ):
        if name in shapes:
            shapes[name] = [config.dit.dim, channels, 1, 2, 2]
    write_sparse(tmp_path / "dit.safetensors", shapes)
    found = open_part("dit", tmp_path / "dit.safetensors").config
    assert isinstance(found, DiTConfig)
    # Of an image the tokens are told by its encoder.
    assert replace(found, image_tokens=config.dit.image_tokens) == config.dit


@pytest.mark.parametrize(
    "name", ["sub/dit", "sub/dit.safetensors", "dit", "dit.safetensors", "{path}"]
)
def test_names_that_comfyui_shows(
    name: str, t2v: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without folder and suffix; a folder of that name elsewhere is another thing."""
    models = Path(shutil.copytree(t2v.comfyui, tmp_path / "models"))
    folder = models / "diffusion_models" / "sub"
    path = write_dit(t2v.tensors, folder, "dit", "plain")
    shutil.copy(t2v.folder / "config.json", folder)
    (tmp_path / "dit").mkdir()
    monkeypatch.chdir(tmp_path)
    parts = PartPaths(comfyui=models, dit=Path(name.format(path=path)), tokenizer=t2v.tokenizer)
    assert open_checkpoint(None, parts=parts).components["dit"].files == (path,)


def test_a_damaged_part_is_named_where_nothing_else_fits(t2v: Model, tmp_path: Path) -> None:
    models = Path(shutil.copytree(t2v.comfyui, tmp_path / "models"))
    (models / "text_encoders" / "umt5.safetensors").write_bytes(b"cut")
    t2v.dit("plain")
    shutil.copy(
        t2v.comfyui / "diffusion_models" / "wan-plain.safetensors", models / "diffusion_models"
    )
    parts = PartPaths(comfyui=models, dit=Path("wan-plain"), tokenizer=t2v.tokenizer)
    with pytest.raises(CorruptInputError, match=r"umt5.safetensors: 3 bytes are too few"):
        open_checkpoint(None, parts=parts)
