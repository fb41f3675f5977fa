"""Playing whole episodes with a policy in any kind of environment, and the checks of its spaces and actions.

`Single`, `Vector` and `SB3` give the three kinds of environments one interface, which `play` steps.

Shapes: n sub-environments stepped together, with one call of `predict` for all of them.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from diffagents.envs.make import scalar_reward

MAX_EPISODE_STEPS = 100_000
"""An episode longer than this stops the evaluation: the environment has no time limit and would never end."""

_INFO_KEYS = ("is_success", "success", "episode")


class Policy(Protocol):
    """What can be evaluated: our agents, SB3's models, or any object with this method."""

    def predict(
        self, observation: Any, /, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Act on a batch of n observations.

        Args:
            observation: Arrays (n, ...), in a dict or tuple if the observation is one.
            state: What the previous call returned as state; None at first.
            episode_start: Whether each observation is the first of an episode, (n,) bool.
            deterministic: Whether to act without randomness.

        Returns:
            Actions, (n, *action shape), and the next state.
        """
        ...


class Step(NamedTuple):
    """One step of n sub-environments."""

    obs: Any  # batched
    rew: np.ndarray  # (n,)
    ended: np.ndarray  # (n,) bool, this step ended an episode
    first: np.ndarray  # (n,) bool, obs is the first of an episode
    real: np.ndarray  # (n,) bool, False if the step only reset the sub-environment
    infos: Sequence[Mapping[str, Any]]  # of this step; at the end of an episode, of its last step


class Single:
    """Gymnasium environments stepped one by one. Episode k is reset with seed + k, whatever their number.

    Args:
        envs: At least one environment; all alike.
    """

    def __init__(self, envs: Sequence[Any]) -> None:
        self.envs, self.n = envs, len(envs)
        self.observation_space, self.action_space = envs[0].observation_space, envs[0].action_space

    def reset(self, seed: int | None) -> Any:
        """Reset all environments and return the batch of their observations."""
        self.seed, self.next_episode = seed, list(range(self.n))
        self.last = [self._reset(i) for i in range(self.n)]
        return stack(self.last)

    def step(self, actions: np.ndarray, left: np.ndarray) -> Step:
        """Step the environments that still have episodes to play.

        Args:
            actions: (n, *action shape).
            left: Episodes left to play, (n,) int, the present one included. Environments with 0 are not stepped.

        Returns:
            The step.
        """
        rew, ended = np.zeros(self.n), np.zeros(self.n, bool)
        infos: list[Mapping[str, Any]] = [{}] * self.n
        for i in np.flatnonzero(left).tolist():
            self.last[i], reward, terminated, truncated, infos[i] = self.envs[i].step(actions[i])
            rew[i], ended[i] = scalar_reward(reward), terminated or truncated
            if ended[i] and left[i] > 1:
                self.last[i] = self._reset(i)
        return Step(stack(self.last), rew, ended, ended, left > 0, infos)

    def _reset(self, i: int) -> Any:
        """Begin the next episode of environment i and return its first observation."""
        seed = None if self.seed is None else self.seed + self.next_episode[i]
        self.next_episode[i] += self.n
        return self.envs[i].reset(seed=seed)[0]


class Vector:
    """A Gymnasium VectorEnv in any of the three autoreset modes.

    Args:
        env: The VectorEnv.
    """

    def __init__(self, env: Any) -> None:
        self.env, self.n = env, env.num_envs
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space
        mode = env.metadata.get("autoreset_mode")
        if mode is None:
            warnings.warn(f"{env} has no autoreset_mode in its metadata; NEXT_STEP is assumed", stacklevel=4)
        self.mode = AutoresetMode.NEXT_STEP if mode is None else AutoresetMode(mode)

    def reset(self, seed: int | None) -> Any:
        """Reset all sub-environments, sub-environment i with seed + i, and return the batch of their observations."""
        self.ended = np.zeros(self.n, bool)
        return self.env.reset(seed=seed)[0]

    def step(self, actions: np.ndarray, left: np.ndarray) -> Step:
        """Step all sub-environments with `actions` (n, *action shape); `left` is not used."""
        obs, rew, terminations, truncations, info = self.env.step(actions)
        real = ~self.ended if self.mode is AutoresetMode.NEXT_STEP else np.ones(self.n, bool)
        ended = np.logical_or(terminations, truncations)
        infos = [_info_of(info, i) for i in range(self.n)]
        if self.mode is AutoresetMode.SAME_STEP:
            for i in np.flatnonzero(ended).tolist():
                # `info` is that of the new episode's reset, except for what a vector wrapper counted of the old episode.
                counted = {key: value for key, value in infos[i].items() if key == "episode"}
                infos[i] = counted | _info_of(info.get("final_info", {}), i)
        elif self.mode is AutoresetMode.DISABLED:
            # A masked reset clears the counts of all sub-environments in Gymnasium's vector RecordEpisodeStatistics.
            infos = [{key: value for key, value in item.items() if key != "episode"} for item in infos]
            if ended.any():
                obs = self.env.reset(options={"reset_mask": ended.copy()})[0]
        first = ~real if self.mode is AutoresetMode.NEXT_STEP else ended
        self.ended = ended
        return Step(obs, np.asarray(rew, np.float64), ended, first, real, infos)


class SB3:
    """An SB3 VecEnv. A VecNormalize in it does not update its statistics, and its original rewards are reported.

    Args:
        env: The VecEnv.
        cleanup: Restores the `training` flag of VecNormalize when it is closed.
    """

    def __init__(self, env: Any, cleanup: ExitStack) -> None:
        from stable_baselines3.common.vec_env import unwrap_vec_normalize

        self.env, self.n = env, env.num_envs
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.normalize = unwrap_vec_normalize(env)
        if self.normalize is not None:
            cleanup.callback(setattr, self.normalize, "training", self.normalize.training)
            self.normalize.training = False

    def reset(self, seed: int | None) -> Any:
        """Reset all sub-environments, sub-environment i with seed + i, and return the batch of their observations."""
        if seed is not None:
            self.env.seed(seed)
        return self.env.reset()

    def step(self, actions: np.ndarray, left: np.ndarray) -> Step:
        """Step all sub-environments with `actions` (n, *action shape); `left` is not used."""
        obs, rew, ended, infos = self.env.step(actions)
        if self.normalize is not None:
            rew = self.normalize.get_original_reward()
        ended = np.asarray(ended, bool)
        return Step(obs, np.asarray(rew, np.float64), ended, ended, np.ones(self.n, bool), infos)


def is_meant_deterministic(policy: Any, other: bool = True) -> bool:
    """Whether a policy is meant to act without randomness.

    Args:
        policy: Any policy; our agents have the attribute `acts_deterministically`.
        other: The answer for a policy without that attribute.
    """
    return bool(getattr(policy, "acts_deterministically", other))


def stack(items: Sequence[Any]) -> Any:
    """Observations of n environments as one batch: arrays (n, ...), in dicts or tuples where the observation is one."""
    if isinstance(items[0], Mapping):
        return {key: stack([item[key] for item in items]) for key in items[0]}
    if isinstance(items[0], tuple):
        return tuple(stack(column) for column in zip(*items, strict=True))
    return np.stack([np.asarray(item) for item in items])


def play(
    policy: Policy, env: Single | Vector | SB3, n_episodes: int, seed: int | None, deterministic: bool
) -> list[tuple[float, int, bool | None]]:
    """Play episodes, a fixed number in each sub-environment.

    Args:
        policy: Acts on batches of n observations.
        env: The environments.
        n_episodes: How many episodes to play in all.
        seed: As in `evaluate`.
        deterministic: Passed to `predict`.

    Returns:
        Return, length and success of each episode; success is None if the environment never reports it.

    Raises:
        ValueError: For a bad action (`check_actions`), a reward that is not finite, or an episode that does not end.
    """
    n = env.n
    left = np.array([len(range(i, n_episodes, n)) for i in range(n)])
    finished: dict[int, tuple[float, int, bool | None]] = {}
    next_episode = list(range(n))
    total, length = np.zeros(n), np.zeros(n, int)
    success: list[bool | None] = [None] * n
    obs, state, first = env.reset(seed), None, np.ones(n, bool)
    while left.any():
        actions, state = policy.predict(obs, state=state, episode_start=first, deterministic=deterministic)
        step = env.step(check_actions(actions, n, env.action_space), left)
        for i in np.flatnonzero(step.real & (left > 0)).tolist():
            total[i] += step.rew[i]
            length[i] += 1
            info = step.infos[i]
            success[i] = succeeded(info, success[i])
            if length[i] > MAX_EPISODE_STEPS:
                raise ValueError(
                    f"an episode did not end in {MAX_EPISODE_STEPS} steps; "
                    "set a time limit: gymnasium.wrappers.TimeLimit(env, max_episode_steps)"
                )
            if not np.isfinite(total[i]):
                raise ValueError(
                    f"the environment returned a reward of {step.rew[i]} at step {length[i]} of an episode; "
                    "rewards must be finite, so repair the environment"
                )
            if not step.ended[i]:
                continue
            counted = info.get("episode")
            if isinstance(counted, Mapping) and "r" in counted and "l" in counted:
                total[i], length[i] = float(np.asarray(counted["r"]).item()), int(np.asarray(counted["l"]).item())
            finished[next_episode[i]] = float(total[i]), int(length[i]), success[i]
            next_episode[i] += n
            left[i] -= 1
            total[i], length[i], success[i] = 0.0, 0, None
        obs, first = step.obs, step.first
    return [finished[k] for k in range(n_episodes)]


def succeeded(info: Mapping[str, Any], before: bool | None) -> bool | None:
    """Whether an episode has succeeded so far.

    Args:
        info: The info of a step, which may contain `is_success` or `success`.
        before: The result for the step before; None at the first.

    Returns:
        None as long as the environment has not reported success or failure.
    """
    reported = [bool(np.any(info[key])) for key in ("is_success", "success") if info.get(key) is not None]
    return bool(before) or any(reported) if reported else before


def check_actions(actions: Any, n: int, space: spaces.Space[Any]) -> np.ndarray:
    """Check the actions that a policy returned.

    Args:
        actions: The first result of `predict`.
        n: Number of observations.
        space: The action space.

    Returns:
        The actions as an array, (n, *action shape).

    Raises:
        ValueError: For another shape, NaN or infinity.
    """
    array = np.asarray(actions)
    if array.shape != (n, *(space.shape or ())):
        raise ValueError(
            f"predict returned actions of shape {array.shape} for {n} observations; expected {(n, *(space.shape or ()))}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array.reshape(n, -1)).all(axis=1))[0])
        raise ValueError(
            f"predict returned the action {array[row]}, which contains NaN or infinity: the policy's weights are broken; "
            "use an earlier save, or train with a smaller learning rate"
        )
    return array


def check_spaces(policy: Any, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Check a policy's spaces against an environment's: observations by shape, actions by shape and bounds.

    Warns if the policy's action bounds are narrower than the environment's.

    Args:
        policy: Its attributes `observation_space` and `action_space` are checked if it has them.
        observation_space: Of the environment.
        action_space: Of the environment.

    Raises:
        ValueError: If the policy cannot act in the environment.
    """
    _same_shape(getattr(policy, "observation_space", None), observation_space, "observation")
    theirs = getattr(policy, "action_space", None)
    _same_shape(theirs, action_space, "action")
    if isinstance(theirs, spaces.Box) and isinstance(action_space, spaces.Box) and action_space.is_bounded():
        slack = 1e-3 * (action_space.high - action_space.low)
        ranges = (
            f"the policy's actions lie in [{theirs.low.min():g}, {theirs.high.max():g}], "
            f"but the environment's in [{action_space.low.min():g}, {action_space.high.max():g}]"
        )
        if np.any(theirs.low < action_space.low - slack) or np.any(theirs.high > action_space.high + slack):
            raise ValueError(f"{ranges}; evaluate in the environment of the data, or wrap this one with RescaleAction")
        if np.any(theirs.low > action_space.low + slack) or np.any(theirs.high < action_space.high - slack):
            # Bounds taken from data are narrower, which is fine; data scaled to other units is not.
            warnings.warn(
                f"{ranges}; this is right if the bounds were taken from the data, but wrong if the data use other units",
                stacklevel=4,
            )


def _same_shape(theirs: spaces.Space[Any] | None, ours: spaces.Space[Any], what: str) -> None:
    """Raise ValueError if the policy's space `theirs` does not fit the environment's space `ours`."""
    if theirs is None:
        return
    if isinstance(theirs, spaces.Dict) and isinstance(ours, spaces.Dict):
        for key, space in theirs.spaces.items():
            if key not in ours.spaces:
                raise ValueError(f"the policy reads {what} {key!r}, but the environment has only {list(ours.spaces)}")
            _same_shape(space, ours.spaces[key], f"{what} {key!r}")
        return
    if type(theirs) is not type(ours) or theirs.shape != ours.shape:
        raise ValueError(
            f"the policy's {what} space is {theirs}, but the environment's is {ours}; evaluate in the environment that the "
            "data came from, with the same wrappers and kwargs"
        )


def _info_of(info: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The info of sub-environment i about success and the episode, from a VectorEnv's dict of arrays and masks."""
    found: dict[str, Any] = {}
    for key in _INFO_KEYS:
        if key in info and (f"_{key}" not in info or info[f"_{key}"][i]):
            value = info[key]
            found[key] = {name: value[name][i] for name in ("r", "l")} if isinstance(value, Mapping) else value[i]
    return found
