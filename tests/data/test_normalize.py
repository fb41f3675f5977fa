"""Observation statistics and reward transforms against closed forms and the papers' formulas."""

import json

import pytest
import torch
from torch import Tensor

from diffagents.data.normalize import REWARD_TRANSFORMS, ObsNormalizer, RewardTransform, fit_reward_transform

REWARDS = torch.tensor([1.0, 3.0, 2.0, 2.0])
RETURNS = torch.tensor([4.0, -1.0, 3.0])


def test_a_fresh_normalizer_is_the_identity() -> None:
    obs = torch.randn(5, 3)
    assert torch.equal(ObsNormalizer(3)(obs), obs)


def test_fit_takes_mean_and_population_std_plus_eps() -> None:
    obs = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    normalizer = ObsNormalizer(2).fit(obs)
    assert normalizer.mean.tolist() == [2.0, 10.0]
    torch.testing.assert_close(normalizer.std, torch.tensor([1.001, 0.001]))  # std 1 and 0, eps 1e-3 as in TD3+BC
    torch.testing.assert_close(normalizer(obs), torch.tensor([[-1 / 1.001, 0.0], [1 / 1.001, 0.0]]))


def test_the_statistics_travel_in_the_state_dict() -> None:
    fitted = ObsNormalizer(4).fit(torch.randn(50, 4) * 3 + 1)
    fresh = ObsNormalizer(4)
    fresh.load_state_dict(fitted.state_dict())
    obs = torch.randn(7, 4)
    assert torch.equal(fresh(obs), fitted(obs))
    assert not list(fitted.parameters())  # an optimizer must not move them


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", REWARDS),
        ("return_range", REWARDS * 200.0),  # 1000 / (4 - -1)
        ("iql_locomotion", REWARDS * 200.0),
        ("minus_one", torch.tensor([0.0, 2.0, 1.0, 1.0])),
        ("iql_antmaze", torch.tensor([0.0, 2.0, 1.0, 1.0])),
        ("cql_antmaze", torch.tensor([2.0, 10.0, 6.0, 6.0])),  # 4 (r - 0.5)
        ("antmaze100", REWARDS * 100.0),
        ("normalize", torch.tensor([-1.0, 1.0, 0.0, 0.0]) * 2**0.5),  # mean 2, population std 1/sqrt(2)
        ("unit_returns", REWARDS * 2**0.5 / 3),  # returns-to-go of three times the reward
    ],
)
def test_formula(name: str, expected: Tensor) -> None:
    transform = fit_reward_transform(name, REWARDS, RETURNS, returns_to_go=lambda rew: 3 * rew)
    assert transform.name == name
    torch.testing.assert_close(transform(REWARDS), expected)


def test_every_name_but_auto_is_tested_above_and_survives_json() -> None:
    for name in set(REWARD_TRANSFORMS) - {"auto"}:
        transform = fit_reward_transform(name, REWARDS, RETURNS, returns_to_go=lambda rew: 3 * rew)
        assert RewardTransform.from_json(json.loads(json.dumps(transform.to_json()))) == transform


GOAL = torch.tensor([0.0, 0.0, 1.0])
AUTO = {
    "sparse goal": (GOAL, torch.tensor([1.0, 0.0]), torch.tensor([1.0]), "minus_one"),
    "sparse goal that never terminates": (GOAL, torch.tensor([1.0, 0.0]), torch.tensor([]), "minus_one"),
    "alive bonus of 1": (torch.ones(3), torch.tensor([10.0, 20.0]), torch.tensor([1.0]), "return_range"),
    "alive, then a fall at 0": (GOAL, torch.tensor([9.0, 4.0]), torch.tensor([0.0]), "return_range"),
    "dense": (REWARDS, RETURNS, torch.tensor([2.0]), "return_range"),
    "one episode": (REWARDS, torch.tensor([5.0]), torch.tensor([]), "none"),
    "equal returns": (REWARDS, torch.tensor([5.0, 5.0, 5.0]), torch.tensor([]), "none"),
}


@pytest.mark.parametrize("case", AUTO)
def test_auto_looks_at_the_data(case: str) -> None:
    rewards, returns, terminal, expected = AUTO[case]
    assert fit_reward_transform("auto", rewards, returns, terminal).name == expected


@pytest.mark.parametrize(
    ("name", "rewards", "returns", "message"),
    [
        (
            "iql_lokomotion",
            REWARDS,
            RETURNS,
            r"'iql_lokomotion' is unknown; choose from none, return_range, minus_one, iql_locomotion, .*auto",
        ),
        ("iql_locomotion", REWARDS, torch.tensor([2.0, 2.0]), r"all 2 episodes return 2; use 'none'"),
        ("iql_locomotion", REWARDS, torch.tensor([2.0]), r"only one episode; use 'none'"),
        ("normalize", torch.full((4,), 3.0), RETURNS, r"all are 3; use 'none'"),
    ],
)
def test_what_cannot_be_fitted_is_refused(name: str, rewards: Tensor, returns: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_reward_transform(name, rewards, returns)


def test_unit_returns_of_a_sparse_goal_count_the_steps_to_it() -> None:
    transform = fit_reward_transform("unit_returns", GOAL, torch.tensor([1.0, 0.0]), torch.tensor([1.0]), lambda rew: rew)
    torch.testing.assert_close(transform(GOAL), (GOAL - 1.0) / (2 / 9) ** 0.5)
