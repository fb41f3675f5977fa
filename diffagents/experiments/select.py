"""`select`: choose among several policies from data alone; episodes in an environment decide only on request.

The signals of a policy, all of its deterministic actions:
  gain          how much better than the data's its actions are by the returns of the data (one_step.py), in standard deviations
  loss_on_best  mean squared distance, over dimensions, between its actions and the data's, both in [-1, 1], in rows of the best
                episodes: drawn in proportion to exp(z / 0.1), z the episode's return scaled to [0, 1]
  off_data      distance of its actions to the nearest actions of the data in similar states, relative to the same distance of
                the data's own actions: about 1 or less near the data. If it is large, the data say nothing about what the
                policy does, and every estimate is an extrapolation: the policy ranks behind all others
  agreement     the share of the other policies that it beats, averaged over the three signals above: 1 if it is the best by
                each of them. The default order
  bc_loss       as loss_on_best, in all rows alike
  q_mean        the value that its own critic gives its actions, to compare with data_return from the same states: a critic that
                promises many times what the data ever obtained is overestimating
  fqe           only for rule="fqe": fitted Q evaluation (fqe.py), the discounted return of raw reward
EVIDENCE says how well each of them ranked policies whose returns were known. They do not predict the return.
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
from diffagents.config.checks import check_choice, find_device, whole_number
from diffagents.data.load import load_dataset
from diffagents.data.normalize import ObsNormalizer, RewardTransform
from diffagents.data.transitions import Transitions
from diffagents.evaluation.evaluate import Evaluation, evaluate
from diffagents.evaluation.statistics import mean_interval
from diffagents.experiments.fqe import FQE, FQEConfig, FQEResult, discounted_returns, some_rows
from diffagents.experiments.one_step import OneStep, OneStepConfig
from diffagents.networks.critics import IQLCritic, ReturnCritic
from diffagents.networks.mlp import EnsembleMLP
from diffagents.types import Spec

ROWS_AT_ONCE = 256  # observations per call of `predict`: a diffusion policy multiplies them by its candidates
ROWS = 2000  # rows of data, at most, for all signals but fqe; as many again for loss_on_best
BEST = 0.1  # temperature of the returns in loss_on_best
N_NEIGHBOURS = 50  # similar states for off_data
NEIGHBOUR_ROWS = 20_000  # at most so many rows of data in which they are searched
OFF_DATA = 2.5
"""From this off_data on, an estimate is not trusted. At the corners of uniformly random actions, which such data do cover, it
is 2 for any number of dimensions A: the data lie on one side only, with a density of 2^-A."""
MAX_CLIPPED = 0.05  # from this share of clipped targets on, an estimate counts as diverged
SETTLED = 0.05  # relative change in the last quarter of the fit below which an estimate counts as converged

RULES = {"agreement": True, "gain": True, "loss_on_best": False, "off_data": False, "bc_loss": False, "fqe": True}
"""What may determine the order -> whether larger is better."""
AGREE = ("gain", "loss_on_best", "off_data")
"""The signals of the agreement."""
EVIDENCE: dict[str, tuple[float, float]] = {
    "agreement": (0.82, 4),
    "gain": (0.07, 86),
    "loss_on_best": (0.65, 3),
    "off_data": (0.60, 18),
    "bc_loss": (0.30, 40),
    "fqe": (-0.03, 70),
}
"""Rule -> mean over four datasets of Spearman's rank correlation with the true return, and of the regret of its first policy
in per cent of the range of returns; `python zoo/benchmarks/selection.py table` prints both."""


@dataclass(frozen=True)
class Rated:
    """The signals of one policy.

    Attributes:
        name: name of the policy.
        agreement: share of the other policies that it beats, in [0, 1], averaged over the signals of AGREE; NaN if it has none.
        gain: improvement over the data's actions, in standard deviations of the data's discounted returns.
        loss_on_best: mean squared distance between its actions and those of the best episodes, both in [-1, 1].
        off_data: relative distance of its actions to those of the data.
        bc_loss: mean squared distance between its actions and the data's, both in [-1, 1].
        gain_of_networks: the gain by each network of the estimate.
        q_mean: mean value of its own critic at its actions, with the agent's own discount, in units of the reward that it
            trained on divided by the scale of its transform (a shift remains); None without such a critic.
        data_return: discounted return of the data from the same states, in the same units; None without such a critic.
        fqe: estimated discounted return of raw reward by fitted Q evaluation; None unless that is the rule.
        interval: 95 % interval of `fqe` by Student's t over the first states of the data, without the error of the fit.
        fqe_seeds: `fqe` of each fit.
        drift: change of `fqe` in the last quarter of the fit.
        trusted: False if an estimate diverged or concerns actions far from the data, as `notes` say; such policies rank last.
        notes: remarks on the estimates.
        evaluation: the episodes that were played; None if there were none.
    """

    name: str
    agreement: float = math.nan
    gain: float = math.nan
    loss_on_best: float = math.nan
    off_data: float = math.nan
    bc_loss: float = math.nan
    gain_of_networks: tuple[float, ...] = ()
    q_mean: float | None = None
    data_return: float | None = None
    fqe: float | None = None
    interval: tuple[float, float] | None = None
    fqe_seeds: tuple[float, ...] = ()
    drift: float | None = None
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
        rows: one row per policy, sorted by `rule`, best first; policies that are not trusted come last.
        rule: the signal that determines the order.
        dataset: id of the dataset.
        config: settings of the one-step estimate.
        fqe_config: settings of the fitted Q evaluation; None unless that is the rule.
        n_transitions: number of transitions in the dataset.
        seconds: how long the selection took.
        n_env_episodes: environment episodes that were played.
    """

    rows: tuple[Rated, ...]
    rule: str
    dataset: str
    config: OneStepConfig
    fqe_config: FQEConfig | None
    n_transitions: int
    seconds: float
    n_env_episodes: int = 0

    @property
    def order(self) -> list[str]:
        """Names in the order of `rows`, best first."""
        return [row.name for row in self.rows]

    @property
    def best(self) -> str:
        """Name of the best policy: by return among those that played episodes, if any did, else by the rule."""
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
        configs = {name: c and dataclasses.asdict(c) for name, c in (("config", self.config), ("fqe_config", self.fqe_config))}
        report = {**vars(self), "best": self.best, "order": self.order, "rows": rows, **configs}
        return json.loads(json.dumps(report, default=list), parse_constant=lambda _: None)

    def __str__(self) -> str:
        signals = [rule for rule in RULES if rule != "fqe" or self.rule == "fqe"]
        table = [["policy", *signals, "q_ratio", *(["return"] if self.n_env_episodes else [])]]
        table += [self._cells(row, signals) for row in self.rows]
        known = [f"{EVIDENCE[rule][0]:.2f}" for rule in signals]
        table.append(["rank correlation", *known, *[""] * (len(table[0]) - len(known) - 1)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join([c[0].ljust(widths[0]), *map(str.rjust, c[1:], widths[1:])]).rstrip() for c in table]
        lines += [f"{row.name}: {note}" for row in self.rows for note in row.notes]
        rho, regret = EVIDENCE[self.rule]
        lines.append(
            f"in the order of {self.rule}: on four datasets with policies of known return its rank correlation with it was "
            f"{rho:.2f} on average, and its first policy lost {regret:.0f} % of the range of returns"
        )
        lines.append(
            f"from {self.n_transitions:,} transitions of {self.dataset}; for ranking only, no prediction of the return"
        )
        lines.append(f"best: {self.best}; {self.n_env_episodes} environment episodes used")
        return "\n".join(lines)

    def _cells(self, row: Rated, signals: Sequence[str]) -> list[str]:
        numbers = [*(getattr(row, signal) for signal in signals), row.q_ratio]
        if self.n_env_episodes:
            numbers.append(row.evaluation.mean_return if row.evaluation is not None else None)
        mark = "" if row.trusted else " (not trusted)"
        return [row.name + mark, *("-" if x is None else f"{x:.4g}" for x in numbers)]


def select(
    agents: Mapping[str, Any] | Sequence[Any],
    dataset: Any,
    *,
    rule: str = "agreement",
    gamma: float = OneStepConfig.gamma,
    steps: int = OneStepConfig.steps,
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
        rule: the signal that determines the order, one of RULES: "agreement", "gain", "loss_on_best", "off_data", "bc_loss" or
            "fqe". `diffagents.experiments.select.EVIDENCE` says how well each has done.
        gamma: discount factor of the estimates.
        steps: gradient steps of the one-step estimate, which is made once for all policies.
        fqe_steps: gradient steps of the fitted Q evaluation, only for rule="fqe".
        n_seeds: number of its fits per policy; with 2 or more it is pessimistic where they disagree.
        max_transitions: it uses at most so many transitions, drawn once for all policies.
        seed: seed of the estimates, and of the first episode.
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
    check_choice("rule", rule, tuple(RULES))
    config = OneStepConfig(gamma=gamma, steps=steps, seed=seed)
    fqe_config = FQEConfig(gamma=gamma, steps=fqe_steps, n_seeds=n_seeds, max_transitions=max_transitions, seed=seed)
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

    started, place = time.perf_counter(), find_device(device)
    if verbose:
        print(f"fitting the one-step estimate in {steps:,} steps", flush=True)
    fqe = FQE(data, fqe_config, place) if rule == "fqe" else None
    rows = rate(policies, data, OneStep(data, config, place), fqe, verbose)
    rows.sort(key=lambda row: (not row.trusted, -goodness(row, rule)))
    for k, row in enumerate(rows[: top if n_episodes else 0]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about action bounds: training has warned already
            played = evaluate(policies[row.name], where, n_episodes, seed=seed, deterministic=True)
        rows[k] = dataclasses.replace(row, evaluation=played)
    n_played = sum(len(row.evaluation.returns) for row in rows if row.evaluation is not None)
    return Selection(
        rows=tuple(rows),
        rule=rule,
        dataset=str(data.info["id"]),
        config=config,
        fqe_config=fqe_config if fqe is not None else None,
        n_transitions=len(data),
        seconds=time.perf_counter() - started,
        n_env_episodes=n_played,
    )


def goodness(row: Rated, rule: str) -> float:
    """The signal of a rule, with the sign by which larger is better; minus infinity if it is not a number."""
    value = getattr(row, rule)
    if value is None or not math.isfinite(value):
        return -math.inf
    return float(value) if RULES[rule] else -float(value)


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


def rate(
    policies: Mapping[str, Any], data: Transitions, one_step: OneStep | None, fqe: FQE | None = None, verbose: int = 0
) -> list[Rated]:
    """All signals of several policies.

    Args:
        policies: name -> policy.
        data: the dataset that the estimates were made from.
        one_step: the one-step estimate; None: the policies get no gain.
        fqe: the prepared fitted Q evaluation. Default: the policies get none.
        verbose: 0 prints nothing, 1 the progress.

    Returns:
        One row per policy. A policy whose actions are not finite somewhere is not trusted.
    """
    seed = next((estimate.config.seed for estimate in (one_step, fqe) if estimate is not None), 0)
    generator = torch.Generator().manual_seed(seed + 1)
    rows = some_rows(len(data), ROWS, generator)
    best_rows = data.sampler("cpu").prefer_returns(BEST).rows(len(rows), generator, by_return=True)
    states = [data.obs[rows], data.obs[best_rows], *([] if fqe is None else [fqe.next_obs, fqe.start_obs])]
    actions: dict[str, np.ndarray] = {}
    rated: list[Rated] = []
    for name, policy in policies.items():
        started = time.perf_counter()
        try:
            actions[name] = actions_of(policy, torch.cat(states), data.spec)
        except RuntimeError as error:
            rated.append(Rated(name, trusted=False, notes=(str(error),)))
        if verbose:
            print(f"{name} acted in {sum(map(len, states)):,} states in {time.perf_counter() - started:.1f} s", flush=True)
    if not actions:
        return rated
    scaled = torch.stack([_scaled(action, data.spec) for action in actions.values()])  # (P, all rows, A)
    act, best_act, *fqe_act = torch.split(scaled, [len(some) for some in states], 1)
    data_act, data_best_act = (_scaled(data.action[some].numpy(), data.spec) for some in (rows, best_rows))
    neighbours = _Neighbours(data, rows, seed)
    fits: Sequence[FQEResult | None] = [None] * len(actions)
    if fqe is not None:
        if verbose:
            print(f"fitting {len(actions)} estimates in {fqe.config.steps:,} steps", flush=True)
        fits = fqe.fit(*fqe_act)
    for k, name in enumerate(actions):
        gains = torch.tensor([math.nan]) if one_step is None else one_step.gain(data.obs[rows], act[k], data_act).mean(1)
        losses = [float((a - b).square().mean()) for a, b in ((act[k], data_act), (best_act[k], data_best_act))]
        off_data = neighbours.off_data(act[k])
        own = _own_q(policies[name], data, rows, actions[name][: len(rows)])
        row = Rated(
            name=name,
            gain=float(gains.mean()),
            loss_on_best=losses[1],
            off_data=off_data,
            bc_loss=losses[0],
            gain_of_networks=tuple(gains.tolist()),
            q_mean=own.q_mean,
            data_return=own.data_return,
            trusted=off_data <= OFF_DATA,
            notes=tuple(own.notes),
        )
        if not row.trusted:
            far = f"its actions lie {off_data:.3g} times further from the data than the data's own, which say nothing about it"
            row = dataclasses.replace(row, notes=(far, *row.notes))
        fit = fits[k]
        rated.append(row if fit is None or fqe is None else _with_fqe(row, fit, fqe.config))
    return [dataclasses.replace(row, agreement=share) for row, share in zip(rated, agreement(rated), strict=True)]


def agreement(rows: Sequence[Rated], by: Sequence[str] = AGREE) -> list[float]:
    """For each policy the share of the others that it beats by a signal, averaged over several signals.

    A tie counts half. Policies whose signals are not numbers are left out and get NaN; a policy alone gets 0.5.

    Args:
        rows: the policies.
        by: names of signals, keys of RULES.
    """
    signals = np.array([[goodness(row, signal) for signal in by] for row in rows]).reshape(len(rows), len(by))
    known = np.isfinite(signals).all(1)
    others, shares = signals[known], np.full(len(rows), math.nan)
    ahead = (signals[known, None] > others).sum(1) + 0.5 * ((signals[known, None] == others).sum(1) - 1)  # but for itself
    shares[known] = ahead.mean(-1) / (len(others) - 1) if len(others) > 1 else 0.5
    return [float(share) for share in shares]


def _with_fqe(row: Rated, result: FQEResult, config: FQEConfig) -> Rated:
    """The row with the estimate and remarks on it."""
    values = result.values.double().mean(0).numpy()  # one per first state
    interval = mean_interval(values) or (math.nan, math.nan)  # of a single first state
    notes, diverged = list(row.notes), not result.values.isfinite().all() or result.clipped > MAX_CLIPPED
    if diverged:
        share = f"{100 * result.clipped:.0f} % of its targets lay outside the range that the rewards allow"
        notes.insert(0, f"fqe diverged ({share}): the policy acts where there are no data, or gamma is too large")
    elif abs(result.drift) > max(interval[1] - interval[0], SETTLED * abs(float(result.values.mean()))):
        notes.insert(
            0, f"fqe has not converged ({result.drift:+.3g} in the last quarter): use more than {config.steps:,} steps"
        )
    return dataclasses.replace(
        row,
        fqe=float(values.mean()),
        interval=interval,
        fqe_seeds=tuple(result.values.mean(1).tolist()),
        drift=result.drift,
        trusted=row.trusted and not diverged,
        notes=tuple(notes),
    )


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
