"""The gain of a policy over the data after one step, estimated from the returns of the data.

    gain = E_{s, a ~ data}[ Q(s, pi(s)) - Q(s, a) ]

Q(s, a) is the value of what collected the data: the discounted return that followed, by regression. This is the first-order
part of the difference between the returns of pi and of the data: Kakade and Langford, ICML 2002, Lemma 6.1, with the states of
the data in place of those that pi would visit. One Q serves all policies, and nothing is bootstrapped.
Details
  [D1] An episode that was cut continues as it ended (`functional.returns_to_go`).
  [D2] Each of several networks learns from all episodes but a part of its own: where they disagree, the data do not decide.
  [D3] Q has LayerNorm, which bounds extrapolations; observations are normalised by the moments of the data, actions are in
       [-1, 1], and returns are in units of their standard deviation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffagents.config.checks import MOST
from diffagents.config.hyperparameters import Hyperparameters, hyperparameter
from diffagents.data.normalize import ObsNormalizer
from diffagents.data.transitions import Transitions
from diffagents.functional import returns_to_go
from diffagents.networks.mlp import EnsembleMLP
from diffagents.training.updates import Noise, Optimizer, Runner, Stage, Update
from diffagents.types import Batch, Metrics


@dataclass(frozen=True)
class OneStepConfig(Hyperparameters):
    """Settings of the estimate, the same for all policies that are compared."""

    gamma: float = hyperparameter(0.99, "Discount factor, whatever the policies were trained with.", at_least=0, below=1)
    steps: int = hyperparameter(5_000, "Gradient steps.", at_least=1)
    batch_size: int = hyperparameter(256, "Number of transitions in a batch.", at_least=1, at_most=MOST)
    learning_rate: float = hyperparameter(1e-3, "Initial learning rate, which falls to 0 on a cosine.", above=0)
    hidden: tuple[int, ...] = hyperparameter((256, 256), "Widths of the hidden layers of Q.", at_least=1)
    n_networks: int = hyperparameter(
        4, "Number of networks, each of which leaves out a part of the episodes [D2].", at_least=1, at_most=MOST
    )
    seed: int = hyperparameter(0, "Seed of the parts, the batches and the initial weights.", at_least=0)


class OneStep:
    """Q of a dataset, fitted once for any number of policies.

    Args:
        data: the dataset.
        config: settings of the estimate.
        device: where to fit.

    Attributes:
        scale: the standard deviation of the data's discounted returns, the unit of the gain.

    Raises:
        ValueError: if the dataset is empty.
    """

    def __init__(self, data: Transitions, config: OneStepConfig, device: torch.device | str = "cpu") -> None:
        if len(data) == 0:
            raise ValueError(f"{data.info.get('id', 'the dataset')} contains no transitions: there is nothing to estimate from")
        self.config, self.device = config, torch.device(device)
        self.normalizer = ObsNormalizer(data.spec.obs_dim).fit(data.obs)
        returns = returns_to_go(data.rew, data.done, data.episode_ends, config.gamma)  # [D1]
        self.scale = max(float(returns.std(correction=0)), 1e-6 * float(returns.abs().mean()), 1e-6)
        generator = torch.Generator().manual_seed(config.seed)
        part = torch.randint(max(2, config.n_networks), (len(data.episode_ends),), generator=generator)
        episode = torch.searchsorted(data.episode_ends, torch.arange(len(data)), right=True)
        sampler = data.sampler(self.device, None, self.normalizer).with_extras(
            returns=((returns - returns.mean()) / self.scale).to(self.device), part=part[episode].to(self.device)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            q = EnsembleMLP(config.n_networks, sampler.obs_dim + sampler.act_dim, config.hidden, layer_norm=True)
        self.q = q.to(self.device)
        members = torch.arange(config.n_networks, device=self.device)[:, None]

        def loss(batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
            error = self.q(torch.cat([batch.obs, batch.act], -1)) - batch.extras["returns"]  # (E, B)
            return (error.square() * (batch.extras["part"] != members)).mean(-1).sum(), {}  # [D2]

        optimizer = Optimizer(self.q.parameters(), config.learning_rate, cosine=True)
        optimizer.start_schedule(config.steps)
        stage = Stage("one_step", config.batch_size, (Update(loss, optimizers=(optimizer,)),))
        runner = Runner(stage, sampler, torch.Generator(self.device).manual_seed(config.seed))
        for k in range(config.steps):  # nothing in this loop waits for the device
            runner.step(k)

    @torch.no_grad()
    def gain(self, obs: Tensor, act: Tensor, data_act: Tensor) -> Tensor:
        """The gain in each state.

        Args:
            obs: (N, S), observations of the data in raw units.
            act: (N, A), the policy's actions there, in [-1, 1].
            data_act: (N, A), the data's actions there, in [-1, 1].

        Returns:
            (n_networks, N), in standard deviations of the data's discounted returns.
        """
        obs, act, data_act = (x.to(self.device) for x in (self.normalizer(obs), act, data_act))
        better: Tensor = self.q(torch.cat([obs, act], -1)) - self.q(torch.cat([obs, data_act], -1))
        return better.cpu()
