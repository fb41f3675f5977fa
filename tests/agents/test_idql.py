"""IDQL against closed forms, the ways of choosing an action, and what it learns from one-step choices."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import assert_all_differ, offline_knobs, update
from torch import Tensor, nn
from torch.nn import functional as F
from toy import line_data

from diffagents import IDQL
from diffagents.agents.idql import ResidualDenoiser, implicit_choice
from diffagents.diffusion.chain import sample_chain, vp_chain
from diffagents.functional import gumbel, select_action
from diffagents.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore:action bounds")
OBS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
SMALL: dict[str, Any] = {"net_arch": [16, 16], "behavior_width": 16, "behavior_blocks": 2}


def an_agent(**knobs: Any) -> IDQL:
    settings: dict[str, Any] = {
        "preset": None,
        "critic_steps": 5,
        "behavior_steps": 5,
        "batch_size": 16,
        "policy_kwargs": SMALL,
    }
    return IDQL(seed=0, verbose=0, device="cpu", **{**settings, **knobs}).learn(line_data())


def a_batch(n: int = 64) -> Batch:
    g = torch.Generator().manual_seed(5)
    obs = torch.randn(n, 3, generator=g)
    return Batch(obs, 2.0 * torch.rand(n, 2, generator=g) - 1.0, torch.zeros(n), obs, torch.zeros(n))


class Function(nn.Module):
    """A function in a network's place."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


# ---- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("obs_dim", "act_dim"), [(11, 3), (29, 8)])
def test_size_of_the_denoiser(obs_dim: int, act_dim: int) -> None:
    time = 64 + (128 * 256 + 256) + (256 * 256 + 256)
    block = 2 * 256 + (256 * 1024 + 1024) + (1024 * 256 + 256)
    ends = ((obs_dim + act_dim + 256) * 256 + 256) + (256 * act_dim + act_dim)
    assert sum(p.numel() for p in ResidualDenoiser(obs_dim, act_dim).parameters()) == time + 3 * block + ends


def test_denoiser_is_what_its_docstring_says() -> None:
    """Layer by layer, dropout masks included; and rows that share an observation and a step may leave them at size 1."""
    torch.manual_seed(0)
    net: Any = ResidualDenoiser(3, 2, 8, 2)
    g = torch.Generator().manual_seed(1)
    a, obs, i = torch.randn(5, 2, generator=g), torch.randn(5, 3, generator=g), torch.tensor([0, 1, 2, 3, 4])
    masks = 2.0 * (torch.rand(2, 5, 8, generator=g) > 0.5).float()
    first, last = (layer for layer in net.time_mlp if isinstance(layer, nn.Linear))
    phase = 2 * math.pi * i.float()[:, None] * net.frequencies
    h = net.input(torch.cat([a, obs, last(F.silu(first(torch.cat([phase.cos(), phase.sin()], -1))))], -1))
    for block, mask in zip(net.blocks, masks, strict=True):
        h = h + block.project(F.silu(block.expand(F.layer_norm(h * mask, (8,)) * block.norm.weight + block.norm.bias)))
    torch.testing.assert_close(net(a, obs, i, masks), net.output(F.silu(h)))
    torch.testing.assert_close(net(a, obs, i, torch.ones_like(masks)), net(a, obs, i))
    many = net(a[None].expand(3, 5, 2), obs[:3, None], i[None, 3:4])
    torch.testing.assert_close(many[1], net(a, obs[1].expand(5, 3), torch.full((5,), 3)))


def test_start() -> None:
    """[D5] Xavier's bounds and zero biases; lagged twins equal their twins; frequencies N(0, 0.2^2)."""
    agent = IDQL(seed=0, verbose=0, device="cpu", critic_steps=0, behavior_steps=1, batch_size=2, preset=None).learn(
        line_data(obs_dim=20)
    )
    critic, net = agent.critic, ResidualDenoiser(20, 2)
    v = [layer for layer in critic.v if isinstance(layer, nn.Linear)]
    matrices = [w[e] for w in critic.q.weights for e in (0, 1)] + [layer.weight for layer in (*v, net.input, net.output)]
    for matrix in matrices:
        bound = math.sqrt(6.0 / sum(matrix.shape))
        assert 0.9 * bound < matrix.abs().max() <= bound
    for bias in (*critic.q.biases, *(layer.bias for layer in (*v, net.input, net.output))):
        assert not bias.any()
    assert not torch.equal(critic.q.weights[0][0], critic.q.weights[0][1])
    for ours, lagged in zip(critic.q.parameters(), critic.q_target.parameters(), strict=True):
        assert torch.equal(ours, lagged)
    frequencies = torch.cat([ResidualDenoiser(3, 2, 4, 1).frequencies for _ in range(100)])
    assert frequencies.std().item() == pytest.approx(0.2, rel=0.05) and abs(frequencies.mean().item()) < 0.02
    assert net.frequencies.requires_grad


@pytest.mark.parametrize(("obs_dim", "knob", "blind"), [(3, True, True), (3, False, False), (2, True, False)])
def test_layer_norm_of_v(obs_dim: int, knob: bool, blind: bool) -> None:
    """[D3] V normalises its input, and so does not see its scale; of two dimensions only a sign would be left: there not."""
    knobs: dict[str, Any] = {"preset": None, "critic_steps": 1, "behavior_steps": 1, "batch_size": 4, "policy_kwargs": SMALL}
    agent = IDQL(seed=0, verbose=0, device="cpu", v_layer_norm=knob, **knobs).learn(line_data(obs_dim=obs_dim))
    obs = torch.randn(5, obs_dim, generator=torch.Generator().manual_seed(0))
    same = torch.allclose(agent.critic.v(obs), agent.critic.v(3.0 * obs + 1.0), atol=1e-4)
    assert same is blind
    assert not torch.allclose(agent.critic.v(obs)[0], agent.critic.v(obs)[1], atol=1e-4)


# ---- stages ------------------------------------------------------------------------------------------------------------


def test_behavior_loss_is_summed_over_dimensions() -> None:
    """Asked at the right noisy action and step: an oracle's loss is 0, an error of e in one of two dimensions e^2."""
    agent, batch, chain = an_agent(dropout=0.0), a_batch(), vp_chain(5)
    noise = agent.draw_behavior(64, torch.Generator().manual_seed(0))
    assert sorted(noise) == ["eps", "i"] and noise["i"].bincount().min() > 3
    for error in (0.0, 0.4):

        def oracle(a_i: Tensor, obs: Tensor, i: Tensor, masks: Tensor | None, error: float = error) -> Tensor:
            eps = (a_i - chain.signal[i][:, None] * batch.act) / chain.noise[i][:, None]
            return eps + torch.tensor([error, 0.0])

        agent.behavior.net = Function(oracle)
        assert agent.behavior_loss(batch, noise)[0].item() == pytest.approx(error**2, abs=1e-6)


def test_dropout_is_in_training_only() -> None:
    agent, batch = an_agent(dropout=0.5), a_batch()
    noise = agent.draw_behavior(64, torch.Generator().manual_seed(0))
    assert noise["masks"].shape == (2, 64, 16) and set(noise["masks"].flatten().tolist()) == {0.0, 2.0}
    plain = agent.behavior_loss(batch, {key: value for key, value in noise.items() if key != "masks"})[0]
    assert not torch.equal(agent.behavior_loss(batch, noise)[0], plain)
    assert np.array_equal(agent.predict(OBS, deterministic=True)[0], agent.predict(OBS, deterministic=True)[0])


def test_stages_are_independent() -> None:
    """[D1] Each moves its own networks only."""
    agent = an_agent()
    for stage, moved in (("critic", {"critic"}), ("behavior", {"behavior", "behavior_ema"})):
        before = {name: {k: v.clone() for k, v in state.items()} for name, state in agent.get_parameters().items()}
        agent.learn(line_data(), total_timesteps=2, stages=(stage,))
        for name, state in agent.get_parameters().items():
            same = all(torch.equal(before[name][key], value) for key, value in state.items())
            assert same is (name not in moved), (stage, name)


def test_lagged_behavior_and_learning_rates() -> None:
    """A share ema_tau of the behaviour every step; its learning rate falls to 0, the critic's stays."""
    agent, batch = an_agent(ema_tau=0.25, behavior_steps=20), a_batch()
    assert agent.optimizers["behavior"].lr.item() < 0.01 * 3e-4
    assert agent.optimizers["critic"].lr.item() == pytest.approx(3e-4)
    before = [p.clone() for p in agent.behavior_ema.parameters()]
    agent.optimizers["behavior"].start_schedule(0)
    update(agent.behavior_loss, batch, agent.draw_behavior(64, torch.Generator()))
    for old, new, online in zip(before, agent.behavior_ema.parameters(), agent.behavior.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)


# ---- acting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_of_the_lagged_behavior_by_the_official_sampler(temperature: float) -> None:
    """[D4] `select="first"`, all switches of the sampler."""
    agent = an_agent(ema_tau=0.5)
    net: Any = agent.behavior_ema.net
    with torch.no_grad():
        net.output.bias.add_(0.3)  # so that clipping has something to do
        obs, chain = torch.from_numpy(OBS), vp_chain(5)
        noises = agent.behavior_ema.fixed_noise[0][:, None].expand(-1, 6, -1)
        expected = sample_chain(
            lambda a, i: net(a, obs, torch.full((6,), i)),
            chain,
            noises,
            chain.beta_std * temperature,
            clip_x0=False,
            clip_x=True,
        )
    action, _ = agent.predict(OBS, deterministic=True, select="first", sampling_temperature=temperature)
    assert agent.spec is not None
    np.testing.assert_allclose(action, agent.spec.unscale_action(expected.numpy()), atol=1e-5)


def scored(agent: IDQL, n: int = 16) -> tuple[Tensor, Tensor]:
    """The stored noise's candidates for OBS (6, n, 2), and min Qbar of each (6, n)."""
    with torch.no_grad():
        obs = torch.from_numpy(OBS)
        noises = agent.behavior_ema.draw_candidates(1, n, True, agent.predict_generator)["noises"]
        actions = agent.behavior_ema.candidates(obs, noises, agent.config)
        q = [agent.critic.q_target(torch.cat([a, o.expand(n, -1)], -1)) for a, o in zip(actions, obs, strict=True)]
        return actions, torch.stack([torch.minimum(both[0], both[1]) for both in q])


def test_the_best_by_the_smaller_lagged_q_acts() -> None:
    agent = an_agent(tau=0.3)
    actions, q = scored(agent)
    best = actions[torch.arange(6), q.argmax(-1)].numpy()
    assert agent.spec is not None
    for select in ("argmax", "softmax", "expectile"):
        ours = agent.predict(OBS, deterministic=True, n_candidates=16, select=select)[0]
        np.testing.assert_allclose(ours, agent.spec.unscale_action(best), atol=1e-6)


def test_softmax_goes_to_argmax_as_temperature_goes_to_zero() -> None:
    agent = an_agent()
    results = []
    for choice in ({"select": "argmax"}, {"select": "softmax", "temperature": 1e-7}, {"select": "softmax", "temperature": 1e7}):
        agent.predict_generator.manual_seed(3)
        results.append(agent.predict(OBS, **choice)[0])
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])


def test_softmax_frequencies() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.tensor([100.0, 100.5, 101.5])
    actions = torch.arange(3.0)[None, :, None].expand(20_000, 3, 1)
    drawn = select_action(actions, q.expand(20_000, 3), "softmax", 0.5, gumbel((20_000, 3), g))
    share = torch.stack([(drawn == k).float().mean() for k in range(3)])
    torch.testing.assert_close(share, torch.softmax(q / 0.5, -1), rtol=0, atol=0.015)


def test_an_action_depends_on_its_own_observation_only() -> None:
    """deterministic=True: whatever stands beside it in the batch, and in whatever order."""
    agent, order = an_agent(), np.array([3, 0, 5, 1, 4, 2])
    whole = agent.predict(OBS, deterministic=True)[0]
    np.testing.assert_allclose(agent.predict(OBS[order], deterministic=True)[0], whole[order], atol=1e-6)
    np.testing.assert_allclose(agent.predict(OBS[4], deterministic=True)[0], whole[4], atol=1e-6)
    assert len(np.unique(whole, axis=0)) == 6


@pytest.mark.parametrize("expectile", [0.7, 0.9])
def test_implicit_choice_weighs_by_the_sign_of_the_advantage(expectile: float) -> None:
    """tau for each of the samples above V, 1 - tau for each of those not above; how far does not count."""
    g = torch.Generator().manual_seed(0)
    advantage = torch.tensor([-3.0, 0.0, 0.1, 50.0])
    actions = torch.arange(4.0)[None, :, None].expand(40_000, 4, 2)
    drawn = implicit_choice(actions, advantage.expand(40_000, 4), expectile, gumbel((40_000, 4), g))
    share = torch.stack([(drawn[:, 1] == k).float().mean() for k in range(4)])
    torch.testing.assert_close(share, 0.5 * torch.tensor([1 - expectile] * 2 + [expectile] * 2), rtol=0, atol=0.01)


def test_implicit_actor_measures_the_advantage_at_v() -> None:
    """With V between the Q of actions to the left and to the right, nine draws in ten go to the right."""
    agent = an_agent(expectile=0.9)
    critic: Any = agent.critic
    critic.q_target = Function(None)
    critic.q_target.on_parts = lambda act, obs: act[..., 0].sign() + torch.tensor([7.0, 8.0])[:, None, None]
    obs = np.repeat(OBS[:1], 2000, 0)
    share = []
    for v in (7.0, 9.0):  # above all, every sample has the same weight
        critic.v = Function(lambda obs, v=v: torch.full((len(obs), 1), v))
        share.append((agent.predict(obs, select="expectile", n_candidates=32)[0][:, 0] > 0).mean())
    behavior = (agent.predict(obs, select="first")[0][:, 0] > 0).mean()
    assert share[0] == pytest.approx(0.9 * behavior / (0.9 * behavior + 0.1 * (1 - behavior)), abs=0.05)
    assert share[1] == pytest.approx(behavior, abs=0.05)


# ---- learning ----------------------------------------------------------------------------------------------------------


def test_chooses_the_best_of_what_the_data_do() -> None:
    """One-step choices, reward -|a - 0.5|^2 under uniform data: every rule comes nearer to 0.5 than the data."""
    data = line_data(2000, horizon=1)
    data["terminations"][:], data["truncations"][:] = True, False
    agent = IDQL(
        seed=0,
        verbose=0,
        device="cpu",
        critic_steps=200,
        behavior_steps=150,
        batch_size=128,
        learning_rate=3e-3,
        tau=0.05,
        ema_tau=0.05,
        reward_transform="none",
        policy_kwargs={"net_arch": [64, 64], "behavior_width": 64, "behavior_blocks": 2},
        preset=None,
    ).learn(data)
    obs = np.random.default_rng(1).normal(size=(300, 3)).astype(np.float32)

    def error(**choice: Any) -> float:
        return float(np.square(agent.predict(obs, **choice)[0] - 0.5).sum(-1).mean())

    behavior = error(select="first")
    assert 0.7 < behavior < 1.2  # that of uniform actions is 7 / 6; five steps make them a little narrower
    assert error() < 0.1 and error(deterministic=True) < 0.1
    assert error() < error(n_candidates=4) < 0.5 * behavior
    assert error(select="expectile", n_candidates=16) < 0.95 * behavior
    assert error(select="softmax", temperature=0.05) < 0.2 * behavior


def test_every_option_changes_the_result() -> None:
    """No knob is decoration: each alternative value gives other actions, or at least another critic to choose them by."""
    base: dict[str, Any] = {
        "preset": None,
        "critic_steps": 12,
        "behavior_steps": 5,
        "batch_size": 16,
        "n_candidates": 8,
        "tau": 0.1,
        "learning_rate": 3e-3,
        "ema_tau": 0.1,
        "select": "softmax",
        "temperature": 0.5,
        "policy_kwargs": SMALL,
        "verbose": 0,
        "seed": 0,
        "device": "cpu",
    }
    other: dict[str, Any] = {
        "deterministic": True,
        "precondition": True,
        "return_temperature": 0.1,
        "returns_share": 0.5,
        "q_layer_norm": True,
        "expectile": 0.95,
        "n_candidates": 9,
        "select": "argmax",
        "temperature": 0.05,
        "sampling_temperature": 0.5,
        "n_diffusion_steps": 4,
        "ema_tau": 0.5,
        "weight_decay": 0.1,
        "dropout": 0.5,
        "v_layer_norm": False,
        "gamma": 0.5,
        "tau": 0.5,
        "learning_rate": 1e-3,
        "batch_size": 17,
        "reward_transform": "normalize",
        "normalize_obs": True,
        "critic_steps": 13,
        "behavior_steps": 6,
        "solver": "ddim",
    }
    obs, results = np.random.default_rng(3).normal(size=(100, 3)).astype(np.float32), {}
    for name, value in (*other.items(), ("select", "expectile"), ("select", "first"), ("seed", 0)):
        agent = IDQL(**{**base, name: value}).learn(line_data())
        with torch.inference_mode():
            q = agent.critic.q_target(torch.zeros(1, 5)).numpy().ravel()
        results[name, value] = np.concatenate([agent.predict(obs)[0].ravel(), q])
    assert_all_differ(results)
    assert {*other, "solver_steps"} == offline_knobs("IDQL")
