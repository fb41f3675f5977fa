"""Plain eager PyTorch versions of every update, the baseline for our speed. They import torch and nothing of this library.

They compute what diffagents/agents/ compute, in the style of official research code: Linear layers in Sequentials, twin critics
one after the other, random numbers drawn where they are needed, the chain as a Python loop that gathers its constants for every
row, the whole input of each step concatenated, Adam with its defaults, soft updates parameter by parameter, and losses read
with `.item()` at every step. Nothing is slowed down on purpose:
  - targets are computed under `no_grad`, also where the official code omits it. As in the official code, the policy steps of
    Diffusion-QL, DiffCPS and TD3+BC compute gradients of the critic's weights too, which the next critic step clears;
  - the policy that SRPO's code trains during the critic stage, only for monitoring, is omitted;
  - the originals of BDPO and IDQL are in JAX. The translation is direct: BDPO's vmapped ensembles are batched products.
There are two ways of acting: Diffusion-QL's, and the bare network. This file has SRPO, Diffusion-QL, DiffCPS, BDPO and IQL's
critic; straightforward_baselines.py the other algorithms; straightforward_parts.py the networks.

  agent = PlainDiffusionQL()                                   # Hopper's sizes, on the CPU
  losses = agent.update((obs, act, rew, next_obs, done))       # obs (B, S), act (B, A), rew and done (B,) or (B, 1)

Every `update*` takes a batch of any size, updates the networks, and returns its losses as floats.
"""

import copy

import torch
from straightforward_parts import (
    Chain,
    Denoiser,
    EnsembleQ,
    EnsembleV,
    ResidualDenoiser,
    TwinQ,
    cosine,
    descend,
    extract,
    match_noise,
    mlp,
    soft_update,
    tanh_policy,
    vp_sde,
)
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # obs, act, rew, next_obs, done
Losses = dict[str, float]


class PlainMLPPolicy:
    """The bare forward pass of SRPO's and TD3+BC's policy."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu") -> None:
        self.net = tanh_policy(obs_dim, act_dim).to(device)

    @torch.no_grad()
    def predict(self, obs: Tensor) -> Tensor:
        """(1, S) -> (1, A), tensors: no conversion, no checks."""
        out: Tensor = self.net(obs)
        return out


class PlainDiffusionQL:
    """`ema_start`: the step from which the EMA of the policy is updated; 0 to time what a long run does."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu", ema_start: int = 1000) -> None:
        self.device, self.ema_start, self.step = device, ema_start, 0
        self.policy = Chain(Denoiser(obs_dim, act_dim), act_dim).to(device)
        self.policy_ema = copy.deepcopy(self.policy)
        self.critic = TwinQ(obs_dim, act_dim, 3, nn.Mish).to(device)
        self.critic_target = copy.deepcopy(self.critic)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=3e-4)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=3e-4)
        self.eta, self.gamma, self.max_norm = 1.0, 0.99, 5.0

    def update(self, batch: Batch) -> Losses:
        losses = self.update_critic(batch) | self.update_policy(batch)
        return losses | self.update_targets()

    def update_critic(self, batch: Batch) -> Losses:
        obs, act, rew, next_obs, done = batch
        with torch.no_grad():
            next_q = self.critic_target.min(next_obs, self.policy_ema.sample(next_obs))
            goal = rew.view(-1, 1) + (1 - done.view(-1, 1)) * self.gamma * next_q
        q1, q2 = self.critic(obs, act)
        loss = F.mse_loss(q1, goal) + F.mse_loss(q2, goal)
        descend(self.critic_optimizer, loss, self.max_norm)
        return {"critic_loss": loss.item(), "target_q": goal.mean().item()}

    def policy_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        obs, act, *_ = batch
        bc_loss = self.policy.loss(act, obs)
        q1, q2 = self.critic(obs, self.policy.sample(obs))
        if torch.rand(()).item() > 0.5:
            return bc_loss, -q1.mean() / q2.abs().mean().detach()
        return bc_loss, -q2.mean() / q1.abs().mean().detach()

    def update_policy(self, batch: Batch) -> Losses:
        bc_loss, q_loss = self.policy_losses(batch)
        loss = bc_loss + self.eta * q_loss
        descend(self.policy_optimizer, loss, self.max_norm)
        return {"policy_loss": loss.item(), "bc_loss": bc_loss.item(), "q_loss": q_loss.item()}

    def update_targets(self) -> Losses:
        if self.step % 5 == 0 and self.step >= self.ema_start:
            soft_update(self.policy_ema, self.policy, 0.005)
        soft_update(self.critic_target, self.critic, 0.005)
        self.step += 1
        return {}

    @torch.no_grad()
    def predict(self, obs: Tensor, n_candidates: int = 50) -> object:
        """One observation (S,), array or tensor -> action (A,), a numpy array: a candidate, drawn by softmax of min Qbar."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device).reshape(1, -1)
        obs = obs.repeat_interleave(n_candidates, dim=0)
        act = self.policy.sample(obs)
        q = self.critic_target.min(obs, act).flatten()
        chosen = torch.multinomial(F.softmax(q, dim=0), 1)
        return act[chosen].cpu().numpy().flatten()


class PlainDiffCPS(PlainDiffusionQL):
    """Policy and multiplier move in the first call of `update`, and in every second from there."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu", ema_start: int = 1000) -> None:
        super().__init__(obs_dim, act_dim, device, ema_start)
        self.multiplier = nn.Parameter(torch.ones((), device=device))
        self.multiplier_optimizer = torch.optim.Adam([self.multiplier], lr=3e-5)
        self.target_kl = 0.05

    def update(self, batch: Batch) -> Losses:
        losses = self.update_critic(batch)
        if self.step % 2 == 0:
            losses |= self.update_policy(batch)
        return losses | self.update_targets()

    def update_policy(self, batch: Batch) -> Losses:
        bc_loss, q_loss = self.policy_losses(batch)
        loss = self.multiplier.detach().clamp(0.0, 100.0) * bc_loss + q_loss
        descend(self.policy_optimizer, loss, self.max_norm)
        descend(self.multiplier_optimizer, self.multiplier * (self.target_kl - bc_loss.detach()), self.max_norm)
        self.multiplier.data.clamp_(0.0, 100.0)
        return {"policy_loss": loss.item(), "bc_loss": bc_loss.item(), "lambda": self.multiplier.item()}


class PlainBDPO:
    """Policy and behaviour move in the first call of `update`, and in every fifth from there (no warm-up)."""

    def __init__(
        self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu", n_critics: int = 10, n_samples: int = 10
    ) -> None:
        self.n_samples, self.step = n_samples, 0
        self.behavior = Chain(Denoiser(obs_dim, act_dim, bdpo=True), act_dim).to(device)
        self.behavior_ema = copy.deepcopy(self.behavior).requires_grad_(False)
        self.policy = copy.deepcopy(self.behavior)
        self.policy_ema = copy.deepcopy(self.behavior).requires_grad_(False)
        self.critic = EnsembleQ(obs_dim, act_dim, n_critics).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = EnsembleV(obs_dim, act_dim, n_critics).to(device)
        self.value_target = copy.deepcopy(self.value).requires_grad_(False)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=1e-5)
        self.behavior_optimizer = torch.optim.Adam(self.behavior.parameters(), lr=3e-4)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=3e-4)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=3e-4)
        self.policy_schedule = cosine(self.policy_optimizer)
        self.critic_schedules = [cosine(self.critic_optimizer), cosine(self.value_optimizer)]
        self.eta, self.rho, self.gamma, self.tau, self.max_norm = 0.05, 0.5, 0.99, 0.005, 1.0
        chain = self.behavior
        self.step_weights = chain.beta / (2 * chain.alpha * (1 - chain.alpha_bar))

    def update(self, batch: Batch) -> Losses:
        losses = self.update_critics(batch)
        if self.step % 5 == 0:
            losses |= self.update_policy(batch) | self.update_behavior(batch)
        self.step += 1
        return losses

    def penalty(self, eps: Tensor, eps_nu: Tensor, i: Tensor) -> Tensor:
        """The KL of one denoising step, (B, A) twice -> (B,)."""
        return extract(self.step_weights, i).squeeze(-1) * (eps - eps_nu).pow(2).sum(-1)

    def aggregate(self, q: Tensor) -> Tensor:
        """(E, B) -> (B,)."""
        return q.mean(0) - self.rho * q.std(0, correction=0)

    def q_target(self, batch: Batch) -> Tensor:
        _, _, rew, next_obs, done = batch
        n, k = len(next_obs), self.n_samples
        obs = next_obs.repeat_interleave(k, dim=0)  # (B K, S)
        x = torch.randn(n * k, self.policy.act_dim, device=obs.device)
        path_kl = torch.zeros(n * k, device=obs.device)
        for step in reversed(range(self.policy.n_steps)):
            i = torch.full((n * k,), step, device=obs.device)
            eps, eps_nu = self.policy_ema.net(x, obs, i), self.behavior_ema.net(x, obs, i)
            path_kl = path_kl + self.penalty(eps, eps_nu, i)
            std = (i > 0).float()[:, None] * extract(self.policy.beta, i).sqrt()
            x = self.policy.posterior_mean(x, eps, i) + std * torch.randn_like(x)
        q = self.critic_target(obs, x).view(-1, n, k).mean(-1)
        next_v = self.aggregate(q) - self.eta * path_kl.view(n, k).mean(-1)
        return rew.view(-1) + self.gamma * (1 - done.view(-1)) * next_v

    def step_objective(self, policy: Chain, obs: Tensor, a_n: Tensor, i: Tensor) -> Tensor:
        """Value of one denoising step of `policy` from a_n, less its penalty: (B,)."""
        n, k = len(obs), self.n_samples
        eps = policy.net(a_n, obs, i)
        with torch.no_grad():
            eps_nu = self.behavior_ema.net(a_n, obs, i)
        mean = policy.posterior_mean(a_n, eps, i).repeat_interleave(k, dim=0)  # (B K, A)
        i_k, obs_k = i.repeat_interleave(k, dim=0), obs.repeat_interleave(k, dim=0)
        std = (i_k > 0).float()[:, None] * extract(policy.beta, i_k).sqrt()
        before = mean + std * torch.randn_like(mean)
        v = self.value_target(obs_k, before, i_k).view(-1, n, k)  # of step n - 1, which is i
        q = self.critic_target(obs_k, before).view(-1, n, k)
        next_v = torch.where(i[:, None] > 0, v, q).mean(-1)  # V_0 is Q
        return self.aggregate(next_v) - self.eta * self.penalty(eps, eps_nu, i)

    def update_critics(self, batch: Batch) -> Losses:
        obs, act, *_ = batch
        a_n, i, _ = self.policy.perturb(act)
        with torch.no_grad():
            q_goal, v_goal = self.q_target(batch), self.step_objective(self.policy_ema, obs, a_n, i)
        q_loss = (self.critic(obs, act) - q_goal).pow(2).mean()
        descend(self.critic_optimizer, q_loss, self.max_norm)
        v_loss = (self.value(obs, a_n, i + 1) - v_goal).pow(2).mean()
        descend(self.value_optimizer, v_loss, self.max_norm)
        for schedule in self.critic_schedules:
            schedule.step()
        soft_update(self.critic_target, self.critic, self.tau)
        soft_update(self.value_target, self.value, self.tau)
        return {"q_loss": q_loss.item(), "v_loss": v_loss.item()}

    def update_policy(self, batch: Batch) -> Losses:
        obs, act, *_ = batch
        a_n, i, _ = self.policy.perturb(act)
        loss = -self.step_objective(self.policy, obs, a_n, i).mean()
        descend(self.policy_optimizer, loss, self.max_norm)
        self.policy_schedule.step()
        soft_update(self.policy_ema, self.policy, self.tau)
        return {"policy_loss": loss.item()}

    def update_behavior(self, batch: Batch) -> Losses:
        obs, act, *_ = batch
        loss = self.behavior.loss(act, obs)
        descend(self.behavior_optimizer, loss, self.max_norm)
        soft_update(self.behavior_ema, self.behavior, self.tau)
        return {"behavior_loss": loss.item()}


class PlainIQLCritic:
    """Twin Q and V by expectile regression; V(s') is taken before V moves."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu") -> None:
        self.critic = TwinQ(obs_dim, act_dim, 2, nn.ReLU).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = self.make_value(obs_dim).to(device)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=3e-4)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=3e-4)
        self.expectile, self.gamma = 0.7, 0.99

    def make_value(self, obs_dim: int) -> nn.Module:
        return mlp([obs_dim, 256, 256, 1], nn.ReLU)

    def update_critic(self, batch: Batch) -> Losses:
        obs, act, rew, next_obs, done = batch
        with torch.no_grad():
            target_q = self.critic_target.min(obs, act)
            goal = rew.view(-1, 1) + (1 - done.view(-1, 1)) * self.gamma * self.value(next_obs)
        u = target_q - self.value(obs)
        v_loss = (torch.abs(self.expectile - (u < 0).float()) * u**2).mean()
        descend(self.value_optimizer, v_loss)
        q1, q2 = self.critic(obs, act)
        q_loss = (F.mse_loss(q1, goal) + F.mse_loss(q2, goal)) / 2
        descend(self.critic_optimizer, q_loss)
        soft_update(self.critic_target, self.critic, 0.005)
        return {"v_loss": v_loss.item(), "q_loss": q_loss.item()}


class PlainSRPO(PlainIQLCritic):
    """Three stages: `update_critic`, `update_behavior` with dropout, `update_policy`."""

    def __init__(self, obs_dim: int = 11, act_dim: int = 3, device: str = "cpu") -> None:
        super().__init__(obs_dim, act_dim, device)
        self.behavior = ResidualDenoiser(obs_dim, act_dim).to(device)
        self.policy = tanh_policy(obs_dim, act_dim).to(device)
        self.behavior_optimizer = torch.optim.AdamW(self.behavior.parameters(), lr=3e-4)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=3e-4)
        self.schedule = cosine(self.policy_optimizer)
        self.beta = 0.05

    def update_behavior(self, batch: Batch) -> Losses:
        obs, act, *_ = batch
        self.behavior.train()
        loss = match_noise(self.behavior, act, obs, 1e-3)
        descend(self.behavior_optimizer, loss)
        return {"behavior_loss": loss.item()}

    def update_policy(self, batch: Batch) -> Losses:
        obs, *_ = batch
        self.behavior.eval()
        a = self.policy(obs)
        t = torch.rand(len(obs), device=obs.device) * 0.96 + 0.02
        alpha, sigma = vp_sde(t)
        eps = torch.randn_like(a)
        with torch.no_grad():
            pull = self.behavior(alpha * a + sigma * eps, obs, t) - eps
        leaf = a.detach().requires_grad_(True)
        q1, q2 = self.critic_target(obs, leaf)
        (dq_da,) = torch.autograd.grad(((q1 + q2) / 2).sum(), leaf)
        loss = ((sigma**2 * pull - self.beta * dq_da) * a).sum(-1).mean()
        descend(self.policy_optimizer, loss)
        self.schedule.step()
        return {"policy_loss": loss.item()}
