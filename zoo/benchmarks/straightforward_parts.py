"""The parts of straightforward.py and straightforward_baselines.py: networks, the discrete chain, optimiser step, soft update.

S observation, A action dimension, B batch; t is continuous time, i = 0..T-1 a step of a chain. Sizes are the papers'.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers from sizes[0] to sizes[-1] with an activation between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float | None = None) -> None:
    """One step; max_norm clips the norm of the optimiser's gradients together."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if max_norm is not None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    optimizer.step()


def soft_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- tau online + (1 - tau) target."""
    for t, p in zip(target.parameters(), online.parameters(), strict=True):
        t.data.copy_(tau * p.data + (1 - tau) * t.data)


def extract(values: Tensor, i: Tensor) -> Tensor:
    """Entry i (B,) of a schedule (T,), for each row: (B, 1)."""
    return values.gather(-1, i).reshape(-1, 1)


def cosine(optimizer: torch.optim.Optimizer, n_steps: int = 1_000_000) -> torch.optim.lr_scheduler.CosineAnnealingLR:
    """A learning rate that falls to 0 over n_steps."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=n_steps)


def tanh_policy(obs_dim: int, act_dim: int) -> nn.Sequential:
    """The deterministic policy of SRPO and TD3+BC, and the mean of the Gaussian ones."""
    return nn.Sequential(*mlp([obs_dim, 256, 256, act_dim], nn.ReLU), nn.Tanh())


def orthogonal(layer: nn.Module) -> None:
    """BDPO's start of a Linear layer, for `Module.apply`."""
    if isinstance(layer, nn.Linear):
        nn.init.orthogonal_(layer.weight, math.sqrt(2.0))
        nn.init.zeros_(layer.bias)


def vp_sde(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of the continuous VP-SDE, t (B,) -> (B, 1) each."""
    log_alpha = -0.25 * t**2 * (20.0 - 0.1) - 0.5 * t * 0.1
    alpha = torch.exp(log_alpha)
    return alpha[:, None], torch.sqrt(1.0 - alpha**2)[:, None]


def match_noise(net: nn.Module, act: Tensor, obs: Tensor, t_min: float) -> Tensor:
    """The loss of a noise predictor on the VP-SDE, t ~ U(t_min, 1)."""
    t = torch.rand(len(act), device=act.device) * (1.0 - t_min) + t_min
    alpha, sigma = vp_sde(t)
    eps = torch.randn_like(act)
    loss: Tensor = (net(alpha * act + sigma * eps, obs, t) - eps).pow(2).sum(-1).mean()
    return loss


# ---- networks --------------------------------------------------------------------------------------------------------
class TwinQ(nn.Module):
    """Two critics, (B, S) and (B, A) -> two of (B, 1)."""

    def __init__(self, obs_dim: int, act_dim: int, n_hidden: int, activation: type[nn.Module]) -> None:
        super().__init__()
        sizes = [obs_dim + act_dim, *[256] * n_hidden, 1]
        self.q1, self.q2 = mlp(sizes, activation), mlp(sizes, activation)

    def forward(self, obs: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([obs, act], -1)
        return self.q1(x), self.q2(x)

    def min(self, obs: Tensor, act: Tensor) -> Tensor:
        q1, q2 = self.forward(obs, act)
        return torch.min(q1, q2)


class Sinusoids(nn.Module):
    """Times (B,) -> (B, dim), [sin, cos] or, as in BDPO, [cos, sin]."""

    def __init__(self, dim: int, cos_first: bool = False) -> None:
        super().__init__()
        self.dim, self.cos_first = dim, cos_first

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000) / (half - 1)))
        phase = t[:, None] * frequencies[None, :]
        parts = [phase.cos(), phase.sin()] if self.cos_first else [phase.sin(), phase.cos()]
        return torch.cat(parts, -1)


class Fourier(nn.Module):
    """Random frequencies, fixed (SRPO, QGPO, SfBC) or learnt (IDQL): t (...,) -> (..., dim)."""

    def __init__(self, dim: int, scale: float, learnt: bool = False) -> None:
        super().__init__()
        self.learnt = learnt
        self.frequencies = nn.Parameter(torch.randn(dim // 2) * scale, requires_grad=learnt)

    def forward(self, t: Tensor) -> Tensor:
        phase = t[..., None] * self.frequencies * 2 * math.pi
        return torch.cat([phase.cos(), phase.sin()] if self.learnt else [phase.sin(), phase.cos()], -1)


class Denoiser(nn.Module):
    """Diffusion-QL's noise predictor; BDPO's with its time layers and four hidden ones."""

    def __init__(self, obs_dim: int, act_dim: int, bdpo: bool = False) -> None:
        super().__init__()
        d = 64 if bdpo else 16
        if bdpo:
            self.time = nn.Sequential(Sinusoids(d, cos_first=True), nn.Linear(d, d), nn.Mish(), nn.Linear(d, d), nn.Mish())
        else:
            self.time = nn.Sequential(Sinusoids(d), nn.Linear(d, 2 * d), nn.Mish(), nn.Linear(2 * d, d))
        self.offset = 1 if bdpo else 0  # BDPO counts steps from 1
        self.net = mlp([act_dim + d + obs_dim, *[256] * (4 if bdpo else 3), act_dim], nn.Mish)
        if bdpo:
            self.apply(orthogonal)

    def forward(self, x: Tensor, obs: Tensor, i: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([x, self.time(i + self.offset), obs], -1))
        return out


class EnsembleLinear(nn.Module):
    """E independent Linear layers as one batched product, (E, B, in) -> (E, B, out); orthogonal start."""

    def __init__(self, n_members: int, n_in: int, n_out: int) -> None:
        super().__init__()
        weights = [nn.init.orthogonal_(torch.empty(n_in, n_out), math.sqrt(2.0)) for _ in range(n_members)]
        self.weight, self.bias = nn.Parameter(torch.stack(weights)), nn.Parameter(torch.zeros(n_members, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight) + self.bias


class EnsembleNorm(nn.Module):
    """LayerNorm with weights of its own for each member, (E, B, width)."""

    def __init__(self, n_members: int, width: int) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(n_members, 1, width)), nn.Parameter(torch.zeros(n_members, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * self.scale + self.bias


def ensemble_mlp(n_members: int, sizes: list[int], layer_norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes[:-1]):
        layers.append(EnsembleLinear(n_members, n_in, n_out))
        if layer_norm:
            layers.append(EnsembleNorm(n_members, n_out))
        layers.append(nn.Mish())
    return nn.Sequential(*layers, EnsembleLinear(n_members, sizes[-2], sizes[-1]))


class EnsembleQ(nn.Module):
    """BDPO's critics: (B, S), (B, A) -> (E, B)."""

    def __init__(self, obs_dim: int, act_dim: int, n_members: int) -> None:
        super().__init__()
        self.n_members, self.net = n_members, ensemble_mlp(n_members, [obs_dim + act_dim, 256, 256, 256, 1])

    def forward(self, obs: Tensor, act: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([obs, act], -1).expand(self.n_members, -1, -1))
        return out.squeeze(-1)


class EnsembleV(nn.Module):
    """BDPO's values of half-denoised actions: (B, S), (B, A), step n = 1..T (B,) -> (E, B)."""

    def __init__(self, obs_dim: int, act_dim: int, n_members: int) -> None:
        super().__init__()
        self.n_members, self.sinusoids = n_members, Sinusoids(64, cos_first=True)
        self.time = nn.Sequential(ensemble_mlp(n_members, [64, 128, 64]), nn.Mish())
        self.net = ensemble_mlp(n_members, [obs_dim + act_dim + 64, 256, 256, 256, 1], layer_norm=True)

    def forward(self, obs: Tensor, act: Tensor, n: Tensor) -> Tensor:
        time = self.time(self.sinusoids(n).expand(self.n_members, -1, -1))
        pairs = torch.cat([obs, act], -1).expand(self.n_members, -1, -1)
        out: Tensor = self.net(torch.cat([pairs, time], -1))
        return out.squeeze(-1)


class ResidualBlock(nn.Module):
    """x + W2 f(W1 LayerNorm(dropout(x)))."""

    def __init__(self, activation: type[nn.Module], width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(0.1), nn.LayerNorm(width), nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class ResidualDenoiser(nn.Module):
    """SRPO's noise predictor, or IDQL's."""

    def __init__(self, obs_dim: int, act_dim: int, idql: bool = False) -> None:
        super().__init__()
        n_features, d, act = (128, 256, nn.SiLU) if idql else (64, 128, nn.Mish)
        features = Fourier(n_features, 0.2, learnt=True) if idql else Fourier(n_features, 30.0)
        self.time = nn.Sequential(features, nn.Linear(n_features, d), act(), nn.Linear(d, d))
        blocks = [ResidualBlock(act) for _ in range(3)]
        self.net = nn.Sequential(nn.Linear(act_dim + obs_dim + d, 256), *blocks, act(), nn.Linear(256, act_dim))

    def forward(self, x: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([x, obs, self.time(t)], -1))
        return out


class Chain(nn.Module):
    """The discrete VP chain around a noise predictor."""

    alpha: Tensor
    beta: Tensor
    alpha_bar: Tensor
    signal: Tensor
    noise: Tensor
    inverse_signal: Tensor
    inverse_noise: Tensor
    from_x0: Tensor
    from_x: Tensor
    log_variance: Tensor

    def __init__(self, net: nn.Module, act_dim: int, n_steps: int = 5) -> None:
        super().__init__()
        self.net, self.act_dim, self.n_steps = net, act_dim, n_steps
        n = torch.arange(1, n_steps + 1, dtype=torch.float64)
        alpha = torch.exp(-0.1 / n_steps - 0.5 * (10.0 - 0.1) * (2 * n - 1) / n_steps**2)
        beta, alpha_bar = 1.0 - alpha, alpha.cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        schedule = {
            "alpha": alpha,
            "beta": beta,
            "alpha_bar": alpha_bar,
            "signal": alpha_bar.sqrt(),
            "noise": (1 - alpha_bar).sqrt(),
            "inverse_signal": (1 / alpha_bar).sqrt(),
            "inverse_noise": (1 / alpha_bar - 1).sqrt(),
            "from_x0": beta * before.sqrt() / (1 - alpha_bar),
            "from_x": (1 - before) * alpha.sqrt() / (1 - alpha_bar),
            "log_variance": (beta * (1 - before) / (1 - alpha_bar)).clamp(min=1e-20).log(),
        }
        for name, value in schedule.items():
            self.register_buffer(name, value.float())

    def posterior_mean(self, x: Tensor, eps: Tensor, i: Tensor) -> Tensor:
        x0 = (extract(self.inverse_signal, i) * x - extract(self.inverse_noise, i) * eps).clamp(-1.0, 1.0)
        return extract(self.from_x0, i) * x0 + extract(self.from_x, i) * x

    def sample(self, obs: Tensor) -> Tensor:
        """Diffusion-QL's sampler, (B, S) -> (B, A); differentiable."""
        x = torch.randn(len(obs), self.act_dim, device=obs.device)
        for k in reversed(range(self.n_steps)):
            i = torch.full((len(obs),), k, device=obs.device)
            mean = self.posterior_mean(x, self.net(x, obs, i), i)
            std = (0.5 * extract(self.log_variance, i)).exp()
            x = mean + (i > 0).float()[:, None] * std * torch.randn_like(x)
        return x.clamp(-1.0, 1.0)

    def perturb(self, act: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A random step of each action's forward process: x_i (B, A), i (B,), eps (B, A)."""
        i = torch.randint(0, self.n_steps, (len(act),), device=act.device)
        eps = torch.randn_like(act)
        return extract(self.signal, i) * act + extract(self.noise, i) * eps, i, eps

    def loss(self, act: Tensor, obs: Tensor) -> Tensor:
        x, i, eps = self.perturb(act)
        return F.mse_loss(self.net(x, obs, i), eps)
