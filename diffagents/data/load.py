"""`load_dataset`: from anything that a user may have to Transitions, checked and cached.

How rows become transitions is described in arrays.py, what is checked in validation.py.
"""

import math
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from diffagents.data import hdf5
from diffagents.data import validation as check
from diffagents.data.arrays import Keys, from_arrays, from_episodes, from_replay_buffer
from diffagents.data.cache import cached, stamp_of
from diffagents.data.minari import IS_AN_ENVIRONMENT, advice_on_a_folder, find_minari, read_minari
from diffagents.data.ogbench import episodes_of, is_ogbench, made
from diffagents.data.transitions import Transitions
from diffagents.envs.make import difference_of_specs, is_sb3, make_env, spec_of, spec_to_store_or_warn
from diffagents.errors import one_line, printable
from diffagents.types import Spec

_ARRAYS = {
    "observations", "actions", "rewards", "terminations", "truncations", "next_observations", "episode_ends", "dones", "masks",
    "valids",
}  # fmt: skip
_FILES = (".npz", ".hdf5", ".h5")
_PICKLE = (
    "a pickle can run code when it is opened, and is never opened here: if you trust it, open it yourself and pass what it "
    "contains; a replay buffer that SB3 saved is stable_baselines3.common.save_util.load_from_pkl({!r})"
)
_FOREIGN = {
    ".parquet": "read it with pandas.read_parquet(path) and pass a dict of arrays",
    ".csv": "read it with pandas.read_csv(path) and pass a dict of arrays",
    ".zarr": "open it with zarr.open(path) and pass a dict of its arrays",
    ".pt": "read it with torch.load(path, weights_only=True) and pass what it contains, a dict of arrays",
    ".pth": "read it with torch.load(path, weights_only=True) and pass what it contains, a dict of arrays",
    ".pkl": _PICKLE,
    ".pickle": _PICKLE,
}
"""How to get from other kinds of files to something that can be read, by suffix."""
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
    """Read a dataset, check it, and return it as Transitions on the CPU, in the environment's units.

    Args:
        source: The dataset, which is one of the following.

            - A Minari id `(namespace/)name-vN`. It is looked for locally, then downloaded, from the remote in front of the id
              if there is one (`hf://user/namespace/name-v0`).
            - A `minari.MinariDataset`, filtered or not.
            - A dict of arrays with one row per step: `observations` (an array or a dict of arrays), `actions`, `rewards`,
              `terminations`, `truncations`, and optionally `next_observations`. D4RL's `terminals` and `timeouts` are accepted.
              Without truncations, the ends of episodes are taken from `episode_ends` (one past each last row), else from breaks
              in `next_observations`, else from the time limit of `env`; without any of these the data are rejected.
            - A list of episode dicts with the same keys, T + 1 observations and T actions each.
            - OGBench's arrays for one task, with `masks`: an episode terminates where its mask is 0, and is cut at `terminals`.
            - A path to an `.npz` of the same arrays (a dict observation as `observations/key`) or to a D4RL-style `.hdf5`.
            - A Stable-Baselines3 `ReplayBuffer` or `DictReplayBuffer`. Its actions must be scaled to [-1, 1], as SB3's
              off-policy algorithms store them; they are scaled back to the units of its action space.
            - `Transitions`, returned unchanged, or as a copy that shares their tensors if `env` or `clip_actions` change them.
              Their `obs_keys` cannot be changed.
        env: An id, a Gymnasium Env or VectorEnv, or an SB3 VecEnv, which provides the spaces. Default: those of the dataset;
            arrays alone get unbounded observations and the action bounds of the data, with a warning. It also provides the
            environment spec if the dataset has none; a dataset's own is kept, with a warning if `env` differs from it.
        obs_keys: Chooses and orders the parts of a Dict observation. Default: those of `env`, else `observation`,
            `achieved_goal` and `desired_goal` if the first and the last exist, else all.
        clip_actions: Whether to clip actions that lie outside the bounds instead of rejecting them.
        download: Whether a Minari id may be downloaded.
        cache: Whether to keep Minari and HDF5 sets as flat files in $DIFFAGENTS_CACHE, by default ~/.cache/diffagents.
        verbose: 1 prints a line with the size of the dataset and the time.

    Returns:
        The data. Their `info` contains JSON values: `id`, `kind`, `n_steps` and `n_episodes` as recorded, `mean_return` and
        `std_return` of whole episodes, `sha256` of the content, `env_spec` (JSON with id, keyword arguments and time limit of
        the environment, from which `evaluate` makes it, or None; for Minari that of the evaluation environment if recorded),
        `ref_min_score` and `ref_max_score` (or None), `obs_keys`, `bounds_from_data`, `warnings`.

    Raises:
        TypeError: If `source`, `env` or an array is of a wrong kind.
        ValueError: If the data are incomplete, contradictory, not finite, or do not fit `env`.
        FileNotFoundError: If there is no such file or Minari set.
        ConnectionError: If a download fails.
        OSError: If a Minari set is damaged.
    """
    started = time.perf_counter()
    if isinstance(obs_keys, str):
        raise TypeError(f"obs_keys={obs_keys!r} is a string, not a list of keys; pass obs_keys=({obs_keys!r},)")
    keys = tuple(obs_keys) if obs_keys is not None else None
    if isinstance(source, Transitions):
        return _adapt(source, keys, env, clip_actions)

    environment = _describe_env(env, keys) if env is not None else None
    if keys is None and environment is not None:
        keys = environment.spec.obs_keys
    try:
        data = _read(source, keys, environment, download, cache)
    except (MemoryError, OverflowError, RecursionError) as error:
        named = check.name_of(source) if isinstance(source, str | Path) else "the dataset"
        cause = f"{type(error).__name__}: {printable(one_line(error))}"
        raise ValueError(
            f"{named} is too large to be read, or damaged ({cause}); copy it again, or read a part of it"
        ) from None
    if environment is not None:
        if difference := _use_environment(data, environment):
            check.warn(difference)
    elif data.info.get("bounds_from_data"):
        low, high = data.spec.action_space.low, data.spec.action_space.high
        check.warn(f"action bounds [{low.min():.4g}, {high.max():.4g}] are those of the data; pass env= for the true ones")
    if not data.info.get("bounds_from_data"):
        data.action = check.within_bounds(data.action, data.spec, data.episode_ends, data.episode_lengths, clip_actions)

    for advice in data.info["warnings"]:
        check.warn(f"{data.info['id']}: {advice}")
    if verbose:
        took, facts = time.perf_counter() - started, data.info
        print(f"{check.name_of(facts['id'])}: {_size(data)}, {facts['n_episodes']:,} episodes, read in {took:.2f} s")
    return data


def _size(data: Transitions) -> str:
    """How many transitions there are, and why they are fewer than the steps of which everything else speaks."""
    missing = data.info["n_steps"] - len(data)
    if not missing:
        return f"{len(data):,} transitions"
    cut = (
        "1 episode is cut, and its last step lacks"
        if missing == 1
        else f"{missing:,} episodes are cut, and their last steps lack"
    )
    return f"{len(data):,} transitions of {data.info['n_steps']:,} steps ({cut} the next observation)"


def _read(source: Any, keys: Keys, environment: "_Environment | None", download: bool, cache: bool) -> Transitions:
    """Hand `source` to the reader of its kind."""
    env_spec = environment.env_spec if environment is not None else None
    limit = env_spec.max_episode_steps if env_spec is not None else None
    # Integer actions and single numbers are accepted only if the environment has such spaces: arrays alone do not tell.
    spec = environment.spec if environment is not None and check.has_numbers_or_integers(environment.spec) else None
    if isinstance(source, str | Path) and (way := _FOREIGN.get(Path(source).suffix.lower())):
        raise ValueError(f"{source} is no file that can be read here, which are .npz and .hdf5: {way.format(str(source))}")
    if isinstance(source, Path) or (isinstance(source, str) and source.lower().endswith(_FILES)):
        return _read_file(Path(source).expanduser(), keys, limit, cache and spec is None, spec)
    if isinstance(source, str):
        return read_minari(find_minari(source, download), keys, cache)
    if _is_a(source, "minari", "MinariDataset"):
        return read_minari(Path(source.storage.data_path), keys, cache, source)
    if _is_a(source, "stable_baselines3", "ReplayBuffer"):
        return from_replay_buffer(source, keys, env_spec)
    if isinstance(source, Mapping):
        return _from_mapping(source, keys, limit, {"id": "arrays", "kind": "arrays"}, "the dataset", spec)
    if isinstance(source, (list, tuple)) and all(isinstance(episode, Mapping) for episode in source):
        named = ((f"episode {i} actions", e["actions"]) for i, e in enumerate(source) if "actions" in e)
        n_steps = sum(len(np.atleast_1d(check.numeric(name, actions))) for name, actions in named)
        return from_episodes(source, n_steps, keys, spec, {"id": "arrays", "kind": "episodes"})
    raise TypeError(_no_dataset(source))


def _no_dataset(source: Any) -> str:
    """Why something is no dataset: in particular what SB3's `learn` takes, which makes its own data."""
    kind = type(source).__name__
    if source is None or isinstance(source, int | float):
        what = "there is no dataset" if source is None else f"the dataset is the number {source}"
        return (
            f"{what}: agents learn from recorded data, learn(dataset, total_timesteps), which are {_ACCEPTED}; to learn by "
            "acting in an environment instead, call learn_online(total_timesteps, env=...)"
        )
    if isinstance(source, gym.Env | gym.vector.VectorEnv) or is_sb3(source):
        return f"a {kind} {IS_AN_ENVIRONMENT}"
    if _is_a(source, "stable_baselines3", "BaseAlgorithm"):
        return (
            f"a {kind} is a model, not a dataset: pass its replay buffer, model.replay_buffer, or let the model record data "
            "with diffagents.collect"
        )
    return f"a dataset cannot be read from {kind}; accepted are {_ACCEPTED}"


def _from_mapping(
    arrays: Mapping[str, Any], keys: Keys, limit: int | None, info: dict[str, Any], where: str, spec: Spec | None
) -> Transitions:
    """Read flat arrays, in D4RL's layout and ours or in OGBench's."""
    if not is_ogbench(arrays):
        return from_arrays(arrays, keys, limit, info, spec)
    episodes = episodes_of(arrays, where)
    return from_episodes(episodes, sum(len(episode["rewards"]) for episode in episodes), keys, spec, {**info, "made": made()})


def _is_a(source: Any, package: str, name: str) -> bool:
    """Whether `source` is of a class of that name, without importing the package for the answer."""
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == package for cls in type(source).__mro__)


def _adapt(source: Transitions, keys: Keys, env: Any, clip_actions: bool) -> Transitions:
    """Transitions with the spaces of `env` and clipped actions; `source` itself if nothing changes.

    No warnings about the data themselves: these were issued when the data were read.
    """
    if keys not in (None, source.spec.obs_keys):
        was = f"these Transitions were read with obs_keys={source.spec.obs_keys}"
        raise ValueError(f"{was}, which obs_keys={keys} cannot change; read the source again with those")
    data = replace(source, info=dict(source.info))
    if env is not None and (difference := _use_environment(data, _describe_env(env, source.spec.obs_keys))):
        check.warn(difference)
    data.action = check.within_bounds(data.action, data.spec, data.episode_ends, data.episode_lengths, clip_actions)
    return source if env is None and data.action is source.action else data


# ---- environments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Environment:
    """What a dataset takes from an environment."""

    spec: Spec
    env_spec: EnvSpec | None


def _describe_env(env: Any, keys: Keys) -> _Environment:
    """The spaces and the spec of an environment; one that is passed as an id is made and closed."""
    if isinstance(env, str | EnvSpec):
        with make_env(env) as made:
            return _describe_env(made, keys)
    observation_space = getattr(env, "single_observation_space", getattr(env, "observation_space", None))
    action_space = getattr(env, "single_action_space", getattr(env, "action_space", None))
    if observation_space is None or action_space is None:
        raise TypeError(f"env is a {type(env).__name__}; pass an environment id, a Gymnasium Env, or an SB3 VecEnv")
    return _Environment(Spec.from_spaces(observation_space, action_space, keys), spec_of(env))


def _use_environment(data: Transitions, environment: _Environment) -> str | None:
    """Give `data` the environment's spaces, and its spec if they have none. Returns a warning if they have another spec."""
    check.fits(data.spec, environment.spec, data.info.get("bounds_from_data", False))
    data.spec = environment.spec
    data.info["bounds_from_data"] = False
    stored = data.info.get("env_spec")
    if stored is None:
        data.info["env_spec"] = spec_to_store_or_warn(environment.env_spec)
    if not stored or environment.env_spec is None:
        return None
    difference = difference_of_specs(stored, vars(environment.env_spec))
    if difference is None:
        return None
    return (
        f"{data.info.get('id', 'the data')}: env= is not the environment stored with the dataset ({difference}); "
        "the stored one is kept for evaluation; pass env= there for another"
    )


# ---- files -------------------------------------------------------------------------------------------------------------


def _read_file(path: Path, keys: Keys, limit: int | None, cache: bool, spec: Spec | None) -> Transitions:
    """Read an .npz or HDF5 file of flat arrays, HDF5 from the cache if it may be used."""
    where = printable(path)
    if not path.is_file():
        if advice := advice_on_a_folder(path):
            raise ValueError(advice)
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{where} {what}; pass the path of an .npz or .hdf5 file, or a Minari id")
    info = {"id": check.name_of(path.name), "kind": "npz" if path.suffix.lower() == ".npz" else "hdf5"}
    if path.suffix.lower() == ".npz":
        return _from_mapping(_npz_arrays(path), keys, limit, info, where, spec)
    if path.suffix.lower() not in (".hdf5", ".h5"):
        raise ValueError(f"{where} ends in {path.suffix!r}; only .npz, .hdf5 and .h5 files can be read")

    def read() -> Transitions:
        episodes = _robomimic_episodes(path, keys)
        if episodes is None:
            return _from_mapping(_hdf5_arrays(path), keys, limit, info, where, spec)
        return from_episodes(episodes, sum(len(episode["actions"]) for episode in episodes), keys, spec, info)

    if not cache:
        return read()
    key = {"path": str(path.resolve()), "obs_keys": keys, "limit": limit}
    return cached(path.stem, key, {"files": stamp_of([path])}, read)


def check_npz(path: Path) -> None:
    """Check that the arrays of an .npz are not larger than the file can hold, before they are read.

    Raises:
        ValueError: They are; or they are compressed in a way whose claimed size is not kept, which numpy never does.
        zipfile.BadZipFile: It is no .npz.
        OSError: It cannot be read.
    """
    size, total = path.stat().st_size, 0
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            name = check.name_of(item.filename)
            if item.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is compressed with method {item.compress_type}, and not as numpy does")
            total += item.file_size
            if total > hdf5.most_bytes(size):
                raise ValueError(f"up to {name}, its arrays claim {total:,} bytes together, of which {size:,} are stored")
            if not item.filename.endswith(".npy"):
                continue
            with archive.open(item) as member:
                version = np.lib.format.read_magic(member)
                header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = header(member) if version in ((1, 0), (2, 0)) else ((), False, np.dtype(bool))
            # numpy reserves what the header claims before it reads. Objects are refused by it, other versions are rare.
            if math.prod(shape) * dtype.itemsize > item.file_size and not dtype.hasobject:
                raise ValueError(f"{name} claims the shape {shape}, but has {item.file_size:,} bytes")


def _npz_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an .npz by name; `observations/key` become a dict."""
    arrays: dict[str, Any] = {}
    try:
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                head, _, leaf = name.partition("/")
                if check.OTHER_NAMES.get(head, head) not in _ARRAYS:
                    arrays[name] = None  # its name alone matters: for OGBench's layout, and for messages
                elif leaf:
                    arrays.setdefault(head, {})[leaf] = file[name]
                else:
                    arrays[head] = file[name]
    except Exception as error:  # numpy and zipfile raise errors of many kinds on foreign files
        remedy = "write it with numpy.savez, from plain arrays only"
        raise ValueError(f"{printable(path)} cannot be read as .npz ({printable(one_line(error))}); {remedy}") from None
    return arrays


def _robomimic_episodes(path: Path, keys: Keys) -> list[dict[str, Any]] | None:
    """The demonstrations `data/demo_0`, ... of a robomimic file, with `obs`, `next_obs`, `actions`, `rewards`, `dones`.

    Its `dones` mark successes, the ends of demonstrations, or both, as the file was made. Here a demonstration terminates if
    its last step is done and has a reward; else it is cut there.

    Args:
        path: The file.
        keys: Which observations to read; None: all.

    Returns:
        The episodes, or None if the file has another layout.

    Raises:
        ValueError: A demonstration is incomplete.
    """
    import h5py

    try:
        with hdf5.opened(path) as (file, budget):
            # Names are compared in lists of them: h5py's `in` and `get` would follow a link.
            group = hdf5.node(file, "data") if "data" in list(file) else None
            if not isinstance(group, h5py.Group):
                return None
            names = [name for name in group if name.startswith("demo_")]
            episodes: list[dict[str, Any]] = []
            for name in sorted(names, key=lambda name: (len(name), name)):
                demo = hdf5.subgroup(group, name)
                missing = sorted({"obs", "next_obs", "actions", "rewards", "dones"} - set(demo))
                if missing:
                    raise ValueError(f"data/{name} lacks {missing}: make the file with robomimic's dataset_states_to_obs.py")
                before, after = hdf5.subgroup(demo, "obs"), hdf5.subgroup(demo, "next_obs")
                absent = [key for key in keys or () if key not in list(before)]
                if absent:
                    raise ValueError(f"data/{name}/obs lacks the keys {absent}; it has {list(before)}")
                obs, next_obs = ({key: hdf5.read(part, key, budget) for key in keys or before} for part in (before, after))
                rewards, dones = hdf5.read(demo, "rewards", budget), hdf5.read(demo, "dones", budget)
                last = np.arange(len(rewards)) == len(rewards) - 1
                succeeded = bool(dones[-1]) and rewards[-1] > 0
                episodes.append(
                    {
                        "observations": {key: np.concatenate([obs[key], next_obs[key][-1:]]) for key in obs},
                        "actions": hdf5.read(demo, "actions", budget),
                        "rewards": rewards,
                        "terminations": last & succeeded,
                        "truncations": last & (not succeeded),
                    }
                )
            return episodes or None
    except (OSError, KeyError, IndexError, RuntimeError, OverflowError) as error:  # h5py raises any of these for a damaged file
        raise ValueError(f"{printable(path)} cannot be read as an HDF5 file: {printable(one_line(error))}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{printable(path)}: {printable(one_line(error))}") from None


def _hdf5_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a D4RL-style HDF5 file by name; a group becomes a dict."""
    try:
        with hdf5.opened(path) as (file, budget):
            if "episode_0" in list(file):
                raise ValueError("it is a file inside of a Minari set: pass the set's id instead")
            # Of other arrays the names alone matter: for OGBench's layout, and for messages.
            known = {name for name in file if check.OTHER_NAMES.get(name, name) in _ARRAYS}
            return {name: hdf5.read(file, name, budget) if name in known else None for name in file}
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{printable(path)} cannot be read as a D4RL-style HDF5 file: {printable(one_line(error))}") from None
