"""`tune`: an algorithm's one main knob, searched by Optuna over a published range, with or without an environment.

The default of the knob is the first trial, unless `low` and `high` leave it out, so what is found is never worse than it by
the search's own measure. Stages in which the knob does nothing are trained once, and every trial goes on from there (on a CPU
to the bit as if alone). A search in a `storage` goes on where it stopped, and proposes what it would have proposed
uninterrupted.
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diffagents.config.checks import check_choice, check_number, whole_number
from diffagents.data.load import load_dataset
from diffagents.data.transitions import Transitions
from diffagents.errors import TrainingDiverged
from diffagents.evaluation.evaluate import evaluate
from diffagents.experiments.fqe import FQE, FQEConfig
from diffagents.experiments.select import rate
from diffagents.training import prepare
from diffagents.training.plan import Plan

if TYPE_CHECKING:
    import optuna

    from diffagents.agent import Agent

OBJECTIVES = ("fqe", "return")
N_RANDOM = 4  # trials after which the sampler begins to use what it saw; there is one knob only


@dataclass(frozen=True)
class Knob:
    """A knob, the range to search (log: evenly in its logarithm), and where that comes from.

    stages: those of the algorithm's stages in which it acts; the others are shared by all trials. None of them: it only says
    how the policy acts.
    """

    name: str
    low: float
    high: float
    log: bool
    source: str
    stages: tuple[str, ...]


MAIN_KNOB: dict[str, Knob] = {
    "SRPO": Knob("beta", 0.01, 0.5, True, "arXiv:2310.07297: its sweep on locomotion, which holds Table 2", ("policy",)),
    "DiffusionQL": Knob("eta", 0.005, 4.5, True, "official code: kitchen .005 to antmaze-large 4.5", ("train",)),
    "DiffCPS": Knob("target_kl", 0.03, 0.3, True, "official code: locomotion .03 to AntMaze .3", ("train",)),
    "BDPO": Knob("eta", 0.05, 1.0, True, "flow-rl, its authors' code: halfcheetah .05 to antmaze-large 1", ("train",)),
    "QGPO": Knob("guidance_scale", 0.0, 10.0, False, "official code: swept 0 to 10 at evaluation", ()),
    "SfBC": Knob("alpha", 1.0, 100.0, True, "official code: 20 everywhere; the range is ours", ("planning",)),
    "IDQL": Knob("n_candidates", 16, 256, True, "arXiv:2304.10573: its sweep 16, 64, 256", ()),
    "IQL": Knob("beta", 0.5, 10.0, True, "official code: adroit and kitchen .5, locomotion 3, AntMaze 10", ("train",)),
    "TD3BC": Knob("alpha", 1.0, 4.0, False, "arXiv:2106.06860: 2.5 everywhere; the range is ours", ("train",)),
    "AWR": Knob("temperature", 0.1, 10.0, True, "official code: 1; the range is ours", ("policy",)),
}
"""Algorithm -> its main knob. DiffusionBC has none."""


@dataclass(frozen=True)
class Trial:
    """One value of the knob. score: of the objective, None where the trial failed, as `note` then says."""

    value: float
    score: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class TuningReport:
    """What `tune` found: `print` it for a table, `to_json` for a file. `trials` in the order in which they were made."""

    algorithm: str
    knob: str
    value: float  # the best
    score: float
    agent: "Agent"  # trained with it
    trials: tuple[Trial, ...]
    objective: str
    source: str  # of the range
    n_env_episodes: int  # played in all, those of earlier calls on the same storage included

    def to_json(self) -> dict[str, Any]:
        """Everything but the agent, as plain JSON types."""
        rest = {name: value for name, value in vars(self).items() if name != "agent"}
        return {**rest, "trials": [dataclasses.asdict(trial) for trial in self.trials]}

    def __str__(self) -> str:
        lines = [f"{self.knob:>14}  {self.objective:>10}  seconds"]
        for trial in self.trials:
            score = "-" if trial.score is None else f"{trial.score:.4g}"
            mark = "  <- best" if (trial.value, trial.score) == (self.value, self.score) else ""
            note = f"  {trial.note}" if trial.note else ""
            lines.append(f"{trial.value:>14.4g}  {score:>10}  {trial.seconds:>7.0f}{mark}{note}")
        what = "discounted return estimated from the data, to rank by" if self.objective == "fqe" else "mean return of episodes"
        lines.append(f"{self.algorithm} {self.knob}, range from {self.source}; {self.objective}: {what}")
        lines.append(f"best: {self.knob}={self.value:.4g}; {self.n_env_episodes} environment episodes used")
        return "\n".join(lines)


def tune(
    algorithm: Any,
    dataset: Any,
    *,
    n_trials: int = 10,
    knob: str | None = None,
    low: float | None = None,
    high: float | None = None,
    log: bool | None = None,
    objective: str = "fqe",
    steps: int | None = None,
    env: Any = None,
    n_episodes: int = 10,
    fqe: Mapping[str, Any] | None = None,
    storage: str | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    verbose: int = 1,
    **settings: Any,
) -> TuningReport:
    """Train with several values of one knob, the default among them, and return the best agent and all trials.

    algorithm: a name or a class. dataset: anything that `load_dataset` reads.
    knob, low, high, log: None takes what MAIN_KNOB has for the algorithm; another knob needs its own low and high.
    objective: "fqe" estimates from the data, as `select` does, and uses no environment; fqe: settings of that, FQEConfig's, for
    example {"gamma": 0.995}. "return" plays n_episodes in `env` (None: the dataset's own) for each trial, and counts them.
    n_trials: how many to make in all, those in `storage` included. steps: gradient steps of one agent, split over its stages as
    `learn(total_timesteps)` does; None: the algorithm's default. settings: what the constructor takes, other knobs included.
    storage: a file (Optuna's journal), or an URL such as sqlite:///tuning.db: the same call goes on there. The best agent of
    an earlier call is trained again.
    A training that diverges, or an estimate that is not trusted, is a failed trial. Raises ImportError (no Optuna), ValueError
    and TypeError before any training; RuntimeError where every trial failed; what `learn` raises.
    """
    optuna = _optuna()
    name = algorithm if isinstance(algorithm, str) else getattr(algorithm, "__name__", "")
    cls, found = _class(name), _knob(name, knob, low, high, log)
    whole_number("n_trials", n_trials, 1)
    whole_number("n_episodes", n_episodes, 1)
    check_choice("objective", objective, OBJECTIVES)
    judge = FQEConfig(**{"seed": seed, **(fqe or {})})
    if steps is not None:
        plan = Plan.split(whole_number("steps", steps, 1, " of gradient steps"), cls.STAGE_SHARES)
        settings |= {f"{stage}_steps": n for stage, n in plan.items()}
    base: Agent = cls(env=env, seed=seed, device=device, verbose=max(0, verbose - 1), **settings)
    data = load_dataset(dataset, env=env, obs_keys=None if isinstance(dataset, Transitions) else base.obs_keys)
    where = env if env is not None else data.info.get("env_spec")
    if objective == "return" and where is None:
        raise ValueError(f'objective="return" plays episodes, but no environment is stored with {data.info["id"]}: pass env=')
    trainer = _Trainer(base, data, found)
    about = {
        **{"algorithm": name, "objective": objective, "seed": seed, "steps": steps, "dataset": data.info["sha256"]},
        **{"knob": found.name, "low": found.low, "high": found.high, "log": found.log},
        **{"settings": repr(sorted(settings.items())), "fqe": repr(judge), "n_episodes": n_episodes},
    }
    study = _study(optuna, storage, about)
    evaluation = FQE(data, judge, base.device) if objective == "fqe" else None

    def score(agent: "Agent") -> float:
        if evaluation is None:
            return evaluate(agent, where, n_episodes, seed=seed).mean_return
        (rated,) = rate({"it": agent}, data, evaluation)
        if not rated.trusted:
            raise TrainingDiverged("; ".join(rated.notes))
        return rated.fqe

    best: tuple[float, Agent] | None = None  # of this call
    for n_done in range(len(_finished(study)), n_trials):
        # Proposals depend on what is finished and on nothing else, so that a search may be interrupted.
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=N_RANDOM, seed=seed + n_done)
        _propose_default(study, found, trainer.default)
        trial = study.ask()
        value = trainer.suggest(trial)
        started, got, note = time.perf_counter(), None, ""
        try:
            agent = trainer.train(value)
            got = score(agent)
            if best is None or got > study.best_value:
                best = value, agent
        except TrainingDiverged as error:
            if trainer.shared is None:
                raise  # before the knob was asked: so would every trial
            note = str(error)
        trial.set_user_attr("seconds", time.perf_counter() - started)
        trial.set_user_attr("note", note)
        study.tell(trial, got, optuna.trial.TrialState.FAIL if got is None else optuna.trial.TrialState.COMPLETE)
        if verbose:
            print(f"{found.name}={value:.4g}: {note or f'{objective} {got:.4g}'} ({n_done + 1}/{n_trials})", flush=True)

    trials = tuple(
        Trial(done.params[found.name], done.value, done.user_attrs["seconds"], done.user_attrs["note"])
        for done in _finished(study)
    )
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        raise RuntimeError(f"all {len(trials)} trials failed, the last so: {trials[-1].note}")
    value = study.best_params[found.name]
    return TuningReport(
        algorithm=name,
        knob=found.name,
        value=value,
        score=study.best_value,
        agent=best[1] if best is not None and best[0] == value else trainer.train(value),
        trials=trials,
        objective=objective,
        source=found.source,
        n_env_episodes=n_episodes * len(scored) if objective == "return" else 0,
    )


class _Trainer:
    """Agents that differ in one knob, trained on the same data from the same start."""

    def __init__(self, base: "Agent", data: Transitions, knob: Knob) -> None:
        """Raises what the algorithm says of such data, and of the ends of the range."""
        self.base, self.knob = base, knob
        self.data = prepare.adopt(base, data)  # and so resolves the preset, which may set the knob
        self.default = getattr(base.config, knob.name)
        for value in (knob.low, knob.high):
            self._clone(base, value)
        self.shared: Agent | None = None  # after the stages in which the knob does nothing

    def train(self, value: float) -> "Agent":
        if self.shared is None:
            earlier = tuple(stage for stage in self.base.STAGE_SHARES if stage not in self.knob.stages)
            self.shared = self.base.learn(self.data, stages=earlier) if earlier else self.base
        agent = self._clone(self.shared, value)
        return agent.learn(self.data, stages=self.knob.stages) if self.knob.stages else agent

    def suggest(self, trial: "optuna.Trial") -> float:
        low, high, log = self.knob.low, self.knob.high, self.knob.log
        if isinstance(self.default, int):
            return trial.suggest_int(self.knob.name, round(low), round(high), log=log)
        return trial.suggest_float(self.knob.name, low, high, log=log)

    def _clone(self, agent: "Agent", value: float) -> "Agent":
        knobs: dict[str, Any] = {self.knob.name: value}
        return agent.clone(**knobs)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ImportError('tune needs Optuna: pip install "diffagents[tune]"') from None
    return optuna


def _class(name: str) -> Any:
    import diffagents

    if name not in diffagents.AGENTS:
        raise ValueError(f"algorithm={name!r}; choose from {', '.join(diffagents.AGENTS)}")
    return getattr(diffagents, name)


def _knob(algorithm: str, name: str | None, low: float | None, high: float | None, log: bool | None) -> Knob:
    """The range to search: the table's, with what the user gave in its place."""
    known = MAIN_KNOB.get(algorithm)
    config = {field.name for field in dataclasses.fields(_class(algorithm).Config)}
    if name is not None and name not in config:
        raise TypeError(f"{algorithm} has no knob {name!r}. Valid: {', '.join(sorted(config))}")
    if name is None and known is None:
        raise ValueError(f"{algorithm} has no main knob: give knob=, low= and high=")
    if known is None or name not in (None, known.name):
        if low is None or high is None:
            raise ValueError(f"knob={name!r} is not the main knob of {algorithm}, whose range is known: give low= and high=")
        known = Knob(str(name), low, high, low > 0, "the call", tuple(_class(algorithm).STAGE_SHARES))
    elif (low, high) != (None, None):
        known = dataclasses.replace(known, source=f"the call ({known.source})")
    found = dataclasses.replace(
        known,
        low=known.low if low is None else low,
        high=known.high if high is None else high,
        log=known.log if log is None else log,
    )
    check_number("low", found.low, "must be positive for log=True", lambda x: x > 0 or not found.log)
    check_number("high", found.high, f"must be above low={found.low:g}", lambda x: x > found.low)
    return found


def _study(optuna: Any, storage: str | None, about: dict[str, Any]) -> "optuna.Study":
    """The study in `storage`, begun where there is none. Raises ValueError where it was begun with other settings."""
    place: Any = storage
    if storage is not None and "://" not in storage:
        place = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(storage=place, study_name="diffagents", direction="maximize", load_if_exists=True)
    finally:
        optuna.logging.set_verbosity(before)
    told = study.user_attrs.get("about")
    if told is None:
        study.set_user_attr("about", about)
    elif different := [key for key in about if told.get(key) != about[key]]:
        key = different[0]
        raise ValueError(f"{storage} holds a search with {key}={told.get(key)!r}, not {about[key]!r}: give another storage")
    return study


def _finished(study: "optuna.Study") -> list[Any]:
    """Trials that ended, with a score or by diverging; one that was killed on the way is none."""
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "FAIL")]


def _propose_default(study: "optuna.Study", knob: Knob, default: Any) -> None:
    """Let the next trial be the default's, unless it was made, is waiting already, or lies outside the range."""
    made = any(trial.params[knob.name] == default for trial in _finished(study))
    waiting = any(trial.state.name == "WAITING" for trial in study.trials)
    if not made and not waiting and default is not None and knob.low <= default <= knob.high:
        study.enqueue_trial({knob.name: default})
