"""What `learn` does: adopt the data, plan, loop, look at the metrics, guard against NaN. Nothing about any algorithm.

Between looks nothing waits for the device: batches and random numbers are made on it, metrics are summed on it.
"""

import threading
import time
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffagents.data.sampler import Sampler
from diffagents.training.monitor import Monitor, clock
from diffagents.training.plan import Plan
from diffagents.training.session import interrupt_between_updates, matmul_precision, timed
from diffagents.training.state import restore, snapshot
from diffagents.training.updates import Runner, Stage

if TYPE_CHECKING:
    from diffagents.training.cuda_graph import GraphRunner

WORTH_COMPILING, WORTH_A_GRAPH = 120.0, 60.0
"""Seconds that a stage must take eagerly before compile="auto" compiles it: on a CPU it costs tens of seconds, and saves a
quarter to a half; on a GPU (not measured) it should save more: launching many small kernels is what takes the time there."""


def run(agent: Any, plan: Plan, sampler: Sampler, callback: Any, log_interval: int | None, tb_log_name: str | None) -> None:
    """Run what is left of `plan`; returns early when a callback says stop, raises KeyboardInterrupt after Ctrl-C."""
    local = {
        "self": agent,
        "total_timesteps": agent.num_timesteps + plan.remaining,
        "tb_log_name": tb_log_name,
        "dones": np.zeros(1, bool),
        "rewards": np.zeros(1, np.float32),
        "infos": [{}],
    }
    with timed(agent, callback, local), interrupt_between_updates() as interrupted, matmul_precision(agent):
        for stage in agent.stages():
            if stage.name in plan.lengths and not _run_stage(
                agent, stage, plan, sampler, callback, local, log_interval, interrupted
            ):
                break
    if interrupted.is_set():
        raise KeyboardInterrupt


def _run_stage(
    agent: Any,
    stage: Stage,
    plan: Plan,
    sampler: Sampler,
    callback: Any,
    local: dict[str, Any],
    log_interval: int | None,
    interrupted: threading.Event,
) -> bool:
    """Bring one stage to its planned length. False when a callback or Ctrl-C stopped it."""
    length, done = plan.lengths[stage.name], plan.done.get(stage.name, 0)
    if done == length:  # a resumed plan: nothing to run, so no state to copy either
        return True
    if stage.name == agent.POLICY_STAGE:
        agent._policy_missing = False
    before = agent.stage_steps[stage.name] - done  # steps of earlier plans: what starts late, starts once
    for update in stage.updates:
        for optimizer in update.optimizers:
            optimizer.start_schedule(length, update.times(before, before + done))
    watch = Monitor(agent, stage.name, length, done)  # before `prepare`, which may start networks anew
    if stage.prepare is not None:
        sampler = stage.prepare(sampler, stage_generator(agent, stage))
    runner = make_runner(agent, stage, sampler, plan.modes.get(stage.name, "eager"))
    interval = log_interval or max(1, min(1000, length // 20))
    watch.limit_q(sampler)
    watch.restart_clock()
    agent._pristine = False

    while done < length:
        runner.step(before + done)
        if runner.failed:
            plan.modes[stage.name] = "eager"
        done += 1
        plan.done[stage.name] = done
        agent.stage_steps[stage.name] += 1
        agent.num_timesteps += 1
        agent.n_updates += 1
        if done % interval == 0 or done == length:
            watch.log(done, runner.means())
        go_on = True
        if callback is not None:
            callback.update_locals(local)
            try:
                go_on = callback.on_step()
            except Exception:
                watch.log(done, runner.means())  # a NaN explains more than what it led to
                raise
        if not go_on or interrupted.is_set():
            watch.log(done, runner.means())  # whoever stops here can save what is here
            return False
    return True


def make_runner(agent: Any, stage: Stage, sampler: Sampler, mode: str) -> "Runner | GraphRunner":
    """What runs the steps of a stage in one of engine.MODES."""
    if mode == "eager":
        return Runner(stage, sampler, agent.generator)
    from diffagents.training.compiled import compiled_gradients
    from diffagents.training.cuda_graph import GraphRunner

    networks = agent.networks()
    runner = Runner(stage, sampler, agent.generator, [compiled_gradients(update, networks) for update in stage.updates])
    return GraphRunner(runner) if mode == "graph" else runner


def stage_generator(agent: Any, stage: Stage) -> torch.Generator:
    """The same random numbers every time the stage begins or goes on: what it prepares need not be kept in files."""
    return torch.Generator(agent.device).manual_seed(agent.seed + zlib.crc32(stage.name.encode()))


def estimate(agent: Any, plan: Plan, sampler: Sampler) -> dict[str, float]:
    """Seconds that what is left of each stage takes eagerly, from a few real updates that are then undone."""
    lefts = {name: length - plan.done.get(name, 0) for name, length in plan.lengths.items()}
    seconds = dict.fromkeys(lefts, 0.0)
    if max(lefts.values()) < 100:
        return seconds
    before = snapshot(agent)
    try:
        for stage in agent.stages():
            left = lefts.get(stage.name, 0)
            if left < 100:
                continue
            some = sampler
            if stage.prepare is not None:  # on a few rows
                start, few = time.perf_counter(), sampler.head(256)
                some = stage.prepare(few, stage_generator(agent, stage))
                seconds[stage.name] = (
                    (time.perf_counter() - start) * min(len(sampler), stage.n_prepared or len(sampler)) / len(few)
                )
            for update in stage.updates:
                for n in (1, 3):  # the first only warms up
                    start = time.perf_counter()
                    for _ in range(n):
                        batch = some.sample(stage.batch_size, agent.generator)
                        update.step(batch, update.draw(stage.batch_size, agent.generator))
                    if agent.device.type == "cuda":
                        torch.cuda.synchronize(agent.device)
                first = agent.stage_steps[stage.name]
                seconds[stage.name] += update.times(first, first + left) * (time.perf_counter() - start) / 3
    finally:  # Ctrl-C, too, leaves the agent as it was
        restore(agent, before)
    return seconds


def choose_modes(agent: Any, plan: Plan, seconds: dict[str, float]) -> None:
    """How each stage of the plan will run: as `compile` says; "auto" weighs what compiling takes.

    A stage that has begun goes on as it began, so that a resumed run ends where the uninterrupted one would; with "auto" one
    that has not begun, too, keeps what was chosen for it.
    """
    cuda = agent.device.type == "cuda"
    for name in plan.lengths:
        mode = agent.compile
        if name in plan.modes and (mode == "auto" or plan.done.get(name, 0) > 0):
            mode = plan.modes[name]
        if mode == "auto":
            worth = seconds.get(name, 0.0) > (WORTH_A_GRAPH if cuda else WORTH_COMPILING)
            mode = ("graph" if cuda else "compiled") if worth else "eager"
        if mode == "graph" and not cuda:
            warnings.warn('compile="graph" needs a CUDA device: training runs compiled, without a graph', stacklevel=3)
            mode = "compiled"
        plan.modes[name] = mode


def announce(agent: Any, plan: Plan, seconds: dict[str, float]) -> None:
    """Say what will be done, how, and how long it would take eagerly."""
    data, rewards = agent.dataset_info, agent.reward_transform
    print(
        f"{type(agent).__name__} on {data['id']}: {data['n_steps']:,} steps, {data['n_episodes']:,} episodes, mean return "
        f"{data['mean_return']:.1f}; rewards {rewards.name} ({rewards.scale:.4g} r {rewards.shift:+.4g}); {agent.device}"
        f"{', TF32' if agent.device.type == 'cuda' and agent.tf32 else ''}, seed {agent.seed}"
    )
    lengths = ", ".join(f"{name} {plan.done.get(name, 0):,}/{steps:,}" for name, steps in plan.lengths.items())
    faster = [name for name in plan.lengths if plan.modes[name] != "eager"]
    how = f" if eager; {', '.join(faster)} will be compiled, a minute first, and then run faster" if faster else ""
    print(f"plan: {lengths} gradient steps; about {clock(sum(seconds.values()))}{how}", flush=True)
