"""A noise predictor that starts as the exact one of a Gaussian around a clone, so that the network learns only what is missing.

m(s) is a deterministic clone of the data's actions, v the variance of its error in each dimension. If the actions were
N(m, v), the noise in a_t = alpha a + sigma eps would be predicted by sigma z / std, where z = (a_t - alpha m) / std is the
standardised noisy action and std^2 = alpha^2 v + sigma^2. A network F adds to this:

    eps(a_t, s, t) = (sigma z + alpha sqrt(v) F(z, s, t)) / std

F starts at 0; its targets have about unit variance at every t, and an error of F counts by alpha^2 v / std^2 in the denoising
loss. It is the preconditioning of Karras et al. 2022 (arXiv:2206.00364, section 5) around a conditional mean instead of 0. For
samplers, scores and Q's gradients it is a noise predictor like any other.

Shapes: B batch, S observation, A action.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffagents.diffusion.chain import vp_chain
from diffagents.diffusion.sde import vp_alpha_sigma
from diffagents.networks.mlp import TanhPolicy
from diffagents.types import Batch, Metrics

INITIAL_LOG_VAR = -2.0
"""log v before anything is known."""


class PreconditionedDenoiser(nn.Module):
    """The noise predictor eps(a_t, s, t) = (sigma z + alpha sqrt(v) F(z, s, t)) / std.

    Args:
        net: F, a noise predictor net(a_t, obs, t). Its last Linear is set to 0.
        obs_dim: S.
        act_dim: A.
        n_steps: T of the discrete chain; None for the continuous VP-SDE.
        clone_hidden: Hidden sizes of m.

    Attributes:
        clone: m. Only `clone_loss` trains it: no gradient of the denoising loss or of Q reaches it.
        log_var: log v, (A,); trained by `clone_loss`, too.
    """

    signal: Tensor
    noise: Tensor

    def __init__(
        self,
        net: nn.Module,
        obs_dim: int,
        act_dim: int,
        n_steps: int | None = None,
        clone_hidden: Sequence[int] = (256, 256),
    ) -> None:
        super().__init__()
        self.clone = TanhPolicy(obs_dim, act_dim, clone_hidden)
        self.log_var = nn.Parameter(torch.full((act_dim,), INITIAL_LOG_VAR))
        self.net = net
        last = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.discrete = n_steps is not None
        if n_steps is not None:
            chain = vp_chain(n_steps)
            self.register_buffer("signal", chain.signal, persistent=False)
            self.register_buffer("noise", chain.noise, persistent=False)

    def clone_loss(self, obs: Tensor, act: Tensor) -> Tensor:
        """The losses of m and v: the squared error of m, and minus the log-likelihood of its error under N(0, v).

        Args:
            obs: (B, S).
            act: The data's actions, (B, A).

        Returns:
            A scalar, the mean over batch and dimensions.
        """
        error = (self.clone(obs) - act).square()
        likelihood = 0.5 * (error.detach() * torch.exp(-self.log_var) + self.log_var)
        return (error + likelihood).mean()

    def forward(self, a_t: Tensor, obs: Tensor, t: Tensor, masks: Tensor | None = None) -> Tensor:
        """Predict the noise in noisy actions.

        Args:
            a_t: (..., A).
            obs: (..., S); broadcast against the actions.
            t: Steps of the chain, counted from 0, or times in (0, 1], (...,); broadcast against the actions.
            masks: Dropout masks, handed on to `net` unless None.

        Returns:
            (..., A).
        """
        alpha, sigma = (self.signal[t], self.noise[t]) if self.discrete else vp_alpha_sigma(t)
        more = () if masks is None else (masks,)
        return self._around(
            self.clone(obs).detach(), a_t, alpha[..., None], sigma[..., None], lambda z: self.net(z, obs, t, *more)
        )

    def on_states(self, obs: Tensor, n_steps: int) -> Callable[[Tensor, int], Tensor]:
        """This noise predictor for the states `obs` (..., S); see `diffusion_policy.bind_states`."""
        m, correction = self.clone(obs).detach(), self.net.on_states(obs, n_steps)  # type: ignore[operator]
        return lambda a, i: self._around(m, a, self.signal[i], self.noise[i], lambda z: correction(z, i))

    def _around(self, m: Tensor, a_t: Tensor, alpha: Tensor, sigma: Tensor, correction: Callable[[Tensor], Tensor]) -> Tensor:
        spread = alpha * torch.exp(0.5 * self.log_var.detach())
        std = torch.sqrt(spread.square() + sigma.square())
        z = (a_t - alpha * m) / std
        return (sigma * z + spread * correction(z)) / std


def without_clone(net: nn.Module) -> nn.Module:
    """F of a preconditioned noise predictor; any other network itself."""
    return net.net if isinstance(net, PreconditionedDenoiser) else net


def clone_variance(net: nn.Module) -> Tensor:
    """v of a preconditioned noise predictor, (A,), detached."""
    assert isinstance(net, PreconditionedDenoiser)
    return torch.exp(net.log_var.detach())


def add_clone_loss(net: nn.Module, batch: Batch, loss: Tensor, metrics: Metrics) -> tuple[Tensor, Metrics]:
    """Add the losses of m and v to the denoising loss, if the noise predictor has a clone.

    Args:
        net: The noise predictor.
        batch: The transitions that are cloned.
        loss: The denoising loss, a scalar.
        metrics: Its metrics.

    Returns:
        The loss, and the metrics, with `clone_loss`; both unchanged without a clone.
    """
    if not isinstance(net, PreconditionedDenoiser):
        return loss, metrics
    clone_loss = net.clone_loss(batch.obs, batch.act)
    return loss + clone_loss, {**metrics, "clone_loss": clone_loss.detach()}
