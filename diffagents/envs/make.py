"""Making environments from an id or a stored spec, which may come from an untrusted file, and telling environments apart."""

import contextlib
import importlib.util
import inspect
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator

from diffagents.errors import one_line, printable, short

_NOT_THE_TASK = {"render_mode", "num_envs", "vectorization_mode"}  # keyword arguments of a window and of `gymnasium.make_vec`
_PUSHT = "gym_pusht/"
_ROBOTICS = ("PointMaze", "AntMaze", "AdroitHand", "FrankaKitchen", "Fetch", "HandReach", "HandManipulate")
_MONITOR = "stable_baselines3.common.monitor:Monitor"
_SECRET_NAME = re.compile(
    r"keys?(?:_?id)?s?$|access_?key|token|secret|passw|passphrase|pwd|auth|credential|"
    r"(?<![a-z])(?:pass|pw|pins?|ssh|hosts?|hostnames?|servers?|user\w*|logins?|accounts?|e?mails?|urls?|uris?|endpoints?|prox(?:y|ies)"
    r"|ips?|cookies?|datasets?)(?![a-z])",
    re.IGNORECASE,
)
"""Names of arguments that hold a secret, a person, a machine or someone's data; camel case is written with _ before."""
_SECRET = re.compile(r"^(sk|hf|ghp|gho|xox\w|glpat|AKIA)[-_A-Z0-9]")
"""Beginnings of well-known tokens."""
_WORDS = re.compile(r"[A-Za-z0-9_ -]*")
"""What a string that is published may consist of: no marks of a path, an address, a file name or a person's email."""
_LONGEST_VALUE, _LONGEST_KEY = 32, 64
_LARGEST, _MOST_VALUES, _MOST_STEPS = 10_000, 10_000, 1_000_000
"""Bounds of an untrusted spec: of its numbers, of how many values its arguments have, of its time limit."""
_MOST_SHOWN = 8  # differences between two specs in a message
_REPEATS, _MOST_REPEATS = re.compile(r"skip|repeat|frame|substep", re.IGNORECASE), 1_000
"""Names of numbers by which the work of each step is multiplied, and their bound."""
_KEY = object()
"""Marks a key among the leaves of nested arguments."""


def make_env(env: Any, **kwargs: Any) -> Any:
    """Make an environment from an id or a stored spec; return an existing environment unchanged.

    A stored spec may come from an untrusted file. Only its `id`, `kwargs` and `max_episode_steps` are used, and the id must
    be registered; its entry point and wrappers, which could import any module, are ignored. A `render_mode` in it is dropped;
    without `max_episode_steps` the registered time limit applies.

    Args:
        env: A Gymnasium id; an `EnvSpec` or the JSON of its `to_json()`, as datasets and artifacts store it; a Gymnasium Env
            or VectorEnv; or an SB3 VecEnv.
        **kwargs: Passed to `gymnasium.make`; they override those of a stored spec.

    Returns:
        The environment.

    Raises:
        ValueError: If the id is unknown, the spec cannot be trusted or read, or kwargs are passed with an existing environment.
        ImportError: If a package is missing; the message names the extra to install.
        TypeError: If `env` is none of the above.
    """
    stored: dict[str, Any] = {}
    if isinstance(env, EnvSpec) or (isinstance(env, str) and env.lstrip().startswith("{")):
        env, stored = _read_spec(env)
    if isinstance(env, str):
        if kwargs.get("render_mode") is not None:
            prefer_egl()
        try:
            made = _make(env, stored | kwargs)
        except Exception as error:  # whatever an environment raises for arguments that it does not know
            if not stored or isinstance(error, ValueError | ImportError):
                raise
            raise _does_not_work(env, stored, error) from None
        if stored.keys() - {"max_episode_steps"}:
            try:
                made.reset(seed=0)  # some arguments are only looked at here
            except Exception as error:
                raise _does_not_work(env, stored, error) from None
        return made
    if not (isinstance(env, gym.Env | gym.vector.VectorEnv) or is_sb3(env)):
        refuse_gym(env)
        raise TypeError(
            f"env must be an environment id, a stored spec, a Gymnasium Env or VectorEnv, or an SB3 VecEnv, "
            f"not {type(env).__name__}"
        )
    if kwargs:
        raise ValueError(
            f"the environment has been made already, so {sorted(kwargs)} cannot be passed on: pass them where it is made, "
            "or pass its id"
        )
    return env


def refuse_gym(env: Any) -> None:
    """Raise a TypeError for an environment of the package gym, which is none of Gymnasium's."""
    if any(cls.__module__.partition(".")[0] == "gym" for cls in type(env).__mro__):
        raise TypeError(
            f"env is a {type(env).__name__} of the package gym, which Gymnasium has replaced: pass the id of its successor "
            "there, or wrap it with the package shimmy"
        )


def error_of_stored_arguments(env: Any, error: Exception) -> ValueError | None:
    """The error to raise instead of one in an environment that was made from a stored spec with arguments.

    Args:
        env: What was passed to `make_env`.
        error: What the environment raised later.

    Returns:
        An error that names the environment and the arguments; None if nothing stored can be the cause.
    """
    if not (isinstance(env, EnvSpec) or (isinstance(env, str) and env.lstrip().startswith("{"))):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the wrappers: said when it was made
        env_id, stored = _read_spec(env)
    return _does_not_work(env_id, stored, error) if stored.keys() - {"max_episode_steps"} else None


def _does_not_work(env_id: str, stored: Mapping[str, Any], error: Exception) -> ValueError:
    names = ", ".join(map(short, stored))
    return ValueError(
        f"environment {env_id!r} does not work with the stored arguments {names} ({printable(one_line(error))}); pass "
        "env= instead"
    )


def env_id_of(env: Any) -> str | None:
    """The id of an environment, a vector of environments or a stored spec, or None; an id is returned as it is."""
    if isinstance(env, EnvSpec):
        return env.id
    if isinstance(env, str):
        return _read_spec(env)[0] if env.lstrip().startswith("{") else env
    spec = spec_of(env)
    return None if spec is None else str(spec.id)


def scalar_reward(reward: Any) -> float:
    """The reward of a step as a number. Environments may return an array with one entry.

    Raises:
        ValueError: It is not one number.
    """
    array = np.asarray(reward)
    if array.size != 1 or array.dtype.kind not in "fiub":
        raise ValueError(f"the environment returned the reward {short(repr(reward))}: it must be one number")
    return float(array.reshape(-1)[0])


def spec_of(env: Any) -> EnvSpec | None:
    """The spec of an environment, or of the first in a vector of environments; None if it has none."""
    try:
        spec = getattr(env, "spec", None)
        if spec is None:
            vector = env.unwrapped if isinstance(env, gym.vector.VectorEnv) else env
            spec = vector.get_attr("spec")[0] if hasattr(vector, "get_attr") else None
    except Exception:  # a vector without environments behind it, or with workers that cannot send their spec
        return None
    return spec if isinstance(spec, EnvSpec) else None


def without_monitor(spec: EnvSpec) -> EnvSpec:
    """A copy of `spec` without SB3's Monitor, which only records, so that an environment does not depend on it."""
    wrappers = tuple(wrapper for wrapper in spec.additional_wrappers if wrapper.entry_point != _MONITOR)
    return replace(spec, additional_wrappers=wrappers)


def spec_to_store(spec: EnvSpec | Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """What of a spec goes into the file of an agent, which may be published: what rebuilds the environment, and no more.

    These are its id, time limit, keyword arguments and the names of its wrappers. Without one of its arguments it would be
    another environment: if one may not be stored, nothing is. Stored are numbers, short ordinary words, and lists and mappings
    of them, unless a name at any depth is that of a secret, a person, a machine or a dataset.

    Args:
        spec: The spec, or its fields.

    Returns:
        JSON that `make_env` takes, or None; and the names of the arguments that may not be stored.
    """
    fields = vars(spec) if isinstance(spec, EnvSpec) else spec
    kwargs = {key: value for key, value in (fields.get("kwargs") or {}).items() if key not in _NOT_THE_TASK}
    refused = sorted(str(key) for key, value in kwargs.items() if not _may_be_stored(str(key), value))
    if refused:
        return None, refused
    wrappers = [getattr(wrapper, "name", None) or wrapper["name"] for wrapper in fields.get("additional_wrappers") or ()]
    stored = {
        "id": fields.get("id"),
        "max_episode_steps": fields.get("max_episode_steps"),
        "kwargs": kwargs,
        "additional_wrappers": [{"name": name} for name in wrappers if name != "Monitor"],  # it only records
    }
    return json.dumps(stored), []


def spec_to_store_or_warn(spec: EnvSpec | None) -> str | None:
    """`spec_to_store` of the caller's environment: None if there is no spec, or, with a warning, if it may not be stored."""
    if spec is None:
        return None
    stored, refused = spec_to_store(spec)
    if refused:
        warnings.warn(
            f"{spec.id} is not stored with the agent, because its arguments {', '.join(map(short, refused))} may hold a path "
            "or a secret, or are no numbers and short words: pass env= to evaluate a loaded agent",
            stacklevel=3,
        )
    return stored


def _may_be_stored(key: str, value: Any) -> bool:
    """Whether an argument of an environment is a JSON value that neither names something of this machine nor holds a secret."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return all(_is_harmless(*leaf) for leaf in _leaves({key: value}))


def _is_harmless(_: str, name: str, value: Any) -> bool:
    """Whether one value of `_leaves` may be published: a number or short ordinary words under a name that is no secret's."""
    if value is _KEY:
        parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
        return not _SECRET_NAME.search(parted) and _is_plain(name, _LONGEST_KEY)
    return _doubt(name, value) is None and (not isinstance(value, str) or _is_plain(value, _LONGEST_VALUE))


def _is_plain(text: str, longest: int) -> bool:
    """Whether a text consists of ordinary words, and is no hash, number of a card, or token."""
    most_digits = 8 if len(text) <= 16 else 2
    digits = sum(char.isdigit() for char in text)
    return len(text) <= longest and digits <= most_digits and bool(_WORDS.fullmatch(text)) and not _SECRET.search(text)


def difference_of_specs(stored: str, other: Mapping[str, Any]) -> str | None:
    """Describe in which of id, time limit and keyword arguments two environments differ.

    Args:
        stored: JSON of an EnvSpec.
        other: The fields of another EnvSpec.

    Returns:
        For example "max_episode_steps=500 instead of 1000"; None if there is no difference.
    """
    old, new = _identity(json.loads(stored)), _identity(other)
    if old != new and old["id"] == new["id"]:  # an argument that is passed may be the default of the other environment
        defaults = _defaults(str(old["id"]))
        written = {key: defaults[key] for key in {**old, **new} if key in defaults}
        old, new = (one | {key: value for key, value in written.items() if key not in one} for one in (old, new))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    shown = [
        f"{short(key)}={short(str(new.get(key, 'default')))} instead of {short(str(old.get(key, 'default')))}"
        for key in keys[:_MOST_SHOWN]
    ]
    return ", ".join([*shown, *([f"and {len(keys) - _MOST_SHOWN} more"] if len(keys) > _MOST_SHOWN else [])]) or None


def warn_of_another_env(env: Any, stored: str, env_kwargs: Mapping[str, Any] | None = None) -> None:
    """Warn once if an environment is not the one that a dataset's spec describes.

    Args:
        env: What `make_env` takes; without an id nothing is compared.
        stored: JSON of the dataset's EnvSpec.
        env_kwargs: Keyword arguments with which the id `env` will be made.
    """
    if env_id_of(env) is None:
        return
    if isinstance(env, str):
        other = json.loads(env) if env.lstrip().startswith("{") else {"id": env, "kwargs": dict(env_kwargs or {})}
    else:
        other = vars(env if isinstance(env, EnvSpec) else spec_of(env))
    if difference := difference_of_specs(stored, other):
        warnings.warn(
            f"evaluating in another environment than the dataset's ({difference}); leave env out to evaluate in the dataset's",
            stacklevel=3,
        )


def warn_of_normalized_observations(dataset_info: Mapping[str, Any] | None, env: Any) -> None:
    """Warn if an agent that learned from data acts where a wrapper normalises the observations: it would see other units.

    Args:
        dataset_info: `Agent.dataset_info`; None if it has not learned yet, or for policies of which nothing is known.
        env: A Gymnasium Env or VectorEnv, or an SB3 VecEnv, for whose VecNormalize there is `refuse_vec_normalize`.
    """
    wrapper = _observation_normalizer(env)
    if dataset_info is None or wrapper is None or wrapper in str(dataset_info.get("env_spec")):
        return
    warnings.warn(
        f"the environment is inside a {wrapper}, but the agent learned from other data: unless these were recorded through "
        "such a wrapper, it sees observations in other units than it knows; leave the wrapper out",
        stacklevel=3,
    )


def _observation_normalizer(env: Any) -> str | None:
    """The name of a wrapper that normalises the observations of `env`, or of the first environment in a VecEnv; or None."""
    while env is not None:
        name = type(env).__name__
        if name == "NormalizeObservation":
            return name
        env = getattr(env, "env", None) or getattr(env, "venv", None) or next(iter(getattr(env, "envs", None) or ()), None)
    return None


def refuse_vec_normalize(env: Any, rewards: bool = True) -> None:
    """Raise ValueError if an SB3 VecNormalize changes the units of an environment, in which an agent would act.

    The agent knows the units of its data. Those of an SB3 replay buffer are the original ones, also if its model acted inside a
    VecNormalize.

    Args:
        env: Any environment; only a VecEnv can be inside a VecNormalize.
        rewards: Whether the units of rewards matter.
    """
    while env is not None:
        if any(cls.__name__ == "VecNormalize" for cls in type(env).__mro__) and (env.norm_obs or (rewards and env.norm_reward)):
            raise ValueError(
                "the environment is inside a VecNormalize, which changes the units of observations or rewards, but an agent "
                "acts in those of its data, which in an SB3 replay buffer are the original ones: pass the environment without "
                "it, env.venv; the agent's own normaliser (normalize_obs=True) and reward_transform are saved with it"
            )
        env = getattr(env, "venv", None)


def prefer_egl() -> bool:
    """Let MuJoCo render without a screen by setting MUJOCO_GL=egl, if that works.

    Only on Linux without a display and with MUJOCO_GL unset, where MuJoCo would choose GLFW and die at its first frame. The
    variable is set only after EGL has answered: if it is set and there is no EGL, even `import mujoco` fails.

    Returns:
        Whether the variable was set.
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
    """Whether `env` is a Stable-Baselines3 VecEnv, without importing Stable-Baselines3 for the answer."""
    module = sys.modules.get("stable_baselines3.common.vec_env")  # whoever has a VecEnv has imported it
    return module is not None and isinstance(env, module.VecEnv)


def _make(env_id: str, kwargs: dict[str, Any]) -> Any:
    """`gymnasium.make`, which registers the environments of the optional extras first where they are needed."""
    try:
        try:
            with _without_deprecations(env_id):
                return gym.make(env_id, **kwargs)
        except gym.error.UnregisteredEnv:
            _register_extra(env_id)
            with _without_deprecations(env_id):
                return gym.make(env_id, **kwargs)
    except gym.error.UnregisteredEnv as error:
        cause: Exception = error
        remedy = "check its spelling and version, or import the package that registers it first"
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        unregistered = isinstance(error.__context__, gym.error.UnregisteredEnv)
        cause = error.__context__ if unregistered else error  # type: ignore[assignment]
        if unregistered and env_id.startswith(_PUSHT):
            raise ImportError(f"{env_id} needs gym-pusht: pip install gym-pusht") from None
        if unregistered and not env_id.rsplit("/", 1)[-1].startswith(_ROBOTICS):
            remedy = "check its spelling; the ids of Gymnasium-Robotics need pip install gymnasium-robotics"
        elif unregistered:
            raise ImportError(f"{env_id} needs Gymnasium-Robotics: pip install gymnasium-robotics") from None
        elif importlib.util.find_spec("mujoco") is None:
            raise ImportError(f'{env_id} needs MuJoCo: pip install "gymnasium[mujoco]" ({one_line(error)})') from None
        else:
            raise
    except gym.error.Error as error:  # a malformed id, or one that has been retired
        cause, remedy = error, "check its spelling, which is [namespace/]name-vN"
    raise ValueError(f"unknown environment {env_id!r} ({printable(one_line(cause))}): {remedy}") from None


def _register_extra(env_id: str) -> None:
    """Register the environments of the optional package that has this one. Raises ImportError if it is not installed."""
    if env_id.startswith(_PUSHT):
        import gym_pusht

        gym.register_envs(gym_pusht)
    else:
        with contextlib.redirect_stderr(io.StringIO()) as news:  # a notice about three environments, whichever is made
            import gymnasium_robotics
        if env_id in news.getvalue():
            print(news.getvalue(), end="", file=sys.stderr)
        gym.register_envs(gymnasium_robotics)


@contextlib.contextmanager
def _without_deprecations(env_id: str) -> Iterator[None]:
    """Keep to itself what MuJoCo, in every environment that is made, finds outdated in the model files of other packages.

    Its other warnings are printed as MuJoCo prints them, or go to the function that the user has set for them.
    """
    if env_id in gym.registry:
        with contextlib.suppress(Exception):  # gymnasium.make says why it cannot be imported
            _constructor(env_id)
    mujoco = sys.modules.get("mujoco")  # whoever makes such an environment imports it
    if mujoco is None or not hasattr(mujoco, "get_mju_user_warning"):
        yield
        return
    before = mujoco.get_mju_user_warning()

    def warn(text: str) -> None:
        if "is deprecated" in text:
            return
        if before is not None:
            before(text)
        else:
            print(f"WARNING: {text}", file=sys.stderr)

    mujoco.set_mju_user_warning(warn)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def _constructor(env_id: str) -> Any:
    """What makes a registered environment, which may import its package."""
    entry_point = gym.registry[env_id].entry_point
    return load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point


def _read_spec(spec: str | EnvSpec) -> tuple[str, dict[str, Any]]:
    """The id of a stored spec and the keyword arguments for `gymnasium.make`; all else in it is ignored."""
    if isinstance(spec, EnvSpec):
        fields: Any = vars(spec)
        wrappers = [wrapper.name for wrapper in spec.additional_wrappers]
    else:
        try:
            fields = json.loads(spec)
            wrappers = [str(wrapper["name"]) for wrapper in fields.get("additional_wrappers") or ()]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"the stored environment spec cannot be read ({one_line(error)}); pass an environment id instead"
            ) from None
    env_id, kwargs, limit = fields.get("id"), fields.get("kwargs") or {}, fields.get("max_episode_steps")
    if not isinstance(env_id, str) or not isinstance(kwargs, Mapping):
        raise ValueError(
            f"the stored environment spec has no usable id and kwargs (its id is {env_id!r}); pass an environment id instead"
        )
    if ":" in env_id:
        raise ValueError(f"the stored environment id {env_id!r} would import a module; if you trust it, pass that id yourself")
    if limit is not None and (type(limit) is not int or not 1 <= limit <= _MOST_STEPS):
        raise ValueError(
            f"the stored environment spec has max_episode_steps={short(str(limit))}; it must be null or a whole number from "
            f"1 to {_MOST_STEPS:,}"
        )
    # Constructors take paths (xml_file), ids of other environments (env_id), and numbers that decide how long a step takes
    # (frame_skip) or how much memory a picture needs (width): those of an untrusted file must not be used unseen.
    for n, (argument, key, value) in enumerate(_leaves(kwargs)):
        told = key if value is _KEY else value
        doubt = _doubt(key, told) if n < _MOST_VALUES else "is one of too many values"
        if doubt:
            name = short(argument)
            raise ValueError(
                f"the stored environment spec has {name}={short(str(told))!r}, which {doubt}; if you trust it, pass "
                f"env={env_id!r} and {name}= yourself"
            )
    if wrappers:
        warnings.warn(f"{short(env_id)} is made without the wrappers {wrappers} of its stored spec", stacklevel=3)
    kept = {key: value for key, value in kwargs.items() if key not in _NOT_THE_TASK}
    return env_id, kept if limit is None else kept | {"max_episode_steps": limit}


def _doubt(name: str, value: Any) -> str | None:
    """Why a value from an untrusted file must not reach a constructor under this name; None if it may."""
    if isinstance(value, str) and (any(mark in value for mark in ":/\\") or value.startswith((".", "~"))):
        return "looks like a path or a module"
    if isinstance(value, int | float) and not isinstance(value, bool) and not math.isinf(value):
        if abs(value) > _LARGEST:
            return f"is larger than {_LARGEST:,}"
        if abs(value) > _MOST_REPEATS and _REPEATS.search(name):
            return f"is larger than {_MOST_REPEATS:,}, of steps that are made in one"
    return None


def _leaves(arguments: Mapping[Any, Any]) -> Iterator[tuple[str, str, Any]]:
    """All keys and values in nested arguments, depth first: (argument that contains it, nearest name, value or _KEY)."""
    waiting: list[tuple[str, str, Any]] = [("", "", arguments)]
    while waiting:  # no recursion: an untrusted file may be nested deeply
        argument, name, value = waiting.pop()
        if isinstance(value, Mapping):
            for key, item in reversed(list(value.items())):
                waiting += [(argument or str(key), str(key), item), (argument or str(key), str(key), _KEY)]
        elif isinstance(value, list | tuple):
            waiting += [(argument, name, item) for item in reversed(value)]
        else:
            yield argument, name, value


def _identity(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes two environments: id, time limit and keyword arguments, as in JSON, with those that are registered."""
    env_id = str(spec.get("id"))
    if env_id not in gym.registry and env_id.startswith((_PUSHT, *_ROBOTICS)):
        with contextlib.suppress(ImportError):
            _register_extra(env_id)
    registered = gym.registry.get(env_id)
    limit = spec.get("max_episode_steps") or (registered.max_episode_steps if registered is not None else None)
    facts = {"id": spec.get("id"), "max_episode_steps": limit}
    kwargs = _as_json({**(registered.kwargs if registered is not None else {}), **(spec.get("kwargs") or {})})
    return facts | {key: value for key, value in kwargs.items() if key not in _NOT_THE_TASK}


def _defaults(env_id: str) -> dict[str, Any]:
    """The defaults of a registered environment's constructor, as in JSON; empty if they cannot be read."""
    try:
        parameters = inspect.signature(_constructor(env_id)).parameters
    except Exception:  # not registered, a missing package, or a constructor without a signature
        return {}
    return _as_json({name: one.default for name, one in parameters.items() if one.default is not inspect.Parameter.empty})


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they come back from JSON, lists for tuples; what is no JSON becomes a text."""
    read: dict[str, Any] = json.loads(json.dumps(dict(values), default=str, skipkeys=True))
    return read
