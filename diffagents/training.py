"""The loop of `learn`: the plan, looks at the metrics, callbacks, the NaN guard. Nothing about any algorithm.

Between looks nothing waits for the device: batches and random numbers are made on it, metrics are summed on it.
"""

import copy
import math
import signal
import threading
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from diffagents import checkpoint
from diffagents.engine import MetricSums, Plan, Stage
from diffagents.presets import resolve_preset
from diffagents.transitions import Sampler


class TrainingDiverged(RuntimeError):
    """A loss became NaN or Q exploded; the agent holds its last good state and can be used or saved."""


def check_arguments(agent: Any, total: Any, stages: Any, log_interval: Any) -> None:
    """Raises ValueError for what `learn` cannot mean, before any data is read."""
    known = agent.STAGE_SHARES
    if isinstance(stages, str) or (stages is not None and (not stages or any(name not in known for name in stages))):
        raise ValueError(f"stages={stages!r}; give a tuple of some of {list(known)}")
    if log_interval is not None and (isinstance(log_interval, bool) or int(log_interval) != log_interval or log_interval < 1):
        raise ValueError(f"log_interval={log_interval!r} must be a positive whole number of gradient steps")
    if total is not None and (isinstance(total, bool) or int(total) != total or total < 1):
        raise ValueError(f"total_timesteps={total!r} must be a positive whole number of gradient steps")


def make_plan(agent: Any, total: int | None, reset: bool, stages: Sequence[str] | None) -> Plan:
    """The stage lengths of one `learn` call; with reset=False an unfinished plan goes on. Raises ValueError."""
    if not reset and agent.plan is not None and agent.plan.remaining > 0:
        plan: Plan = agent.plan
        return plan
    shares = {name: share for name, share in agent.STAGE_SHARES.items() if stages is None or name in stages}
    if total is not None:
        return Plan(Plan.split(int(total), shares))
    lengths = {name: getattr(agent.config, f"{name}_steps") for name in shares}
    if None in lengths.values():
        default = resolve_preset(type(agent).__name__, None, None)[1]
        lengths = {name: default[f"{name}_steps"] if steps is None else steps for name, steps in lengths.items()}
    if min(lengths.values()) < 0 or sum(lengths.values()) < 1:
        raise ValueError(f"stage lengths {lengths} must be zero or more, and one of them positive")
    return Plan({name: int(steps) for name, steps in lengths.items() if steps > 0})


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
    if callback is not None:
        callback.on_training_start(local, globals())
    try:
        with _interrupt_between_updates() as interrupted:
            for stage in agent.stages():
                if stage.name in plan.lengths and not _run_stage(
                    agent, stage, plan, sampler, callback, local, log_interval, interrupted
                ):
                    break
    finally:
        if callback is not None:
            callback.on_training_end()
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
    if done < length and stage.name == agent.POLICY_STAGE:
        agent._policy_missing = False
    for optimizer in stage.optimizers:
        optimizer.start_schedule(length, done)
    interval = log_interval or max(1, min(1000, length // 20))
    # No policy earns more than max|r| / (1 - gamma): a mean Q a hundred times beyond has run away.
    q_limit = 100.0 * sampler.max_abs_reward / (1.0 - getattr(agent.config, "gamma", 0.0)) + 1.0
    agent._pristine = False
    sums, good, good_at, started = MetricSums(), _snapshot(agent), done, (time.perf_counter(), done)
    while done < length:
        batch = sampler.sample(stage.batch_size, agent.generator)
        sums.add(stage.update(batch, stage.draw(stage.batch_size, agent.generator)))
        done += 1
        plan.done[stage.name] = done
        agent.stage_steps[stage.name] += 1
        agent.num_timesteps += 1
        agent.n_updates += 1
        if done % interval == 0 or done == length:
            means = sums.take()
            if not all(map(math.isfinite, means.values())) or abs(means.get("q", 0.0)) > q_limit:
                _restore(agent, good)
                raise TrainingDiverged(
                    f"{stage.name} diverged between its steps {good_at} and {done} ({_numbers(means)}); the agent holds its "
                    "state from before: try a lower learning_rate, another reward_transform or normalize_obs=True"
                )
            good, good_at = _snapshot(agent), done
            rate = (done - started[1]) / max(time.perf_counter() - started[0], 1e-9)
            _report(agent, stage.name, done, length, rate, means)
        if callback is not None:
            callback.update_locals(local)
            if not callback.on_step():
                return False
        if interrupted.is_set():
            return False
    return True


def announce(agent: Any, plan: Plan, sampler: Sampler) -> None:
    """Say what will be done and how long it will take, from a few real updates that are then undone."""
    data, rewards = agent.dataset_info, agent.reward_transform
    print(
        f"{type(agent).__name__} on {data['id']}: {data['n_steps']:,} steps, {data['n_episodes']:,} episodes, mean return "
        f"{data['mean_return']:.1f}; rewards {rewards.name} ({rewards.scale:.4g} r {rewards.shift:+.4g}); {agent.device}, "
        f"seed {agent.seed}"
    )
    seconds, before = 0.0, _snapshot(agent)
    for stage in agent.stages():
        left = plan.lengths.get(stage.name, 0) - plan.done.get(stage.name, 0)
        if left < 100:
            continue
        for n in (1, 3):  # the first only warms up
            start = time.perf_counter()
            for _ in range(n):
                batch = sampler.sample(stage.batch_size, agent.generator)
                stage.update(batch, stage.draw(stage.batch_size, agent.generator))
            if agent.device.type == "cuda":
                torch.cuda.synchronize(agent.device)
        seconds += left * (time.perf_counter() - start) / 3
    _restore(agent, before)
    lengths = ", ".join(f"{name} {plan.done.get(name, 0):,}/{steps:,}" for name, steps in plan.lengths.items())
    print(f"plan: {lengths} gradient steps; about {_clock(seconds)}", flush=True)


def _report(agent: Any, stage: str, done: int, length: int, rate: float, means: dict[str, float]) -> None:
    agent.history.append({"num_timesteps": agent.num_timesteps, "stage": stage, "stage_step": done, **means})
    if agent._logger is not None:
        for name, value in means.items():
            agent._logger.record(f"{stage}/{name}", value)
        agent._logger.record("time/updates_per_second", rate)
        agent._logger.record("train/n_updates", agent.n_updates, exclude="tensorboard")
        agent.dump_logs()
    if agent.verbose:
        left = _clock((length - done) / rate)
        print(f"{stage:>8} {done:>9,}/{length:,}  {_numbers(means)}  {rate:,.0f}/s, {left} left", flush=True)


def _snapshot(agent: Any) -> dict[str, Any]:
    """The whole training state, cloned on the device: what a NaN or a timing run falls back to."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in checkpoint.training_tensors(agent).items()},
        "counts": (agent.num_timesteps, agent.n_updates, dict(agent.stage_steps)),
        "done": copy.deepcopy(agent.plan.done),
        "steps": {name: optimizer.step for name, optimizer in agent.optimizers.items()},
    }


def _restore(agent: Any, snapshot: dict[str, Any]) -> None:
    checkpoint.load_training_tensors(agent, snapshot["tensors"])
    agent.num_timesteps, agent.n_updates, agent.stage_steps = snapshot["counts"]
    agent.plan.done = snapshot["done"]
    for name, step in snapshot["steps"].items():
        agent.optimizers[name].step = step


@contextmanager
def _interrupt_between_updates() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event, so that no update is cut in the middle; a second Ctrl-C stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: types.FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _numbers(means: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in means.items())


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
