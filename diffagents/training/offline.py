"""The offline training loop: choose the execution mode, run the stages of the plan, log, and detect divergence.

Nothing here depends on the algorithm. Between log steps nothing waits for the device: batches and noise are drawn on it, and
metrics are summed on it.
"""

import functools
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffagents import torch_internals
from diffagents.config.presets import FAST, has_presets
from diffagents.data.sampler import Sampler
from diffagents.data.transitions import Transitions
from diffagents.errors import TrainingDiverged
from diffagents.training.callbacks import make_logger
from diffagents.training.compiled import COMPILE_LIMIT, compile_ahead, compiled_gradients
from diffagents.training.cuda_graph import GraphRunner
from diffagents.training.monitor import Monitor, clock, say
from diffagents.training.plan import Plan
from diffagents.training.prepare import begin, make_sampler
from diffagents.training.session import interrupt_between_updates, matmul_precision, timed
from diffagents.training.state import Learner, Snapshot, restore, snapshot
from diffagents.training.threads import faster, may_choose, n_threads, seconds_of, threads_restored, time_with
from diffagents.training.updates import Runner, Stage, Update

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback

COMPILING = {"cpu": (40.0, 0.75), "cuda": (30.0, 0.5)}
"""By type of device: seconds that compiling an update takes if its operations have not been counted, and the time of a compiled
update as a share of its eager time.

Over the stages of nine algorithms the share on a CPU is 0.48 to 0.88, in the median 0.71
(zoo/results/speed-cpu-training*.json). On GPUs both are assumed."""
COMPILING_BEGINS, COMPILING_OPERATION = 8.0, 0.035
"""Seconds of CPU time that compiling takes once in a process, and for each tensor operation of an update: measured on two cores
with torch 2.13 for eleven updates of SRPO, TD3BC and BDPO (default preset, nothing in the compiler's cache), by a script
outside this repository."""
SLOWEST = 8.0
"""The most by which a busy machine is taken to slow down compiling: it is measured for a moment only."""
BUSY = 1.5
"""How many times as long as its CPU time the timing of updates takes if the time without other programs is announced too."""
LONG = 1800.0
"""Seconds of a plan from which a shorter way is named."""


def train(
    learner: Learner,
    plan: Plan,
    data: Transitions,
    callback: "BaseCallback | None" = None,
    log_interval: int | None = None,
    tb_log_name: str | None = None,
    reset: bool = True,
) -> None:
    """Run the remaining steps of a validated plan on validated data (see prepare.py).

    Args:
        learner: The agent to train.
        plan: The stages to run and the progress of each.
        data: The dataset, in the learner's spaces.
        callback: An initialised SB3 callback.
        log_interval: Gradient steps between log steps. Default: a twentieth of each stage, at most 1000.
        tb_log_name: Name of the run in TensorBoard.
        reset: Whether a new plan starts the counters at zero.

    Raises:
        TrainingDiverged: NaN, or Q has diverged; the learner is restored to its last good state.
        KeyboardInterrupt: After Ctrl-C, at the end of the current update.
    """
    begin(learner, plan, data, reset)
    if learner.tensorboard_log is not None:
        learner.sb3_logger = make_logger(learner, tb_log_name or type(learner).__name__, reset)
    sampler = make_sampler(learner, data)
    chosen = set(plan.threads)
    timed_first = learner.verbose or learner.compile == "auto" or may_choose(learner)
    wall, cpu = time.perf_counter(), time.thread_time()
    seconds = estimate(learner, plan, sampler, choose_threads=True) if timed_first else {}
    slowness = slowness_since(wall, cpu) if learner.device.type == "cpu" else 1.0
    compiling = estimate_compiling(learner, plan, sampler, seconds)
    choose_modes(learner, plan, seconds, compiling)
    if learner.verbose:
        announce(learner, plan, seconds, compiling, slowness)
        announce_threads([name for name, count in plan.threads.items() if name not in chosen and count == 1])
    local = {
        "self": learner,
        "total_timesteps": learner.state.num_timesteps + plan.remaining,
        "tb_log_name": tb_log_name,
        "dones": np.zeros(1, bool),
        "rewards": np.zeros(1, np.float32),
        "infos": [{}],
    }

    with timed(learner, callback, local), interrupt_between_updates() as interrupted, matmul_precision(learner):
        for stage in learner.stages(plan):

            def runner_for(samplers: Sequence[Sampler], mode: str, stage: Stage = stage) -> Runner | GraphRunner:
                return make_runner(learner, stage, samplers[0], mode)

            if stage.name in plan.lengths and not run_stage(
                [learner], [stage], sampler, runner_for, log_interval, interrupted, callback, local
            ):
                break
    if interrupted.is_set():
        if learner.verbose:
            finish = "the agent can be saved, and learn(data, reset_num_timesteps=False) finishes the run"
            say(f"interrupted ({plan.progress}); {finish}")
        raise KeyboardInterrupt


@threads_restored()
def run_stage(
    learners: Sequence[Learner],
    stages: Sequence[Stage],
    sampler: Sampler,
    make_runner: Callable[[Sequence[Sampler], str], Runner | GraphRunner],
    log_interval: int | None,
    interrupted: threading.Event,
    callback: "BaseCallback | None" = None,
    local: dict[str, Any] | None = None,
    diverged: dict[int, tuple[Snapshot, TrainingDiverged]] | None = None,
) -> bool:
    """Train one stage to its planned length, for one agent or for several that are trained jointly.

    Args:
        learners: One or more agents of one class, with identical plans and progress.
        stages: The stage of each agent.
        sampler: The data, normalised and reward-transformed as for all agents.
        make_runner: (the sampler that each stage has prepared, mode) -> a runner whose `step` updates all agents.
        log_interval: Gradient steps between log steps. Default: a twentieth of the stage, at most 1000.
        interrupted: Set by Ctrl-C.
        callback: An initialised SB3 callback, called after each step.
        local: The local variables that the callback may read.
        diverged: Output: index of a diverged agent -> (snapshot to restore, error). Diverged agents stay in the batch, because
            removing them would change tensor shapes. None: the first agent that diverges stops all.

    Returns:
        False if the callback or Ctrl-C stopped the stage early.

    Raises:
        TrainingDiverged: If `diverged` is None; the agent is restored to its last good state.
    """
    name, states = stages[0].name, [learner.state for learner in learners]
    plans = [state.plan for state in states if state.plan is not None]
    plan = plans[0]
    length, done = plan.lengths[name], plan.done.get(name, 0)
    if done == length:  # already complete in a resumed plan: return before taking a snapshot
        return True
    earlier = learners[0].state.stage_steps[name] - done  # so that `Update.start` counts from the stage's first step
    count = n_threads(learners[0], plan.threads.get(name))
    for own_plan in plans:
        own_plan.threads[name] = count
    torch.set_num_threads(count)  # before compiling, because compiled code contains the number
    monitors: list[Monitor] = []
    samplers: list[Sampler] = []
    for learner, stage in zip(learners, stages, strict=True):
        if name == learner.POLICY_STAGE:
            learner.state.policy_missing = False
        for optimizer in {optimizer: None for update in stage.updates for optimizer in update.optimizers}:
            taken = (update.times(earlier, earlier + done) for update in stage.updates if optimizer in update.optimizers)
            optimizer.start_schedule(length, sum(taken))
        monitors.append(Monitor(learner, name, length, done))  # before `prepare`, which may reinitialise networks
        own = sampler if stage.prepare is None else stage.prepare(sampler, stage_generator(learner, stage))
        samplers.append(own)
        monitors[-1].limit_q(own)
    mode = plan.modes.get(name, "eager")
    runner = make_runner(samplers, mode)
    if mode != "eager":
        needed = [update.times(earlier + done, earlier + length) > 0 for update in stages[0].updates]
        compile_ahead(runner, name, needed, interrupted, bool(learners[0].verbose))
        if interrupted.is_set():
            return False
    for learner, monitor in zip(learners, monitors, strict=True):
        monitor.restart_clock()
        learner.state.pristine = False
    interval = log_interval or max(1, min(1000, length // 20))

    def log() -> None:
        for k, (monitor, means) in enumerate(zip(monitors, runner.each_means(), strict=True)):
            if diverged is not None and k in diverged:
                continue
            try:
                monitor.log(done, means)
            except TrainingDiverged as error:
                if diverged is None:
                    restore(monitor.learner, monitor.good)
                    raise
                diverged[k] = monitor.good, error

    while done < length:
        runner.step(earlier + done)
        done += 1
        for state, own_plan in zip(states, plans, strict=True):
            own_plan.done[name] = done
            state.stage_steps[name] += 1
            state.num_timesteps += 1
            state.n_updates += 1
        if runner.failed:
            for own_plan in plans:
                own_plan.modes[name] = "eager"
        if done % interval == 0 or done == length:
            log()
        keep_going = True
        if callback is not None:
            callback.update_locals(local or {})
            try:
                keep_going = callback.on_step()
            except Exception:
                log()  # if metrics are NaN, TrainingDiverged is more informative than the callback's error
                raise
        if not keep_going or interrupted.is_set():
            log()  # check for divergence before stopping, so that the state is safe to save
            return False
    return True


def make_runner(learner: Learner, stage: Stage, sampler: Sampler, mode: str) -> Runner | GraphRunner:
    """The runner of a stage in one of `plan.MODES`."""
    if mode == "eager":
        return Runner(stage, sampler, learner.generator)
    networks = learner.networks()
    gradients = [compiled_gradients(update, networks) for update in stage.updates]
    runner = Runner(stage, sampler, learner.generator, gradients)
    return GraphRunner(runner) if mode == "graph" else runner


def stage_generator(learner: Learner, stage: Stage) -> torch.Generator:
    """Generator for `Stage.prepare`, seeded by agent and stage, so that extras are recomputed on resuming and not saved."""
    return torch.Generator(learner.device).manual_seed(learner.seed + zlib.crc32(stage.name.encode()))


def estimate(learner: Learner, plan: Plan, sampler: Sampler, choose_threads: bool = False) -> dict[str, float]:
    """Estimate each stage's remaining eager time in seconds from some timed updates, which are rolled back.

    Args:
        learner: The agent.
        plan: Its plan; stages with fewer than 100 remaining steps are not timed.
        sampler: The data that it will learn from.
        choose_threads: Where threads="auto" leaves the choice, time one thread and all of them, and store the number with which
            the stage is faster in the plan. Stages that are not timed have one thread if all others do. A number that is in the
            plan already stays, so that resuming reproduces the uninterrupted run.

    Returns:
        Seconds of each stage with the number of threads that it will have; 0 if it is not timed.
    """
    remaining = {name: length - plan.done.get(name, 0) for name, length in plan.lengths.items()}
    seconds = dict.fromkeys(remaining, 0.0)
    if max(remaining.values()) < 100:
        return seconds
    choose_threads = choose_threads and may_choose(learner)
    undecided = [name for name, left in remaining.items() if choose_threads and left > 0 and name not in plan.threads]
    before = snapshot(learner)
    try:
        for stage in learner.stages(plan):
            name = stage.name
            if remaining.get(name, 0) < 100:
                continue
            counts = (1, torch.get_num_threads()) if name in undecided else (n_threads(learner, plan.threads.get(name)),)
            by_count, prepare = time_stage(learner, stage, sampler, remaining[name], counts)
            count = faster(by_count)
            seconds[name] = by_count[count] + prepare(count)
            if name in undecided:
                plan.threads[name] = count
        if all(plan.threads.get(name) == 1 for name, left in remaining.items() if left >= 100):
            plan.threads |= dict.fromkeys(undecided, 1)
    finally:  # the learner is unchanged after Ctrl-C, too
        restore(learner, before)
    return seconds


def time_stage(
    learner: Learner, stage: Stage, sampler: Sampler, left: int, counts: Sequence[int]
) -> tuple[dict[int, float], Callable[[int], float]]:
    """Time the updates of a stage, without undoing them.

    Args:
        learner: The agent.
        stage: The stage.
        sampler: The data that it will learn from.
        left: Its remaining steps.
        counts: Numbers of threads.

    Returns:
        The seconds of the remaining steps with each number of threads; and the function number of threads -> seconds of
        `Stage.prepare`.
    """
    few, ready = sampler.head(256), sampler

    def prepare() -> None:
        nonlocal ready
        if stage.prepare is not None:
            ready = stage.prepare(few, stage_generator(learner, stage))

    def prepare_all(count: int) -> float:
        rows = min(len(sampler), stage.n_prepared or len(sampler))
        return 0.0 if stage.prepare is None else seconds_of(prepare, count) * rows / len(few)

    seconds_of(prepare, counts[0])
    first, seconds = learner.state.stage_steps[stage.name], dict.fromkeys(counts, 0.0)
    for update in stage.updates:

        def step(update: Update = update) -> None:
            batch = ready.sample(stage.batch_size, learner.generator)
            update.step(batch, update.draw(stage.batch_size, learner.generator))
            if learner.device.type == "cuda":
                torch.cuda.synchronize(learner.device)

        times = update.times(first, first + left)
        for count, found in time_with(counts, step, times).items():
            seconds[count] += times * found
    return seconds, prepare_all


def slowness_since(wall: float, cpu: float) -> float:
    """How many times as long as its CPU time this thread took since `perf_counter` gave `wall` and `thread_time` gave `cpu`."""
    return (time.perf_counter() - wall) / max(time.thread_time() - cpu, 1e-3)


def estimate_compiling(learner: Learner, plan: Plan, sampler: Sampler, seconds: Mapping[str, float]) -> dict[str, float]:
    """Estimate how long the updates of each stage would be compiled, from the number of their operations.

    Compiling is slower on a busy machine, by a factor that is measured while the operations are counted.

    Args:
        learner: The agent, which is left as it is.
        plan: Its plan.
        sampler: The data that it will learn from.
        seconds: The estimated eager seconds of each stage.

    Returns:
        Seconds of each stage that may be compiled; the others, e.g. those that are too short for compile="auto", are left out.
    """
    found: dict[str, float] = {}
    if learner.compile == "eager" or learner.device.type != "cpu":
        return found
    begins, before = COMPILING_BEGINS, snapshot(learner)
    wall, cpu = time.perf_counter(), time.thread_time()
    try:
        for stage in learner.stages(plan):
            name = stage.name
            left = plan.lengths.get(name, 0) - plan.done.get(name, 0)
            if left <= 0 or (learner.compile == "auto" and (1 - COMPILING["cpu"][1]) * seconds.get(name, 0.0) < begins):
                continue
            few = sampler.head(256)
            ready = few if stage.prepare is None else stage.prepare(few, stage_generator(learner, stage))
            first, found[name] = learner.state.stage_steps[name], 0.0
            for update in stage.updates:
                if update.loss is None or not update.times(first, first + left):
                    continue
                batch = ready.sample(stage.batch_size, learner.generator)
                noise = update.draw(stage.batch_size, learner.generator)
                gradients = functools.partial(update.gradients, batch, noise)
                count = torch_internals.count_operations(gradients)
                while time.thread_time() - cpu < 0.1:
                    gradients()
                found[name] += COMPILING["cpu"][0] if count is None else COMPILING_OPERATION * count
            if found[name]:
                found[name], begins = found[name] + begins, 0.0
    finally:
        restore(learner, before)
    slowness = slowness_since(wall, cpu)
    return {name: min(max(slowness, 1.0), SLOWEST) * own for name, own in found.items()}


def _compile_seconds(learner: Learner, plan: Plan, compiling: Mapping[str, float] | None) -> dict[str, float]:
    """`compiling`, with the usual time of an update for the stages that it lacks."""
    usual = COMPILING["cuda" if learner.device.type == "cuda" else "cpu"][0]
    n_compiled = {stage.name: sum(update.loss is not None for update in stage.updates) for stage in learner.stages(plan)}
    return {name: (compiling or {}).get(name, usual * n_compiled[name]) for name in plan.lengths}


def choose_modes(
    learner: Learner, plan: Plan, seconds: Mapping[str, float], compiling: Mapping[str, float] | None = None
) -> None:
    """Choose each stage's execution mode and store it in the plan: that of `compile`.

    For "auto", a stage is compiled only if that finishes sooner than its estimated eager time, compiling included, and if
    compiling is expected to end within its limit. A stage that has begun keeps its mode, so that resuming reproduces the
    uninterrupted run. With "auto", a stage that has not begun also keeps the mode that was chosen for it.

    Args:
        learner: The agent.
        plan: Its plan.
        seconds: The estimated eager seconds of each stage.
        compiling: The estimated seconds of compiling each stage. Default: those that are usual.
    """
    cuda = learner.device.type == "cuda"
    share, to_compile = COMPILING["cuda" if cuda else "cpu"][1], _compile_seconds(learner, plan, compiling)
    for name in plan.lengths:
        mode = learner.compile
        if name in plan.modes and (mode == "auto" or plan.done.get(name, 0) > 0):
            mode = plan.modes[name]
        if mode == "auto":
            eager = seconds.get(name, 0.0)
            worth = to_compile[name] < COMPILE_LIMIT and to_compile[name] + share * eager < eager
            mode = ("graph" if cuda else "compiled") if worth else "eager"
        if mode == "graph" and not cuda:
            warnings.warn('compile="graph" needs a CUDA device: training runs compiled, without a graph', stacklevel=4)
            mode = "compiled"
        plan.modes[name] = mode


def announce(
    learner: Learner,
    plan: Plan,
    seconds: Mapping[str, float],
    compiling: Mapping[str, float] | None = None,
    slowness: float = 1.0,
) -> None:
    """Print the data, the plan, how long it is expected to take, and how it can be shortened if that is long.

    Args:
        learner: The agent.
        plan: Its plan, with the mode of each stage.
        seconds: The estimated eager seconds of each stage.
        compiling: The estimated seconds of compiling each stage. Default: those that are usual.
        slowness: How many times as long as its CPU time the timing of the updates took, because of other programs.
    """
    data, rewards = learner.state.data, learner.state.reward_transform
    assert rewards is not None
    say(
        f"{type(learner).__name__} on {data['id']}: {data['n_steps']:,} steps, {data['n_episodes']:,} episodes, mean return "
        f"{data['mean_return']:.1f}; rewards {rewards.name} ({rewards.scale:.4g} r {rewards.shift:+.4g}); {learner.device}"
        f"{', TF32' if learner.device.type == 'cuda' and learner.tf32 else ''}, seed {learner.seed}"
    )
    left = [name for name, steps in plan.lengths.items() if plan.done.get(name, 0) < steps]
    compiled = [name for name in left if plan.modes[name] != "eager"]
    share, to_compile = COMPILING[learner.device.type][1], _compile_seconds(learner, plan, compiling)
    first = sum(min(to_compile[name], COMPILE_LIMIT) for name in compiled)
    then = sum(seconds.get(name, 0.0) * (share if name in compiled else 1.0) for name in left)
    took = f"about {clock(first + then)}"
    if compiled:
        took += (
            f": {clock(first)} to compile {', '.join(compiled)}, then {clock(then)} of training "
            f"(without compiling: {clock(sum(seconds.values()))})"
        )
    if slowness > BUSY and first + then >= 1.0:
        alone = clock((first + then) / slowness)
        took += f", as busy as this machine is now; {alone} if no other program ran"
    say(f"plan: {plan.progress} gradient steps; {took}")
    if first + then > LONG and not plan.done:
        minutes = round(LONG / 60)
        if learner.preset != FAST and has_presets(learner.presets_name()):
            shorter = f"preset={FAST!r} (--preset {FAST}) has a plan of minutes for every dataset"
        else:
            shorter = f"a total_timesteps (--steps) of less than {plan.total:,} shortens all stages"
        say(f"That is more than {minutes} minutes on this machine; {shorter}.")


def announce_threads(stages: Sequence[str]) -> None:
    """Print for which stages one thread has turned out to be faster than all of several."""
    every = torch.get_num_threads()
    if stages and every > 1:
        number = "two" if every == 2 else str(every)
        say(f"{', '.join(stages)}: one thread is faster than {number} on this machine just now")
