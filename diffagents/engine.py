"""Running updates: an optimiser step with its schedule, and the stages of a plan. Nothing about any algorithm.

An update is two functions. `draw(n, generator)` makes every random number of the update as tensors; `update(batch, draws)`
is a fixed sequence of tensor operations that never asks the device for a value. The same update can therefore run
eagerly, compiled, or be replayed by a test with recorded draws. What happens every d-th step only is a Part with a period,
never an `if` on the step inside an update.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from diffagents.types import Batch, Metrics

Draws = dict[str, Tensor]


def no_draws(n: int, generator: torch.Generator) -> Draws:
    """For an update without randomness."""
    return {}


@dataclass(frozen=True)
class Part:
    """An update and when it is due: at steps `start`, `start` + `every`, ... of its stage, counted from 0."""

    update: Callable[[Batch, Draws], Metrics]
    draw: Callable[[int, torch.Generator], Draws] = no_draws
    optimizers: tuple["Optimizer", ...] = ()  # whose schedules run over the part's stage
    every: int = 1
    start: int = 0

    def due(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0

    def times(self, first: int, last: int) -> int:
        """How often it is due at the steps first, ..., last - 1."""
        return sum(sign * max(0, -(-(step - self.start) // self.every)) for sign, step in ((1, last), (-1, first)))


@dataclass(frozen=True)
class Stage:
    """A stretch of training with a length of its own, e.g. SRPO's critic.

    Each step draws one batch, on which the parts that are due run in order. `prepare` is called when the stage begins or
    goes on, with the data and a generator that is the same every time; what it returns is sampled from. It works on
    `n_prepared` rows (None: all), by which its duration is told beforehand.
    """

    name: str
    batch_size: int
    parts: tuple[Part, ...]
    prepare: Callable[[Any, torch.Generator], Any] | None = None
    n_prepared: int | None = None


class Optimizer:
    """Adam or AdamW over named parameters, with a constant or cosine learning rate counted in its own steps.

    weight_decay: None is Adam, a number AdamW. max_grad_norm: clip the norm of all gradients together.
    The learning rate is a tensor on the device, so that changing it never rebuilds a captured step; `capturable` only on
    CUDA (it asserts on CPU), fused everywhere.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float,
        *,
        weight_decay: float | None = None,
        cosine: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.learning_rate, self.cosine, self.max_grad_norm = learning_rate, cosine, max_grad_norm
        device = self.parameters[0].device
        self.lr = torch.tensor(learning_rate, dtype=torch.float32, device=device)
        settings: dict[str, Any] = {"lr": self.lr, "fused": True, "capturable": device.type == "cuda"}
        self.inner: torch.optim.Optimizer
        if weight_decay is None:
            self.inner = torch.optim.Adam(self.parameters, **settings)
        else:
            self.inner = torch.optim.AdamW(self.parameters, weight_decay=weight_decay, **settings)
        self.start_schedule(0)

    def start_schedule(self, horizon: int, step: int = 0) -> None:
        """Begin (or go on with, at `step`) a schedule that ends after `horizon` steps."""
        self.horizon, self.step = horizon, step

    def minimize(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`; other optimisers' parameters are left alone."""
        if self.cosine and self.horizon > 0:  # lr_k = lr_0 (1 + cos(pi k / K)) / 2, as CosineAnnealingLR(T_max=K)
            share = min(self.step / self.horizon, 1.0)
            self.lr.fill_(self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share)))
        self.inner.zero_grad(set_to_none=True)
        loss.backward(inputs=self.parameters)  # type: ignore[no-untyped-call]
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.inner.step()
        self.step += 1


@dataclass
class Plan:
    """The stages of one `learn` call and how far each has come; fixed at the start, kept with the trainer state."""

    lengths: dict[str, int]
    done: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.lengths.values())

    @property
    def remaining(self) -> int:
        return self.total - sum(self.done.values())

    def to_json(self) -> dict[str, Any]:
        return {"lengths": dict(self.lengths), "done": dict(self.done)}

    @classmethod
    def from_json(cls, data: dict[str, Any], stages: Iterable[str]) -> Self:
        """What `to_json` gave. Raises ValueError unless it is a plan over some of `stages`."""
        plan = cls(dict(data["lengths"]), dict(data["done"]))
        known = set(stages)
        for name, length in plan.lengths.items():
            done = plan.done.get(name, 0)
            if name not in known or not all(type(n) is int for n in (length, done)) or not 0 <= done <= length:
                raise ValueError(f"the plan's stage {name!r} ({done!r} of {length!r} steps) cannot be")
        if not set(plan.done) <= set(plan.lengths):
            raise ValueError("the plan has done stages that it does not have")
        return plan

    @staticmethod
    def split(total: int, shares: dict[str, int]) -> dict[str, int]:
        """`total` steps over the stages in proportion to `shares`; every stage gets at least one, the sum is exact.

        Raises ValueError when there are fewer steps than stages.
        """
        if total < len(shares):
            raise ValueError(
                f"total_timesteps={total} is fewer than the {len(shares)} stages {list(shares)}: give each at least one"
            )
        weight = sum(shares.values())
        lengths = {name: max(1, total * share // weight) for name, share in shares.items()}
        longest = max(lengths, key=lambda name: lengths[name])
        lengths[longest] += total - sum(lengths.values())
        return lengths


class MetricSums:
    """Running means of an update's metrics, kept on the device until somebody looks."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._names: list[str] = []
        self.count = 0

    def add(self, metrics: Metrics) -> None:
        values = list(metrics.values())
        if not values:
            return
        if self.count == 0:
            self._names, self._sums = list(metrics), [value.clone() for value in values]
        else:
            torch._foreach_add_(self._sums, values)
        self.count += 1

    def take(self) -> dict[str, float]:
        """The means since the last look (this waits for the device), and start anew."""
        if self.count == 0:
            return {}
        means = (torch.stack(self._sums) / self.count).tolist()
        self.count = 0
        return dict(zip(self._names, means, strict=True))
