"""Agents go to other processes, and copies of them are independent."""

import copy
import multiprocessing
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import NAMES, small
from toy import line_data

OBS = np.ones((4, 3), np.float32)


def act(agent: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put([agent.predict(OBS, deterministic=kind)[0] for kind in (True, False, False)])


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_agent_acts_and_learns_alike(name: str) -> None:
    """Its generators come along: the random numbers are the same afterwards."""
    agent = small(name, preset=None).learn(line_data())
    other = pickle.loads(pickle.dumps(agent))
    for kind in (True, False, False):
        np.testing.assert_array_equal(other.predict(OBS, deterministic=kind)[0], agent.predict(OBS, deterministic=kind)[0])
    for one in (agent, other):
        one.learn(line_data())
    np.testing.assert_array_equal(other.predict(OBS, deterministic=True)[0], agent.predict(OBS, deterministic=True)[0])


@pytest.mark.parametrize("how", ["spawn", "forkserver"])
def test_an_agent_in_another_process_acts_alike(how: str) -> None:
    agent = small("DiffusionQL").learn(line_data())
    context: Any = multiprocessing.get_context(how)
    queue = context.Queue()
    process = context.Process(target=act, args=(agent, queue))
    process.start()
    got = queue.get(timeout=120)
    process.join(10)
    for there, kind in zip(got, (True, False, False), strict=True):
        np.testing.assert_array_equal(there, agent.predict(OBS, deterministic=kind)[0])


def test_a_deep_copy_is_independent() -> None:
    agent = small("SRPO", env="Pendulum-v1")
    agent.learn_online(20, learning_starts=8)
    before = agent.predict(OBS)[0]
    other = copy.deepcopy(agent)
    assert other.env is not agent.env and other.replay_buffer is not agent.replay_buffer
    for parameter in other.policy.parameters():
        parameter.data.zero_()
    np.testing.assert_array_equal(agent.predict(OBS)[0], before)
    assert not np.array_equal(other.predict(OBS)[0], before)
