"""`select`: choose among several policies from data alone; episodes in an environment decide only on request.

Each policy gets four signals. The first one determines the order:
  fqe         fitted Q evaluation (fqe.py): the discounted return of raw reward, of the policy as it is deployed
  off_data    distance of its actions to the nearest actions of the data in similar states, relative to the same distance of
              the data's own actions: about 1 or less near the data. If it is large, the data say nothing about what the policy
              does, Q is an extrapolation there and often optimistic, so the policy ranks behind all others whatever its fqe
  bc_loss     mean squared distance, over data and dimensions, between its actions and the data's, both in [-1, 1]
  q_mean      the value that its own critic gives its actions, to compare with data_return from the same states: a critic that
              promises many times what the data ever obtained is overestimating
All signals are those of the deterministic policy. They serve to rank policies and do not predict the return.
"""

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffagents import registry
from diffagents.config.checks import find_device, whole_number
from diffagents.data.load import load_dataset
from diffagents.data.normalize import ObsNormalizer, RewardTransform
from diffagents.data.transitions import Transitions
from diffagents.evaluation.evaluate import Evaluation, evaluate
from diffagents.evaluation.statistics import mean_interval
from diffagents.experiments.fqe import FQE, FQEConfig, FQEResult, discounted_returns, some_rows
from diffagents.networks.critics import IQLCritic, ReturnCritic
from diffagents.networks.mlp import EnsembleMLP
from diffagents.types import Spec

ROWS_AT_ONCE = 256  # observations per call of `predict`: a diffusion policy multiplies them by its candidates
BC_ROWS = 2000  # at most so many rows of data for bc_loss and q_mean
N_NEIGHBOURS = 50  # similar states for off_data
NEIGHBOUR_ROWS = 20_000  # at most so many rows of data in which they are searched
OFF_DATA = 2.5
"""From this off_data on, an estimate is not trusted. At the corners of uniformly random actions, which such data do cover, it
is 2 for any number of dimensions A: the data lie on one side only, with a density of 2^-A."""
MAX_CLIPPED = 0.05  # from this share of clipped targets on, an estimate counts as diverged
SETTLED = 0.05  # relative change in the last quarter of the fit below which an estimate counts as converged


@dataclass(frozen=True)
class Rated:
    """The signals of one policy.

    Attributes:
        name: name of the policy.
        fqe: estimated discounted return of raw reward.
        interval: 95 % interval of `fqe` by Student's t over the first states of the data, without the error of the fit.
        fqe_seeds: the estimate of each fit.
        drift: change of `fqe` in the last quarter of the fit.
        off_data: relative distance of its actions to those of the data, see the top of this file.
        bc_loss: mean squared distance between its actions and the data's, both in [-1, 1].
        q_mean: mean value of its own critic at its actions, with the agent's own discount, in units of the reward that it
            trained on divided by the scale of its transform (a shift remains); None without such a critic.
        data_return: discounted return of the data from the same states, in the same units; None without such a critic.
        trusted: False if the estimate diverged or concerns actions far from the data, as `notes` say; such policies rank last.
        notes: remarks on the estimates.
        evaluation: the episodes that were played; None if there were none.
    """

    name: str
    fqe: float
    interval: tuple[float, float]
    fqe_seeds: tuple[float, ...]
    drift: float
    off_data: float
    bc_loss: float
    q_mean: float | None = None
    data_return: float | None = None
    trusted: bool = True
    notes: tuple[str, ...] = ()
    evaluation: Evaluation | None = None

    @property
    def q_ratio(self) -> float | None:
        """q_mean / data_return; above 1 is better than the data where returns are positive, worse where negative."""
        return self.q_mean / self.data_return if self.q_mean is not None and self.data_return else None


@dataclass(frozen=True)
class Selection:
    """The report of `select`: `print` shows a table, `to_json` returns it for a file.

    Attributes:
        rows: one row per policy, sorted by `fqe`, best first; policies that are not trusted come last.
        dataset: id of the dataset.
        config: settings of the fitted Q evaluation.
        n_used: number of transitions that the estimates are fitted on.
        n_transitions: number of transitions in the dataset.
        n_starts: number of first states over which the estimates are averaged.
        seconds: how long the selection took.
        n_env_episodes: environment episodes that were played.
    """

    rows: tuple[Rated, ...]
    dataset: str
    config: FQEConfig
    n_used: int
    n_transitions: int
    n_starts: int
    seconds: float
    n_env_episodes: int = 0

    @property
    def order(self) -> list[str]:
        """Names in the order of `rows`, best first."""
        return [row.name for row in self.rows]

    @property
    def best(self) -> str:
        """Name of the best policy: by return among those that played episodes, if any did, else by `fqe`."""
        played = [row for row in self.rows if row.evaluation is not None]
        return max(played, key=lambda row: row.evaluation.mean_return).name if played else self.rows[0].name  # type: ignore[union-attr]

    def __getitem__(self, name: str) -> Rated:
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON types; NaN and infinity become null."""
        rows = [
            {
                **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(row).items()},
                "q_ratio": row.q_ratio,
                "evaluation": row.evaluation.to_json() if row.evaluation is not None else None,
            }
            for row in self.rows
        ]
        config = {**dataclasses.asdict(self.config), "hidden": list(self.config.hidden)}
        report = {**vars(self), "best": self.best, "order": self.order, "config": config, "rows": rows}
        return json.loads(json.dumps(report, default=list), parse_constant=lambda _: None)

    def __str__(self) -> str:
        heads = ["policy", "fqe", "95 % interval", "off_data", "bc_loss", "q_mean", "data_return", "q_ratio", "return"]
        table = [heads, *(self._cells(row) for row in self.rows)]
        if not self.n_env_episodes:
            table = [cells[:-1] for cells in table]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join([c[0].ljust(widths[0]), *map(str.rjust, c[1:], widths[1:])]).rstrip() for c in table]
        lines += [f"{row.name}: {note}" for row in self.rows for note in row.notes]
        c = self.config
        lines.append(
            f"fqe: discounted return of raw reward (gamma {c.gamma:g}) from {self.n_starts:,} first states of {self.dataset}, "
            f"from {self.n_used:,} of {self.n_transitions:,} transitions; for ranking only, not a prediction of the return"
        )
        lines.append(f"best: {self.best}; {self.n_env_episodes} environment episodes used")
        return "\n".join(lines)

    def _cells(self, row: Rated) -> list[str]:
        numbers = [row.off_data, row.bc_loss, row.q_mean, row.data_return, row.q_ratio]
        played = row.evaluation.mean_return if row.evaluation is not None else None
        interval = f"{row.interval[0]:.4g} to {row.interval[1]:.4g}"
        mark = "" if row.trusted else " (not trusted)"
        return [row.name + mark, f"{row.fqe:.4g}", interval, *("-" if x is None else f"{x:.4g}" for x in (*numbers, played))]


def select(
    agents: Mapping[str, Any] | Sequence[Any],
    dataset: Any,
    *,
    gamma: float = FQEConfig.gamma,
    fqe_steps: int = FQEConfig.steps,
    n_seeds: int = FQEConfig.n_seeds,
    max_transitions: int = FQEConfig.max_transitions,
    seed: int = 0,
    device: str | torch.device = "auto",
    env: Any = None,
    n_episodes: int = 0,
    top: int = 3,
    load: Callable[[Any], Any] | None = None,
    verbose: int = 1,
) -> Selection:
    """Rank policies by what the data say about them, without an environment, and return the report.

    Args:
        agents: a mapping from names to policies, or a sequence of policies. A policy is an agent of this library, any object
            with SB3's `predict`, or the path of a folder or .zip file, which `load` reads.
        dataset: anything that `load_dataset` reads, for the task of the policies; ideally the data that they were trained on.
        gamma: discount factor of the estimate; use a value near 1 if much of the reward comes late.
        fqe_steps: gradient steps of the estimate.
        n_seeds: number of fits per policy; with 2 or more the estimate is pessimistic where they disagree.
        max_transitions: at most so many transitions are used, drawn once for all policies.
        seed: seed of the estimate, and of the first episode.
        device: where to fit: "auto", "cpu", "cuda", ...
        env: environment for the episodes, or its id; it also provides the spaces if the data have none. Default: the
            environment of the dataset.
        n_episodes: also play so many episodes with each of the `top` best policies, and let their mean return decide. The
            report counts the episodes.
        top: number of policies that play.
        load: reads a path. Default: `diffagents.load`.
        verbose: 0 prints nothing, 1 the progress.

    Raises:
        ValueError, TypeError: before any work, for invalid arguments or a policy that cannot act on these data.
    """
    config = FQEConfig(gamma=gamma, steps=fqe_steps, n_seeds=n_seeds, max_transitions=max_transitions, seed=seed)
    whole_number("n_episodes", n_episodes, 0)
    whole_number("top", top, 1)
    policies = _named(agents, load)
    keys = next((policy.obs_keys for policy in policies.values() if getattr(policy, "obs_keys", None)), None)
    data = load_dataset(dataset, env=env, obs_keys=None if isinstance(dataset, Transitions) else keys)
    where = env if env is not None else data.info.get("env_spec")
    if n_episodes and where is None:
        raise ValueError(f"n_episodes={n_episodes}, but no environment is stored with {data.info['id']}: pass env=")
    for name, policy in policies.items():
        _check(name, policy, data)

    started = time.perf_counter()
    fqe = FQE(data, config, find_device(device))
    rows = rate(policies, data, fqe, verbose)
    rows.sort(key=lambda row: (not row.trusted, -row.fqe if math.isfinite(row.fqe) else math.inf))
    for k, row in enumerate(rows[: top if n_episodes else 0]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about action bounds: training has warned already
            played = evaluate(policies[row.name], where, n_episodes, seed=seed, deterministic=True)
        rows[k] = dataclasses.replace(row, evaluation=played)
    n_played = sum(len(row.evaluation.returns) for row in rows if row.evaluation is not None)
    return Selection(
        rows=tuple(rows),
        dataset=str(data.info["id"]),
        config=config,
        n_used=len(fqe.sampler),
        n_transitions=len(data),
        n_starts=len(fqe.start_obs),
        seconds=time.perf_counter() - started,
        n_env_episodes=n_played,
    )


def _named(agents: Any, load: Callable[[Any], Any] | None) -> dict[str, Any]:
    """The policies by unique names; paths are loaded."""
    if isinstance(agents, str | Path) or callable(getattr(agents, "predict", None)):
        raise TypeError("agents must contain several policies: a dict of name -> policy, or a list of policies or paths")
    named = dict(agents) if isinstance(agents, Mapping) else {}
    if not isinstance(agents, Mapping):
        for k, agent in enumerate(agents):
            is_path = isinstance(agent, str | Path)
            name = str(agent) if is_path else f"{type(agent).__name__}-{k}"
            if name in named:
                raise ValueError(f"agents contains {name} twice")
            named[name] = agent
    if not named:
        raise ValueError("agents is empty: pass at least one policy")
    for name, agent in named.items():
        if isinstance(agent, str | Path):
            named[name] = load(agent) if load is not None else registry.load(agent, verbose=0)
        if not callable(getattr(named[name], "predict", None)):
            raise TypeError(f"policy {name!r} is a {type(named[name]).__name__}, which has no predict(obs, deterministic=True)")
    return named


def _check(name: str, policy: Any, data: Transitions) -> None:
    """Let the policy act on two rows of the data."""
    about = f"policy {name!r} cannot act on {data.info['id']}"
    remedy = "select among policies for one task, on data of that task"
    try:
        action = actions_of(policy, data.obs[:1].expand(2, -1), data.spec)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{about} ({' '.join(str(error).split())}): {remedy}") from None
    if action.shape != (2, *data.spec.action_space.shape):
        raise ValueError(
            f"{about}: its actions have shape {action.shape[1:]}, the data's {data.spec.action_space.shape}: {remedy}"
        )


def rate(policies: Mapping[str, Any], data: Transitions, fqe: FQE, verbose: int = 0) -> list[Rated]:
    """All signals of several policies.

    Args:
        policies: name -> policy.
        data: the dataset that `fqe` was made from.
        fqe: the prepared fitted Q evaluation.
        verbose: 0 prints nothing, 1 the progress.

    Returns:
        One row per policy. A policy whose actions are not finite somewhere is not trusted.
    """
    rows = some_rows(len(data), BC_ROWS, torch.Generator().manual_seed(fqe.config.seed + 1))
    states = [fqe.next_obs, fqe.start_obs, data.obs[rows]]
    actions: dict[str, np.ndarray] = {}
    rated: list[Rated] = []
    for name, policy in policies.items():
        started = time.perf_counter()
        try:
            actions[name] = actions_of(policy, torch.cat(states), data.spec)
        except RuntimeError as error:
            nan = math.nan
            rated.append(Rated(name, nan, (nan, nan), (), nan, nan, nan, trusted=False, notes=(str(error),)))
        if verbose:
            print(f"{name} acted in {sum(map(len, states)):,} states in {time.perf_counter() - started:.1f} s", flush=True)
    if not actions:
        return rated
    if verbose:
        print(f"fitting {len(actions)} estimates in {fqe.config.steps:,} steps", flush=True)
    scaled = torch.stack([_scaled(action, data.spec) for action in actions.values()])  # (P, rows, A)
    next_act, start_act, act = torch.split(scaled, [len(some) for some in states], 1)
    distances = (act - _scaled(data.action[rows].numpy(), data.spec)).square().mean((1, 2)).tolist()
    neighbours = _Neighbours(data, rows, fqe.config.seed)
    for k, (name, result, distance) in enumerate(zip(actions, fqe.fit(next_act, start_act), distances, strict=True)):
        values = result.values.double().mean(0).numpy()  # one per first state
        interval = mean_interval(values) or (math.nan, math.nan)  # of a single first state
        off_data = neighbours.off_data(act[k])
        trusted, notes = _judge(result, interval, off_data, fqe.config)
        own = _own_q(policies[name], data, rows, actions[name][-len(rows) :])
        rated.append(
            Rated(
                name=name,
                fqe=float(values.mean()),
                interval=interval,
                fqe_seeds=tuple(result.values.mean(1).tolist()),
                drift=result.drift,
                off_data=off_data,
                bc_loss=distance,
                q_mean=own.q_mean,
                data_return=own.data_return,
                trusted=trusted,
                notes=(*notes, *own.notes),
            )
        )
    return rated


def _judge(result: FQEResult, interval: tuple[float, float], off_data: float, config: FQEConfig) -> tuple[bool, list[str]]:
    """Whether the estimate can be trusted, and remarks on it."""
    if not result.values.isfinite().all() or result.clipped > MAX_CLIPPED:
        share = f"{100 * result.clipped:.0f} % of its targets lay outside the range that the rewards allow"
        return False, [f"the estimate diverged ({share}): the policy acts where there are no data, or gamma is too large"]
    if off_data > OFF_DATA:
        return False, [
            f"its actions lie {off_data:.3g} times further from the data than the data's own: its fqe is an extrapolation"
        ]
    if abs(result.drift) > max(interval[1] - interval[0], SETTLED * abs(float(result.values.mean()))):
        return True, [
            f"the estimate has not converged ({result.drift:+.3g} in the last quarter): use more than {config.steps:,} steps"
        ]
    return True, []


class _Neighbours:
    """The actions of the data (Q, K, A) in the K states most similar to each state of `rows` (Q,)."""

    def __init__(self, data: Transitions, rows: Tensor, seed: int) -> None:
        normalizer = ObsNormalizer(data.spec.obs_dim).fit(data.obs)
        others = some_rows(len(data), NEIGHBOUR_ROWS, torch.Generator().manual_seed(seed + 2))
        obs, act = normalizer(data.obs[others]), _scaled(data.action[others].numpy(), data.spec)
        k, parts = min(N_NEIGHBOURS, max(1, len(others) - 1)), []
        for some in torch.split(rows, ROWS_AT_ONCE):
            distance = torch.cdist(normalizer(data.obs[some]), obs)
            distance[some[:, None] == others] = torch.inf  # a state is not its own neighbour
            parts.append(act[distance.topk(k, largest=False).indices])
        self.actions = torch.cat(parts)
        self.own = max(self._distance(_scaled(data.action[rows].numpy(), data.spec)), 1e-4)  # at least 1 % of half the range

    def _distance(self, act: Tensor) -> float:
        """Mean squared distance of actions (Q, A) to the nearest neighbouring action."""
        return float((self.actions - act[:, None]).square().mean(-1).amin(-1).mean())

    def off_data(self, act: Tensor) -> float:
        """Distance of actions (Q, A) in [-1, 1] to the data, relative to that of the data's own actions."""
        return math.sqrt(self._distance(act) / self.own)


@dataclass(frozen=True)
class _Own:
    """Mean value of an agent's own critic, the data's return to compare it with, and remarks."""

    q_mean: float | None = None
    data_return: float | None = None
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def _own_q(policy: Any, data: Transitions, rows: Tensor, action: np.ndarray) -> _Own:
    """The mean value of the policy's own critic at `action` in the states of `rows`, and the data's return from there.

    Empty for policies without a critic of actions: behaviour cloning, AWR (its critic values states only), other libraries.
    """
    name = "critic_target" if hasattr(policy, "critic_target") else "critic"
    critic = getattr(policy, name, None)
    if not isinstance(critic, IQLCritic | EnsembleMLP | ReturnCritic):
        return _Own()
    if name not in policy.MODEL and not policy.has_training_networks:
        return _Own(notes=["the policy was loaded without its critic: q_mean is unknown"])
    flat = policy.spec.flatten_obs(_observation(data.obs[rows], data.spec))[0]
    obs = policy.obs_normalizer(torch.from_numpy(flat).to(policy.device))
    act = _scaled(action, policy.spec).to(policy.device)
    if isinstance(critic, ReturnCritic):  # learns standardised returns
        q = critic.mean + critic.std * critic(obs, act)
    elif isinstance(critic, IQLCritic):
        q = critic.q_target(torch.cat([act, obs], -1)).amin(0)
    else:
        q = critic(torch.cat([obs, act], -1)).amin(0)
    transform, gamma = policy.reward_transform or RewardTransform(), policy.config.gamma
    returns = discounted_returns(data, gamma, transform)[rows]
    rewards = transform(data.rew)
    most = max(float(rewards.max()), 0.0 if data.done.any() else -math.inf) / (1.0 - gamma)
    q_mean, highest = float(q.mean()), most / transform.scale
    notes = []
    if not q_mean <= most:
        notes.append(
            f"its critic promises {q_mean / transform.scale:.4g}, more than the rewards allow ({highest:.4g}): it diverged"
        )
    return _Own(q_mean / transform.scale, float(returns.mean()) / transform.scale, notes)


# ---- the policy as it is deployed ------------------------------------------------------------------------------------
def actions_of(policy: Any, obs: Tensor, spec: Spec) -> np.ndarray:
    """The deterministic actions of a policy, computed in batches.

    Args:
        policy: any object with SB3's `predict`.
        obs: flat observations, (n, S).
        spec: the spaces of the data.

    Returns:
        Actions in the environment's units, (n, *action shape).

    Raises:
        RuntimeError: if an action is not finite.
    """
    parts = []
    for some in torch.split(obs, ROWS_AT_ONCE):
        action = np.asarray(policy.predict(_observation(some, spec), deterministic=True)[0])
        if not np.isfinite(action).all():
            raise RuntimeError("the policy's actions are not finite numbers")
        parts.append(action)
    return np.concatenate(parts)


def _observation(obs: Tensor, spec: Spec) -> Any:
    """Flat observations (n, S) in the form of the environment: an array, or a dict of arrays by key."""
    if spec.obs_keys is None:
        return obs.numpy().reshape(len(obs), *spec.observation_space.shape)  # type: ignore[misc]
    shapes = {key: spec.observation_space[key].shape for key in spec.obs_keys}  # type: ignore[index]
    parts = torch.split(obs, [math.prod(shape) for shape in shapes.values()], 1)
    return {key: part.numpy().reshape(len(obs), *shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}


def _scaled(action: np.ndarray, spec: Spec) -> Tensor:
    """Actions in [-1, 1]."""
    return torch.from_numpy(spec.scale_action(action))
