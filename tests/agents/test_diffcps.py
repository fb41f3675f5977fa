"""DiffCPS: the multiplier's steps and bounds, the period of the policy, its options and the authors' checkpoint files."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import assert_all_differ, offline_knobs
from test_diffusion_ql import official_files
from toy import line_data

from diffagents import DiffCPS, DiffusionQL
from diffagents.diffusion.chain import vp_chain

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


def lambdas(n_steps: int, **knobs: Any) -> tuple[DiffCPS, list[float], list[float]]:
    """The multiplier and L_c after every policy step of a run."""
    agent = DiffCPS(**{**SMALL, "train_steps": n_steps, "policy_freq": 1, **knobs})
    values: list[float] = []

    def watch(local: dict[str, Any], _: Any) -> bool:
        values.append(agent.multiplier.value.item())
        return True

    agent.learn(DATA, callback=watch, log_interval=1)
    losses = [row["bc_loss"] for row in agent.history]
    return agent, values, losses


@pytest.mark.parametrize("target_kl", [0.01, 50.0])
def test_first_step_of_lambda_is_its_learning_rate_up_where_the_loss_exceeds_kappa(target_kl: float) -> None:
    _, values, losses = lambdas(1, target_kl=target_kl)
    sign = 1.0 if losses[0] > target_kl else -1.0
    assert sign == (1.0 if target_kl < 1 else -1.0)
    assert values[0] - 1.0 == pytest.approx(sign * 3e-5, rel=2e-2)


@pytest.mark.parametrize(("target_kl", "stop"), [(50.0, 0.3), (0.01, 0.4)])
def test_lambda_never_leaves_its_bounds_and_comes_back_at_once(target_kl: float, stop: float) -> None:
    """Projected after each step: it stays at the bound, and the first step the other way leads inside."""
    bounds = {"lambda_init": 0.35, "lambda_min": 0.3, "lambda_max": 0.4, "lambda_learning_rate": 0.02}
    agent, values, _ = lambdas(8, target_kl=target_kl, **bounds)
    assert all(0.3 <= value <= 0.4000001 for value in values)
    assert values[-1] == pytest.approx(stop)
    agent.optimizers["multiplier"].state.clear()  # Adam's momentum would carry it on for a while
    agent.optimizers["multiplier"].step([torch.tensor(1.0 if target_kl < 1 else -1.0)])
    assert 0.3 < agent.multiplier.value.item() < 0.4


def test_lambda_weighs_the_denoising_loss() -> None:
    agent = DiffCPS(lambda_init=2.5, **SMALL).learn(DATA, total_timesteps=1)
    row = agent.history[-1]
    assert row["policy_loss"] == pytest.approx(2.5 * row["bc_loss"] + row["q_loss"], rel=1e-5)


def test_policy_and_multiplier_move_every_third_step_only() -> None:
    agent = DiffCPS(**{**SMALL, "train_steps": 7}, policy_freq=3)
    seen: list[tuple[Any, Any, Any]] = []

    def watch(local: dict[str, Any], _: Any) -> bool:
        run = local["self"]
        parts = (run.policy.net, run.multiplier, run.critic)
        seen.append(tuple(torch.cat([p.detach().flatten() for p in part.parameters()]) for part in parts))  # type: ignore[arg-type]
        return True

    agent.learn(DATA, callback=watch)
    for part, expected in ((0, [3, 6]), (1, [3, 6]), (2, [1, 2, 3, 4, 5, 6])):
        assert [i for i in range(1, 7) if not torch.equal(seen[i][part], seen[i - 1][part])] == expected
    steps = {name: next(iter(opt.state.values()))["step"].item() for name, opt in agent.optimizers.items()}
    assert steps == {"policy": 3, "multiplier": 3, "critic": 7}


def test_a_tight_bound_clones_and_a_loose_one_follows_q() -> None:
    """One-step choices, reward -|a - 0.5|^2 under uniform data."""
    data = line_data(2000, horizon=1)
    data["terminations"][:], data["truncations"][:] = True, False
    obs = np.random.default_rng(1).normal(size=(200, 3)).astype(np.float32)
    errors = []
    for kappa, start in ((0.01, 20.0), (5.0, 1.0)):
        agent = DiffCPS(
            **{**SMALL, "train_steps": 300, "batch_size": 64, "policy_kwargs": {"net_arch": [32, 32]}},
            n_diffusion_steps=3,
            policy_freq=1,
            target_kl=kappa,
            lambda_init=start,
            lambda_learning_rate=0.003,
            learning_rate=3e-3,
            critic_learning_rate=5e-3,
        ).learn(data)
        errors.append(np.abs(agent.predict(obs, select="first")[0] - 0.5).mean())
    assert errors[1] < 0.6 * errors[0], errors


def test_a_clone_may_have_bounds_that_fit_the_saved_knobs_only() -> None:
    agent = DiffCPS(lambda_init=3.0, lambda_min=0.3, **SMALL).learn(DATA)
    assert agent.clone(lambda_min=2.0).config.lambda_min == 2.0
    with pytest.raises(ValueError, match=r"lambda_init=3\.0 must lie in"):
        agent.clone(lambda_min=5.0).learn(DATA)


def test_official_checkpoint(tmp_path: pathlib.Path) -> None:
    source = DiffusionQL(**SMALL).learn(DATA)
    files = official_files(tmp_path, source, vp_chain(5).beta)
    with pytest.warns(UserWarning, match="start as copies"):
        agent = DiffCPS.from_official(*files, verbose=0, device="cpu", preset="antmaze-medium-play", lambda_init=2.0)
    assert agent.multiplier.value.item() == 2.0
    assert agent.optimizers["policy"].learning_rate == 1e-3 and agent.optimizers["policy"].max_grad_norm == 2.0
    with pytest.raises(ValueError, match="name the row"):
        DiffCPS.from_official(*files, preset="auto")
    for key, value in source.policy.net.state_dict().items():
        assert torch.equal(agent.policy.net.state_dict()[key], value)
        assert torch.equal(agent.policy_ema.net.state_dict()[key], value)
    agent.learn(DATA, total_timesteps=2)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"lambda_min": 2.0, "lambda_max": 1.0}, "lambda_max=1.0 must exceed lambda_min"),
        ({"lambda_init": 0.1, "lambda_min": 0.3}, r"lambda_init=0.1 must lie in \[lambda_min, lambda_max\]"),
        ({"target_kl": 0.0}, "target_kl=0.0 must be positive"),
    ],
)
def test_bad_bounds(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffCPS(**knobs)


def test_every_option_changes_the_result() -> None:
    base: dict[str, Any] = {
        **SMALL,
        "ema_start": 1,
        "ema_every": 1,
        "tau": 0.1,
        "max_grad_norm": 0.1,
        "lambda_learning_rate": 0.1,
        "lambda_min": 0.2,
        "lambda_max": 1.15,
        "target_kl": 0.01,
        "policy_freq": 1,
    }
    other: dict[str, Any] = {
        "deterministic": True,
        "deterministic_backup": True,
        "cosine": True,
        "precondition": True,
        "return_temperature": 0.1,
        "returns_share": 0.5,
        "q_layer_norm": True,
        "target_kl": 50.0,
        "lambda_init": 0.9,
        "lambda_max": 1.05,
        "lambda_learning_rate": 0.02,
        "policy_freq": 2,
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
    results["constraint"] = run({**base, "returns_share": 0.5, "constraint": "behavior"})
    results["lambda_min"] = run({**base, "target_kl": 50.0, "lambda_min": 0.9})
    results["q_norm"] = run({**base, "precondition": True, "q_norm": "spread"})
    results["default"] = run(base)
    assert_all_differ(results)
    assert {*other, "q_norm", "n_backup_samples", "constraint", "lambda_min", "solver_steps"} == offline_knobs("DiffCPS")


def run(knobs: dict[str, Any]) -> np.ndarray:
    agent = DiffCPS(**knobs).learn(DATA)
    actions = agent.predict(np.ones((20, 3), np.float32))[0].ravel()
    return np.concatenate([actions, agent.critic_target.weights[0].flatten().numpy(), agent.multiplier.value.detach()[None]])
