"""QGPO against closed forms: the guided sampler, the contrastive loss, the critic's backup, the tables beside the data."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import assert_all_differ, offline_knobs
from torch import Tensor, nn
from toy import line_data

from diffagents import QGPO
from diffagents.data.sampler import Sampler
from diffagents.diffusion.sde import vp_alpha_sigma
from diffagents.networks.score_model import VPBehavior
from diffagents.types import Batch

SMALL: dict[str, Any] = {
    "preset": None,
    "seed": 0,
    "verbose": 0,
    "device": "cpu",
    "behavior_steps": 3,
    "critic_steps": 20,
    "energy_steps": 5,
    "batch_size": 16,
    "behavior_batch_size": 8,
    "n_support": 3,
    "solver_steps": 4,
    "policy_kwargs": {"net_arch": [16, 16], "behavior_width": 8},
}
MEAN, VAR = 0.3, 0.04  # data N(MEAN, VAR I)
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")


class GaussianNoise(nn.Module):
    """The exact noise predictor of N(MEAN, VAR I)."""

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = vp_alpha_sigma(t[..., None])
        return sigma * (a_t - alpha * MEAN) / (alpha.square() * VAR + sigma.square())


class LinearEnergy(nn.Module):
    """The exact f of these data for beta Q = k . a: k . E[a | a_t], as the expectation of exp(k . a) is Gaussian."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k))

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = vp_alpha_sigma(t[..., None])
        mean = (alpha * VAR * a_t + sigma.square() * MEAN) / (alpha.square() * VAR + sigma.square())
        return self.k * mean.sum(-1)


class SquareQ(nn.Module):
    """Twins that say -|a|^2 and one more than that, for pairs [s, a] of 3 + 2 numbers."""

    def forward(self, pairs: Tensor) -> Tensor:
        q = -pairs[..., 3:].square().sum(-1)
        return torch.stack([q + 1.0, q])

    def on_parts(self, obs: Tensor, act: Tensor) -> Tensor:
        return self(torch.cat([obs.expand(*act.shape[:-1], -1), act], -1))


class FreeEnergy(nn.Module):
    """f = beta Q + c(s) + slope a_1: the minimiser where slope is 0."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta, self.slope = beta, nn.Parameter(torch.zeros(()))

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        return -self.beta * a_t.square().sum(-1) + 7.0 * obs.sum(-1) + self.slope * a_t[..., 0]


@pytest.fixture(scope="module")
def trained() -> QGPO:
    return QGPO(**SMALL).learn(line_data())


def agent_with(**knobs: Any) -> QGPO:
    return QGPO(**{**SMALL, **knobs}).learn(line_data())


SUPPORT = torch.rand(400, 3, 2, generator=torch.Generator().manual_seed(6)) * 2 - 1


def batch_of(n: int, rew: float = 1.0, done: float = 0.0) -> Batch:
    generator = torch.Generator().manual_seed(5)
    obs, act = torch.randn(n, 3, generator=generator), torch.rand(n, 2, generator=generator) * 2 - 1
    return Batch(obs, act, torch.full((n,), rew), obs.flip(0), torch.full((n,), done), {"actions": SUPPORT[:n]})


# ---- the guided sampler ----------------------------------------------------------------------------------------------
def test_guidance_tilts_a_gaussian_as_it_should() -> None:
    """exp(k . a) moves N(m, v) to N(m + k v, v), and guidance_scale s_g to m + s_g k v: sign and size of the guidance."""
    agent, k = QGPO(**{**SMALL, "solver_steps": 40}).learn(line_data()), 4.0
    agent.behavior.net, agent.energy = GaussianNoise(), LinearEnergy(k)  # type: ignore[assignment]
    obs = np.zeros((2000, 3), np.float32)
    for scale in (0.0, 1.0, 2.0):
        action, _ = agent.predict(obs, guidance_scale=scale)
        low, high = agent.action_space.low, agent.action_space.high
        unclipped = (action > low) & (action < high)
        assert unclipped.mean() > 0.95, "too much is clipped to be judged"
        assert np.median(action) == pytest.approx(MEAN + scale * k * VAR, abs=0.02), scale
        assert action.std() == pytest.approx(math.sqrt(VAR), rel=0.1)


def test_gradients_reach_the_action_although_predict_is_in_inference_mode(trained: QGPO) -> None:
    obs = np.zeros((5, 3), np.float32)
    with torch.inference_mode():
        inside = trained.predict(obs, deterministic=True)[0]
    assert np.array_equal(inside, trained.predict(obs, deterministic=True)[0])
    assert not np.array_equal(inside, trained.predict(obs, deterministic=True, guidance_scale=30.0)[0])
    assert all(p.grad is None or not p.grad.is_inference() for p in trained.energy.parameters())


def test_deterministic_depends_on_the_observation_only(trained: QGPO) -> None:
    obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    one, two = trained.predict(obs, deterministic=True)[0], trained.predict(obs[::-1].copy(), deterministic=True)[0]
    np.testing.assert_allclose(one, two[::-1], atol=1e-5)
    assert not np.array_equal(trained.predict(obs)[0], trained.predict(obs)[0])


# ---- the energy ------------------------------------------------------------------------------------------------------
def at_no_noise(agent: QGPO, n: int) -> dict[str, Tensor]:
    """Draws at t = 0.001 without noise: a_t is a to 1e-4."""
    size = (n, 3, 2) if agent.config.energy_loss == "cep" else (n, 2)
    return {"u": torch.zeros(n), "eps": torch.zeros(size)}


def test_cep_is_least_where_the_energy_is_beta_q_and_any_function_of_the_state() -> None:
    agent = agent_with(beta=2.0)
    agent.critic_target, agent.energy = SquareQ(), FreeEnergy(2.0)  # type: ignore[assignment]
    slope: nn.Parameter = agent.energy.slope  # type: ignore[assignment]
    batch, noise = batch_of(400), at_no_noise(agent, 400)
    agent.prediction_loss(batch, noise).backward()  # type: ignore[no-untyped-call]
    assert slope.grad is not None and abs(slope.grad.item()) < 2e-4
    losses = []
    for value in (-0.5, 0.0, 0.5):
        with torch.no_grad():
            slope.fill_(value)
        losses.append(agent.prediction_loss(batch, noise).item())
    assert losses[1] < min(losses[0], losses[2])
    slope.grad = None
    agent.prediction_loss(batch, noise).backward()  # type: ignore[no-untyped-call]
    assert abs(slope.grad.item()) > 1e-2  # type: ignore[attr-defined]  # at 0.5 it is not least


def test_cep_by_hand() -> None:
    """One state, two actions, Q = 0 and -1 (times beta 2), f = 1 and 3: a cross entropy."""
    agent = agent_with(beta=2.0, n_support=2)
    batch = batch_of(1)._replace(extras={"actions": torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])})
    agent.critic_target = SquareQ()  # type: ignore[assignment]
    agent.energy = lambda a, obs, t: torch.tensor([[1.0, 3.0]])  # type: ignore[assignment]
    loss = agent.prediction_loss(batch, {"u": torch.zeros(1), "eps": torch.zeros(1, 2, 2)})
    p, log_q = 1 / (1 + math.exp(-2.0)), -math.log(1 + math.exp(2.0))
    assert loss.item() == pytest.approx(-(p * log_q + (1 - p) * (log_q + 2.0)), rel=1e-5)


def test_the_actions_of_a_state_share_one_time_and_have_their_own_noise() -> None:
    agent, seen = agent_with(), []

    def energy(a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        seen.append((a_t, t))
        return a_t.sum(-1)

    agent.energy = energy  # type: ignore[assignment]
    batch, noise = batch_of(8), agent.draw_energy(8, agent.generator)
    agent.prediction_loss(batch, noise)
    (a_t, t), alpha_sigma = seen[0], vp_alpha_sigma(1e-3 + 0.999 * noise["u"])
    assert t.shape == (8, 1)
    alpha, sigma = (x[:, None, None] for x in alpha_sigma)
    torch.testing.assert_close(a_t, alpha * batch.extras["actions"] + sigma * noise["eps"])


@pytest.mark.parametrize("loss", ["mse", "emse"])
def test_regressions_are_least_at_their_own_targets(loss: str) -> None:
    """ "mse": f = beta Qbar(s, a) of the data's actions; "emse": exp of beta (Qbar - its maximum over the support), clipped."""
    agent, batch = agent_with(beta=2.0, energy_loss=loss), batch_of(10)
    support = torch.tensor([[0.9, 0.0], [0.5, 0.5], [-1.0, 0.0]])
    batch = batch._replace(extras={"actions": support.expand(10, 3, 2)})
    agent.critic_target = SquareQ()  # type: ignore[assignment]
    best = 0.0 if loss == "mse" else -0.5
    exact = 2.0 * (-batch.act.square().sum(-1) - best)
    for shift in (0.0, 1.0):
        agent.energy = lambda a, obs, t, shift=shift: exact + shift  # type: ignore[assignment]
        found = agent.prediction_loss(batch, at_no_noise(agent, 10)).item()
        by_hand = shift**2 if loss == "mse" else ((exact + shift).exp() - exact.exp()).square().mean().item()
        assert found == pytest.approx(by_hand, rel=1e-4, abs=1e-6)
    if loss == "emse":
        agent.energy = lambda a, obs, t: torch.full((10,), 50.0)  # type: ignore[assignment]
        by_hand = (math.exp(4.5) - exact.exp()).square().mean().item()
        assert agent.prediction_loss(batch, at_no_noise(agent, 10)).item() == pytest.approx(by_hand, rel=1e-4)


# ---- the critic ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("beta_q", "done"), [(None, 0.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)])
def test_the_backup_is_a_softmax_over_the_support(beta_q: float | None, done: float) -> None:
    """Qbar = 0 and -2 at the two actions of s'; the lower twin counts; beta_q None is beta = 3; loss is the mean of both."""
    agent = agent_with(beta_q=beta_q, gamma=0.5, n_support=2)
    batch = batch_of(1, rew=1.0, done=done)._replace(extras={"actions": torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])})
    agent.critic_target = SquareQ()  # type: ignore[assignment]
    online = torch.tensor([[0.25], [1.5]], requires_grad=True)
    agent.critic.forward = lambda x: online  # type: ignore[method-assign]
    loss, metrics = agent.critic_loss(batch, {})
    beta = 3.0 if beta_q is None else beta_q
    value = -2.0 * math.exp(-2.0 * beta) / (1.0 + math.exp(-2.0 * beta))
    goal = 1.0 + 0.5 * (1.0 - done) * value
    assert loss.item() == pytest.approx(0.5 * ((0.25 - goal) ** 2 + (1.5 - goal) ** 2), rel=1e-5)
    assert metrics["q"].item() == pytest.approx(0.875)


# ---- the tables beside the data --------------------------------------------------------------------------------------
class PointAtState(nn.Module):
    """The exact noise predictor of a behaviour that always does the state's first two numbers."""

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = vp_alpha_sigma(t[..., None])
        return (a_t - alpha * obs[..., :2]) / sigma


def data_matrix(n: int) -> Sampler:
    return Sampler(torch.randn(n, 3 + 2 + 2 + 3, generator=torch.Generator().manual_seed(0)), 3, 2)


@pytest.mark.parametrize("some", [None, 100, 5000])
def test_support_of_a_row_is_of_its_own_state(some: int | None) -> None:
    """At s' for the critic, at s for the energy, beside each transition; with n_support_states in that many only."""
    agent, sampler = QGPO(**SMALL, n_support_states=some).learn(line_data()), data_matrix(600)
    agent.behavior = VPBehavior(PointAtState(), 2)
    for prepare, states in ((agent.prepare_critic, "next_obs"), (agent.prepare_energy, "obs")):
        chosen = prepare(sampler, torch.Generator().manual_seed(1))
        first = chosen.tables["actions"]
        assert len(chosen) == (100 if some == 100 else 600) and first.shape == (len(chosen), 3, 2)
        batch = chosen.sample(50, torch.Generator().manual_seed(2))
        error = batch.extras["actions"] - getattr(batch, states)[:, None, :2]
        assert error.abs().max() < 0.06
        rows = {tuple(row) for row in sampler.matrix.tolist()}
        assert {tuple(row) for row in chosen.matrix.tolist()} <= rows
        assert len(chosen) == 600 or not torch.equal(chosen.matrix, sampler.matrix[:100])
        again = prepare(sampler, torch.Generator().manual_seed(1))
        assert torch.equal(first, again.tables["actions"]) and torch.equal(again.matrix, chosen.matrix)


def test_the_regression_on_data_needs_no_support() -> None:
    agent = agent_with(energy_loss="mse")
    assert agent.prepare_energy(data_matrix(50), agent.generator).tables == {}


# ---- learning --------------------------------------------------------------------------------------------------------
def test_learns_the_best_action_of_the_data() -> None:
    """One-step choices, reward -|a - 0.5|^2 under uniform data: guidance lands near 0.5, its absence acts like the data."""
    data = line_data(2000, horizon=1)
    data["terminations"][:], data["truncations"][:] = True, False
    agent = QGPO(
        seed=0,
        verbose=0,
        beta=10.0,
        behavior_steps=300,
        critic_steps=300,
        energy_steps=500,
        batch_size=64,
        behavior_batch_size=128,
        n_support_states=500,
        n_support=16,
        learning_rate=3e-3,
        behavior_learning_rate=3e-3,
        tau=0.05,
        reward_transform="none",
        policy_kwargs={"net_arch": [64, 64], "behavior_width": 32},
        preset=None,
    ).learn(data)
    obs = np.random.default_rng(1).normal(size=(300, 3)).astype(np.float32)
    errors = [np.abs(agent.predict(obs, guidance_scale=scale)[0] - 0.5).mean() for scale in (0.0, 1.0)]
    assert errors[1] < 0.3 < 0.42 < errors[0], errors  # of the exact ones: 0.18 of exp(-10 |a - 0.5|^2), 0.625 of the data


def test_the_energy_is_learnt_anew_on_the_same_critic_and_behaviour() -> None:
    agent = agent_with()
    before = {name: {k: v.clone() for k, v in state.items()} for name, state in agent.get_parameters().items()}
    other = agent.clone(beta=30.0, fresh=("energy",)).learn(line_data(), stages=("energy",))
    for name, state in other.get_parameters().items():
        same = all(torch.equal(before[name][key], value) for key, value in state.items())
        assert same is (name != "energy"), name


def test_bad_knobs() -> None:
    for knobs, match in (
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"beta_q": -1.0}, "beta_q=-1.0 must not be negative"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0 must not"),
        ({"energy_loss": "CEP"}, "energy_loss='CEP'; choose from 'cep'"),
        ({"n_support_states": 0}, "n_support_states=0 must be a positive whole number"),
        ({"solver_steps": 0}, "solver_steps=0 must be a positive whole number"),
    ):
        with pytest.raises(ValueError, match=match):
            QGPO(**knobs)


def test_every_option_changes_the_result() -> None:
    """No knob is decoration: each alternative value gives another policy."""
    other: dict[str, Any] = {
        "deterministic": True,
        "cosine": True,
        "precondition": True,
        "return_temperature": 0.1,
        "q_layer_norm": True,
        "beta": 0.5,
        "beta_q": 0.1,
        "n_support": 4,
        "n_support_states": 20,
        "energy_loss": "emse",
        "guidance_scale": 3.0,
        "solver_steps": 5,
        "gamma": 0.5,
        "tau": 0.5,
        "learning_rate": 1e-3,
        "behavior_learning_rate": 1e-3,
        "batch_size": 17,
        "behavior_batch_size": 9,
        "reward_transform": "normalize",
        "normalize_obs": True,
        "behavior_steps": 4,
        "critic_steps": 21,
        "energy_steps": 6,
    }
    obs, data, base = np.ones((8, 3), np.float32), line_data(100), {**SMALL, "tau": 0.1}
    results = {name: QGPO(**{**base, name: value}).learn(data).predict(obs)[0] for name, value in other.items()}
    results["default"] = QGPO(**base).learn(data).predict(obs)[0]
    results["energy_loss mse"] = QGPO(**base, energy_loss="mse").learn(data).predict(obs)[0]
    assert_all_differ(results)
    assert set(other) == offline_knobs("QGPO")
