from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from wanx.errors import EnvironmentMismatchError
from wanx.runtime.sessions.tensorrt.library import import_tensorrt

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx_libs") is None or sys.platform != "linux",
    reason="TensorRT for RTX is not installed",
)
# The least graph with a plug-in, at which a parser that finds no library aborts.
PARSE = """
import onnx
from onnx import helper
from wanx.runtime.sessions.tensorrt.library import import_tensorrt
from wanx.runtime.sessions.tensorrt.plugin import register
trt = import_tensorrt("tensorrt_rtx")
class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        super().__init__()
        self.name, self.plugin_namespace, self.plugin_version = "Foo", "", "1"
        self.field_names = trt.PluginFieldCollection([])
    def create_plugin(self, *given):
        return made
class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild):
    def __init__(self):
        for base in Plugin.__bases__:
            base.__init__(self)
        self.plugin_name, self.plugin_namespace, self.plugin_version = "Foo", "", "1"
        self.num_outputs = 1
    def get_capability_interface(self, kind):
        return self
    def get_output_data_types(self, types):
        return types
    def get_output_shapes(self, inputs, shapes, builder):
        return [inputs[0]]
    def clone(self):
        return Plugin()
made, creator = Plugin(), Creator()
assert trt.get_plugin_registry().register_creator(creator, "")
value = [helper.make_tensor_value_info(name, 1, [2, 3]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Foo", ["x"], ["y"])], "g", value[:1], value[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
log = trt.Logger(trt.Logger.ERROR)
network = trt.Builder(log).create_network(0)
assert trt.OnnxParser(network, log).parse(model.SerializeToString())
print("parsed")
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {n: v for n, v in os.environ.items() if n not in ("LD_LIBRARY_PATH", "XDG_CACHE_HOME")}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@needs_rtx
def test_the_parser_finds_the_library(tmp_path: Path) -> None:
    for _ in range(2):  # the links are there the second time
        done = run(PARSE, XDG_CACHE_HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert done.stdout == "parsed\n"
    (links,) = (tmp_path / "wanx" / "tensorrt").iterdir()
    assert len(list(links.iterdir())) == 3
    assert all(link.is_symlink() for link in links.iterdir())


@needs_rtx
def test_a_link_that_leads_nowhere_is_laid_anew(tmp_path: Path) -> None:
    assert run(PARSE, XDG_CACHE_HOME=str(tmp_path)).returncode == 0
    (links,) = (tmp_path / "wanx" / "tensorrt").iterdir()
    for link in links.iterdir():
        link.unlink()
        link.symlink_to("/nowhere/libtensorrt_rtx.so")
    done = run(PARSE, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr


@needs_rtx
def test_no_cache_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(PARSE, XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


@needs_rtx
def test_an_import_that_came_first_is_refused(tmp_path: Path) -> None:
    done = run(f"import tensorrt_rtx\n{PARSE}", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "was imported before wanx" in done.stderr.splitlines()[-1]


@needs_rtx
def test_an_import_that_came_first_does_where_nothing_is_parsed(tmp_path: Path) -> None:
    code = PARSE.partition("class Creator")[0].replace('rtx")', 'rtx", parses=False)')
    done = run(f"import tensorrt_rtx\n{code}", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_flavour_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    import_tensorrt.cache_clear()
    with pytest.raises(EnvironmentMismatchError, match="tensorrt is not installed; pip install"):
        import_tensorrt("tensorrt")
