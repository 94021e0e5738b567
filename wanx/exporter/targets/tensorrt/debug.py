"""Step of a component as graphs to compare between ONNX Runtime and TensorRT.

    python -m wanx.exporter.targets.tensorrt.debug BUNDLE --step blocks.3 -o debug

Two graphs are written with the weights of the step inside, and the numbers that a run brings to
it: ``engine.onnx`` as TensorRT parses it, and ``reference.onnx``, the same in fp32. The output of
each linear and convolution is an output of both, in fp32 and under its name in the model.
Polygraphy runs and compares them; docs/tensorrt.md has an example.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto

from wanx.builtin import open_named
from wanx.bundle.engine_schedule import EngineSchedule, Program
from wanx.bundle.golden_steps import GOLDEN, read_golden
from wanx.bundle.reader import Bundle
from wanx.errors import EnvironmentMismatchError, UsageError, WanxError
from wanx.exporter.components import ComponentSpec, component_specs
from wanx.exporter.graph.attach import IR_TYPES
from wanx.exporter.partition.partition import partition
from wanx.exporter.partition.segments import Partition, Segment
from wanx.exporter.quantization.quantized_spec import quantized_like_bundle
from wanx.exporter.targets.tensorrt.comparable import BATCH, with_layer_outputs
from wanx.exporter.targets.tensorrt.graph import OUTPUT, WEIGHT, segment_graph
from wanx.runtime.sessions.base import Array
from wanx.runtime.sessions.device.weight_files import StepWeights, copy_to_host, plan_weights

ENGINE, REFERENCE, INPUTS = "engine.onnx", "reference.onnx", "inputs.json"


def write_step(bundle: Bundle, component: str, step: str, folder: Path) -> Path:
    """Write both graphs of a step and its inputs.

    Args:
        bundle: whose weights are read; its engines are not.
        component: such as ``dit``.
        step: the prefix of its weights, such as ``blocks.3``, or its program where it has none.
        folder: a new one.

    Returns:
        The folder.

    Raises:
        EnvironmentMismatchError: Polygraphy, which reads the inputs, is not installed.
        UsageError: there is no such component or step, or the folder exists.
        WanxError: the bundle is damaged.
    """
    if find_spec("polygraphy") is None:
        raise EnvironmentMismatchError("Polygraphy is not installed; pip install 'wanx[debug]'")
    from polygraphy.json import save_json

    specs = {spec.name: spec for spec in component_specs(bundle.manifest.config)}
    if component not in specs:
        raise UsageError(f"--component {component}: there is none; choose {', '.join(specs)}")
    spec = quantized_like_bundle(specs[component], bundle.root, bundle.manifest)
    parts, high = partition(spec, torch.float32), partition(spec, torch.bfloat16)
    names = [each.prefix.rstrip(".") or each.program for each in parts.steps]
    if step not in names:
        raise UsageError(f"--step {step}: there is none; choose from {', '.join(names)}")
    if folder.exists():
        raise UsageError(f"{folder} exists; name a new folder")
    number = names.index(step)
    inputs = _inputs_of(bundle, spec, parts, number)
    program = parts.steps[number].program
    folder.mkdir(parents=True)
    for file, cuts in ((REFERENCE, parts), (ENGINE, high)):
        segment = cuts.segments[program]
        weights = _weights(_layout(bundle, spec, cuts)[number], segment)
        batched = [item.name for item in segment.inputs if item.shape[:1] == (BATCH,)]
        compared = with_layer_outputs(segment_graph(segment, cuts.axes), weights, inputs, batched)
        onnx.save_model(
            compared, folder / file, save_as_external_data=True, location=f"{file}.data"
        )
    save_json([inputs], str(folder / INPUTS))
    return folder


def _layout(bundle: Bundle, spec: ComponentSpec, parts: Partition) -> list[StepWeights]:
    """Lay out the weights of each step."""
    programs = {
        name: Program(file=f"{name}.engine", weights=segment.weights)
        for name, segment in parts.segments.items()
    }
    schedule = EngineSchedule(
        compiler="none",
        device="cpu",
        input_dtypes=parts.input_dtypes,
        programs=programs,
        steps=parts.steps,
    )
    files = [bundle.held(file) for file in bundle.manifest.components[spec.name].weights]
    return plan_weights(schedule, files, spec.name)


def _weights(step: StepWeights, segment: Segment) -> dict[str, TensorProto]:
    memory = np.empty(max(1, step.size), np.uint8)
    copy_to_host(step, memory.ctypes.data)
    weights = {}
    for (name, parameter), weight, offset in zip(
        segment.parameters, segment.weights, step.offsets, strict=True
    ):
        size = parameter.numel() * parameter.element_size()
        weights[name] = TensorProto(
            data_type=int(IR_TYPES[weight.dtype]),
            dims=weight.shape,
            raw_data=memory[offset : offset + size].tobytes(),
        )
    return weights


def _inputs_of(
    bundle: Bundle, spec: ComponentSpec, parts: Partition, number: int
) -> dict[str, Array]:
    """Compute the step's inputs, by running all earlier steps in fp32 in ONNX Runtime."""
    values = _feeds(bundle, spec)
    layout = _layout(bundle, spec, parts)
    sessions: dict[str, onnxruntime.InferenceSession] = {}
    for step, stored in zip(parts.steps[:number], layout, strict=False):
        segment = parts.segments[step.program]
        if step.program not in sessions:
            model = segment_graph(segment, parts.axes).SerializeToString()
            sessions[step.program] = onnxruntime.InferenceSession(
                model, providers=["CPUExecutionProvider"]
            )
        names = [item.name for item in segment.inputs]
        feeds = {n: _value(values[of]) for n, of in zip(names, step.inputs, strict=True)}
        for name, tensor in _weights(stored, segment).items():
            feeds[f"{WEIGHT}{name}"] = _stored_value(tensor)
        outputs = [f"{OUTPUT}{name}" for name in segment.outputs]
        results = sessions[step.program].run_with_ort_values(outputs, feeds)
        values |= {n: v.numpy() for n, v in zip(step.outputs, results, strict=True)}
    step = parts.steps[number]
    names = [item.name for item in parts.segments[step.program].inputs]
    return {name: values[of] for name, of in zip(names, step.inputs, strict=True)}


def _feeds(bundle: Bundle, spec: ComponentSpec) -> dict[str, Array]:
    """Inputs of a component: a golden step's for the denoiser, else noise and token ids."""
    if spec.name == "dit" and GOLDEN in bundle.manifest.files:
        *_, (_, _, inputs) = read_golden(bundle.held(GOLDEN)).samples()
        return dict(inputs)
    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for item in (*spec.inputs, *spec.caches):
        shape = tuple(item.example(spec.axes, "meta").shape)
        if item.dtype == torch.int64:
            vocabulary = bundle.manifest.config.text_encoder.vocab_size
            feeds[item.name] = generator.integers(0, vocabulary, shape)
        else:
            feeds[item.name] = generator.standard_normal(shape, np.float32)
    return feeds


def _value(array: Array) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _stored_value(tensor: TensorProto) -> onnxruntime.OrtValue:
    array = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor))
    if tensor.data_type == TensorProto.FLOAT8E4M3FN:
        make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
        return make(array.view(np.uint8), tensor.data_type)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def commands(folder: Path, target: str) -> list[str]:
    """Commands of Polygraphy to run next.

    Args:
        folder: from :func:`write_step`.
        target: ``rtx`` or ``tensorrt``.
    """
    reference, engine, inputs, saved_outputs = (
        str(folder / name) for name in (REFERENCE, ENGINE, INPUTS, "reference-outputs.json")
    )
    rtx = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if target == "rtx" else ""
    first = ["polygraphy", "run", reference, "--onnxrt"]
    second = ["polygraphy", "run", engine, "--trt"]
    threshold = ["--compare", "cosine_similarity", "--cosine-similarity-threshold", "0.999"]
    load = ["--load-inputs", inputs]
    profile = _profile(onnx.load(engine, load_external_data=False))
    return [
        shlex.join([*first, *load, "--save-outputs", saved_outputs]),
        rtx + shlex.join([*second, *load, "--load-outputs", saved_outputs, *threshold, *profile]),
    ]


def _profile(graph: onnx.ModelProto) -> list[str]:
    """Options for batches of 1 and 2: TensorRT-RTX 1.7 dies of some graphs without such an axis."""
    sizes = {item.name: list(item.type.tensor_type.shape.dim) for item in graph.graph.input}
    shapes = {
        name: [dim.dim_value for dim in dims[1:]]
        for name, dims in sizes.items()
        if dims and dims[0].dim_param == BATCH
    }
    words: list[str] = []
    for option, batch in (("min", 1), ("opt", 1), ("max", 2)) if shapes else ():
        words.append(f"--trt-{option}-shapes")
        for name, rest in shapes.items():
            words.append(f"{name}:{json.dumps([batch, *rest], separators=(',', ':'))}")
    return words


def main() -> None:
    """Parse, write, say what to run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--component", default="dit", help="dit unless given")
    parser.add_argument("--step", default="blocks.0", help="such as embed; blocks.0 unless given")
    parser.add_argument("--target", choices=("rtx", "tensorrt"), default="rtx", help="rtx or other")
    parser.add_argument("-o", "--output", type=Path, default=Path("debug"), help="a new folder")
    arguments = parser.parse_args()
    try:
        bundle = open_named(arguments.bundle)
        folder = write_step(bundle, arguments.component, arguments.step, arguments.output)
    except (WanxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    print("\n".join(commands(folder, arguments.target)))


if __name__ == "__main__":
    main()
