"""BDPO computes what its author's JAX code computes: losses and metrics of six train steps, then all networks.

The first step agrees to 1e-5, the later ones to 5e-5 (losses, relative) and 1e-4 (means and outputs, absolute).
"""

import re
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from reference_rule import make_weights, read_reference
from small_agents import update
from torch import Tensor

from diffagents import BDPO
from diffagents.types import Batch, Spec

VECTORS, INFO = read_reference("bdpo")
CONFIG, CRITIC, ACTOR, BEHAVIOR = (
    INFO["config"],
    INFO["config"]["critic"],
    INFO["config"]["diffusion"]["actor"],
    INFO["config"]["diffusion"]["behavior"],
)
DIFFUSION = INFO["config"]["diffusion"]
BATCH = Batch(
    VECTORS["batch.obs"],
    VECTORS["batch.action"],
    VECTORS["batch.reward"].reshape(-1),
    VECTORS["batch.next_obs"],
    VECTORS["batch.terminal"].reshape(-1),
)


def denoiser_state(prefix: str) -> dict[str, Tensor]:
    weights, state = make_weights(INFO, prefix), {}
    for name, value in weights.items():
        part, layer, kind = re.fullmatch(r"(\w+)\.Dense_(\d+)\.(kernel|bias)", name).groups()  # type: ignore[union-attr]
        place = f"time_mlp.0.{2 * int(layer)}" if part == "MLP_0" else f"trunk.{2 * int(layer)}"
        state[f"{place}.{'weight' if kind == 'kernel' else 'bias'}"] = value.T if kind == "kernel" else value
    return state


def ensemble_state(prefix: str, ours: str = "") -> dict[str, Tensor]:
    """The layers below `prefix`, then the output layer beside them, in the order of EnsembleMLP."""
    weights, state = make_weights(INFO, prefix), {}
    layers = sorted({int(m[1]) for name in weights if (m := re.match(r"backbone\.Dense_(\d+)", name))})
    sources = [f"backbone.Dense_{i}" for i in layers] + ["Dense_0"]
    for i, source in enumerate(sources):
        state[f"{ours}weights.{i}"] = weights[f"{source}.kernel"]
        state[f"{ours}biases.{i}"] = weights[f"{source}.bias"][:, None]
        if f"backbone.LayerNorm_{i}.scale" in weights and source.startswith("backbone"):
            state[f"{ours}norm_scales.{i}"] = weights[f"backbone.LayerNorm_{i}.scale"][:, None]
            state[f"{ours}norm_biases.{i}"] = weights[f"backbone.LayerNorm_{i}.bias"][:, None]
    return state


def value_state(prefix: str) -> dict[str, Tensor]:
    weights, state = make_weights(INFO, prefix), ensemble_state(prefix, "trunk.")
    for i in range(2):
        state[f"time_mlp.weights.{i}"] = weights[f"MLP_0.Dense_{i}.kernel"]
        state[f"time_mlp.biases.{i}"] = weights[f"MLP_0.Dense_{i}.bias"][:, None]
    return state


def make_agent(**knobs: Any) -> BDPO:
    """The agent that the file's config describes, with the file's weights in all eight networks."""
    assert DIFFUSION["noise_schedule"] == "vp" and DIFFUSION["solver"] == CRITIC["solver"] == "ddpm"
    assert not DIFFUSION["resnet"] and not DIFFUSION["layer_norm"] and DIFFUSION["dropout"] == 0
    assert (DIFFUSION["x_min"], DIFFUSION["x_max"]) == (-1.0, 1.0) and CRITIC["steps"] == DIFFUSION["steps"]
    assert ACTOR["clip_grad_norm"] == BEHAVIOR["clip_grad_norm"] == CRITIC["clip_grad_norm"]
    assert ACTOR["ema"] == BEHAVIOR["ema"] and CRITIC["ema_every"] == BEHAVIOR["ema_every"] == 1
    assert ACTOR["ema_every"] == CRITIC["update_ratio"] and BEHAVIOR["lr_decay_steps"] is None
    hidden = CRITIC["hidden_dims"]
    kwargs: dict[str, Any] = {
        "preset": None,
        "eta": CRITIC["eta"],
        "rho": CRITIC["rho"],
        "aggregation": CRITIC["q_target"],
        "n_critics": CRITIC["ensemble_size"],
        "n_samples": CRITIC["num_samples"],
        "n_diffusion_steps": DIFFUSION["steps"],
        "clip_x0": DIFFUSION["clip_sampler"],
        "gamma": CRITIC["discount"],
        "tau": CRITIC["ema"],
        "ema_tau": ACTOR["ema"],
        "policy_freq": CRITIC["update_ratio"],
        "warmup_steps": CONFIG["warmup_steps"],
        "learning_rate": ACTOR["lr"],
        "critic_learning_rate": CRITIC["lr"],
        "behavior_learning_rate": BEHAVIOR["lr"],
        "max_grad_norm": CRITIC["clip_grad_norm"],
        "max_q_backup": CRITIC["maxQ"],
        "q_layer_norm": CRITIC["layer_norm"],
    }
    arch = {"pi": DIFFUSION["mlp_hidden_dims"], "qf": hidden, "vf": hidden}
    agent = BDPO(seed=0, verbose=0, device="cpu", policy_kwargs={"net_arch": arch}, **(kwargs | knobs))
    agent.set_up(Spec(spaces.Box(-np.inf, np.inf, (INFO["obs_dim"],)), spaces.Box(-1.0, 1.0, (INFO["act_dim"],))))
    for name, network in {
        "behavior": agent.behavior,
        "behavior_target": agent.behavior_ema,
        "actor": agent.policy,
        "actor_target": agent.policy_ema,
    }.items():
        network.net.load_state_dict(denoiser_state(f"{name}."))
    agent.critic.load_state_dict(ensemble_state("q0.base."))
    agent.critic_target.load_state_dict(ensemble_state("q0_target.base."))
    agent.value.load_state_dict(value_state("vt.base."))
    agent.value_target.load_state_dict(value_state("vt_target.base."))
    for name, optimizer in agent.optimizers.items():
        horizon = {"policy": ACTOR, "behavior": BEHAVIOR}.get(name, CRITIC)["lr_decay_steps"]
        optimizer.start_schedule(horizon or 0)
    return agent


def draws_of(step: int, first: int, names: tuple[str, ...]) -> dict[str, Tensor]:
    found = {name: VECTORS[f"draw.step{step}.{first + k:02d}"] for k, name in enumerate(names)}
    if "i" in found:
        found["i"] = found["i"].reshape(-1).long() - 1  # the file counts n = 1..T
    return found


def replay(agent: BDPO) -> list[dict[str, float]]:
    """All recorded steps, with the parts that are due, under the file's names."""
    _, policy, behavior = agent.stages()[1].updates
    T, results = agent.config.n_diffusion_steps, []
    for step in range(len(INFO["metrics"])):
        noise = {
            "path": torch.stack(list(draws_of(step, 0, tuple(map(str, range(T + 1)))).values())),
            **draws_of(step, T + 1, ("i", "eps", "z")),
        }
        ours = update(agent.critic_losses, BATCH, noise)
        row = {
            "loss/q0_loss": ours["q_loss"],
            "loss/vt_loss": ours["v_loss"],
            "misc/q0_penalty": ours["path_kl"],
            "misc/vt_penalty": ours["step_kl"] / agent.act_dim,  # the file's is a mean over dimensions
            "misc/q0_mean": ours["q"],
            "misc/vt_mean": ours["v"],
        }
        used = T + 4
        assert policy.due(step) == behavior.due(step) == ("ddpm_loss" in INFO["metrics"][step])
        if policy.due(step):
            policy_draws = draws_of(step, used, ("i", "eps", "z"))
            row["loss/actor_loss"] = update(agent.policy_loss, BATCH, policy_draws)["policy_loss"]
            row["ddpm_loss"] = update(agent.behavior_loss, BATCH, draws_of(step, used + 3, ("i", "eps")))["behavior_loss"]
            used += 5
        assert used == len(INFO["draws"][step])
        results.append({name: value.item() for name, value in row.items()})
    return results


@pytest.fixture(scope="module")
def replayed() -> tuple[BDPO, list[dict[str, float]]]:
    agent = make_agent()
    return agent, replay(agent)


def test_losses_and_metrics(replayed: tuple[BDPO, list[dict[str, float]]]) -> None:
    for step, (ours, theirs) in enumerate(zip(replayed[1], INFO["metrics"], strict=True)):
        assert set(theirs) - set(ours) <= {"misc/reward", "misc/vt_std", "misc/eta"}
        for name, value in ours.items():
            loss = "loss" in name
            rtol, atol = (1e-5, 1e-6) if step == 0 else ((5e-5, 1e-6) if loss else (0.0, 1e-4))
            torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, msg=lambda m: f"{name} {step}: {m}")  # noqa: B023


def test_networks_after_six_steps(replayed: tuple[BDPO, list[dict[str, float]]]) -> None:
    agent, n = replayed[0], VECTORS["probe.n"].reshape(-1).long() - 1
    pairs = torch.cat([BATCH.obs, BATCH.act], -1)
    with torch.no_grad():
        ours = {
            "eps.actor": agent.policy.net(BATCH.act, BATCH.obs, n),
            "eps.actor_target": agent.policy_ema.net(BATCH.act, BATCH.obs, n),
            "eps.behavior": agent.behavior.net(BATCH.act, BATCH.obs, n),
            "eps.behavior_target": agent.behavior_ema.net(BATCH.act, BATCH.obs, n),
            "q0": agent.critic(pairs)[..., None],
            "q0_target": agent.critic_target(pairs)[..., None],
            "vt": agent.value(BATCH.obs, BATCH.act, n)[..., None],
            "vt_target": agent.value_target(BATCH.obs, BATCH.act, n)[..., None],
        }
    prefix = f"after{len(INFO['metrics'])}."
    assert set(ours) == {key.removeprefix(prefix) for key in VECTORS if key.startswith("after")}
    for name, value in ours.items():
        torch.testing.assert_close(value, VECTORS[prefix + name], rtol=0, atol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("knobs", [{"aggregation": "min"}, {"rho": 0.4}, {"max_q_backup": True}, {"clip_x0": False}])
def test_other_settings_do_not_agree(knobs: dict[str, Any]) -> None:
    """The agreement above is not for free: each of these is another computation."""
    ours, theirs = replay(make_agent(**knobs))[0], INFO["metrics"][0]
    assert max(abs(ours[name] - theirs[name]) for name in ours) > 1e-4
