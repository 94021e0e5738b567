"""Options of an export, and their resolution for one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from wanx.checkpoints.checkpoint import NO_PARTS, Checkpoint, PartPaths
from wanx.checkpoints.lora.fuse import Lora
from wanx.checkpoints.tensors.source import TensorSource
from wanx.config import number_formats
from wanx.config.models import ModelConfig, Task
from wanx.config.number_formats import BY_SAFETENSORS, FLOATS
from wanx.errors import UsageError
from wanx.exporter.calibration.options import (
    CalibrationOptions,
    PlannedRuns,
    golden_only,
    planned_runs,
)
from wanx.exporter.packages import require_packages
from wanx.exporter.quantization.scheme import SCHEMES, WEIGHT_ONLY, QuantizeOptions, Scheme
from wanx.exporter.targets.registry import parse_target
from wanx.runtime.resolve_sampling import find_preset

PRECISIONS = tuple(row.name for row in number_formats.PRECISIONS)
STORED_TYPES = {row.name: row.safetensors for row in FLOATS}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export as the user gave them.

    Attributes:
        source: folder of a checkpoint or a bundle, a file of weights, ``owner/name`` on the hub, or
            ``tiny`` for the built-in model, which None stands for unless parts are given.
        revision: branch, tag or commit of a source on the hub; None is the main branch.
        parts: in the place of the source's.
        loras: put into the weights of the DiT before anything else; texts are those of ``--lora``.
        output: folder of the bundle; None names it after the model and the precision.
        precision: type that the DiT and the text encoder are stored in; ``auto`` keeps each as it
            is. The VAE and the image encoder always keep their types: next to the others they are
            small, and the reference runs the VAE in fp32. ``int8`` and ``fp8`` quantise the linears
            of the DiT's blocks, and the weights of the text encoder to int8; the rest keeps its
            bytes.
        target: what runs the bundle.
        task: what the checkpoint must be for; None takes what it is.
        force: replace a bundle that is already there.
        quantize: how int8 and fp8 quantise.
        calibration: what they, and the golden steps of any precision, are found with.
        graph_cache: take graphs that were traced before, and keep new ones.
        gate: run the golden steps before the bundle is published, and fail below the gate.
        preset: of :data:`wanx.config.presets.RUN_PRESETS` that the bundle runs by; None keeps the
            source's, ``none`` leaves it out.
        calibrate_cache: measure what skipping steps costs, and put the table into the bundle.
    """

    source: str | Path | None = None
    revision: str | None = None
    parts: PartPaths = NO_PARTS
    loras: tuple[Lora | str, ...] = ()
    output: Path | None = None
    precision: str = "auto"
    target: str = "cpu"
    task: Task | None = None
    force: bool = False
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    gate: bool = False
    graph_cache: bool = True
    preset: str | None = None
    calibrate_cache: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no export has.

        Raises:
            UsageError: an unknown precision or target.
        """
        known = ("auto", *PRECISIONS)
        if self.precision not in known:
            raise UsageError(
                f"--precision {self.precision} is not available; choose {', '.join(known)}"
            )
        parse_target(self.target)
        if self.gate and not self.calibration.golden_steps:
            raise UsageError("--gate runs the golden steps, and --golden-steps 0 makes none")
        if self.precision in SCHEMES:
            self.quantize.check(self.precision)
        elif self.quantize != QuantizeOptions():
            raise UsageError(
                f"--precision {self.precision} quantises nothing; choose int8 or fp8, or leave "
                "out what is for them"
            )


@dataclass(frozen=True, kw_only=True)
class ResolvedExport:
    """An export of one checkpoint, with nothing left open.

    Attributes:
        checkpoint: where the weights come from.
        output: folder of the bundle.
        precision: the type that the DiT is stored in.
        storage: safetensors type per group of weights; None keeps each tensor's own.
        scheme: number format of 8-bit layers; None where there are none.
        options: as the user gave them.
        eight_bit: per group, the tensors that the scheme would store in 8 bits.
        runs: runs with their inputs, to calibrate with or to record golden steps from.
    """

    checkpoint: Checkpoint
    output: Path
    precision: str
    storage: dict[str, str | None]
    scheme: Scheme | None
    options: ExportOptions
    eight_bit: dict[str, frozenset[str]]
    runs: PlannedRuns

    def stored_type(self, group: str, tensor: TensorSource) -> str:
        """Type in which a tensor of a group of weights is written."""
        return self.storage[group] or tensor.storage

    def weight_bytes(self, group: str) -> int:
        """Size of a group of weights in the bundle."""
        eight_bit = self.eight_bit.get(group, frozenset())
        per_tensor = group == "dit" and self.options.quantize.weight_scale == "tensor"
        total = 0
        for name, tensor in self.checkpoint.components[group].tensors.items():
            count = tensor.nbytes * 8 // BY_SAFETENSORS[tensor.dtype].bits
            if name in eight_bit:
                scheme = self.scheme if group == "dit" else SCHEMES[WEIGHT_ONLY]
                assert scheme is not None
                total += scheme.format.nbytes(count)
                total += 4 * (1 if per_tensor else tensor.shape[0])  # and scales
            else:
                total += BY_SAFETENSORS[self.stored_type(group, tensor)].nbytes(count)
        return total


def resolve(options: ExportOptions, checkpoint: Checkpoint) -> ResolvedExport:
    """Decide what ``auto`` stands for, which tensors can be 8-bit, and what calibrates.

    Raises:
        UsageError: a pattern of ``--skip-layers`` matches no layer, or all of them; or the preset
            is not for this model.
        WanxError: as :func:`~wanx.exporter.calibration.options.planned_runs`.
    """
    if options.preset is not None:
        config = checkpoint.config
        preset = find_preset(options.preset, config)
        defaults = replace(config.defaults, preset=None if preset is None else preset.name)
        checkpoint = replace(checkpoint, config=replace(config, defaults=defaults))
    scheme = SCHEMES.get(options.precision)
    if scheme is not None:
        stored: str | None = None
        precision = options.precision
    elif options.precision != "auto":
        stored = STORED_TYPES[options.precision]
        precision = options.precision
    else:
        stored = None
        sizes: dict[str, int] = {}
        for tensor in checkpoint.components["dit"].tensors.values():
            sizes[tensor.storage] = sizes.get(tensor.storage, 0) + tensor.nbytes
        most = max(sizes, key=lambda dtype: sizes[dtype])
        precision = next(name for name, dtype in STORED_TYPES.items() if dtype == most)
    eight_bit = {} if scheme is None else _eight_bit(checkpoint, options.quantize)
    return ResolvedExport(
        checkpoint=checkpoint,
        output=options.output or Path(f"{checkpoint.config.name}-{precision}"),
        precision=precision,
        storage={"dit": stored, "text_encoder": stored, "vae": None, "image_encoder": None},
        scheme=scheme,
        options=options,
        eight_bit=eight_bit,
        runs=_runs(options.calibration, checkpoint.config, calibrates="dit" in eight_bit),
    )


def _runs(options: CalibrationOptions, config: ModelConfig, *, calibrates: bool) -> PlannedRuns:
    if not calibrates:
        if not options.golden_steps:
            return ()
        options = golden_only(options)
    return planned_runs(options, config)


def _eight_bit(checkpoint: Checkpoint, options: QuantizeOptions) -> dict[str, frozenset[str]]:
    require_packages("quantise")
    from wanx.exporter.quantization.recipe import dit_candidates, require_matches, text_recipe

    config = checkpoint.config
    candidates, unquantized = dit_candidates(config.dit, options)
    require_matches(options.skip_layers, (*candidates, *unquantized))
    tensors = {
        "dit": frozenset(f"{layer}.weight" for layer in candidates),
        "text_encoder": text_recipe(config.text_encoder).weights,
    }
    return {group: names for group, names in tensors.items() if group in options.components}
