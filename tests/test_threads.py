"""One agent in several threads, as a server or a robot's control loop has it."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
from small_agents import NAMES, small
from toy import line_data

DATA = line_data(60)


def in_threads(jobs: list[Callable[[], None]]) -> list[BaseException]:
    """Run the jobs at the same time; what they raised."""
    raised: list[BaseException] = []
    together = threading.Barrier(len(jobs))

    def guarded(job: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                together.wait()
                job()
            except BaseException as error:
                raised.append(error)

        return run

    threads = [threading.Thread(target=guarded(job)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Python changes threads every few lines."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("name", NAMES)
def test_predict_in_four_threads(name: str) -> None:
    """Deterministic actions are those of one thread; drawn ones are within their bounds."""
    agent = small(name).learn(DATA)
    obs = np.random.default_rng(0).normal(size=(12, *agent.observation_space.shape)).astype(np.float32)
    alone = [agent.predict(one, deterministic=True)[0] for one in obs]

    def work(first: int) -> None:  # each has another observation than the rest
        for i in np.roll(np.tile(np.arange(len(obs)), 3), -3 * first):
            np.testing.assert_allclose(agent.predict(obs[i], deterministic=True)[0], alone[i], atol=1e-6)
            assert agent.action_space.contains(agent.predict(obs[i], deterministic=False)[0])

    assert in_threads([partial(work, first) for first in range(4)]) == []


@pytest.mark.parametrize("name", ["TD3BC", "SRPO", "DiffusionQL"])
def test_predict_while_another_thread_learns(name: str) -> None:
    agent = small(name).learn(DATA)
    obs = np.zeros((3, *agent.observation_space.shape), np.float32)
    done = threading.Event()

    def learn() -> None:
        try:
            agent.learn(DATA, 60, reset_num_timesteps=False)
        finally:
            done.set()

    def act() -> None:
        while not done.is_set():
            assert np.isfinite(agent.predict(obs)[0]).all()

    before = agent.num_timesteps
    assert in_threads([learn, act, act]) == []
    assert agent.num_timesteps == before + 60
