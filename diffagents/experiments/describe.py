"""`describe`: what is in a dataset, what is wrong with it, and how to begin with it.

Everything is measured on the Transitions that `load_dataset` returns, most of it on all rows, quantiles and pictures on an even
sample of `SAMPLE` rows. describe_report.py writes the result as text and as a page of HTML.

Shapes: N transitions, E episodes, S flat observation, A flat action.
"""

import hashlib
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from diffagents.data import hdf5
from diffagents.data import validation as check
from diffagents.data.load import check_npz, load_dataset
from diffagents.data.minari import COLUMNS, find_minari, read_episodes, read_metadata
from diffagents.data.transitions import Transitions
from diffagents.errors import one_line, printable
from diffagents.evaluation.d4rl import d4rl_score
from diffagents.experiments.describe_report import DatasetReport, evenly, number, percent
from diffagents.networks.mlp import MLP
from diffagents.registry import agent_class
from diffagents.storage.card import data_env
from diffagents.training import offline, prepare

SAMPLE = 100_000
"""Rows from which quantiles and pictures are made."""
SATURATED = 0.01
"""Distance from a bound, as a share of the width between the bounds, within which an action counts as being at it."""
OUTLIER = 3.0
"""How far outside its 1 % and 99 % quantiles a value counts as an outlier, in units of the distance between them."""
SMOOTH = 0.5
"""A dimension is smooth if 99 % of its changes from row to row are smaller than this many of its standard deviations."""
JUMP = 3.0
"""A row is a jump if half of the smooth dimensions change by this many times their 99 % quantile of changes."""
GLITCH = 20.0
"""So is a change of one dimension by this many times its 99.9 % quantile of changes, and by 3 standard deviations."""
TWINS = 0.02
"""Root mean square difference, in standard deviations, below which two episodes count as nearly the same."""
MOST_COMPARED = 20_000
"""Episodes that are compared with each other; of more, an even sample."""
FEW = 30_000
"""Steps below which the advice is to expect little more than imitation."""
CLONE_STEPS, CLONE_BATCH = 1000, 256
FIRST_RUNS, CLONING_RUNS = ("BC", "SRPO"), ("BC", "DiffusionBC")
"""Algorithms whose first run is timed; the second, where the rewards make no action better than another."""

Floats = NDArray[np.float64]


def describe(
    dataset: Any,
    *,
    env: Any = None,
    obs_keys: Sequence[str] | None = None,
    download: bool = True,
    cache: bool = True,
    quick: bool = False,
) -> DatasetReport:
    """Measure what is in a dataset: episodes, returns, rewards, observations, actions, duplicates, jumps; and advise.

    Data that `load_dataset` refuses are described too, array by array, with the places of NaN and infinity.

    Args:
        dataset: Anything that `load_dataset` reads.
        env: As in `load_dataset`; provides the true bounds of actions for bare arrays.
        obs_keys: As in `load_dataset`.
        download: Whether a Minari id may be downloaded.
        cache: Whether to keep Minari and HDF5 sets as flat files.
        quick: Whether to leave out the clone, which measures how noisy the actions are, and the timing of a first run.

    Returns:
        The report: `print(report)`, `report.to_html()`, `report.facts`.

    Raises:
        FileNotFoundError: There is no such file or Minari set.
        ConnectionError: A download fails.
        TypeError: `dataset` is of a wrong kind.
        ValueError: The data are refused, and there are no arrays that could be described instead.
    """
    options: dict[str, Any] = {"env": env, "obs_keys": obs_keys, "download": download, "cache": cache}
    findings: list[str] = []
    with warnings.catch_warnings(record=True) as caught, np.errstate(all="ignore"):
        warnings.simplefilter("always")
        try:
            data = load_dataset(dataset, **options)
        except (ValueError, TypeError) as error:
            clipped = _loaded(dataset, options | {"clip_actions": True})
            if clipped is None:
                arrays = _bare_arrays(dataset, download)
                chosen = env is not None or obs_keys is not None
                if not arrays or (chosen and _loaded(dataset, {"download": download, "cache": cache}) is not None):
                    raise error from None  # env= or obs_keys= is what is wrong
                rows = sorted((_array(*item) for item in arrays.items()), key=lambda row: not row["bad_columns"])
                return DatasetReport({"arrays": rows}, [], [], one_line(error), {})
            data = clipped
            findings.append(f"{one_line(error)} (what follows describes the clipped actions)")
        said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
        prefix = f"{data.info.get('id')}: "
        findings += [text.removeprefix(prefix) for text in (*said, *data.info.get("warnings", ()))]
        return _measure(data, findings, quick)


def _loaded(dataset: Any, options: dict[str, Any]) -> Transitions | None:
    """What `load_dataset` returns; None if it refuses the data."""
    try:
        return load_dataset(dataset, **options)
    except (ValueError, TypeError):
        return None


def _measure(data: Transitions, findings: list[str], quick: bool) -> DatasetReport:
    """The report on valid data; appends to `findings`."""
    rows = evenly(len(data), SAMPLE)
    observations = _observations(data, rows)
    facts: dict[str, Any] = {
        "data": {
            **{key: data.info.get(key) for key in ("id", "kind", "n_steps", "n_episodes", "sha256")},
            "env_id": data_env({"dataset": data.info}),
            "n_transitions": len(data),
            "obs_dim": data.spec.obs_dim,
            "act_dim": data.spec.act_dim,
            "obs_keys": None if data.spec.obs_keys is None else [printable(key) for key in data.spec.obs_keys],
            "bounds_from_data": bool(data.info.get("bounds_from_data")),
        },
        "episodes": _episodes(data),
        "returns": _returns(data),
        "rewards": _rewards(data, rows),
        "observations": observations,
        "actions": _actions(data, rows),
        "duplicates": _duplicates(data),
        "jumps": _jumps(data, rows, np.array([row["n_turns"] > 0 for row in observations])),
    }
    coverage, places = _coverage(data, rows)
    facts["coverage"] = coverage
    if not quick:
        facts["clone"] = _clone(data)
        runs = CLONING_RUNS if _only_cloning(facts) else FIRST_RUNS
        facts["first_run"] = {name: _duration(name, data) for name in runs}
    findings += _findings(facts)
    pictures = {
        "lengths": data.episode_lengths.numpy(),
        "terminated": _terminated(data),
        "returns": data.episode_returns.numpy(),
        "rewards": data.rew.numpy()[rows],
        "actions": data.action.numpy()[rows],
        "places": places,
    }
    return DatasetReport(facts, list(dict.fromkeys(findings)), _advice(facts), None, pictures)


# ---- episodes, returns, rewards ----------------------------------------------------------------------------------------


def _terminated(data: Transitions) -> NDArray[np.bool_]:
    """Whether each episode terminated, (E,)."""
    ends = data.episode_ends.numpy()
    has_rows = np.diff(ends, prepend=0) > 0
    return has_rows & (data.done.numpy()[np.maximum(ends, 1) - 1] == 1)


def _episodes(data: Transitions) -> dict[str, Any]:
    lengths, terminated, whole = data.episode_lengths.numpy(), _terminated(data), data.episode_whole.numpy()
    values, counts = np.unique(lengths, return_counts=True)
    usual = int(values[counts.argmax()]) if counts.max() > 0.3 * len(lengths) else None
    return {
        **_spread(lengths),
        "usual": usual,  # the length of at least three in ten
        "n_longer": 0 if usual is None else int((lengths > usual).sum()),
        "n_terminated": int(terminated.sum()),
        "n_truncated": int((~terminated & whole).sum()),
        "n_unfinished": int((~terminated & ~whole).sum()),
        "n_rows_dropped": int(lengths.sum()) - len(data),
    }


def _spread(values: NDArray[Any]) -> dict[str, float]:
    """Mean, standard deviation and five quantiles."""
    numbers = np.asarray(values, np.float64)
    names = ("min", "quarter", "median", "three_quarters", "max")
    quantiles = np.quantile(numbers, (0, 0.25, 0.5, 0.75, 1))
    return {"mean": float(numbers.mean()), "std": float(numbers.std()), **dict(zip(names, map(float, quantiles), strict=True))}


def _returns(data: Transitions) -> dict[str, Any]:
    returns, whole = data.episode_returns.numpy().astype(np.float64), data.episode_whole.numpy()
    judged = np.flatnonzero(whole) if whole.any() else np.arange(len(returns))
    order = judged[np.argsort(-returns[judged], kind="stable")]
    best = order[: max(1, len(order) // 10)]
    lengths = data.episode_lengths.numpy()
    differ = bool(np.ptp(returns[judged]) > 0)

    def rows(chosen: NDArray[Any]) -> list[dict[str, Any]]:
        return [{"episode": int(i), "return": float(returns[i]), "length": int(lengths[i])} for i in chosen]

    env_id = data_env({"dataset": data.info})
    return {
        **_spread(returns[judged]),
        "n": len(judged),
        "best_tenth": float(returns[best].mean()),
        "score": d4rl_score(env_id, returns[judged].tolist()),
        "best": rows(order[:3]) if differ else [],
        "worst": rows(order[::-1][:3]) if differ else [],
    }


def _rewards(data: Transitions, rows: NDArray[Any]) -> dict[str, Any]:
    rewards = data.rew.numpy()
    values, counts = np.unique(rewards[rows], return_counts=True)
    low, high = np.quantile(rewards[rows].astype(np.float64), (0.01, 0.99))
    outliers = _outliers(rewards[:, None], {"low": np.array([low]), "high": np.array([high])})[0]
    of_episodes, of_rows = data.episode_returns.double().abs().sum(), data.rew.double().abs().sum()
    transforms: dict[str, Any] = {}
    for name in ("auto", "unit_returns"):
        fitted = data.fit_reward_transform(name)
        transforms[name] = fitted.to_json()
    return {
        **_spread(rewards),
        "share_zero": float((rewards == 0).mean()),
        "n_outliers": int(outliers),
        # Whether the rows that were dropped, because where they led is unknown, held all that was rewarded.
        "only_in_dropped": bool(of_rows == 0 and of_episodes > 0),
        "n_values": len(values),
        "commonest": float(values[counts.argmax()]),
        "share_commonest": float(counts.max() / counts.sum()),
        "transforms": transforms,
    }


# ---- observations, actions ---------------------------------------------------------------------------------------------


def _names(data: Transitions) -> list[str]:
    """A name for each dimension of the observation, such as `position[0]`, (S,)."""
    shapes = check.obs_shapes(data.spec)
    return [
        f"{printable(key)}[{i}]" if key is not None else str(i)
        for key, shape in shapes.items()
        for i in range(math.prod(shape))
    ]


def _columns(values: NDArray[Any], rows: NDArray[Any]) -> dict[str, Floats]:
    """Statistics of each dimension of (N, D), (D,) each."""
    low, median, high = np.quantile(values[rows], (0.01, 0.5, 0.99), axis=0)
    return {
        "min": values.min(0).astype(np.float64),
        "low": low,
        "median": median,
        "high": high,
        "max": values.max(0).astype(np.float64),
        "mean": values.mean(0, dtype=np.float64),
        "std": values[rows].std(0, dtype=np.float64),
    }


def _observations(data: Transitions, rows: NDArray[Any]) -> list[dict[str, Any]]:
    obs = data.obs.numpy()
    found = _columns(obs, rows)
    outliers = _outliers(obs, found)
    turned = _turns(data, found["max"] - found["min"])
    table = []
    for i, name in enumerate(_names(data)):
        row: dict[str, Any] = {"name": name, **{key: float(value[i]) for key, value in found.items()}}
        row["constant"] = row["min"] == row["max"]
        row["n_values"] = _few_values(obs[rows, i])
        row["n_outliers"] = int(outliers[i])
        row["n_turns"] = int(turned[i])
        table.append(row)
    return table


def _outliers(values: NDArray[Any], found: Mapping[str, Floats]) -> NDArray[np.int64]:
    """How many values of each dimension lie far outside of its 1 % and 99 % quantiles, (D,)."""
    margin = OUTLIER * (found["high"] - found["low"])
    outside = (values > (found["high"] + margin).astype(np.float32)) | (values < (found["low"] - margin).astype(np.float32))
    # Where 98 % of the values agree, what differs is an event and no outlier.
    return np.where(margin > 0, outside.sum(0), 0)


def _turns(data: Transitions, width: Floats) -> NDArray[np.int64]:
    """How often each dimension, if it can be an angle, leaps from one end of its range to the other, (S,)."""
    turns = np.zeros(len(width), np.int64)
    for full in (2 * math.pi, 360.0):
        for i in np.flatnonzero((width > 0.95 * full) & (width < 1.005 * full)):
            change = (data.next_obs[:, i] - data.obs[:, i]).abs() > 0.9 * full
            turns[i] = int((change & (data.done == 0)).sum())
    return turns


def _few_values(values: NDArray[Any]) -> int | None:
    """The number of different values, or None if there are more than ten."""
    n = len(np.unique(values[:1000]))
    n = n if n > 10 else len(np.unique(values))
    return n if n <= 10 else None


def _actions(data: Transitions, rows: NDArray[Any]) -> list[dict[str, Any]]:
    action = data.action.numpy()
    low, high = (bound.reshape(-1).astype(np.float64) for bound in (data.spec.action_space.low, data.spec.action_space.high))
    found, width = _columns(action, rows), high - low
    outliers = _outliers(action, found)
    at_low = (action <= (low + SATURATED * width).astype(np.float32)).mean(0)
    at_high = (action >= (high - SATURATED * width).astype(np.float32)).mean(0)
    table = []
    for i in range(action.shape[1]):
        row: dict[str, Any] = {"name": str(i), **{key: float(value[i]) for key, value in found.items()}}
        row |= {"bounds": [float(low[i]), float(high[i])], "at_low": float(at_low[i]), "at_high": float(at_high[i])}
        row["constant"] = row["std"] < 1e-5 * float(width[i])
        row["n_values"] = _few_values(action[rows, i])
        row["n_outliers"] = int(outliers[i])
        row["used"] = float((found["high"][i] - found["low"][i]) / width[i])
        table.append(row)
    return table


# ---- duplicates, jumps, coverage ---------------------------------------------------------------------------------------


def _duplicates(data: Transitions) -> dict[str, Any]:
    """Episodes that equal an earlier one, exactly, or nearly in observations and actions."""
    ends = data.episode_ends.numpy()
    starts = np.concatenate([[0], ends[:-1]])
    obs, action, rew = data.obs.numpy(), data.action.numpy(), data.rew.numpy()
    seen: dict[bytes, int] = {}
    pairs, distinct = [], []
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if start == end:
            continue
        parts = (array[start:end].tobytes() for array in (obs, action, rew))
        digest = hashlib.blake2b(b"".join(parts), digest_size=16).digest()
        if digest in seen:
            pairs.append([seen[digest], i])
        else:
            seen[digest] = i
            distinct.append(i)
    compared = np.asarray(distinct)[ends[distinct] - starts[distinct] >= 2]
    compared = compared[evenly(len(compared), MOST_COMPARED)]
    near = _near_twins(obs, action, starts, ends, compared)
    return {"n_exact": len(pairs), "exact": pairs[:5], "n_near": len(near), "near": near[:5], "n_compared": len(compared)}


def _near_twins(
    obs: NDArray[Any], action: NDArray[Any], starts: NDArray[Any], ends: NDArray[Any], chosen: NDArray[Any]
) -> list[list[int]]:
    """(earlier, later) for each of the `chosen` episodes that nearly equals an earlier one of them.

    Compared are 16 steps, evenly over each episode, of standardised observations and actions, after a random projection to 64
    numbers, which keeps distances (Johnson and Lindenstrauss 1984).
    """
    if len(chosen) < 2:
        return []
    steps = starts[chosen, None] + np.round(np.linspace(0, 1, 16) * (ends[chosen] - starts[chosen] - 1)[:, None]).astype(
        np.int64
    )
    at = np.concatenate([obs[steps], action[steps]], -1).astype(np.float64)  # (E, 16, S + A)
    flat = at.reshape(-1, at.shape[-1])
    # Of the middle nine tenths, so that one episode that has run away does not make all others look alike.
    low, median, high = np.quantile(flat, (0.05, 0.5, 0.95), axis=0)
    std = np.where(high > low, (high - low) / 3.3, flat.std(0))
    varies = std > 1e-6 * np.abs(flat).max(0)
    if not varies.any():
        return []
    features = ((at - median) / np.where(varies, std, 1.0))[..., varies].reshape(len(chosen), -1).clip(-100, 100)
    directions = np.random.default_rng(0).standard_normal((features.shape[1], 64))
    scale = math.sqrt(64 * features.shape[1])  # then a squared distance is a mean over features
    points = torch.from_numpy((features @ directions / scale).astype(np.float32))
    pairs = []
    for first in range(0, len(points), 1024):
        part = points[first : first + 1024]
        near = torch.cdist(part, points[: first + len(part)]) < TWINS  # (rows, earlier and themselves)
        near &= torch.arange(near.shape[1]) < torch.arange(first, first + len(part))[:, None]
        later = near.any(1).nonzero()[:, 0]
        pairs += [[int(chosen[near[i].int().argmax()]), int(chosen[first + i])] for i in later.tolist()]
    return pairs


def _jumps(data: Transitions, rows: NDArray[Any], turns: NDArray[np.bool_]) -> dict[str, Any]:
    """Transitions over which the observation changes far more than it does otherwise; angles that turn, (S,), do not count."""
    obs, next_obs, done = data.obs.numpy(), data.next_obs.numpy(), data.done.numpy() == 1
    sample = rows[~done[rows]]
    if len(sample) < 2:
        return {"n": 0, "first": []}
    changes = np.abs(next_obs[sample] - obs[sample]).astype(np.float64)
    std = obs[sample].std(0, dtype=np.float64)
    median, usual, rare = np.quantile(changes, (0.5, 0.99, 0.999), axis=0)
    smooth = (median > 0) & (usual < SMOOTH * std) & ~turns
    steady = (rare > 0) & ~turns
    limit, single = (JUMP * usual).astype(np.float32), np.maximum(GLITCH * rare, 3.0 * std).astype(np.float32)
    jumps = []
    for start in range(0, len(obs), SAMPLE):
        part = slice(start, start + SAMPLE)
        change = np.abs(next_obs[part] - obs[part])
        found = (change[:, steady] > single[steady]).any(1)
        if smooth.any():
            found |= (change[:, smooth] > limit[smooth]).mean(1) >= 0.5
        jumps.append(start + np.flatnonzero(found & ~done[part]))
    found_rows = np.concatenate(jumps)
    ends, lengths = data.episode_ends.numpy(), data.episode_lengths.numpy()
    first = []
    for row in found_rows[:5].tolist():
        episode = int(np.searchsorted(ends, row, side="right"))
        step = row - (int(ends[episode - 1]) if episode else 0)
        first.append({"episode": episode, "step": step, "row": int(lengths[:episode].sum()) + step})  # rows as recorded
    return {"n": len(found_rows), "first": first}


def _coverage(data: Transitions, rows: NDArray[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """How many directions the observations vary in, and where the best episodes lie among all.

    Returns:
        The facts; and the sampled observations on their two principal components, with which of them are of a best episode.
    """
    obs = data.obs.numpy()[rows].astype(np.float64)
    std = obs.std(0)
    varies = std > 1e-6 * np.maximum(np.abs(obs).max(0), 1e-12)
    if len(obs) < 3 or not varies.any():
        return {"n_varying": int(varies.sum()), "n_components": int(varies.sum()), "best_tenth_visits": None}, {}
    scaled = (obs[:, varies] - obs[:, varies].mean(0)) / std[varies]
    values, vectors = np.linalg.eigh(scaled.T @ scaled / len(scaled))
    share = np.cumsum(values[::-1]) / values.sum()
    components = vectors[:, ::-1][:, :2]
    points = scaled @ components
    points = points if points.shape[1] == 2 else np.concatenate([points, np.zeros_like(points)], 1)
    whole = data.episode_whole.numpy()
    returns = np.where(whole | ~whole.any(), data.episode_returns.numpy(), -np.inf)
    best = np.argsort(-returns, kind="stable")[: max(1, len(returns) // 10)]
    of_best = np.isin(np.searchsorted(data.episode_ends.numpy(), rows, side="right"), best)
    low, high = np.quantile(points, (0.005, 0.995), axis=0)
    cell = np.clip((points - low) / np.maximum(high - low, 1e-12) * 20, 0, 19).astype(np.int64)
    place = cell[:, 0] * 20 + cell[:, 1]
    differ = bool(np.ptp(data.episode_returns.numpy()) > 0)
    facts = {
        "n_varying": int(varies.sum()),
        "n_components": int(np.searchsorted(share, 0.95)) + 1,
        "best_tenth_visits": len(np.unique(place[of_best])) / len(np.unique(place)) if differ else None,
    }
    return facts, {"points": points, "of_best": of_best & differ}


# ---- a clone, a first run ----------------------------------------------------------------------------------------------


def _clone(data: Transitions) -> dict[str, Any]:
    """Train a small clone for a few seconds; its error on episodes that it did not see says how noisy the actions are."""
    started = time.perf_counter()
    n_episodes = len(data.episode_ends)
    generator = torch.Generator().manual_seed(0)
    if n_episodes >= 10:
        held_out = torch.randperm(n_episodes, generator=generator)[: max(1, n_episodes // 10)]
        test = torch.isin(torch.searchsorted(data.episode_ends, torch.arange(len(data)), right=True), held_out)
    else:  # too few episodes: the last tenth of the rows
        test = torch.arange(len(data)) * 10 // max(1, len(data)) == 9
    rows, others = (~test).nonzero()[:, 0], test.nonzero()[:, 0]
    if len(rows) == 0 or len(others) == 0:
        return {"residual": None, "share_unexplained": None, "n_episodes_held_out": 0, "seconds": 0.0}
    others = others[:: max(1, len(others) // 20_000)]
    if float(_targets(data, others).var(0, correction=0).sum()) < 1e-10:  # nothing to explain
        return {"residual": None, "share_unexplained": None, "n_episodes_held_out": 0, "seconds": 0.0}
    std, mean = torch.std_mean(data.obs[rows[:: max(1, len(rows) // SAMPLE)]], 0, correction=0)
    std = std + 1e-3

    def inputs(chosen: torch.Tensor) -> torch.Tensor:
        return ((data.obs[chosen] - mean) / std).clamp(-10, 10)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(MLP(data.spec.obs_dim, (256, 256), data.spec.act_dim), nn.Tanh())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CLONE_STEPS)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other at such small matrices
    try:
        for _ in range(CLONE_STEPS):
            chosen = rows[torch.randint(len(rows), (CLONE_BATCH,), generator=generator)]
            loss = nn.functional.mse_loss(net(inputs(chosen)), _targets(data, chosen))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(n_threads)
    with torch.no_grad():
        truth = _targets(data, others)
        error = (net(inputs(others)) - truth).square().mean(0)
        unexplained = (error / truth.var(0, correction=0).clamp(min=1e-12)).clamp(max=1.0)
    total = float((error.sum() / truth.var(0, correction=0).sum().clamp(min=1e-12)).clamp(max=1.0))
    return {
        "residual": [float(x) for x in error.sqrt()],  # actions scaled to [-1, 1]
        "unexplained": [float(x) for x in unexplained],
        "share_unexplained": total,
        "n_episodes_held_out": max(1, n_episodes // 10) if n_episodes >= 10 else 0,
        "seconds": time.perf_counter() - started,
    }


def _targets(data: Transitions, rows: torch.Tensor) -> torch.Tensor:
    """The actions of some rows, scaled to [-1, 1]."""
    return torch.from_numpy(data.spec.scale_action(data.action[rows].numpy()))


def _duration(name: str, data: Transitions) -> float:
    """Seconds that a first run of an algorithm will take here, estimated from a few timed updates as `learn` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent = agent_class(name)(seed=0, verbose=0)
        plan, accepted = prepare.accept(agent, data, None, True, None)
        assert plan is not None  # a new agent has everything before it
        prepare.begin(agent, plan, accepted, True)
        return sum(offline.estimate(agent, plan, prepare.make_sampler(agent, accepted)).values())


# ---- judgement ---------------------------------------------------------------------------------------------------------


def _findings(facts: Mapping[str, Any]) -> list[str]:
    """What looks wrong or surprising in the measurements."""
    found = []
    episodes, obs, actions = facts["episodes"], facts["observations"], facts["actions"]
    duplicates, jumps, rewards = facts["duplicates"], facts["jumps"], facts["rewards"]
    if duplicates["n_exact"]:
        first, second = duplicates["exact"][0]
        found.append(f"episodes that are exact copies of earlier ones: {duplicates['n_exact']:,} (first: {second} of {first})")
    if duplicates["n_near"]:
        first, second = duplicates["near"][0]
        found.append(
            f"episodes that nearly equal earlier ones: {duplicates['n_near']:,} of {duplicates['n_compared']:,} compared "
            f"(first: {second} and {first}): the same run, recorded or augmented twice?"
        )
    if jumps["n"]:
        place = jumps["first"][0]
        where = f"episode {place['episode']}, step {place['step']}, row {place['row']}"
        found.append(
            f"transitions that jump: {jumps['n']:,} (first: {where}), "
            "over which the observation changes far more than it does otherwise: a missing end of an episode, lost rows or a "
            "faulty sensor?"
        )
    if episodes["n_longer"]:
        found.append(
            f"episodes of more than {episodes['usual']:,} steps, which many have: {episodes['n_longer']:,}; is an end missing?"
        )
    if rewards["only_in_dropped"]:
        found.append(
            "every reward but 0 is in a row that cannot be used, because where it led was not recorded: record the last "
            "observation of every episode, or nothing can be learned from rewards"
        )
    elif episodes["n_rows_dropped"]:
        found.append(
            f"rows that cannot be used, because where they led was not recorded: {episodes['n_rows_dropped']:,}; record the "
            "last observation of every episode"
        )
    if rewards["n_outliers"]:
        found.append(
            f"rewards far outside of 98 % of their values: {rewards['n_outliers']:,} (extremes {number(rewards['min'])} and "
            f"{number(rewards['max'])}): they decide the scale of all others"
        )
    outliers = [f"{row['name']} ({row['n_outliers']:,})" for row in obs if row["n_outliers"]]
    moving = [row for row in actions if not row["constant"]]
    switches = [f"{row['name']} ({row['n_values']} values)" for row in moving if row["n_values"]]
    named = {
        "observation dimensions that never change": [row["name"] for row in obs if row["constant"]],
        "observation dimensions with outliers, far outside of 98 % of their values": outliers,
        "observation dimensions whose standard deviation is below 0.001, so that normalising does not show them": [
            row["name"] for row in obs if not row["constant"] and row["std"] < 1e-3
        ],
        "observation dimensions that are angles and leap by a full turn (take sine and cosine)": [
            f"{row['name']} ({row['n_turns']:,} times)" for row in obs if row["n_turns"]
        ],
        "action dimensions with outliers, far outside of 98 % of their values": [
            f"{row['name']} ({row['n_outliers']:,})" for row in actions if row["n_outliers"]
        ],
        "action dimensions that never change": [row["name"] for row in actions if row["constant"]],
        "action dimensions that take few values, between which a policy will also act": switches,
    }
    if not facts["data"]["bounds_from_data"]:
        smooth = [row for row in moving if not row["n_values"]]
        at_bounds = [row["name"] for row in smooth if row["at_low"] + row["at_high"] > 0.5]
        named["action dimensions at their bounds in most rows"] = at_bounds
        named["action dimensions that use less than a tenth of their range"] = [r["name"] for r in smooth if r["used"] < 0.1]
    return found + [f"{what}: {_list(names)}" for what, names in named.items() if names]


def _list(names: Sequence[str]) -> str:
    """Up to eight names for a sentence."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _only_cloning(facts: Mapping[str, Any]) -> bool:
    """Whether the rewards make no action better than another."""
    return bool(facts["rewards"]["min"] == facts["rewards"]["max"] and facts["episodes"]["n_terminated"] == 0)


def _advice(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How to begin, with reasons."""
    advice = [
        ("reward", _reward_advice(facts)),
        ("observations", _observation_advice(facts["observations"])),
        ("algorithm", _algorithm_advice(facts)),
    ]
    if facts["data"]["bounds_from_data"]:
        advice.append(("bounds", "The bounds of the actions are those of the data: pass env= (--env) for the true ones."))
    duplicates, n_episodes = facts["duplicates"], facts["data"]["n_episodes"]
    near = duplicates["n_near"] / max(duplicates["n_compared"], 1) * (n_episodes - duplicates["n_exact"])
    if duplicates["n_exact"] + near > 0.05 * n_episodes:
        advice.append(("copies", "Leave them out: they count as often as they occur, and held-out episodes would be known."))
    if "first_run" in facts:
        times = ", ".join(f"{name} {_clock(seconds)}" for name, seconds in facts["first_run"].items())
        advice.append(
            ("first run", f"About how long a run with the default preset takes on this machine, as busy as it is now: {times}.")
        )
    return advice


def _reward_advice(facts: Mapping[str, Any]) -> str:
    rewards = facts["rewards"]
    auto, unit = rewards["transforms"]["auto"], rewards["transforms"]["unit_returns"]
    if _only_cloning(facts):
        return f"The reward is always {number(rewards['mean'])}: there is nothing to scale."
    if auto["name"] == "minus_one":
        return (
            f"A sparse goal (0, and 1 in {percent(1 - rewards['share_zero'])} of the rows): the default preset learns from "
            f"r - 1, times {number(unit['scale'])}, so that each step costs; preset=None takes r - 1."
        )
    factor = f" (factor {number(auto['scale'])})" if auto["name"] != "none" else ""
    return (
        f"Nothing is to be set by hand: the default preset multiplies rewards by {number(unit['scale'])}, after which "
        f'discounted returns have standard deviation 1; preset=None chooses "{auto["name"]}"{factor}.'
    )


def _observation_advice(observations: Sequence[Mapping[str, Any]]) -> str:
    stds = [row["std"] for row in observations if not row["constant"]]
    if not stds:
        return "No dimension changes: a policy can only learn one action."
    ratio = max(stds) / max(min(stds), 1e-300)
    what = f"The largest standard deviation of a dimension is {number(max(stds))}, {number(ratio)} times the smallest: "
    if ratio > 10 or max(stds) > 50:
        return what + "keep normalize_obs=True, which the default preset has."
    return what + "normalising matters little."


def _algorithm_advice(facts: Mapping[str, Any]) -> str:
    few = facts["data"]["n_steps"] < FEW
    return _which_algorithm(facts) + (" With so few data, a good clone is hard to beat." if few else "")


def _which_algorithm(facts: Mapping[str, Any]) -> str:
    returns, noise = facts["returns"], (facts.get("clone") or {}).get("share_unexplained")
    episodes = facts["episodes"]
    if _only_cloning(facts):
        return "Only imitation is possible: " + (
            f"DiffusionBC, because a clone leaves {percent(noise)} of the actions' variance unexplained, which may be several "
            "ways to act; and BC to compare with."
            if noise is not None and noise > 0.3
            else "BC, and DiffusionBC where one observation allows several actions."
        )
    if returns["n"] < 2:
        return "Begin with BC: there is only one episode, and nothing to compare it with."
    if facts["rewards"]["transforms"]["auto"]["name"] == "minus_one" and episodes["std"] > 0.05 * episodes["mean"]:
        return (
            f"Begin with SRPO, and BC to compare with: episodes take between {number(episodes['min'])} and "
            f"{number(episodes['max'])} steps, so there is something to prefer. Then DiffusionQL and DiffCPS, which take "
            "longer."
        )
    if returns["std"] < 0.05 * max(abs(returns["mean"]), 1e-9):
        return (
            f"Begin with BC: all episodes return about the same ({number(returns['mean'])} ± {number(returns['std'])}), so "
            "there is little to choose between. SRPO and DiffusionQL may gain where rewards differ within an episode."
        )
    return (
        f"Begin with SRPO, and BC to compare with: the best tenth of the episodes returns {number(returns['best_tenth'])}, all "
        f"together {number(returns['mean'])}, so there is something to prefer. Then DiffusionQL and DiffCPS, which take longer."
    )


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


# ---- data that are refused ---------------------------------------------------------------------------------------------


def _bare_arrays(dataset: Any, download: bool) -> dict[str, NDArray[Any]]:
    """The arrays of a source by name, unchecked; empty if it is of a kind that contains none."""
    if isinstance(dataset, Mapping):
        return _flatten(dataset)
    if isinstance(dataset, (list, tuple)) and dataset and all(isinstance(episode, Mapping) for episode in dataset):
        return _joined(map(_flatten, dataset))
    if hasattr(dataset, "buffer_size") and hasattr(dataset, "observations"):  # a replay buffer
        n = dataset.buffer_size if dataset.full else dataset.pos
        parts = ("observations", "next_observations", "actions", "rewards", "dones")
        return _flatten({name: _rows_of(getattr(dataset, name), n) for name in parts if hasattr(dataset, name)})
    try:
        if hasattr(dataset, "iterate_episodes"):  # a MinariDataset
            return _minari(Path(dataset.storage.data_path), dataset)
        if not isinstance(dataset, str | Path):
            return {}
        path = Path(dataset).expanduser()
        if path.suffix.lower() == ".npz" and path.is_file():
            check_npz(path)
            with np.load(path, allow_pickle=False) as file:
                return _flatten({name: array for name in file.files if (array := _readable(file, name)) is not None})
        if path.suffix.lower() in (".hdf5", ".h5") and path.is_file():
            with hdf5.opened(path) as (file, budget):
                return hdf5.arrays(file, budget)
        if isinstance(dataset, str):
            return _minari(find_minari(dataset, download), None)
    except Exception:  # the error that the data were refused with says more
        return {}
    return {}


def _rows_of(value: Any, n: int) -> Any:
    """The first n rows of an array, or of each array of a dict."""
    if isinstance(value, Mapping):
        return {key: array[:n] for key, array in value.items()}
    return value[:n]


def _readable(file: Any, name: str) -> NDArray[Any] | None:
    """An array of an .npz; None for one of objects, which would have to be unpickled."""
    try:
        array: NDArray[Any] = file[name]
    except ValueError:
        return None
    return array


def _flatten(arrays: Mapping[Any, Any], prefix: str = "") -> dict[str, NDArray[Any]]:
    """Arrays of real numbers by name; those of an inner mapping as `outer/inner`. What is no such array is left out."""
    flat: dict[str, NDArray[Any]] = {}
    for key, value in arrays.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}/")
            continue
        try:
            flat[f"{prefix}{key}"] = check.numeric(str(key), value)
        except (TypeError, ValueError):
            continue
    return flat


def _joined(episodes: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The arrays of all episodes, one after the other; names under which shapes differ are left out."""
    parts: dict[str, list[NDArray[Any]]] = {}
    for episode in episodes:
        for name, array in episode.items():
            parts.setdefault(name, []).append(np.atleast_1d(array))
    return {name: np.concatenate(found) for name, found in parts.items() if len({array.shape[1:] for array in found}) == 1}


def _minari(folder: Path, dataset: Any) -> dict[str, NDArray[Any]]:
    """The arrays of a Minari set in HDF5; of those episodes that `dataset` has, if it is not None."""
    metadata = read_metadata(folder)
    if metadata.get("data_format", "hdf5") != "hdf5":
        if dataset is None:
            return {}
        return _joined(_flatten({name: getattr(episode, name) for name in COLUMNS}) for episode in dataset.iterate_episodes())
    indices = range(metadata["total_episodes"]) if dataset is None else dataset.episode_indices
    return _joined(_flatten(episode) for episode in read_episodes(folder, indices))


def _array(name: str, array: NDArray[Any]) -> dict[str, Any]:
    """Shape, range and bad values of one array."""
    numbers = np.atleast_1d(array)
    numbers = numbers.reshape(len(numbers), math.prod(numbers.shape[1:]))  # not -1: the array may be empty
    good = np.isfinite(numbers)
    row: dict[str, Any] = {
        "name": check.name_of(name),
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "min": None,
        "max": None,
    }
    if good.any():
        row |= {"min": float(numbers[good].min()), "max": float(numbers[good].max())}
    bad = ~good
    row |= {"n_nan": int(np.isnan(numbers).sum()), "n_infinite": int(np.isinf(numbers).sum()), "bad_columns": {}}
    if bad.any():
        counts = bad.sum(0)
        row["bad_columns"] = {int(i): int(counts[i]) for i in np.flatnonzero(counts)[:20]}
        row["first_bad_row"] = int(np.flatnonzero(bad.any(1))[0])
    return row
