"""Value maths against closed forms."""

import pytest
import torch

from diffagents.functional import action_gradient, expectile_loss, polyak_update_, td_target


def test_half_expectile_is_half_the_mse() -> None:
    diff = torch.randn(100)
    torch.testing.assert_close(expectile_loss(diff, 0.5), 0.5 * diff.square().mean())


@pytest.mark.parametrize(("expectile", "share"), [(0.5, 0.5), (0.9, 0.9), (0.999, 0.999)])
def test_expectile_of_two_points(expectile: float, share: float) -> None:
    """Of the values 0 and 1, the tau-expectile is tau: in the limit 1 it is the larger value."""
    values, v = torch.tensor([0.0, 1.0]), torch.tensor(0.3, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = expectile_loss(values - v, expectile)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert v.item() == pytest.approx(share, abs=1e-3)


def test_expectile_limit_is_the_best_action_in_the_data() -> None:
    q = torch.tensor([-3.0, 0.5, 2.0, 1.9])  # Q of the dataset's actions
    grid = torch.linspace(-4, 3, 7001)
    losses = torch.stack([expectile_loss(q - v, 1 - 1e-5) for v in grid])
    assert grid[losses.argmin()].item() == pytest.approx(2.0, abs=2e-3)


def test_td_target_masks_terminations_only() -> None:
    rew, done, value = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([10.0, 10.0])
    assert td_target(rew, done, value, 0.9).tolist() == [10.0, 1.0]


def test_polyak_tau_is_the_share_of_the_online_network() -> None:
    target, online = [torch.zeros(2)], [torch.full((2,), 10.0)]
    polyak_update_(target, online, 0.1)
    assert target[0].tolist() == [1.0, 1.0]
    polyak_update_(target, online, 1.0)
    assert target[0].tolist() == [10.0, 10.0]


def test_action_gradient_is_row_by_row_and_detached() -> None:
    act = torch.randn(5, 3, requires_grad=True)
    gradient = action_gradient(lambda a: -(a - 1.0).square().sum(-1), act)
    torch.testing.assert_close(gradient, -2.0 * (act.detach() - 1.0))
    assert not gradient.requires_grad and act.grad is None
