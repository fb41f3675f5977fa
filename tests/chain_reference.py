"""Replaying the reference files of Diffusion-QL and DiffCPS, whose networks and recorded draws have the same form."""

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from reference_rule import make_weights, read_reference
from small_agents import update
from torch import Tensor

from diffagents.agents.diffcps import DiffCPS
from diffagents.agents.diffusion_ql import DiffusionQL
from diffagents.storage.official_checkpoints import chain_actor_state, chain_critic_state
from diffagents.types import Batch, Metrics

ChainAgent = TypeVar("ChainAgent", DiffusionQL, DiffCPS)


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any], Batch]:
    vectors, info = read_reference(name)
    batch = Batch(
        vectors["batch.observations"],
        vectors["batch.actions"],
        vectors["batch.rewards"].reshape(-1),
        vectors["batch.next_observations"],
        vectors["batch.terminals"].reshape(-1),
    )
    return vectors, info, batch


def make_agent(cls: type[ChainAgent], info: dict[str, Any], **knobs: Any) -> ChainAgent:
    """The agent that the file's settings describe; lagged copies have weights of their own."""
    settings = info["settings"]
    assert settings["schedule"] == "vp 0.1..10"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent = cls.from_official(
            actor=make_weights(info, "actor."),
            critic=make_weights(info, "critic."),
            seed=0,
            verbose=0,
            device="cpu",
            n_diffusion_steps=settings["T"],
            gamma=settings["discount"],
            tau=settings["tau"],
            learning_rate=settings["lr"],
            critic_learning_rate=settings["lr"],
            max_grad_norm=settings["grad_norm"],
            **knobs,
        )
    agent.policy_ema.net.load_state_dict(chain_actor_state(make_weights(info, "actor_ema.")))
    agent.critic_target.load_state_dict(chain_critic_state(make_weights(info, "critic_target.")))
    return agent


def take(vectors: dict[str, Tensor], prefix: str, noise: Iterator[int], n: int) -> list[Tensor]:
    return [vectors[f"{prefix}.{next(noise):02d}"] for _ in range(n)]


def replay_critic(
    agent: DiffusionQL | DiffCPS, batch: Batch, vectors: dict[str, Tensor], variant: str, noise: Iterator[int]
) -> Metrics:
    noises = torch.stack(take(vectors, f"{variant}.draw", noise, agent.config.n_diffusion_steps + 1))
    return update(agent.critic_loss, batch, {"noises": noises})


def replay_policy(
    agent: DiffusionQL | DiffCPS, batch: Batch, vectors: dict[str, Tensor], variant: str, noise: Iterator[int], coin: float
) -> Metrics:
    i, eps = take(vectors, f"{variant}.draw", noise, 2)
    noises = torch.stack(take(vectors, f"{variant}.draw", noise, agent.config.n_diffusion_steps + 1))
    loss = agent.policy_losses if isinstance(agent, DiffCPS) else agent.policy_loss
    return update(loss, batch, {"i": i, "eps": eps, "noises": noises, "coin": torch.tensor(coin)})


def check_networks(agent: DiffusionQL | DiffCPS, batch: Batch, vectors: dict[str, Tensor], variant: str) -> None:
    """Outputs on the batch after the updates, and one sampled action batch, to 1e-5."""
    t, pairs = vectors[f"{variant}.probe.t"], torch.cat([batch.obs, batch.act], -1)
    steps = agent.config.n_diffusion_steps + 1
    noises = torch.stack([vectors[f"{variant}.sample_draw.{i:02d}"] for i in range(steps)])
    with torch.no_grad():
        ours = {
            "eps": agent.policy.net(batch.act, batch.obs, t),
            "eps_ema": agent.policy_ema.net(batch.act, batch.obs, t),
            "q1": agent.critic(pairs)[0, :, None],
            "q2": agent.critic(pairs)[1, :, None],
            "q1_target": agent.critic_target(pairs)[0, :, None],
            "q2_target": agent.critic_target(pairs)[1, :, None],
            "sampled_action": agent.policy.sample(batch.obs, noises),
        }
    expected = {key.rsplit(".", 1)[1] for key in vectors if key.startswith(f"{variant}.after")}
    assert set(ours) == expected
    for name, value in ours.items():
        key = next(key for key in vectors if key.startswith(f"{variant}.after") and key.endswith(f".{name}"))
        torch.testing.assert_close(value, vectors[key], rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
