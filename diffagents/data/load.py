"""Anything a user has -> Transitions, checked and cached. How rows become transitions is told in arrays.py."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec

from diffagents.data import validation as check
from diffagents.data.arrays import D4RL_NAMES, Keys, from_arrays, from_episodes, from_replay_buffer
from diffagents.data.cache import _cached, _stamp
from diffagents.data.minari import _local_minari, _read_minari
from diffagents.data.transitions import Transitions
from diffagents.data.validation import warn
from diffagents.envs.make import make_env
from diffagents.errors import one_line
from diffagents.types import Spec

_ARRAYS = {
    "observations", "actions", "rewards", "terminations", "truncations", "next_observations", "episode_ends", "dones", "masks",
}  # fmt: skip
_ACCEPTED = (
    "a Minari id, a MinariDataset, a dict of arrays, a list of episode dicts, a path to .npz or .hdf5, "
    "an SB3 ReplayBuffer, or Transitions"
)


def load_dataset(
    source: Any,
    *,
    env: Any = None,
    obs_keys: Sequence[str] | None = None,
    clip_actions: bool = False,
    download: bool = True,
    cache: bool = True,
    verbose: int = 0,
) -> Transitions:
    """Read `source`, check it and return Transitions on the CPU, in the environment's units.

    `source` is one of
      * a Minari id `(namespace/)name-vN`: local first, else downloaded (forbidden by `download=False`), from the remote
        in front of it if there is one, `hf://user/namespace/name-v0`;
      * a `minari.MinariDataset`, filtered or not;
      * a dict of arrays with one row per step: `observations` (an array or a dict of arrays), `actions`, `rewards`,
        `terminations`, `truncations`, optional `next_observations`. D4RL's `terminals` and `timeouts` are accepted.
        Without truncations, episode ends come from `episode_ends` (one past each last row), else from breaks in
        `next_observations`, else from the time limit of `env`; if there is none of them, the data are refused;
      * a list of episode dicts with T+1 observations and T actions each, same keys;
      * a path to an `.npz` of the same arrays (a dict observation as `observations/key`), or to a D4RL-style `.hdf5`;
      * a Stable-Baselines3 `ReplayBuffer` or `DictReplayBuffer`. Their actions are taken as SB3's off-policy algorithms
        store them, scaled to [-1, 1], and brought back to the units of the buffer's action space;
      * `Transitions`, returned as they are, or a copy that shares their tensors where `env` or `clip_actions` change them;
        their `obs_keys` cannot be changed any more.

    `env` (an id, a Gymnasium Env or VectorEnv, an SB3 VecEnv) provides the spaces; else they come from the dataset; arrays
    alone get unbounded observations and the action bounds of the data, with a warning. It also provides the environment
    spec where the dataset has none; a dataset's own is kept, with a warning where `env` is another.
    `obs_keys` chooses and orders the parts of a Dict observation. `clip_actions` accepts actions outside the bounds.
    `cache` keeps Minari and HDF5 sets as flat files in $DIFFAGENTS_CACHE or ~/.cache/diffagents.

    `info` of the result is JSON-able: `id`, `kind`, `n_steps` and `n_episodes` as recorded, `mean_return` and
    `std_return` of whole episodes, `sha256` of the content, `env_spec` (JSON of a Gymnasium EnvSpec or None; for Minari
    the evaluation environment's if recorded), `ref_min_score` and `ref_max_score` (or None), `obs_keys`,
    `bounds_from_data`, `warnings`.

    Raises TypeError, ValueError, FileNotFoundError or ConnectionError, in one line with the place and the cure.
    """
    started = time.perf_counter()
    if isinstance(obs_keys, str):
        raise TypeError(f"obs_keys={obs_keys!r} is a string, not a list of keys; pass obs_keys=({obs_keys!r},)")
    keys = tuple(obs_keys) if obs_keys is not None else None
    ready = isinstance(source, Transitions)
    if ready:
        if keys not in (None, source.spec.obs_keys):
            was = f"these Transitions were read with obs_keys={source.spec.obs_keys}"
            raise ValueError(f"{was}, which obs_keys={keys} cannot change; read the source again with those")
        keys = source.spec.obs_keys
    given = _describe_env(env, keys) if env is not None else None
    if keys is None and given is not None:
        keys = given.spec.obs_keys
    data = _read(source, keys, given, download, cache)
    if given is not None:
        if difference := _adopt(data, given):
            warn(difference)
    elif data.info.get("bounds_from_data") and not ready:
        low, high = data.spec.action_space.low, data.spec.action_space.high
        warn(f"action bounds [{low.min():.4g}, {high.max():.4g}] are those of the data; pass env= for the true ones")
    data.action = check.within_bounds(data.action, data.spec, data.episode_ends, data.episode_lengths, clip_actions)
    if ready:  # what there is to say about them was said when they were read
        return source if given is None and data.action is source.action else data
    for advice in data.info["warnings"]:
        warn(f"{data.info['id']}: {advice}")
    if verbose:
        took, n_episodes = time.perf_counter() - started, data.info["n_episodes"]
        print(f"{data.info['id']}: {len(data):,} transitions, {n_episodes:,} episodes, read in {took:.2f} s")
    return data


def _read(source: Any, keys: Keys, given: "_Given | None", download: bool, cache: bool) -> Transitions:
    env_spec = given.env_spec if given is not None else None
    limit = env_spec.max_episode_steps if env_spec is not None else None
    if isinstance(source, Transitions):
        return replace(source, info=dict(source.info))
    if isinstance(source, Path) or (isinstance(source, str) and source.lower().endswith((".npz", ".hdf5", ".h5"))):
        return _read_file(Path(source).expanduser(), keys, limit, cache)
    if isinstance(source, str):
        return _read_minari(_local_minari(source, download), keys, cache)
    if _is_a(source, "minari", "MinariDataset"):
        return _read_minari(Path(source.storage.data_path), keys, cache, source)
    if _is_a(source, "stable_baselines3", "ReplayBuffer"):
        return from_replay_buffer(source, keys, env_spec)
    if isinstance(source, Mapping):
        return from_arrays(source, keys, limit, {"id": "arrays", "kind": "arrays"})
    if isinstance(source, (list, tuple)) and all(isinstance(episode, Mapping) for episode in source):
        found = ((f"episode {i} actions", e["actions"]) for i, e in enumerate(source) if "actions" in e)
        n_steps = sum(len(check.actions(name, actions, None)) for name, actions in found)
        return from_episodes(source, n_steps, keys, None, {"id": "arrays", "kind": "episodes"})
    raise TypeError(f"cannot read a dataset from {type(source).__name__}; accepted are {_ACCEPTED}")


def _is_a(source: Any, package: str, name: str) -> bool:
    # By name, so that the package is not imported only to find out that the source has nothing to do with it.
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == package for cls in type(source).__mro__)


# ---- environments ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    spec: Spec
    env_spec: EnvSpec | None


def _describe_env(env: Any, keys: Keys) -> _Given:
    if isinstance(env, str | EnvSpec):
        with make_env(env) as made:
            return _describe_env(made, keys)
    observation_space = getattr(env, "single_observation_space", getattr(env, "observation_space", None))
    action_space = getattr(env, "single_action_space", getattr(env, "action_space", None))
    if observation_space is None or action_space is None:
        raise TypeError(f"env is a {type(env).__name__}; pass an environment id, a Gymnasium Env, or an SB3 VecEnv")
    env_spec = getattr(env, "spec", None)
    if env_spec is None and hasattr(env, "get_attr"):
        try:
            env_spec = env.get_attr("spec")[0]
        except (AttributeError, IndexError):  # a VecEnv made of spaces only
            env_spec = None
    spec = Spec.from_spaces(observation_space, action_space, keys)
    return _Given(spec, env_spec if isinstance(env_spec, EnvSpec) else None)


def _adopt(data: Transitions, given: _Given) -> str | None:
    """Put the environment's spaces in place of the data's, and its spec where they have none. Returns what to warn of."""
    check.fits(data.spec, given.spec, data.info.get("bounds_from_data", False))
    data.spec = given.spec
    data.info["bounds_from_data"] = False
    stored = data.info.get("env_spec")
    if stored is None:
        data.info["env_spec"] = _env_spec_json(given.env_spec)
    return check.another_env(data.info.get("id", "the data"), stored, given.env_spec) if stored and given.env_spec else None


def _env_spec_json(env_spec: EnvSpec | None) -> str | None:
    if env_spec is None:
        return None
    # SB3 puts its Monitor around every environment: it only records, and nobody wants to hear that it is missing.
    monitor = "stable_baselines3.common.monitor:Monitor"
    wrappers = tuple(wrapper for wrapper in env_spec.additional_wrappers if wrapper.entry_point != monitor)
    try:
        return replace(env_spec, additional_wrappers=wrappers).to_json()
    except (TypeError, ValueError):  # made with arguments that JSON cannot hold: not reproducible from a file
        return None


# ---- files -----------------------------------------------------------------------------------------------------------


def _read_file(path: Path, keys: Keys, limit: int | None, cache: bool) -> Transitions:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; give the path of an .npz or .hdf5 file, or a Minari id")
    info = {"id": path.name, "kind": "npz" if path.suffix.lower() == ".npz" else "hdf5"}
    if path.suffix.lower() == ".npz":
        return from_arrays(_npz_arrays(path), keys, limit, info)
    if path.suffix.lower() not in (".hdf5", ".h5"):
        raise ValueError(f"{path} ends in {path.suffix!r}; only .npz, .hdf5 and .h5 files are read")
    if not cache:
        return from_arrays(_hdf5_arrays(path), keys, limit, info)
    key = {"path": str(path.resolve()), "obs_keys": keys, "limit": limit}
    stamp = {"files": _stamp([path])}
    return _cached(path.stem, key, stamp, lambda: from_arrays(_hdf5_arrays(path), keys, limit, info))


def _npz_arrays(path: Path) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                head, _, leaf = name.partition("/")
                if D4RL_NAMES.get(head, head) not in _ARRAYS:
                    continue
                if leaf:
                    arrays.setdefault(head, {})[leaf] = file[name]
                else:
                    arrays[head] = file[name]
    except Exception as error:  # numpy and zipfile raise many kinds on foreign files
        cure = "write it with numpy.savez, from plain arrays only"
        raise ValueError(f"{path} cannot be read as .npz ({one_line(error)}); {cure}") from None
    return arrays


def _hdf5_arrays(path: Path) -> dict[str, Any]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "episode_0" in file:
                raise ValueError("it is the inside of a Minari set: pass the set's id instead")
            arrays: dict[str, Any] = {}
            for name, node in file.items():
                if D4RL_NAMES.get(name, name) in _ARRAYS:
                    parts = {key: leaf[()] for key, leaf in node.items()} if isinstance(node, h5py.Group) else None
                    arrays[name] = node[()] if parts is None else parts
            return arrays
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a D4RL-style HDF5 file: {one_line(error)}") from None
