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


def init_(module: nn.Module, fill: Callable[[Tensor], Any]) -> None:
    """Start every weight matrix in `module` by `fill`, in place, and every bias at zero, the output layer's too."""
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif "norm" not in name and parameter.dim() > 1:
            for matrix in parameter.detach().view(-1, *parameter.shape[-2:]):  # of an ensemble, each member's
                fill(matrix)


def orthogonal_(module: nn.Module, gain: float = math.sqrt(2.0)) -> None:
    """`start_` with orthogonal matrices (BDPO's code)."""
    init_(module, lambda weight: nn.init.orthogonal_(weight, gain))


def xavier_(module: nn.Module) -> None:
    """`start_` with Xavier's uniform matrices (IDQL's code)."""
    init_(module, nn.init.xavier_uniform_)


def sinusoids(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(sin, cos) of t times dim / 2 frequencies 10000^(-k / (dim / 2 - 1)); t (...,) counts steps -> (..., dim / 2) each."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000.0) / (half - 1)))
    phase = t[..., None] * frequencies
    return torch.sin(phase), torch.cos(phase)


def dropout_masks(shape: tuple[int, ...], p: float, generator: torch.Generator) -> Tensor:
    """Random factors 0 (with probability p) or 1 / (1 - p): dropout whose randomness the caller owns."""
    keep = torch.rand(shape, generator=generator, device=generator.device) >= p
    return keep.to(torch.float32).div_(1.0 - p)
