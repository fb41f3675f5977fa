"""The 2-D toys of the examples: their geometry, their energies, their data, their environment, and measures."""

import importlib.util
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from diffagents import SRPO, evaluate, load_dataset
from diffagents.diffusion.sde import vp_alpha_sigma

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bandits = example("bandits")  # under the name by which the gallery imports it
gallery = example("07_gallery")
ALL = list(bandits.TASKS)


@pytest.mark.parametrize("name", ALL)
def test_points_have_their_shape_repeat_with_the_seed_and_lie_inside_the_bounds(name: str) -> None:
    xy, reward = bandits.points(name, 1001, seed=3)
    assert xy.shape == (1001, 2) and reward.shape == (1001,) and xy.dtype == reward.dtype == np.float32
    assert np.abs(xy).max() <= bandits.bound(name)
    np.testing.assert_array_equal(xy, bandits.points(name, 1001, seed=3)[0])
    assert not np.array_equal(xy, bandits.points(name, 1001, seed=4)[0])
    # in random order: the first half is like the second
    np.testing.assert_allclose(xy[:500].mean(0), xy[500:].mean(0), atol=0.6)
    assert abs(reward[:500].mean() - reward[500:].mean()) < 0.15


def test_gaussians_stand_counter_clockwise_from_the_top_with_rising_energy() -> None:
    xy, reward = bandits.points("8gaussians", 40_000)
    for k in range(8):
        own = xy[np.isclose(reward, k / 7)]
        angle = np.pi / 2 + k * np.pi / 4
        np.testing.assert_allclose(own.mean(0), 4 / 1.414 * np.array([np.cos(angle), np.sin(angle)]), atol=0.03)
        np.testing.assert_allclose(own.std(0), 0.5 / 1.414, atol=0.02)
        assert abs(len(own) / len(xy) - 1 / 8) < 0.01


def test_rings_have_four_radii_and_their_energies() -> None:
    xy, reward = bandits.points("rings", 20_000)
    for radius, value in ((3.0, 0.667), (2.25, 0.333), (1.5, 1.0), (0.75, 0.0)):
        own = np.linalg.norm(xy[np.isclose(reward, value)], axis=1)
        assert len(own) == 5000
        assert abs(own.mean() - radius) < 0.01 and abs(own.std() - 0.08) < 0.005


def test_circle() -> None:
    xy, reward = bandits.points("circle", 20_000)
    radius = np.linalg.norm(xy, axis=1)
    assert abs(radius.mean() - 1) < 0.005 and abs(radius.std() - 0.05) < 0.002 and (reward == 1).all()
    np.testing.assert_array_equal(bandits.energy("circle", np.array([[0, 1], [0.85, 0], [0, 0], [1.25, 0]])), [1, 1, 0, 0])


def test_swissroll_is_a_spiral_whose_energy_is_the_squared_radius() -> None:
    xy, reward = bandits.points("swissroll", 20_000)
    np.testing.assert_allclose(reward, (xy**2).sum(-1) / 9, rtol=1e-4, atol=1e-6)
    clean, _ = bandits.TASKS["swissroll"](2000, np.random.default_rng(0), False)
    t = 5 * np.linalg.norm(clean, axis=1)  # the radius is the angle
    assert t.min() >= 1.5 * np.pi and t.max() <= 4.5 * np.pi
    np.testing.assert_allclose(clean, t[:, None] / 5 * np.stack([np.cos(t), np.sin(t)], -1), atol=1e-9)
    np.testing.assert_allclose(bandits.points("swissroll", 2000)[0].std(0), clean.std(0), atol=0.1)
    assert 0.14 < _spread("swissroll") < 0.26


def test_checkerboard_fills_eight_squares() -> None:
    xy, reward = bandits.points("checkerboard", 20_000)
    cell = np.floor(xy / 2).astype(int)  # -2..1
    assert set(map(tuple, cell)) == {(-2, -2), (-2, 0), (-1, -1), (-1, 1), (0, -2), (0, 0), (1, -1), (1, 1)}
    np.testing.assert_array_equal(reward, (cell[:, 0] == -2) | (cell[:, 0] == 0))
    actions = np.array([[1, 1], [3, 1], [-1, 0], [-3, 0], [2, 0], [-2, 0], [0, 0]])
    np.testing.assert_array_equal(bandits.energy("checkerboard", actions), [1, 0, 0, 1, 1, 1, 0])


def test_spirals_are_two_arms_whose_energy_falls_outwards() -> None:
    xy, reward = bandits.points("2spirals", 20_000)
    radius = np.linalg.norm(xy, axis=1)
    assert np.corrcoef(radius, reward)[0, 1] < -0.98
    np.testing.assert_allclose(xy.mean(0), 0, atol=0.05)  # the second arm is the first one turned by half a circle
    assert reward.min() == pytest.approx(1 - 0.3 * np.pi, abs=0.01) and 0.9 < reward.max() <= 1


def test_moons() -> None:
    xy, reward = bandits.points("moons", 20_000)
    upper, lower = xy[reward == 0], xy[reward == 1]
    assert len(upper) == len(lower) == 10_000
    np.testing.assert_allclose(np.linalg.norm(upper - [-1, -0.2], axis=1).mean(), 2.0, atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(lower - [1, 0.8], axis=1).mean(), 2.0, atol=0.02)
    assert upper[:, 1].mean() > 0.9 and lower[:, 1].mean() < -0.3
    assert bandits.energy("moons", np.array([[-1.0, 1.8], [1.0, -1.2]])).tolist() == [0, 1]


def _spread(name: str) -> float:
    """Median distance of noisy points to the curve without noise, as the standard deviation of a normal distribution."""
    clean, _ = bandits.TASKS[name](20_000, np.random.default_rng(0), False)
    return float(np.median(bandits._pairwise(bandits.points(name, 1000)[0], clean).min(1).values)) / 0.6745


@pytest.mark.parametrize("name", ALL)
def test_the_energy_of_an_action_on_the_data_is_the_reward_there(name: str) -> None:
    xy, reward = bandits.points(name, 3000, seed=1)
    same = np.isclose(bandits.energy(name, xy), reward, atol=0.06)
    assert same.mean() > 0.98  # noise carries a few over to a neighbour


@pytest.mark.parametrize("name", ALL)
def test_dataset_is_read_as_one_step_episodes_that_end(name: str) -> None:
    xy, reward = bandits.points(name, 300)
    data = load_dataset(bandits.dataset(name, 300), env=bandits.Bandit(name))
    assert len(data) == data.info["n_episodes"] == 300 and not data.info["bounds_from_data"]
    assert (data.done == 1).all() and (data.obs == 0).all() and (data.episode_lengths == 1).all()
    np.testing.assert_array_equal(data.action.numpy(), xy)
    np.testing.assert_array_equal(data.rew.numpy(), reward)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the checker's advice on bounds and on a missing id
@pytest.mark.parametrize("name", ALL)
def test_environment_gives_one_action_its_energy(name: str) -> None:
    env = bandits.Bandit(name)
    check_env(env, skip_render_check=True)
    obs, _ = env.reset(seed=0)
    _, reward, terminated, truncated, _ = env.step(np.array([0.0, 0.9], np.float32))
    assert obs.tolist() == [0.0] and terminated and not truncated
    assert reward == bandits.energy(name, np.array([[0.0, 0.9]], np.float32))[0]


def test_an_agent_learns_and_is_evaluated_on_a_toy() -> None:
    env = bandits.Bandit("moons")
    agent = SRPO("MlpPolicy", env, seed=0, verbose=0, policy_kwargs={"net_arch": [8], "behavior_width": 8})
    agent.learn(bandits.dataset("moons", 300), total_timesteps=6)
    assert set(evaluate(agent, env, 3).lengths) == {1}


def test_unknown_name() -> None:
    for call in (bandits.points, bandits.dataset):
        with pytest.raises(ValueError, match=r"no toy task 'moon'; choose from 8gaussians, .*moons"):
            call("moon", 3)
    with pytest.raises(ValueError, match="no toy task 'moon'"):
        bandits.Bandit("moon")


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_resampling_weighs_components_by_exp_beta_energy(beta: float) -> None:
    xy, reward = bandits.points("8gaussians", 20_000)
    chosen = bandits.energy("8gaussians", bandits.resample(xy, reward, beta, 4000))
    weight = np.exp(beta * np.arange(8) / 7)
    found = [(np.isclose(chosen, k / 7)).mean() for k in range(8)]
    np.testing.assert_allclose(found, weight / weight.sum(), atol=0.025)


def test_measures_in_closed_form() -> None:
    angle = 2 * np.pi * (np.arange(720) + 0.5) / 720
    data = np.stack([np.cos(angle), np.sin(angle)], -1)
    half = data[:360]
    assert bandits.measure(half, data) == pytest.approx(
        {"distance": 0, "jaccard": 1, "coverage": 0.5, "log_density": bandits.measure(data, data)["log_density"]}, abs=1e-3
    )
    # points in the middle have every angle, but lie on none of the data
    middle = bandits.measure(0.02 * data, data)
    assert middle["jaccard"] == middle["coverage"] == 0 and middle["distance"] == pytest.approx(0.98, abs=1e-4)
    away = bandits.measure(np.array([[0.3, 0.4]]), np.zeros((5, 2)), near=0.6, bandwidth=0.5)
    density = np.exp(-0.5) / (2 * np.pi * 0.25)
    assert away["log_density"] == pytest.approx(np.log(density), abs=1e-5) and away["jaccard"] == 1


def test_shift_ends_at_the_optimum_of_q_and_the_log_density() -> None:
    """For a Gaussian N(m, s^2 I) in the toy's units the optimum is known: 2 (x - x_tar) + level (x - m) / v = 0."""
    bound, m, s = 4.5, torch.tensor([0.5, -1.0]), 0.3
    alpha, sigma = vp_alpha_sigma(torch.tensor(gallery.T_SCORE))

    def net(x: torch.Tensor, obs: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return sigma * (x - alpha * m / bound) / (alpha**2 * (s / bound) ** 2 + sigma**2)

    agent = types.SimpleNamespace(behavior=types.SimpleNamespace(net=net))
    target = np.array([[0.0, 0.0], [2.0, 3.0], [-3.0, 1.0]], np.float32)
    path = gallery.shift(agent, target, bound, 300)
    variance = float(s**2 + (sigma * bound / alpha) ** 2)  # of the blurred density, in the toy's units
    for level, found in zip(gallery.LEVELS, path, strict=True):
        pull = level / variance
        np.testing.assert_allclose(found, (2 * target + pull * m.numpy()) / (2 + pull), atol=0.1)
