"""`tune`: search the main hyperparameter of an algorithm with Optuna, over a published range, with or without an environment.

Where the preset "fast" sets the hyperparameter, in units of its own, the range lies around that value. The default value is the
first trial unless `low` and `high` exclude it, so the result is never worse than the default as far as
the objective can tell. Stages that the hyperparameter does not affect are trained once and shared by all trials; on a CPU each
trial still equals, bit for bit, a run trained from scratch. A search with a `storage` can be interrupted: repeating the same
call continues it with the proposals that an uninterrupted search would have made.
"""

import dataclasses
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from diffagents.config.checks import check_choice, check_number, whole_number
from diffagents.config.presets import FAST, load_presets
from diffagents.data.load import load_dataset
from diffagents.data.transitions import Transitions
from diffagents.errors import TrainingDiverged, one_line, printable, short
from diffagents.evaluation.evaluate import evaluate
from diffagents.experiments.fqe import FQE, FQEConfig
from diffagents.experiments.one_step import OneStep, OneStepConfig
from diffagents.experiments.select import AGREE, Rated, agreement, goodness, rate
from diffagents.registry import agent_class
from diffagents.training import prepare
from diffagents.training.plan import Plan

if TYPE_CHECKING:
    import optuna

    from diffagents.agent import Agent

OBJECTIVES = ("agreement", "fqe", "return")
FACTOR = 5.0
"""How far the range around a value of the preset "fast" reaches on either side."""
N_RANDOM = 4  # random trials before the sampler uses their scores; a single dimension needs no more


@dataclass(frozen=True)
class SearchRange:
    """A hyperparameter and the range in which to search it.

    Attributes:
        name: a field of the algorithm's `Config`.
        low: the smallest value, inclusive.
        high: the largest value, inclusive.
        log: whether to search evenly in the logarithm of the value.
        source: where the range comes from.
        stages: the training stages that the hyperparameter affects; all trials share the other stages. Empty if it only
            affects how the policy acts.
        needs: hyperparameters without which it has no effect, for a preset that switches it off.
    """

    name: str
    low: float
    high: float
    log: bool
    source: str
    stages: tuple[str, ...]
    needs: Mapping[str, Any] = field(default_factory=dict)


MAIN_HYPERPARAMETER: dict[str, SearchRange] = {
    "SRPO": SearchRange(
        "beta", 0.01, 0.5, True, "arXiv:2310.07297: its sweep on locomotion, which contains Table 2", ("policy",)
    ),
    "DiffusionQL": SearchRange("eta", 0.005, 4.5, True, "official code: kitchen .005 to antmaze-large 4.5", ("train",)),
    "DiffCPS": SearchRange("target_kl", 0.03, 0.3, True, "official code: locomotion .03 to AntMaze .3", ("train",)),
    "BDPO": SearchRange("eta", 0.05, 1.0, True, "flow-rl, its authors' code: halfcheetah .05 to antmaze-large 1", ("train",)),
    "QGPO": SearchRange("guidance_scale", 0.0, 10.0, False, "official code: swept 0 to 10 at evaluation", ()),
    "SfBC": SearchRange("alpha", 1.0, 100.0, True, "official code: 20 everywhere; the range is ours", ("planning",)),
    "IDQL": SearchRange(
        "n_candidates", 16, 256, True, "arXiv:2304.10573: its sweep 16, 64, 256", (), needs={"select": "argmax"}
    ),
    "IQL": SearchRange("beta", 0.5, 10.0, True, "official code: adroit and kitchen .5, locomotion 3, AntMaze 10", ("train",)),
    "TD3BC": SearchRange("alpha", 1.0, 4.0, False, "arXiv:2106.06860: 2.5 everywhere; the range is ours", ("train",)),
    "AWR": SearchRange("temperature", 0.1, 10.0, True, "official code: 1; the range is ours", ("policy",)),
}
"""Algorithm -> its main hyperparameter. Pure behaviour cloning has none."""


@dataclass(frozen=True)
class Trial:
    """One value of the hyperparameter.

    Attributes:
        value: the value that was tried.
        score: its score by the objective; None if the trial failed.
        seconds: how long training and scoring took.
        note: why the trial failed; otherwise empty.
    """

    value: float
    score: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class TuningReport:
    """The result of `tune`: `print` shows a table, `to_json` returns it for a file.

    Attributes:
        algorithm: name of the algorithm.
        hyperparameter: name of the hyperparameter that was searched.
        value: its best value.
        score: the score of that value by the objective.
        agent: the agent trained with that value.
        trials: all trials, in the order in which they were made.
        objective: "agreement", "fqe" or "return".
        source: where the range comes from.
        n_env_episodes: environment episodes played in all, including those of earlier calls with the same storage.
    """

    algorithm: str
    hyperparameter: str
    value: float
    score: float
    agent: "Agent"
    trials: tuple[Trial, ...]
    objective: str
    source: str
    n_env_episodes: int

    @property
    def knob(self) -> str:
        """The old name of `hyperparameter`, which warns."""
        warnings.warn("TuningReport.knob is now called hyperparameter; the old name still works", UserWarning, stacklevel=2)
        return self.hyperparameter

    def to_json(self) -> dict[str, Any]:
        """Everything except the agent, as plain JSON types."""
        rest = {name: value for name, value in vars(self).items() if name != "agent"}
        return {**rest, "trials": [dataclasses.asdict(trial) for trial in self.trials]}

    def __str__(self) -> str:
        lines = [f"{self.hyperparameter:>14}  {self.objective:>10}  seconds"]
        for trial in self.trials:
            score = "-" if trial.score is None else f"{trial.score:.4g}"
            mark = "  <- best" if (trial.value, trial.score) == (self.value, self.score) else ""
            note = f"  {trial.note}" if trial.note else ""
            lines.append(f"{trial.value:>14.4g}  {score:>10}  {trial.seconds:>7.0f}{mark}{note}")
        meaning = {
            "agreement": "share of the other trials that it beats by three signals of the data, for ranking only",
            "fqe": "discounted return estimated from the data, for ranking only",
            "return": "mean return of episodes",
        }[self.objective]
        lines.append(f"{self.algorithm} {self.hyperparameter}, range from {self.source}; {self.objective}: {meaning}")
        lines.append(f"best: {self.hyperparameter}={self.value:.4g}; {self.n_env_episodes} environment episodes used")
        return "\n".join(lines)


def tune(
    algorithm: Any,
    dataset: Any,
    *,
    n_trials: int = 10,
    hyperparameter: str | None = None,
    low: float | None = None,
    high: float | None = None,
    log: bool | None = None,
    objective: str = "agreement",
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
    """Train with several values of one hyperparameter, including its default, and return the best agent and all trials.

    A trial fails, without ending the search, if its training diverges or its estimate is not trusted.

    Args:
        algorithm: name or class of the algorithm.
        dataset: anything that `load_dataset` reads.
        n_trials: number of trials in all, including those already in `storage`.
        hyperparameter: the one to search. Default: the entry of `MAIN_HYPERPARAMETER` for the algorithm.
        low: lower end of the range; required, like `high`, for a hyperparameter without a known range. Default: as published;
            a fifth of the value if the preset "fast" sets it (`high`: five times the value).
        high: upper end of the range.
        log: whether to search evenly in the logarithm. Default: as in `MAIN_HYPERPARAMETER`, else True if `low` is positive.
        objective: "agreement" and "fqe" are rules of `select` and need no environment; "return" plays `n_episodes` in `env` for
            each trial and counts them. For "agreement", which compares all trials at the end, the values are spread evenly over
            the range; for the others, Optuna proposes them by the scores.
        steps: gradient steps of one agent, split over its stages as `learn(total_timesteps)` does. Default: the algorithm's
            own budget.
        env: environment, or its id, for `objective="return"`. Default: the dataset's own.
        n_episodes: episodes per trial for `objective="return"`.
        fqe: settings for `objective="fqe"`, fields of `FQEConfig`, for example {"gamma": 0.995}.
        storage: a file for Optuna's journal, or a URL such as sqlite:///tuning.db. The same call then continues the search;
            the best agent of an earlier call is trained again.
        seed: seed of the search, the agents and the estimate.
        device: where to train: "auto", "cpu", "cuda", ...
        verbose: 0 prints nothing, 1 a line per trial, 2 also the training logs.
        **settings: arguments of the algorithm's constructor, including other hyperparameters.

    Returns:
        The report; `report.agent` is trained with `report.value`.

    Raises:
        ImportError: if Optuna is not installed.
        ValueError, TypeError: before any training, for invalid arguments, or if `storage` contains a different search.
        RuntimeError: if every trial failed.
    """
    if "knob" in settings:
        warnings.warn("tune: `knob` is now called `hyperparameter`; the old name still works", UserWarning, stacklevel=2)
        old_name = settings.pop("knob")
        hyperparameter = old_name if hyperparameter is None else hyperparameter
    optuna = _optuna()
    name = algorithm if isinstance(algorithm, str) else getattr(algorithm, "__name__", "")
    cls, found = agent_class(name), _search_range(name, hyperparameter, low, high, log)
    whole_number("n_trials", n_trials, 1)
    whole_number("n_episodes", n_episodes, 1)
    check_choice("objective", objective, OBJECTIVES)
    fqe_config = FQEConfig(**{"seed": seed, **(fqe or {})})
    if steps is not None:
        plan = Plan.split(whole_number("steps", steps, 1, " of gradient steps"), cls.STAGE_SHARES)
        settings |= {f"{stage}_steps": n for stage, n in plan.items()}
    settings.setdefault("preset", FAST)
    if settings["preset"] == FAST:
        settings = {**found.needs, **settings}
    base: Agent = cls(env=env, seed=seed, device=device, verbose=max(0, verbose - 1), **settings)
    found = _around_fast(found, base, low, high, log)
    check_number("low", found.low, "must be positive for log=True", lambda x: x > 0 or not found.log)
    check_number("high", found.high, f"must be above low={found.low:g}", lambda x: x > found.low)
    data = load_dataset(dataset, env=env, obs_keys=None if isinstance(dataset, Transitions) else base.obs_keys)
    where = env if env is not None else data.info.get("env_spec")
    if objective == "return" and where is None:
        raise ValueError(f'objective="return" plays episodes, but no environment is stored with {data.info["id"]}: pass env=')
    trainer = _Trainer(base, data, found)
    # The keys are stored with the search: they keep their names so that older storages can be continued.
    about = {
        **{"algorithm": name, "objective": objective, "seed": seed, "steps": steps, "dataset": data.info["sha256"]},
        **{"knob": found.name, "low": found.low, "high": found.high, "log": found.log},
        **{"settings": repr(sorted(settings.items())), "fqe": repr(fqe_config), "n_episodes": n_episodes},
    }
    study = _study(optuna, storage, about, found.name)
    one_step = OneStep(data, OneStepConfig(seed=seed), base.device) if objective == "agreement" else None
    evaluation = FQE(data, fqe_config, base.device) if objective == "fqe" else None

    def score(agent: "Agent") -> tuple[float, dict[str, float]]:
        """The score, and for the agreement, which is known at the end only, the signals that it is made of."""
        if objective == "return":
            return evaluate(agent, where, n_episodes, seed=seed).mean_return, {}
        (rated,) = rate({"it": agent}, data, one_step, evaluation)
        if not rated.trusted:
            raise TrainingDiverged("; ".join(rated.notes))
        return goodness(rated, objective), {name: getattr(rated, name) for name in AGREE} if objective == "agreement" else {}

    agents: dict[float, Agent] = {}  # of this call, by value: for the agreement all of them, else the best
    for n_done in range(len(_finished(study)), n_trials):
        # A proposal depends only on the finished trials, so that an interrupted search continues as if it had not been.
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=N_RANDOM, seed=seed + n_done)
        if not _propose_default(study, found, trainer.default) and objective == "agreement":
            _propose_evenly(study, found, n_done, whole=isinstance(trainer.default, int))
        trial = study.ask()
        value = trainer.suggest(trial)
        started, result, note = time.perf_counter(), None, ""
        try:
            agent = trainer.train(value)
            result, signals = score(agent)
            trial.set_user_attr("signals", signals)
            if objective == "agreement":
                agents[value] = agent
            elif not agents or result > study.best_value:
                agents = {value: agent}
        except TrainingDiverged as error:
            if trainer.shared is None:
                raise  # a shared stage diverged, so every trial would
            note = str(error)
        trial.set_user_attr("seconds", time.perf_counter() - started)
        trial.set_user_attr("note", note)
        study.tell(trial, result, optuna.trial.TrialState.FAIL if result is None else optuna.trial.TrialState.COMPLETE)
        if verbose:
            shown = signals or {objective: result} if result is not None else {}
            about_it = note or ", ".join(f"{name} {number:.4g}" for name, number in shown.items())
            print(f"{found.name}={value:.4g}: {about_it} ({n_done + 1}/{n_trials})", flush=True)

    finished = _finished(study)
    scores = {done.number: done.value for done in finished if done.value is not None}
    if objective == "agreement":
        rows = [Rated(str(done.number), **done.user_attrs["signals"]) for done in finished if done.number in scores]
        scores = dict(zip(scores, agreement(rows), strict=True))
    trials = tuple(
        Trial(done.params[found.name], scores.get(done.number), done.user_attrs["seconds"], printable(done.user_attrs["note"]))
        for done in finished
    )
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        raise RuntimeError(f"all {len(trials)} trials failed; the last one: {trials[-1].note}")
    best = max(scored, key=lambda trial: trial.score)  # type: ignore[arg-type, return-value]  # the first of equals
    return TuningReport(
        algorithm=name,
        hyperparameter=found.name,
        value=best.value,
        score=best.score,  # type: ignore[arg-type]
        agent=agents[best.value] if best.value in agents else trainer.train(best.value),
        trials=trials,
        objective=objective,
        source=found.source,
        n_env_episodes=n_episodes * len(scored) if objective == "return" else 0,
    )


class _Trainer:
    """Trains agents that differ in one hyperparameter, on the same data and from the same initial state."""

    def __init__(self, base: "Agent", data: Transitions, searched: SearchRange) -> None:
        """Raises whatever the algorithm raises for these data or for the ends of the range."""
        self.base, self.searched = base, searched
        self.data = prepare.adopt(base, data)  # resolves the preset too, which may set the hyperparameter
        self.default = getattr(base.config, searched.name)
        for value in (searched.low, searched.high):
            self._clone(base, value)
        self.shared: Agent | None = None  # after the stages that the hyperparameter does not affect

    def train(self, value: float) -> "Agent":
        stages = self.searched.stages
        if self.shared is None:
            earlier = tuple(stage for stage in self.base.STAGE_SHARES if stage not in stages)
            self.shared = self.base.learn(self.data, stages=earlier) if earlier else self.base
        agent = self._clone(self.shared, value)
        return agent.learn(self.data, stages=stages) if stages else agent

    def suggest(self, trial: "optuna.Trial") -> float:
        name, low, high, log = self.searched.name, self.searched.low, self.searched.high, self.searched.log
        if isinstance(self.default, int):
            return trial.suggest_int(name, round(low), round(high), log=log)
        return trial.suggest_float(name, low, high, log=log)

    def _clone(self, agent: "Agent", value: float) -> "Agent":
        changed: dict[str, Any] = {self.searched.name: value}
        return agent.clone(**changed)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ImportError("tune needs Optuna: pip install optuna") from None
    return optuna


def _search_range(algorithm: str, name: str | None, low: float | None, high: float | None, log: bool | None) -> SearchRange:
    """The table's range, overridden by the arguments that are not None."""
    cls: Any = agent_class(algorithm)
    main = MAIN_HYPERPARAMETER.get(algorithm)
    names = {field.name for field in dataclasses.fields(cls.Config)}
    if name is not None and name not in names:
        raise TypeError(f"{algorithm} has no hyperparameter {name!r}. Valid: {', '.join(sorted(names))}")
    if name is None and main is None:
        raise ValueError(f"{algorithm} has no main hyperparameter: pass hyperparameter=, low= and high=")
    if main is None or name not in (None, main.name):
        if low is None or high is None:
            raise ValueError(f"there is no published range for {name!r} of {algorithm}: pass low= and high=")
        main = SearchRange(str(name), low, high, low > 0, "the call", tuple(cls.STAGE_SHARES))
    elif (low, high) != (None, None):
        main = dataclasses.replace(main, source=f"the call ({main.source})")
    return dataclasses.replace(
        main,
        low=main.low if low is None else low,
        high=main.high if high is None else high,
        log=main.log if log is None else log,
    )


def _around_fast(searched: SearchRange, agent: "Agent", low: float | None, high: float | None, log: bool | None) -> SearchRange:
    """The range of an agent with the preset "fast", as far as the call leaves it open.

    What the preset sets is in other units than the published range: the range is a factor around the value. A count has no
    unit: its range is only extended to the value.
    """
    given = low is not None and high is not None
    if given or agent.preset != FAST or searched.name not in load_presets(agent.presets_name())[FAST]:
        return searched
    value, count = getattr(agent.config, searched.name), isinstance(getattr(agent.config, searched.name), int)
    ends = (min(searched.low, value), max(searched.high, value)) if count else (value / FACTOR, value * FACTOR)
    return dataclasses.replace(
        searched,
        low=ends[0] if low is None else low,
        high=ends[1] if high is None else high,
        log=True if log is None else log,
        source=f"{searched.source}; and {value}" if count else f"the value {value:g}, a factor of {FACTOR:g} either way",
    )


def _study(optuna: Any, storage: str | None, about: dict[str, Any], name: str) -> "optuna.Study":
    """The study in `storage`, created if there is none.

    Raises:
        ValueError: It was created with other settings, or is damaged.
    """
    if storage is None:
        return _opened(optuna, None)
    try:
        study = _opened(optuna, storage)
        stored = study.user_attrs.get("about")
        if not isinstance(stored, dict | None):
            raise TypeError("its settings are no mapping")
        for trial in _finished(study):
            _check_trial(trial, name if stored is None else stored.get("knob", name))
    except (OSError, ImportError):
        raise  # no permission, no such folder, no driver of the database
    except Exception as error:  # whatever Optuna and the database raise for a file of another kind
        cause = f"{type(error).__name__}: {printable(one_line(error))[:200]}"
        raise ValueError(
            f"{storage} is damaged or not the storage of a search ({cause}): delete it, or use another storage"
        ) from None
    if stored is None:
        study.set_user_attr("about", about)
    elif different := [key for key in about if stored.get(key) != about[key]]:
        key = different[0]
        shown = "hyperparameter" if key == "knob" else key
        raise ValueError(
            f"{storage} contains a search with {shown}={short(repr(stored.get(key)))}, not {about[key]!r}: use another storage"
        )
    return study


def _check_trial(trial: Any, name: str) -> None:
    """Raise KeyError or TypeError if what a trial stores is not what `tune` stores."""
    signals = trial.user_attrs.get("signals", {})
    numbers = [trial.params[name], trial.user_attrs["seconds"], *([] if trial.value is None else [trial.value])]
    if signals and set(signals) != set(AGREE):
        raise TypeError("a trial has signals of another kind")
    numbers += signals.values()
    if not all(isinstance(number, int | float) for number in numbers) or not isinstance(trial.user_attrs["note"], str):
        raise TypeError("a trial has values of another kind")


def _opened(optuna: Any, storage: str | None) -> "optuna.Study":
    place: Any = storage
    if storage is not None and "://" not in storage:
        place = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(storage=place, study_name="diffagents", direction="maximize", load_if_exists=True)
    finally:
        optuna.logging.set_verbosity(before)
    return study


def _finished(study: "optuna.Study") -> list[Any]:
    """Trials that ended, with a score or by diverging, but not those that were interrupted."""
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "FAIL")]


def _propose_default(study: "optuna.Study", searched: SearchRange, default: Any) -> bool:
    """Make the default value the next trial unless it was tried, is queued already, or lies outside the range.

    Returns:
        Whether the next trial is queued.
    """
    tried = any(trial.params[searched.name] == default for trial in _finished(study))
    waiting = any(trial.state.name == "WAITING" for trial in study.trials)
    if tried or waiting or default is None or not searched.low <= default <= searched.high:
        return waiting
    study.enqueue_trial({searched.name: default})
    return True


def _propose_evenly(study: "optuna.Study", searched: SearchRange, n_done: int, whole: bool) -> None:
    """Make the next trial the n-th point of van der Corput's sequence over the range: 1/2, 1/4, 3/4, 1/8, ..."""
    point, unit, n = 0.0, 0.5, max(1, n_done)
    while n:
        point, unit, n = point + unit * (n % 2), unit / 2, n // 2
    value = searched.low + (searched.high - searched.low) * point
    if searched.log:
        value = searched.low * (searched.high / searched.low) ** point
    study.enqueue_trial({searched.name: round(value) if whole else value})
