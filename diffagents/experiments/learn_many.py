"""Many agents at once: N seeds, and N settings of numeric knobs, of one algorithm on one dataset, as one batched computation.

    agents = diffagents.learn_many([SRPO(seed=s, beta=b) for s in range(4) for b in (0.05, 0.2)], "mujoco/hopper/medium-v0")

Losses and gradients of all members are computed together (torch.vmap over their stacked networks); every member draws its
own batches and random numbers from its own generator and steps its own optimisers, so that it ends where its single run
would, to float tolerance, and is an ordinary agent.
"""

import dataclasses
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from diffagents.agent import Agent
from diffagents.data.load import load_dataset
from diffagents.data.sampler import Sampler
from diffagents.errors import TrainingDiverged
from diffagents.training import offline, prepare, provenance, session
from diffagents.training.compiled import Compiled, NamedTensors, Networks, gradients_of, trained_names, with_leaves
from diffagents.training.cuda_graph import GraphRunner
from diffagents.training.monitor import Monitor
from diffagents.training.plan import Plan
from diffagents.training.state import restore
from diffagents.training.updates import Gradients, Noise, Runner, Stage, Update
from diffagents.types import Batch, Metrics

SWITCHES = ("dropout", "gamma")
"""Knobs whose 0 is another computation: without dropout masks, and in BDPO without paths at the next state."""
KNOB = "knob."  # what a knob's tensor is called among the networks'


def learn_many(
    agents: Sequence[Agent],
    dataset: Any,
    total_timesteps: int | None = None,
    log_interval: int | None = None,
    *,
    stages: Sequence[str] | None = None,
) -> list[Agent]:
    """Train all of `agents` on one dataset, as `learn` would each, and return them. They are changed in place.

    The agents are of one class, not trained yet or all equally far, with equal knobs but for numbers (beta, expectile,
    learning_rate, ...) and seeds. `compile` is the first one's. The other arguments are those of `Agent.learn`; there are no
    callbacks.
    Raises ValueError, before any work, where the agents cannot be trained together; TrainingDiverged at the end where some
    diverged (they hold their last good state, the others are finished); KeyboardInterrupt after the running update. Each
    member's plan can be finished by its own `learn(dataset, reset_num_timesteps=False)`.
    """
    members = list(agents)
    _check_alike(members)
    first = members[0]
    for agent in members:
        prepare.check_arguments(agent, total_timesteps, stages, log_interval)
    data = load_dataset(dataset, env=first._env, obs_keys=first.obs_keys, verbose=first.verbose)
    plans: list[Plan] = []
    with ExitStack() as stack:
        for agent in members:
            stack.enter_context(prepare.nothing_if_refused(agent))
            adopted = prepare.adopt(agent, data)
            plan = prepare.make_plan(agent, total_timesteps, True, stages)
            assert plan is not None
            prepare.check_rewards(plan, adopted)
            plans.append(plan)
        _check_alike(members)  # presets may have changed knobs
        if any(plan.lengths != plans[0].lengths for plan in plans) or any(a.stage_steps != first.stage_steps for a in members):
            raise ValueError("the agents have plans of different lengths: give total_timesteps, or equal *_steps")
        for agent, plan in zip(members, plans, strict=True):
            _check_same_data(first, agent)
            agent.plan, agent.num_timesteps, agent.history = plan, 0, []
            agent.provenance = provenance.begin(agent.provenance, agent.device, reset=True)
            agent.stages()  # an algorithm may refuse its part of the plan
    if any((agent.dataset_info or {})["sha256"] != data.info["sha256"] for agent in members):
        warnings.warn("these are other data than the agents learned from first, whose transforms are kept", stacklevel=2)
    sampler = adopted.sampler(first.device, first.reward_transform, first.obs_normalizer)
    seconds = offline.estimate(first, plans[0], sampler) if first.verbose or first.compile == "auto" else {}
    together = {name: value * len(members) for name, value in seconds.items()}
    offline.choose_modes(first, plans[0], together)
    for plan in plans[1:]:
        plan.modes.update(plans[0].modes)
    if first.verbose:
        offline.announce(first, plans[0], together)
        print(f"{len(members)} agents together", flush=True)
    started = time.perf_counter()
    failures: list[str] = []
    lost: dict[int, dict[str, Any]] = {}  # who diverged, and the state to go back to
    with stacked(members) as tensors, session.interrupt_between_updates() as interrupted, session.matmul_precision(first):
        for position, stage in enumerate(first.stages()):
            if stage.name in plans[0].lengths and not interrupted.is_set():
                _run_stage(members, position, sampler, tensors, log_interval, failures, lost, interrupted)
    for agent in members:
        agent.provenance |= {"seconds": time.perf_counter() - started, "trained_together": len(members)}
    for k, good in lost.items():
        restore(members[k], good)
    if failures:
        raise TrainingDiverged("; ".join(failures))
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
            if one != other and not (isinstance(one, float) and isinstance(other, float)):
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
    same = agent.spec == first.spec and agent.reward_transform == first.reward_transform
    ours, theirs = (one.obs_normalizer.state_dict().values() for one in (first, agent))
    if not same or not all(map(torch.equal, ours, theirs)):
        raise ValueError(
            "the agents differ in their spaces, or in the transforms that they fitted when they first learned: train those "
            "together that learned from the same data"
        )


def _run_stage(
    members: Sequence[Agent],
    position: int,
    sampler: Sampler,
    tensors: NamedTensors,
    log_interval: int | None,
    failures: list[str],
    lost: dict[int, dict[str, Any]],
    interrupted: threading.Event,
) -> None:
    """Run one stage of all members to its end, or until Ctrl-C. Adds to `failures` and `lost` who diverged.

    What is lost is computed along, since leaving it out would change the shapes; nobody looks at it again.
    """
    first, plans = members[0], [agent.plan for agent in members]
    stages = [agent.stages()[position] for agent in members]
    name = stages[0].name
    assert plans[0] is not None
    length, before = plans[0].lengths[name], first.stage_steps[name]
    watches = []
    samplers = []
    for agent, stage in zip(members, stages, strict=True):
        if name == agent.POLICY_STAGE:
            agent._policy_missing = False
        for update in stage.updates:
            for optimizer in update.optimizers:
                optimizer.start_schedule(length)
        watches.append(Monitor(agent, name, length, 0))
        samplers.append(sampler if stage.prepare is None else stage.prepare(sampler, offline.stage_generator(agent, stage)))
        watches[-1].limit_q(samplers[-1])
        watches[-1].restart_clock()
        agent._pristine = False
    mode = plans[0].modes[name]
    many = make_many_runner(members, position, samplers, tensors, mode)
    runner = GraphRunner(many) if mode == "graph" else many
    interval = log_interval or max(1, min(1000, length // 20))
    for done in range(1, length + 1):
        runner.step(before + done - 1)
        for agent in members:
            assert agent.plan is not None
            agent.plan.done[name] = done
            agent.stage_steps[name] += 1
            agent.num_timesteps += 1
            agent.n_updates += 1
            if runner.failed:
                agent.plan.modes[name] = "eager"
        stop = interrupted.is_set()
        if done % interval == 0 or done == length or stop:
            for k, (watch, means) in enumerate(zip(watches, many.each_means(), strict=True)):
                if k in lost:
                    continue
                try:
                    watch.log(done, means, put_back=False)
                except TrainingDiverged as error:
                    lost[k] = watch.good
                    failures.append(f"member {k}: {error}")
        if stop:
            break


class ManyRunner(Runner):
    """A `Runner` for all members: one computation of losses and gradients, own draws and optimiser steps."""

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

    def run(self, due: Sequence[int]) -> None:
        batch = self._sample()
        for j in due:
            noise = [
                updates[j].draw(self.batch_size, generator)
                for updates, generator in zip(self._members, self.generators, strict=True)
            ]
            gradients, metrics = self.gradients[j](batch, _stack(noise))
            each = [[gradient.unbind() for gradient in some] for some in gradients]
            for k, updates in enumerate(self._members):
                updates[j].apply([[gradient[k] for gradient in some] for some in each])
            self.sums[j].add(metrics)

    def _sample(self) -> Batch:
        """Every member's own batch, stacked: fields (N, B, ...)."""
        if not self._shared:
            batches = [s.sample(self.batch_size, g) for s, g in zip(self._samplers, self.generators, strict=True)]
            columns = [torch.stack(column) for column in zip(*(batch[:5] for batch in batches), strict=True)]
            return Batch._make([*columns, _stack([batch.extras for batch in batches])])
        rows = torch.cat([self.sampler.rows(self.batch_size, generator) for generator in self.generators])
        batch = self.sampler.gather(rows)
        n = (len(self.generators), self.batch_size)
        extras = {name: value.unflatten(0, n) for name, value in batch.extras.items()}
        return Batch._make([*(value.unflatten(0, n) for value in batch[:5]), extras])

    def each_means(self) -> list[dict[str, float]]:
        """`means` of each member."""
        means: dict[str, Any] = self.means()
        return [{name: values[k] for name, values in means.items()} for k in range(len(self.generators))]


def make_many_runner(
    members: Sequence[Agent], position: int, samplers: Sequence[Sampler], tensors: NamedTensors, mode: str
) -> ManyRunner:
    """What runs the steps of all members' stage number `position`, inside `with stacked(members) as tensors`."""
    stages = [agent.stages()[position] for agent in members]
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
        for one, update in zip(each, tensors[name].unbind(), strict=True):
            one.data = update
            moved.append(one)
    try:
        yield tensors
    finally:
        for one in moved:
            one.data = one.data.clone()
        for agent in agents:
            agent._compiled.clear()  # it reads the tensors that were there before


def _many_gradients(agents: Sequence[Agent], update: Update, tensors: NamedTensors, compiled: bool) -> Any:
    """`Update.gradients` for batches and draws (N, B, ...) of all members: gradients and metrics (N, ...)."""
    if update.loss is None:
        return update.gradients
    template, loss = agents[0], update.loss
    roof = Networks(template.networks(), loss)
    trained = trained_names(roof, update)
    knobs = [
        field.name
        for field in dataclasses.fields(template.config)
        if len({getattr(agent.config, field.name) for agent in agents}) > 1
    ]
    values = {
        KNOB + name: torch.tensor([getattr(agent.config, name) for agent in agents], device=template.device) for name in knobs
    }
    everything = {**tensors, **values}
    single = roof.tensors()
    stacked = {name: 0 if name in values or tensor.dim() > single[name].dim() else None for name, tensor in everything.items()}

    def losses(given: NamedTensors, batch: Batch, noise: Noise) -> tuple[tuple[Tensor, ...], Metrics]:
        config = template.config
        settings = {name: given[KNOB + name] for name in knobs}
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
