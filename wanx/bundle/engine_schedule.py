"""Schedule of an engine: compiled programs, the weights they read, and the order they run in.

A component is cut into programs that hold no weights, so that equal blocks share one. The schedule
is the JSON file beside them, ``plan.json``; like a manifest, it may come from anywhere, and
everything in it is bounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from wanx.bundle.manifest import Count, Text
from wanx.bundle.record import Record, first_problem
from wanx.config.number_formats import GRAPH_INPUTS, WEIGHTS, one_of
from wanx.errors import CorruptInputError
from wanx.files.input_file import open_input

SCHEDULE = "plan.json"
MAX_BYTES = 8 << 20

Name = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_.]{1,128}$")]
FileName = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,64}[.](pt2|engine)$")]
Size = Annotated[int, Field(ge=0, le=1 << 31)]
StoredType = Annotated[str, StringConstraints(pattern=one_of(row.safetensors for row in WEIGHTS))]
InputType = Annotated[
    str, StringConstraints(pattern=one_of(row.safetensors for row in GRAPH_INPUTS))
]


class Weight(Record):
    """One weight of a program: its type and shape there, and the tensors it comes from.

    Several ``sources`` lie one after the other along the first axis. They are names in the weight
    files without the prefix of a step.
    """

    sources: Annotated[tuple[Name, ...], Field(min_length=1, max_length=8)]
    dtype: StoredType
    shape: Annotated[tuple[Size, ...], Field(max_length=6)]


class Program(Record):
    """One compiled file; it takes the inputs of a step, then these weights in this order.

    ``layers`` counts layers by kind, from the build log; empty for aoti.
    """

    file: FileName
    weights: tuple[Weight, ...]
    layers: dict[Text, Count] = Field(default_factory=dict)


class Step(Record):
    """One call of a program: ``prefix`` goes before the names of its weights."""

    program: Name
    prefix: Annotated[str, StringConstraints(pattern="^([a-z0-9_]+[.])*$", max_length=128)] = ""
    inputs: tuple[Name, ...]
    outputs: tuple[Name, ...]


class EngineSchedule(Record):
    """Programs and steps of a component.

    Two fields have other names in the file: ``types`` and ``batch_limit``.

    Attributes:
        schema_version: of this format.
        compiler: what compiled it, such as ``torch 2.13.0``.
        device: what it was compiled for: ``cpu``, an NVIDIA GPU such as ``sm90``, several such as
            ``sm89+sm120``, or one and all newer ones, ``sm80+``.
        input_dtypes: per graph input, the type that its program takes.
        batched: graph inputs whose first axis is the batch.
        max_batched_tokens: most tokens with which two batch entries are faster at once than in
            turn.
        programs: by name.
        steps: in order; a value that a step makes replaces one of that name.
    """

    schema_version: Literal[1] = 1
    compiler: Text
    device: Annotated[str, StringConstraints(pattern="^(cpu|sm[0-9]{2,3}([+]sm[0-9]{2,3})*[+]?)$")]
    input_dtypes: Annotated[
        dict[Name, InputType], Field(validation_alias="types", serialization_alias="types")
    ]
    batched: tuple[Name, ...] = ()
    max_batched_tokens: Annotated[
        Size, Field(validation_alias="batch_limit", serialization_alias="batch_limit")
    ] = 0
    programs: dict[Name, Program]
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=1024)]

    @model_validator(mode="after")
    def _steps_can_run(self) -> Self:
        known = set(self.input_dtypes)
        for step in self.steps:
            if step.program not in self.programs:
                raise ValueError(f"a step runs {step.program}, which is no program")
            for name in step.inputs:
                if name not in known:
                    raise ValueError(f"{step.program} reads {name}, which nothing makes")
            known.update(step.outputs)
        return self

    def to_json(self) -> str:
        """Text of the file; :func:`read_schedule` reads it."""
        return self.model_dump_json(indent=1, by_alias=True)


def read_schedule(path: Path) -> EngineSchedule:
    """Read a schedule.

    Raises:
        CorruptInputError: the file is not one that a build writes.
        WanxError: the file cannot be read.
    """
    with open_input(path) as file:
        data = file.read(MAX_BYTES + 1)
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        return EngineSchedule.model_validate_json(data)
    except ValidationError as error:
        reason = first_problem(error, "schedule")
    except ValueError as error:
        reason = str(error)
    raise CorruptInputError(f"{path}: not the schedule of an engine: {reason:.240}; build it again")
