"""The score network of QGPO and SfBC, and the behaviour model made of it."""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffagents.config.checks import N_FIXED
from diffagents.diffusion.sde import SolverStep, dpm_solve, vp_alpha_sigma
from diffagents.functional import eps_loss, perturb


class FourierTime(nn.Module):
    """Time features of QGPO and SfBC: 16 fixed frequencies W ~ N(0, 30^2), [sin, cos](2 pi W t), Linear 32-32."""

    frequencies: Tensor
    DIM, FREQUENCY_SCALE = 32, 30.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(self.DIM // 2) * self.FREQUENCY_SCALE)
        self.project = nn.Linear(self.DIM, self.DIM)

    def forward(self, t: Tensor) -> Tensor:
        """t (...,) in (0, 1] -> (..., 32)."""
        phase = t[..., None] * self.frequencies * 2.0 * math.pi
        out: Tensor = self.project(torch.cat([torch.sin(phase), torch.cos(phase)], -1))
        return out


class ConditionedBlock(nn.Module):
    """silu(W2 (silu(W1 x) + V silu(e))) + skip x, the skip a Linear where sizes differ. `Residual_Block` in SfBC's code."""

    EMBED_DIM = 128

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(in_dim, out_dim), nn.Linear(out_dim, out_dim)
        self.condition = nn.Linear(self.EMBED_DIM, out_dim)
        self.skip = nn.Linear(in_dim, out_dim) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.inner(x)) + self.condition(F.silu(embedding))
        out: Tensor = F.silu(self.outer(h)) + self.skip(x)
        return out


class UNetDenoiser(nn.Module):
    """Noise predictor eps(a_t, s, t) of QGPO's and SfBC's behaviour model: `ScoreNet` in their official code.

    Time and state (Linear S-32, SiLU) are embedded together, 64-128-128, and enter every block. Blocks A - w - w/2 - w/4,
    one in the middle, and up again beside what came down; Linear 2w - A. `width` w is 512 in the official code.
    The official net is written as a score h / sigma_t with h trained to -eps; this one gives eps = -h, which is the same net
    with the other sign on its last layer.
    """

    def __init__(self, obs_dim: int, act_dim: int, width: int = 512) -> None:
        super().__init__()
        embed, half, quarter = ConditionedBlock.EMBED_DIM, width // 2, width // 4
        if quarter < 1:
            raise ValueError(f"behavior_width={width} must be at least 4: the narrowest layers have a quarter of it")
        self.time = FourierTime()
        self.state = nn.Linear(obs_dim, FourierTime.DIM)
        self.embed = nn.Sequential(nn.Linear(2 * FourierTime.DIM, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.down = nn.ModuleList(
            ConditionedBlock(n_in, n_out) for n_in, n_out in ((act_dim, width), (width, half), (half, quarter))
        )
        self.middle = ConditionedBlock(quarter, quarter)
        self.up = nn.ModuleList((ConditionedBlock(2 * quarter, half), ConditionedBlock(2 * half, width)))
        self.output = nn.Linear(2 * width, act_dim)

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor) -> Tensor:
        """`a_t` (..., A); `obs` (..., S) and `t` (...,) in (0, 1] may have sizes of 1 to expand, and are embedded once."""
        both = torch.broadcast_tensors(F.silu(self.state(obs)), self.time(t))  # type: ignore[no-untyped-call]
        embedding = self.embed(torch.cat(both, -1))
        kept, h = [], a_t
        for block in self.down:
            h = block(h, embedding)
            kept.append(h)
        h = self.middle(h, embedding)
        for block in self.up:
            h = block(torch.cat([kept.pop(), h], -1), embedding)
        out: Tensor = self.output(torch.cat([kept.pop(), h], -1))
        return out


class VPBehavior(nn.Module):
    """mu(a|s) of QGPO and SfBC: a noise predictor `net(a_t, obs, t)`, and the fixed x_1 of its deterministic samples."""

    fixed_noise: Tensor

    def __init__(self, net: nn.Module, act_dim: int) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("fixed_noise", torch.randn(N_FIXED, act_dim))

    def loss(self, act: Tensor, obs: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """E || eps(a_t | s, t) - eps ||^2, act and eps (B, A), t (B,). Song et al. 2021, Eq. (7), weighted by sigma_t^2."""
        return eps_loss(self.net(perturb(act, eps, *vp_alpha_sigma(t)), obs, t), eps)

    def noise(self, n_obs: int, n: int, deterministic: bool, generator: torch.Generator) -> Tensor:
        """x_1 for n <= N_FIXED samples of each observation, (n_obs, n, A). deterministic: the fixed ones, (1, n, A)."""
        if not deterministic:
            size = (n_obs, n, self.fixed_noise.shape[1])
            return torch.randn(size, generator=generator, device=self.fixed_noise.device)
        return self.fixed_noise[None, :n]

    def sample(self, obs: Tensor, noise: Tensor, steps: tuple[SolverStep, ...]) -> Tensor:
        """a ~ mu(.|s) from x_1 = `noise` (B or 1, M, A), for obs (B, S): (B, M, A), not clipped."""
        obs = obs[:, None]
        return dpm_solve(lambda a, t: self.net(a, obs, t), noise.expand(obs.shape[0], -1, -1), steps)

    @torch.no_grad()
    def support(
        self, obs: Tensor, n: int, steps: tuple[SolverStep, ...], generator: torch.Generator, name: str | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Samples for all of obs (N, S), a few rows at a time: (rows, actions (rows, n, A)).

        name: what to call it in the line that says how long this will take, where that is more than seconds; None is silent.
        """
        rows_at_once, start = 256, time.perf_counter()
        for first in range(0, len(obs), rows_at_once):
            rows = slice(first, min(first + rows_at_once, len(obs)))
            yield rows, self.sample(obs[rows], self.noise(rows.stop - rows.start, n, False, generator), steps)
            if name is not None and first == rows_at_once:  # the very first is slower
                if obs.is_cuda:
                    torch.cuda.synchronize(obs.device)
                seconds = (time.perf_counter() - start) * len(obs) / rows.stop
                if seconds > 5:
                    print(
                        f"{name}: {n} actions of the behaviour model for each of {len(obs):,} states; "
                        f"about {seconds / 60:.1f} minutes",
                        flush=True,
                    )
