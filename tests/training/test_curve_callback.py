"""Cheap evaluations on the way: when they are made, what they cost, and that they change nothing."""

import dataclasses
from typing import Any

import gymnasium
import pytest
import torch
from small_agents import STEPS, small
from toy import line_data

from diffagents.training import curve_callback
from diffagents.training.curve_callback import CurveCallback

BRIEF = dataclasses.replace(gymnasium.spec("Pendulum-v1"), id="Brief-v0", max_episode_steps=5)


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gymnasium.registry, "Brief-v0", BRIEF)


def learned(name: str, callback: Any, **settings: Any) -> Any:
    data = line_data(obs_dim=3, act_dim=1)
    return small(name, env="Brief-v0", **settings).learn({**data, "actions": 2 * data["actions"]}, callback=callback)


def steps_of(agent: Any) -> list[int]:
    return [row["num_timesteps"] for row in agent.provenance.get("evaluations", ())]


def test_evaluations_lie_in_the_stage_that_trains_the_policy_and_end_with_the_run() -> None:
    assert steps_of(learned("TD3BC", CurveCallback("Brief-v0", points=3, share=1e9))) == [
        round(STEPS * k / 3) for k in (1, 2, 3)
    ]
    assert steps_of(learned("SRPO", CurveCallback("Brief-v0", points=2, share=1e9))) == [2 * STEPS + STEPS // 2, 3 * STEPS]


def test_expensive_evaluations_are_left_out_but_for_the_first_and_the_last() -> None:
    assert steps_of(learned("TD3BC", CurveCallback("Brief-v0", points=4, share=0.0))) == [round(STEPS / 4), STEPS]


@pytest.mark.parametrize("name", ["TD3BC", "DiffusionQL"])
def test_training_is_the_same_with_and_without_evaluations(name: str) -> None:
    """Also of a policy that samples, whose later actions stay those of its seed."""
    how = {} if name == "TD3BC" else {"deterministic": False}
    watched, alone = learned(name, CurveCallback("Brief-v0", points=4, share=1e9), **how), learned(name, None, **how)
    assert len(steps_of(watched)) == 4 and not steps_of(alone)
    for network, tensors in watched.get_parameters().items():
        assert all(torch.equal(tensor, alone.get_parameters()[network][key]) for key, tensor in tensors.items())
    assert torch.equal(watched.generator.get_state(), alone.generator.get_state())
    assert torch.equal(watched.predict_generator.get_state(), alone.predict_generator.get_state())


def test_without_an_environment_nothing_is_played_and_a_failure_does_not_stop_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agent: Any = small("TD3BC", verbose=1).learn(line_data(), callback=CurveCallback(points=4))
    assert not steps_of(agent) and agent.num_timesteps == STEPS and "evaluations" not in capsys.readouterr().out
    asked: list[Any] = []

    def fail(*arguments: Any, **settings: Any) -> None:
        asked.append(arguments)
        raise OSError("no simulator\nhere")

    monkeypatch.setattr(curve_callback, "evaluate", fail)
    agent = learned("TD3BC", CurveCallback("Brief-v0", points=4), verbose=1)
    assert agent.num_timesteps == STEPS and len(asked) == 1
    assert "no evaluations while training: no simulator here" in capsys.readouterr().out


def test_the_callback_serves_several_agents() -> None:
    callback = CurveCallback("Brief-v0", points=2, share=1e9)
    assert len(steps_of(learned("TD3BC", callback))) == len(steps_of(learned("TD3BC", callback))) == 2


def test_bad_numbers_are_refused() -> None:
    for wrong in ({"points": 0}, {"n_episodes": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            CurveCallback(**wrong)
