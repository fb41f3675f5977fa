"""Environments by id or by a stored spec that may come from a stranger, and their names."""

import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from diffagents.errors import one_line

_NOT_THE_TASK = {"render_mode", "num_envs", "vectorization_mode"}  # keyword arguments of a window and of make_vec


_PUSHT = "gym_pusht/"
_ROBOTICS = ("PointMaze", "AntMaze", "AdroitHand", "FrankaKitchen", "Fetch", "HandReach", "HandManipulate")


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
            if env_id.startswith(_PUSHT):
                import gym_pusht

                gym.register_envs(gym_pusht)
            else:
                import gymnasium_robotics

                gym.register_envs(gymnasium_robotics)
            return gym.make(env_id, **kwargs)
    except gym.error.UnregisteredEnv as error:
        cause: Exception = error
        cure = "check the spelling and version, or import the package that registers it first"
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        unregistered = isinstance(error.__context__, gym.error.UnregisteredEnv)
        cause = error.__context__ if unregistered else error  # type: ignore[assignment]
        if unregistered and env_id.startswith(_PUSHT):
            raise ImportError(f'{env_id} needs gym-pusht: pip install "diffagents[pusht]"') from None
        if unregistered and not env_id.rsplit("/", 1)[-1].startswith(_ROBOTICS):
            cure = 'check the spelling; Gymnasium-Robotics ids need pip install "diffagents[robotics]"'
        elif unregistered:
            raise ImportError(f'{env_id} needs Gymnasium-Robotics: pip install "diffagents[robotics]"') from None
        elif importlib.util.find_spec("mujoco") is None:
            raise ImportError(f'{env_id} needs MuJoCo: pip install "diffagents[mujoco]" ({one_line(error)})') from None
        else:
            raise
    raise ValueError(f"unknown environment {env_id!r} ({one_line(cause)}): {cure}") from None


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
            raise ValueError(f"the stored environment spec cannot be read ({one_line(error)}); pass an id") from None
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
    spec = _spec_of(env)
    return None if spec is None else str(spec.id)


def _spec_of(env: Any) -> Any:
    """The EnvSpec of a live environment or vector of them, or None."""
    try:
        spec = env.get_attr("spec")[0] if is_sb3(env) else env.spec
        if spec is None and isinstance(env, gym.vector.VectorEnv):
            spec = env.unwrapped.envs[0].spec  # type: ignore[attr-defined]
    except Exception:  # a VecEnv without environments behind it, or workers that cannot send their spec
        return None
    return spec


def difference_of_specs(stored: str, given: Mapping[str, Any]) -> str | None:
    """In words, where the spec `given` is of another environment than the JSON `stored`: id, time limit, kwargs; None: not."""
    old, new = _identity(json.loads(stored)), _identity(given)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key}={new.get(key, 'default')} instead of {old.get(key, 'default')}" for key in keys) or None


def _identity(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two environments different: id, time limit and keyword arguments, as JSON would hold them."""
    kwargs = json.loads(json.dumps(spec.get("kwargs") or {}, default=str, skipkeys=True))
    registered = gym.registry.get(str(spec.get("id")))
    limit = spec.get("max_episode_steps") or (registered.max_episode_steps if registered is not None else None)
    facts = {"id": spec.get("id"), "max_episode_steps": limit}
    return facts | {key: value for key, value in kwargs.items() if key not in _NOT_THE_TASK}


def warn_of_another_env(env: Any, stored: str, env_kwargs: Mapping[str, Any] | None = None) -> None:
    """One warning where `env` is not the environment that a dataset's spec describes."""
    if env_id_of(env) is None:
        return
    if isinstance(env, str):
        given = json.loads(env) if env.lstrip().startswith("{") else {"id": env, "kwargs": dict(env_kwargs or {})}
    else:
        given = vars(env if isinstance(env, EnvSpec) else _spec_of(env))
    if difference := difference_of_specs(stored, given):
        warnings.warn(
            f"evaluating in another environment than the dataset's ({difference}): leave env out for that", stacklevel=3
        )


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
