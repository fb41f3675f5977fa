"""SRPO computes what the authors' code computes: losses, first gradients, and outputs after three updates of each stage."""

import re
from typing import Any

import pytest
import torch
from reference_rule import make_weights, read_reference
from small_agents import update
from torch import Tensor, nn

from diffagents import SRPO
from diffagents.storage.official_checkpoints import srpo_behavior_state, srpo_critic_state, srpo_policy_state
from diffagents.types import Batch

VECTORS, INFO = read_reference("srpo")
SETTINGS = INFO["settings"]
BATCH = Batch(
    VECTORS["batch.observations"],
    VECTORS["batch.actions"],
    VECTORS["batch.rewards"].reshape(-1),
    VECTORS["batch.next_observations"],
    VECTORS["batch.terminals"].reshape(-1),
)
HORIZON = int(re.search(r"over ([\d,]+) steps", SETTINGS["policy_lr_schedule"])[1].replace(",", ""))  # type: ignore[index]
VARIANTS = sorted({m[1] for key in VECTORS if (m := re.match(r"policy\.(\w+)\.after3$", key))})


def make_agent(variant: str = "locomotion") -> SRPO:
    """The agent that the file's settings describe, for one of its policy variants."""
    policy = make_weights(INFO, f"policy_stage.{variant}.policy.")
    weights = {key for key in policy if key.endswith("weight")}
    hidden = [policy[f"net.{2 * i}.weight"].shape[0] for i in range(len(weights) - 1)]
    v = make_weights(INFO, "critic.v.v.")
    agent = SRPO.from_official(
        behavior=make_weights(INFO, "policy_stage.behavior."),
        critic=make_weights(INFO, "critic."),
        policy=policy,
        seed=0,
        verbose=0,
        device="cpu",
        beta=SETTINGS["beta"],
        expectile=SETTINGS["expectile"],
        gamma=SETTINGS["discount"],
        tau=SETTINGS["target_tau"],
        dropout=SETTINGS["dropout"],
        learning_rate=SETTINGS["lr"],
        subtract_noise="noise" in variant,
        q_grad_norm="rms" if variant == "antmaze" else None,
    )
    assert hidden == [layer.out_features for layer in agent.policy.net if isinstance(layer, nn.Linear)][:-1]
    assert v["0.weight"].shape[1] == agent.spec.obs_dim == INFO["obs_dim"]
    for optimizer in agent.optimizers.values():
        optimizer.start_schedule(HORIZON)
    return agent


def close(ours: Any, theirs: Any, what: str) -> None:
    torch.testing.assert_close(
        torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-5, atol=1e-5, msg=lambda m: f"{what}: {m}"
    )


def check_grad_norms(module: nn.Module, expected: dict[str, float], rename: Any) -> None:
    """Each parameter's first gradient has the recorded norm, to 1e-4 relative."""
    ours = rename({name: torch.zeros(1) for name in expected})
    assert len(ours) == len(expected)
    by_name = dict(module.named_parameters())
    for (theirs, norm), name in zip(expected.items(), rename_names(expected, rename), strict=True):
        gradient = by_name[name].grad
        assert gradient is not None, name
        torch.testing.assert_close(gradient.norm(), torch.tensor(norm), rtol=1e-4, atol=1e-5, msg=f"{theirs} -> {name}")


def rename_names(expected: dict[str, float], rename: Any) -> list[str]:
    renamed = rename({name: torch.tensor([float(i)]) for i, name in enumerate(expected)})
    return [name for name, _ in sorted(renamed.items(), key=lambda item: float(item[1]))]


def draws_of(stage: str, i: int) -> dict[str, Tensor]:
    return {"u": VECTORS[f"{stage}.draw{i}.u"], "eps": VECTORS[f"{stage}.draw{i}.noise"]}


def test_behavior() -> None:
    agent = make_agent()
    state = srpo_behavior_state(make_weights(INFO, "behavior."))
    agent.behavior.load_state_dict({**state, "noise": agent.behavior.noise})
    for i, expected in enumerate(INFO["behavior.losses"]):
        metrics = update(agent.behavior_loss, BATCH, draws_of("behavior", i))
        torch.testing.assert_close(metrics["behavior_loss"].item(), expected, rtol=1e-5, atol=0)
        if i == 0:
            check_grad_norms(agent.behavior, INFO["behavior.grad_norms_first_step"], srpo_behavior_state)
    with torch.no_grad():
        eps = agent.behavior.net(BATCH.act, BATCH.obs, VECTORS["behavior.probe.t"])
    close(eps, VECTORS["behavior.probe.eps_after3"], "eps after 3 updates")


def test_critic() -> None:
    agent = make_agent()
    agent.critic.load_state_dict(srpo_critic_state(make_weights(INFO, "critic.")))
    for v_loss, q_loss, _ in INFO["critic.losses_v_q_iqlpolicy"]:
        metrics = update(agent.critic_loss, BATCH, {})
        torch.testing.assert_close(metrics["v_loss"].item(), v_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(metrics["q_loss"].item(), q_loss, rtol=1e-5, atol=0)
    act_obs = torch.cat([BATCH.act, BATCH.obs], -1)
    with torch.no_grad():
        close(
            agent.critic.q(act_obs)[:, :, None],
            torch.stack([VECTORS["critic.after3.q1"], VECTORS["critic.after3.q2"]]),
            "Q",
        )
        targets = torch.stack([VECTORS["critic.after3.q1_target"], VECTORS["critic.after3.q2_target"]])
        close(agent.critic.q_target(act_obs)[:, :, None], targets, "target Q")
        close(agent.critic.v(BATCH.obs), VECTORS["critic.after3.v"], "V")


@pytest.mark.parametrize("variant", VARIANTS)
def test_policy(variant: str) -> None:
    agent = make_agent(variant)
    critic = srpo_critic_state({**make_weights(INFO, "critic."), **make_weights(INFO, "policy_stage.")})
    targets = srpo_critic_state(
        {
            **make_weights(INFO, "critic."),
            **{k: v for k, v in make_weights(INFO, "policy_stage.").items() if k.startswith("q_target")},
        }
    )
    assert critic.keys() == targets.keys()
    agent.critic.load_state_dict(targets)
    for i in range(3):
        update(agent.policy_loss, BATCH, draws_of(f"policy.{variant}", i))
        if i == 0:
            check_grad_norms(agent.policy, INFO[f"policy.{variant}.grad_norms_first_step"], srpo_policy_state)
    with torch.no_grad():
        close(agent.policy(BATCH.obs), VECTORS[f"policy.{variant}.after3"], "actions after 3 updates")


def test_variants_differ() -> None:
    """The three variants are three computations: an agent of one does not reproduce another."""
    agent = make_agent("locomotion_noise_baseline")
    agent.critic.load_state_dict(
        srpo_critic_state(
            {
                **make_weights(INFO, "critic."),
                **{k: v for k, v in make_weights(INFO, "policy_stage.").items() if k.startswith("q_target")},
            }
        )
    )
    for i in range(3):
        update(agent.policy_loss, BATCH, draws_of("policy.locomotion_noise_baseline", i))
    with torch.no_grad():
        assert (agent.policy(BATCH.obs) - VECTORS["policy.locomotion.after3"]).abs().max() > 1e-4
