"""Plain versions of the baselines, in the style of straightforward.py: IQL, IDQL, TD3+BC, diffusion BC, AWR, QGPO, SfBC.

What is computed once for the whole data, the supports of QGPO (DPM-Solver) and the returns of AWR and SfBC, is passed as a
tensor in addition to the batch.
"""

import copy

import torch
from straightforward import Batch, Losses, PlainIQLCritic
from straightforward_parts import (
    Chain,
    Denoiser,
    Fourier,
    ResidualDenoiser,
    TwinQ,
    cosine,
    descend,
    match_noise,
    mlp,
    soft_update,
    tanh_policy,
    vp_sde,
)
from torch import Tensor, nn
from torch.nn import functional as F


class UNetBlock(nn.Module):
    """Two layers with a skip; the embedding (..., 128) of time and state enters between them."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Sequential(nn.Linear(n_in, n_out), nn.SiLU()), nn.Linear(n_out, n_out)
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(128, n_out))
        self.skip = nn.Linear(n_in, n_out) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.inner(x) + self.condition(embedding)
        out: Tensor = F.silu(self.outer(h)) + self.skip(x)
        return out


class UNetDenoiser(nn.Module):
    """QGPO's and SfBC's noise predictor."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.time = nn.Sequential(Fourier(32, 30.0), nn.Linear(32, 32))
        self.state = nn.Sequential(nn.Linear(obs_dim, 32), nn.SiLU())
        self.embed = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128))
        self.down1, self.down2, self.down3 = UNetBlock(act_dim, 512), UNetBlock(512, 256), UNetBlock(256, 128)
        self.middle, self.up1, self.up2 = UNetBlock(128, 128), UNetBlock(256, 256), UNetBlock(512, 512)
        self.output = nn.Linear(1024, act_dim)

    def forward(self, x: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        e = self.embed(torch.cat([self.state(obs), self.time(t)], -1))
        d1 = self.down1(x, e)
        d2 = self.down2(d1, e)
        d3 = self.down3(d2, e)
        u1 = self.up1(torch.cat([d3, self.middle(d3, e)], -1), e)
        u2 = self.up2(torch.cat([d2, u1], -1), e)
        out: Tensor = self.output(torch.cat([d1, u2], -1))
        return out


class GaussianPolicy(nn.Module):
    """N(tanh(MLP(s)), diag sigma^2) of IQL and AWR."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.net = tanh_policy(obs_dim, act_dim)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.net(obs), self.log_std.clamp(-5.0, 2.0).exp())


class PlainDiffusionBC:
    """Diffusion-QL's cloning loss alone."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu") -> None:
        self.policy = Chain(Denoiser(obs_dim, act_dim), act_dim).to(device)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=3e-4)

    def update(self, batch: Batch) -> Losses:
        obs, act, *_ = batch
        loss = self.policy.loss(act, obs)
        descend(self.optimizer, loss)
        return {"bc_loss": loss.item()}


class PlainIQL(PlainIQLCritic):
    """Critic, then a Gaussian policy cloned by weight, in one `update`."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu") -> None:
        super().__init__(obs_dim, act_dim, device)
        self.policy = GaussianPolicy(obs_dim, act_dim).to(device)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=3e-4)
        self.schedule = cosine(self.policy_optimizer)

    def update(self, batch: Batch) -> Losses:
        obs, act, *_ = batch
        losses = self.update_critic(batch)
        with torch.no_grad():
            advantage = self.critic_target.min(obs, act) - self.value(obs)
            weight = torch.exp(3.0 * advantage).clamp(max=100.0)
        loss = -(weight * self.policy(obs).log_prob(act).sum(-1, keepdim=True)).mean()
        descend(self.policy_optimizer, loss)
        self.schedule.step()
        return losses | {"policy_loss": loss.item()}


class PlainIDQL(PlainIQLCritic):
    """Two stages: `update_critic`, `update_behavior` with dropout. The paper's batch is 512."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu") -> None:
        super().__init__(obs_dim, act_dim, device)
        self.behavior = Chain(ResidualDenoiser(obs_dim, act_dim, idql=True), act_dim).to(device)
        self.behavior_ema = copy.deepcopy(self.behavior)
        self.behavior_optimizer = torch.optim.AdamW(self.behavior.parameters(), lr=3e-4, weight_decay=1e-4)
        self.schedule = cosine(self.behavior_optimizer)

    def make_value(self, obs_dim: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(obs_dim, eps=1e-6), super().make_value(obs_dim))

    def update_behavior(self, batch: Batch) -> Losses:
        obs, act, *_ = batch
        x, i, eps = self.behavior.perturb(act)
        loss = (self.behavior.net(x, obs, i) - eps).pow(2).sum(-1).mean()
        descend(self.behavior_optimizer, loss)
        self.schedule.step()
        soft_update(self.behavior_ema, self.behavior, 0.001)
        return {"behavior_loss": loss.item()}


class PlainTD3BC:
    """The policy and both target networks are updated in every second call of `update`."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu") -> None:
        self.step = 0
        self.policy = tanh_policy(obs_dim, act_dim).to(device)
        self.policy_target = copy.deepcopy(self.policy)
        self.critic = TwinQ(obs_dim, act_dim, 2, nn.ReLU).to(device)
        self.critic_target = copy.deepcopy(self.critic)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=3e-4)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=3e-4)

    def update(self, batch: Batch) -> Losses:
        obs, act, rew, next_obs, done = batch
        self.step += 1
        with torch.no_grad():
            noise = (torch.randn_like(act) * 0.2).clamp(-0.5, 0.5)
            next_act = (self.policy_target(next_obs) + noise).clamp(-1.0, 1.0)
            goal = rew.view(-1, 1) + (1 - done.view(-1, 1)) * 0.99 * self.critic_target.min(next_obs, next_act)
        q1, q2 = self.critic(obs, act)
        loss = F.mse_loss(q1, goal) + F.mse_loss(q2, goal)
        descend(self.critic_optimizer, loss)
        losses = {"critic_loss": loss.item()}
        if self.step % 2 == 0:
            a = self.policy(obs)
            q = self.critic(obs, a)[0]
            policy_loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(a, act)
            descend(self.policy_optimizer, policy_loss)
            soft_update(self.critic_target, self.critic, 0.005)
            soft_update(self.policy_target, self.policy, 0.005)
            losses["policy_loss"] = policy_loss.item()
        return losses


class PlainAWR:
    """returns (B,) and weights (B,) are computed beforehand, once for the whole data."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu") -> None:
        self.value = mlp([obs_dim, 256, 256, 1], nn.ReLU).to(device)
        self.policy = GaussianPolicy(obs_dim, act_dim).to(device)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=3e-4)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=3e-4)

    def update_critic(self, batch: Batch, returns: Tensor) -> Losses:
        loss = F.mse_loss(self.value(batch[0]).squeeze(-1), returns)
        descend(self.value_optimizer, loss)
        return {"critic_loss": loss.item()}

    def update_policy(self, batch: Batch, weights: Tensor) -> Losses:
        obs, act, *_ = batch
        loss = -(weights * self.policy(obs).log_prob(act).sum(-1)).mean()
        descend(self.policy_optimizer, loss)
        return {"policy_loss": loss.item()}


class Energy(nn.Module):
    """QGPO's f(a_t, s, t): (B, M, A), (B, M, S), (B, M) -> (B, M)."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.time = nn.Sequential(Fourier(32, 30.0), nn.Linear(32, 32))
        self.net = mlp([act_dim + 32 + obs_dim, 256, 256, 256, 256, 1], nn.SiLU)

    def forward(self, x: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([x, self.time(t), obs], -1))
        return out.squeeze(-1)


class PlainQGPO:
    """actions (B, M, A) are the behaviour's for each row: at s' in the critic's update, at s in the energy's."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu") -> None:
        self.behavior = UNetDenoiser(obs_dim, act_dim).to(device)
        self.critic = TwinQ(obs_dim, act_dim, 3, nn.ReLU).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.energy = Energy(obs_dim, act_dim).to(device)
        self.behavior_optimizer = torch.optim.Adam(self.behavior.parameters(), lr=1e-4)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=3e-4)
        self.energy_optimizer = torch.optim.Adam(self.energy.parameters(), lr=3e-4)
        self.beta = 3.0

    def update_behavior(self, batch: Batch) -> Losses:
        obs, act, *_ = batch
        loss = match_noise(self.behavior, act, obs, 1e-3)
        descend(self.behavior_optimizer, loss)
        return {"behavior_loss": loss.item()}

    def update_critic(self, batch: Batch, actions: Tensor) -> Losses:
        obs, act, rew, next_obs, done = batch
        with torch.no_grad():
            q = self.critic_target.min(next_obs.unsqueeze(1).repeat(1, actions.shape[1], 1), actions).squeeze(-1)  # (B, M)
            next_v = (torch.softmax(self.beta * q, -1) * q).sum(-1, keepdim=True)
            goal = rew.view(-1, 1) + (1 - done.view(-1, 1)) * 0.99 * next_v
        q1, q2 = self.critic(obs, act)
        loss = (F.mse_loss(q1, goal) + F.mse_loss(q2, goal)) / 2
        descend(self.critic_optimizer, loss)
        soft_update(self.critic_target, self.critic, 0.005)
        return {"critic_loss": loss.item()}

    def update_energy(self, batch: Batch, actions: Tensor) -> Losses:
        obs = batch[0].unsqueeze(1).repeat(1, actions.shape[1], 1)  # (B, M, S)
        t = torch.rand(len(obs), device=obs.device) * (1.0 - 1e-3) + 1e-3
        alpha, sigma = vp_sde(t)
        x = alpha[:, None] * actions + sigma[:, None] * torch.randn_like(actions)
        with torch.no_grad():
            weights = torch.softmax(self.beta * self.critic_target.min(obs, actions).squeeze(-1), -1)
        f = self.energy(x, obs, t[:, None].repeat(1, actions.shape[1]))
        loss = -(weights * F.log_softmax(f, -1)).sum(-1).mean()
        descend(self.energy_optimizer, loss)
        return {"energy_loss": loss.item()}


class PlainSfBC:
    """returns (B,), planned and standardised, are computed beforehand, once for the whole data."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu") -> None:
        self.behavior = UNetDenoiser(obs_dim, act_dim).to(device)
        self.critic = mlp([obs_dim + act_dim, 256, 256, 1], nn.SiLU).to(device)
        self.behavior_optimizer = torch.optim.Adam(self.behavior.parameters(), lr=1e-4)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=1e-3)

    def update_behavior(self, batch: Batch) -> Losses:
        obs, act, *_ = batch
        loss = match_noise(self.behavior, act, obs, 1e-5)
        descend(self.behavior_optimizer, loss)
        return {"behavior_loss": loss.item()}

    def update_critic(self, batch: Batch, returns: Tensor) -> Losses:
        obs, act, *_ = batch
        loss = F.mse_loss(self.critic(torch.cat([obs, act], -1)).squeeze(-1), returns)
        descend(self.critic_optimizer, loss)
        return {"critic_loss": loss.item()}
