"""Which nodes of our graphs ONNX Runtime has no CUDA kernel for, and that others are found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import InlinePass

import wanx
from tests.support.components import spec_of
from wanx.builtin import builtin_bundle
from wanx.bundle.reader import Bundle, open_bundle
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.components import ComponentSpec, component_specs
from wanx.exporter.graph.trace import trace
from wanx.exporter.quantization.quantized_spec import quantized_like_bundle
from wanx.exporter.targets.onnxruntime import cuda_kernels, narrow_weights
from wanx.exporter.targets.onnxruntime.cuda_kernels import (
    TABLE,
    MissingKernel,
    unsupported_nodes,
)
