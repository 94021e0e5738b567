"""The DiT in PyTorch with the weights of one block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wanx.checkpoints.tensors.source import TensorSource
from wanx.checkpoints.weights import check_tensors
from wanx.config.models import DiTConfig
from wanx.config.number_formats import FLOATS
from wanx.errors import UsageError, WanxError
from wanx.exporter.components import dit_spec
from wanx.models.dit.model import DiTState, WanDiT

Watch = Callable[[nn.Module, str], AbstractContextManager[object]]
OnBlock = Callable[[int, int], None]
Step = Callable[[DiTState, int], DiTState]

_DTYPES = {row.safetensors: getattr(torch, row.torch) for row in FLOATS}
_STACKS = ("vace_blocks", "blocks")


def read_fp32(source: TensorSource, out: Tensor) -> None:
    """Fill ``out``, a contiguous fp32 tensor on any device, with the numbers of ``source``.

    Raises:
        CorruptInputError: a number is not finite, or the file ended early.
    """
    flat, end = out.view(-1), 0
    for piece in source.iter_bytes():
        source.require_finite(piece)
        part = torch.frombuffer(piece, dtype=_DTYPES[source.dtype])
        start, end = end, end + len(part)
        flat[start:end].copy_(part.to(out.device))
    assert end == len(flat)


class BlockwiseDiT:
    """The denoiser in fp32, equal to :class:`wanx.models.dit.model.WanDiT` with the weights loaded.

    Args:
        config: sizes of the network.
        tensors: its weights by original name.
        device: where it runs; by default the first GPU if there is one, else the processor.

    Raises:
        CorruptInputError: the tensors are not those of the network.
    """

    def __init__(
        self,
        config: DiTConfig,
        tensors: Mapping[str, TensorSource],
        *,
        device: torch.device | None = None,
    ) -> None:
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.device("meta"):
            dit = WanDiT(config).eval().requires_grad_(False)
        check_tensors("dit", {n: tuple(p.shape) for n, p in dit.named_parameters()}, tensors)
        for name, buffer in dit.time_embedding.named_buffers():
            setattr(dit.time_embedding, name, buffer.to(device))
        self._dit, self._tensors, self._device = dit, tensors, device
        self._inputs = [item.name for item in dit_spec(config).inputs]

    def run(
        self,
        feeds: Sequence[Mapping[str, NDArray[np.float32]]],
        *,
        watch: Watch | None = None,
        on_block: OnBlock | None = None,
    ) -> list[NDArray[np.float32]]:
        """Predict the velocities of samples that pass through the network in lockstep.

        Each block is read once and all samples pass it before the next one is read; those of the
        control branch come first.

        Args:
            feeds: the inputs of the graph by name, one mapping per sample; see
                :func:`wanx.exporter.components.dit_spec`. L may differ from sample to sample.
            watch: makes a context out of a block and its name, such as ``blocks.3``; it is entered
                while the samples pass that block. The next block is read into the same memory, so
                weights that are needed longer must be copied.
            on_block: told after each block how many are done, and of how many.

        Returns:
            Velocities ``[1, L, velocity_dim]``, one per sample.

        Raises:
            CorruptInputError: a weight is not finite, or a file ended early.
            UsageError: a sample lacks an input.
            WanxError: activations are not finite; names the part and the sample.
        """
        dit, watch = self._dit, watch or (lambda block, name: nullcontext())
        total, done = sum(len(getattr(dit, stack, ())) for stack in _STACKS), 0
        with torch.inference_mode():
            states = self._embed(feeds)
            for stack, step in zip(_STACKS, (dit.run_control_block, dit.run_block), strict=True):
                for _ in self._run_stack(stack, step, states, watch):
                    done += 1
                    if on_block is not None:
                        on_block(done, total)
            velocities = []
            with self._weights_loaded(dit.head, "head", {}):
                for index, state in enumerate(states):
                    velocity = dit.head(state.x, state.time)
                    _require_finite([velocity], "the head", index, len(states))
                    velocities.append(velocity.cpu().numpy())
        return velocities

    def _embed(self, feeds: Sequence[Mapping[str, NDArray[np.float32]]]) -> list[DiTState]:
        states = []
        with ExitStack() as loaded:
            for name, child in self._dit.named_children():
                if name not in (*_STACKS, "head"):
                    loaded.enter_context(self._weights_loaded(child, name, {}))
            for index, feed in enumerate(feeds):
                if missing := [name for name in self._inputs if name not in feed]:
                    raise UsageError(
                        f"sample {index + 1} of {len(feeds)} lacks {', '.join(missing)}; give "
                        "every input of the graph"
                    )
                state = self._dit.embed(**{name: self._tensor(feed[name]) for name in self._inputs})
                _require_finite(_tensors_of(state), "the embeddings", index, len(feeds))
                states.append(state)
        return states

    def _tensor(self, values: NDArray[np.float32]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def _run_stack(
        self, stack: str, step: Step, states: list[DiTState], watch: Watch
    ) -> Iterator[None]:
        """Run each block of a stack on all samples in turn, changing ``states`` in place."""
        storage: dict[str, Tensor] = {}
        for block_index, block in enumerate(getattr(self._dit, stack, ())):
            name = f"{stack}.{block_index}"
            with self._weights_loaded(block, name, storage), watch(block, name):
                for index, state in enumerate(states):
                    states[index] = state = step(state, block_index)
                    _require_finite(_tensors_of(state), name, index, len(states))
            yield

    @contextmanager
    def _weights_loaded(
        self, part: nn.Module, prefix: str, storage: dict[str, Tensor]
    ) -> Iterator[None]:
        """Load the weights of ``part`` for the block.

        They lie in ``storage``, by their names in the part. Equal parts share one, because the
        first touch of new memory takes several times as long as reading and converting a weight.
        """
        empty = part.state_dict()
        for name, like in empty.items():
            if name not in storage:
                storage[name] = torch.empty(like.shape, device=self._device)
            read_fp32(self._tensors[f"{prefix}.{name}"], storage[name])
        part.load_state_dict({name: storage[name] for name in empty}, assign=True)
        try:
            yield
        finally:
            part.load_state_dict(empty, assign=True)


def _tensors_of(state: DiTState) -> list[Tensor]:
    known = (state.x, state.modulation, *state.rope, state.text, *state.hints[-1:])
    return [*known, *(value for value in (state.image, state.control) if value is not None)]


def _require_finite(values: list[Tensor], after: str, index: int, count: int) -> None:
    # The extremes propagate NaN, and finding them needs no second tensor.
    if not all(math.isfinite(end) for value in values for end in torch.aminmax(value)):
        raise WanxError(
            f"the activations are not finite after {after} (sample {index + 1} of {count}); check "
            "that sample's inputs, or use another checkpoint"
        )
