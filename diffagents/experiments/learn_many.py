"""Many agents at once: N seeds, and N values of numeric hyperparameters, of one algorithm on one dataset.

    agents = diffagents.learn_many([SRPO(seed=s, beta=b) for s in range(4) for b in (0.05, 0.2)], "mujoco/hopper/medium-v0")

Losses and gradients of all members are computed together (torch.vmap over their stacked networks). Every member draws its own
batches and noise from its own generator and steps its own optimisers, so that each result equals that of a separate run, to
float tolerance, and is an ordinary agent.
"""

import dataclasses
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffagents.agent import Agent
from diffagents.data.load import load_dataset
from diffagents.data.sampler import Sampler
from diffagents.errors import TrainingDiverged
from diffagents.storage import checkpoint
from diffagents.training import offline, prepare, provenance
from diffagents.training.compiled import Compiled, NamedTensors, Networks, gradients_of, trained_names, with_leaves
from diffagents.training.cuda_graph import GraphRunner
from diffagents.training.plan import Plan
from diffagents.training.session import interrupt_between_updates, matmul_precision
from diffagents.training.state import Snapshot, restore
from diffagents.training.updates import Gradients, Noise, Runner, Stage, Update
from diffagents.types import Batch, Metrics

SWITCHES = ("dropout", "gamma")
"""Hyperparameters whose value 0 changes the computation: without dropout masks, and in BDPO without paths at the next state."""
SHARED = ("return_temperature", "returns_share")
"""Hyperparameters of all members together: how batches are drawn, and when Q changes from returns to TD targets."""
PREFIX = "hyperparameter."  # of the names of hyperparameters' tensors, which stand among those of the networks


def learn_many(
    agents: Sequence[Agent],
    dataset: Any,
    total_timesteps: int | None = None,
    log_interval: int | None = None,
    *,
    stages: Sequence[str] | None = None,
) -> list[Agent]:
    """Train several agents on one dataset at once. They are changed in place, and each ends as `learn` would have left it.

    Args:
        agents: Agents of one class that are not trained yet or have all come equally far. Their hyperparameters are equal
            except for numbers (beta, expectile, learning_rate, ...) and seeds. `compile` is the first one's.
        dataset: As in `Agent.learn`.
        total_timesteps: As in `Agent.learn`, for each agent.
        log_interval: As in `Agent.learn`.
        stages: As in `Agent.learn`.

    Returns:
        The agents. The plan of each can be finished by its own `learn(dataset, reset_num_timesteps=False)`.

    Raises:
        ValueError: The agents cannot be trained together; raised before any work.
        TrainingDiverged: Some diverged; raised at the end. They keep their last good state, and the others are finished.
        KeyboardInterrupt: After Ctrl-C, once the running update is complete.
    """
    members = list(agents)
    _check_alike(members)
    first = members[0]
    for agent in members:
        prepare.check_arguments(agent, total_timesteps, stages, log_interval)
        checkpoint.fetch_training_networks(agent)
    data = load_dataset(dataset, env=first.env, obs_keys=first.obs_keys, verbose=first.verbose)
    candidates = [agent.candidate() for agent in members]
    plans: list[Plan] = []
    for candidate in candidates:
        plan, adopted = prepare.accept(candidate, data, total_timesteps, True, stages)
        assert plan is not None  # a new one, since it is not a resumed run
        plans.append(plan)
    _check_alike(candidates)  # presets may have changed hyperparameters
    earlier = [candidate.state.stage_steps for candidate in candidates]
    if any(plan.lengths != plans[0].lengths for plan in plans) or any(steps != earlier[0] for steps in earlier):
        raise ValueError("the agents have plans of different lengths: give total_timesteps, or equal *_steps")
    for candidate in candidates:
        _check_same_data(candidates[0], candidate)
    for agent, candidate, plan in zip(members, candidates, plans, strict=True):
        agent.become(candidate)
        state = agent.state
        state.plan, state.num_timesteps, state.history = plan, 0, []
        state.provenance = provenance.begin(state.provenance, agent.device, True, agent.record_command)
    if any(agent.state.data["sha256"] != data.info["sha256"] for agent in members):
        warnings.warn(
            "these data differ from those that the agents first learned from, whose transforms are kept", stacklevel=2
        )
    sampler = prepare.make_sampler(first, adopted)
    seconds = offline.estimate(first, plans[0], sampler) if first.verbose or first.compile == "auto" else {}
    together = {name: value * len(members) for name, value in seconds.items()}
    offline.choose_modes(first, plans[0], together)
    for plan in plans[1:]:
        plan.modes.update(plans[0].modes)
    if first.verbose:
        offline.announce(first, plans[0], together)
        print(f"{len(members)} agents together", flush=True)
    started = time.perf_counter()
    diverged: dict[int, tuple[Snapshot, TrainingDiverged]] = {}
    by_stage = zip(*[agent.stages(plan) for agent, plan in zip(members, plans, strict=True)], strict=True)
    with stacked(members) as tensors, interrupt_between_updates() as interrupted, matmul_precision(first):
        for each in by_stage:

            def runner_for(samplers: Sequence[Sampler], mode: str, each: Sequence[Stage] = each) -> Runner | GraphRunner:
                many = make_many_runner(members, each, samplers, tensors, mode)
                return GraphRunner(many) if mode == "graph" else many

            if each[0].name in plans[0].lengths and not interrupted.is_set():
                offline.run_stage(members, each, sampler, runner_for, log_interval, interrupted, diverged=diverged)
    for agent in members:
        agent.state.provenance |= {"seconds": time.perf_counter() - started, "trained_together": len(members)}
    for k, (good, _) in diverged.items():
        restore(members[k], good)
    if diverged:
        raise TrainingDiverged("; ".join(f"member {k}: {error}" for k, (_, error) in diverged.items()))
    if interrupted.is_set():
        raise KeyboardInterrupt
    return members


def _check_alike(agents: Sequence[Agent]) -> None:
    if not agents:
        raise ValueError("learn_many needs at least one agent")
    first = agents[0]
    for agent in agents:
        if type(agent) is not type(first):
            raise ValueError(f"learn_many trains agents of one class, not {type(first).__name__} and {type(agent).__name__}")
        if len({id(one) for one in agents}) < len(agents):
            raise ValueError("the same agent is in the list twice: make one for each seed or setting")
        for name in ("preset", "obs_keys", "policy_kwargs", "device", "tf32"):
            if getattr(agent, name) != getattr(first, name):
                raise ValueError(f"the agents differ in {name}: {getattr(first, name)!r} and {getattr(agent, name)!r}")
        for field in dataclasses.fields(agent.config):
            one, other = getattr(first.config, field.name), getattr(agent.config, field.name)
            if one != other and (field.name in SHARED or not (isinstance(one, float) and isinstance(other, float))):
                raise ValueError(
                    f"the agents differ in {field.name}: {one!r} and {other!r}; only numbers that are no sizes may differ, "
                    "and seeds: train the rest in another call"
                )
            if one != other and 0.0 in (one, other) and field.name in SWITCHES:
                raise ValueError(
                    f"the agents differ in {field.name}: {one!r} and {other!r}; 0 switches off random numbers that the others "
                    "draw: train these in another call"
                )


def _check_same_data(first: Agent, agent: Agent) -> None:
    """All see the data in the same units: transforms fitted on other data, or other spaces, would be member 0's."""
    same = agent.spec == first.spec and agent.state.reward_transform == first.state.reward_transform
    ours, theirs = (one.obs_normalizer.state_dict().values() for one in (first, agent))
    if not same or not all(map(torch.equal, ours, theirs)):
        raise ValueError(
            "the agents differ in their spaces, or in the transforms that they fitted when they first learned: train those "
            "together that learned from the same data"
        )


class ManyRunner(Runner):
    """A `Runner` for all members: one computation of losses and gradients, separate noise and optimiser steps."""

    def __init__(
        self,
        stages: Sequence[Stage],
        samplers: Sequence[Sampler],
        generators: Sequence[torch.Generator],
        gradients: Sequence[Callable[[Batch, Noise], tuple[Gradients, Metrics]]],
    ) -> None:
        super().__init__(stages[0], samplers[0], generators[0], gradients)
        self.generators, self._samplers = list(generators), samplers
        self._members = [stage.updates for stage in stages]
        self._shared = all(sampler is samplers[0] for sampler in samplers)

    def noise(self, j: int) -> Noise:
        """Every member's own noise, stacked: (N, B, ...)."""
        each = zip(self._members, self.generators, strict=True)
        return _stack([updates[j].draw(self.batch_size, generator) for updates, generator in each])

    def update(self, j: int, batch: Batch) -> None:
        gradients, metrics = self.gradients[j](batch, self.noise(j))
        each = [[gradient.unbind() for gradient in some] for some in gradients]
        for k, updates in enumerate(self._members):
            updates[j].apply([[gradient[k] for gradient in some] for some in each])
        self.sums[j].add(metrics)

    def draw_batch(self, by_return: bool) -> Batch:
        """Every member's own batch, stacked: fields (N, B, ...)."""
        if not self._shared:
            batches = [s.sample(self.batch_size, g, by_return) for s, g in zip(self._samplers, self.generators, strict=True)]
            columns = [torch.stack(column) for column in zip(*(batch[:5] for batch in batches), strict=True)]
            return Batch._make([*columns, _stack([batch.extras for batch in batches])])
        rows = torch.cat([self.sampler.rows(self.batch_size, generator, by_return) for generator in self.generators])
        batch = self.sampler.gather(rows)
        n = (len(self.generators), self.batch_size)
        extras = {name: value.unflatten(0, n) for name, value in batch.extras.items()}
        return Batch._make([*(value.unflatten(0, n) for value in batch[:5]), extras])

    def each_means(self) -> list[dict[str, float]]:
        """`means` of each member."""
        means: dict[str, Any] = self.means()
        return [{name: values[k] for name, values in means.items()} for k in range(len(self.generators))]


def make_many_runner(
    members: Sequence[Agent], stages: Sequence[Stage], samplers: Sequence[Sampler], tensors: NamedTensors, mode: str
) -> ManyRunner:
    """What runs the steps of one stage of all members, inside `with stacked(members) as tensors`."""
    gradients = [_many_gradients(members, update, tensors, mode != "eager") for update in stages[0].updates]
    return ManyRunner(stages, samplers, [agent.generator for agent in members], gradients)


def _stack(noise: Sequence[Noise]) -> Noise:
    return {name: torch.stack([one[name] for one in noise]) for name in noise[0]}


@contextmanager
def stacked(agents: Sequence[Agent]) -> Iterator[NamedTensors]:
    """All tensors of the members' networks as (N, ...), of which theirs are views meanwhile.

    What is the same in all and stays so is left as it is: the normaliser of the data, and schedules, which no file holds.
    """
    roofs = [Networks(agent.networks(), len) for agent in agents]
    in_files = {name for name in roofs[0].state_dict() if not name.startswith("obs_normalizer.")}
    tensors: NamedTensors = {}
    moved: list[Tensor] = []
    for name, tensor in roofs[0].tensors().items():
        each = [dict([*roof.named_parameters(), *roof.named_buffers()])[name] for roof in roofs]
        if name not in in_files:
            tensors[name] = tensor
            continue
        tensors[name] = torch.stack([one.detach() for one in each])
        for one, view in zip(each, tensors[name].unbind(), strict=True):
            one.data = view
            moved.append(one)
    try:
        yield tensors
    finally:
        for one in moved:
            one.data = one.data.clone()
        for agent in agents:
            agent.forget_compiled()  # it reads the tensors that were there before


def _many_gradients(agents: Sequence[Agent], update: Update, tensors: NamedTensors, compiled: bool) -> Any:
    """`Update.gradients` for batches and noise (N, B, ...) of all members: gradients and metrics (N, ...)."""
    if update.loss is None:
        return update.gradients
    template, loss = agents[0], update.loss
    roof = Networks(template.networks(), loss)
    trained = trained_names(roof, update)
    varied = [
        field.name
        for field in dataclasses.fields(template.config)
        if len({getattr(agent.config, field.name) for agent in agents}) > 1
    ]
    values = {
        PREFIX + name: torch.tensor([getattr(agent.config, name) for agent in agents], device=template.device)
        for name in varied
    }
    everything = {**tensors, **values}
    single = roof.tensors()
    stacked = {name: 0 if name in values or tensor.dim() > single[name].dim() else None for name, tensor in everything.items()}

    def losses(given: NamedTensors, batch: Batch, noise: Noise) -> tuple[tuple[Tensor, ...], Metrics]:
        config = template.config
        settings = {name: given[PREFIX + name] for name in varied}
        template.config = types.SimpleNamespace(**{**dataclasses.asdict(config), **settings})
        try:
            own = {name: tensor for name, tensor in given.items() if name not in values}
            found, metrics = torch.func.functional_call(roof, own, (batch, noise))
        finally:
            template.config = config
        return (found if isinstance(found, tuple) else (found,)), metrics

    def gradients(given: NamedTensors, batch: Batch, noise: Noise) -> tuple[Gradients, Metrics]:
        given = with_leaves(given, trained)
        found, metrics = torch.vmap(losses, in_dims=(stacked, 0, 0))(given, batch, noise)
        return gradients_of([one.sum() for one in found], given, trained), {name: m.detach() for name, m in metrics.items()}

    def eager(batch: Batch, noise: Noise) -> tuple[Gradients, Metrics]:
        return gradients(everything, batch, noise)

    return Compiled(everything, gradients, eager) if compiled else eager
