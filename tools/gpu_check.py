"""Run on this machine's GPU everything that needs one, and print one table.

Run it as ``python tools/gpu_check.py``, in an environment with the extra ``test``; it needs no
network. It runs the tests that are marked gpu, and those of the kernels, which elsewhere are
interpreted. It also asks TensorRT-RTX for an engine for this GPU, whether it names that GPU among
those that it builds for or not, as it does not SM90.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SUITES = {
    "marked gpu": ["-m", "gpu and not slow", "tests"],
    "kernels": ["-m", "not gpu and not slow", "tests/kernels"],
}
# A network of one product, built for whatever GPU is there.
RTX = """
from wanx.runtime.sessions.tensorrt.library import import_tensorrt
trt = import_tensorrt("tensorrt_rtx")
class Log(trt.ILogger):
    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            print(message)
log = Log()
builder = trt.Builder(log)
network = builder.create_network(0)
x = network.add_input("x", trt.float32, (64, 64))
y = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, x, trt.MatrixOperation.NONE)
network.mark_output(y.get_output(0))
plan = builder.build_serialized_network(network, builder.create_builder_config())
if plan is None:
    print("it builds no engine")
else:
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    print("it builds an engine, and", "loads it" if engine else "cannot load it")
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a test.

    Attributes:
        name: file and test.
        outcome: ``passed``, ``failed`` or ``skipped``.
        seconds: that it took.
        numbers: what it recorded, such as ``cosine 0.9994``; or why it did not pass.
    """

    name: str
    outcome: str
    seconds: float
    numbers: str


def results(report: Path) -> list[Result]:
    """Read what pytest wrote."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").removeprefix("tests.").replace(".", "/")
        properties = [f"{p.get('name')} {p.get('value')}" for p in case.iter("property")]
        outcome = "passed"
        for kind, called in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if (problem := case.find(kind)) is not None:
                outcome = called
                properties = [(problem.get("message") or "").partition("\n")[0][:120]]
        found.append(
            Result(
                name=f"{file}: {case.get('name')}", outcome=outcome,
                seconds=float(case.get("time", 0)), numbers=", ".join(properties),
            )
        )  # fmt: skip
    return found


def table(found: list[Result]) -> Table:
    """All tests that say something, and how many others passed."""
    told = [r for r in found if r.outcome != "passed" or r.numbers]
    shown = Table("test", "outcome", "seconds", "numbers or reason")
    for result in told:
        shown.add_row(result.name, result.outcome, f"{result.seconds:.1f}", result.numbers)
    silent = [r for r in found if r not in told]
    total = sum(r.seconds for r in silent)
    shown.add_row(f"{len(silent)} others", "passed", f"{total:.1f}", "")
    return shown


def run(arguments: list[str], report: Path) -> list[Result]:
    """Run pytest in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", f"--junitxml={report}"]
    subprocess.run([*command, *arguments], cwd=ROOT, check=False)
    return results(report) if report.exists() else []


def main() -> None:
    """Run and print; exit 1 if a test failed, 4 without a GPU."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: this needs an NVIDIA GPU, and PyTorch finds none here", file=sys.stderr)
        sys.exit(4)
    major, minor = torch.cuda.get_device_capability()
    console = Console()
    found: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in SUITES.items():
            found += run(arguments, Path(folder) / f"{name}.xml")
    console.print(f"{torch.cuda.get_device_name()} (SM{major}{minor}), PyTorch {torch.__version__}")
    console.print(table(found))
    done = subprocess.run(
        [sys.executable, "-c", RTX], cwd=ROOT, capture_output=True, text=True, check=False
    )
    answer = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
    console.print(f"TensorRT-RTX on SM{major}{minor}: {answer[-1]}")
    sys.exit(1 if not found or any(r.outcome == "failed" for r in found) else 0)


if __name__ == "__main__":
    main()
