"""Networks as small modules: MLP, batched ensembles of MLPs, policies, noise predictors.

Shapes: B batch, S observation, A action, E ensemble members. Every layer starts as PyTorch starts a Linear
(uniform in +-1/sqrt(fan_in)), which is what the official PyTorch codes use; `orthogonal_` is for the others.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e = x.clamp(max=20.0).exp_()  # beyond 20 the function is x to the last digit
        n = (e + 2.0).mul_(e)
        gate = n.div_(n + 2.0)
        return x * gate, e, gate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: None) -> Tensor:
        x, e, gate = ctx.saved_tensors
        slope = (1.0 - gate * gate).mul_(e).div_(e + 1.0)  # (1 - tanh^2) sigmoid
        return slope.mul_(x).add_(gate).mul_(gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
        return _Mish.apply(x), (in_dims[0],) * 3  # type: ignore[no-untyped-call]


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)) with one exponential: n / (n + 2), n = e^x (e^x + 2), is that tanh.

    Agrees with `torch.nn.functional.mish` to 3e-7, in fewer passes over memory.
    """
    if torch.is_grad_enabled():
        return _Mish.apply(x)[0]  # type: ignore[no-untyped-call]
    e = x.clamp(max=20.0).exp_()
    n = (e + 2.0).mul_(e)
    return n.div_(n + 2.0).mul_(x)


class Mish(nn.Module):
    """`mish` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return mish(x)


class MLP(nn.Sequential):
    """Linear layers with an activation between them: (..., in) -> (..., out)."""

    def __init__(self, in_dim: int, hidden: Sequence[int], out_dim: int, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        sizes = [in_dim, *hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), activation()]
        super().__init__(*layers, nn.Linear(sizes[-1], out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self[0](x))

    def rest(self, h: Tensor) -> Tensor:
        """What comes after the first layer."""
        for layer in list(self)[1:]:
            if isinstance(layer, nn.Linear) and layer.out_features == 1:  # a sum: quicker than a product with one column
                h = (h * layer.weight[0]).sum(-1, keepdim=True) + layer.bias
            else:
                h = layer(h)
        return h


class TanhPolicy(nn.Module):
    """Deterministic policy a = tanh(MLP(s)): (B, S) -> (B, A) in (-1, 1)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.hidden = list(hidden)
        self.net = MLP(obs_dim, hidden, act_dim)

    def forward(self, obs: Tensor, masks: Tensor | None = None) -> Tensor:
        """`masks` (B, sum of hidden sizes) are dropout masks, layer beside layer, None in use."""
        if masks is None:
            return torch.tanh(self.net(obs))
        *body, last = self.net
        h = obs
        for linear, activation, mask in zip(body[::2], body[1::2], torch.split(masks, self.hidden, -1), strict=True):
            h = activation(linear(h)) * mask
        return torch.tanh(last(h))


class GaussianPolicy(TanhPolicy):
    """N(tanh(MLP(s)), diag sigma^2): the actor of IQL and AWR; calling it gives the mean, (B, S) -> (B, A).

    sigma is one number per action dimension, the same for every s; log sigma starts at 0 and counts within [-5, 2].
    Only the mean is squashed: the density is the plain Gaussian's, whose samples may leave [-1, 1].
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int]) -> None:
        super().__init__(obs_dim, act_dim, hidden)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def log_prob(self, obs: Tensor, act: Tensor, masks: Tensor | None = None) -> Tensor:
        """log pi(a|s) summed over dimensions: (B, S), (B, A) -> (B,)."""
        log_std = self.log_std.clamp(-5.0, 2.0)
        z = (act - self(obs, masks)) * torch.exp(-log_std)
        return -(0.5 * z.square() + log_std + 0.5 * math.log(2.0 * math.pi)).sum(-1)

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """a ~ pi(.|s) from standard normal `noise` (B, A), clamped to [-1, 1]."""
        return (self(obs) + self.log_std.clamp(-5.0, 2.0).exp() * noise).clamp(-1.0, 1.0)


class EnsembleMLP(nn.Module):
    """E independent MLPs as batched matrix products: (B, in) -> (E, B); (E, B, in) gives each its own input.

    One product per layer instead of E: twin critics cost little more than one.
    out_dim: None for one number, squeezed; else (E, B, out_dim).
    layer_norm: normalise each hidden layer before its activation (eps 1e-6, flax's).
    """

    def __init__(
        self,
        n_members: int,
        in_dim: int,
        hidden: Sequence[int],
        activation: Callable[[Tensor], Tensor] = F.relu,
        layer_norm: bool = False,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.n_members, self.activation, self.layer_norm = n_members, activation, layer_norm
        sizes = [in_dim, *hidden, out_dim or 1]
        self.norm_scales = nn.ParameterList(nn.Parameter(torch.ones(n_members, 1, n)) for n in hidden if layer_norm)
        self.norm_biases = nn.ParameterList(nn.Parameter(torch.zeros(n_members, 1, n)) for n in hidden if layer_norm)
        self.weights = nn.ParameterList()  # each (E, in, out)
        self.biases = nn.ParameterList()  # each (E, 1, out)
        for n_in, n_out in pairwise(sizes):
            bound = 1.0 / math.sqrt(n_in)
            self.weights.append(nn.Parameter(torch.empty(n_members, n_in, n_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(n_members, 1, n_out).uniform_(-bound, bound)))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.baddbmm(self.biases[0], x.expand(self.n_members, *x.shape[-2:]), self.weights[0]))

    def on_parts(self, *parts: Tensor) -> Tensor:
        """As calling it on the concatenation of `parts` (..., n_j), whose sizes of 1 expand: (E, ...) or (E, ..., out_dim).

        The first layer takes each part once: K actions of a state cost one product with the state, not K.
        """
        h: Tensor | float = 0.0
        for part, weight in zip(parts, self.weights[0].split([part.shape[-1] for part in parts], 1), strict=True):
            rows = part.reshape(1, -1, part.shape[-1]).expand(self.n_members, -1, -1)
            h = h + torch.bmm(rows, weight).view(self.n_members, *part.shape[:-1], -1)
        assert isinstance(h, Tensor)
        out = self.rest(h.flatten(1, -2) + self.biases[0])
        return out.view(*h.shape[:-1], *out.shape[2:])

    def rest(self, h: Tensor) -> Tensor:
        """What comes after the product of the first layer, (E, B, hidden)."""
        for i in range(1, len(self.weights)):
            if self.layer_norm:
                h = F.layer_norm(h, h.shape[-1:], eps=1e-6) * self.norm_scales[i - 1] + self.norm_biases[i - 1]
            h = self.activation(h)
            if i == len(self.weights) - 1 and self.out_dim is None:  # a product with one column is a sum, and quicker as one
                return (h * self.weights[i].transpose(1, 2)).sum(-1) + self.biases[i].squeeze(-1)
            h = torch.baddbmm(self.biases[i], h, self.weights[i])
        return h.squeeze(-1) if self.out_dim is None else h


def start_(module: nn.Module, fill: Callable[[Tensor], Any]) -> None:
    """Start every weight matrix in `module` by `fill`, in place, and every bias at zero, the output layer's too."""
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif "norm" not in name and parameter.dim() > 1:
            for matrix in parameter.detach().view(-1, *parameter.shape[-2:]):  # of an ensemble, each member's
                fill(matrix)


def orthogonal_(module: nn.Module, gain: float = math.sqrt(2.0)) -> None:
    """`start_` with orthogonal matrices (BDPO's code)."""
    start_(module, lambda weight: nn.init.orthogonal_(weight, gain))


def xavier_(module: nn.Module) -> None:
    """`start_` with Xavier's uniform matrices (IDQL's code)."""
    start_(module, nn.init.xavier_uniform_)


def sinusoids(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(sin, cos) of t times dim / 2 frequencies 10000^(-k / (dim / 2 - 1)); t (...,) counts steps -> (..., dim / 2) each."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000.0) / (half - 1)))
    phase = t[..., None] * frequencies
    return torch.sin(phase), torch.cos(phase)


class StepValue(nn.Module):
    """E values V_n(s, a_n) of BDPO for the steps n = 1..T of a chain, with LayerNorm: (B, S), (B, ..., A), (B,) -> (E, B, ...).

    Time, for each member: 64 sinusoids [cos, sin] of n, Linear 64-128, Mish, Linear 128-64, Mish. Input [s, a_n, time].
    """

    positions: Tensor

    def __init__(self, n_members: int, obs_dim: int, act_dim: int, n_steps: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.sizes = [obs_dim, act_dim, 64]
        sin, cos = sinusoids(torch.arange(1, n_steps + 1), 64)
        self.register_buffer("positions", torch.cat([cos, sin], -1), persistent=False)
        self.time_mlp = EnsembleMLP(n_members, 64, (128,), mish, out_dim=64)
        self.trunk = EnsembleMLP(n_members, sum(self.sizes), hidden, mish, layer_norm=True)
        orthogonal_(self)

    def forward(self, obs: Tensor, a_n: Tensor, i: Tensor) -> Tensor:
        """`i` = n - 1 counts from 0. The first layer takes each of the T times once, and each state, whatever the rest."""
        n_members, rows = self.trunk.n_members, a_n.flatten(0, -2)
        of_state, of_act, of_time = self.trunk.weights[0].split(self.sizes, 1)
        time = torch.baddbmm(self.trunk.biases[0], mish(self.time_mlp(self.positions)), of_time)  # (E, T, H)
        shared = torch.bmm(obs.expand(n_members, *obs.shape), of_state) + time[:, i]  # (E, B, H)
        h = torch.bmm(rows.expand(n_members, *rows.shape), of_act).view(n_members, len(obs), -1, shared.shape[-1])
        out: Tensor = self.trunk.rest((h + shared[:, :, None]).flatten(1, 2))
        return out.view(n_members, *a_n.shape[:-1])


class ResidualBlock(nn.Module):
    """x + W2 f(W1 LayerNorm(dropout(x))), width d -> 4d -> d, f Mish; the skip carries the un-normalised input."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor] = mish) -> None:
        super().__init__()
        self.activation = activation
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = x if mask is None else x * mask
        out: Tensor = x + self.project(self.activation(self.expand(self.norm(h))))
        return out


class ResidualScoreNet(nn.Module):
    """Noise predictor eps(a_t, s, t) of SRPO's behaviour model: `ScoreNet` in the official code, (B, A) -> (B, A).

    Time: 32 fixed random frequencies W ~ N(0, 30^2), features [sin, cos](2 pi W t), then Linear 64-128, Mish,
    Linear 128-128. Input [a_t, s, time]; Linear to `width`; residual blocks; Mish; Linear to A. The official code also
    allocates three 256x256 shortcut layers that no input ever reaches; they are left out.
    """

    frequencies: Tensor
    N_FREQUENCIES, FREQUENCY_SCALE, TIME_DIM = 32, 30.0, 128

    def __init__(self, obs_dim: int, act_dim: int, width: int = 256, n_blocks: int = 3) -> None:
        super().__init__()
        self.width, self.n_blocks = width, n_blocks
        self.register_buffer("frequencies", torch.randn(self.N_FREQUENCIES) * self.FREQUENCY_SCALE)
        self.time_mlp = nn.Sequential(
            nn.Linear(2 * self.N_FREQUENCIES, self.TIME_DIM), Mish(), nn.Linear(self.TIME_DIM, self.TIME_DIM)
        )
        self.input = nn.Linear(act_dim + obs_dim + self.TIME_DIM, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(n_blocks))
        self.output = nn.Linear(width, act_dim)

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor, masks: Tensor | None = None) -> Tensor:
        """`a_t` (B, A), `obs` (B, S), `t` (B,) in (0, 1]; `masks` (n_blocks, B, width) are dropout masks, None in use."""
        # Phases reach 600 radians, where float32 rounds at 3e-5: the order of the products is the official one.
        phase = t[:, None] * self.frequencies * 2.0 * math.pi
        time = self.time_mlp(torch.cat([torch.sin(phase), torch.cos(phase)], -1))
        h = self.input(torch.cat([a_t, obs, time], -1))
        for i, block in enumerate(self.blocks):
            h = block(h, None if masks is None else masks[i])
        out: Tensor = self.output(mish(h))
        return out


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


def dropout_masks(shape: tuple[int, ...], p: float, generator: torch.Generator) -> Tensor:
    """Random factors 0 (with probability p) or 1 / (1 - p): dropout whose randomness the caller owns."""
    keep = torch.rand(shape, generator=generator, device=generator.device) >= p
    return keep.to(torch.float32).div_(1.0 - p)
