"""BC against closed forms, and the function that it clones."""

from typing import Any

import numpy as np
import pytest
import torch
from small_agents import assert_all_differ, offline_knobs
from toy import line_data

from diffagents import BC, load_dataset
from diffagents.data.replay_buffer import Mixture, Replay
from diffagents.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore:action bounds")
OBS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)


def an_agent(**hyperparameters: Any) -> BC:
    settings: dict[str, Any] = {"behavior_steps": 5, "batch_size": 16, "policy_kwargs": {"net_arch": [16, 16]}}
    return BC(seed=0, verbose=0, device="cpu", **{**settings, **hyperparameters}).learn(line_data())


def test_loss_is_the_mean_squared_error_over_batch_and_dimensions() -> None:
    """[D1] With an error of 0.4 in one of two dimensions: 0.4^2 / 2."""
    agent, obs = an_agent(), torch.randn(64, 3, generator=torch.Generator().manual_seed(5))
    act = agent.policy(obs).detach() + torch.tensor([0.4, 0.0])
    loss, metrics = agent.bc_loss(Batch(obs, act, torch.zeros(64), obs, torch.zeros(64)), {})
    assert loss.item() == pytest.approx(0.08) and metrics["bc_loss"].item() == pytest.approx(0.08)


def test_the_learning_rate_falls_to_zero_on_a_cosine() -> None:
    """[D2] At half of the stage it is half of the initial one."""
    seen: list[float] = []
    agent = BC(seed=0, verbose=0, behavior_steps=20, batch_size=16, learning_rate=0.01)
    agent.learn(line_data(), callback=lambda local, _: seen.append(local["self"].optimizers["policy"].lr.item()) or True)
    assert seen[10] == pytest.approx(0.005) and seen[0] == pytest.approx(0.01) and 0 < seen[-1] < 1e-3


def test_clones_a_function_in_odd_units_in_seconds() -> None:
    """Observations around 100 with a std of 50: normalised [D3] they are learned, and as they are they are not."""
    rng = np.random.default_rng(0)
    data = line_data(2000, obs_dim=2, act_dim=1, horizon=1)
    z = rng.normal(size=(2000, 2)).astype(np.float32)
    data["observations"] = data["next_observations"] = 100.0 + 50.0 * z
    data["actions"] = np.tanh(z[:, :1] - 0.5 * z[:, 1:])
    errors = {}
    for normalize in (True, False):
        agent = BC(seed=0, verbose=0, behavior_steps=300, normalize_obs=normalize, policy_kwargs={"net_arch": [32, 32]})
        agent.learn(data)
        errors[normalize] = float(np.square(agent.predict(data["observations"])[0] - data["actions"]).mean())
    assert errors[True] < 0.005 < errors[False]


def test_rewards_are_not_read() -> None:
    """Not even rewards that an algorithm with a critic refuses: rewards that are all equal give the same policy."""
    data = line_data()
    data |= {"truncations": data["terminations"] | data["truncations"], "terminations": np.zeros(400, bool)}
    constant = {**data, "rewards": np.ones_like(data["rewards"])}
    with pytest.warns(UserWarning, match="reward"):
        other = BC(seed=0, verbose=0, behavior_steps=3).learn(constant)
    assert np.array_equal(BC(seed=0, verbose=0, behavior_steps=3).learn(data).predict(OBS)[0], other.predict(OBS)[0])


def test_one_observation_is_acted_on_in_numpy() -> None:
    """The fast path agrees with the network, whether `deterministic` or not."""
    agent = an_agent()
    assert agent.point_policy(True) is agent.point_policy(False) is agent.policy
    for deterministic in (True, False):
        batched = agent.predict(OBS, deterministic=deterministic)[0]
        single = np.stack([agent.predict(obs, deterministic=deterministic)[0] for obs in OBS])
        np.testing.assert_allclose(single, batched, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("share", "kept"), [(0.25, {3.0}), (0.5, {2.0, 3.0}), (1.0, {0.0, 1.0, 2.0, 3.0})])
def test_online_it_clones_the_data_and_its_best_episodes(share: float, kept: set[float]) -> None:
    """[O1] Four episodes of two steps with the actions 0, 1, 2, 3 (x 0.1), the later the better; a fifth is running."""
    agent = an_agent(online_top=share)
    data = load_dataset(line_data(), verbose=0).sampler("cpu", agent.reward_transform, agent.obs_normalizer)
    replay = Replay(3, 2, 100, torch.device("cpu"))
    for k in range(5):
        for step in range(2):
            act, ends = torch.full((1, 2), 0.1 * k), np.array([step == 1 and k < 4])
            reward, done = torch.full((1,), float(k)), torch.from_numpy(ends.astype(np.float32))
            replay.add(torch.zeros(1, 3), act, reward, done, torch.zeros(1, 3), ends)
    prepare = agent.online_stage().prepare
    assert prepare is not None
    mixture = prepare(Mixture(data, replay, 0.0), torch.Generator())
    acts = mixture.sample(400, torch.Generator().manual_seed(0)).act
    assert {round(10 * a, 3) for a in acts.flatten().tolist()} == kept
    assert prepare(Mixture(None, Replay(3, 2, 100, torch.device("cpu")), 0.5), torch.Generator()) is None


def test_every_option_changes_the_result() -> None:
    base: dict[str, Any] = {"behavior_steps": 10, "batch_size": 16, "verbose": 0, "seed": 0, "device": "cpu"}
    other: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 17, "normalize_obs": False, "behavior_steps": 11}
    results = {name: BC(**{**base, name: value}).learn(line_data()).predict(OBS)[0] for name, value in other.items()}
    results["default"] = BC(**base).learn(line_data()).predict(OBS)[0]
    assert_all_differ(results)
    same = BC(**base, reward_transform="normalize").learn(line_data()).predict(OBS)[0]
    assert np.array_equal(same, results["default"])
    assert {*other, "reward_transform"} == offline_knobs("BC")
