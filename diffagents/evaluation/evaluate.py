"""Anything with SB3's `predict`, measured: returns, success, the D4RL scale, intervals, a video.

The raw return always comes first; a score on the D4RL scale stands beside it, never instead of it.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from diffagents.envs.make import env_id_of, is_sb3, make_env
from diffagents.evaluation.d4rl import D4RL_REFERENCE, _reference_name, _scores, d4rl_score
from diffagents.evaluation.episodes import SB3, Policy, Single, Vector, check_spaces, play
from diffagents.evaluation.statistics import bootstrap


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. `print` it for one line; `to_json` for a file.

    returns, lengths: raw return and number of steps of each episode. successes: whether it succeeded at any step, None
    if the environment never says. env_id: None where it has no id. deterministic: what `predict` was asked for.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    successes: tuple[bool, ...] | None = None
    env_id: str | None = None
    seed: int | None = 0
    deterministic: bool = True

    @property
    def mean_return(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std_return(self) -> float:
        """Spread over episodes (divided by n, as SB3's `evaluate_policy` gives it)."""
        return float(np.std(self.returns))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of `mean_return`: of the episodes only; it knows nothing of other training seeds."""
        return bootstrap(self.returns)

    @property
    def mean_length(self) -> float:
        return float(np.mean(self.lengths))

    @property
    def success_rate(self) -> float | None:
        """Share of episodes in [0, 1] that succeeded at any step."""
        return None if self.successes is None else float(np.mean(self.successes))

    @property
    def score(self) -> float | None:
        """`d4rl_score` of the returns: 0 is D4RL's random policy, 100 its expert."""
        return d4rl_score(self.env_id, self.returns)

    @property
    def score_interval(self) -> tuple[float, float] | None:
        """95 % bootstrap interval of `score`."""
        scores = _scores(self.env_id, self.returns)
        return None if scores is None else bootstrap(scores)

    @property
    def score_reference(self) -> tuple[str, float, float] | None:
        """The table and row behind `score`, its return at 0 and its return at 100."""
        name = _reference_name(self.env_id)
        return None if name is None else (f"D4RL {name} (mujoco-py)", *D4RL_REFERENCE[name])

    def to_json(self) -> dict[str, Any]:
        """Everything above as plain JSON types."""
        derived = [name for name, value in vars(type(self)).items() if isinstance(value, property)]
        values = {"n_episodes": len(self.returns)} | {name: getattr(self, name) for name in derived} | vars(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __str__(self) -> str:
        low, high = self.interval
        n = len(self.returns)
        parts = [
            f"return {self.mean_return:.2f} ± {self.std_return:.2f} ({n} episode{'s' * (n != 1)}; "
            f"95 % interval of the mean {low:.2f} to {high:.2f})"
        ]
        if self.score is not None and self.score_interval is not None:
            parts.append(f"D4RL scale {self.score:.1f} [{self.score_interval[0]:.1f}, {self.score_interval[1]:.1f}]")
        if self.success_rate is not None:
            parts.append(f"success {100 * self.success_rate:.0f} %")
        return f"{self.env_id or 'environment'}: " + "; ".join(parts)


def evaluate(
    policy: Policy,
    env: Any,
    n_episodes: int = 10,
    *,
    seed: int | None = 0,
    deterministic: bool = True,
    n_envs: int = 1,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Plays `n_episodes` whole episodes and reports them.

    policy: has `predict(obs, state, episode_start, deterministic) -> (actions, state)` on batches of observations.
    env: what `make_env` takes; `n_envs` and `env_kwargs` are for an id or a stored spec. What was made here is closed
    here; an environment that was passed in stays open.

    *Which episodes.* Each of n sub-environments plays a number of episodes fixed beforehand (the numbers differ by one
    at most) and the rest is ignored: taking the first n to finish would favour short episodes. Results are ordered by
    round, then by sub-environment.
    *Seeds.* Made from an id, or a single Env: episode k is reset with seed + k, whatever n_envs. An SB3 VecEnv or a
    VectorEnv: sub-environment i is reset with seed + i at first, then goes on by itself. The same call gives the same
    numbers if the policy depends on nothing else; `deterministic=False` draws from the policy's own generator.
    *Return.* `info["episode"]["r"]` where a Monitor or RecordEpisodeStatistics put it (what wraps it may change the
    reward that is seen), VecNormalize's original reward, else the sum of rewards.
    *Success.* An episode succeeded if `info["is_success"]` or `info["success"]` was true at any of its steps; None if
    neither ever appears.

    Raises ValueError for n_episodes < 1, spaces other than the policy's, actions of a wrong shape or with NaN, rewards
    with NaN, an episode that does not end; and what `make_env` raises.
    """
    if n_episodes < 1 or n_envs < 1:
        raise ValueError(f"n_episodes and n_envs must be at least 1, not {n_episodes} and {n_envs}")
    if not callable(getattr(policy, "predict", None)):
        raise TypeError(f"the policy has no predict(obs, ...): got {type(policy).__name__}")
    by_name = isinstance(env, str | EnvSpec)
    if not by_name and n_envs != 1:
        raise ValueError(f"n_envs={n_envs} is for an environment id; make the environment passed with as many instead")
    with ExitStack() as cleanup:
        world: Single | Vector | SB3
        if by_name:
            envs = []
            for _ in range(min(n_envs, n_episodes)):
                envs.append(make_env(env, **(env_kwargs or {})))
                cleanup.callback(envs[-1].close)
            world = Single(envs)
        else:
            env = make_env(env, **(env_kwargs or {}))
            if is_sb3(env):
                world = SB3(env, cleanup)
            else:
                world = Vector(env) if isinstance(env, gym.vector.VectorEnv) else Single([env])
        check_spaces(policy, world.observation_space, world.action_space)
        episodes = play(policy, world, n_episodes, seed, deterministic)
        env_id = env_id_of(envs[0] if by_name else env)
    said = [success for _, _, success in episodes]
    return Evaluation(
        returns=tuple(ret for ret, _, _ in episodes),
        lengths=tuple(length for _, length, _ in episodes),
        successes=None if all(success is None for success in said) else tuple(map(bool, said)),
        env_id=env_id,
        seed=seed,
        deterministic=deterministic,
    )
