"""The number of CPU threads: the faster one is chosen, holds inside the stage, is kept on resuming, and is restored."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_agents import small
from toy import line_data

import diffagents
from diffagents.agent import Agent
from diffagents.training import offline, threads
from diffagents.training.plan import Plan

DATA = line_data()
STEPS = 100  # of a stage: fewer are not timed
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch seems to have two threads; it computes with the one of conftest.py, which takes no time on a busy machine."""
    number = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: number.__setitem__(0, count))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """Number of threads -> the seconds that timed calls will take, one after the other; the last number is repeated."""
    seconds: dict[int, list[float]] = {1: [1.0], 2: [1.0], 3: [1.0]}

    def seconds_of(call: Callable[[], Any], count: int) -> float:
        call()
        return seconds[count].pop(0) if len(seconds[count]) > 1 else seconds[count][0]

    monkeypatch.setattr(threads, "seconds_of", seconds_of)
    return seconds


def numbers_in(agent: Agent, **arguments: Any) -> dict[str, int]:
    """Train; the number of threads that torch had in each stage."""
    seen: dict[str, int] = {}

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        plan = local["self"].plan
        seen[next(reversed(plan.done))] = torch.get_num_threads()
        return True

    agent.learn(DATA, callback=look, **arguments)
    return seen


# ---- the choice ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("one", "two", "chosen"),
    [
        ([1.0], [0.7], 2),
        ([1.0], [1.5], 1),
        ([1.0], [0.95], 1),  # too little is gained
        ([9.0, 1.0], [0.7], 2),  # the first time is a warm-up
        ([1.0], [9.0, 0.7], 2),
        ([1.0], [0.7, 0.7, 0.7, 9.0], 1),  # rare long waits count, which the median would not see
    ],
)
def test_the_faster_number_is_chosen(
    one: list[float], two: list[float], chosen: int, clock: dict[int, list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    clock |= {1: one, 2: two}
    agent = small("BC", verbose=1, behavior_steps=STEPS)
    assert numbers_in(agent) == {"behavior": chosen}
    assert agent.plan is not None and agent.plan.threads == {"behavior": chosen}
    said = "behavior: one thread is faster than two on this machine just now\n" in capsys.readouterr().out
    assert said == (chosen == 1)
    assert torch.get_num_threads() == 2


def test_the_estimate_is_that_of_the_number_that_is_used(clock: dict[int, list[float]]) -> None:
    """So a busy machine does not make a short stage worth compiling."""
    clock |= {1: [0.5], 2: [10.0]}
    agent = small("BC", behavior_steps=STEPS).learn(DATA)
    plan = Plan({"behavior": 200})
    assert agent.reward_transform is not None
    sampler = diffagents.load_dataset(DATA, verbose=0).sampler("cpu", agent.reward_transform, agent.obs_normalizer)
    assert offline.estimate(agent, plan, sampler, choose_threads=True) == {"behavior": 200 * 0.5}
    assert plan.threads == {"behavior": 1}
    assert offline.estimate(agent, Plan({"behavior": 200}), sampler) == {"behavior": 200 * 10.0}


def test_a_long_stage_is_timed_longer(clock: dict[int, list[float]]) -> None:
    """For a share of its time, but not for ever: a few calls may fall between two waits."""
    clock |= {1: [0.01], 2: [0.007]}
    calls = []
    call = lambda: calls.append(0)  # noqa: E731
    for times, rounds in ((0, threads.ROUNDS), (1000, 1 + round(0.03 * 1000)), (10**6, 1 + round(1 / 0.01))):
        calls.clear()
        assert threads.time_with((1, 2), call, times) == pytest.approx({1: 0.01, 2: 0.007})
        assert len(calls) == 2 * rounds
    clock[2] = [0.012]
    calls.clear()
    threads.time_with((1, 2), call, 10**6)
    assert len(calls) == 2 * threads.ROUNDS, "the answer is known"


def test_a_number_that_is_hopeless_is_timed_twice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(threads, "seconds_of", lambda call, count: calls.append(count) or 30.0 ** (count - 1))
    assert threads.time_with((1, 2), lambda: None) == {1: 1.0, 2: 30.0}
    assert calls == [1, 2, 1, 2]


def test_a_stage_too_short_to_be_timed_follows_the_others(clock: dict[int, list[float]]) -> None:
    clock[2] = [1.5]
    steps = {"critic_steps": STEPS, "behavior_steps": STEPS, "policy_steps": 5}
    assert numbers_in(small("SRPO", **steps)) == {"critic": 1, "behavior": 1, "policy": 1}
    clock[2] = [0.7]
    assert numbers_in(small("SRPO", **steps)) == {"critic": 2, "behavior": 2, "policy": 2}


def test_real_timing_changes_nothing_but_the_number() -> None:
    """Without a patched clock: every tensor is as in a run with the chosen number."""
    agent = small("TD3BC", train_steps=STEPS).learn(DATA)
    assert agent.plan is not None
    count = agent.plan.threads["train"]
    other = small("TD3BC", train_steps=STEPS, threads=count).learn(DATA)
    for name, state in agent.get_parameters().items():
        assert all(torch.equal(value, other.get_parameters()[name][key]) for key, value in state.items())


# ---- a given number --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 3])
def test_a_given_number_holds_in_every_stage(count: int, clock: dict[int, list[float]]) -> None:
    clock |= {1: [1.5], 2: [0.1]}
    agent = small("IDQL", threads=count, critic_steps=STEPS, behavior_steps=5)
    assert numbers_in(agent) == {"critic": count, "behavior": count}
    assert torch.get_num_threads() == 2


def test_a_given_number_holds_online_and_in_learn_many() -> None:
    seen: list[int] = []

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append(torch.get_num_threads())
        return True

    small("TD3BC", threads=1).learn_online(6, env="Pendulum-v1", callback=look)
    small("TD3BC").learn_online(6, env="Pendulum-v1", callback=look)
    assert seen == [1] * 6 + [2] * 6 and torch.get_num_threads() == 2
    agents = diffagents.learn_many([small("BC", seed=seed, threads=1) for seed in range(2)], DATA)
    assert [agent.plan.threads for agent in agents if agent.plan is not None] == [{"behavior": 1}] * 2
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_the_number_is_restored_after_an_error(error: type[BaseException]) -> None:
    def fail(local: dict[str, Any], _: dict[str, Any]) -> bool:
        assert torch.get_num_threads() == 1
        raise error

    with pytest.raises(error):
        small("BC", threads=1).learn(DATA, callback=fail)
    assert torch.get_num_threads() == 2
    with pytest.raises(error):
        small("TD3BC", threads=1).learn_online(6, env="Pendulum-v1", callback=fail)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "two", None, 10**6])
def test_another_value_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf'threads={wrong} must be "auto" or a whole number from 1 to 1024'):
        small("BC", threads=wrong)


# ---- keeping it ------------------------------------------------------------------------------------------------------
def test_a_resumed_run_keeps_the_numbers_of_its_plan(clock: dict[int, list[float]], tmp_path: pathlib.Path) -> None:
    """Also of a stage that has not begun; a given number takes precedence."""
    clock[2] = [1.5]
    run = small("IDQL", critic_steps=STEPS, behavior_steps=STEPS)
    path = run.learn(DATA, callback=lambda local, _: local["self"].num_timesteps < 5).save(tmp_path / "a")
    clock[2] = [0.1]
    assert numbers_in(diffagents.load(path, verbose=0), reset_num_timesteps=False) == {"critic": 1, "behavior": 1}
    assert numbers_in(diffagents.load(path, verbose=0, threads=3), reset_num_timesteps=False) == {"critic": 3, "behavior": 3}
    assert numbers_in(diffagents.load(path, verbose=0)) == {"critic": 2, "behavior": 2}, "a new plan chooses anew"


def test_a_resumed_run_has_no_more_threads_than_its_process(tmp_path: pathlib.Path) -> None:
    run = small("BC", threads=3).learn(DATA, callback=lambda local, _: False)
    assert run.plan is not None and run.plan.threads == {"behavior": 3}
    assert numbers_in(diffagents.load(run.save(tmp_path / "a"), verbose=0), reset_num_timesteps=False) == {"behavior": 2}


def test_plans_with_and_without_numbers_are_read() -> None:
    plan = Plan({"a": 3}, threads={"a": 2})
    assert Plan.from_json(plan.to_json(), ["a"]) == plan
    old = {name: value for name, value in plan.to_json().items() if name != "threads"}
    assert Plan.from_json(old, ["a"]).threads == {}
    for wrong in (0, -1, True, "2", 1.5):
        with pytest.raises(ValueError, match="are not positive whole numbers"):
            Plan.from_json({**old, "threads": {"a": wrong}}, ["a"])
    with pytest.raises(ValueError, match="threads of a stage that it does not have"):
        Plan.from_json({**old, "threads": {"b": 1}}, ["a"])


def test_load_and_clone(tmp_path: pathlib.Path) -> None:
    agent = small("BC", env="Pendulum-v1", threads=1)
    assert agent.clone().threads == 1 and agent.clone(threads=2).threads == 2
    path = agent.save(tmp_path / "a")
    assert diffagents.load(path).threads == "auto" and diffagents.load(path, threads=2).threads == 2
