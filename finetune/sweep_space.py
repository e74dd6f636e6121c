"""What a sweep tries: a grid, or points drawn at random or by Optuna's TPE; pure functions of seed and results."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from boldforge.configs import StrictModel

Sampler = Literal["grid", "random", "tpe"]
# Also the order in which a grid is walked: the first changes slowest.
DIMENSIONS = ("rank", "alpha", "dropout", "targets", "lr", "head_lr", "weight_decay")
# Those that are keys of the recipe's training, not of its adapter.
OF_TRAINING = {"lr", "head_lr", "weight_decay"}


class Span(StrictModel):
    """All numbers between two bounds."""

    low: float = Field(gt=0, description="Lowest value.")
    high: float = Field(gt=0, description="Highest value.")
    log: bool = Field(False, description="Draw evenly over the orders of magnitude, as for a step size.")

    @model_validator(mode="after")
    def _ordered(self) -> "Span":
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self


class SpaceConfig(StrictModel):
    """What is searched, as lists of values or (but for a grid) bounds; what is left out keeps the recipe's value."""

    rank: Span | None = Field(None, description="Ranks between two bounds, whole numbers, in place of the list ranks.")
    alpha: tuple[float, ...] | Span | None = Field(None, description="adapter.alpha: scale of the update times rank.")
    dropout: tuple[float, ...] | Span | None = Field(None, description="adapter.dropout.")
    targets: tuple[tuple[str, ...], ...] | None = Field(None, description="adapter.targets: lists of layers to adapt.")
    lr: tuple[float, ...] | Span | None = Field(None, description="training.lr: step size of the adapter.")
    head_lr: tuple[float, ...] | Span | None = Field(None, description="training.head_lr: step size of the head.")
    weight_decay: tuple[float, ...] | Span | None = Field(None, description="training.weight_decay: AdamW's decay.")

    @field_validator("rank", mode="before")
    @classmethod
    def _ranks_apart(cls, rank: object) -> object:
        if isinstance(rank, list | tuple):
            raise ValueError("it takes bounds, {low, high}; list ranks in the key ranks instead")
        return rank

    @model_validator(mode="after")
    def _possible(self) -> "SpaceConfig":
        bounds = {"rank": (1, 256), "alpha": (0, math.inf), "dropout": (0, 0.999), "lr": (0, 1), "head_lr": (0, 1)}
        bounds["weight_decay"] = (0, math.inf)
        for name, (least, most) in bounds.items():
            values = getattr(self, name)
            if values is None:
                continue
            ends = (values.low, values.high) if isinstance(values, Span) else values
            open_below = name in ("alpha", "lr", "head_lr")
            if not all(least < value <= most or (value == least and not open_below) for value in ends):
                raise ValueError(f"{name} must lie {'above' if open_below else 'from'} {least:g} and at most {most:g}")
        for name in DIMENSIONS[1:]:
            values = getattr(self, name)
            if isinstance(values, tuple) and (not values or len(set(values)) != len(values)):
                raise ValueError(f"{name} must list at least one value, each once")
        return self

    def searched(self) -> tuple[str, ...]:
        """Names of what is searched beside the rank."""
        return tuple(name for name in DIMENSIONS[1:] if getattr(self, name) is not None)


def grid(space: SpaceConfig, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Return every combination, ranks slowest."""
    axes = _axes(space, ranks)
    names = [name for name, _ in axes]
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*(values for _, values in axes))]


def draw(space: SpaceConfig, ranks: Sequence[int], seed: int, trial: int) -> dict[str, Any]:
    """Draw one point; a pure function of (seed, trial)."""
    generator = np.random.default_rng([seed, trial])
    point: dict[str, Any] = {}
    for name, values in _axes(space, ranks):
        if not isinstance(values, Span):
            point[name] = values[int(generator.integers(len(values)))]
            continue
        low, high = values.low, values.high
        if name == "rank":
            # Half a rank beyond the ends, so that these are as likely as the others.
            low, high = low - 0.5 + 1e-9, high + 0.5 - 1e-9
        at = generator.random()
        value = math.exp(math.log(low) + at * math.log(high / low)) if values.log else low + at * (high - low)
        point[name] = round(value) if name == "rank" else _six_digits(value, values)
    return point


def ask_tpe(
    space: SpaceConfig,
    ranks: Sequence[int],
    seed: int,
    seen: Sequence[tuple[Mapping[str, Any], float | None]],
    n: int,
) -> list[dict[str, Any]]:
    """Ask Optuna's TPE (Bergstra et al. 2011) for the next points at once; a pure function of its arguments.

    Parameters
    ----------
    space, ranks
        The search space.
    seed
        Of the sampler.
    seen
        Points tried so far with their figure, more is better; None for one that diverged.
    n
        Points to ask for. Points of one batch are told apart by a constant liar.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes = _axes(space, ranks)
    distributions = {name: _distribution(name, values) for name, values in axes}
    sampler = optuna.samplers.TPESampler(
        seed=int(np.random.SeedSequence([seed, len(seen)]).generate_state(1)[0]), constant_liar=True
    )
    study = optuna.create_study(sampler=sampler, direction="maximize")
    # A point that diverged is worse than all others, so that its neighbourhood is left.
    worst = min((figure for _, figure in seen if figure is not None), default=0.0) - 1.0
    for point, figure in seen:
        params = {name: _to_optuna(values, point[name]) for name, values in axes}
        value = worst if figure is None else figure
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    asked = [study.ask(distributions).params for _ in range(n)]
    return [{name: _from_optuna(name, values, params[name]) for name, values in axes} for params in asked]


def _axes(space: SpaceConfig, ranks: Sequence[int]) -> list[tuple[str, Any]]:
    """Names and spans or lists of choices; as lists, in the form in which a journal gives them back."""
    axes: list[tuple[str, Any]] = [("rank", space.rank or list(ranks))]
    for name in space.searched():
        values = getattr(space, name)
        if not isinstance(values, Span):
            values = [list(value) if isinstance(value, tuple) else value for value in values]
        axes.append((name, values))
    return axes


def _distribution(name: str, values: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Span):
        return CategoricalDistribution(list(range(len(values))))
    if name == "rank":
        return IntDistribution(round(values.low), round(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _to_optuna(values: Any, value: Any) -> Any:
    """Optuna names a choice by its place, so that a list of layers can be one."""
    return value if isinstance(values, Span) else values.index(value)


def _from_optuna(name: str, values: Any, value: Any) -> Any:
    if isinstance(values, Span):
        return value if name == "rank" else _six_digits(value, values)
    return values[value]


def _six_digits(value: float, span: Span) -> float:
    """Round to what a table shows, without leaving the span."""
    return min(max(float(f"{value:.6g}"), span.low), span.high)
