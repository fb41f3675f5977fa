"""The online training loop: act, store the transitions, update on a mixture of offline and new data, for any algorithm.

Each iteration runs the updates that are due, takes one step of the environments, stores it in the replay buffer and calls the
callback. Agent and buffer, saved inside the callback or after Ctrl-C, are the whole state: a resumed run reproduces the
uninterrupted one, except for algorithms that prepare extras, which are recomputed.
"""

import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffagents.config.checks import check_choice, check_number, whole_number
from diffagents.data.load import load_dataset
from diffagents.data.normalize import fit_reward_transform
from diffagents.data.replay_buffer import Mixture, Replay
from diffagents.data.sampler import Sampler
from diffagents.envs.make import (
    env_id_of,
    refuse_vec_normalize,
    spec_to_store_or_warn,
    warn_of_normalized_observations,
)
from diffagents.errors import TrainingDiverged
from diffagents.functional import lambda_returns
from diffagents.training import provenance
from diffagents.training.callbacks import make_logger
from diffagents.training.monitor import Monitor, say
from diffagents.training.plan import OnlineRun, OnlineSettings
from diffagents.training.prepare import adopt, check_size
from diffagents.training.rollout import Rollout, explore
from diffagents.training.session import interrupt_between_updates, matmul_precision, timed
from diffagents.training.state import Learner, restore
from diffagents.training.threads import n_threads, threads_restored
from diffagents.training.updates import Runner, Stage

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback

MAX_RELAXATION = 16.0
"""The largest relaxation factor of the behaviour constraint, which hardly binds by then; a larger one could only overflow."""

COMPARED = 10
"""The most episodes at each end of a run that are compared when it ends."""


def check_arguments(total: int | None, log_interval: int | None, settings: OnlineSettings) -> OnlineSettings:
    """Check the numeric arguments of `learn_online`, before any data is read.

    Returns:
        The settings with whole numbers as int.

    Raises:
        ValueError: One of them is out of its range.
    """
    for name, value in (("total_timesteps", total), ("log_interval", log_interval)):
        if value is not None:
            whole_number(name, value, 1, " of environment steps")
    if isinstance(ratio := settings.offline_ratio, str):
        check_choice("offline_ratio", ratio, ("uniform",))
    elif ratio is not None:
        check_number("offline_ratio", ratio, 'must lie in [0, 1], or be "uniform"', lambda x: 0 <= x <= 1)
    check_number("utd", settings.utd, "must be positive, at most 1000 updates per environment step", lambda x: 0 < x <= 1000)
    check_choice("calibrate", settings.calibrate, (True, False))
    starts, size = settings.learning_starts, settings.buffer_size
    return OnlineSettings(
        ratio if ratio is None or isinstance(ratio, str) else float(ratio),
        None if starts is None else whole_number("learning_starts", starts, 0, " of environment steps"),
        float(settings.utd),
        None if size is None else whole_number("buffer_size", size, 1, " of transitions"),
        bool(settings.calibrate),
    )


def accept(
    learner: Learner, total: int | None, env: Any, dataset: Any, settings: OnlineSettings
) -> tuple[OnlineRun, Sampler | None]:
    """Check everything before any work, and adopt environment and data.

    It changes `learner`, which is a candidate (see prepare.py).

    Args:
        learner: The learner, with all its networks.
        total: Environment steps to take; None resumes the unfinished run.
        env: What `set_env` takes, or None.
        dataset: What `load_dataset` takes, or None.
        settings: Checked by `check_arguments`.

    Returns:
        The run, and the offline data, normalised and reward-transformed; None without any.

    Raises:
        ValueError: Something does not fit, or is missing.
        RuntimeError: There is no policy yet, or the replay buffer of a resumed run is missing.
    """
    state, name = learner.state, type(learner).__name__
    total = None if total is None else int(total)
    if state.policy_missing:
        raise RuntimeError(f'this {name} has no policy yet: learn(data, stages=("{learner.POLICY_STAGE}",)) first')
    stages = list(learner.STAGE_SHARES)
    needed = stages[: stages.index(learner.POLICY_STAGE) + 1]
    missing = [stage for stage in needed if state.stage_steps[stage] == 0]
    if missing and any(state.stage_steps.values()):
        raise ValueError(f"the stage {missing[0]!r} was never trained: learn(data, stages=({missing[0]!r},)) first")
    if env is not None:
        learner.set_env(env)
    data = None
    if dataset is not None:
        data = load_dataset(dataset, env=learner.env, obs_keys=learner.obs_keys, verbose=learner.verbose)
        data = adopt(learner, data)
    if learner.env is None:
        stored = (state.dataset_info or {}).get("env_spec")
        if stored is None:
            raise ValueError("no environment is known: pass env=, an id, a Gymnasium Env or an SB3 VecEnv")
        learner.set_env(stored)
    refuse_vec_normalize(learner.env)  # it may have been switched on since
    warn_of_normalized_observations(state.dataset_info, learner.env)
    if state.reward_transform is None:
        _start_without_data(learner)
    run = _make_run(learner, total, settings, None if data is None else str(data.info["sha256"]))
    sampler = None
    if data is not None:
        sampler = data.sampler(learner.device, state.reward_transform, learner.obs_normalizer)
    if run.settings.calibrate:
        if not learner.CALIBRATES or sampler is None:
            raise ValueError(
                "calibrate=True takes its floors from dataset=, for critics that bootstrap from the policy's own actions "
                f"(DiffusionQL, DiffCPS, BDPO, TD3BC), not for {name}{'' if learner.CALIBRATES else ' at all'}"
            )
        sampler = sampler.with_extras(floor=floors(sampler, learner.config.gamma))
    if data is None and run.settings.offline_ratio == 1:
        raise ValueError("offline_ratio=1 learns from the dataset alone: pass dataset=, or a ratio below 1")
    learner.online_stage()  # an algorithm may refuse it
    return run, sampler


def floors(data: Sampler, gamma: float) -> Tensor:
    """The discounted return that followed each transition, a lower bound of the Q of a better policy (as in Cal-QL).

    After a time-out or a cut the return is unknown, unless no reward is negative: the missing rewards can then only add to it.

    Args:
        data: N transitions of whole episodes.
        gamma: Discount.

    Returns:
        Lower bounds (N,); minus infinity where the return is unknown.
    """
    rows = data.all()
    returns = lambda_returns(rows.rew, rows.done, torch.zeros_like(rows.rew), data.episode_ends, gamma, 1.0)
    if bool((rows.rew >= 0).all()):
        return returns
    ends = data.episode_ends[data.episode_ends > 0]
    terminates = rows.done.cpu()[ends - 1] == 1
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype))
    known = terminates.repeat_interleave(lengths).to(returns.device)
    return torch.where(known, returns, -torch.inf)


def _start_without_data(learner: Learner) -> None:
    """Set the reward transform and dataset info of a learner without data.

    The transform is one that needs no data: none for "auto", and for "unit_returns", which asks for no certain scale.
    """
    name = "none" if learner.config.reward_transform in ("auto", "unit_returns") else learner.config.reward_transform
    if name in ("return_range", "iql_locomotion", "normalize"):
        raise ValueError(f'reward_transform="{name}" is fitted on data: pass dataset=, or another transform ("none")')
    learner.state.reward_transform = fit_reward_transform(name, torch.zeros(0), torch.zeros(0))
    env_id = env_id_of(learner.env)
    learner.state.dataset_info = {
        "id": f"no dataset: learned online{f' in {env_id}' if env_id else ''}",
        "kind": "online",
        "sha256": "",
        "n_steps": 0,
        "n_episodes": 0,
        "mean_return": 0.0,
        "env_spec": _spec_json(learner.env),
    }
    check_size(learner)


def _spec_json(env: Any) -> str | None:
    """JSON of the environment's spec; None if it has none, or one that may not be stored."""
    try:
        spec = env.get_attr("spec")[0]
    except Exception:  # workers that cannot send their spec
        return None
    return spec_to_store_or_warn(spec)


def _make_run(learner: Learner, total: int | None, settings: OnlineSettings, data: str | None) -> OnlineRun:
    """The unfinished run if `total` is None, else a new one, which uses the present buffer."""
    state, replay = learner.state, learner.replay_buffer
    run = state.online
    if total is None:
        if run is None or (run.done >= run.total and run.owed <= 0):
            raise ValueError("there is no unfinished online run: pass total_timesteps, the number of environment steps to take")
        if settings not in (OnlineSettings(), run.settings):
            raise ValueError(
                f"the unfinished run continues with {run.settings}: leave these arguments out, or start a new run with "
                "total_timesteps"
            )
        if replay is None:
            raise RuntimeError(
                f"the unfinished run needs its replay buffer of {run.done:,} steps: load the file that "
                "save_replay_buffer(path) wrote with load_replay_buffer(path), or start a new run with total_timesteps"
            )
        if run.data is not None and data is None:
            raise ValueError("the unfinished run learns from a dataset too: pass the same dataset=")
        if run.data != data:
            warnings.warn("the dataset differs from that of the unfinished run", stacklevel=4)
        return run
    if data not in (None, state.data["sha256"]):
        warnings.warn(f"the dataset differs from the first one ({state.data['id']}), whose transform is kept", stacklevel=4)
    kept = replay is not None and settings.buffer_size in (None, replay.capacity)
    starts = settings.learning_starts
    if starts is None:
        starts = min(5000 if data is None else 1000, total // 5)
    starts = max(0, starts - (len(replay) if kept and replay is not None else 0))
    if starts >= total:
        warnings.warn(
            f"learning_starts={starts} leaves no updates in a run of {total} steps, which will only collect data", stacklevel=4
        )
    n_episodes = 0 if run is None else run.n_episodes + 1  # the unfinished one is not replayed
    # If no stage was trained, the networks came from files, or there was nothing before the first online run.
    settled = state.stage_steps[learner.POLICY_STAGE] > 0 or (not state.pristine and (run is None or run.settled))
    return OnlineRun(total, settings, starts, state.pristine, settled, data, n_episodes=n_episodes)


def constraint_relaxation(learner: Learner) -> float:
    """The factor by which the behaviour constraint is weakened; it doubles every `online_halflife` environment steps."""
    halflife = getattr(learner.config, "online_halflife", None)
    if halflife is None:
        return 1.0
    doublings: float = learner.state.n_env_steps / halflife
    return float(min(2.0 ** min(doublings, 100.0), MAX_RELAXATION))


def train(
    learner: Learner,
    run: OnlineRun,
    offline: Sampler | None,
    callback: "BaseCallback | None" = None,
    log_interval: int | None = None,
    tb_log_name: str | None = None,
) -> None:
    """Run the remaining steps of a validated run.

    Args:
        learner: The agent to train.
        run: From `accept`.
        offline: The offline data, from `accept`.
        callback: An initialised SB3 callback.
        log_interval: Environment steps between log steps. Default: a twentieth of the run, at most 1000.
        tb_log_name: Name of the run in TensorBoard.

    Raises:
        TrainingDiverged: NaN, or Q has diverged; the learner is restored to its last good state.
        KeyboardInterrupt: After Ctrl-C, at the end of the current update.
    """
    stage = learner.online_stage()
    replay = _begin(learner, run)
    if learner.tensorboard_log is not None and learner.sb3_logger is None:
        learner.sb3_logger = make_logger(learner, tb_log_name or type(learner).__name__, False)
    if learner.verbose:
        _announce(learner, run, offline)
    mixture = Mixture(offline, replay, _ratio(learner, run))
    local: dict[str, Any] = {
        "self": learner,
        "total_timesteps": learner.state.num_timesteps + run.total - run.done,
        "tb_log_name": tb_log_name,
        "replay_buffer": replay,
        "dones": np.zeros(learner.n_envs, bool),
        "infos": [{}] * learner.n_envs,
    }
    interval = log_interval or max(1, min(1000, run.total // 20))
    with timed(learner, callback, local), matmul_precision(learner), interrupt_between_updates() as interrupted:
        _loop(learner, run, stage, mixture, callback, local, interval, interrupted)
    if interrupted.is_set():
        raise KeyboardInterrupt


def _begin(learner: Learner, run: OnlineRun) -> Replay:
    """Set `run` as the learner's run, and create its replay buffer if necessary."""
    state, replay = learner.state, learner.replay_buffer
    if run is not state.online or replay is None:
        size = run.settings.buffer_size
        if replay is None or size not in (None, replay.capacity):
            if replay is not None:
                warnings.warn("buffer_size differs: the replay buffer of the last online run is discarded", stacklevel=4)
            replay = learner.replay_buffer = Replay(learner.obs_dim, learner.act_dim, size or 1_000_000, learner.device)
        replay.cut()
        state.provenance = provenance.begin(state.provenance, learner.device, False, learner.record_command)
    state.online = run
    return replay


@threads_restored()
def _loop(
    learner: Learner,
    run: OnlineRun,
    stage: Stage,
    mixture: Mixture,
    callback: "BaseCallback | None",
    local: dict[str, Any],
    interval: int,
    interrupted: threading.Event,
) -> None:
    state = learner.state
    torch.set_num_threads(n_threads(learner))
    for name, optimizer in learner.optimizers.items():  # constant from here on, whatever the offline schedule ended at
        optimizer.start_schedule(0)
        if name == "policy" and run.settled:
            optimizer.lr.fill_(getattr(learner.config, "online_learning_rate", optimizer.learning_rate))
    rollout = Rollout(learner, run)
    monitor = Monitor(learner, stage.name, run.total, run.done)
    if run.n_updates == 0 and run.starts < run.total:  # the steps before the first update are far faster than those after it
        monitor.no_time_left = "time left unknown before the first update"
    runner: Runner | None = None
    prepared_at = -stage.refresh
    state.exploring = True
    try:
        while True:
            while run.owed > 0 and not interrupted.is_set():
                if runner is None or (stage.prepare is not None and run.done - prepared_at >= stage.refresh):
                    sampler = mixture if stage.prepare is None else stage.prepare(mixture, learner.generator)
                    prepared_at = run.done
                    if sampler is None:  # nothing to learn from yet
                        run.starts = max(run.starts, run.done + stage.refresh)
                        if run.starts >= run.total:
                            warnings.warn(
                                "no episode has ended, so this run has nothing to learn from: increase total_timesteps",
                                stacklevel=4,
                            )
                        break
                    if runner is None:
                        runner = Runner(stage, sampler, learner.generator)
                        rollout.updating = True
                    runner.sampler = sampler
                state.pristine = state.policy_missing = False
                state.constraint_relaxation = constraint_relaxation(learner)
                runner.step(run.n_updates)
                run.n_updates += 1
                state.n_updates += 1
                if monitor.no_time_left:
                    monitor.no_time_left = ""
                    monitor.restart_clock(run.done)
            if run.done >= run.total or interrupted.is_set():
                break
            if callback is not None:
                callback.on_rollout_start()
            try:
                local |= rollout.step(explore(learner, rollout.obs, run.random and run.n_updates == 0))
            except FloatingPointError:
                _check(monitor, run.done, {"action": float("nan")})
                raise
            state.num_timesteps += rollout.n
            state.n_env_steps += rollout.n
            before, run.done = run.done, run.done + rollout.n
            if run.done // interval > before // interval and run.done < run.total:
                _log(learner, monitor, run, runner, rollout, mixture)
            if callback is not None:
                callback.update_locals(local)
                keep_going = callback.on_step()
                callback.on_rollout_end()
                if not keep_going:
                    break
        _log(learner, monitor, run, runner, rollout, mixture)
        if learner.verbose:
            say(before_and_after(rollout))
    finally:
        state.constraint_relaxation, state.exploring = 1.0, False


def before_and_after(rollout: Rollout) -> str:
    """Compare the first finished episodes of a run with the last ones, in a line.

    These are the episodes that the run has acted, with exploration, because nothing is known of the environment that would
    allow others: it may be a robot. At most COMPARED at each end are taken, and none is counted twice.
    """
    returns, before = rollout.all_returns, rollout.n_before
    n = min(COMPARED, len(returns) // 2)
    if n == 0:
        return f"online: {len(returns)} finished episode(s) are too few to compare the return before the run with that after it"
    first, last = returns[: min(n, before) if before else n], returns[-n:]
    how = "by random actions" if before and rollout.run.random else "before any update" if before else "with updates already"
    return (
        f"online: mean return while exploring, before: {_mean(first)} (first {len(first)} of {len(returns)} episodes, {how}); "
        f"after: {_mean(last)} (last {len(last)})"
    )


def _mean(returns: Sequence[float]) -> str:
    """The mean with its standard error."""
    error = f" ± {np.std(returns, ddof=1) / len(returns) ** 0.5:.2f}" if len(returns) > 1 else ""
    return f"{np.mean(returns):.2f}{error}"


def _log(learner: Learner, monitor: Monitor, run: OnlineRun, runner: Runner | None, rollout: Rollout, mixture: Mixture) -> None:
    """Log the metrics of the updates and, as `train_return`, the mean return of the exploring episodes since the last time."""
    means = {} if runner is None else runner.means()
    if rollout.finished:
        returns, lengths = (float(np.mean(column)) for column in zip(*rollout.finished, strict=True))
        means = {"train_return": returns, **means}
        if learner.sb3_logger is not None:  # SB3's names for the same
            learner.sb3_logger.record("rollout/ep_rew_mean", returns)
            learner.sb3_logger.record("rollout/ep_len_mean", lengths)
        rollout.finished = []
    monitor.limit_q(mixture)  # new rewards can raise it
    _check(monitor, run.done, means)


def _check(monitor: Monitor, done: int, means: dict[str, float]) -> None:
    try:
        monitor.log(done, means)
    except TrainingDiverged:
        restore(monitor.learner, monitor.good)
        raise


def _ratio(learner: Learner, run: OnlineRun) -> float | str:
    """The share of offline data in a batch: the argument, else the algorithm's default."""
    ratio = run.settings.offline_ratio
    return learner.OFFLINE_RATIO if ratio is None else ratio


def _announce(learner: Learner, run: OnlineRun, offline: Sampler | None) -> None:
    share = _ratio(learner, run)
    mix = "uniform over data and buffer" if isinstance(share, str) else f"{100 * share:g} % of each batch from the data"
    say(
        f"{type(learner).__name__} online: {run.total - run.done:,} environment steps in {learner.n_envs} environment(s), "
        f"{run.settings.utd:g} updates each, after {run.starts:,} steps; "
        + (f"{len(offline):,} offline transitions, {mix}" if offline is not None else "no offline data")
    )
