"""Diffusion-QL computes what the authors' code computes: losses of four updates, then all networks and a sampled action."""

import pytest
import torch
from chain_reference import check_networks, make_agent, read, replay_critic, replay_policy

from diffagents import DiffusionQL

VECTORS, INFO, BATCH = read("diffusion_ql")
VARIANTS = ("plain", "max_q_backup")


def build(variant: str) -> DiffusionQL:
    settings = INFO["settings"]
    return make_agent(DiffusionQL, INFO, max_q_backup=variant == "max_q_backup", eta=settings["eta"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_updates(variant: str) -> None:
    agent, expected = build(variant), INFO[f"{variant}.metrics"]
    noise = iter(range(10_000))
    for step, coin in enumerate(INFO["settings"]["coin"]):
        critic = replay_critic(agent, BATCH, VECTORS, variant, noise)
        policy = replay_policy(agent, BATCH, VECTORS, variant, noise, coin)
        ours = {
            "critic_loss": critic["critic_loss"],
            "bc_loss": policy["bc_loss"],
            "ql_loss": policy["q_loss"],
            "actor_loss": policy["policy_loss"],
        }
        for name, value in ours.items():
            # The terms of actor_loss cancel: their sum is known as exactly as they are.
            terms = ("bc_loss", "ql_loss") if name == "actor_loss" else (name,)
            atol = 1e-5 * sum(abs(expected[term][step]) for term in terms) + 1e-7
            torch.testing.assert_close(value.item(), expected[name][step], rtol=0.0, atol=atol, msg=f"{name} {step}")
    assert next(noise) == len(INFO[f"{variant}.draw_kinds"])  # all of them were used
    check_networks(agent, BATCH, VECTORS, variant)


def test_variants_and_coins_differ() -> None:
    """A replay with the wrong variant or coin does not agree: the numbers above are not too easy."""
    expected = INFO["plain.metrics"]
    agent = build("plain")
    noise = iter(range(10_000))
    replay_critic(agent, BATCH, VECTORS, "plain", noise)
    policy = replay_policy(agent, BATCH, VECTORS, "plain", noise, 1.0 - INFO["settings"]["coin"][0])
    assert abs(policy["q_loss"].item() - expected["ql_loss"][0]) > 1e-3
    first = [INFO[f"{variant}.metrics"]["critic_loss"][0] for variant in VARIANTS]
    assert abs(first[0] - first[1]) > 1e-3
