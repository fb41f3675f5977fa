"""DiffusionBC against closed forms, and the distribution that it copies."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import assert_all_differ, offline_knobs, update
from torch import Tensor, nn
from toy import line_data

from diffagents import DiffusionBC
from diffagents.diffusion.chain import vp_chain
from diffagents.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore:action bounds")
OBS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)


def an_agent(**knobs: Any) -> DiffusionBC:
    settings: dict[str, Any] = {"preset": None, "behavior_steps": 5, "batch_size": 16, "policy_kwargs": {"net_arch": [16, 16]}}
    return DiffusionBC(seed=0, verbose=0, device="cpu", **{**settings, **knobs}).learn(line_data())


def a_batch(n: int = 64) -> Batch:
    g = torch.Generator().manual_seed(5)
    obs = torch.randn(n, 3, generator=g)
    return Batch(obs, 2.0 * torch.rand(n, 2, generator=g) - 1.0, torch.zeros(n), obs, torch.zeros(n))


class Oracle(nn.Module):
    """The exact noise for data that is the batch itself, `error` added to one of two dimensions."""

    def __init__(self, act: Tensor, error: float) -> None:
        super().__init__()
        self.act, self.error, self.chain = act, torch.tensor([error, 0.0]), vp_chain(5)

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        return (a_t - self.chain.signal[t][:, None] * self.act) / self.chain.noise[t][:, None] + self.error


def test_loss_is_the_mean_over_batch_and_dimensions() -> None:
    """[D1] Asked at the right noisy action and step, an oracle has loss 0, and e^2 / 2 with an error e in one of two dims."""
    agent, batch = an_agent(), a_batch()
    noise = agent.draw_policy(64, torch.Generator().manual_seed(0))
    for error, loss in ((0.0, 0.0), (0.4, 0.08)):
        agent.policy.net = Oracle(batch.act, error)
        assert agent.bc_loss(batch, noise)[0].item() == pytest.approx(loss, abs=1e-6)


def test_draws_cover_every_step() -> None:
    noise = an_agent(n_diffusion_steps=7).draw_policy(1000, torch.Generator().manual_seed(0))
    counts = noise["i"].bincount()
    assert len(counts) == 7 and counts.min() > 100
    assert noise["eps"].shape == (1000, 2) and noise["eps"].std().item() == pytest.approx(1.0, abs=0.05)


def test_the_lagged_copy_follows_every_step() -> None:
    """[D2] A share ema_tau of the new network, from a common start; None keeps the copy equal."""
    batch = a_batch()
    for tau in (None, 0.25):
        agent = an_agent(ema_tau=tau)
        before = [p.clone() for p in agent.policy_ema.parameters()]
        update(agent.bc_loss, batch, agent.draw_policy(64, torch.Generator()))
        for old, new, online in zip(before, agent.policy_ema.parameters(), agent.policy.parameters(), strict=True):
            torch.testing.assert_close(new, online if tau is None else 0.75 * old + 0.25 * online)
            assert not torch.equal(old, new) and torch.equal(new, online) is (tau is None)


def test_which_network_acts_may_be_chosen_on_loading(tmp_path: pathlib.Path) -> None:
    agent = an_agent(ema_tau=0.1)
    plain = DiffusionBC.load(agent.save(tmp_path / "a"), ema_tau=None, verbose=0)
    with torch.inference_mode():
        for one, net in ((agent, agent.policy_ema), (plain, agent.policy)):
            assert one.spec is not None
            noises = net.draw_candidates(1, 1, True, agent.generator)["noises"]
            expected = net.candidates(torch.from_numpy(OBS), noises, one.config)[:, 0].numpy()
            np.testing.assert_array_equal(one.predict(OBS, deterministic=True)[0], one.spec.unscale_action(expected))
    for one in (plain, agent):  # of untrained networks, the noiseless path ends in a corner: compare samples
        one.set_random_seed(0)
    assert not np.array_equal(plain.predict(OBS)[0], agent.predict(OBS)[0])


@pytest.mark.filterwarnings("ignore:arrays. the reward is always 1")
def test_rewards_are_not_read() -> None:
    """Not even such as an algorithm with a critic refuses: the same policy comes of a reward that never changes."""
    data = line_data()
    data |= {"truncations": data["terminations"] | data["truncations"], "terminations": np.zeros(400, bool)}
    constant = {**data, "rewards": np.ones_like(data["rewards"])}
    one, two = (DiffusionBC(seed=0, verbose=0, behavior_steps=3, preset=None).learn(some) for some in (data, constant))
    assert np.array_equal(one.predict(OBS)[0], two.predict(OBS)[0])


def test_copies_a_distribution_with_two_modes() -> None:
    """Actions at +-0.6 +- 0.05, one in four to the left in the first half of the states, three in four in the second."""
    data, rng = line_data(3000, obs_dim=1, act_dim=1, horizon=1), np.random.default_rng(0)
    share = np.where(data["observations"] < 0, 0.25, 0.75)
    sign = np.where(rng.uniform(size=(3000, 1)) < share, -1.0, 1.0)
    data["actions"] = (0.6 * sign + 0.05 * rng.normal(size=(3000, 1))).astype(np.float32)
    agent = DiffusionBC(
        seed=0,
        verbose=0,
        device="cpu",
        behavior_steps=1000,
        learning_rate=3e-3,
        ema_tau=0.01,
        n_diffusion_steps=10,
        policy_kwargs={"net_arch": [64, 64]},
        preset=None,
    ).learn(data)
    for obs, left in ((-1.0, 0.25), (1.0, 0.75)):
        samples = agent.predict(np.full((2000, 1), obs, np.float32))[0]
        assert (samples < 0).mean() == pytest.approx(left, abs=0.08)
        for mode in (samples[samples < 0], samples[samples > 0]):
            assert np.abs(np.median(mode)) == pytest.approx(0.6, abs=0.1)
        assert (np.abs(np.abs(samples) - 0.6) < 0.2).mean() > 0.85
        assert (np.abs(samples) < 0.3).mean() < 0.12  # where the mean of the data lies, and none of the data


def test_every_option_changes_the_result() -> None:
    """No knob is decoration: each alternative value gives another policy; all but what is made of rewards."""
    base: dict[str, Any] = {"preset": None, "behavior_steps": 10, "batch_size": 16, "verbose": 0, "seed": 0, "device": "cpu"}
    other: dict[str, Any] = {
        "deterministic": True,
        "cosine": True,
        "precondition": True,
        "n_diffusion_steps": 4,
        "ema_tau": 0.1,
        "learning_rate": 1e-3,
        "batch_size": 17,
        "normalize_obs": True,
        "behavior_steps": 11,
        "solver": "ddim",
    }
    results = {name: DiffusionBC(**{**base, name: value}).learn(line_data()).predict(OBS)[0] for name, value in other.items()}
    results["default"] = DiffusionBC(**base).learn(line_data()).predict(OBS)[0]
    assert_all_differ(results)
    same = DiffusionBC(**base, reward_transform="normalize").learn(line_data()).predict(OBS)[0]
    assert np.array_equal(same, results["default"])
    assert {*other, "reward_transform", "solver_steps"} == offline_knobs("DiffusionBC")
