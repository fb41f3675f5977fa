"""Environments as Stable-Baselines3 expects them: vectorised, and with the spaces of the agent.

SB3 is imported only inside the functions that use it, so that training from arrays never has to import it.
"""

import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from diffagents.envs.make import make_env, refuse_gym, refuse_vec_normalize, scalar_reward
from diffagents.types import Spec

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv


def as_vec_env(env: Any) -> "VecEnv":
    """Make a VecEnv whose episodes a Monitor records.

    Args:
        env: An environment id, a Gymnasium Env, or an SB3 VecEnv, which is returned unchanged and must not be inside a
            VecNormalize that changes observations or rewards.

    Returns:
        The VecEnv.

    Raises:
        TypeError: For anything else.
        ValueError: If the id is unknown, see `make_env`; or for such a VecNormalize.
        ImportError: If a package is missing; see `make_env`.
    """
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

    if isinstance(env, VecEnv):
        refuse_vec_normalize(env)
        base = env.unwrapped
        if isinstance(base, DummyVecEnv):
            base.envs = [one if isinstance(one, PlainEnv) else PlainEnv(one) for one in base.envs]
        return env
    if isinstance(env, gymnasium.vector.VectorEnv):
        raise TypeError(
            "a gymnasium.vector environment cannot be the agent's own env, because SB3's callbacks need a VecEnv: "
            "make it with stable_baselines3.common.env_util.make_vec_env; evaluate() accepts it unchanged"
        )
    if isinstance(env, str):
        env = make_env(env)
    if not isinstance(env, gymnasium.Env):
        refuse_gym(env)
        raise TypeError(f"env must be an environment id, a gymnasium.Env or an SB3 VecEnv, not {type(env).__name__}")
    plain = PlainEnv(env) if isinstance(env, Monitor) else Monitor(PlainEnv(env))
    return DummyVecEnv([lambda: plain])


class PlainEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment in the form that SB3's VecEnvs need.

    Its observations are copies, because a VecEnv keeps the last one of an episode across the reset, in which some environments
    write into the same array. Parts without a shape, such as texts, are left out, because a VecEnv reserves memory for each.
    Rewards are numbers.
    """

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        space = env.observation_space
        if isinstance(space, gymnasium.spaces.Dict):
            parts = OrderedDict((key, part) for key, part in space.items() if part.shape is not None)
            if parts and len(parts) < len(space.spaces):
                self.observation_space = gymnasium.spaces.Dict(parts)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set attributes of the environment itself, as `VecEnv.set_attr` does without this wrapper."""
        if name.startswith("_") or name in ("env", "observation_space", "action_space", "metadata"):
            super().__setattr__(name, value)
        else:
            setattr(self.env, name, value)

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """The spec of the environment itself: nobody needs this wrapper to make it again."""
        return self.env.spec

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._own(obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._own(obs), scalar_reward(reward), terminated, truncated, info

    def _own(self, obs: Any) -> Any:
        if isinstance(self.observation_space, gymnasium.spaces.Dict):
            return {key: np.array(obs[key]) for key in self.observation_space}
        return np.array(obs)


def stub_env(spec: Spec) -> "VecEnv":
    """A VecEnv with the spaces of `spec` and no environment behind it, for an agent that has none.

    SB3's EvalCallback and progress bar require some training VecEnv, and warn unless it is a DummyVecEnv. Its `reset` and
    `step` raise RuntimeError.
    """
    from stable_baselines3.common.vec_env import DummyVecEnv

    class SpacesOnly(gymnasium.Env[Any, Any]):
        def __init__(self) -> None:
            self.observation_space, self.action_space = spec.observation_space, spec.action_space

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            raise RuntimeError("this agent has no environment; set one with set_env(env)")

        def step(self, action: Any) -> Any:
            raise RuntimeError("this agent has no environment; set one with set_env(env)")

    return DummyVecEnv([SpacesOnly])


def check_same_spaces(spec: Spec, observation_space: Any, action_space: Any) -> None:
    """Check that an agent can act in an environment.

    Warns if the agent uses only a part of the environment's action range, as with bounds that were taken from data.

    Args:
        spec: The agent's spaces.
        observation_space: Of the environment; must have the agent's shapes.
        action_space: Of the environment; must have the agent's shape and contain its bounds.

    Raises:
        ValueError: If the agent cannot act there.
    """
    try:
        other = Spec.from_spaces(observation_space, action_space, spec.obs_keys)
    except ValueError as error:
        raise ValueError(f"this environment is not the one the agent was built for: {error}") from None
    shape = _shapes(spec), spec.action_space.shape
    if (_shapes(other), other.action_space.shape) != shape:
        raise ValueError(
            f"this environment has observations {_shapes(other)} and actions {other.action_space.shape}, but the agent was "
            f"built for {shape[0]} and {shape[1]}; use the environment of its dataset"
        )
    low, high = spec.action_space.low, spec.action_space.high
    margin = 1e-4 * (other.action_space.high - other.action_space.low)
    if (low < other.action_space.low - margin).any() or (high > other.action_space.high + margin).any():
        raise ValueError(
            f"this environment's actions lie in [{other.action_space.low}, {other.action_space.high}], but the agent's in "
            f"[{low}, {high}]; pass env= to the agent when it first learns"
        )
    if (low > other.action_space.low + margin).any() or (high < other.action_space.high - margin).any():
        warnings.warn(f"the agent uses only the part [{low}, {high}] of this environment's actions", stacklevel=3)


def _shapes(spec: Spec) -> Any:
    """The shape of an observation, or a dict of the shapes of its parts."""
    if spec.obs_keys is None:
        return spec.observation_space.shape
    return {key: spec.observation_space[key].shape for key in spec.obs_keys}  # type: ignore[index]
