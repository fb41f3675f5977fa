"""Minari datasets: finding them on this machine, downloading them, and reading them into Transitions."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from diffagents.data import hdf5
from diffagents.data import validation as check
from diffagents.data.arrays import Keys, from_episodes
from diffagents.data.cache import cached, stamp_of
from diffagents.data.transitions import Transitions
from diffagents.envs.make import spec_to_store
from diffagents.errors import encodable, one_line, printable, short
from diffagents.types import Spec

COLUMNS = ("observations", "actions", "rewards", "terminations", "truncations")
IS_AN_ENVIRONMENT = (
    "is an environment, not a dataset: pass data that were recorded in it (diffagents.collect lets a policy record some), or "
    "learn by acting in it with learn_online(total_timesteps, env=...)"
)
"""The arrays of an episode that are read."""
_MADE = ("algorithm_name", "description", "code_permalink", "author", "minari_version")  # how a Minari set came to be
_NEEDED = {"dataset_id": str, "minari_version": str, "total_steps": int, "total_episodes": int}
"""What a set's metadata must have, of which type."""
_SPACES = ("observation_space", "action_space")
"""These too: without one, Minari takes it from the environment, which it makes, with any code that the set names."""
_MOST_METADATA = 1 << 26  # bytes
_MOST_TEXT, _MOST_SPEC = 2000, 100_000  # characters of one text, and of an environment's spec, that `info` keeps
_MINARI_ID = re.compile(r"(?:[-\w][-\w/]*[-\w]/)?[-\w]+-v\d+")


def minari_root() -> Path:
    """The folder of all local Minari datasets: $MINARI_DATASETS_PATH, by default Minari's own."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


_RELATIVES = (
    (("hopper", "halfcheetah", "walker2d", "ant"), ("medium", "expert"), "mujoco/{task}/{level}-v0"),
    (("pen", "door", "hammer", "relocate"), ("human", "cloned", "expert"), "D4RL/{task}/{level}-v2"),
    (("kitchen",), ("complete", "partial", "mixed"), "D4RL/kitchen/{level}-v2"),
    (("maze2d",), ("open", "umaze", "medium", "large"), "D4RL/pointmaze/{level}-v2"),
    (
        ("antmaze",),
        ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"),
        "D4RL/antmaze/{level}-v1",
    ),
)
"""Tasks and levels of D4RL, and the name of Minari's set of the same task."""


def _minari_of_d4rl(name: str) -> str | None:
    """The Minari set of the same task as a D4RL set such as hopper-medium-v2; None if there is none, or for another name."""
    task, _, level = re.sub(r"-v\d+$", "", name).partition("-")
    found = (form for tasks, levels, form in _RELATIVES if task in tasks and level in levels)
    form = next(found, None)
    return None if form is None else form.format(task=task, level=level)


def advice_on_a_folder(path: Path) -> str | None:
    """What to pass instead of the folder of a Minari set; None if `path` is not one."""
    path = path.absolute()
    data = path if path.name == "data" else path / "data"
    try:
        identity = json.loads((data / "metadata.json").read_text())["dataset_id"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    root = (
        data.parents[identity.count("/") + 1]
        if isinstance(identity, str) and identity.count("/") + 1 < len(data.parents)
        else None
    )
    if root is None or not _MINARI_ID.fullmatch(identity) or root / identity / "data" != data:
        return None
    return (
        f"{printable(path)} is the folder of a Minari set: pass its id, {identity!r}, and name the folder of all sets, "
        f"{printable(root)}, in the environment variable MINARI_DATASETS_PATH"
    )


def find_minari(source: str, download: bool) -> Path:
    """Find a Minari dataset on this machine, or download it.

    Args:
        source: Its id, with the remote in front if there is one, such as `hf://user/namespace/name-v0`.
        download: Whether it may be downloaded.

    Returns:
        The dataset's `data` folder, which contains metadata.json.

    Raises:
        ValueError: If `source` is not a Minari id.
        FileNotFoundError: If there is no such dataset.
        ConnectionError: If the download fails.
    """
    remote, identity = None, source
    if "://" in source:  # minari.load_dataset would take this for the name of a folder
        scheme, _, rest = source.partition("://")
        owner, _, identity = rest.partition("/")
        remote = f"{scheme}://{owner}"
    if not _MINARI_ID.fullmatch(identity):
        if advice := advice_on_a_folder(Path(source)):
            raise ValueError(advice)
        raise ValueError(
            f"{source!r} is neither a Minari id, which looks like namespace/name-v0, nor a path that ends in .npz, .hdf5 or .h5"
        )
    root = minari_root()
    path = root / identity / "data"
    if (path / "metadata.json").is_file():
        return path
    if relative := _minari_of_d4rl(identity):
        raise FileNotFoundError(
            f"{identity!r} is a name of D4RL; Minari has data of the same task, collected anew, as {relative!r}: pass that, or "
            "the path of D4RL's .hdf5 file"
        )
    if identity in gym.registry:
        raise ValueError(f"{identity!r} {IS_AN_ENVIRONMENT}")
    if not download:
        raise FileNotFoundError(
            f"there is no Minari set {identity!r} in {root}; pass download=True, or set MINARI_DATASETS_PATH to another folder"
        )
    _download(identity, remote, path)
    if not (path / "metadata.json").is_file():
        raise FileNotFoundError(f"downloading {identity!r} left no metadata.json in {path}; delete that folder and try again")
    return path


def read_minari(path: Path, keys: Keys, cache: bool, dataset: Any = None) -> Transitions:
    """Read a Minari dataset, from the cache if it may be used.

    Args:
        path: Its `data` folder, which contains metadata.json.
        keys: Observation keys of a Dict; None: the default of `Spec.from_spaces`.
        cache: Whether to use the cache.
        dataset: A `MinariDataset` of it, perhaps filtered, whose episodes are read; None: all.

    Returns:
        The data.

    Raises:
        OSError: If the dataset is damaged.
        TypeError: As `from_episodes`.
        ValueError: As `from_episodes`, or if Minari cannot open the dataset.
    """
    metadata = read_metadata(path)
    stamp = {"minari": metadata["minari_version"], "steps": metadata["total_steps"], "files": stamp_of(path.rglob("*"))}
    n_episodes = metadata["total_episodes"]
    chosen = None
    if dataset is not None and not np.array_equal(dataset.episode_indices, np.arange(n_episodes)):
        chosen = hashlib.sha256(np.asarray(dataset.episode_indices, np.int64).tobytes()).hexdigest()
    key = {"path": str(path.resolve()), "obs_keys": keys, "episodes": chosen}

    def read() -> Transitions:
        return _read_all(path, metadata, keys, dataset)

    if not cache:
        return read()
    return cached(check.name_of(metadata["dataset_id"])[:100], key, stamp, read)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read the metadata of a Minari dataset, and check that all files are its own.

    Args:
        folder: Its `data` folder.

    Returns:
        What metadata.json contains.

    Raises:
        OSError: If the dataset is damaged.
        ValueError: If one of its files is not in the folder, or is a pipe or the like.
    """
    stored = _own_bytes(folder)
    file = folder / "metadata.json"
    try:
        if file.stat().st_size > _MOST_METADATA:
            raise ValueError(f"it has more than {_MOST_METADATA:,} bytes")
        metadata: dict[str, Any] = json.loads(file.read_text())
        for needed, kind in _NEEDED.items():
            if type(metadata[needed]) is not kind:
                raise ValueError(f"{needed} is no {kind.__name__}")
        if not 0 <= metadata["total_episodes"] <= stored / hdf5.SMALLEST_NODE:
            raise ValueError(f"it claims {metadata['total_episodes']:,} episodes in {stored:,} bytes")
    except (ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        cause = f"{type(error).__name__}: {printable(one_line(error))}"
        raise OSError(f"{printable(file)} is damaged ({cause}); delete the folder and load the set again") from None
    return metadata


def _own_bytes(folder: Path) -> int:
    """The bytes of all files in a dataset's folder, none of which is opened.

    Raises:
        ValueError: If one is a link to something elsewhere, or no regular file (a pipe would be waited for).
    """
    root, total = Path(os.path.realpath(folder)), 0
    for path in folder.rglob("*"):
        facts = path.stat()
        if path.is_symlink():
            real = Path(os.path.realpath(path))
            # A folder in the Hub's cache consists of links to the blobs of its repository.
            blobs = real.parent.name == "blobs" and real.parent.parent in root.parents
            if not blobs and root not in real.parents:
                raise ValueError(
                    f"{printable(path)} is a link to a file that is not in the dataset's folder, which is never read: link the "
                    "whole folder, or copy the file into it"
                )
        if not stat.S_ISREG(facts.st_mode) and not stat.S_ISDIR(facts.st_mode):
            raise ValueError(f"{printable(path)} is no regular file: remove it")
        total += facts.st_size if stat.S_ISREG(facts.st_mode) else 0
    return total


def read_episodes(folder: Path, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Read episodes of a Minari dataset in HDF5 by h5py's low-level calls.

    Minari's own iterator spends most of its time on the objects that h5py's high-level calls make, some two milliseconds an
    episode; this reads the same arrays in less than half of that (zoo/benchmarks/data_loading.py prints both). Infos are not
    read.

    Args:
        folder: The dataset's `data` folder.
        indices: Numbers of the episodes.

    Yields:
        For each episode its observations, actions, rewards, terminations and truncations, as arrays or dicts of arrays.

    Raises:
        OSError: If the file is damaged.
        KeyError: If an episode is incomplete.
        ValueError: If an array is not in the file itself, or claims more than the file can hold.
    """
    import h5py

    with hdf5.opened(folder / "main_data.hdf5") as (file, budget):
        for index in indices:
            name = f"episode_{index}".encode()
            budget.visit(0)
            hdf5.check_link(file.id, name)
            group = h5py.h5g.open(file.id, name)
            yield {name: hdf5.read_node(group, name.encode(), budget) for name in COLUMNS}


def _download(identity: str, remote: str | None, path: Path) -> None:
    """Download a dataset to `path`, with the metadata of its namespaces."""
    import minari
    from minari.storage.remotes import DEFAULT_REMOTE, get_cloud_storage

    place = remote or os.environ.get("MINARI_REMOTE", DEFAULT_REMOTE)
    root = path.parents[identity.count("/") + 1]
    remedy = "or set MINARI_DATASETS_PATH to a folder that contains it"
    try:
        storage = get_cloud_storage(remote_path=place)
        size = storage.get_dataset_metadata(identity).get("dataset_size", "?")
        print(f"downloading {identity} ({short(size)} MB) from {place}", flush=True)
        for end in [slash.start() for slash in re.finditer("/", identity)]:  # Minari would get these from its default remote
            (root / identity[:end]).mkdir(parents=True, exist_ok=True)
            if not (root / identity[:end] / "namespace_metadata.json").exists():
                storage.download_namespace_metadata(identity[:end], root)
        # A folder without metadata.json is what an interrupted download left behind.
        minari.download_dataset(f"{place}/{identity}", force_download=path.parent.exists())
    except ImportError:
        raise
    except Exception as error:  # errors of the hub's client, of the HTTP library or of Minari
        kinds = {cls.__name__ for cls in type(error).__mro__}
        if kinds & {"RepositoryNotFoundError", "RemoteEntryNotFoundError"} or type(error) is ValueError:
            raise FileNotFoundError(f"{place} has no Minari set {identity!r}; check the id, {remedy}") from None
        deepest: BaseException = error  # wrapped once or more; the innermost tells what really happened
        while (inner := deepest.__cause__ or deepest.__context__) is not None:
            deepest = inner
        cause = f"{type(deepest).__name__}: {printable(one_line(deepest))}"
        raise ConnectionError(
            f"cannot download {identity!r} from {place} ({cause}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE, {remedy}"
        ) from None


def _read_all(path: Path, metadata: Mapping[str, Any], keys: Keys, dataset: Any) -> Transitions:
    """Read the episodes of `dataset`, by default all, without the cache."""
    import minari

    name = check.name_of(metadata["dataset_id"])
    absent = [space for space in _SPACES if not isinstance(metadata.get(space), str)]
    if absent and dataset is None:
        raise ValueError(
            f"Minari set {name!r} in {path} is refused: its metadata.json has no {' and no '.join(absent)}, which Minari would "
            "take from the environment of its env_spec, running any code that this names; if you trust it, pass "
            "minari.load_dataset(...) instead of the id"
        )
    try:
        if dataset is None:
            for space in _SPACES:
                _check_space(json.loads(metadata[space]))
            dataset = minari.MinariDataset(path)
        spaces = dataset.observation_space, dataset.action_space
        n_steps, indices = int(dataset.total_steps), dataset.episode_indices
    except ImportError:
        raise
    except Exception as error:  # of many types, if the metadata are damaged
        cause = printable(one_line(error))[:_MOST_TEXT]
        raise ValueError(f"Minari set {name!r} cannot be opened: {cause}; delete {path} and load it again") from None
    spec = Spec.from_spaces(*spaces, keys)
    raw = metadata.get("eval_env_spec") or metadata.get("env_spec")
    info = {
        "id": name,
        "kind": "minari",
        "made": {key: made for key in _MADE if (made := _text(metadata.get(key)))},
        "env_spec": _stored_spec(raw),
        "ref_min_score": _score(metadata.get("ref_min_score")),
        "ref_max_score": _score(metadata.get("ref_max_score")),
    }
    stored = _own_bytes(path)
    if not 0 <= n_steps * (spec.obs_dim + spec.act_dim + 1) <= hdf5.most_bytes(stored):  # a number has at least one byte
        raise OSError(
            f"Minari set {name!r} in {path} is damaged: it claims {n_steps:,} steps of {spec.obs_dim + spec.act_dim + 1:,} "
            f"numbers in {stored:,} bytes"
        )
    if metadata.get("data_format", "hdf5") == "hdf5":
        episodes = read_episodes(path, indices)
    else:
        episodes = ({name: getattr(episode, name) for name in COLUMNS} for episode in dataset.iterate_episodes())
    try:
        return from_episodes(episodes, n_steps, keys, spec, info)
    except hdf5.ForeignContent as error:
        raise ValueError(f"Minari set {name!r} in {path} is refused: {printable(error)}") from None
    except (OSError, KeyError, RuntimeError, OverflowError) as error:
        cause = printable(one_line(error))
        raise OSError(f"Minari set {name!r} in {path} is damaged ({cause}); delete the folder and load it again") from None


def _check_space(space: Any) -> None:
    """Raises ValueError or TypeError for a space in Minari's JSON whose numbers are none, or whose names cannot be stored.

    Minari makes arrays of the dtype that the metadata name, whose elements could have any size.
    """
    if "dtype" in space and (not isinstance(space["dtype"], str) or np.dtype(space["dtype"]).kind not in "biuf"):
        raise ValueError(f"a space has the dtype {short(space['dtype'])}, which is not one of numbers")
    parts = space.get("subspaces", ())
    for key in parts:
        if isinstance(parts, dict):
            key.encode()  # half of a pair of surrogates is no text
        _check_space(parts[key] if isinstance(parts, dict) else key)


def _text(value: Any) -> str | None:
    """What `info` keeps of a text or a list of texts in the metadata; None for anything else."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = str(value)
    if not isinstance(value, str | int | float) or not value or (isinstance(value, int) and abs(value) >= 1 << 64):
        return None
    return encodable(str(value)[:_MOST_TEXT])


def _score(value: Any) -> float | None:
    """A finite number in the metadata; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def _stored_spec(raw: Any) -> str | None:
    """What is kept of the environment's spec in the metadata of a set; None if there is none, or it makes no sense."""
    if not isinstance(raw, str) or len(raw) > _MOST_SPEC:
        return None
    try:
        stored = spec_to_store(json.loads(raw))[0]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    return stored if stored is not None and len(stored) <= _MOST_SPEC else None
