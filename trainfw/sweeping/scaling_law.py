"""Laws of scaling, fitted to the losses of runs of several sizes and budgets (Hoffmann et al., arXiv:2203.15556)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainfw.errors import RunError

_HUBER = 1e-3
"""Residual of log L beyond which it counts linearly, as in section 3.3 of the paper."""
_EXPONENTS = (0.02, 2.0)
"""Limits of both exponents: a fit that ends at one is not determined by the runs."""
_FEWEST = 6
"""Runs that the five numbers of a law are fitted to, at least."""


@dataclass(frozen=True)
class Point:
    """One run: what it cost, and the loss that it reached."""

    parameters: float
    """N: FLOPs of training on a token over 6, which counts attention as the parameters that would cost as much."""
    tokens: float
    loss: float

    @property
    def flops(self) -> float:
        return 6 * self.parameters * self.tokens


@dataclass(frozen=True)
class Parabola:
    """Loss of one budget by the logarithm of N (approach 2)."""

    flops: float
    coefficients: tuple[float, float, float]
    """Coefficients of 1, x and x squared, where x is log(N / middle)."""
    middle: float
    range: tuple[float, float]
    """Least and largest N of the runs."""

    def at(self, parameters: float) -> float:
        x = math.log(parameters / self.middle)
        return sum(c * x**power for power, c in enumerate(self.coefficients))

    @property
    def best(self) -> float | None:
        """The N of the lowest loss; None where that is not between those of the runs."""
        _, slope, curve = self.coefficients
        if curve <= 0:
            return None
        found = self.middle * math.exp(-slope / (2 * curve))
        return found if self.range[0] <= found <= self.range[1] else None


def fit_parabola(points: Sequence[Point]) -> Parabola:
    """Fit a parabola to the losses of one budget. Raises RunError for fewer than three sizes."""
    sizes = [point.parameters for point in points]
    if len(set(sizes)) < 3:
        raise RunError(f"a parabola needs three sizes of a budget, and {len(set(sizes))} have a loss")
    middle = math.exp(float(np.mean(np.log(sizes))))
    found = np.polynomial.polynomial.polyfit(np.log(np.array(sizes) / middle), [p.loss for p in points], 2)
    flops = math.exp(float(np.mean([math.log(point.flops) for point in points])))
    return Parabola(flops, tuple(map(float, found)), middle, (min(sizes), max(sizes)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * C ** exponent."""

    factor: float
    exponent: float

    def at(self, flops: float) -> float:
        return self.factor * flops**self.exponent


def fit_power_law(pairs: Sequence[tuple[float, float]]) -> PowerLaw:
    """Fit a line through (C, y) in logarithms."""
    x, y = np.log(np.array(pairs)).T
    exponent, constant = np.polyfit(x, y, 1)
    return PowerLaw(math.exp(constant), float(exponent))


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N ** alpha + B / D ** beta (approach 3)."""

    entropy: float
    a: float
    b: float
    alpha: float
    beta: float
    residual: float
    """Root mean square of the relative errors at the runs that it was fitted to."""

    def at(self, parameters: float, tokens: float) -> float:
        return self.entropy + self.a / parameters**self.alpha + self.b / tokens**self.beta

    @property
    def determined(self) -> bool:
        """Tell whether the runs determine both exponents."""
        low, high = _EXPONENTS
        return all(1.01 * low < exponent < 0.99 * high for exponent in (self.alpha, self.beta))

    @property
    def best_parameters(self) -> PowerLaw:
        """The best N by budget (the paper's equation 4)."""
        total = self.alpha + self.beta
        factor = (self.alpha * self.a / (self.beta * self.b)) ** (1 / total)
        return PowerLaw(factor * 6 ** (-self.beta / total), self.beta / total)

    def __str__(self) -> str:
        return f"L = {self.entropy:.3f} + {self.a:.3g} / N^{self.alpha:.3f} + {self.b:.3g} / D^{self.beta:.3f}"


def fit_law(points: Sequence[Point], start: Law | None = None) -> Law:
    """Fit a law by Huber loss on log L, from many starting points, or from another law's.

    Raises RunError for fewer than six runs.
    """
    from scipy.optimize import minimize

    if len(points) < _FEWEST:
        raise RunError(f"a law of five numbers needs {_FEWEST} runs at least, and {len(points)} have a loss")
    sizes, tokens, losses = (
        np.log([getattr(point, name) for point in points]) for name in ("parameters", "tokens", "loss")
    )
    n, d = sizes - sizes.mean(), tokens - tokens.mean()  # so that the numbers of the law do not go together

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, e, alpha, beta = x
        terms = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
        log_loss = np.logaddexp.reduce(terms, axis=0)
        shares = np.exp(terms - log_loss)
        residual = log_loss - losses
        slope = np.clip(residual, -_HUBER, _HUBER)
        value = np.where(np.abs(residual) <= _HUBER, residual**2 / 2, _HUBER * (np.abs(residual) - _HUBER / 2))
        each = shares * slope
        return 1e6 * value.sum(), 1e6 * np.array([*each.sum(axis=1), -(each[0] * n).sum(), -(each[1] * d).sum()])

    bounds = [(-8, 4), (-8, 4), (-8, 4), _EXPONENTS, _EXPONENTS]
    starts = _starts(float(losses.mean())) if start is None else [_numbers(start, sizes.mean(), tokens.mean())]
    fits = [minimize(objective, x, jac=True, method="L-BFGS-B", bounds=bounds) for x in starts]
    a, b, e, alpha, beta = min(fits, key=lambda fit: fit.fun).x
    factors = math.exp(a + alpha * sizes.mean()), math.exp(b + beta * tokens.mean())
    law = Law(math.exp(e), *factors, float(alpha), float(beta), 0.0)
    errors = [law.at(point.parameters, point.tokens) / point.loss - 1 for point in points]
    return Law(law.entropy, law.a, law.b, law.alpha, law.beta, float(np.sqrt(np.mean(np.square(errors)))))


def _starts(log_loss: float) -> Iterator[list[float]]:
    """Give starting points, by the shares of the loss that its three parts begin with."""
    for n, d, alpha, beta in itertools.product((0.1, 0.4), (0.1, 0.4), (0.15, 0.5), (0.15, 0.5)):
        yield [log_loss + math.log(n), log_loss + math.log(d), log_loss + math.log(1 - n - d), alpha, beta]


def _numbers(law: Law, size: float, tokens: float) -> list[float]:
    """Return a law's numbers where sizes and tokens are around these logarithms."""
    parts = math.log(law.a) - law.alpha * size, math.log(law.b) - law.beta * tokens
    return [*parts, math.log(law.entropy), law.alpha, law.beta]


def leave_one_out(points: Sequence[Point], law: Law, parameters: float, tokens: float) -> tuple[float, float]:
    """Return the least and the largest prediction of laws that are fitted without one of the runs each."""
    found = [law.at(parameters, tokens)]
    if len(points) > _FEWEST:
        for i in range(len(points)):
            others = [*points[:i], *points[i + 1 :]]
            found.append(fit_law(others, law).at(parameters, tokens))
    return min(found), max(found)
