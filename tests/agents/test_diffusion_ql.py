"""Diffusion-QL against closed forms, its options, and the authors' checkpoint files."""

import pathlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import assert_all_differ, offline_knobs
from toy import line_data

from diffagents import DiffusionQL
from diffagents.diffusion.chain import vp_chain
from diffagents.types import Batch

SMALL: dict[str, Any] = {
    "preset": None,
    "seed": 0,
    "verbose": 0,
    "device": "cpu",
    "batch_size": 16,
    "train_steps": 6,
    "policy_kwargs": {"net_arch": [16, 16]},
}
DATA = line_data()
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")


def test_max_q_backup_is_the_best_sample_for_each_critic_then_the_lower_critic() -> None:
    agent = DiffusionQL(max_q_backup=True, n_backup_samples=3, gamma=0.5, **SMALL).learn(DATA)
    q = torch.tensor([[1.0, 5.0, 2.0, 0.0, -1.0, -2.0], [4.0, 3.0, 2.0, -5.0, 1.0, -3.0]])  # twins x (2 states x 3 samples)
    online = torch.tensor([[0.5, 1.0], [0.0, 2.0]], requires_grad=True)
    agent.critic_target.forward = lambda pairs: q  # type: ignore[method-assign]
    agent.critic.forward = lambda pairs: online  # type: ignore[method-assign]
    obs = torch.zeros(2, 3)
    batch = Batch(obs, torch.zeros(2, 2), torch.tensor([1.0, 2.0]), obs, torch.tensor([0.0, 0.0]))
    loss, _ = agent.critic_loss(batch, agent.draw_critic(2, agent.generator))
    goal = torch.tensor([1.0 + 0.5 * 4.0, 2.0 + 0.5 * 0.0])  # min(5, 4), min(0, 1)
    expected = ((online - goal) ** 2).mean(1).sum()
    torch.testing.assert_close(loss, expected)


def test_the_lagged_policy_stands_still_and_then_follows_every_fifth_step() -> None:
    agent = DiffusionQL(ema_start=4, ema_every=3, ema_tau=0.1, **{**SMALL, "train_steps": 9})
    seen: list[torch.Tensor] = []
    online: list[torch.Tensor] = []

    def watch(local: dict[str, Any], _: Any) -> bool:
        seen.append(next(local["self"].policy_ema.net.parameters()).clone())
        online.append(next(local["self"].policy.net.parameters()).detach().clone())
        return True

    agent.learn(DATA, callback=watch)
    moved = [i for i in range(1, 9) if not torch.equal(seen[i], seen[i - 1])]
    assert moved == [4, 7]  # steps counted from 0
    torch.testing.assert_close(seen[4], 0.9 * seen[3] + 0.1 * online[4])


def test_eta_zero_is_cloning_and_q_reaches_the_policy_through_the_chain() -> None:
    """With eta 0 the policy's loss is the denoising loss; the Q term has a gradient in every layer of the denoiser."""
    agent = DiffusionQL(eta=0.0, **SMALL).learn(DATA)
    batch = Batch(torch.randn(16, 3), torch.rand(16, 2), torch.zeros(16), torch.randn(16, 3), torch.zeros(16))
    noise = agent.draw_policy(16, agent.generator)
    loss, metrics = agent.policy_loss(batch, noise)
    assert loss.item() == metrics["bc_loss"].item()
    agent.q_loss(batch, noise).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.policy.net.parameters())


def test_q_moves_the_policy_towards_better_actions() -> None:
    """One-step choices, reward -|a - 0.5|^2 under uniform data: cloning acts at random, eta = 3 near 0.5."""
    data = line_data(2000, horizon=1)
    data["terminations"][:], data["truncations"][:] = True, False
    obs = np.random.default_rng(1).normal(size=(200, 3)).astype(np.float32)
    errors = []
    for eta in (0.0, 3.0):
        agent = DiffusionQL(
            **{**SMALL, "train_steps": 300, "batch_size": 64, "policy_kwargs": {"net_arch": [32, 32]}},
            eta=eta,
            n_diffusion_steps=3,
            learning_rate=3e-3,
            critic_learning_rate=5e-3,
        ).learn(data)
        errors.append(np.abs(agent.predict(obs, select="first")[0] - 0.5).mean())
        if eta == 0.0:  # choosing among clones by Q is half of the method
            assert np.abs(agent.predict(obs, select="argmax")[0] - 0.5).mean() < 0.5 * errors[0]
    assert errors[1] < 0.5 * errors[0], errors


def test_softmax_temperature_between_first_and_argmax() -> None:
    agent = DiffusionQL(**{**SMALL, "train_steps": 30}, n_candidates=8).learn(DATA)
    obs = np.zeros((400, 3), np.float32)
    cold, hot = agent.predict(obs, temperature=1e-6)[0], agent.predict(obs, temperature=1e6)[0]
    agent.set_random_seed(0)
    best = agent.predict(obs, select="argmax")[0]
    agent.set_random_seed(0)
    cold = agent.predict(obs, temperature=1e-6)[0]
    assert np.array_equal(cold, best) and not np.allclose(hot, best)


def official_files(folder: pathlib.Path, source: DiffusionQL, betas: torch.Tensor) -> tuple[pathlib.Path, pathlib.Path]:
    """What the authors' `save_model` writes: the actor below `model.` beside its schedule, the critic's twins."""
    net, actor = source.policy.net, {"betas": betas, "alphas_cumprod": torch.cumprod(1 - betas, 0)}
    last = 2 * (len(list(net.trunk)) // 2)  # type: ignore[arg-type]
    for name, value in net.state_dict().items():
        part, index, kind = name.split(".")
        if part == "time_mlp":
            actor[f"model.time_mlp.{int(index) + 1}.{kind}"] = value
        else:
            actor[f"model.final_layer.{kind}" if int(index) == last else f"model.mid_layer.{index}.{kind}"] = value
    critic = {}
    for i, (weight, bias) in enumerate(zip(source.critic.weights, source.critic.biases, strict=True)):
        for twin in range(2):
            critic[f"q{twin + 1}_model.{2 * i}.weight"] = weight[twin].detach().T.contiguous()
            critic[f"q{twin + 1}_model.{2 * i}.bias"] = bias[twin, 0].detach()
    torch.save(actor, folder / "actor_50.pth")
    torch.save(critic, folder / "critic_50.pth")
    return folder / "actor_50.pth", folder / "critic_50.pth"


def test_official_checkpoint(tmp_path: pathlib.Path) -> None:
    source = DiffusionQL(**{**SMALL, "policy_kwargs": {"net_arch": [24, 16, 8]}}).learn(DATA)
    files = official_files(tmp_path, source, vp_chain(5).beta)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agent = DiffusionQL.from_official(*files, verbose=0, device="cpu")
    assert len(caught) == 1 and "start as copies" in str(caught[0].message)
    obs = torch.randn(5, 3)
    noises = source.policy.noises((5,), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for policy in (agent.policy, agent.policy_ema):
            assert torch.equal(policy.sample(obs, noises), source.policy.sample(obs, noises))
        pairs = torch.randn(5, 5)
        for critic in (agent.critic, agent.critic_target):
            assert torch.equal(critic(pairs), source.critic(pairs))
    agent.predict(np.zeros(3))
    agent.learn(DATA, total_timesteps=2)


def test_official_checkpoint_of_another_kind_is_refused(tmp_path: pathlib.Path) -> None:
    source = DiffusionQL(**SMALL).learn(DATA)
    actor, critic = official_files(tmp_path, source, torch.linspace(1e-4, 2e-2, 5))
    with pytest.raises(ValueError, match="only the VP schedule"):
        DiffusionQL.from_official(actor, critic)
    actor, critic = official_files(tmp_path, source, vp_chain(5).beta)
    with pytest.raises(ValueError, match="n_diffusion_steps=7"):
        DiffusionQL.from_official(actor, critic, n_diffusion_steps=7)
    with pytest.raises(ValueError, match="no Diffusion-QL actor among"):
        DiffusionQL.from_official(critic, critic)
    with pytest.raises(ValueError, match="no Diffusion-QL critic among"):
        DiffusionQL.from_official(actor, actor)
    with pytest.raises(FileNotFoundError, match="no official actor checkpoint"):
        DiffusionQL.from_official(tmp_path / "nothing.pth", critic)


def test_every_option_changes_the_result() -> None:
    base: dict[str, Any] = {**SMALL, "ema_start": 1, "ema_every": 1, "tau": 0.1, "max_grad_norm": 0.1}
    other: dict[str, Any] = {
        "deterministic": True,
        "deterministic_backup": True,
        "cosine": True,
        "precondition": True,
        "return_temperature": 0.1,
        "returns_share": 0.5,
        "q_layer_norm": True,
        "eta": 0.5,
        "n_diffusion_steps": 4,
        "gamma": 0.5,
        "tau": 0.5,
        "ema_tau": 0.9,
        "ema_every": 2,
        "ema_start": 3,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "max_grad_norm": None,
        "batch_size": 17,
        "max_q_backup": True,
        "n_candidates": 3,
        "select": "first",
        "solver": "ddim",
        "temperature": 1e-4,
        "reward_transform": "normalize",
        "normalize_obs": True,
        "train_steps": 7,
    }
    results = {name: run({**base, name: value}) for name, value in other.items()}
    results["n_backup_samples"] = run({**base, "max_q_backup": True, "n_backup_samples": 2})
    results["q_norm"] = run({**base, "precondition": True, "q_norm": "spread"})
    results["default"] = run(base)
    assert_all_differ(results)
    assert {*other, "q_norm", "n_backup_samples", "solver_steps"} == offline_knobs("DiffusionQL")


def run(knobs: dict[str, Any]) -> np.ndarray:
    """What a run leaves: a choice, and numbers that depend on all networks (an action alone may tie between candidates)."""
    agent = DiffusionQL(**knobs).learn(DATA)
    actions = agent.predict(np.ones((20, 3), np.float32))[0].ravel()
    return np.concatenate([actions, agent.critic_target.weights[0].flatten().numpy()])
