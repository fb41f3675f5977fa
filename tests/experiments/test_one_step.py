"""The one-step gain against closed forms."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from test_select import fork
from toy import line_data

from diffagents import load_dataset
from diffagents.experiments.one_step import OneStep, OneStepConfig

GAMMA = 0.8
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")
QUICK = OneStepConfig(gamma=GAMMA, steps=800, batch_size=64, hidden=(32,))


def gain_in_state_0(one: OneStep, data: Any, action: float) -> torch.Tensor:
    rows = data.obs[:, 0] == 1.0
    act = torch.full((int(rows.sum()), 1), action)
    return one.gain(data.obs[rows], act, data.action[rows])


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_gain_is_the_closed_form(scale: float) -> None:
    """Right: 1, then 2, then the cut episode goes on at its mean: 1 + 0.8 (2 + 0.8 * 1.5 / 0.2) = 7.4. Left: 0.8 * 3 = 2.4."""
    data = load_dataset(fork(200, scale))
    one = OneStep(data, QUICK)
    for action, better in ((1.0, 2.5), (-1.0, -2.5)):
        gain = gain_in_state_0(one, data, action)
        assert gain.shape == (4, 200) and one.scale * gain.mean().item() == pytest.approx(scale * better, rel=0.05)
    assert one.gain(data.obs, data.action, data.action).abs().max() == 0.0  # the data's own actions


def test_each_network_leaves_out_a_part_of_the_episodes() -> None:
    """Episodes of returns that nothing explains: a network is better where it has learned."""
    rng = np.random.default_rng(0)
    n = 40
    data = load_dataset(
        {
            "observations": rng.normal(size=(n, 3)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
            "rewards": rng.normal(size=n).astype(np.float32),
            "terminations": np.ones(n, bool),
            "truncations": np.zeros(n, bool),
        }
    )
    one = OneStep(data, OneStepConfig(gamma=GAMMA, steps=1500, batch_size=64, hidden=(64,)))
    part = torch.randint(4, (n,), generator=torch.Generator().manual_seed(0))
    q = one.q(torch.cat([one.normalizer(data.obs), data.action], -1)).detach() * one.scale + data.rew.mean()
    error = (q - data.rew).square()
    left_out = part == torch.arange(4)[:, None]
    assert left_out.any(1).all() and error[left_out].mean() > 20 * error[~left_out].mean()


def test_a_seed_decides_and_other_random_numbers_do_not() -> None:
    data = load_dataset(line_data(60))
    found = []
    for k in range(2):
        torch.manual_seed(k)
        one = OneStep(data, OneStepConfig(steps=5, hidden=(8,)))
        found.append(one.gain(data.obs, torch.zeros_like(data.action), data.action))
    assert torch.equal(*found)


def test_no_data() -> None:
    data = load_dataset(line_data(60))
    with pytest.raises(ValueError, match="contains no transitions"):
        OneStep(dataclasses.replace(data, rew=data.rew[:0]), QUICK)
