"""Networks: sizes as in the papers' code, ensembles equal to their members, dropout owned by the caller."""

import math

import pytest
import torch
from torch import nn

from diffagents.agents.srpo import ResidualBlock, ResidualScoreNet
from diffagents.networks.critics import IQLCritic
from diffagents.networks.mlp import EnsembleMLP, TanhPolicy, dropout_masks


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# obs and act dimensions; parameters of the score network, the 2- and 4-layer policy, the twin Q, V (official code)
SIZES = {
    "hopper": (11, 3, 1_640_451, 69_635, 139_778, 69_121),
    "walker2d, halfcheetah": (17, 6, 1_643_526, 71_942, 144_386, 70_657),
    "antmaze": (29, 8, 1_647_624, 75_528, 151_554, 73_729),
    "pen": (45, 24, 1_659_928, 83_736, 167_938, 77_825),
    "kitchen": (60, 9, 1_656_073, 83_721, 167_938, 81_665),
}


@pytest.mark.parametrize(("obs_dim", "act_dim", "n_score", "n_policy", "n_q", "n_v"), SIZES.values(), ids=SIZES)
def test_parameter_counts(obs_dim: int, act_dim: int, n_score: int, n_policy: int, n_q: int, n_v: int) -> None:
    assert count(ResidualScoreNet(obs_dim, act_dim)) == n_score
    assert count(TanhPolicy(obs_dim, act_dim, (256, 256))) == n_policy
    critic = IQLCritic(obs_dim, act_dim, (256, 256), (256, 256))
    assert (count(critic.q), count(critic.v), count(critic.q_target)) == (n_q, n_v, 0)


def test_antmaze_policy_has_four_layers() -> None:
    assert count(TanhPolicy(29, 8, (256,) * 4)) == 207_112


def test_ensemble_equals_its_members() -> None:
    ensemble, x = EnsembleMLP(3, 5, (7, 4)), torch.randn(6, 5)
    out = ensemble(x)
    assert out.shape == (3, 6)
    for e in range(3):
        h = x
        for i in range(3):
            h = h @ ensemble.weights[i][e] + ensemble.biases[i][e]
            h = h.relu() if i < 2 else h
        torch.testing.assert_close(out[e], h.squeeze(-1))


def test_ensemble_starts_like_linear_layers() -> None:
    ensemble = EnsembleMLP(2, 100, (50,))
    assert ensemble.weights[0].abs().max() <= 0.1 and ensemble.weights[0].std().item() == pytest.approx(
        0.1 / math.sqrt(3), rel=0.05
    )
    assert not torch.equal(ensemble.weights[0][0], ensemble.weights[0][1])


def test_block_skips_the_unnormalised_input() -> None:
    block = ResidualBlock(8)
    nn.init.zeros_(block.project.weight)
    nn.init.zeros_(block.project.bias)
    x = torch.randn(3, 8)
    assert torch.equal(block(x, torch.zeros(3, 8)), x)


def test_dropout_masks_keep_the_mean() -> None:
    masks = dropout_masks((100, 100), 0.1, torch.Generator().manual_seed(0))
    assert set(masks.unique().tolist()) == {0.0, torch.tensor(1 / 0.9).item()}
    assert masks.mean().item() == pytest.approx(1.0, abs=0.02)
