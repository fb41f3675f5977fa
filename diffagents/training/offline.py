"""What `learn` does: adopt the data, plan, loop, look at the metrics, guard against NaN. Nothing about any algorithm.

Between looks nothing waits for the device: batches and random numbers are made on it, metrics are summed on it.
"""

import dataclasses
import signal
import threading
import time
import types
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffagents import checkpoint, provenance
from diffagents.engine import Plan, Runner, Stage
from diffagents.knobs import whole_number
from diffagents.normalize import ObsNormalizer
from diffagents.presets import apply_preset, resolve_preset
from diffagents.sb3 import check_same_spaces
from diffagents.transitions import Sampler, Transitions
from diffagents.watch import TrainingDiverged as TrainingDiverged
from diffagents.watch import Watch, clock, restore, snapshot

if TYPE_CHECKING:
    from diffagents.cuda_graph import GraphRunner

WORTH_COMPILING, WORTH_A_GRAPH = 120.0, 60.0
"""Seconds that a stage must take eagerly before compile="auto" compiles it: on a CPU it costs tens of seconds, and saves a
quarter to a half; on a GPU (not measured) it should save more: launching many small kernels is what takes the time there."""


def check_arguments(agent: Any, total: Any, stages: Any, log_interval: Any) -> None:
    """Raises ValueError for what `learn` cannot mean, before any data is read."""
    known = list(agent.STAGE_SHARES)
    if stages is not None and not (isinstance(stages, (tuple, list)) and stages and set(stages) <= set(known)):
        raise ValueError(f"stages={stages!r}; give a tuple of some of {known}")
    if log_interval is not None:
        whole_number("log_interval", log_interval, 1, " of gradient steps")
    if total is not None:
        whole_number("total_timesteps", total, 1, " of gradient steps")
    checkpoint.need_learner(agent)


@contextmanager
def nothing_if_refused(agent: Any) -> Iterator[None]:
    """Leave the agent as it was when what follows raises: a refused dataset must not leave its transform behind."""
    before = dict(agent.__dict__)
    try:
        yield
    except BaseException:
        agent.__dict__.clear()
        agent.__dict__.update(before)
        raise


def adopt(agent: Any, data: Transitions) -> Transitions:
    """The first data: resolve the preset, build, fit the transforms. Later data: check that they fit the agent."""
    first = agent.reward_transform is None
    if first:
        apply_preset(agent, data.info["id"])
    if agent.spec is None:
        agent._set_up(data.spec)
    spec = agent.spec
    if data.spec.act_dim != spec.act_dim:
        raise ValueError(f"the data's actions have {data.spec.act_dim} dimensions, the agent's {spec.act_dim}")
    check_same_spaces(spec, data.spec.observation_space, spec.action_space)
    reach = np.abs(spec.scale_action(torch.stack([data.action.amin(0), data.action.amax(0)]).numpy())).max()
    if reach > 1 + 1e-4:
        low, high = spec.action_space.low.min(), spec.action_space.high.max()
        raise ValueError(
            f"the data's actions leave the agent's bounds [{low:g}, {high:g}] by {50 * (reach - 1):.3g} % of their range: "
            "give the agent env= when it first learns, or clip them with load_dataset(..., clip_actions=True)"
        )
    if first:  # fitted once: later data and online rewards use the same numbers
        agent.reward_transform = data.fit_reward_transform(agent.config.reward_transform)
        agent.dataset_info = dict(data.info)
        if agent.config.normalize_obs:
            agent.obs_normalizer = ObsNormalizer(spec.obs_dim).fit(data.obs).to(agent.device)
    return dataclasses.replace(data, spec=spec)


def make_plan(agent: Any, total: int | None, reset: bool, stages: Sequence[str] | None) -> Plan | None:
    """The stage lengths of one `learn` call; with reset=False an unfinished plan goes on. None: a finished one, nothing to do.

    Raises ValueError where what is asked for is not what the unfinished plan would do.
    """
    if not reset and agent.plan is None and any(agent.stage_steps.values()):
        raise ValueError(
            "this agent was saved without its trainer state, so its run cannot go on where it stopped: start a new plan "
            "with learn(data), or save with include_trainer_state=True next time"
        )
    if not reset and agent.plan is not None and (agent.plan.remaining > 0 or (total is None and stages is None)):
        plan: Plan = agent.plan
        if plan.remaining == 0:
            return None
        if (stages is not None and set(stages) != set(plan.lengths)) or (total is not None and int(total) != plan.total):
            raise ValueError(
                f"a plan of {plan.total:,} steps over {list(plan.lengths)} is unfinished: leave total_timesteps and stages "
                "out to finish it, or start another with reset_num_timesteps=True"
            )
        return plan
    shares = {name: share for name, share in agent.STAGE_SHARES.items() if stages is None or name in stages}
    if agent._pristine or any(agent.stage_steps.values()):  # else its networks came from files
        known = list(agent.STAGE_SHARES)
        for name in shares:  # `behavior` is fitted to the data alone
            missing = [e for e in known[: known.index(name)] if e not in shares and agent.stage_steps[e] == 0]
            if missing and name != "behavior":
                raise ValueError(
                    f"stages={tuple(shares)} leaves out {missing[0]!r}, which {name!r} builds on and which was never trained: "
                    f"add it, or run learn(data, stages=({missing[0]!r},)) first"
                )
    if total is not None:
        return Plan(Plan.split(int(total), shares))
    lengths = {name: getattr(agent.config, f"{name}_steps") for name in shares}
    if None in lengths.values():
        default = resolve_preset(agent.presets_name(), None, None)[1]
        lengths = {name: default[f"{name}_steps"] if steps is None else steps for name, steps in lengths.items()}
    if sum(lengths.values()) < 1:
        raise ValueError(f"the stage lengths {lengths} are all zero: give one of them steps")
    return Plan({name: steps for name, steps in lengths.items() if steps > 0})


def accept(
    agent: Any, data: Transitions, total: int | None, reset: bool, stages: Sequence[str] | None
) -> tuple[Plan | None, Transitions]:
    """The plan of one `learn` call (None: nothing to do) and the data in the agent's spaces, after every check on both."""
    data = adopt(agent, data)
    plan = make_plan(agent, total, reset, stages)
    if plan is None:
        if agent.verbose:
            print("nothing to do: the plan is finished; give total_timesteps or stages for a new one")
        return None, data
    check_rewards(plan, data)
    before, agent.plan = agent.plan, plan
    agent.stages()  # an algorithm may refuse its part of the plan
    agent.plan = before
    return plan, data


def begin(agent: Any, plan: Plan, data: Transitions, reset: bool) -> None:
    """Make `plan` the agent's; a new one starts the counts and the history anew."""
    new = plan is not agent.plan
    if data.info["sha256"] != agent.dataset_info["sha256"]:
        kept = "transform and normaliser" if new else "unfinished plan, transform and normaliser"
        warnings.warn(f"these are other data than {agent.dataset_info['id']}, whose {kept} are kept", stacklevel=3)
    if new and reset:
        agent.num_timesteps, agent.n_env_steps, agent.online, agent.history = 0, 0, None, []
    if new:
        agent.provenance = provenance.begin(agent.provenance, agent.device, reset)
    agent.plan = plan


def check_rewards(plan: Plan, data: Transitions) -> None:
    """Raises ValueError where something is to be learnt from rewards that prefer nothing."""
    if {"critic", "train"} & set(plan.lengths) and not data.done.any() and bool((data.rew == data.rew[0]).all()):
        raise ValueError(
            f"every reward is {float(data.rew[0]):g} and no episode terminates: there is nothing to prefer; add rewards, "
            "or imitate only, with DiffusionBC"
        )


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


@contextmanager
def timed(agent: Any, callback: Any, local: dict[str, Any]) -> Iterator[None]:
    """The callback told of start and end, and the seconds between them added to the agent's."""
    started = time.perf_counter()
    if callback is not None:
        callback.on_training_start(local, globals())
    try:
        yield
    finally:
        agent.provenance["seconds"] = agent.provenance.get("seconds", 0.0) + time.perf_counter() - started
        if callback is not None:
            callback.on_training_end()


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
    for part in stage.parts:
        for optimizer in part.optimizers:
            optimizer.start_schedule(length, part.times(before, before + done))
    watch = Watch(agent, stage.name, length, done)  # before `prepare`, which may start networks anew
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
            watch.look(done, runner.means())
        go_on = True
        if callback is not None:
            callback.update_locals(local)
            try:
                go_on = callback.on_step()
            except Exception:
                watch.look(done, runner.means())  # a NaN explains more than what it led to
                raise
        if not go_on or interrupted.is_set():
            watch.look(done, runner.means())  # whoever stops here can save what is here
            return False
    return True


def make_runner(agent: Any, stage: Stage, sampler: Sampler, mode: str) -> "Runner | GraphRunner":
    """What runs the steps of a stage in one of engine.MODES."""
    if mode == "eager":
        return Runner(stage, sampler, agent.generator)
    from diffagents.compiling import compiled_gradients
    from diffagents.cuda_graph import GraphRunner

    networks = agent.networks()
    runner = Runner(stage, sampler, agent.generator, [compiled_gradients(part, networks) for part in stage.parts])
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
            for part in stage.parts:
                for n in (1, 3):  # the first only warms up
                    start = time.perf_counter()
                    for _ in range(n):
                        batch = some.sample(stage.batch_size, agent.generator)
                        part.update(batch, part.draw(stage.batch_size, agent.generator))
                    if agent.device.type == "cuda":
                        torch.cuda.synchronize(agent.device)
                first = agent.stage_steps[stage.name]
                seconds[stage.name] += part.times(first, first + left) * (time.perf_counter() - start) / 3
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


@contextmanager
def matmul_precision(agent: Any) -> Iterator[None]:
    """Let matrix products on a CUDA device round their factors to TF32 (10 bits of mantissa) while an agent trains there."""
    if agent.device.type != "cuda" or not agent.tf32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def interrupt_between_updates() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event, so that no update is cut in the middle; a second Ctrl-C stops at once."""
    event = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):  # ignored, or not Python's
        yield event
        return

    def note(number: int, frame: types.FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
