"""`select`: which of several policies to take, from data alone; a few episodes in the environment decide only where asked.

Four signals for each policy, the first of which orders them:
  fqe         fitted Q evaluation (fqe.py): its discounted return of raw reward, of the policy as it is deployed
  off_data    how far its actions are from the nearest that the data hold in similar states, in units of how far the data's own
              are: about 1 or less near the data. Where it is large no data speak of what the policy does, Q is a guess there,
              often a rosy one, and the policy ranks behind all others whatever its fqe
  bc_loss     mean squared distance, over data and dimensions, between its action and the data's, both in [-1, 1]
  q_mean      what its own critic thinks of its actions, beside the data_return from the same states: a critic that promises
              many times of what the data ever got has fooled itself
All are of the deterministic policy. They are for ranking: no number here is what the policy will earn.
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

from diffagents.config.checks import find_device, whole_number
from diffagents.data.load import load_dataset
from diffagents.data.normalize import ObsNormalizer, RewardTransform
from diffagents.data.transitions import Transitions
from diffagents.evaluation.evaluate import Evaluation, evaluate
from diffagents.evaluation.statistics import bootstrap
from diffagents.experiments.fqe import FQE, FQEConfig, FQEResult, discounted_returns, some_rows
from diffagents.networks.critics import IQLCritic, ReturnCritic
from diffagents.networks.mlp import EnsembleMLP
from diffagents.types import Spec

ROWS_AT_ONCE = 256  # observations in one call of `predict`: a diffusion policy multiplies them by its candidates
BC_ROWS = 2000  # rows of data behind bc_loss and q_mean, at most
N_NEIGHBOURS = 50  # similar states behind off_data
NEIGHBOUR_ROWS = 20_000  # rows of data among which they are looked for, at most
OFF_DATA = 2.5
"""The off_data from which on an estimate is not believed. At the corners of uniformly random actions, which such data do tell
about, it is 2, whatever the number of dimensions A: the data lie on one side, with a density of 2^-A."""
RAN_AWAY = 0.05  # share of clipped targets from which on an estimate counts as diverged
SETTLED = 0.05  # share of itself by which an estimate may still move in the last quarter of the fit


@dataclass(frozen=True)
class Rated:
    """What is known of one policy. fqe, q_mean and data_return are discounted returns; None: there is no such number.

    interval: 95 % bootstrap interval of `fqe` over the data's first states; it knows nothing of the fit's own error. fqe_seeds:
    the estimate of each fit. drift: how far `fqe` moved in the last quarter of the fit. q_mean and data_return: in units of the
    reward that the agent learnt from, divided by its transform's scale (a shift stays in both), with its own discount.
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
    trusted: bool = True  # False: the estimate diverged or is of actions far from the data, as `notes` say; it ranks last
    notes: tuple[str, ...] = ()
    evaluation: Evaluation | None = None  # where episodes were asked for

    @property
    def q_ratio(self) -> float | None:
        """q_mean / data_return; above 1 is better than the data where returns are positive, worse where negative."""
        return self.q_mean / self.data_return if self.q_mean is not None and self.data_return else None


@dataclass(frozen=True)
class Selection:
    """The report of `select`: `print` it for a table, `to_json` for a file. `rows`: best `fqe` first, the not trusted last."""

    rows: tuple[Rated, ...]
    dataset: str
    config: FQEConfig
    n_used: int  # transitions that the estimates are fitted on
    n_transitions: int
    n_starts: int  # first states that they are the mean over
    seconds: float
    n_env_episodes: int = 0

    @property
    def order(self) -> list[str]:
        """Names, the best first: by `fqe`, those that are not trusted behind the others."""
        return [row.name for row in self.rows]

    @property
    def best(self) -> str:
        """The name to take: the best by `fqe`; among those that were also played, where any were, the best by return."""
        played = [row for row in self.rows if row.evaluation is not None]
        return max(played, key=lambda row: row.evaluation.mean_return).name if played else self.rows[0].name  # type: ignore[union-attr]

    def __getitem__(self, name: str) -> Rated:
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON types; null for numbers that are none."""
        rows = [
            {
                **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(row).items()},
                "q_ratio": row.q_ratio,
                "evaluation": row.evaluation.to_json() if row.evaluation is not None else None,
            }
            for row in self.rows
        ]
        config = {**dataclasses.asdict(self.config), "hidden": list(self.config.hidden)}
        told = {**vars(self), "best": self.best, "order": self.order, "config": config, "rows": rows}
        return json.loads(json.dumps(told, default=list), parse_constant=lambda _: None)

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
            f"by {self.n_used:,} of {self.n_transitions:,} transitions; a number to rank by, not what a policy will earn"
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
    """Order policies by what the data say of them, without an environment, and return the report.

    agents: name -> policy, or a sequence of policies. A policy is an agent of ours, anything else with SB3's `predict`, or the
    path of a folder or .zip, which `load` reads (None: `diffagents.load`).
    dataset: anything that `load_dataset` reads, of the task that the policies are for; best the data they were trained on.
    gamma: discount of the estimate, near 1 where much comes late. fqe_steps: updates. n_seeds: fits for each policy; with 2 or
    more, pessimistic where they disagree. max_transitions: how many of the data are used, drawn once for all policies.
    n_episodes: also play this many episodes with each of the `top` best, in `env` (None: the dataset's own), and let the
    return decide among those. The report counts them. env: also gives the spaces where the data have none.
    Raises ValueError or TypeError, before any work, where a policy cannot act on these data.
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
            warnings.simplefilter("ignore", UserWarning)  # about action bounds, told when the policy was trained
            played = evaluate(policies[row.name], where, n_episodes, seed=seed)
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
    """Every policy by a name of its own, paths loaded."""
    if isinstance(agents, str | Path) or callable(getattr(agents, "predict", None)):
        raise TypeError("agents must be several: a dict of name -> policy, or a list of policies or paths")
    given = dict(agents) if isinstance(agents, Mapping) else {}
    if not isinstance(agents, Mapping):
        for k, agent in enumerate(agents):
            is_path = isinstance(agent, str | Path)
            name = str(agent) if is_path else f"{type(agent).__name__}-{k}"
            if name in given:
                raise ValueError(f"agents holds {name} twice")
            given[name] = agent
    if not given:
        raise ValueError("agents is empty: give at least one policy")
    for name, agent in given.items():
        if isinstance(agent, str | Path):
            given[name] = load(agent) if load is not None else _load(agent)
        if not callable(getattr(given[name], "predict", None)):
            raise TypeError(f"policy {name!r} is a {type(given[name]).__name__}, which has no predict(obs, deterministic=True)")
    return given


def _load(path: Any) -> Any:
    import diffagents

    return diffagents.load(path, verbose=0)


def _check(name: str, policy: Any, data: Transitions) -> None:
    """Let the policy act on two rows of the data."""
    about = f"policy {name!r} cannot act on {data.info['id']}"
    cure = "select among policies of one task, on data of that task"
    try:
        action = actions_of(policy, data.obs[:1].expand(2, -1), data.spec)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{about} ({' '.join(str(error).split())}): {cure}") from None
    if action.shape != (2, *data.spec.action_space.shape):
        raise ValueError(
            f"{about}: its actions have shape {action.shape[1:]}, the data's {data.spec.action_space.shape}: {cure}"
        )


def rate(policies: Mapping[str, Any], data: Transitions, fqe: FQE, verbose: int = 0) -> list[Rated]:
    """All signals of policies on the data that `fqe` was made of. One that gives NaN somewhere is not trusted."""
    rows = some_rows(len(data), BC_ROWS, torch.Generator().manual_seed(fqe.config.seed + 1))
    asked = [fqe.next_obs, fqe.start_obs, data.obs[rows]]
    actions: dict[str, np.ndarray] = {}
    rated: list[Rated] = []
    for name, policy in policies.items():
        started = time.perf_counter()
        try:
            actions[name] = actions_of(policy, torch.cat(asked), data.spec)
        except RuntimeError as error:
            nan = math.nan
            rated.append(Rated(name, nan, (nan, nan), (), nan, nan, nan, trusted=False, notes=(str(error),)))
        if verbose:
            print(f"{name} acted in {sum(map(len, asked)):,} states in {time.perf_counter() - started:.1f} s", flush=True)
    if not actions:
        return rated
    if verbose:
        print(f"fitting {len(actions)} estimates by {fqe.config.steps:,} updates", flush=True)
    scaled = torch.stack([_scaled(action, data.spec) for action in actions.values()])  # (P, rows, A)
    next_act, start_act, act = torch.split(scaled, [len(some) for some in asked], 1)
    distances = (act - _scaled(data.action[rows].numpy(), data.spec)).square().mean((1, 2)).tolist()
    neighbours = _Neighbours(data, rows, fqe.config.seed)
    for k, (name, found, distance) in enumerate(zip(actions, fqe.fit(next_act, start_act), distances, strict=True)):
        values = found.values.double().mean(0).numpy()  # of each first state
        interval = bootstrap(values)
        off_data = neighbours.off_data(act[k])
        trusted, notes = _judge(found, interval, off_data, fqe.config)
        own = _own_q(policies[name], data, rows, actions[name][-len(rows) :])
        rated.append(
            Rated(
                name=name,
                fqe=float(values.mean()),
                interval=interval,
                fqe_seeds=tuple(found.values.mean(1).tolist()),
                drift=found.drift,
                off_data=off_data,
                bc_loss=distance,
                q_mean=own.q_mean,
                data_return=own.data_return,
                trusted=trusted,
                notes=(*notes, *own.notes),
            )
        )
    return rated


def _judge(found: FQEResult, interval: tuple[float, float], off_data: float, config: FQEConfig) -> tuple[bool, list[str]]:
    """Whether the estimate can be believed, and what is to be said of it."""
    if not found.values.isfinite().all() or found.clipped > RAN_AWAY:
        share = f"{100 * found.clipped:.0f} % of its targets lay beyond what rewards allow"
        return False, [f"the estimate diverged ({share}): it acts where the data tell nothing, or gamma is too large"]
    if off_data > OFF_DATA:
        return False, [
            f"it acts {off_data:.3g} times further from the data than the data's own actions lie: its fqe is a guess"
        ]
    if abs(found.drift) > max(interval[1] - interval[0], SETTLED * abs(float(found.values.mean()))):
        return True, [
            f"the estimate still moves ({found.drift:+.3g} in the last quarter): take more than {config.steps:,} steps"
        ]
    return True, []


class _Neighbours:
    """What the data did in states like those of `rows` (Q,): actions (Q, K, A) of the K most similar of some other states."""

    def __init__(self, data: Transitions, rows: Tensor, seed: int) -> None:
        normalizer = ObsNormalizer(data.spec.obs_dim).fit(data.obs)
        others = some_rows(len(data), NEIGHBOUR_ROWS, torch.Generator().manual_seed(seed + 2))
        obs, act = normalizer(data.obs[others]), _scaled(data.action[others].numpy(), data.spec)
        k, parts = min(N_NEIGHBOURS, max(1, len(others) - 1)), []
        for some in torch.split(rows, ROWS_AT_ONCE):
            distance = torch.cdist(normalizer(data.obs[some]), obs)
            distance[some[:, None] == others] = torch.inf  # an action is no witness for itself
            parts.append(act[distance.topk(k, largest=False).indices])
        self.actions = torch.cat(parts)
        self.own = max(self._distance(_scaled(data.action[rows].numpy(), data.spec)), 1e-4)  # 1 % of half the range at least

    def _distance(self, act: Tensor) -> float:
        """Mean squared distance of (Q, A) to the nearest of the actions."""
        return float((self.actions - act[:, None]).square().mean(-1).amin(-1).mean())

    def off_data(self, act: Tensor) -> float:
        return math.sqrt(self._distance(act) / self.own)


@dataclass(frozen=True)
class _Own:
    q_mean: float | None = None
    data_return: float | None = None
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def _own_q(agent: Any, data: Transitions, rows: Tensor, action: np.ndarray) -> _Own:
    """The mean of the agent's own critic at `action` in the states of `rows`, and the data's return from there.

    Empty for what has no critic of actions: DiffusionBC, AWR (whose critic values the data's policy), policies not of ours.
    """
    name = "critic_target" if hasattr(agent, "critic_target") else "critic"
    critic = getattr(agent, name, None)
    if not isinstance(critic, IQLCritic | EnsembleMLP | ReturnCritic):
        return _Own()
    if name not in agent.MODEL and not agent.has_learner:
        return _Own(notes=["loaded to act only, without its critic: q_mean is unknown"])
    flat = agent.spec.flatten_obs(_observation(data.obs[rows], data.spec))[0]
    obs = agent.obs_normalizer(torch.from_numpy(flat).to(agent.device))
    act = _scaled(action, agent.spec).to(agent.device)
    if isinstance(critic, ReturnCritic):  # learns standardised returns
        q = critic.mean + critic.std * critic(obs, act)
    elif isinstance(critic, IQLCritic):
        q = critic.q_target(torch.cat([act, obs], -1)).amin(0)
    else:
        q = critic(torch.cat([obs, act], -1)).amin(0)
    transform, gamma = agent.reward_transform or RewardTransform(), agent.config.gamma
    returns = discounted_returns(data, gamma, transform)[rows]
    rewards = transform(data.rew)
    most = max(float(rewards.max()), 0.0 if data.done.any() else -math.inf) / (1.0 - gamma)
    q_mean, highest = float(q.mean()), most / transform.scale
    notes = []
    if not q_mean <= most:
        notes.append(
            f"its critic promises {q_mean / transform.scale:.4g}, more than rewards allow ({highest:.4g}): it diverged"
        )
    return _Own(q_mean / transform.scale, float(returns.mean()) / transform.scale, notes)


# ---- the policy as it is deployed ------------------------------------------------------------------------------------
def actions_of(policy: Any, obs: Tensor, spec: Spec) -> np.ndarray:
    """`predict(obs, deterministic=True)` for flat observations (n, S) of `spec`: (n, *action shape), environment units."""
    parts = []
    for some in torch.split(obs, ROWS_AT_ONCE):
        action = np.asarray(policy.predict(_observation(some, spec), deterministic=True)[0])
        if not np.isfinite(action).all():
            raise RuntimeError("the policy's actions are not finite numbers")
        parts.append(action)
    return np.concatenate(parts)


def _observation(obs: Tensor, spec: Spec) -> Any:
    """Flat observations (n, S) as the environment gives them: an array, or a dict of arrays by key."""
    if spec.obs_keys is None:
        return obs.numpy().reshape(len(obs), *spec.observation_space.shape)  # type: ignore[misc]
    shapes = {key: spec.observation_space[key].shape for key in spec.obs_keys}  # type: ignore[index]
    parts = torch.split(obs, [math.prod(shape) for shape in shapes.values()], 1)
    return {key: part.numpy().reshape(len(obs), *shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}


def _scaled(action: np.ndarray, spec: Spec) -> Tensor:
    return torch.from_numpy(spec.scale_action(action))
