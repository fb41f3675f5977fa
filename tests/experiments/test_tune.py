"""tune: the default among the trials, one search through any interruption, failed trials, both objectives, shared stages."""

import functools
import json
import pathlib
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import NAMES, agent_class, fields, small
from test_select import Target
from toy import line_data

from diffagents import SRPO, TD3BC, load_dataset
from diffagents.agent import Agent
from diffagents.config.presets import load_presets
from diffagents.errors import TrainingDiverged
from diffagents.experiments import tune as tune_module
from diffagents.experiments.one_step import OneStepConfig
from diffagents.experiments.select import Rated
from diffagents.experiments.tune import MAIN_HYPERPARAMETER, _Trainer, tune
from diffagents.training.plan import Plan

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")
DATA = line_data()
TINY: dict[str, Any] = {"steps": 4, "verbose": 0, "device": "cpu", "policy_kwargs": {"net_arch": [8, 8]}, "batch_size": 8}
QUICK_FQE = {"steps": 10, "max_transitions": 60}


def quick(algorithm: Any = "TD3BC", dataset: Any = None, **arguments: Any) -> tune_module.TuningReport:
    return tune(
        algorithm,
        DATA if dataset is None else dataset,
        **{**TINY, "objective": "fqe", "fqe": QUICK_FQE, "n_trials": 3, **arguments},
    )


@pytest.fixture
def best_at_3(monkeypatch: pytest.MonkeyPatch) -> list[Agent]:
    """An estimate whose best alpha is 3; the agents that it was asked about."""
    asked: list[Agent] = []

    def rate(policies: Any, data: Any, one_step: Any, fqe: Any) -> list[Rated]:
        ((name, agent),) = policies.items()
        asked.append(agent)
        score = -((agent.config.alpha - 3.0) ** 2)
        return [Rated(name, fqe=score, gain=score, loss_on_best=0.0, off_data=1.0)]

    monkeypatch.setattr(tune_module, "rate", rate)
    return asked


def values(report: tune_module.TuningReport) -> list[float]:
    return [trial.value for trial in report.trials]


# ---- the table -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MAIN_HYPERPARAMETER)
def test_the_table_names_existing_hyperparameters_ranges_and_stages(name: str) -> None:
    searched, cls = MAIN_HYPERPARAMETER[name], agent_class(name)
    assert searched.low <= fields(name)[searched.name] <= searched.high
    assert set(searched.stages) <= set(cls.STAGE_SHARES)
    for value in (searched.low, searched.high):
        cls(**{searched.name: value}, verbose=0)
    assert list(searched.stages) == list(cls.STAGE_SHARES)[len(cls.STAGE_SHARES) - len(searched.stages) :]  # the last ones
    assert searched.source


@pytest.mark.parametrize("name", MAIN_HYPERPARAMETER)
def test_the_range_contains_the_value_of_the_preset(name: str) -> None:
    """Of the fast preset too, whose units are others: there it lies around the value. An end that the call gives is kept."""
    published, cls = MAIN_HYPERPARAMETER[name], agent_class(name)
    assert tune_module._around_fast(published, cls(preset=None), None, None, None) == published
    agent: Any = cls(preset="fast")
    value, found = getattr(agent.config, published.name), tune_module._around_fast(published, agent, None, None, None)
    assert found.low <= value <= found.high and found.stages == published.stages
    for end in (found.low, found.high):
        cls(**{published.name: end})
    if published.name not in load_presets(agent.presets_name())["fast"]:
        assert found == published
    elif isinstance(value, float):
        assert (found.low, found.high, found.log) == (value / 5, value * 5, True)
    given = tune_module._search_range(name, None, value, None, None)
    assert tune_module._around_fast(given, agent, value, None, None).low == value


def test_the_presets_value_is_the_first_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "rate", lambda policies, *_: [Rated("it", fqe=0.0)])
    alpha = TD3BC().config.alpha
    report = quick(high=alpha)  # above the published low=1 it need not lie
    assert report.trials[0].value == alpha and all(alpha / 5 <= value <= alpha for value in values(report))
    settings = {"policy_kwargs": {"net_arch": [8, 8], "behavior_width": 8}}
    report = quick("IDQL", **settings)
    assert values(report)[0] == 1 and report.agent.config.select == "argmax"  # type: ignore[attr-defined]
    assert quick("IDQL", select="softmax", n_trials=1, **settings).agent.config.select == "softmax"  # type: ignore[attr-defined]


def test_only_cloning_has_no_main_hyperparameter() -> None:
    assert set(NAMES) - set(MAIN_HYPERPARAMETER) == {"BC", "DiffusionBC"}


@pytest.mark.parametrize("name", MAIN_HYPERPARAMETER)
def test_shared_stages_end_where_a_run_of_its_own_ends(name: str) -> None:
    """Each trial's agent is what training from scratch with that value gives, to the bit."""
    searched, data = MAIN_HYPERPARAMETER[name], load_dataset(DATA)
    trainer = _Trainer(small(name, compile="eager"), data, searched)
    for share in (0.3, 0.8):  # the second goes on from what the first left behind
        value: float = searched.low + share * (searched.high - searched.low)
        value = round(value) if isinstance(fields(name)[searched.name], int) else value
        shared, alone = trainer.train(value), small(name, compile="eager", **{searched.name: value}).learn(data)
        assert getattr(shared.config, searched.name) == value
        for network, state in alone.get_parameters().items():
            for key, tensor in state.items():
                assert torch.equal(shared.get_parameters()[network][key], tensor), f"{network}.{key}"
        obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
        for deterministic in (True, False):
            ours, theirs = (agent.predict(obs, deterministic=deterministic)[0] for agent in (shared, alone))
            np.testing.assert_array_equal(ours, theirs)


def test_shared_stages_are_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[Any] = []
    original = SRPO.learn

    def learn(self: Any, *args: Any, **kwargs: Any) -> Any:
        learnt.append(kwargs.get("stages"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SRPO, "learn", learn)
    settings = {"behavior_batch_size": 8, "policy_kwargs": {"net_arch": [8, 8], "behavior_width": 8}}
    report = quick("SRPO", steps=40, **settings)
    assert learnt == [("critic", "behavior"), ("policy",), ("policy",), ("policy",)]
    assert report.agent.stage_steps == Plan.split(40, SRPO.STAGE_SHARES)


# ---- the search ------------------------------------------------------------------------------------------------------
def test_the_default_is_the_first_trial_and_the_best_agent_comes_back(best_at_3: list[Agent]) -> None:
    report = quick(preset=None, n_trials=8)
    assert values(report)[0] == 2.5 and len(set(values(report))) == 8
    assert all(1.0 <= value <= 4.0 for value in values(report))
    nearest = min(values(report), key=lambda value: abs(value - 3.0))
    assert report.value == nearest and report.score == -((nearest - 3.0) ** 2)
    assert report.agent.config.alpha == nearest and report.agent in best_at_3  # type: ignore[attr-defined]
    assert report.agent.stage_steps == {"train": 4} and report.n_env_episodes == 0


def test_a_seed_decides_the_search(best_at_3: list[Agent]) -> None:
    assert values(quick(n_trials=6)) == values(quick(n_trials=6)) != values(quick(n_trials=6, seed=1))


def test_the_users_value_of_the_hyperparameter_replaces_the_default(best_at_3: list[Agent]) -> None:
    assert values(quick(alpha=1.5, n_trials=2))[0] == 1.5
    assert all(3.0 <= value <= 4.0 for value in values(quick(preset=None, low=3.0, n_trials=2)))  # the default lies outside


@pytest.mark.parametrize("storage", ["file", "sqlite"])
def test_the_same_call_goes_on_as_if_it_had_never_stopped(best_at_3: list[Agent], tmp_path: pathlib.Path, storage: str) -> None:
    place = str(tmp_path / "search.log") if storage == "file" else f"sqlite:///{tmp_path / 'search.db'}"
    whole = quick(n_trials=7)
    n_before = len(best_at_3)
    assert values(quick(n_trials=3, storage=place)) == values(whole)[:3]
    report = quick(n_trials=7, storage=place)
    assert values(report) == values(whole) and [t.score for t in report.trials] == [t.score for t in whole.trials]
    assert len(best_at_3) == n_before + 7  # no trial was made twice
    again = quick(n_trials=7, storage=place)  # nothing to do but to train the best once more
    assert len(best_at_3) == n_before + 7 and again.value == report.value
    for key, value in again.agent.get_parameters()["policy"].items():
        assert torch.equal(value, report.agent.get_parameters()["policy"][key])


def test_the_best_agent_is_kept_or_trained_again(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Here it is always the first trial's: kept while the call lasts, trained anew for a later call that finds none better."""
    asked: list[Agent] = []

    def rate(policies: Any, data: Any, one_step: Any, fqe: Any) -> list[Rated]:
        ((name, agent),) = policies.items()
        asked.append(agent)
        return [Rated(name, fqe=float(agent.config.alpha == 2.5))]

    monkeypatch.setattr(tune_module, "rate", rate)
    place = str(tmp_path / "search.log")
    assert quick(preset=None, n_trials=3, storage=place).agent is asked[0]
    again = quick(preset=None, n_trials=4, storage=place)
    assert len(asked) == 4 and again.value == 2.5 and again.agent not in asked
    assert again.agent.config.alpha == 2.5 and again.agent.stage_steps == {"train": 4}


def test_a_trial_that_was_killed_is_made_again(
    best_at_3: list[Agent], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, original = str(tmp_path / "search.log"), TD3BC.learn

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TD3BC, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(preset=None, storage=place)
    monkeypatch.setattr(TD3BC, "learn", original)
    report = quick(preset=None, storage=place)
    assert values(report)[0] == 2.5 and values(report) == values(quick(preset=None))


def test_a_storage_of_another_search_is_refused(best_at_3: list[Agent], tmp_path: pathlib.Path) -> None:
    place = str(tmp_path / "search.log")
    quick(storage=place, n_trials=1)
    with pytest.raises(ValueError, match=r"search.log contains a search with steps=4, not 5: use another storage"):
        quick(storage=place, steps=5)
    with pytest.raises(ValueError, match="contains a search with dataset="):
        quick(dataset=line_data(seed=1), storage=place)


DAMAGES: dict[str, Any] = {
    "no seconds": lambda text: text.replace('"seconds":', '"sec":'),
    "another parameter": lambda text: text.replace('"param_name":"alpha"', '"param_name":"beta"'),
    "settings": lambda text: re.sub(r'"about":{.*?}', '"about":[1]', text),
    "seconds": lambda text: re.sub(r'"seconds":[-.e\d]+', '"seconds":"x"', text),
    "a line of garbage": lambda text: "garbage\n" + text,
    "operation": lambda text: '{"op_code": 99}\n' + text,
    "bytes": lambda text: "\x00\x01" * 50 + "\n" + text,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_storage_is_one_error(best_at_3: list[Agent], damage: Any, tmp_path: pathlib.Path) -> None:
    place = tmp_path / "search.log"
    quick(storage=str(place), n_trials=1, hyperparameter="alpha")
    text = place.read_text()
    assert damage(text) != text
    place.write_text(damage(text))
    with pytest.raises(ValueError, match=r"search\.log is damaged or not the storage of a search \(.*use another storage"):
        quick(storage=str(place), n_trials=2, hyperparameter="alpha")


def test_a_note_in_a_storage_reaches_no_terminal_as_it_is(
    best_at_3: list[Agent], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "search.log"
    quick(storage=str(place), n_trials=1)
    place.write_text(place.read_text().replace('"note":""', '"note":"\\u001b[2J"'))
    said = str(quick(storage=str(place), n_trials=1))
    assert "?[2J" in said and said.replace("\n", "").isprintable()


def test_a_diverged_trial_fails_alone(best_at_3: list[Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    original = TD3BC.learn

    def learn(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.alpha == 2.5:
            raise TrainingDiverged("train diverged between its steps 0 and 4")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TD3BC, "learn", learn)
    report = quick(preset=None, n_trials=4)
    assert len(report.trials) == 4 and report.trials[0].value == 2.5
    assert report.trials[0].score is None and "train diverged" in report.trials[0].note
    assert report.value != 2.5 and "train diverged" in str(report)
    with pytest.raises(RuntimeError, match="all 1 trials failed; the last one: train diverged"):
        quick(preset=None, n_trials=1)


def test_a_diverged_estimate_is_a_failed_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(policies: Any, data: Any, one_step: Any, fqe: Any) -> list[Rated]:
        ((name, agent),) = policies.items()
        wild, notes = agent.config.alpha != 2.5, ("ran away",)
        return [Rated(name, fqe=9.0 if wild else 1.0, trusted=not wild, notes=notes if wild else ())]

    monkeypatch.setattr(tune_module, "rate", rate)
    report = quick(preset=None, n_trials=3)
    assert report.value == 2.5 and [trial.score for trial in report.trials] == [1.0, None, None]


def test_the_estimate_itself_and_the_report() -> None:
    report = quick(preset=None, n_trials=2)
    assert all(trial.score is not None and trial.seconds > 0 for trial in report.trials)
    text = str(report)
    assert "TD3BC alpha, range from arXiv:2106.06860" in text and "<- best" in text and "0 environment episodes used" in text
    saved = json.loads(json.dumps(report.to_json()))
    assert saved["hyperparameter"] == "alpha" and len(saved["trials"]) == 2 and "agent" not in saved


def test_agreement_compares_all_trials_at_the_end(best_at_3: list[Agent], tmp_path: pathlib.Path) -> None:
    """Values are spread over the range; the same call continues; the agent is the one that was asked about."""
    search: dict[str, Any] = {"preset": None, "objective": "agreement", "low": 1.0, "high": 4.0}
    place = str(tmp_path / "search.log")
    report = quick(n_trials=5, storage=place, **search)
    assert values(report) == pytest.approx([2.5, 2.5, 1.75, 3.25, 1.375]) and report.value == 3.25
    order = sorted(report.trials, key=lambda trial: abs(trial.value - 3.0))
    scores = [trial.score for trial in order]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3) == report.score
    assert any(report.agent is agent for agent in best_at_3) and report.agent.config.alpha == 3.25
    assert "agreement: share of the other trials that it beats" in str(report)
    more = quick(n_trials=6, storage=place, **search)
    assert values(more) == pytest.approx([*values(report), 2.875]) and more.value == 2.875 and len(best_at_3) == 6


def test_agreement_of_real_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "OneStepConfig", functools.partial(OneStepConfig, steps=5))
    report = quick(preset=None, n_trials=3, objective="agreement")
    assert all(trial.score is not None and 0.0 <= trial.score <= 1.0 for trial in report.trials)
    again = quick(preset=None, n_trials=3, objective="agreement")
    assert again.trials[0].score == report.trials[0].score and again.value == report.value
    whole = quick(preset=None, n_trials=3, objective="agreement", hyperparameter="policy_freq", low=1, high=4)
    assert all(isinstance(value, int) for value in values(whole))


def test_returns_are_played_and_counted(tmp_path: pathlib.Path) -> None:
    place = str(tmp_path / "search.log")
    first = quick(objective="return", env=Target(), n_episodes=2, n_trials=2, storage=place)
    assert first.n_env_episodes == 4
    env = Target()
    report = quick(objective="return", env=env, n_episodes=2, storage=place)
    assert report.n_env_episodes == 6 and env.n_resets == 2  # one more trial
    assert report.score == max(t.score for t in report.trials if t.score is not None)
    assert report.agent.evaluate(Target(), 2, seed=0).mean_return == pytest.approx(report.score)
    assert "6 environment episodes used" in str(report) and "mean return of episodes" in str(report)


def test_a_hyperparameter_without_a_published_range_and_an_integer(best_at_3: list[Agent]) -> None:
    report = quick(preset=None, hyperparameter="policy_noise", low=0.05, high=0.5)
    assert report.hyperparameter == "policy_noise" and values(report)[0] == 0.2 and report.source == "the call"
    counted = quick(preset=None, hyperparameter="policy_freq", low=1, high=4)
    assert values(counted)[0] == 2 and all(isinstance(value, int) for value in values(counted))


def test_the_old_name_of_the_argument_still_works_and_warns(best_at_3: list[Agent]) -> None:
    with pytest.warns(UserWarning, match="`knob` is now called `hyperparameter`") as warned:
        report = quick(knob="policy_noise", low=0.05, high=0.5, n_trials=1)
    assert report.hyperparameter == "policy_noise" and len([w for w in warned if "`knob`" in str(w.message)]) == 1
    with pytest.warns(UserWarning, match=r"TuningReport\.knob is now called hyperparameter"):
        assert report.knob == "policy_noise"


def test_a_hyperparameter_of_acting_alone_trains_nothing_more(best_at_3: list[Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = agent_class("IDQL")
    n_learnt, original = [0], cls.learn

    def learn(self: Any, *args: Any, **kwargs: Any) -> Any:
        n_learnt[0] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, "learn", learn)

    def rate(policies: Any, data: Any, one_step: Any, fqe: Any) -> list[Rated]:
        ((name, agent),) = policies.items()
        return [Rated(name, fqe=-agent.config.n_candidates)]

    monkeypatch.setattr(tune_module, "rate", rate)
    report = quick("IDQL", preset=None, policy_kwargs={"net_arch": [8, 8], "behavior_width": 8}, n_trials=4)
    assert n_learnt == [1] and values(report)[0] == 64 and report.agent.config.n_candidates == report.value  # type: ignore[attr-defined]


# ---- bad calls -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"algorithm": "PPO"}, ValueError, "algorithm='PPO'; choose from SRPO, "),
        (
            {"algorithm": "DiffusionBC"},
            ValueError,
            "DiffusionBC has no main hyperparameter: pass hyperparameter=, low= and high=",
        ),
        ({"hyperparameter": "betta"}, TypeError, "TD3BC has no hyperparameter 'betta'. Valid: "),
        ({"hyperparameter": "policy_noise"}, ValueError, "no published range for 'policy_noise' of TD3BC: pass low= and high="),
        ({"low": 5.0}, ValueError, r"high=4.0 must be above low=5"),
        ({"low": 0.0, "log": True}, ValueError, "low=0.0 must be positive for log=True"),
        ({"low": -1.0}, ValueError, "alpha=-1.0 must not be negative"),
        ({"objective": "loss"}, ValueError, "objective='loss'; choose from 'agreement', 'fqe', 'return'"),
        ({"objective": "return"}, ValueError, "no environment is stored with arrays: pass env="),
        ({"n_trials": 0}, ValueError, "n_trials=0 must be a positive whole number"),
        ({"steps": 0}, ValueError, "steps=0 must be a positive whole number of gradient steps"),
        ({"fqe": {"gama": 0.9}}, TypeError, "gama"),
        ({"fqe": {"gamma": 2}}, ValueError, "gamma=2 must lie in"),
        ({"alfa": 1.0}, TypeError, "TD3BC has no hyperparameter 'alfa'; did you mean 'alpha'"),
    ],
)
def test_bad_calls_end_before_any_training(
    arguments: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TD3BC, "learn", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(error, match=message):
        quick(**{"algorithm": "TD3BC", "preset": None, **arguments})


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"tune needs Optuna: pip install optuna"):
        quick()


def test_optunas_own_log_is_left_as_it_was(best_at_3: list[Agent]) -> None:
    before = optuna.logging.get_verbosity()
    quick(n_trials=1)
    assert optuna.logging.get_verbosity() == before
