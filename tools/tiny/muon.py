"""Muon (Jordan et al. 2024): momentum whose update is made orthogonal, for weight matrices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from parallel import WORKERS
from torch import Tensor, distributed, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Move the singular values of each matrix [n, rows, columns] near 1, by Newton-Schulz."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c).matmul(x)
    result: Tensor = x if wide else x.mT
    return result


class Muon(torch.optim.Optimizer):
    """Steps of ``0.2 · √max(rows, columns) · lr``, which match those of Adam (Liu et al. 2025).

    Matrices of one shape are processed as one batch, of which each process takes its part.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(list(parameters), {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                directions = torch.stack([self._direction(parameter) for parameter in parameters])
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                shrink = 1 - group["lr"] * group["weight_decay"]
                mine = directions.chunk(WORKERS)[distributed.get_rank()]
                distributed.all_gather_into_tensor(directions, orthogonalise(mine).contiguous())
                for parameter, update in zip(parameters, directions, strict=True):
                    parameter.mul_(shrink).add_(update, alpha=-rate)

    def _direction(self, parameter: nn.Parameter) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)
