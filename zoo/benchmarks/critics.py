"""Which critic, trained for minutes, shows a clone the way to better actions?

  python zoo/benchmarks/critics.py diffagents/hopper/medium-replay-v0 diffagents/walker2d/medium-replay-v0

Clones the best episodes (BC on return-weighted batches), trains critics of different kinds on the same batches, and lets the
clone take steps along the gradient of each:  a = m(s) + delta g / rms(g),  g = dQ/da at m(s). Prints the mean score over
episodes and its standard deviation for each delta. Every critic begins as the first one, which regresses on returns-to-go.
Needs the datasets of zoo/recipes.
"""

import argparse
import copy
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the networks are small

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffagents import evaluate, load_dataset
from diffagents.data.normalize import ObsNormalizer
from diffagents.data.sampler import Sampler
from diffagents.functional import action_gradient
from diffagents.networks.critics import IQLCritic
from diffagents.networks.mlp import TanhPolicy
from diffagents.training.updates import Optimizer
from diffagents.types import Batch

GAMMA, TEMPERATURE, TAU, BATCH = 0.99, 0.1, 0.005, 256
DELTAS = (0.0, 0.1, 0.2, 0.3)
KINDS = ("clone", "noisy clone", "expectile 0.5", "expectile 0.7", "expectile 0.9")


def train(n_steps: int, optimizer: Optimizer, loss: Callable[[], Tensor], after: Callable[[], None] = lambda: None) -> None:
    """Minimise a loss by Adam, its learning rate falling to 0 on a cosine."""
    optimizer.start_schedule(n_steps)
    for _ in range(n_steps):
        optimizer.step(torch.autograd.grad(loss(), optimizer.parameters))
        after()


def fit_critic(
    critic: IQLCritic, sampler: Sampler, n_steps: int, kind: str, clone: TanhPolicy, std: Tensor, generator: torch.Generator
) -> None:
    """Train a critic on "returns", or on TD targets of one of KINDS."""
    expectile = float(kind.rpartition(" ")[2]) if kind.startswith("expectile") else 0.5

    def target(batch: Batch) -> Tensor | None:
        if kind == "returns":
            return batch.extras["returns"]
        if kind.startswith("expectile"):
            return None  # that of IQL
        noise = std * torch.randn(BATCH, len(std), generator=generator) if kind == "noisy clone" else 0.0
        with torch.no_grad():
            return critic.policy_target(batch, (clone(batch.next_obs) + noise).clamp(-1.0, 1.0), GAMMA)

    def loss() -> Tensor:
        batch = sampler.sample(BATCH, generator)
        return critic.loss(batch, expectile, GAMMA, target(batch))[0]

    train(n_steps, Optimizer(critic.trained_parameters(), 1e-3, cosine=True), loss, lambda: critic.update_target(TAU))


class Steered:
    """The clone with a step along the critic's gradient, as a policy with `predict`."""

    def __init__(self, act: Callable[[Tensor], Tensor], normalizer: ObsNormalizer, data: Any) -> None:
        self._act, self._normalizer, self._spec = act, normalizer, data.spec
        self.observation_space, self.action_space = data.spec.observation_space, data.spec.action_space

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """As every policy's."""
        obs = self._normalizer(torch.as_tensor(np.asarray(observation), dtype=torch.float32))
        return self._spec.unscale_action(self._act(obs).numpy()), state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", help="Dataset ids.")
    parser.add_argument(
        "--steps", type=int, default=8000, help="Steps of the clone and of each part of a critic. Default: 8000."
    )
    parser.add_argument("--episodes", type=int, default=10, help="Episodes of each score. Default: 10.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the training. Default: 0.")
    args = parser.parse_args()
    for name in args.datasets:
        compare(name, args.steps, args.episodes, args.seed)


def compare(name: str, n_steps: int, n_episodes: int, seed: int) -> None:
    """Print the table of one dataset."""
    data = load_dataset(name, verbose=0)
    normalizer = ObsNormalizer(data.spec.obs_dim).fit(data.obs)
    sampler = data.sampler("cpu", data.fit_reward_transform("unit_returns"), normalizer)
    sampler = sampler.prefer_returns(TEMPERATURE).with_returns(GAMMA)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    clone = TanhPolicy(data.spec.obs_dim, data.spec.act_dim, (256, 256))

    def cloning() -> Tensor:
        batch = sampler.sample(BATCH, generator, True)
        return F.mse_loss(clone(batch.obs), batch.act)

    train(n_steps, Optimizer(clone.parameters(), 1e-3, cosine=True), cloning)
    some = sampler.sample(4096, generator, True)
    std = (clone(some.obs) - some.act).square().mean(0).sqrt().detach()
    returns = IQLCritic(data.spec.obs_dim, data.spec.act_dim, (256, 256), (256, 256), q_layer_norm=True)
    fit_critic(returns, sampler, n_steps, "returns", clone, std, generator)
    for kind in ("returns", *KINDS):
        critic = copy.deepcopy(returns)
        if kind != "returns":
            fit_critic(critic, sampler, n_steps, kind, clone, std, generator)

        def gradient(obs: Tensor, critic: IQLCritic = critic) -> Tensor:
            return action_gradient(lambda a: critic.target_mean(obs, a), clone(obs))

        unit = gradient(some.obs).square().mean().sqrt()
        line = f"{name} {kind:>14}"
        for delta in DELTAS:

            @torch.no_grad()
            def act(obs: Tensor, size: Any = delta / unit, gradient: Callable[[Tensor], Tensor] = gradient) -> Tensor:
                return (clone(obs) + size * gradient(obs)).clamp(-1.0, 1.0)

            result = evaluate(Steered(act, normalizer, data), data.info["env_spec"], n_episodes, seed=5000, n_envs=n_episodes)
            spread = (result.score or 0.0) * result.std_return / max(abs(result.mean_return), 1e-9)
            line += f" | delta {delta:.1f}: {result.score or result.mean_return:6.1f} ± {spread:4.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
