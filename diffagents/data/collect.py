"""`collect` and `write_dataset`: making Minari datasets, from a policy that acts or from recorded episodes.

A dataset appears complete or not at all: everything is checked before the first step, kept in memory while the policy acts,
written to a hidden folder next to the other datasets, and moved to its place when it is complete.

Shapes: T steps of an episode; observations have T + 1 rows, everything else T.
"""

import contextlib
import errno
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from diffagents.config.checks import whole_number
from diffagents.data.minari import minari_root
from diffagents.envs.make import (
    env_id_of,
    make_env,
    scalar_reward,
    spec_to_store,
    warn_of_normalized_observations,
    without_monitor,
)
from diffagents.errors import one_line, short
from diffagents.evaluation.episodes import check_actions, check_spaces, is_meant_deterministic, stack, succeeded
from diffagents.evaluation.evaluate import Evaluation
from diffagents.files import scratch_folder, write_errors
from diffagents.types import Spec, in_dtype

if TYPE_CHECKING:
    from minari import MinariDataset

_BYTES_OF_A_STEP, _BYTES_OF_AN_EPISODE = 10, 14_000
"""Of a reward and two flags; and of what HDF5 writes beside an episode's arrays (as measured with Minari 0.5)."""
_COLUMNS = ("actions", "rewards", "terminations", "truncations")
# Stricter than Minari, which makes a folder for a malformed id before it rejects it, so that listing the datasets always fails.
_ID = re.compile(r"(?:(?P<namespace>[-\w]+(?:/[-\w]+)*)/)?[-\w]+-v(?:0|[1-9]\d*)", re.ASCII)
Act = Callable[[Any, bool], np.ndarray]
"""(observation, whether it is the first of an episode) -> one action."""


def collect(
    policy: Any,
    env: Any,
    n_steps: int,
    dataset_id: str,
    *,
    seed: int = 0,
    noise: str | None = None,
    deterministic: bool | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    root: str | os.PathLike[str] | None = None,
    algorithm_name: str | None = None,
    author: str | None = None,
    description: str | None = None,
    code_permalink: str | None = None,
    verbose: int = 0,
) -> "MinariDataset":
    """Let a policy act in an environment, and write its episodes as a Minari dataset.

    Stored are observations as the environment returns them, actions as they were executed (clipped to the bounds), rewards,
    terminations and truncations; floats become float32, actions have the dtype of their space. All episodes are whole except
    the last, which is cut at `n_steps` with a truncation. The metadata contain the environment's spec, D4RL's reference returns
    if there are any (`ref_min_score`, `ref_max_score`), who acted (class, commit on the Hub, dataset that it was trained on),
    noise, seed and success rate: in words in `description`, as JSON in `collection`.

    If anything fails, or on Ctrl-C, no dataset is left behind, not even the finished episodes.

    Args:
        policy: An agent, an SB3 model or anything with `predict`, which is called with batches of one; or a callable
            obs -> action, which is called with the environment's own observations. If it has a method `reset`, that is called
            before every episode.
        env: An id, a stored spec, or a Gymnasium Env, which stays open. It must have a spec, which is stored, so that agents
            are evaluated where their data come from.
        n_steps: Number of environment steps, at least 1.
        dataset_id: `(namespace/)name-vN` of a dataset that does not exist yet.
        seed: Of the first `env.reset`, of the noise and, during this call, of torch's generator and that of an agent, so that
            the same seed gives the same data. Other generators that a policy may have are not seeded.
        noise: None; "gaussian:S" adds noise of standard deviation S, in the units of the action, to each of its numbers;
            "uniform:P" replaces an action by a uniform one with probability P.
        deterministic: Passed to `predict`; False lets the policy sample its actions. None: an agent acts as it is meant to, by
            its hyperparameter `deterministic`; any other policy samples, which is the default of SB3's `predict`.
        env_kwargs: Keyword arguments of the environment; for an id or a stored spec only.
        root: Folder of all datasets. Default: $MINARI_DATASETS_PATH, else Minari's own.
        algorithm_name: For the metadata. Default: the class of the policy.
        author: For the metadata.
        description: For the metadata; who acted is appended.
        code_permalink: For the metadata.
        verbose: 1 prints one line at the end.

    Returns:
        The dataset.

    Raises:
        ValueError: Before the first step, if an argument is bad or the environment cannot be stored; later, if an action has a
            wrong shape or NaN, or an observation or reward has NaN.
        TypeError: If `policy` or `env` is of a wrong kind.
        FileExistsError: If the dataset exists.
        ImportError: As `make_env`.
        OSError: If the disk has too little space, which is looked at before the first step and before writing, or cannot be
            written to.
    """
    n_steps = whole_number("n_steps", n_steps, 1, " of environment steps")
    seed = whole_number("seed", seed, 0)
    _check_policy(policy)
    if deterministic is None:
        deterministic = is_meant_deterministic(policy, other=False)
    perturb = _noise(noise)
    place = _new_place(dataset_id, root)
    with _opened(env, env_kwargs) as (world, env_spec):
        check_spaces(policy, world.observation_space, world.action_space)
        warn_of_normalized_observations(getattr(policy, "dataset_info", None), world)
        row = _bytes_of(stored_space(world.observation_space)) + _bytes_of(world.action_space) + _BYTES_OF_A_STEP
        _check_free_space(place, n_steps * row)
        started = time.perf_counter()
        with _seeded(policy, seed):
            act = _actor(policy, deterministic, world.action_space)
            episodes, successes = _play(world, act, getattr(policy, "reset", None), perturb, n_steps, seed)
        took = time.perf_counter() - started
        facts = _facts(policy, deterministic, noise, seed, successes)
        words = f"{facts['policy']}, noise {noise or 'none'}, seed {seed}"
        made = {
            "algorithm_name": algorithm_name or type_name(policy),
            "author": author,
            "description": f"{description.rstrip('. ')}. {words}" if description else words,
            "code_permalink": code_permalink,
            "collection": facts,
        }
        dataset = _write(episodes, place, dataset_id, world, env_spec, made)
    if verbose:
        steps, n = f"{n_steps:,} steps", len(episodes)
        print(f"{dataset_id}: {steps}, {n} episode{'s' * (n != 1)}, {took:.1f} s; {summary(episodes, env_spec.id, successes)}")
    return dataset


def write_dataset(
    episodes: Sequence[Mapping[str, Any]],
    env: Any,
    dataset_id: str,
    *,
    root: str | os.PathLike[str] | None = None,
    algorithm_name: str,
    description: str,
    author: str | None = None,
    code_permalink: str | None = None,
) -> "MinariDataset":
    """Write recorded episodes as a Minari dataset.

    Args:
        episodes: Mappings of `observations`, (T + 1, ...) or a dict of such arrays, `actions`, (T, ...), `rewards`,
            `terminations` and `truncations`, (T,), in the environment's units. An episode without a flag at its end gets a
            truncation there.
        env: The environment in which they were recorded; what `make_env` takes.
        dataset_id: As in `collect`.
        root: As in `collect`.
        algorithm_name: For the metadata.
        description: For the metadata.
        author: For the metadata.
        code_permalink: For the metadata.

    Returns:
        The dataset.

    Raises:
        ValueError: If an episode does not fit the environment; and as `collect`.
        TypeError: As `collect`.
        FileExistsError: If the dataset exists.
        ImportError: As `make_env`.
    """
    place = _new_place(dataset_id, root)
    with _opened(env, None) as (world, env_spec):
        whole = [_checked(episode, i, world) for i, episode in enumerate(episodes)]
        if not whole:
            raise ValueError(f"there are no episodes to write as {dataset_id}; pass at least one")
        made = {
            "algorithm_name": algorithm_name,
            "author": author,
            "description": description,
            "code_permalink": code_permalink,
        }
        return _write(whole, place, dataset_id, world, env_spec, made)


def summary(episodes: Sequence[Mapping[str, Any]], env_id: str, successes: Sequence[bool | None] = ()) -> Evaluation:
    """The returns, lengths and successes of a dataset's episodes, without the last one if it was cut early.

    Args:
        episodes: As in `write_dataset`.
        env_id: Id of the environment, for scores.
        successes: Whether each episode succeeded; None if not known.

    Returns:
        The same kind of result as that of `evaluate`.
    """
    lengths = [len(episode["rewards"]) for episode in episodes]
    cut = lengths and lengths[-1] < max(lengths) and not episodes[-1]["terminations"][-1]
    whole = slice(None, -1 if cut else None)
    reported = [bool(success) for success in successes[whole] if success is not None]
    return Evaluation(
        returns=tuple(float(np.sum(episode["rewards"], dtype=np.float64)) for episode in episodes[whole]),
        lengths=tuple(lengths[whole]),
        successes=tuple(reported) or None,
        env_id=env_id,
    )


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_policy(policy: Any) -> None:
    """Raise TypeError for what cannot act."""
    if isinstance(policy, str | os.PathLike):
        raise TypeError(f"the policy is the name {str(policy)!r}; load it first with diffagents.load(...)")
    if isinstance(policy, type):
        raise TypeError(f"the policy is the class {policy.__name__}; pass a trained instance of it")
    if not callable(getattr(policy, "predict", None)) and not callable(policy):
        raise TypeError(f"the policy, a {type(policy).__name__}, has no predict(obs, ...), and it is not callable either")


def _new_place(dataset_id: str, root: str | os.PathLike[str] | None) -> Path:
    """The folder of the new dataset. Raises ValueError, FileExistsError, or OSError if nothing can be written there."""
    parts = _ID.fullmatch(dataset_id) if isinstance(dataset_id, str) else None
    if parts is None or len(parts["namespace"] or "ab") < 2:  # Minari cannot read a namespace of one letter
        raise ValueError(
            f"{dataset_id!r} is not a Minari id: it must look like namespace/name-v0, of letters, digits, - and _, "
            "with a namespace of at least two letters"
        )
    folder = Path(root if root is not None else minari_root()).expanduser().resolve()
    place = folder / dataset_id
    if os.path.lexists(place):
        what = "a dataset" if (place / "data" / "metadata.json").is_file() else "something else"
        raise FileExistsError(f"{place} exists and is {what}; choose another version, such as -v1, or delete that folder")
    outer = next((up for up in place.parents if up.is_relative_to(folder) and (up / "data").exists()), None)
    if outer is not None:
        raise ValueError(f"{dataset_id!r} would lie inside the dataset {outer}, where Minari never finds it; choose another id")
    with scratch_folder(folder / "collect"):  # raises now what writing would raise hours later
        return place


@contextlib.contextmanager
def _opened(env: Any, env_kwargs: Mapping[str, Any] | None) -> Iterator[tuple[gym.Env[Any, Any], EnvSpec]]:
    """The environment and the spec to store with the data; an environment that is made here is closed at the end."""
    made = make_env(env, **(env_kwargs or {}))
    with contextlib.closing(made) if isinstance(env, str | EnvSpec) else contextlib.nullcontext():
        if not isinstance(made, gym.Env):
            raise TypeError(f"the environment is a {type(made).__name__}; pass a single Env, or its id")
        if made.spec is None:
            raise ValueError(f"{made} has no spec to make it again from; register it (gymnasium.register) and pass its id")
        Spec.from_spaces(made.observation_space, made.action_space)  # raises for spaces that no agent could learn on
        stored_space(made.observation_space)
        yield made, _spec_to_store(made.spec)


def _spec_to_store(spec: EnvSpec) -> EnvSpec:
    """The spec without Monitor and render mode. Raises ValueError if no environment could be made from it again.

    A wrapper whose arguments may not be published is stored by its name only: evaluation makes the environment without its
    wrappers anyway.
    """
    kwargs = {key: value for key, value in spec.kwargs.items() if key != "render_mode"}
    spec = replace(without_monitor(spec), kwargs=kwargs)
    wrappers = (
        replace(wrapper, kwargs=None) if spec_to_store({"kwargs": wrapper.kwargs})[1] else wrapper
        for wrapper in spec.additional_wrappers
    )
    spec = replace(spec, additional_wrappers=tuple(wrappers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the wrappers; a warning that fits this situation follows
        try:
            env_id_of(spec.to_json())  # rejects what evaluation would reject
        except (TypeError, ValueError) as error:
            remedy = "make it with arguments that are numbers, short names or lists of them"
            raise ValueError(f"the spec of {spec.id} cannot be stored with the data ({one_line(error)}); {remedy}") from None
    if refused := spec_to_store(spec)[1]:
        warnings.warn(
            f"the metadata of the dataset contain the arguments {', '.join(map(short, refused))} of {spec.id}, which may hold "
            "a path or a secret: do not publish it, or collect it in an environment without them",
            stacklevel=5,
        )
    if names := [wrapper.name for wrapper in spec.additional_wrappers]:
        warnings.warn(
            f"evaluation will make {spec.id} without its wrappers {names}; register an id that includes them", stacklevel=5
        )
    return spec


def stored_space(space: spaces.Space[Any], name: str = "observation space") -> spaces.Space[Any]:
    """The observation space of a dataset: with float32 in place of every other float.

    Args:
        space: A Box, or a Dict of them.
        name: What to call it in messages.

    Returns:
        The space.

    Raises:
        ValueError: For another kind of space.
    """
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: stored_space(item, f"observation {key!r}") for key, item in space.spaces.items()})
    if not isinstance(space, spaces.Box):
        raise ValueError(f"{name} {space} is not a Box; wrap the environment (FilterObservation, FlattenObservation)")
    if space.dtype.kind != "f":
        return space
    with np.errstate(over="ignore"):  # the largest float64, which means no bound, overflows
        return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), space.shape, np.float32)


# ---- acting ----------------------------------------------------------------------------------------------------------


def _noise(noise: str | None) -> Callable[[np.ndarray, spaces.Box, np.random.Generator], np.ndarray]:
    """What is done to an action before it is clipped. Raises ValueError for noise of another kind or size."""
    if noise is None:
        return lambda action, space, rng: action
    kind, _, text = str(noise).partition(":")
    try:
        size = float(text)
    except ValueError:
        size = np.nan
    if kind == "gaussian" and 0 < size < np.inf:
        return lambda action, space, rng: action + size * rng.standard_normal(action.shape)
    if kind == "uniform" and 0 < size <= 1:
        return lambda action, space, rng: rng.uniform(space.low, space.high) if rng.random() < size else action
    raise ValueError(f'noise={noise!r} must be None, "gaussian:S" with S > 0 or "uniform:P" with 0 < P <= 1')


def _actor(policy: Any, deterministic: bool, space: spaces.Space[Any]) -> Act:
    """The policy as a function of one observation."""
    if not callable(predict := getattr(policy, "predict", None)):
        return lambda obs, first: check_actions(np.asarray(policy(obs))[None], 1, space)[0]
    state = None

    def act(obs: Any, first: bool) -> np.ndarray:
        nonlocal state
        state = None if first else state
        start = np.array([first])
        actions, state = predict(stack([obs]), state=state, episode_start=start, deterministic=deterministic)
        return check_actions(actions, 1, space)[0]

    return act


@contextlib.contextmanager
def _seeded(policy: Any, seed: int) -> Iterator[None]:
    """Seed torch's and the policy's generators, and restore them afterwards, so that collecting does not affect training."""
    own = getattr(policy, "predict_generator", None)
    own = own if isinstance(own, torch.Generator) else torch.Generator()
    kept, on_gpu = own.get_state(), torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else []):
        (torch.manual_seed if on_gpu else torch.default_generator.manual_seed)(
            seed
        )  # the first would affect CUDA's generator when CUDA is initialised later
        own.manual_seed(seed)
        try:
            yield
        finally:
            own.set_state(kept)


def _play(
    env: gym.Env[Any, Any], act: Act, begin: Any, perturb: Any, n_steps: int, seed: int
) -> tuple[list[dict[str, Any]], list[bool | None]]:
    """`n_steps` steps as episodes, the last one cut, and whether each succeeded (None: the environment never reports it)."""
    rng, space, stored = np.random.default_rng(seed), env.action_space, stored_space(env.observation_space)
    episodes: list[dict[str, Any]] = []
    successes: list[bool | None] = []
    while n_steps > 0:
        if callable(begin):
            begin()
        obs, _ = env.reset() if episodes else env.reset(seed=seed)
        rows: dict[str, list[Any]] = {"observations": [_copied(obs, stored)]} | {name: [] for name in _COLUMNS}
        success: bool | None = None
        over = False
        while not over:
            action = perturb(act(obs, not rows["actions"]), space, rng)
            action = in_dtype(np.clip(action, space.low, space.high), space.dtype)  # type: ignore[attr-defined]
            # A copy, because an environment may change its argument.
            obs, reward, terminated, truncated, info = env.step(action.copy())
            n_steps -= 1
            over = bool(terminated or truncated or n_steps == 0)
            rows["observations"].append(_copied(obs, stored))
            for name, value in zip(_COLUMNS, (action, scalar_reward(reward), terminated, truncated), strict=True):
                rows[name].append(value)
            success = succeeded(info, success)
        observations = rows.pop("observations")
        episode = {"observations": stack(observations)} | {name: np.asarray(column) for name, column in rows.items()}
        episodes.append(_checked(episode, len(episodes), env))  # truncated if the budget ends it
        successes.append(success)
    return episodes, successes


def _copied(obs: Any, space: spaces.Space[Any]) -> Any:
    """A copy of an observation in the stored dtypes; environments may reuse their arrays."""
    if isinstance(space, spaces.Dict):
        return {key: _copied(obs[key], item) for key, item in space.spaces.items()}
    return np.array(obs, space.dtype)


# ---- writing ---------------------------------------------------------------------------------------------------------


def _checked(episode: Mapping[str, Any], i: int, env: gym.Env[Any, Any]) -> dict[str, Any]:
    """An episode in the stored dtypes, with a flag at its end. Raises ValueError for a wrong shape or NaN."""
    n, where = len(episode["rewards"]), f"of episode {i}"
    checked: dict[str, Any] = {
        "observations": _rows(episode["observations"], n + 1, stored_space(env.observation_space), f"observations {where}"),
        "actions": _rows(episode["actions"], n, env.action_space, f"actions {where}"),
        "rewards": _rows(episode["rewards"], n, spaces.Box(-np.inf, np.inf, (), np.float32), f"rewards {where}"),
    }
    for name in ("terminations", "truncations"):
        checked[name] = _rows(episode[name], n, spaces.Box(0, 1, (), np.uint8), f"{name} {where}").astype(bool)
    ends = np.flatnonzero(checked["terminations"] | checked["truncations"])
    if n == 0 or (len(ends) and ends[0] != n - 1):
        raise ValueError(f"episode {i} has {n} steps, but ends at step {ends[0] if len(ends) else 0}; split it or leave it out")
    checked["truncations"][-1] |= not checked["terminations"][-1]
    return checked


def _rows(value: Any, n: int, space: spaces.Space[Any], name: str) -> Any:
    """`n` rows of a space in its dtype. Raises ValueError for another shape, NaN or infinity."""
    if isinstance(space, spaces.Dict):
        return {key: _rows(value[key], n, item, f"{name}[{key!r}]") for key, item in space.spaces.items()}
    array = np.asarray(value, space.dtype)
    if array.shape != (n, *(space.shape or ())):
        raise ValueError(f"the {name} have the shape {array.shape}, expected {(n, *(space.shape or ()))} by the spaces of env")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        step = int(np.argmin(np.isfinite(array.reshape(n, -1)).all(axis=1)))
        raise ValueError(
            f"the {name} contain NaN or infinity at step {step}, which no agent can learn from; repair the environment"
        )
    return array


def _write(
    episodes: Sequence[Mapping[str, Any]], place: Path, dataset_id: str, env: gym.Env[Any, Any], env_spec: EnvSpec, made: Any
) -> "MinariDataset":
    """Write the dataset to a hidden folder, which Minari ignores, and move it to `place` at the end."""
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    metadata = {key: value for key, value in made.items() if value is not None}
    if "author" in metadata:
        metadata["author"] = {metadata["author"]}
    reference = summary([], env_spec.id).score_reference
    if reference is not None:
        _, metadata["ref_min_score"], metadata["ref_max_score"] = reference
    namespaces = [place.parents[i] for i in range(dataset_id.count("/"))]
    root = place.parents[len(namespaces)]
    arrays = sum(array.nbytes for episode in episodes for array in _arrays_of(episode))
    _check_free_space(place, arrays + _BYTES_OF_AN_EPISODE * len(episodes))
    with write_errors("the dataset", place), scratch_folder(root / "collect") as hidden:  # a name that Minari ignores
        data = hidden / "set" / "data"
        data.mkdir(parents=True)
        storage = MinariStorage.new(data, stored_space(env.observation_space), env.action_space, env_spec, jpeg_encoding=False)
        storage.update_metadata({"dataset_id": dataset_id, "minari_version": minari.__version__, **metadata})
        storage.update_episodes(EpisodeBuffer(id=i, infos={}, **episode) for i, episode in enumerate(episodes))
        for namespace in namespaces:
            namespace.mkdir(parents=True, exist_ok=True)
            if not (namespace / "namespace_metadata.json").exists():
                (namespace / "namespace_metadata.json").write_text("{}")
        os.rename(data.parent, place)  # fails if another process has made the same dataset meanwhile
    return minari.MinariDataset(place / "data")


def _arrays_of(value: Any) -> Iterator[np.ndarray]:
    """All arrays in nested mappings."""
    for item in value.values():
        if isinstance(item, Mapping):
            yield from _arrays_of(item)
        elif isinstance(item, np.ndarray):
            yield item


def _bytes_of(space: spaces.Space[Any]) -> int:
    """How much an observation or an action of the space takes."""
    if isinstance(space, spaces.Dict):
        return sum(map(_bytes_of, space.values()))
    return math.prod(space.shape or ()) * np.dtype(space.dtype).itemsize


def _check_free_space(place: Path, n_bytes: int) -> None:
    """Refuse to write where it cannot end well: a disk that gets full can make HDF5 crash the process.

    Raises:
        OSError: There is less free space than `n_bytes`.
    """
    free = shutil.disk_usage(next(folder for folder in place.parents if folder.exists())).free
    if free < n_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the dataset needs about {n_bytes / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free: free some there, or "
            "choose another root",
            str(place),
        )


def type_name(policy: Any) -> str:
    """The name of a policy's class, or of a function."""
    return str(getattr(policy, "__name__", type(policy).__name__))


def _facts(policy: Any, deterministic: bool, noise: str | None, seed: int, successes: Sequence[bool | None]) -> dict[str, Any]:
    """How the data came to be, as JSON: who acted (class, origin and dataset as far as known), noise, seed, success rate."""
    origin, data = getattr(policy, "origin", None), getattr(policy, "dataset_info", None)
    trained_on = data.get("id") if isinstance(data, Mapping) else None
    predicts = callable(getattr(policy, "predict", None))  # a function has no argument `deterministic`
    how = ", deterministic actions" if deterministic else ", actions drawn by itself"
    parts = [f" from {origin}" if origin else "", f" trained on {trained_on}" if trained_on else "", how if predicts else ""]
    reported = [success for success in successes if success is not None]
    facts = {"policy": type_name(policy) + "".join(parts), "noise": noise, "seed": seed}
    return facts | {"success_rate": float(np.mean(reported)) if reported else None}
