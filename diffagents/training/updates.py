"""Running updates: an optimiser step with its schedule, and the stages of a plan. Nothing about any algorithm.

An update is three functions. `draw(n, generator)` makes every random number of the update as tensors; `loss(batch, noise)`
is a pure, fixed sequence of tensor operations that never asks the device for a value; `after()` moves what follows the
trained networks. Gradients and optimiser steps between the last two are the engine's. The same update can therefore run
eagerly, compiled (compiling.py), inside a CUDA graph (cuda_graph.py), for many agents at once (many.py), or be replayed by a
test with recorded draws. What happens every d-th step only is a Part with a period, never an `if` on the step inside it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffagents.types import Batch, Metrics

Noise = dict[str, Tensor]
Gradients = Sequence[Sequence[Tensor]]
"""For each optimiser of a part, one tensor for each of its parameters."""
GradientFunction = Callable[[Batch, Noise], tuple[Gradients, Metrics]]


def no_noise(n: int, generator: torch.Generator) -> Noise:
    """For an update without randomness."""
    return {}


@dataclass(frozen=True)
class Update:
    """An update and when it is due: at steps `start`, `start` + `every`, ... of its stage, counted from 0.

    loss: (batch, noise) -> (loss, metrics), or as many losses as there are optimisers, each minimised by its own. None
    where there is nothing to minimise. after: in-place updates of lagged networks and the like, element by element.
    """

    loss: Callable[[Batch, Noise], tuple[Tensor | tuple[Tensor, ...], Metrics]] | None = None
    draw: Callable[[int, torch.Generator], Noise] = no_noise
    optimizers: tuple["Optimizer", ...] = ()
    after: Callable[[], None] | None = None
    every: int = 1
    start: int = 0

    def due(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0

    def times(self, first: int, last: int) -> int:
        """How often it is due at the steps first, ..., last - 1."""
        return sum(sign * max(0, -(-(step - self.start) // self.every)) for sign, step in ((1, last), (-1, first)))

    def gradients(self, batch: Batch, noise: Noise) -> tuple[Gradients, Metrics]:
        """The gradient of each optimiser's loss in its own parameters; other networks are frozen."""
        if self.loss is None:
            return [], {}
        loss, metrics = self.loss(batch, noise)
        losses = loss if isinstance(loss, tuple) else (loss,)
        found = [
            torch.autograd.grad(one, optimizer.parameters, retain_graph=k < len(losses) - 1)
            for k, (one, optimizer) in enumerate(zip(losses, self.optimizers, strict=True))
        ]
        return found, metrics

    def apply(self, gradients: Gradients) -> None:
        """The optimisers' steps, and what comes after them."""
        for optimizer, gradient in zip(self.optimizers, gradients, strict=True):
            optimizer.step(gradient)
        if self.after is not None:
            self.after()

    def step(self, batch: Batch, noise: Noise) -> Metrics:
        """Both, eagerly."""
        gradients, metrics = self.gradients(batch, noise)
        self.apply(gradients)
        return metrics


@dataclass(frozen=True)
class Stage:
    """A stretch of training with a length of its own, e.g. SRPO's critic.

    Each step draws one batch, on which the parts that are due run in order. `prepare` is called when the stage begins or
    goes on, with the data and a generator that is the same every time; what it returns is sampled from. It works on
    `n_prepared` rows (None: all), by which its duration is told beforehand. Online it is called again every `refresh`
    environment steps, with all that there is by then; there it may return None: nothing to learn from yet.
    """

    name: str
    batch_size: int
    updates: tuple[Update, ...]
    prepare: Callable[[Any, torch.Generator], Any] | None = None
    n_prepared: int | None = None
    refresh: int = 1000


class Optimizer:
    """Adam or AdamW over named parameters, with a constant or cosine learning rate counted in its own steps.

    weight_decay: None is Adam, a number AdamW. max_grad_norm: clip the norm of all gradients together.
    beta1 = 0.9, beta2 = 0.999, eps = 1e-8. All that changes is tensors on the device, so that a graph can hold a step.
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
        self.weight_decay, device = weight_decay, self.parameters[0].device
        self.lr = torch.tensor(learning_rate, dtype=torch.float32, device=device)
        self.n_steps = torch.zeros((), dtype=torch.float64, device=device)  # of the schedule
        self.horizon = 0
        self.state: dict[Tensor, dict[str, Tensor]] = {}  # step, exp_avg and exp_avg_sq by parameter, as torch.optim keeps them
        self.param_groups = [{"params": self.parameters, "fused": True, "capturable": device.type == "cuda"}]

    def start_schedule(self, horizon: int, step: int = 0) -> None:
        """Begin (or go on with, at `step`) a schedule that ends after `horizon` steps; 0: the learning rate is constant."""
        self.horizon = horizon
        self.n_steps.fill_(step)
        self.lr.fill_(self.learning_rate)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step down `gradients`, one for each parameter. The schedule is tensors too, so that a graph can hold it."""
        if self.cosine and self.horizon > 0:  # lr_k = lr_0 (1 + cos(pi k / K)) / 2, as CosineAnnealingLR(T_max=K)
            share = (self.n_steps / self.horizon).clamp(max=1.0)
            self.lr.copy_(self.learning_rate * 0.5 * (1.0 + torch.cos(math.pi * share)))
            self.n_steps.add_(1.0)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            # The fused kernels read memory in order, whatever the strides say.
            alike = gradient.stride() == parameter.stride()
            parameter.grad = gradient if alike else torch.empty_like(parameter).copy_(gradient)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self._adam([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def _adam(self, gradients: list[Tensor]) -> None:
        """torch.optim's fused kernel, without torch.optim, whose bookkeeping takes longer than this arithmetic (and its import
        a second, which loading an agent to act would wait for)."""
        for parameter in self.parameters:
            if parameter not in self.state:
                moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        states = [self.state[parameter] for parameter in self.parameters]
        steps = [state["step"] for state in states]
        if steps[0]._base is None or steps[0]._base is not steps[-1]._base:  # counted together from now on
            together = torch.stack(steps)
            steps = list(together.unbind())
            for state, step in zip(states, steps, strict=True):
                state["step"] = step
        assert steps[0]._base is not None
        steps[0]._base.add_(1.0)
        kernel = torch._fused_adam_ if self.weight_decay is None else torch._fused_adamw_
        kernel(
            self.parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=self.lr,
            beta1=0.9,
            beta2=0.999,
            weight_decay=self.weight_decay or 0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


class MetricSums:
    """Running means of an update's metrics, kept on the device until somebody looks."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._names: list[str] = []
        self.count = 0

    def add(self, metrics: Metrics) -> None:
        if metrics and not self._sums:
            self._names, self._sums = list(metrics), [torch.zeros_like(value) for value in metrics.values()]
        if metrics:
            torch._foreach_add_(self._sums, list(metrics.values()))
        self.count += 1

    def take(self) -> dict[str, float]:
        """The means since the last look (this waits for the device), and start anew."""
        if self.count == 0 or not self._sums:
            return {}
        means = (torch.stack(self._sums) / self.count).tolist()
        torch._foreach_zero_(self._sums)
        self.count = 0
        return dict(zip(self._names, means, strict=True))


class Runner:
    """The steps of one stage: draw a batch, run the parts that are due, sum their metrics on the device.

    gradients: for each part, what takes the place of `Update.gradients`, e.g. a compiled version of it.
    """

    def __init__(
        self,
        stage: Stage,
        sampler: Any,
        generator: torch.Generator,
        gradients: Sequence[GradientFunction] | None = None,
    ) -> None:
        self.updates, self.batch_size, self.sampler, self.generators = stage.updates, stage.batch_size, sampler, [generator]
        self.device: torch.device = sampler.device
        self.gradients = gradients or [update.gradients for update in stage.updates]
        self.sums = [MetricSums() for _ in stage.updates]

    def due(self, k: int) -> list[int]:
        """The numbers of the parts that are due at the stage's step k, counted from 0."""
        return [j for j, update in enumerate(self.updates) if update.due(k)]

    def step(self, k: int) -> None:
        """The stage's step k."""
        self.run(self.due(k))

    def run(self, due: Sequence[int]) -> None:
        """One batch for the parts numbered `due`, in order."""
        (generator,) = self.generators
        batch = self.sampler.sample(self.batch_size, generator)
        for j in due:
            gradients, metrics = self.gradients[j](batch, self.updates[j].draw(self.batch_size, generator))
            self.updates[j].apply(gradients)
            self.sums[j].add(metrics)

    @property
    def failed(self) -> bool:
        """Whether a part could not be compiled, and so runs eagerly."""
        return any(getattr(gradients, "failed", False) for gradients in self.gradients)

    def means(self) -> dict[str, float]:
        """The means of all metrics since the last look; waits for the device."""
        return {name: value for some in self.sums for name, value in some.take().items()}
