"""Critics that several algorithms share: the critic of implicit Q-learning, and a Q of returns.

IQLCritic: twin Q, target twins, V by expectile regression (Kostrikov et al. 2021, arXiv:2110.06169).

    L_V = E[ |tau - 1(u < 0)| u^2 ],   u = min_j Qbar_j(s, a) - V(s)           Eq. (5)
    L_Q = mean_j E[ (r + gamma (1 - d) V(s') - Q_j(s, a))^2 ]                  Eq. (6), averaged over the twins
    Qbar <- (1 - tau_target) Qbar + tau_target Q   after every step

It is used by SRPO, IQL and IDQL. The order is that of SRPO's official code: min Qbar(s, a) and V(s') are computed BEFORE the
V step (official IQL steps V first and bootstraps from the new V), so that both losses can be minimised in one step.
The input of Q is [action, observation], as in SRPO's official critic files.

Shapes: B batch, S observation, A action.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffagents.functional import expectile_loss, polyak_update_, td_target
from diffagents.networks.mlp import MLP, EnsembleMLP
from diffagents.types import Batch, Metrics


class IQLCritic(nn.Module):
    """The networks and losses of IQL; the agent owns the optimisers and decides when to step.

    Args:
        obs_dim: S.
        act_dim: A.
        q_hidden: Hidden sizes of each Q.
        v_hidden: Hidden sizes of V.
        v_layer_norm: Whether V normalises its input (IDQL).
        q_layer_norm: Whether Q has LayerNorm in its hidden layers.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        q_hidden: Sequence[int],
        v_hidden: Sequence[int],
        v_layer_norm: bool = False,
        q_layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.q = EnsembleMLP(2, act_dim + obs_dim, q_hidden, layer_norm=q_layer_norm)
        v = MLP(obs_dim, v_hidden, 1)
        self.v = nn.Sequential(nn.LayerNorm(obs_dim, eps=1e-6), *v) if v_layer_norm else v
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters of Q and V; the target network follows by `update_target`."""
        return [*self.q.parameters(), *self.v.parameters()]

    def loss(self, batch: Batch, expectile: float, gamma: float, q_target: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """L_V + L_Q. The two share no parameter, so one backward pass serves both.

        Args:
            batch: Transitions.
            expectile: tau in (0, 1).
            gamma: Discount in [0, 1).
            q_target: What Q regresses on, (B,), instead of the target of Eq. (6): `policy_target`, or returns of the data.

        Returns:
            The loss, a scalar, and the metrics `v_loss`, `q_loss`, `q` and `v`.
        """
        act_obs = torch.cat([batch.act, batch.obs], -1)
        with torch.no_grad():
            v_target = self.q_target(act_obs).amin(0)  # (B,)
            if q_target is None:
                q_target = td_target(batch.rew, batch.done, self.v(batch.next_obs).squeeze(-1), gamma)
        v = self.v(batch.obs).squeeze(-1)
        v_loss = expectile_loss(v_target - v, expectile)  # Eq. (5)
        q_loss, metrics = self.q_loss(batch, q_target)
        return v_loss + q_loss, {"v_loss": v_loss.detach(), **metrics, "v": v.detach().mean()}

    def q_loss(self, batch: Batch, q_target: Tensor) -> tuple[Tensor, Metrics]:
        """L_Q alone, Eq. (6) with another target, for a Q that needs no V.

        Args:
            batch: Transitions.
            q_target: What Q regresses on, (B,).

        Returns:
            The loss, a scalar, and the metrics `q_loss` and `q`.
        """
        q = self.q(torch.cat([batch.act, batch.obs], -1))  # (2, B)
        loss = (q - q_target).square().mean()
        return loss, {"q_loss": loss.detach(), "q": q.detach().mean()}

    @torch.no_grad()
    def policy_target(self, batch: Batch, next_act: Tensor, gamma: float) -> Tensor:
        """r + gamma (1 - d) min_j Qbar_j(s', a') for the actions a' = `next_act` (B, A) of a policy: (B,)."""
        next_q = self.q_target(torch.cat([next_act, batch.next_obs], -1)).amin(0)
        return td_target(batch.rew, batch.done, next_q, gamma)

    def update_target(self, tau: float) -> None:
        """Move the target twins towards the online ones by a share `tau` in (0, 1]."""
        polyak_update_(self.q_target.parameters(), self.q.parameters(), tau)

    def target_mean(self, obs: Tensor, act: Tensor) -> Tensor:
        """(Qbar_1 + Qbar_2) / 2 at obs (B, S) and act (B, A): (B,). SRPO's policy ascends its gradient."""
        return self.q_target(torch.cat([act, obs], -1)).mean(0)


class ReturnCritic(nn.Module):
    """Q(s, a) in standard deviations from the mean return, together with that mean and standard deviation (SfBC).

    Args:
        obs_dim: S.
        act_dim: A.
        hidden: Hidden sizes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, obs_dim: int, act_dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.net = MLP(obs_dim + act_dim, hidden, 1, nn.SiLU)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, obs: Tensor, act: Tensor) -> Tensor:
        """Standardised values, (...,), of act (..., A) at obs (..., S), which broadcasts."""
        pairs = torch.cat([obs.expand(*act.shape[:-1], -1), act], -1)
        q: Tensor = self.net(pairs)
        return q.squeeze(-1)
