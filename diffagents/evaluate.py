"""Rollouts of anything with SB3's `predict`: returns, success, the D4RL scale, intervals, a video.

The raw return always comes first; a score on the D4RL scale stands beside it, never instead of it.

Shapes: n sub-environments stepped together, one `predict` call for all of them.
"""

import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

D4RL_REFERENCE: dict[str, tuple[float, float]] = {
    "Hopper": (-20.272305, 3234.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
    "AntMaze": (0.0, 1.0),  # every size; see `d4rl_score`
    "AdroitHandPen": (96.262799, 3076.8331017826877),
    "AdroitHandDoor": (-56.512833, 2880.5693087298737),
    "AdroitHandHammer": (-274.856578, 12794.134825156867),
    "AdroitHandRelocate": (-6.425911, 4233.877797728884),
    "FrankaKitchen": (0.0, 4.0),
}
"""Return of a random and of an expert policy, by environment name without version: the figures of D4RL's `infos.py`
(Farama Foundation, Apache-2.0). They belong to D4RL's mujoco-py environments, whose dynamics and observations differ
from Gymnasium's: a familiar scale to read returns on, not a number to set beside published tables.
PointMaze has none here: its reward and its end of episode are not those of D4RL's maze2d."""

MAX_EPISODE_STEPS = 100_000
"""An episode longer than this stops the evaluation: the environment has no time limit and would never end."""

_ROBOTICS = ("PointMaze", "AntMaze", "AdroitHand", "FrankaKitchen", "Fetch", "HandReach", "HandManipulate")
_INFO_KEYS = ("is_success", "success", "episode")


class Policy(Protocol):
    """What is evaluated: our agents, SB3's models, or anything of this shape."""

    def predict(
        self, observation: Any, /, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]: ...


# ---------------------------------------------------------------------------------------------------- the numbers


def d4rl_score(env_id: str | None, returns: Sequence[float]) -> float | None:
    """Mean of 100 (return - random) / (expert - random) with `D4RL_REFERENCE`, or None where there is no reference.

    `returns` are raw, undiscounted episode returns. An AntMaze episode counts 1 if its return is positive, else 0:
    D4RL's episode ended at the goal, Gymnasium-Robotics' may go on and collect more. Other reward kinds (`...Dense`,
    `...Sparse` ids) have no reference.
    """
    scores = _scores(env_id, returns)
    return None if scores is None else float(scores.mean())


def _reference_name(env_id: str | None) -> str | None:
    name = (env_id or "").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    base, dash, version = name.rpartition("-v")
    name = base if dash and version.isdigit() else name
    if name.startswith("AntMaze") and not name.endswith("Dense"):
        return "AntMaze"
    return name if name in D4RL_REFERENCE else None


def _scores(env_id: str | None, returns: Sequence[float]) -> np.ndarray | None:
    name = _reference_name(env_id)
    if name is None:
        return None
    low, high = D4RL_REFERENCE[name]
    values = np.asarray(returns, np.float64)
    if name == "AntMaze":
        values = (values > 0).astype(np.float64)
    return 100.0 * (values - low) / (high - low)


def _bootstrap(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; the same values give the same interval."""
    array = np.asarray(values, np.float64)
    picks = np.random.default_rng(0).integers(0, len(array), (2000, len(array)))
    low, high = np.percentile(array[picks].mean(axis=1), (2.5, 97.5))
    return min(float(low), float(array.mean())), max(float(high), float(array.mean()))


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
        return _bootstrap(self.returns)

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
        return None if scores is None else _bootstrap(scores)

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


# ------------------------------------------------------------------------------------------------ the environments


def make_env(env: Any, **kwargs: Any) -> Any:
    """An environment from an id or a stored spec; an environment that is one already comes back as it is.

    env: a Gymnasium id; an `EnvSpec` or the JSON of its `to_json()`, as datasets and artifacts store it; a Gymnasium
    Env or VectorEnv; an SB3 VecEnv. kwargs go to `gymnasium.make` and win over those of a stored spec.

    A stored spec may come from a stranger, so only its `id`, `kwargs` and `max_episode_steps` are used and the id must
    be a registered one: its entry point and wrappers, which would import any module, are not. A `render_mode` in it
    is dropped; without `max_episode_steps` the registered time limit holds.

    Raises ValueError for an unknown id, a spec that cannot be trusted or read, or kwargs beside a ready environment;
    ImportError naming the extra to install; TypeError for anything that is not an environment.
    """
    if isinstance(env, EnvSpec) or (isinstance(env, str) and env.lstrip().startswith("{")):
        env, stored = _read_spec(env)
        kwargs = stored | kwargs
    if isinstance(env, str):
        if kwargs.get("render_mode") is not None:
            prefer_egl()
        return _make(env, kwargs)
    if not (isinstance(env, gym.Env | gym.vector.VectorEnv) or is_sb3(env)):
        raise TypeError(
            f"env must be an environment id, a stored spec, a Gymnasium Env or VectorEnv, or an SB3 VecEnv, "
            f"not {type(env).__name__}"
        )
    if kwargs:
        raise ValueError(f"the environment is made already; pass {sorted(kwargs)} where it is made, or pass its id")
    return env


def _make(env_id: str, kwargs: dict[str, Any]) -> Any:
    try:
        try:
            return gym.make(env_id, **kwargs)
        except gym.error.UnregisteredEnv:
            import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)
            return gym.make(env_id, **kwargs)
    except gym.error.UnregisteredEnv as error:
        cause: Exception = error
        cure = "check the spelling and version, or import the package that registers it first"
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        unregistered = isinstance(error.__context__, gym.error.UnregisteredEnv)
        cause = error.__context__ if unregistered else error  # type: ignore[assignment]
        if unregistered and not env_id.rsplit("/", 1)[-1].startswith(_ROBOTICS):
            cure = 'check the spelling; Gymnasium-Robotics ids need pip install "diffagents[robotics]"'
        elif unregistered:
            raise ImportError(f'{env_id} needs Gymnasium-Robotics: pip install "diffagents[robotics]"') from None
        elif importlib.util.find_spec("mujoco") is None:
            raise ImportError(f'{env_id} needs MuJoCo: pip install "diffagents[mujoco]" ({_one_line(error)})') from None
        else:
            raise
    raise ValueError(f"unknown environment {env_id!r} ({_one_line(cause)}): {cure}") from None


def _read_spec(spec: str | EnvSpec) -> tuple[str, dict[str, Any]]:
    """The id of a stored spec and the keyword arguments for `gymnasium.make`; nothing else of it is looked at."""
    if isinstance(spec, EnvSpec):
        fields: Any = vars(spec)
        wrappers = [wrapper.name for wrapper in spec.additional_wrappers]
    else:
        try:
            fields = json.loads(spec)
            wrappers = [str(wrapper["name"]) for wrapper in fields.get("additional_wrappers") or ()]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"the stored environment spec cannot be read ({_one_line(error)}); pass an id") from None
    env_id, kwargs, limit = fields.get("id"), fields.get("kwargs") or {}, fields.get("max_episode_steps")
    if not isinstance(env_id, str) or not isinstance(kwargs, Mapping):
        raise ValueError(f"the stored environment spec has no usable id and kwargs (id {env_id!r}); pass an id")
    if ":" in env_id:
        raise ValueError(f"the stored environment id {env_id!r} would import a module; if you trust it, pass that id")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"the stored environment spec has max_episode_steps={limit!r}; it must be a positive integer")
    # Constructors take paths (xml_file) and ids of further environments (env_id): a stranger's must not be followed.
    for key, text in _strings(kwargs):
        if any(mark in text for mark in ":/\\"):
            raise ValueError(
                f"the stored environment spec has {key}={text!r}, which looks like a path or a module; "
                f"if you trust it, pass env={env_id!r} and {key}= yourself"
            )
    if wrappers:
        warnings.warn(f"{env_id} is made without the wrappers {wrappers} of its stored spec", stacklevel=3)
    dropped = {"render_mode", "num_envs", "vectorization_mode"}  # of a window, and of make_vec
    kept = {key: value for key, value in kwargs.items() if key not in dropped}
    return env_id, kept if limit is None else kept | {"max_episode_steps": limit}


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(item, key or str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, key)


def env_id_of(env: Any) -> str | None:
    """The id of an environment, a vector of them, a stored spec or an id; None where there is none."""
    if isinstance(env, EnvSpec):
        return env.id
    if isinstance(env, str):
        return _read_spec(env)[0] if env.lstrip().startswith("{") else env
    try:
        spec = env.get_attr("spec")[0] if is_sb3(env) else env.spec
        if spec is None and isinstance(env, gym.vector.VectorEnv):
            spec = env.unwrapped.envs[0].spec  # type: ignore[attr-defined]
    except Exception:  # a VecEnv without environments behind it, or workers that cannot send their spec
        return None
    return None if spec is None else str(spec.id)


def prefer_egl() -> bool:
    """Let MuJoCo render without a screen: sets MUJOCO_GL=egl where that works, and says whether it did.

    Only on Linux with no DISPLAY and MUJOCO_GL unset: MuJoCo would take GLFW there and die in its first frame. The
    variable is set after EGL has answered, as with it and no EGL even `import mujoco` fails.
    """
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not sys.platform.startswith("linux") or screen or "MUJOCO_GL" in os.environ:
        return False
    platform = os.environ.get("PYOPENGL_PLATFORM")
    try:
        importlib.import_module("mujoco.egl")
    except Exception:  # no mujoco, no PyOpenGL, no libEGL (an AttributeError inside PyOpenGL), no device
        if platform is None:
            os.environ.pop("PYOPENGL_PLATFORM", None)
        return False
    os.environ["MUJOCO_GL"] = "egl"
    return True


def is_sb3(env: Any) -> bool:
    """Whether it is a Stable-Baselines3 VecEnv, without importing Stable-Baselines3 to find out."""
    module = sys.modules.get("stable_baselines3.common.vec_env")  # whoever has a VecEnv has imported it
    return module is not None and isinstance(env, module.VecEnv)


# ----------------------------------------------------------------------------- three kinds of environment, one step


class Step(NamedTuple):
    """One step of n sub-environments."""

    obs: Any  # batched
    rew: np.ndarray  # (n,)
    ended: np.ndarray  # (n,) bool, this step ended an episode
    first: np.ndarray  # (n,) bool, obs is the first of an episode
    real: np.ndarray  # (n,) bool, False where the step only reset
    infos: Sequence[Mapping[str, Any]]  # of the step, at an end that of the last step


class Single:
    """Gymnasium environments one by one. Episode k is reset with seed + k, so the number of them changes nothing."""

    def __init__(self, envs: Sequence[Any]) -> None:
        self.envs, self.n = envs, len(envs)
        self.observation_space, self.action_space = envs[0].observation_space, envs[0].action_space

    def _reset(self, i: int) -> Any:
        seed = None if self.seed is None else self.seed + self.next_episode[i]
        self.next_episode[i] += self.n
        return self.envs[i].reset(seed=seed)[0]

    def reset(self, seed: int | None) -> Any:
        self.seed, self.next_episode = seed, list(range(self.n))
        self.last = [self._reset(i) for i in range(self.n)]
        return stack(self.last)

    def step(self, actions: np.ndarray, left: np.ndarray) -> Step:
        rew, ended = np.zeros(self.n), np.zeros(self.n, bool)
        infos: list[Mapping[str, Any]] = [{}] * self.n
        for i in np.flatnonzero(left).tolist():
            self.last[i], reward, terminated, truncated, infos[i] = self.envs[i].step(actions[i])
            rew[i], ended[i] = float(reward), terminated or truncated
            if ended[i] and left[i] > 1:
                self.last[i] = self._reset(i)
        return Step(stack(self.last), rew, ended, ended, left > 0, infos)


class Vector:
    """A Gymnasium VectorEnv in any of the three autoreset modes."""

    def __init__(self, env: Any) -> None:
        self.env, self.n = env, env.num_envs
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space
        mode = env.metadata.get("autoreset_mode")
        if mode is None:
            warnings.warn(f"{env} does not say its autoreset_mode in metadata; NEXT_STEP is assumed", stacklevel=4)
        self.mode = AutoresetMode.NEXT_STEP if mode is None else AutoresetMode(mode)

    def reset(self, seed: int | None) -> Any:
        self.ended = np.zeros(self.n, bool)
        return self.env.reset(seed=seed)[0]

    def step(self, actions: np.ndarray, left: np.ndarray) -> Step:
        obs, rew, terminations, truncations, info = self.env.step(actions)
        real = ~self.ended if self.mode is AutoresetMode.NEXT_STEP else np.ones(self.n, bool)
        ended = np.logical_or(terminations, truncations)
        infos = [_info_of(info, i) for i in range(self.n)]
        if self.mode is AutoresetMode.SAME_STEP:
            for i in np.flatnonzero(ended).tolist():
                # On top lies the new episode's reset info, except what a vector wrapper counted of the old one.
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
    """An SB3 VecEnv. A VecNormalize in it learns nothing from an evaluation, and its rewards are undone."""

    def __init__(self, env: Any, cleanup: ExitStack) -> None:
        from stable_baselines3.common.vec_env import unwrap_vec_normalize

        self.env, self.n = env, env.num_envs
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.normalize = unwrap_vec_normalize(env)
        if self.normalize is not None:
            cleanup.callback(setattr, self.normalize, "training", self.normalize.training)
            self.normalize.training = False

    def reset(self, seed: int | None) -> Any:
        if seed is not None:
            self.env.seed(seed)
        return self.env.reset()

    def step(self, actions: np.ndarray, left: np.ndarray) -> Step:
        obs, rew, ended, infos = self.env.step(actions)
        if self.normalize is not None:
            rew = self.normalize.get_original_reward()
        ended = np.asarray(ended, bool)
        return Step(obs, np.asarray(rew, np.float64), ended, ended, np.ones(self.n, bool), infos)


def stack(items: Sequence[Any]) -> Any:
    """Observations of n environments as one batch: arrays (n, ...), in dicts or tuples where the observation is one."""
    if isinstance(items[0], Mapping):
        return {key: stack([item[key] for item in items]) for key in items[0]}
    if isinstance(items[0], tuple):
        return tuple(stack(column) for column in zip(*items, strict=True))
    return np.stack([np.asarray(item) for item in items])


def _info_of(info: Mapping[str, Any], i: int) -> dict[str, Any]:
    """What sub-environment i said of success and of its episode, out of a VectorEnv's dict of arrays and masks."""
    found: dict[str, Any] = {}
    for key in _INFO_KEYS:
        if key in info and (f"_{key}" not in info or info[f"_{key}"][i]):
            value = info[key]
            found[key] = {name: value[name][i] for name in ("r", "l")} if isinstance(value, Mapping) else value[i]
    return found


# ------------------------------------------------------------------------------------------------------ evaluation


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


def play(
    policy: Policy, world: Single | Vector | SB3, n_episodes: int, seed: int | None, deterministic: bool
) -> list[tuple[float, int, bool | None]]:
    """(return, length, success) of each episode."""
    n = world.n
    left = np.array([len(range(i, n_episodes, n)) for i in range(n)])
    finished: dict[int, tuple[float, int, bool | None]] = {}
    next_episode = list(range(n))
    total, length = np.zeros(n), np.zeros(n, int)
    success: list[bool | None] = [None] * n
    obs, state, first = world.reset(seed), None, np.ones(n, bool)
    while left.any():
        actions, state = policy.predict(obs, state=state, episode_start=first, deterministic=deterministic)
        step = world.step(check_actions(actions, n, world.action_space), left)
        for i in np.flatnonzero(step.real & (left > 0)).tolist():
            total[i] += step.rew[i]
            length[i] += 1
            info = step.infos[i]
            for key in ("is_success", "success"):
                if info.get(key) is not None:
                    success[i] = bool(success[i]) or bool(np.any(info[key]))
            if length[i] > MAX_EPISODE_STEPS:
                raise ValueError(
                    f"an episode did not end in {MAX_EPISODE_STEPS} steps; "
                    "give the environment a time limit: gymnasium.wrappers.TimeLimit(env, max_episode_steps)"
                )
            if not np.isfinite(total[i]):
                raise ValueError(f"the environment gave a reward of {step.rew[i]} at step {length[i]} of an episode")
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


def check_actions(actions: Any, n: int, space: spaces.Space[Any]) -> np.ndarray:
    """What predict gave as an array (n, *action shape); ValueError for another shape, NaN or infinity."""
    array = np.asarray(actions)
    if array.shape != (n, *(space.shape or ())):
        raise ValueError(
            f"predict gave actions of shape {array.shape} for {n} observations; expected {(n, *(space.shape or ()))}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array.reshape(n, -1)).all(axis=1))[0])
        raise ValueError(
            f"predict gave the action {array[row]} with NaN or infinity: the policy's weights are broken; "
            "go back to an earlier save, or train with a smaller learning rate"
        )
    return array


def check_spaces(policy: Any, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """The policy's spaces, where it tells them, against the environment's: obs by shape, act by shape and bounds."""
    _same_shape(getattr(policy, "observation_space", None), observation_space, "observation")
    theirs = getattr(policy, "action_space", None)
    _same_shape(theirs, action_space, "action")
    if isinstance(theirs, spaces.Box) and isinstance(action_space, spaces.Box) and action_space.is_bounded():
        slack = 1e-3 * (action_space.high - action_space.low)
        ranges = (
            f"the policy's actions lie in [{theirs.low.min():g}, {theirs.high.max():g}], "
            f"the environment's in [{action_space.low.min():g}, {action_space.high.max():g}]"
        )
        if np.any(theirs.low < action_space.low - slack) or np.any(theirs.high > action_space.high + slack):
            raise ValueError(f"{ranges}: evaluate in the environment of the data, or wrap it with RescaleAction")
        if np.any(theirs.low > action_space.low + slack) or np.any(theirs.high < action_space.high - slack):
            # Bounds taken from data are narrower, which is fine; data scaled to other units is not.
            warnings.warn(f"{ranges}: right if bounds came from the data, wrong if its units differ", stacklevel=4)


def _same_shape(theirs: spaces.Space[Any] | None, ours: spaces.Space[Any], what: str) -> None:
    if theirs is None:
        return
    if isinstance(theirs, spaces.Dict) and isinstance(ours, spaces.Dict):
        for key, space in theirs.spaces.items():
            if key not in ours.spaces:
                raise ValueError(f"the policy reads {what} {key!r}; the environment has only {list(ours.spaces)}")
            _same_shape(space, ours.spaces[key], f"{what} {key!r}")
        return
    if type(theirs) is not type(ours) or theirs.shape != ours.shape:
        raise ValueError(
            f"the policy's {what} space is {theirs}, the environment's {ours}: "
            "evaluate in the environment (and with the wrappers and kwargs) that the data came from"
        )


# ----------------------------------------------------------------------------------------------------------- video


def record_video(
    policy: Policy,
    env: Any,
    path: str | os.PathLike[str],
    *,
    seed: int | None = 0,
    max_steps: int = 1000,
    deterministic: bool = True,
    fps: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> pathlib.Path | None:
    """One episode, at most `max_steps` of it, as an mp4 (H.264, yuv420p) at `path`, which is returned.

    env: an id, a stored spec, or an Env made with render_mode="rgb_array". The video runs as fast as the simulation
    (`metadata["render_fps"]`) with about 30 pictures a second, so only every fourth of Hopper's 125; with `fps` it
    holds every step, `fps` of them a second. MuJoCo without a GPU needs up to half a second for a picture.

    A video is a nicety: whatever goes wrong (no renderer, no ffmpeg, ...) becomes one warning with cause and cure; then
    nothing is written and None returned.
    """
    path = pathlib.Path(path)
    try:
        if path.suffix != ".mp4":
            raise ValueError(f"the file must end in .mp4, not {path.name!r}")
        with ExitStack() as cleanup:
            if isinstance(env, str | EnvSpec):
                world = make_env(env, **{**(env_kwargs or {}), "render_mode": "rgb_array"})
                cleanup.callback(world.close)
            else:
                world = make_env(env, **(env_kwargs or {}))
            if not isinstance(world, gym.Env) or world.render_mode != "rgb_array":
                raise ValueError('the environment must be a single one made with render_mode="rgb_array"')
            check_spaces(policy, world.observation_space, world.action_space)
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=".video-"))
            part = pathlib.Path(folder) / "part.mp4"
            rate = fps or float(world.metadata.get("render_fps") or 30)
            every = 1 if fps else max(1, int(rate // 30))
            _write_mp4(part, _frames(policy, world, seed, max_steps, deterministic, every), rate / every)
            os.replace(part, path)
    except Exception as error:
        warnings.warn(f"no video at {path}: {_one_line(error)} -- {_video_cure(error)}", stacklevel=2)
        return None
    return path


def _frames(
    policy: Policy, env: Any, seed: int | None, max_steps: int, deterministic: bool, every: int
) -> Iterator[np.ndarray]:
    """The picture after the reset, after every so many steps, and after the last one."""
    obs, state, first = env.reset(seed=seed)[0], None, True
    yield env.render()
    for t in range(1, max_steps + 1):
        actions, state = policy.predict(
            stack([obs]), state=state, episode_start=np.array([first]), deterministic=deterministic
        )
        obs, _, terminated, truncated, _ = env.step(check_actions(actions, 1, env.action_space)[0])
        first, over = False, terminated or truncated or t == max_steps
        if over or t % every == 0:
            yield env.render()
        if over:
            return


def _write_mp4(path: pathlib.Path, frames: Iterator[np.ndarray], fps: float) -> None:
    import imageio_ffmpeg  # moviepy and imageio[ffmpeg] both bring it

    writer = None
    try:
        for frame in frames:
            if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError("the environment's render() gave no uint8 picture of shape (height, width, 3)")
            if writer is None:
                size = (frame.shape[1], frame.shape[0])
                # yuv420p wants even sides: an odd one is scaled up by a pixel.
                options = {"codec": "libx264", "pix_fmt_out": "yuv420p", "macro_block_size": 2}
                writer = imageio_ffmpeg.write_frames(str(path), size, fps=fps, ffmpeg_log_level="error", **options)
                writer.send(None)
            writer.send(np.ascontiguousarray(frame))
    finally:
        if writer is not None:
            writer.close()
    if not path.is_file() or path.stat().st_size == 0:
        raise RuntimeError("ffmpeg wrote nothing")


def _video_cure(error: Exception) -> str:
    text = f"{type(error).__module__} {type(error).__name__} {error}".lower()
    if "imageio" in text or "ffmpeg" in text:
        return 'pip install "diffagents[video]"'
    if "opengl" in text or "egl" in text or "glfw" in text or "mujoco" in text:
        return "MuJoCo needs a renderer: on Linux without a screen install libegl1 and PyOpenGL, then set MUJOCO_GL=egl"
    return "the evaluation itself is not touched"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
