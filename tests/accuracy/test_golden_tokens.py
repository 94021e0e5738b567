"""Golden tokens: against the tokenizers library, and tokenizers that are not what they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import wanx
from tests.runtime.test_text import CANNOT_ENCODE, tokenizer_of
from tests.support.golden_bundles import update_hashes
from wanx.accuracy.golden_tokens import GOLDEN_TOKENS, PROBE, check_golden_tokens
from wanx.builtin import BUILTIN, builtin_bundle
from wanx.bundle.manifest import TOKENIZER
from wanx.bundle.publish import write_manifest
from wanx.bundle.reader import open_bundle, read_bundle
from wanx.checkpoints.checkpoint import open_checkpoint
from wanx.errors import CorruptInputError, GateError
from wanx.exporter.export import export
from wanx.exporter.options import ExportOptions


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(builtin_bundle(), tmp_path / "b"))


@pytest.mark.parametrize("name", BUILTIN)
def test_ids_are_those_of_the_library(name: str) -> None:
    root = builtin_bundle(name)
    golden = json.loads((root / GOLDEN_TOKENS).read_text())
    tokenizer = Tokenizer.from_file(str(root / TOKENIZER))
    tokenizer.no_padding()
    assert golden == {"text": PROBE, "ids": tokenizer.encode(PROBE).ids}
    check_golden_tokens(open_bundle(root, allow_hard_links=True))


def other_ids(golden: dict[str, Any]) -> None:
    golden["ids"][3] += 1
    golden["ids"].append(1)


def no_ids(golden: dict[str, Any]) -> None:
    del golden["ids"]


def false_ids(golden: dict[str, Any]) -> None:
    golden["ids"] = [True, 1.5]


def no_text(golden: dict[str, Any]) -> None:
    golden["text"] = None


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (other_ids, GateError, "2 other token ids than at the export"),
        (no_ids, CorruptInputError, "holds no text and its ids"),
        (false_ids, CorruptInputError, "holds no text and its ids"),
        (no_text, CorruptInputError, "holds no text and its ids"),
    ],
)
def test_other_golden_tokens(
    bundle: Path,
    change: Callable[[dict[str, Any]], None],
    kind: type[GateError | CorruptInputError],
    words: str,
) -> None:
    golden = json.loads((bundle / GOLDEN_TOKENS).read_text())
    change(golden)
    (bundle / GOLDEN_TOKENS).write_text(json.dumps(golden))
    update_hashes(bundle)
    verification = wanx.verify(bundle, threads=1)
    assert verification.intact
    with pytest.raises(kind, match=words):
        verification.require_accuracy()


def test_the_advice_names_the_version_of_the_export(bundle: Path) -> None:
    golden = json.loads((bundle / GOLDEN_TOKENS).read_text())
    other_ids(golden)
    (bundle / GOLDEN_TOKENS).write_text(json.dumps(golden))
    update_hashes(bundle)
    manifest = read_bundle(bundle).manifest
    others = {name: v for name, v in manifest.provenance.tools.items() if name != "tokenizers"}
    for version, advice in (
        ({}, r"tokenizers .*; export the bundle again"),
        ({"tokenizers": "0.19.1"}, r"pip install tokenizers==0\.19\.1, or export"),
    ):
        provenance = manifest.provenance.model_copy(update={"tools": others | version})
        write_manifest(bundle, manifest.model_copy(update={"provenance": provenance}))
        with pytest.raises(GateError, match=advice):
            check_golden_tokens(open_bundle(bundle))


@pytest.mark.parametrize("kind", ["no unknown word", "a panic"])
@pytest.mark.parametrize("golden", [True, False])
@pytest.mark.fault("tokenizer that cannot encode")
def test_a_signed_tokenizer_that_cannot_encode(bundle: Path, kind: str, golden: bool) -> None:
    """Bundles of before have no golden tokens, and are given the probe."""
    tokenizer_of(bundle / TOKENIZER, CANNOT_ENCODE[kind][0])
    if not golden:
        (bundle / GOLDEN_TOKENS).unlink()
    update_hashes(bundle)
    verification = wanx.verify(bundle, threads=1)
    assert verification.intact
    with pytest.raises(CorruptInputError, match="cannot encode") as caught:
        verification.require_accuracy()
    assert f"{bundle}/{TOKENIZER}" in str(caught.value)
    with pytest.raises(CorruptInputError, match="cannot encode") as caught:
        wanx.load(bundle, threads=1)("a red 猫", steps=1, frames=1)
    assert f"{bundle}/{TOKENIZER}" in str(caught.value)
    assert wanx.verify(bundle, golden=False).text_error is None


def test_a_tokenizer_of_another_model(bundle: Path) -> None:
    changes = {"model": {"type": "WordLevel", "vocab": {"<pad>": 0, "</s>": 1, "<unk>": 92},
                         "unk_token": "<unk>"}}  # fmt: skip
    tokenizer_of(bundle / TOKENIZER, changes)
    update_hashes(bundle)
    with pytest.raises(CorruptInputError, match=r"token id 92, and the text encoder knows 92"):
        check_golden_tokens(open_bundle(bundle))


@pytest.mark.parametrize("kind", [*CANNOT_ENCODE, "no model"])
@pytest.mark.fault("tokenizer that cannot encode")
def test_an_export_refuses_it_before_anything_else(
    kind: str, checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(checkpoint_of("t2v"), tmp_path / "source"))
    path = open_checkpoint(source).tokenizer.path
    if kind == "no model":
        path.write_text('{"model": {}}')
    else:
        tokenizer_of(path, CANNOT_ENCODE[kind][0])
    monkeypatch.setattr("wanx.exporter.trace_component.trace", None)  # nothing may call it
    if kind == "backtracking":  # only other texts make it fail
        monkeypatch.setattr("wanx.accuracy.golden_tokens.PROBE", "a" * 28 + "b")
    with pytest.raises(CorruptInputError, match=r"cannot encode|is not a tokenizer") as caught:
        export(ExportOptions(source=source, output=tmp_path / "made", precision="fp32"))
    assert str(path) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
