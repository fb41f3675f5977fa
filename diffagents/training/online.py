"""What `learn_online` does: act, keep what happened, update on a mixture of old and new data. Nothing about any algorithm.

Every environment step: the updates that are owed, one action, its outcome into the replay buffer, the callback. Saved inside
the callback (or after Ctrl-C), agent and buffer together are the whole state: the resumed run does what this one would, but for
algorithms that prepare tables, which are made anew.
"""

import json
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffagents.config.checks import check_choice, check_number, whole_number
from diffagents.data.load import load_dataset
from diffagents.data.normalize import fit_reward_transform
from diffagents.data.replay_buffer import Mixture, Replay
from diffagents.data.sampler import Sampler
from diffagents.envs.make import env_id_of
from diffagents.functional import lambda_returns
from diffagents.storage import checkpoint
from diffagents.training import prepare, provenance, session
from diffagents.training.callbacks import make_callback, make_logger
from diffagents.training.monitor import Monitor
from diffagents.training.plan import OnlineRun, OnlineSettings
from diffagents.training.rollout import World, explore
from diffagents.training.updates import Runner, Stage

MAX_RELAXATION = 16.0
"""The most that `constraint_relaxation` grows to: by then the constraint hardly binds, and beyond it only floats overflow."""


def checked(settings: OnlineSettings) -> OnlineSettings:
    """The settings with whole numbers as int. Raises ValueError for what a run cannot be."""
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


def begin(agent: Any, total: int | None, env: Any, dataset: Any, settings: OnlineSettings) -> tuple[OnlineRun, Sampler | None]:
    """Check everything, before anything is done: (the run, the offline data in the learner's units). Raises ValueError, ..."""
    settings = checked(settings)
    if total is not None:
        total = whole_number("total_timesteps", total, 1, " of environment steps")
    if agent._policy_missing:
        raise RuntimeError(
            f'this {type(agent).__name__} has no policy yet: learn(data, stages=("{agent.POLICY_STAGE}",)) first'
        )
    checkpoint.need_learner(agent)
    stages = list(agent.STAGE_SHARES)
    needed = stages[: stages.index(agent.POLICY_STAGE) + 1]
    if any(agent.stage_steps.values()) and (missing := [name for name in needed if agent.stage_steps[name] == 0]):
        raise ValueError(f"the stage {missing[0]!r} was never trained: learn(data, stages=({missing[0]!r},)) first")
    if env is not None:
        agent.set_env(env)
    data = None
    if dataset is not None:
        data = load_dataset(dataset, env=agent._env, obs_keys=agent.obs_keys, verbose=agent.verbose)
        data = prepare.adopt(agent, data)
    if agent._env is None:
        stored = (agent.dataset_info or {}).get("env_spec")
        if stored is None:
            raise ValueError("no environment is known: pass env=, an id, a Gymnasium Env or an SB3 VecEnv")
        agent.set_env(stored)
    if agent.get_vec_normalize_env() is not None:
        raise ValueError(
            "the environment is inside a VecNormalize, which would move the observations and rewards that the agent was "
            "trained on: pass it without; the agent keeps its own normaliser and reward transform"
        )
    if agent.reward_transform is None:
        _start_without_data(agent)
    run = _make_run(agent, total, settings, None if data is None else str(data.info["sha256"]))
    sampler = data.sampler(agent.device, agent.reward_transform, agent.obs_normalizer) if data is not None else None
    if run.settings.calibrate:
        if not agent.CALIBRATES or sampler is None:
            raise ValueError(
                "calibrate=True takes its floors from dataset=, for critics that bootstrap from the policy's own actions "
                f"(DiffusionQL, DiffCPS, BDPO, TD3BC), not for {type(agent).__name__}{'' if agent.CALIBRATES else ' at all'}"
            )
        sampler = sampler.with_extras(floor=floors(sampler, agent.config.gamma))
    if data is None and run.settings.offline_ratio == 1:
        raise ValueError("offline_ratio=1 learns from the dataset alone: pass dataset=, or a ratio below 1")
    return run, sampler


def floors(data: Sampler, gamma: float) -> Tensor:
    """The discounted return that followed each row, (N,): what a better policy's Q is not below. Minus infinity: not known.

    After a time-out or a cut it is not known, unless no reward is negative: then what is left out only adds to it.
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


def _start_without_data(agent: Any) -> None:
    """An agent that never saw data: rewards stay as they are, unless their transform needs no data to be fitted."""
    name = "none" if agent.config.reward_transform == "auto" else agent.config.reward_transform
    if name in ("iql_locomotion", "normalize"):
        raise ValueError(f'reward_transform="{name}" is fitted on data: pass dataset=, or another transform ("none")')
    agent.reward_transform = fit_reward_transform(name, torch.zeros(0), torch.zeros(0))
    env_id = env_id_of(agent._env)
    agent.dataset_info = {
        "id": f"no dataset: learned online{f' in {env_id}' if env_id else ''}",
        "kind": "online",
        "sha256": "",
        "n_steps": 0,
        "n_episodes": 0,
        "mean_return": 0.0,
        "env_spec": _spec_json(agent._env),
    }


def _spec_json(env: Any) -> str | None:
    try:
        spec = json.loads(env.get_attr("spec")[0].to_json())
        spec["additional_wrappers"] = [one for one in spec["additional_wrappers"] if one["name"] != "Monitor"]  # as_vec_env's
        return json.dumps(spec)
    except Exception:  # no spec, or one that JSON does not hold
        return None


def _make_run(agent: Any, total: int | None, settings: OnlineSettings, data: str | None) -> OnlineRun:
    """The run to go on with (total None), or a new one on the buffer that there is."""
    run: OnlineRun | None = agent.online
    if total is None:
        if run is None or (run.done >= run.total and run.owed <= 0):
            raise ValueError("no online run is unfinished: say total_timesteps, the environment steps to take")
        if settings not in (OnlineSettings(), run.settings):
            raise ValueError(f"the unfinished run goes on with {run.settings}: leave these arguments out, or begin another")
        if agent.replay_buffer is None:
            raise RuntimeError(
                f"the unfinished run has a replay buffer of its {run.done:,} steps, which is not here: load what "
                "save_replay_buffer(path) wrote with load_replay_buffer(path), or begin another with total_timesteps"
            )
        if run.data is not None and data is None:
            raise ValueError("the unfinished run learns from a dataset too: pass the same dataset=")
        if run.data != data:
            warnings.warn("these are other data than those that the unfinished run began with", stacklevel=5)
        return run
    if data not in (None, agent.dataset_info["sha256"]):
        warnings.warn(f"these are other data than {agent.dataset_info['id']}, whose transform is kept", stacklevel=5)
    kept = agent.replay_buffer is not None and settings.buffer_size in (None, agent.replay_buffer.capacity)
    starts = settings.learning_starts
    if starts is None:
        starts = min(5000 if data is None else 1000, total // 5)
    starts = max(0, starts - (len(agent.replay_buffer) if kept else 0))
    if starts >= total:
        warnings.warn(f"learning_starts={starts} leaves no update to a run of {total} steps: it only collects", stacklevel=5)
    n_episodes = 0 if run is None else run.n_episodes + 1  # the unfinished one is not walked again
    random = bool(agent._pristine)
    # Where no stage was trained, the networks came from files, or there was nothing before the first online run.
    settled = agent.stage_steps[agent.POLICY_STAGE] > 0 or (not random and (run is None or run.settled))
    return OnlineRun(total, settings, starts, random, settled, data, n_episodes=n_episodes)


def start(agent: Any, run: OnlineRun) -> None:
    """Make `run` the agent's, with a buffer to go with it."""
    if run is not agent.online:
        size, old = run.settings.buffer_size, agent.replay_buffer
        if old is None or size not in (None, old.capacity):
            if old is not None:
                warnings.warn("another buffer_size: the replay buffer of the last online run is dropped", stacklevel=4)
            agent.replay_buffer = Replay(agent.obs_dim, agent.act_dim, size or 1_000_000, agent.device)
        agent.replay_buffer.cut()
        agent.provenance = provenance.begin(agent.provenance, agent.device, reset=False)
    agent.online = run


def constraint_relaxation(agent: Any) -> float:
    """By how much the constraint to the data is weaker by now: doubled every `online_halflife` environment steps."""
    halflife = getattr(agent.config, "online_halflife", None)
    if halflife is None:
        return 1.0
    doublings: float = agent.n_env_steps / halflife
    return float(min(2.0 ** min(doublings, 100.0), MAX_RELAXATION))


def learn_online(
    agent: Any,
    total: int | None,
    env: Any,
    dataset: Any,
    settings: OnlineSettings,
    callback: Any,
    log_interval: int | None,
    tb_log_name: str | None,
    progress_bar: bool,
) -> None:
    """See `Agent.learn_online`."""
    if log_interval is not None:
        whole_number("log_interval", log_interval, 1, " of environment steps")
    with prepare.nothing_if_refused(agent):
        run, offline = begin(agent, total, env, dataset, settings)
        tick = make_callback(agent, callback, progress_bar)
        stage = agent.online_stage()
    start(agent, run)
    if agent.tensorboard_log is not None and agent._logger is None:
        agent._logger = make_logger(agent, tb_log_name or type(agent).__name__, False)
    if agent.verbose:
        _announce(agent, run, offline)
    mixture = Mixture(offline, agent.replay_buffer, _ratio(agent, run))
    local = {"self": agent, "total_timesteps": agent.num_timesteps + run.total - run.done, "tb_log_name": tb_log_name}
    local |= {"replay_buffer": agent.replay_buffer, "dones": np.zeros(agent.n_envs, bool), "infos": [{}] * agent.n_envs}
    with session.timed(agent, tick, local), session.matmul_precision(agent):
        with session.interrupt_between_updates() as interrupted:
            _run(agent, run, stage, mixture, tick, local, log_interval, interrupted)
        if interrupted.is_set():
            raise KeyboardInterrupt


def _run(
    agent: Any, run: OnlineRun, stage: Stage, mixture: Mixture, tick: Any, local: dict[str, Any], look: int | None, stop: Any
) -> None:
    for name, optimizer in agent.optimizers.items():  # constant from here on, whatever the offline schedule ended with
        optimizer.start_schedule(0)
        if name == "policy" and run.settled:
            optimizer.lr.fill_(getattr(agent.config, "online_learning_rate", optimizer.learning_rate))
    world = World(agent, run)
    watch = Monitor(agent, stage.name, run.total, run.done)
    interval = look or max(1, min(1000, run.total // 20))
    runner: Runner | None = None
    prepared_at = -stage.refresh
    agent._exploring = True
    try:
        while True:
            while run.owed > 0 and not stop.is_set():
                if runner is None or (stage.prepare is not None and run.done - prepared_at >= stage.refresh):
                    sampler = mixture if stage.prepare is None else stage.prepare(mixture, agent.generator)
                    prepared_at = run.done
                    if sampler is None:  # nothing to learn from yet
                        run.starts = max(run.starts, run.done + stage.refresh)
                        if run.starts >= run.total:
                            warnings.warn("no episode has ended: this run has nothing to learn from", stacklevel=4)
                        break
                    runner = runner or Runner(stage, sampler, agent.generator)
                    runner.sampler = sampler
                agent._pristine = agent._policy_missing = False
                agent.constraint_relaxation = constraint_relaxation(agent)
                runner.step(run.n_updates)
                run.n_updates += 1
                agent.n_updates += 1
            if run.done >= run.total or stop.is_set():
                break
            if tick is not None:
                tick.on_rollout_start()
            try:
                local |= world.step(explore(agent, world.obs, run.random and run.n_updates == 0))
            except FloatingPointError:
                watch.log(run.done, {"action": float("nan")})
                raise
            agent.num_timesteps += world.n
            agent.n_env_steps += world.n
            before, run.done = run.done, run.done + world.n
            if run.done // interval > before // interval and run.done < run.total:
                _log(agent, watch, run, runner, world, mixture)
            if tick is not None:
                tick.update_locals(local)
                go_on = tick.on_step()
                tick.on_rollout_end()
                if not go_on:
                    break
        _log(agent, watch, run, runner, world, mixture)
    finally:
        agent.constraint_relaxation, agent._exploring = 1.0, False


def _log(agent: Any, watch: Monitor, run: OnlineRun, runner: Runner | None, world: World, mixture: Mixture) -> None:
    """Metrics of the updates, and the return of the episodes that ended since the last look: `train_return`, exploring."""
    means = {} if runner is None else runner.means()
    if world.finished:
        returns, lengths = (float(np.mean(column)) for column in zip(*world.finished, strict=True))
        means = {"train_return": returns, **means}
        if agent._logger is not None:  # SB3's names for the same
            agent._logger.record("rollout/ep_rew_mean", returns)
            agent._logger.record("rollout/ep_len_mean", lengths)
        world.finished = []
    watch.limit_q(mixture)  # rewards that were not met before widen it
    watch.log(run.done, means)


def _ratio(agent: Any, run: OnlineRun) -> float | str:
    asked = run.settings.offline_ratio
    ratio: float | str = agent.OFFLINE_RATIO if asked is None else asked
    return ratio


def _announce(agent: Any, run: OnlineRun, offline: Sampler | None) -> None:
    share = _ratio(agent, run)
    mix = "uniform over data and buffer" if isinstance(share, str) else f"{100 * share:g} % of each batch from the data"
    print(
        f"{type(agent).__name__} online: {run.total - run.done:,} environment steps in {agent.n_envs} environment(s), "
        f"{run.settings.utd:g} updates each, after {run.starts:,} steps; "
        + (f"{len(offline):,} offline transitions, {mix}" if offline is not None else "no offline data"),
        flush=True,
    )
