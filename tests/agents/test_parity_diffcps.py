"""DiffCPS computes what the authors' code computes: losses of four updates, the multiplier, all networks, an action."""

import pytest
import torch
from chain_reference import check_networks, make_agent, read, replay_critic, replay_policy

from diffagents import DiffCPS

VECTORS, INFO, BATCH = read("diffcps")
VARIANTS = ("plain", "max_q_backup")


def build(variant: str) -> DiffCPS:
    settings = INFO["settings"]
    return make_agent(
        DiffCPS,
        INFO,
        max_q_backup=variant == "max_q_backup",
        target_kl=settings["target_kl"],
        policy_freq=settings["policy_freq"],
        lambda_init=settings["lambda_init"],
        lambda_min=settings["lambda_min"][variant],
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_updates(variant: str) -> None:
    agent, expected = build(variant), INFO[f"{variant}.metrics"]
    policy_part = agent.stages()[0].updates[1]
    assert policy_part.loss == agent.policy_losses
    noise, coins, done = iter(range(10_000)), iter(INFO["settings"]["coin"]), 0
    for step in range(4):
        critic = replay_critic(agent, BATCH, VECTORS, variant, noise)
        if not policy_part.due(step):
            continue
        policy = replay_policy(agent, BATCH, VECTORS, variant, noise, next(coins))
        ours = {
            "critic_loss": critic["critic_loss"],
            "kl_loss": policy["bc_loss"],
            "actor_loss": policy["policy_loss"],
            "Lambda": agent.multiplier.value.detach(),
        }
        for name, value in ours.items():
            torch.testing.assert_close(value.item(), expected[name][done], rtol=1e-5, atol=1e-7, msg=f"{name} {step}")
        done += 1
    assert next(noise) == len(INFO[f"{variant}.draw_kinds"]) and done == len(expected["Lambda"])
    torch.testing.assert_close(agent.multiplier.value.item(), INFO[f"{variant}.lambda_after4"], rtol=1e-6, atol=0)
    check_networks(agent, BATCH, VECTORS, variant)
