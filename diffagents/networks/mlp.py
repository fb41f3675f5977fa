"""Multilayer perceptrons and what is made of them: policies, batched ensembles, initialisation, time features, dropout.

Every layer is initialised as PyTorch initialises a Linear, uniformly in +-1/sqrt(fan_in), which is what the official PyTorch
codes use; `orthogonal_` and `xavier_` are for the others.

Shapes: B batch, S observation, A action, E ensemble members.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Mish(torch.autograd.Function):
    """`mish` with a gradient of its own, which reuses the exponential and the gate of the forward pass."""

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
    """The activation x tanh(softplus(x)), for any shape.

    One exponential suffices: with n = e^x (e^x + 2) that tanh is n / (n + 2). The result agrees with
    `torch.nn.functional.mish` to 3e-7 and takes fewer passes over memory.
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
    """Linear layers with an activation between them: (..., in_dim) -> (..., out_dim).

    Args:
        in_dim: Size of the input.
        hidden: Sizes of the hidden layers; none gives a single Linear.
        out_dim: Size of the output.
        activation: Makes the activation module.
    """

    def __init__(self, in_dim: int, hidden: Sequence[int], out_dim: int, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        sizes = [in_dim, *hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), activation()]
        super().__init__(*layers, nn.Linear(sizes[-1], out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self[0](x))

    def rest(self, h: Tensor) -> Tensor:
        """Apply all layers after the first: (..., first hidden size) -> (..., out_dim)."""
        for layer in list(self)[1:]:
            if isinstance(layer, nn.Linear) and layer.out_features == 1:  # a sum is quicker than a product with one column
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
        """Act on observations.

        Args:
            obs: (B, S).
            masks: Dropout masks of all hidden layers, concatenated, (B, sum of hidden sizes); None outside training.

        Returns:
            Actions, (B, A) in (-1, 1).
        """
        if masks is None:
            return torch.tanh(self.net(obs))
        *body, last = self.net
        h = obs
        for linear, activation, mask in zip(body[::2], body[1::2], torch.split(masks, self.hidden, -1), strict=True):
            h = activation(linear(h)) * mask
        return torch.tanh(last(h))


class GaussianPolicy(TanhPolicy):
    """N(tanh(MLP(s)), diag sigma^2), the actor of IQL and AWR; calling it returns the mean, (B, S) -> (B, A).

    sigma has one number per action dimension, the same for every s; log sigma is initialised to 0 and clamped to [-5, 2].
    Only the mean is squashed: the density is that of a plain Gaussian, whose samples may leave [-1, 1].
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int]) -> None:
        super().__init__(obs_dim, act_dim, hidden)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def log_prob(self, obs: Tensor, act: Tensor, masks: Tensor | None = None) -> Tensor:
        """log pi(a|s), summed over the action dimensions.

        Args:
            obs: (B, S).
            act: (B, A).
            masks: As in `TanhPolicy.forward`.

        Returns:
            (B,).
        """
        log_std = self.log_std.clamp(-5.0, 2.0)
        z = (act - self(obs, masks)) * torch.exp(-log_std)
        return -(0.5 * z.square() + log_std + 0.5 * math.log(2.0 * math.pi)).sum(-1)

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Sample a ~ pi(.|s) for obs (B, S) from standard normal `noise` (B, A): (B, A), clamped to [-1, 1]."""
        return (self(obs) + self.log_std.clamp(-5.0, 2.0).exp() * noise).clamp(-1.0, 1.0)


class EnsembleMLP(nn.Module):
    """E independent MLPs as batched matrix products, so that twin critics cost little more than one.

    The input is (B, in_dim), shared by all members, or (E, B, in_dim), one for each; the output is (E, B) or (E, B, out_dim).

    Args:
        n_members: E.
        in_dim: Size of the input.
        hidden: Sizes of the hidden layers.
        activation: A function applied after each hidden layer.
        layer_norm: Normalise each hidden layer before its activation, with flax's eps of 1e-6.
        out_dim: Size of the output; None for one number, whose dimension is dropped.
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
        """Apply the network to the concatenation of parts, without building it.

        The first layer multiplies each part once: for K actions of a state, the state takes one product instead of K.

        Args:
            *parts: Tensors (..., n_j) whose n_j add up to `in_dim`; leading dimensions broadcast.

        Returns:
            (E, ...) or (E, ..., out_dim).
        """
        h: Tensor | float = 0.0
        for part, weight in zip(parts, self.weights[0].split([part.shape[-1] for part in parts], 1), strict=True):
            rows = part.reshape(1, -1, part.shape[-1]).expand(self.n_members, -1, -1)
            h = h + torch.bmm(rows, weight).view(self.n_members, *part.shape[:-1], -1)
        assert isinstance(h, Tensor)
        out = self.rest(h.flatten(1, -2) + self.biases[0])
        return out.view(*h.shape[:-1], *out.shape[2:])

    def rest(self, h: Tensor) -> Tensor:
        """Apply all that follows the product of the first layer: (E, B, first hidden size) -> (E, B) or (E, B, out_dim)."""
        for i in range(1, len(self.weights)):
            if self.layer_norm:
                h = F.layer_norm(h, h.shape[-1:], eps=1e-6) * self.norm_scales[i - 1] + self.norm_biases[i - 1]
            h = self.activation(h)
            if i == len(self.weights) - 1 and self.out_dim is None:  # a product with one column is a sum, and quicker as one
                return (h * self.weights[i].transpose(1, 2)).sum(-1) + self.biases[i].squeeze(-1)
            h = torch.baddbmm(self.biases[i], h, self.weights[i])
        return h.squeeze(-1) if self.out_dim is None else h


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


def init_(module: nn.Module, fill: Callable[[Tensor], Any]) -> None:
    """Initialise a module in place: every bias to zero, the output layer's too, and every weight matrix by `fill`.

    Args:
        module: The module; parameters of normalisation layers keep their values.
        fill: Fills one matrix in place. For an ensemble it is called for each member's matrix.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:  # only its shape is wanted
            continue
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif "norm" not in name and parameter.dim() > 1:
            for matrix in parameter.detach().view(-1, *parameter.shape[-2:]):
                fill(matrix)


def orthogonal_(module: nn.Module, gain: float = math.sqrt(2.0)) -> None:
    """`init_` with orthogonal matrices scaled by `gain` (BDPO's code)."""
    init_(module, lambda weight: nn.init.orthogonal_(weight, gain))


def xavier_(module: nn.Module) -> None:
    """`init_` with Xavier's uniform matrices (IDQL's code)."""
    init_(module, nn.init.xavier_uniform_)


def sinusoids(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sinusoidal features of a step: sin and cos of t times the dim / 2 frequencies 10000^(-k / (dim / 2 - 1)).

    Args:
        t: Steps, counted from 0, (...,).
        dim: Number of features, even and at least 4.

    Returns:
        The sines and the cosines, (..., dim / 2) each.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000.0) / (half - 1)))
    phase = t[..., None] * frequencies
    return torch.sin(phase), torch.cos(phase)


def fixed_noise(*shape: int) -> Tensor:
    """The noise of deterministic samples: zero for the first, which is then near the centre of the policy; standard normal
    for the others, the candidates among which Q may choose."""
    noise = torch.randn(*shape)
    noise[0] = 0.0
    return noise


def dropout_masks(shape: tuple[int, ...], p: float, generator: torch.Generator) -> Tensor:
    """Dropout masks drawn from the caller's generator.

    Args:
        shape: Shape of the masks.
        p: Probability of dropping, in [0, 1).
        generator: Source of the random numbers; the masks lie on its device.

    Returns:
        Factors 0 (with probability `p`) or 1 / (1 - p), float32.
    """
    keep = torch.rand(shape, generator=generator, device=generator.device) >= p
    return keep.to(torch.float32).div_(1.0 - p)
