"""The discrete chain: its schedule against printed digits, its sampler against closed forms, the networks' sizes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffagents.diffusion.chain import Chain, reverse_mean, reverse_var, sample_chain, sample_ddim, vp_chain
from diffagents.networks.diffusion_policy import MLPDenoiser
from diffagents.networks.mlp import EnsembleMLP

# The three samplers in use: standard deviation of a step, and what is clipped to [-1, 1].
SAMPLERS: dict[str, tuple[str, dict[str, bool]]] = {
    "diffusion_ql": ("posterior_std", {"clip_x0": True, "clip_x": False}),  # and DiffCPS, DiffusionBC
    "idql": ("beta_std", {"clip_x0": False, "clip_x": True}),
    "bdpo": ("beta_std", {"clip_x0": True, "clip_x": False}),
}
every_sampler = pytest.mark.parametrize(("std", "clips"), SAMPLERS.values(), ids=SAMPLERS)


def close(ours: Tensor, printed: str) -> None:
    torch.testing.assert_close(ours, torch.tensor([float(x) for x in printed.split()]), rtol=0, atol=6e-6)


def test_schedule_of_five_steps() -> None:
    """Digits of the official codes' `vp_beta_schedule(5)`, and of what their diffusion classes make of it."""
    chain = vp_chain(5)
    close(chain.beta, ".195875 .458818 .635781 .754878 .835031")
    close(chain.alpha_bar, ".804125 .435178 .158500 .038852 .006409")
    close(chain.posterior_std, "0 .39889 .65325 .81296 .89876")
    close(chain.beta_std, ".44258 .67736 .79736 .86884 .91380")


def test_schedule_of_fifty_steps() -> None:
    close(vp_chain(50).beta[[0, -1]], ".003972 .179647")


@pytest.mark.parametrize("n_steps", [1, 2, 5, 10, 50, 1000])
def test_schedule_of_any_length(n_steps: int) -> None:
    """It ends at the same share of noise for every T; the last step back has no randomness and keeps nothing of x."""
    chain = vp_chain(n_steps)
    assert chain.n_steps == n_steps and all(len(entry) == n_steps for entry in chain)
    assert chain.alpha_bar[-1].item() == pytest.approx(0.0064093, abs=1e-6)
    assert chain.alpha_bar[-1].item() == pytest.approx(math.exp(-0.1 - 9.9 / 2), rel=1e-5)
    assert [chain.posterior_std[0].item(), chain.from_x[0].item(), chain.from_x0[0].item()] == [0.0, 0.0, 1.0]
    torch.testing.assert_close(chain.signal.square() + chain.noise.square(), torch.ones(n_steps))
    # A noisy action goes over into itself one step earlier: share of the action, and variance by the true posterior.
    signal, noise = (
        torch.cat([start, entry[:-1]]) for start, entry in ((torch.ones(1), chain.signal), (torch.zeros(1), chain.noise))
    )
    torch.testing.assert_close(chain.from_x0 + chain.from_x * chain.signal, signal)
    torch.testing.assert_close((chain.from_x * chain.noise).square() + chain.posterior_std.square(), noise.square())


@pytest.mark.parametrize("n_steps", [5, 50])
def test_mean_in_the_form_of_the_noise(n_steps: int) -> None:
    """Without clipping it is (x - beta / sqrt(1 - abar) eps) / sqrt(alpha), as IDQL's code has it."""
    chain, g = vp_chain(n_steps), torch.Generator().manual_seed(0)
    x, eps = torch.randn(n_steps, 3, generator=g), torch.randn(n_steps, 3, generator=g)
    i = torch.arange(n_steps)[:, None]
    expected = (x - chain.beta[i] / chain.noise[i] * eps) / chain.alpha[i].sqrt()
    torch.testing.assert_close(reverse_mean(chain, i, x, eps, clip_x0=False), expected, rtol=1e-4, atol=1e-4)


def gaussian_eps(chain: Chain, mean: float, var: float, seen: list[Tensor] | None = None) -> Any:
    """The exact noise predictor of N(mean, var I); var 0: of a point."""

    def eps(x: Tensor, i: int) -> Tensor:
        if seen is not None:
            seen.append(x)
        return chain.noise[i] * (x - chain.signal[i] * mean) / (chain.alpha_bar[i] * var + 1.0 - chain.alpha_bar[i])

    return eps


def slope(chain: Chain, i: int, var: float) -> float:
    """d x_i / d x_i+1 of a step with `gaussian_eps`, whose E[x0 | x] is linear in x."""
    gain = chain.signal[i] * var / (chain.alpha_bar[i] * var + 1.0 - chain.alpha_bar[i])
    return float(chain.from_x0[i] * gain + chain.from_x[i])


def draw(n_steps: int, n: int) -> Tensor:
    return torch.randn(n_steps + 1, n, 2, generator=torch.Generator().manual_seed(0))


@every_sampler
@pytest.mark.parametrize("n_steps", [1, 5, 50])
def test_one_point_data_come_back_at_the_last_step(std: str, clips: dict[str, bool], n_steps: int) -> None:
    """Exactly, whatever the noise; and not before it."""
    chain, seen = vp_chain(n_steps), list[Tensor]()
    sample = sample_chain(gaussian_eps(chain, 0.7, 0.0, seen), chain, draw(n_steps, 200), getattr(chain, std), **clips)
    assert (sample - 0.7).abs().max().item() < 2e-5
    assert len(seen) == n_steps and min((x - 0.7).abs().mean().item() for x in seen) > 0.05


@every_sampler
def test_gaussian_data_come_back(std: str, clips: dict[str, bool]) -> None:
    """Mean and std of N(0.3, 0.2^2) from 50 steps: the first to 0.01, the second to the 17 % or 4 % that so few steps leave."""
    chain, n = vp_chain(50), 50_000
    sample = sample_chain(gaussian_eps(chain, 0.3, 0.04), chain, draw(50, n), getattr(chain, std), **clips)
    assert sample.mean().item() == pytest.approx(0.3, abs=0.01)
    low, high = (0.16, 0.2) if std == "posterior_std" else (0.2, 0.21)
    assert low < sample.std().item() < high
    if clips["clip_x"]:  # cuts the tails of x in the middle of the chain, for which there is no closed form
        return
    slopes, var = [slope(chain, i, 0.04) for i in range(50)], 1.0  # every step is linear in x, no x0 reaches the bounds
    for i in reversed(range(50)):
        var = slopes[i] ** 2 * var + (getattr(chain, std)[i].item() ** 2 if i > 0 else 0.0)
    mean = 0.3 * (1.0 - math.prod(slopes) * chain.signal[-1].item())
    assert sample.mean().item() == pytest.approx(mean, abs=5 * var**0.5 / (2 * n) ** 0.5)
    assert sample.std().item() == pytest.approx(var**0.5, abs=5 * var**0.5 / (4 * n) ** 0.5)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 5])
def test_ddim_asks_the_chain_s_own_steps_only_and_brings_one_point_back(n_steps: int) -> None:
    """With data at one point the noise is known at every x: whatever steps are skipped, the sample is the point."""
    chain, point, asked = vp_chain(5), torch.tensor([0.3, -0.8]), []

    def eps(x: Tensor, i: int) -> Tensor:
        asked.append(i)
        return (x - chain.signal[i] * point) / chain.noise[i]

    x = sample_ddim(eps, chain, torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), n_steps)
    torch.testing.assert_close(x, point.expand(20, 2), rtol=0, atol=1e-5)
    assert asked == {1: [4], 2: [4, 0], 3: [4, 2, 0], 5: [4, 3, 2, 1, 0]}[n_steps]


def test_reverse_variance_of_gaussian_data() -> None:
    """Var(x_i | x_i+1) of the joint Gaussian of x_i and x_i+1, when the actions have variance v."""
    chain, var = vp_chain(5), torch.tensor([1.0, 0.3, 0.02])
    got = reverse_var(chain, var)
    torch.testing.assert_close(got[:, 0], chain.beta, rtol=1e-5, atol=1e-6)  # unit variance stays unit variance
    for i in range(5):
        before = chain.alpha_bar[i] / chain.alpha[i]
        of_before = before * var + 1.0 - before  # Var(x_i)
        of_after = chain.alpha[i] * of_before + chain.beta[i]
        torch.testing.assert_close(got[i], of_before - chain.alpha[i] * of_before.square() / of_after, rtol=1e-4, atol=1e-6)


def test_ddim_brings_gaussian_data_back() -> None:
    """N(0.2, 0.3^2) through 200 steps: the probability flow keeps the distribution, and the order of the samples."""
    chain, mean, std = vp_chain(200), 0.2, 0.3

    def eps(x: Tensor, i: int) -> Tensor:
        total = (chain.signal[i] * std) ** 2 + chain.noise[i] ** 2
        return chain.noise[i] * (x - chain.signal[i] * mean) / total

    start = torch.linspace(-3, 3, 601)[:, None]
    x = sample_ddim(eps, chain, start, 200, clip_x0=False)
    torch.testing.assert_close(x, mean + std * start, rtol=0, atol=0.02)


def test_ddim_clips_as_it_is_told() -> None:
    chain = vp_chain(5)

    def eps(x: Tensor, i: int) -> Tensor:
        return (x - chain.signal[i] * 3.0) / chain.noise[i]  # data at 3, outside

    x = torch.randn(10, 1, generator=torch.Generator().manual_seed(0))
    assert (sample_ddim(eps, chain, x, 5) == 1.0).all() and (sample_ddim(eps, chain, x, 5, clip_x0=False) > 2.9).all()
    assert (sample_ddim(eps, chain, x, 5, clip_x0=False, clip_x=True) <= 1.0).all()


def test_what_is_clipped() -> None:
    """A predictor that always says 0 leaves x at x / sqrt(abar): clip_x0 holds the last of these, clip_x every one."""
    chain, noises = vp_chain(5), 3.0 * draw(5, 100)

    def run(**clips: bool) -> tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []

        def zero(x: Tensor, i: int) -> Tensor:
            seen.append(x)
            return torch.zeros_like(x)

        return sample_chain(zero, chain, noises, chain.beta_std, **clips), seen

    free, _ = run(clip_x0=False, clip_x=False)
    x0, by_x0 = run(clip_x0=True, clip_x=False)
    x, by_x = run(clip_x0=False, clip_x=True)
    assert free.abs().max() > 2.0 and x0.abs().max() <= 1.0 and x.abs().max() <= 1.0
    assert by_x0[1].abs().max() > 2.0  # the noise that is added leaves the bounds again
    assert torch.equal(by_x[0], noises[0]) and all(one.abs().max() <= 1.0 for one in by_x[1:])  # the first x is free


@pytest.mark.parametrize("std", ["posterior_std", "beta_std"])
def test_each_noise_has_its_place(std: str) -> None:
    """The sample is linear in the noises: the first is x_T, the next belong to i = T - 1, ..., 1, the last is not used."""
    chain, stds = vp_chain(5), getattr(vp_chain(5), std)
    slopes = [slope(chain, i, 0.04) for i in range(5)]
    expected = [math.prod(slopes), *(stds[i].item() * math.prod(slopes[:i]) for i in (4, 3, 2, 1)), 0.0]
    noises = draw(5, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(
        sample_chain(gaussian_eps(chain, 0.3, 0.04), chain, noises, stds, clip_x0=False).sum(), noises
    )
    torch.testing.assert_close(gradient[:, 0], torch.tensor(expected)[:, None].expand(6, 2))


def test_gradients_flow_through_every_step() -> None:
    """d sample / d error of the predictor at each step, by difference quotients."""
    chain, noises = vp_chain(5), draw(5, 1).double()
    chain = Chain(*(entry.double() for entry in chain))

    def sample(error: Tensor) -> Tensor:
        exact = gaussian_eps(chain, 0.3, 0.04)
        return sample_chain(lambda x, i: exact(x, i) + error[i], chain, noises, chain.posterior_std).sum()

    zero = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(sample(zero), zero)
    steps = 1e-6 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(gradient, torch.stack([(sample(e) - sample(-e)) / 2e-6 for e in steps]))
    assert (gradient.abs() > 1e-3).all()


# obs and act dimensions; parameters of the noise predictor and of the twin critic of 3 x 256 (official code of Diffusion-QL)
SIZES = {
    "hopper": (11, 3, 141_363, 271_362),
    "walker2d, halfcheetah": (17, 6, 144_438, 275_970),
    "antmaze": (29, 8, 148_536, 283_138),
    "pen": (45, 24, 160_840, 299_522),
    "kitchen": (60, 9, 156_985, 299_522),
}


@pytest.mark.parametrize(("obs_dim", "act_dim", "n_denoiser", "n_critic"), SIZES.values(), ids=SIZES)
def test_parameter_counts(obs_dim: int, act_dim: int, n_denoiser: int, n_critic: int) -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(MLPDenoiser(obs_dim, act_dim)) == n_denoiser
    assert count(EnsembleMLP(2, obs_dim + act_dim, (256, 256, 256))) == n_critic
