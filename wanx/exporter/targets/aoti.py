"""The ``aoti`` target: AOTInductor packages for the GPU of this machine, or its processor.

On a GPU the ``wanx::`` ops are Triton kernels inside the packages; on the processor, where this
target is for tests, their references. The weights stay in the bundle's own files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from wanx.bundle.engine_schedule import SCHEDULE, EngineSchedule, Program
from wanx.bundle.manifest import Component
from wanx.errors import EnvironmentMismatchError, WanxError
from wanx.exporter.graph.trace import quiet_exporters
from wanx.exporter.partition.segments import STORED, Partition, Segment
from wanx.exporter.partition.stateless import export_segment
from wanx.exporter.targets.base import Builder, OnFraction, no_fraction
from wanx.kernels.timing import interleaved, medians

_TRIAL_TOKENS = (512, 2048, 8192, 32768)
_WORTH_IT = 0.97  # of the time in turn


def device_name() -> str:
    """Name the device of this machine's packages: ``cpu``, or a GPU such as ``sm90``.

    Raises:
        EnvironmentMismatchError: a C++ compiler is missing, which AOTInductor calls.
    """
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise EnvironmentMismatchError(
            "--target aoti needs a C++ compiler and found neither g++ nor clang++; install one "
            "(apt install g++), or choose --target cpu"
        )
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


class AotiBuilder(Builder):
    """Compiler of packages for this machine's GPU, or its processor."""

    def __init__(self) -> None:
        """Look for the device.

        Raises:
            EnvironmentMismatchError: as :func:`device_name`.
        """
        self._device = device_name()

    @property
    def device(self) -> str:
        """``cpu``, or a GPU such as ``sm90``."""
        return self._device

    @property
    def fingerprint(self) -> str:
        """PyTorch and its version."""
        return f"torch {torch.__version__}"

    def compute_dtype(self, group: str, component: Component) -> torch.dtype:
        """Return the type that most of a component's weights are stored in.

        The processor and the VAE compute in fp32, as the reference runs the VAE; around 8-bit
        layers a GPU computes in bf16.
        """
        if group == "vae" or not torch.cuda.is_available():
            return torch.float32
        if component.quantization is not None:
            return torch.bfloat16
        wide = (torch.float32, torch.bfloat16, torch.float16)
        return max(wide, key=lambda dtype: component.storage.get(STORED[dtype], 0))

    def build(
        self, component: str, parts: Partition, folder: Path, on_fraction: OnFraction = no_fraction
    ) -> EngineSchedule:
        """Compile a component; see :meth:`Builder.build`.

        Raises:
            WanxError: a program does not compile.
        """
        folder.mkdir(parents=True)
        programs = {}
        for done, (name, segment) in enumerate(parts.segments.items()):
            on_fraction(done / len(parts.segments))
            _compile(segment, parts.axes, self.device, folder / f"{name}.pt2", component)
            programs[name] = Program(file=f"{name}.pt2", weights=segment.weights)
        schedule = EngineSchedule(
            compiler=self.fingerprint,
            device=self.device,
            input_dtypes=parts.input_dtypes,
            batched=parts.batched,
            max_batched_tokens=_max_batched_tokens(parts, self.device, folder),
            programs=programs,
            steps=parts.steps,
        )
        (folder / SCHEDULE).write_text(schedule.to_json(), encoding="utf-8")
        return schedule


def _max_batched_tokens(parts: Partition, device: str, folder: Path) -> int:
    """Measure up to how many tokens a block is faster on two batch entries than on each in turn."""
    segment = parts.segments.get("block")
    if segment is None or "B" not in (item.shape[0] for item in segment.inputs if item.shape):
        return 0
    where = _torch_device(device)
    program = torch._inductor.aoti_load_package(str(folder / "block.pt2"))
    weights = [
        _random(parameter.shape, parameter.dtype, where) for _, parameter in segment.parameters
    ]
    limit = 0
    for tokens in _TRIAL_TOKENS if device != "cpu" else _TRIAL_TOKENS[:1]:
        one, two = (
            [
                _random(item.example({"B": batch, "L": tokens}, "meta").shape, item.dtype, where)
                for item in segment.inputs
            ]
            for batch in (1, 2)
        )
        calls = _calls(program, one, two, weights)
        in_turn, at_once = medians(interleaved(calls, where, rounds=5))
        if at_once > in_turn * _WORTH_IT:
            break
        limit = tokens
    return limit


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw realistic numbers: a GPU runs faster on zeros."""
    normal = torch.randn(shape, device=device)
    return (normal * 40).clamp(-127, 127).to(dtype) if dtype == torch.int8 else normal.to(dtype)


def _calls(
    program: Callable[..., object], one: list[Tensor], two: list[Tensor], weights: list[Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    def in_turn() -> None:
        program(*one, *weights)
        program(*one, *weights)

    def at_once() -> None:
        program(*two, *weights)

    return in_turn, at_once


def _compile(
    segment: Segment, axes: dict[str, int], device: str, path: Path, component: str
) -> None:
    try:
        with quiet_exporters(), torch.no_grad(), _fp8_header(device):
            program = export_segment(segment, axes, _torch_device(device))
            # On the processor the calls between kernels are no hot spot, but most of the compiling.
            options = {"aot_inductor.compile_wrapper_opt_level": "O0"} if device == "cpu" else {}
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=options
            )
    except Exception as error:
        text = " ".join(str(error).split())
        raise WanxError(
            f"cannot compile {segment.name} of {component} ({type(error).__name__}: {text:.200}); "
            "WANX_DEBUG=1 shows all of it, and --target cpu needs no compiler"
        ) from error


@contextmanager
def _fp8_header(device: str) -> Iterator[None]:
    """Include the header of 8-bit floats in the C++ that calls a processor's kernels.

    Before PyTorch 2.13 that file names ``at::Float8_e4m3fn`` without it.
    """
    if device != "cpu" or TorchVersion(torch.__version__) >= "2.13":
        yield
        return
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    write: Callable[[CppWrapperCpu], None] = CppWrapperCpu.write_header

    def write_header(wrapper: CppWrapperCpu) -> None:
        write(wrapper)
        wrapper.header.splice("#include <torch/headeronly/util/Float8_e4m3fn.h>")

    with patch.object(CppWrapperCpu, "write_header", write_header):
        yield


def _torch_device(name: str) -> torch.device:
    return torch.device("cpu" if name == "cpu" else "cuda")
