"""`evaluate`: play whole episodes with any policy that has SB3's `predict`, and report returns, lengths and success.

The raw return always comes first; a score on the D4RL scale is reported in addition to it, never instead of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec

from diffagents.envs.make import (
    env_id_of,
    error_of_stored_arguments,
    is_sb3,
    make_env,
    refuse_vec_normalize,
    warn_of_normalized_observations,
)
from diffagents.evaluation.d4rl import D4RL_REFERENCE, d4rl_score, normalized_scores, reference_name
from diffagents.evaluation.episodes import SB3, Policy, Single, Step, Vector, check_spaces, is_meant_deterministic, play
from diffagents.evaluation.statistics import mean_interval, paired_difference, success_interval


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`: `print` it for one line, or write `to_json()` to a file.

    Attributes:
        returns: Raw, undiscounted return of each episode.
        lengths: Number of steps of each episode.
        successes: Whether each episode succeeded at any step; None if the environment never reports it.
        env_id: Id of the environment; None if it has none.
        seed: As passed to `evaluate`.
        deterministic: As passed to `predict` in each step.
        choice: Hyperparameters that were overridden in each call of `predict`; None if there were none.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    successes: tuple[bool, ...] | None = None
    env_id: str | None = None
    seed: int | None = 0
    deterministic: bool = True
    choice: Mapping[str, Any] | None = None

    @property
    def mean_return(self) -> float:
        """Mean of the returns."""
        return float(np.mean(self.returns))

    @property
    def std_return(self) -> float:
        """Standard deviation of the returns (divided by n, as in SB3's `evaluate_policy`)."""
        return float(np.std(self.returns))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of `mean_return` by Student's t over the episodes, None for a single one; see `evaluation.statistics`.

        It does not cover the variation of training seeds.
        """
        return mean_interval(self.returns)

    @property
    def mean_length(self) -> float:
        """Mean number of steps of an episode."""
        return float(np.mean(self.lengths))

    @property
    def success_rate(self) -> float | None:
        """Share of the episodes, in [0, 1], that succeeded at any step; None if the environment never reports it."""
        return None if self.successes is None else float(np.mean(self.successes))

    @property
    def success_interval(self) -> tuple[float, float] | None:
        """95 % interval of `success_rate` by Wilson's score, in [0, 1]; None if the environment never reports successes."""
        return None if self.successes is None else success_interval(self.successes)

    @property
    def score(self) -> float | None:
        """`d4rl_score` of the returns: 0 is D4RL's random policy, 100 its expert; None if there is no reference."""
        return d4rl_score(self.env_id, self.returns)

    @property
    def score_interval(self) -> tuple[float, float] | None:
        """`interval` on the scale of `score`, or None."""
        scores = normalized_scores(self.env_id, self.returns)
        return None if scores is None else mean_interval(scores)

    @property
    def score_reference(self) -> tuple[str, float, float] | None:
        """The table and row that `score` uses, its return at 0 and its return at 100; or None."""
        name = reference_name(self.env_id)
        return None if name is None else (f"D4RL {name} (mujoco-py)", *D4RL_REFERENCE[name])

    def difference(self, other: "Evaluation") -> tuple[float, tuple[float, float] | None]:
        """How much higher the mean return is than that of another policy from the same resets.

        Args:
            other: An evaluation in the same environment, from the same seed, with the same number of episodes.

        Returns:
            The mean difference, and its 95 % interval by Student's t over the pairs of episodes (None for one pair). It does
            not cover the variation of training seeds.

        Raises:
            ValueError: The two did not begin in the same states.
        """
        ours, theirs = ((one.env_id, one.seed, len(one.returns)) for one in (self, other))
        if ours != theirs or self.seed is None:
            raise ValueError(
                f"these episodes do not begin in the same states (environment, seed, episodes: {ours} and {theirs}): evaluate "
                "both policies with the same three"
            )
        return paired_difference(self.returns, other.returns)

    def to_json(self) -> dict[str, Any]:
        """All attributes and properties as plain JSON values."""
        derived = [name for name, value in vars(type(self)).items() if isinstance(value, property)]
        values = {"n_episodes": len(self.returns)} | {name: getattr(self, name) for name in derived} | vars(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Evaluation":
        """The evaluation that `to_json` described; what follows from its episodes is computed anew."""
        values: dict[str, Any] = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        tuples: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **tuples})

    def __str__(self) -> str:
        n, interval, score_interval = len(self.returns), self.interval, self.score_interval
        mean = "" if interval is None else "; 95 % interval of the mean {:.2f} to {:.2f}".format(*interval)
        parts = [f"return {self.mean_return:.2f} ± {self.std_return:.2f} ({n} episode{'s' * (n != 1)}{mean})"]
        if self.score is not None:
            scaled = "" if score_interval is None else " [{:.1f}, {:.1f}]".format(*score_interval)
            parts.append(f"D4RL scale {self.score:.1f}{scaled}")
        if self.success_rate is not None and self.success_interval is not None:
            low, high = self.success_interval
            parts.append(f"success {100 * self.success_rate:.0f} % [{100 * low:.0f}, {100 * high:.0f}]")
        return f"{self.env_id or 'environment'}: " + "; ".join(parts)


class _Named(Single):
    """Environments made by name. If one fails that was made from a stored spec with arguments, the error says so."""

    def __init__(self, envs: Sequence[Any], made_from: str | EnvSpec) -> None:
        super().__init__(envs)
        self.made_from = made_from

    def reset(self, seed: int | None) -> Any:
        with self._errors():
            return super().reset(seed)

    def step(self, actions: np.ndarray, left: np.ndarray) -> Step:
        with self._errors():
            return super().step(actions, left)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever an environment raises for arguments that make no sense
            named = error_of_stored_arguments(self.made_from, error)
            if named is None:
                raise
            raise named from error


def evaluate(
    policy: Policy,
    env: Any,
    n_episodes: int = 10,
    *,
    seed: int | None = 0,
    deterministic: bool | None = None,
    n_envs: int = 1,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Play `n_episodes` whole episodes and report them.

    Which episodes: each sub-environment plays a number of episodes that is fixed beforehand (the numbers differ by at most
    one), and the rest is ignored, because taking the first to finish would favour short episodes. Results are ordered by
    round, then by sub-environment.

    Return: `info["episode"]["r"]` if a Monitor or RecordEpisodeStatistics reports it (wrappers around it may change the reward
    that is visible here); else VecNormalize's original reward; else the sum of the rewards.

    Success: an episode succeeded if `info["is_success"]` or `info["success"]` was true at any of its steps.

    Args:
        policy: Has `predict(obs, state, episode_start, deterministic) -> (actions, state)` on batches of observations.
        env: What `make_env` takes. An environment made here is closed here; one that was passed in stays open.
        n_episodes: Number of episodes, at least 1.
        seed: For an id, a stored spec or a single Env, episode k is reset with seed + k, for every `n_envs`. For a VectorEnv
            or an SB3 VecEnv, sub-environment i is first reset with seed + i and then continues without a seed. None: no seeds.
            The same call gives the same numbers if the policy depends on nothing else.
        deterministic: Passed to `predict`; False lets the policy draw from its own generator. None: as the policy is meant to
            act, which an agent knows by its hyperparameter `deterministic`; any other policy acts deterministically, as in
            SB3's `evaluate_policy`. The result says which of the two it was.
        n_envs: How many environments to step together; for an id or a stored spec only.
        env_kwargs: Keyword arguments of the environment; for an id or a stored spec only.

    Returns:
        The episodes and their statistics.

    Raises:
        ValueError: If `n_episodes` or `n_envs` is below 1, the spaces differ from the policy's, an action has a wrong shape
            or NaN, a reward is NaN, or an episode does not end; if an agent would act inside a VecNormalize that changes
            observations; and as `make_env`.
        TypeError: If `policy` has no `predict`; and as `make_env`.
        ImportError: As `make_env`.
    """
    if n_episodes < 1 or n_envs < 1:
        raise ValueError(f"n_episodes and n_envs must be at least 1, not {n_episodes} and {n_envs}")
    if not callable(getattr(policy, "predict", None)):
        raise TypeError(f"the policy, a {type(policy).__name__}, has no predict(obs, ...)")
    if deterministic is None:
        deterministic = is_meant_deterministic(policy)
    by_name = isinstance(env, str | EnvSpec)
    if not by_name and n_envs != 1:
        raise ValueError(
            f"n_envs={n_envs} is for an environment id or a stored spec; pass a vectorised environment with as many "
            "sub-environments instead"
        )
    with ExitStack() as cleanup:
        # A few observations gain little from several threads, which wait for each other on a busy machine.
        if getattr(policy, "threads", None) == "auto":
            cleanup.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        adapter: Single | Vector | SB3
        if by_name:
            envs = []
            for _ in range(min(n_envs, n_episodes)):
                envs.append(make_env(env, **(env_kwargs or {})))
                cleanup.callback(envs[-1].close)
            adapter = _Named(envs, env)
        else:
            env = make_env(env, **(env_kwargs or {}))
            if is_sb3(env):
                adapter = SB3(env, cleanup)
            else:
                adapter = Vector(env) if isinstance(env, gym.vector.VectorEnv) else Single([env])
            if hasattr(policy, "dataset_info"):  # an agent, which knows the units of its data
                refuse_vec_normalize(env, rewards=False)
                warn_of_normalized_observations(policy.dataset_info, env)
        check_spaces(policy, adapter.observation_space, adapter.action_space)
        episodes = play(policy, adapter, n_episodes, seed, deterministic)
        env_id = env_id_of(envs[0] if by_name else env)
    successes, choice = [success for _, _, success in episodes], getattr(policy, "choice", None)
    return Evaluation(
        returns=tuple(ret for ret, _, _ in episodes),
        lengths=tuple(length for _, length, _ in episodes),
        successes=None if all(success is None for success in successes) else tuple(map(bool, successes)),
        env_id=env_id,
        seed=seed,
        deterministic=deterministic,
        choice=choice if isinstance(choice, Mapping) else None,
    )
