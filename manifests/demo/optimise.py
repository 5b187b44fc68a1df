"""Muon for the matrices inside the layers, Adam for embeddings, head and norms; one schedule for both.

Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix, which
lets a model this small learn in fewer steps than Adam needs. A fused array is handled tensor by tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from transformer import Array, Params, Shape

MUON_RATE = 0.02
ADAM_RATE = 0.004
MOMENTUM = 0.95
BETAS = (0.9, 0.95)
WARMUP = 40
"""Steps over which the rates rise from zero; after that they fall linearly to zero at the last step."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic whose iteration drives all singular values towards one."""


def orthogonalised(matrix: Array) -> Array:
    tall = matrix.shape[0] > matrix.shape[1]
    x: Array = matrix.T if tall else matrix
    x = x / (np.linalg.norm(x) + np.float32(1e-7))
    a, b, c = (np.float32(coefficient) for coefficient in NEWTON_SCHULZ)
    for _ in range(5):
        gram = x @ x.T
        polynomial: Array = b * gram + c * gram @ gram
        turned: Array = polynomial @ x
        x = a * x + turned
    result: Array = x.T if tall else x
    return result


@dataclass(frozen=True, slots=True)
class Optimiser:
    shape: Shape
    steps: int
    first: Params = field(default_factory=dict)
    second: Params = field(default_factory=dict)

    def rate(self, step: int) -> float:
        return min((step + 1) / WARMUP, 1.0) * (1 - step / self.steps)

    def update(self, params: Params, grads: Params, step: int) -> None:
        for name, gradient in grads.items():
            parts = self.shape.fused().get(name.rpartition(".")[2])
            if parts is None:
                self._adam(name, params[name], gradient, step)
            else:
                self._muon(name, params[name], gradient, self.rate(step), [rows for _, rows in parts])

    def _adam(self, name: str, value: Array, gradient: Array, step: int) -> None:
        first = self.first.setdefault(name, np.zeros_like(value))
        second = self.second.setdefault(name, np.zeros_like(value))
        first += np.float32(1 - BETAS[0]) * (gradient - first)
        second += np.float32(1 - BETAS[1]) * (gradient * gradient - second)
        mean = first / np.float32(1 - BETAS[0] ** (step + 1))
        spread = np.sqrt(second / np.float32(1 - BETAS[1] ** (step + 1))) + np.float32(1e-10)
        value -= np.float32(ADAM_RATE * self.rate(step)) * mean / spread

    def _muon(self, name: str, value: Array, gradient: Array, rate: float, rows: list[int]) -> None:
        momentum = self.first.setdefault(name, np.zeros_like(value))
        momentum *= np.float32(MOMENTUM)
        momentum += gradient
        ahead = gradient + np.float32(MOMENTUM) * momentum
        start = 0
        for count in rows:
            part = slice(start, start + count)
            aspect = max(1.0, count / value.shape[1]) ** 0.5
            value[part] -= np.float32(MUON_RATE * rate * aspect) * orthogonalised(ahead[part])
            start += count
