"""SRPO learns on a real task: Pendulum-v1 from a controller that acts at random half of the time."""

import importlib.util
import pathlib
import types

import pytest

from diffagents import SRPO, evaluate


def own_data_example() -> types.ModuleType:
    path = pathlib.Path(__file__).resolve().parents[2] / "examples" / "02_your_own_data.py"
    spec = importlib.util.spec_from_file_location("own_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_srpo_beats_the_data_and_its_behaviour_cloning(seed: int) -> None:
    """A policy that always acts as the controller means to gets about -130; the data have -585, cloning does no better."""
    agent = SRPO(
        "MlpPolicy",
        "Pendulum-v1",
        seed=seed,
        verbose=0,
        beta=0.1,
        gamma=0.95,
        tau=0.03,
        learning_rate=3e-3,
        batch_size=128,
        behavior_batch_size=128,
        critic_steps=2500,
        behavior_steps=1000,
        policy_steps=600,
        policy_kwargs={"net_arch": [64, 64], "behavior_width": 32, "behavior_blocks": 1},
        preset=None,
    ).learn(own_data_example().record(60))
    assert agent.dataset_info is not None
    data = agent.dataset_info["mean_return"]
    cloned = evaluate(agent.behavior_policy(), "Pendulum-v1", 30, n_envs=10, deterministic=False)
    srpo = evaluate(agent, "Pendulum-v1", 30, n_envs=10)
    assert srpo.mean_return > 0.5 * data, (data, str(srpo))  # returns are negative: half the cost
    assert srpo.mean_return > 0.5 * cloned.mean_return, (str(cloned), str(srpo))
