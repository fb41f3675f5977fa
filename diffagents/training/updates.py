"""Updates, optimisers, and running the steps of a stage. Nothing here depends on the algorithm.

An update is three functions. `draw(n, generator)` draws every random input of the update as tensors; `loss(batch, noise)` is a
pure, fixed sequence of tensor operations that never reads a value from the device; `after()` updates what follows the trained
networks, such as target networks. Gradients and optimiser steps, between the last two, are taken here. So the same update can
run eagerly, compiled (compiled.py), inside a CUDA graph (cuda_graph.py), for many agents at once (experiments/learn_many.py),
or be replayed by a test with recorded noise. What happens only every d-th step is an Update with a period, never an `if` on
the step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffagents import torch_internals
from diffagents.types import Batch, Metrics

Noise = dict[str, Tensor]
"""Every random input of an update or of acting by name: Gaussian noise, diffusion times, coins, dropout masks."""
Gradients = Sequence[Sequence[Tensor]]
"""For each optimiser of an update, one tensor for each of its parameters."""
GradientFunction = Callable[[Batch, Noise], tuple[Gradients, Metrics]]


def no_noise(n: int, generator: torch.Generator) -> Noise:
    """The noise of an update without randomness."""
    return {}


@dataclass(frozen=True)
class Update:
    """A loss with its optimisers, due at steps `start`, `start` + `every`, ... below `stop` of its stage, counted from 0.

    Args:
        loss: (batch, noise) -> (loss, metrics), or a tuple of as many losses as there are optimisers, each minimised by its
            own. None if there is nothing to minimise.
        draw: (batch size, generator) -> the noise of the loss.
        optimizers: The optimisers that take the steps.
        after: Updates of target networks and the like, in place and element by element.
        every: Period in steps of the stage.
        start: First step.
        stop: One past the last step; None: the end of the stage.
        by_return: Whether it clones, so that it gets a batch of its own from the best episodes if the agent samples by return
            (`data.sampler.Sampler.rows`).
    """

    loss: Callable[[Batch, Noise], tuple[Tensor | tuple[Tensor, ...], Metrics]] | None = None
    draw: Callable[[int, torch.Generator], Noise] = no_noise
    optimizers: tuple["Optimizer", ...] = ()
    after: Callable[[], None] | None = None
    every: int = 1
    start: int = 0
    stop: int | None = None
    by_return: bool = False

    def due(self, step: int) -> bool:
        """Whether the update runs at this step of the stage."""
        return self.start <= step and (step - self.start) % self.every == 0 and (self.stop is None or step < self.stop)

    def times(self, first: int, last: int) -> int:
        """How often it is due at the steps first, ..., last - 1."""
        last = last if self.stop is None else min(last, self.stop)
        return sum(sign * max(0, -(-(step - self.start) // self.every)) for sign, step in ((1, last), (-1, min(first, last))))

    def gradients(self, batch: Batch, noise: Noise) -> tuple[Gradients, Metrics]:
        """The gradient of each optimiser's loss with respect to its own parameters; all others are constants."""
        if self.loss is None:
            return [], {}
        loss, metrics = self.loss(batch, noise)
        losses = loss if isinstance(loss, tuple) else (loss,)
        gradients = [
            torch.autograd.grad(one, optimizer.parameters, retain_graph=k < len(losses) - 1)
            for k, (one, optimizer) in enumerate(zip(losses, self.optimizers, strict=True))
        ]
        return gradients, metrics

    def apply(self, gradients: Gradients) -> None:
        """Take the optimisers' steps, then call `after`."""
        for optimizer, gradient in zip(self.optimizers, gradients, strict=True):
            optimizer.step(gradient)
        if self.after is not None:
            self.after()

    def step(self, batch: Batch, noise: Noise) -> Metrics:
        """Compute the gradients and apply them, eagerly."""
        gradients, metrics = self.gradients(batch, noise)
        self.apply(gradients)
        return metrics


@dataclass(frozen=True)
class Stage:
    """A phase of training with its own length, e.g. SRPO's critic.

    Each step draws one batch, on which the updates that are due run in order.

    Args:
        name: Its name in STAGE_SHARES, or "online".
        batch_size: Transitions in a batch.
        updates: The updates that run on each batch.
        prepare: (data, generator) -> what batches are drawn from. Called when the stage begins or resumes, with a generator
            that is the same every time. Online it is called again every `refresh` environment steps, with all data collected by
            then, and may return None if there is nothing to learn from yet.
        n_prepared: Rows that `prepare` works on, by which its duration is estimated; None for all.
        refresh: Environment steps between two calls of `prepare` online.
    """

    name: str
    batch_size: int
    updates: tuple[Update, ...]
    prepare: Callable[[Any, torch.Generator], Any] | None = None
    n_prepared: int | None = None
    refresh: int = 1000


class Optimizer:
    """Adam or AdamW (betas 0.9 and 0.999, eps 1e-8) with a constant or cosine learning rate, counted in its own steps.

    Everything that changes from step to step is a tensor on the device of the parameters, so that a CUDA graph can hold a step.

    Args:
        parameters: The tensors to train, all on one device.
        learning_rate: At the start of a schedule.
        weight_decay: None for Adam; the decoupled weight decay, at least 0, for AdamW.
        cosine: Let the learning rate fall to 0 along half a cosine over the schedule's horizon.
        max_grad_norm: Scale the gradients down to this norm, taken over all of them together. Default: no clipping.
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
        self.state: dict[Tensor, dict[str, Tensor]] = {}  # step, exp_avg and exp_avg_sq of each parameter, as in torch.optim
        self.param_groups = [{"params": self.parameters, "fused": True, "capturable": device.type == "cuda"}]
        self._all_steps = torch.empty(0)  # the memory of every "step" in the state: one addition counts them all
        self._step_entries: list[Tensor] = []

    def start_schedule(self, horizon: int, step: int = 0) -> None:
        """Start the learning rate's schedule, or resume it.

        Args:
            horizon: Its length in steps of this optimiser; 0 for a constant learning rate.
            step: How many of these steps have been taken.
        """
        self.horizon = horizon
        self.n_steps.fill_(step)
        self.lr.fill_(self.learning_rate)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step.

        Args:
            gradients: One for each parameter, of its shape.
        """
        if self.cosine and self.horizon > 0:  # lr_k = lr_0 (1 + cos(pi k / K)) / 2, as CosineAnnealingLR(T_max=K)
            share = (self.n_steps / self.horizon).clamp(max=1.0)
            self.lr.copy_(self.learning_rate * 0.5 * (1.0 + torch.cos(math.pi * share)))
            self.n_steps.add_(1.0)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            # The fused kernels read memory in order and ignore strides.
            alike = gradient.stride() == parameter.stride()
            parameter.grad = gradient if alike else torch.empty_like(parameter).copy_(gradient)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self._adam([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def _adam(self, gradients: list[Tensor]) -> None:
        """Apply Adam's update rule."""
        for parameter in self.parameters:
            if parameter not in self.state:
                moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        states = [self.state[parameter] for parameter in self.parameters]
        steps = [state["step"] for state in states]
        if not self._counted_together(steps):  # at the first step, and after loading or copying
            self._all_steps = torch.stack(steps)
            self._step_entries = steps = list(self._all_steps.unbind())
            for state, step in zip(states, steps, strict=True):
                state["step"] = step
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        kernel = torch_internals.fused_adam(self.weight_decay is not None, self.lr.device)
        if kernel is None:
            decay = self.weight_decay
            torch_internals.adam_by_torch_optim(self.parameters, gradients, means, squares, steps, self.lr, decay)
            return
        self._all_steps.add_(1.0)
        settings = {"lr": self.lr, "beta1": 0.9, "beta2": 0.999, "weight_decay": self.weight_decay or 0.0, "eps": 1e-8}
        kernel(self.parameters, gradients, means, squares, [], steps, **settings, amsgrad=False, maximize=False)

    def _counted_together(self, steps: list[Tensor]) -> bool:
        """Whether these are the entries of `_all_steps`. Only the first and the last are checked, which takes no time."""
        known = self._step_entries
        if not known or steps[0] is not known[0] or steps[-1] is not known[-1]:
            return False
        return known[0].data_ptr() == self._all_steps.data_ptr()  # a copy may have separated them


class MetricSums:
    """Running means of the metrics of an update, kept on the device until a log step."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._names: list[str] = []
        self.count = 0

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of one step."""
        if metrics and not self._sums:
            self._names, self._sums = list(metrics), [torch.zeros_like(value) for value in metrics.values()]
        if metrics:
            torch_internals.for_each("add_")(self._sums, list(metrics.values()))
        self.count += 1

    def take(self) -> dict[str, float]:
        """Return the means since the last call (this waits for the device) and start again from zero."""
        if self.count == 0 or not self._sums:
            return {}
        means = (torch.stack(self._sums) / self.count).tolist()
        torch_internals.for_each("zero_")(self._sums)
        self.count = 0
        return dict(zip(self._names, means, strict=True))


class Runner:
    """Runs the steps of one stage: draw a batch, run the updates that are due, sum their metrics on the device.

    Args:
        stage: The stage.
        sampler: What batches are drawn from (`data.sampler.Sampler` or a mixture of them).
        generator: The source of all its randomness.
        gradients: For each update, a replacement for `Update.gradients`, e.g. a compiled version of it.
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
        weighted = getattr(sampler, "cumulative", None) is not None
        self.by_return = [update.by_return and weighted for update in stage.updates]

    def due(self, k: int) -> list[int]:
        """The indices of the updates that are due at step k of the stage, counted from 0."""
        return [j for j, update in enumerate(self.updates) if update.due(k)]

    def step(self, k: int) -> None:
        """Run step k of the stage."""
        self.run(self.due(k))

    def run(self, due: Sequence[int]) -> None:
        """Run the updates with the indices `due`, in order, on one batch, or on one batch of each kind (`Update.by_return`)."""
        batches: dict[bool, Batch] = {}
        for j in due:
            kind = self.by_return[j]
            if kind not in batches:
                batches[kind] = self.draw_batch(kind)
            self.update(j, batches[kind])

    def draw_batch(self, by_return: bool) -> Batch:
        """A batch of one kind (`Update.by_return`)."""
        (generator,) = self.generators
        batch: Batch = self.sampler.sample(self.batch_size, generator, *((True,) if by_return else ()))
        return batch

    def noise(self, j: int) -> Noise:
        """Draw the noise of the j-th update."""
        (generator,) = self.generators
        return self.updates[j].draw(self.batch_size, generator)

    def update(self, j: int, batch: Batch) -> None:
        """Run the j-th update on a batch."""
        gradients, metrics = self.gradients[j](batch, self.noise(j))
        self.updates[j].apply(gradients)
        self.sums[j].add(metrics)

    @property
    def failed(self) -> bool:
        """Whether an update could not be compiled, and so runs eagerly."""
        return any(getattr(gradients, "failed", False) for gradients in self.gradients)

    def means(self) -> dict[str, float]:
        """The means of all metrics since the last log step; waits for the device."""
        return {name: value for some in self.sums for name, value in some.take().items()}

    def each_means(self) -> list[dict[str, float]]:
        """`means` of each learner that these steps train; here there is one."""
        return [self.means()]
