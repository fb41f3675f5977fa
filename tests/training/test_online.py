"""Online fine-tuning: where it starts, what its batches hold, what ends a value, what is kept, and how a run is resumed."""

import functools
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_agents import NAMES, fields, offline_knobs, small

import diffagents
from diffagents import load_dataset
from diffagents.agent import Agent
from diffagents.data.replay_buffer import Mixture, Replay
from diffagents.data.sampler import Sampler
from diffagents.data.transitions import Transitions
from diffagents.errors import ArtifactError, TrainingDiverged
from diffagents.training.online import MAX_RELAXATION, constraint_relaxation, floors
from diffagents.training.state import training_tensors

TABLES = {"AWR", "SfBC", "QGPO", "DiffusionBC", "BC"}  # whose batches come from tables that a resumed run makes anew
LIMIT = 25


def pendulum() -> Any:
    """A pole on a cart that falls within a dozen random steps, with a time limit short enough to be met."""
    return gym.make("InvertedPendulum-v5", max_episode_steps=LIMIT)


@functools.cache
def data() -> Transitions:
    """What a random policy lived through in it; actions in [-3, 3]."""
    env, rows = pendulum(), []
    env.action_space.seed(0)
    for episode in range(60):
        obs, over = env.reset(seed=episode)[0], False
        while not over:
            action = env.action_space.sample()
            after, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, after, terminated, truncated))
            obs, over = after, terminated or truncated
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    return load_dataset({name: np.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}, env=env)


@functools.cache
def trained(name: str) -> pathlib.Path:
    """An offline agent as a file, which every test loads anew."""
    import tempfile

    return small(name).learn(data()).save(pathlib.Path(tempfile.mkdtemp()) / f"{name}.zip")


def offline(name: str, **knobs: Any) -> Agent:
    agent: Agent = diffagents.load(trained(name), verbose=0, **knobs)
    return agent


def all_tensors(agent: Agent) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in training_tensors(agent).items()}


def assert_same(one: Agent, two: Agent) -> None:
    a, b = all_tensors(one), all_tensors(two)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    for counter in ("num_timesteps", "n_env_steps", "n_updates"):
        assert getattr(one, counter) == getattr(two, counter), counter
    assert one.state.online == two.state.online
    assert one.replay_buffer is not None and two.replay_buffer is not None
    assert torch.equal(one.replay_buffer.matrix, two.replay_buffer.matrix)


# ---- every algorithm ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_goes_on_from_a_file_with_old_data(name: str) -> None:
    agent = offline(name)
    before, steps, updates = all_tensors(agent), agent.num_timesteps, agent.n_updates
    agent.learn_online(60, pendulum(), data(), learning_starts=30, utd=0.5, log_interval=30)
    assert (agent.num_timesteps, agent.n_env_steps, agent.n_updates) == (steps + 60, 60, updates + 15)
    assert agent.replay_buffer is not None and len(agent.replay_buffer) == 60
    moved = [key for key, tensor in all_tensors(agent).items() if not torch.equal(tensor, before[key])]
    assert any(key.startswith(network) for key in moved for network in agent.MODEL), "what acts has learnt nothing"
    assert agent.history[-1]["stage"] == "online" and "train_return" in agent.history[-1]
    assert agent.state.constraint_relaxation == 1.0  # offline learning is again what the paper says


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_learns_from_nothing_and_from_a_file_alone(name: str, tmp_path: pathlib.Path) -> None:
    agent = small(name).learn_online(50, pendulum(), learning_starts=40)
    assert agent.n_env_steps == 50 and agent.n_updates == 10
    again: Agent = diffagents.load(agent.save(tmp_path / "a"), verbose=0)
    again.learn_online(50, pendulum(), learning_starts=40)  # its buffer was not saved: a new one
    assert again.num_timesteps == 100 and again.n_updates == 20
    assert again.dataset_info is not None and again.dataset_info["kind"] == "online"
    assert len(again.evaluate(n_episodes=2).returns) == 2  # in the environment that it met


@pytest.mark.parametrize("name", NAMES)
def test_the_first_evaluation_online_is_the_offline_one(name: str) -> None:
    agent = offline(name)
    expected = agent.evaluate(pendulum(), 3, seed=5).returns
    sampled = offline(name).evaluate(pendulum(), 3, seed=5, deterministic=False).returns
    found: list[Any] = []

    def look(local: dict[str, Any], _: Any) -> bool:
        if local["self"].n_env_steps == 1:
            found.append(local["self"].evaluate(pendulum(), 3, seed=5).returns)
            found.append(local["self"].evaluate(pendulum(), 3, seed=5, deterministic=False).returns)
        return True

    agent.learn_online(5, pendulum(), data(), look, learning_starts=2)
    assert found == [expected, sampled]


@functools.cache
def whole_run(name: str) -> Agent:
    """Only read: what a run is that nothing stops."""
    return offline(name).learn_online(50, pendulum(), data(), learning_starts=20)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TABLES])
@pytest.mark.parametrize("stop", [31, 50])
def test_a_stopped_run_ends_as_the_uninterrupted_one(name: str, stop: int, tmp_path: pathlib.Path) -> None:
    """Agent and buffer saved in mid-episode, in another environment object: bit for bit, one environment, CPU."""
    whole, part = whole_run(name), offline(name)

    def halt(local: dict[str, Any], _: Any) -> bool:
        return bool(local["self"].n_env_steps < stop)

    part.learn_online(50, pendulum(), data(), halt, learning_starts=20)
    assert part.n_env_steps == stop and part.replay_buffer is not None
    part.save(tmp_path / "agent")
    part.save_replay_buffer(tmp_path / "buffer")
    again: Agent = diffagents.load(tmp_path / "agent.zip", verbose=0)
    again.load_replay_buffer(tmp_path / "buffer")
    again.learn_online(env=pendulum(), dataset=data())
    assert_same(again, whole)
    with pytest.raises(ValueError, match="learns from a dataset too: pass the same dataset="):
        part.learn_online()
    part.learn_online(dataset=data())  # and without a file, in the same process
    assert_same(part, whole)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_stopped_run_with_tables_goes_on(name: str, tmp_path: pathlib.Path) -> None:
    agent = offline(name)
    agent.learn_online(70, pendulum(), data(), lambda a, b: a["self"].n_env_steps < 40, learning_starts=20)
    agent.learn_online(dataset=data())
    assert agent.n_env_steps == 70 and agent.state.online is not None and agent.state.online.n_updates == 50


def test_same_seed_same_run_and_evaluating_changes_nothing() -> None:
    runs = []
    for evaluates in (False, True):
        agent = offline("DiffusionQL")

        def look(local: dict[str, Any], _: Any, evaluates: bool = evaluates) -> bool:
            if evaluates and local["self"].n_env_steps % 20 == 0:
                local["self"].evaluate(pendulum(), 1, deterministic=False)
            return True

        runs.append(agent.learn_online(60, pendulum(), data(), look, learning_starts=20))
    one, two = (all_tensors(agent) for agent in runs)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items() if not name.startswith("predict_generator"))


# ---- what the buffer holds ---------------------------------------------------------------------------------------------
class Line(gym.Env[Any, Any]):
    """Walks 1, 2, 3, ...: terminates at `dies`, and reports a time-out at `limit`, both where they are equal."""

    observation_space = gym.spaces.Box(-100, 100, (1,))
    action_space = gym.spaces.Box(-2, 2, (1,))

    def __init__(self, dies: int, limit: int) -> None:
        self.dies, self.limit = dies, limit

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at = 0
        return np.array([0.0], np.float32), {}

    def step(self, action: Any) -> Any:
        self.at += 1
        return np.array([self.at], np.float32), 2.0, self.at == self.dies, self.at == self.limit, {}


def line_agent(**knobs: Any) -> Agent:
    n = 40
    obs = np.linspace(0, 9, n, dtype=np.float32)[:, None]
    rows = {"observations": obs, "next_observations": obs, "actions": np.random.default_rng(0).uniform(-2, 2, (n, 1))}
    ends = {"terminations": np.arange(n) % 10 == 9, "truncations": np.zeros(n, bool)}
    settings = {"reward_transform": "iql_locomotion", "normalize_obs": True, **knobs}
    return small("IQL", env=Line(5, 9), **settings).learn({**rows, **ends, "rewards": np.arange(n) / 40})


def columns(agent: Agent) -> tuple[torch.Tensor, ...]:
    assert agent.replay_buffer is not None
    return tuple(agent.replay_buffer.matrix[:, i] for i in range(5))  # obs, act, rew, done, next_obs


@pytest.mark.parametrize(("dies", "limit", "done"), [(4, 9, 1.0), (9, 4, 0.0), (4, 4, 1.0)])
def test_only_a_termination_ends_a_value(dies: int, limit: int, done: float) -> None:
    agent = line_agent()
    agent.learn_online(12, Line(dies, limit), learning_starts=11)
    obs, _, _, ended, next_obs = columns(agent)
    at = torch.arange(12) % 4
    expected = torch.where(at == 3, done, 0.0)
    assert torch.equal(ended, expected)
    mean, std = agent.obs_normalizer.mean, agent.obs_normalizer.std
    assert torch.allclose(obs * std + mean, at.float(), atol=1e-5)
    assert torch.allclose(next_obs * std + mean, at + 1.0, atol=1e-5)  # where it ended too: not the next episode's start


def test_transform_and_normaliser_are_those_of_the_offline_phase() -> None:
    agent = line_agent()
    transform, mean = agent.reward_transform, agent.obs_normalizer.mean.clone()
    assert transform is not None and transform.scale != 1.0
    rows: Any = {
        "observations": np.full((20, 1), 50.0),
        "next_observations": np.full((20, 1), 50.0),
        "rewards": np.arange(20.0),
    }
    rows |= {"actions": np.zeros((20, 1)), "terminations": np.arange(20) % 5 == 4, "truncations": np.zeros(20, bool)}
    agent.learn_online(10, dataset=rows, learning_starts=2)  # other data do not fit them anew
    assert agent.reward_transform == transform and torch.equal(agent.obs_normalizer.mean, mean)
    assert torch.allclose(columns(agent)[2], torch.tensor(transform.scale * 2.0 + transform.shift))


def test_actions_are_kept_as_they_were_taken() -> None:
    agent = line_agent()
    taken: list[float] = []

    class Watched(Line):
        def step(self, action: Any) -> Any:
            taken.append(float(action[0]))
            return super().step(action)

    agent.learn_online(20, Watched(5, 9), learning_starts=10)
    assert torch.allclose(2 * columns(agent)[1], torch.tensor(taken), atol=1e-6) and max(map(abs, taken)) > 0


def test_several_environments(tmp_path: pathlib.Path) -> None:
    from stable_baselines3.common.env_util import make_vec_env

    agent = line_agent()
    steps = agent.num_timesteps
    agent.learn_online(20, make_vec_env(lambda: Line(5, 9), 3), learning_starts=6, utd=2)
    assert agent.n_env_steps == 21 and agent.num_timesteps == steps + 21  # rounded up to whole steps of all
    assert agent.state.online is not None and agent.state.online.n_updates == 30
    assert agent.replay_buffer is not None
    episodes = agent.replay_buffer.episodes(whole=False)
    assert episodes is not None and episodes.episode_ends.tolist() == [5, 7, 12, 14, 19, 21]
    mean, std = agent.obs_normalizer.mean, agent.obs_normalizer.std
    assert torch.allclose((episodes.obs * std + mean)[:, 0], torch.tensor([0, 1, 2, 3, 4, 0, 1] * 3).float(), atol=1e-5)
    whole = agent.replay_buffer.episodes(whole=True)
    assert whole is not None and whole.episode_ends.tolist() == [5, 10, 15]


def fill(replay: Replay, n: int, n_envs: int = 1, end_every: int = 4) -> None:
    """Row k: obs k, act 0, rew k, done 0, next_obs k + 1."""
    for k in range(n):
        value = torch.full((n_envs, 1), float(k)) + 1000 * torch.arange(n_envs)[:, None]
        ended = np.full(n_envs, (k + 1) % end_every == 0)
        replay.add(value, torch.zeros(n_envs, 1), value[:, 0], torch.zeros(n_envs), value + 1, ended)


def test_the_ring_keeps_the_last_rows_in_order() -> None:
    replay = Replay(1, 1, 10, "cpu")
    fill(replay, 23)
    assert len(replay) == 10 and replay.n_added == 23 and replay.max_abs_reward == 22.0
    episodes = replay.episodes(whole=False)
    assert episodes is not None and episodes.obs[:, 0].tolist() == list(range(13, 23))
    assert episodes.episode_ends.tolist() == [3, 7, 10]  # rows 15, 19 ended; 22 is where it is now
    assert float(replay.last_next_obs()) == 23.0
    replay.cut()
    again = replay.episodes(whole=False)
    assert again is not None and again.episode_ends.tolist() == [3, 7, 10]


def test_the_ring_grows_without_losing_anything() -> None:
    replay = Replay(1, 1, 1_000_000, "cpu")
    fill(replay, 5000, n_envs=2)
    assert len(replay) == 10_000 and len(replay._rows) < 20_000
    episodes = replay.episodes(whole=True)
    assert episodes is not None and episodes.obs[:, 0].tolist() == [*range(5000), *range(1000, 6000)]


def test_buffer_file(tmp_path: pathlib.Path) -> None:
    agent = offline("TD3BC").learn_online(50, pendulum(), data(), learning_starts=20)
    path = agent.save_replay_buffer(tmp_path / "deep" / "replay_buffer_1.pkl")
    assert path.name == "replay_buffer_1.safetensors"
    agent.save(tmp_path / "a")
    again: Agent = diffagents.load(tmp_path / "a.zip", verbose=0)
    again.load_replay_buffer(tmp_path / "deep" / "replay_buffer_1.pkl")
    assert_same(agent, again)
    other = offline("TD3BC")
    with pytest.raises(ArtifactError, match=r"saved at environment steps 50, updates 42.* agent at environment steps 0, "):
        other.load_replay_buffer(path)
    with pytest.raises(ArtifactError, match="another agent's"):
        line_agent().load_replay_buffer(path)
    with pytest.raises(FileNotFoundError, match="no replay buffer at"):
        again.load_replay_buffer(tmp_path / "nothing")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a replay buffer of diffagents, or it is damaged"):
        again.load_replay_buffer(path)


# ---- batches -----------------------------------------------------------------------------------------------------------
def side(n: int, tag: float, table: float | None = None) -> Sampler:
    matrix = torch.full((n, 5), tag)
    sampler = Sampler(matrix, 1, 1)
    return sampler if table is None else sampler.with_extras(extra=torch.full((n,), table))


@pytest.mark.parametrize(("ratio", "n_old"), [(0.0, 0), (0.25, 16), (0.5, 32), (1.0, 64)])
def test_share_of_each_batch(ratio: float, n_old: int) -> None:
    generator = torch.Generator().manual_seed(0)
    replay = Replay(1, 1, 100, "cpu")
    mixture = Mixture(side(500, -1.0), replay, ratio)
    assert (mixture.sample(64, generator).rew == -1.0).all()  # nothing new yet
    fill(replay, 30)
    batch = mixture.sample(64, generator)
    assert int((batch.rew == -1.0).sum()) == n_old and len(batch.rew) == 64 and batch.obs.shape == (64, 1)
    tables = Mixture(side(9, -1.0, 5.0), side(9, 1.0, 7.0), ratio).sample(64, generator)
    assert torch.equal(tables.extras["extra"], torch.where(tables.rew == -1.0, 5.0, 7.0))


def test_uniform_over_both_together() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = Mixture(side(300, -1.0, 5.0), side(100, 1.0, 7.0), "uniform").sample(20_000, generator)
    assert 0.74 < float((batch.rew == -1.0).float().mean()) < 0.76
    assert torch.equal(batch.extras["extra"], torch.where(batch.rew == -1.0, 5.0, 7.0))
    replay = Replay(1, 1, 100, "cpu")
    assert (Mixture(side(300, -1.0), replay, "uniform").sample(50, generator).rew == -1.0).all()
    fill(replay, 100)
    mixed = Mixture(side(100, -1.0), replay, "uniform").sample(20_000, generator).rew
    assert set(mixed.tolist()) == {-1.0, *map(float, range(100))} and 0.48 < float((mixed == -1.0).float().mean()) < 0.52


@pytest.mark.parametrize(("ratio", "share"), [(0.25, 0.25), (1.0, 1.0), (0.0, 0.0)])
def test_the_share_is_what_learn_online_trains_on(ratio: float, share: float) -> None:
    agent, seen = small("IQL", preset=None).learn(data()), []  # observations stay as they are
    loss = agent.critic_loss  # type: ignore[attr-defined]
    old = {tuple(row) for row in data().obs.tolist()}

    def watched(batch: Any, noise: Any) -> Any:
        rows = agent.obs_normalizer.std * batch.obs + agent.obs_normalizer.mean
        seen.append(np.mean([tuple(row) in old for row in rows.tolist()]))
        return loss(batch, noise)

    agent.critic_loss = watched  # type: ignore[attr-defined]
    agent.learn_online(40, pendulum(), data(), learning_starts=30, offline_ratio=ratio)
    assert seen == [share] * 10


# ---- schedules ---------------------------------------------------------------------------------------------------------
def test_the_constraint_loosens_with_environment_steps_and_no_further_than_it_may() -> None:
    agent = offline("SRPO", online_halflife=10)
    assert constraint_relaxation(agent) == 1.0
    agent.state.n_env_steps = 20
    assert constraint_relaxation(agent) == 4.0
    agent.state.n_env_steps = 10**9
    assert constraint_relaxation(agent) == MAX_RELAXATION
    assert constraint_relaxation(offline("IQL")) == 1.0 and constraint_relaxation(offline("SRPO", online_halflife=None)) == 1.0


@pytest.mark.parametrize("name", ["SRPO", "TD3BC", "DiffusionQL", "DiffCPS", "BDPO"])
def test_loosening_reaches_the_loss(name: str) -> None:
    """The same batch and draws, a constraint 4 times looser: the policy's gradient is another."""
    gradients = []
    for loose in (1.0, 4.0):
        agent = offline(name)
        sampler = data().sampler("cpu", agent.reward_transform, agent.obs_normalizer)
        batch = sampler.sample(64, torch.Generator().manual_seed(0))
        agent.state.constraint_relaxation = loose
        slot = "multiplier" if name == "DiffCPS" else "policy"  # there it is lambda that feels kappa
        part = next(p for p in agent.online_stage().updates if agent.optimizers[slot] in p.optimizers)
        position = part.optimizers.index(agent.optimizers[slot])
        found, _ = part.gradients(batch, part.draw(64, torch.Generator().manual_seed(1)))
        gradients.append(torch.cat([g.flatten() for g in found[position]]))
    assert not torch.allclose(*gradients, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_learning_rates_are_constant_online(name: str) -> None:
    agent = offline(name).learn_online(30, pendulum(), data(), learning_starts=20)
    for key, optimizer in agent.optimizers.items():
        rate = agent.config.online_learning_rate if key == "policy" else optimizer.learning_rate
        assert float(optimizer.lr) == pytest.approx(rate) and optimizer.horizon == 0, key
    agent.learn(data(), 2 * len(agent.STAGE_SHARES))  # a new plan: its first rate is the offline one
    for stage in agent.stages():
        for optimizer in {o for part in stage.updates for o in part.optimizers if not o.cosine}:
            assert float(optimizer.lr) == pytest.approx(optimizer.learning_rate)


# ---- Stable-Baselines3's side --------------------------------------------------------------------------------------------
def test_callbacks(tmp_path: pathlib.Path) -> None:
    from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.monitor import Monitor

    agent = offline("SRPO")
    steps = agent.num_timesteps
    agent.set_logger(configure(str(tmp_path / "log"), ["csv"]))
    evaluating = EvalCallback(
        Monitor(pendulum()), n_eval_episodes=1, eval_freq=20, best_model_save_path=str(tmp_path / "best"), verbose=0
    )
    keeping = CheckpointCallback(30, str(tmp_path / "kept"), name_prefix="a", save_replay_buffer=True)
    agent.learn_online(60, pendulum(), data(), [evaluating, keeping], progress_bar=True, learning_starts=20, log_interval=10)
    rows = np.genfromtxt(tmp_path / "log" / "progress.csv", delimiter=",", names=True)
    assert {"eval/mean_reward", "rollout/ep_rew_mean", "online/train_return", "time/fps"} <= {
        column.strip('"') for column in (tmp_path / "log" / "progress.csv").read_text().splitlines()[0].split(",")
    }
    assert len(rows) > 3
    assert (tmp_path / "best" / "best_model.zip").is_file()
    assert [row["num_timesteps"] for row in agent.provenance["evaluations"]] == [steps + 20, steps + 40, steps + 60]
    again: Agent = diffagents.load(tmp_path / "kept" / f"a_{steps + 30}_steps.zip", verbose=0)
    again.load_replay_buffer(tmp_path / "kept" / f"a_replay_buffer_{steps + 30}_steps.pkl")
    again.learn_online(env=pendulum(), dataset=data())
    for name, tensor in all_tensors(again).items():
        assert name.startswith("predict_generator") or torch.equal(tensor, all_tensors(agent)[name]), name


def test_train_return_is_that_of_the_exploring_episodes() -> None:
    agent = line_agent()
    agent.learn_online(30, Line(5, 9), learning_starts=29, log_interval=10)
    rows = [row["train_return"] for row in agent.history if row["stage"] == "online"]
    assert rows == [10.0, 10.0, 10.0]


# ---- what goes wrong -----------------------------------------------------------------------------------------------------
def test_nan_stops_with_the_last_good_state() -> None:
    agent = offline("TD3BC")

    def poison(local: dict[str, Any], _: Any) -> bool:
        if agent.n_env_steps == 24:
            with torch.no_grad():
                next(agent.policy.parameters()).fill_(float("nan"))
        return True

    with pytest.raises(TrainingDiverged, match="online diverged between its steps 20 and 24"):
        agent.learn_online(60, pendulum(), data(), poison, learning_starts=10, log_interval=10)
    assert np.isfinite(agent.predict(np.zeros(4, np.float32))[0]).all()
    assert all(tensor.isfinite().all() for tensor in agent.policy.parameters())
    assert agent.replay_buffer is not None and agent.n_env_steps == len(agent.replay_buffer) == 24  # lived through all the same
    assert agent.state.online is not None and agent.state.online.n_updates == 9
    assert agent.num_timesteps == offline("TD3BC").num_timesteps + 24


def test_a_reward_that_is_no_number_is_named() -> None:
    class Broken(Line):
        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, float("nan") if self.at == 3 else 1.0, *rest

    with pytest.raises(ValueError, match=r"returned the rewards .nan. at step 3"):
        line_agent().learn_online(10, Broken(5, 9))


def test_an_environment_that_does_not_come_back_begins_a_new_episode() -> None:
    class Moody(Line):
        n_resets = 0

        def reset(self, **kwargs: Any) -> Any:
            Moody.n_resets += 1
            obs, info = super().reset(**kwargs)
            self.at = Moody.n_resets % 3
            return obs, info

    agent = line_agent()
    agent.learn_online(40, Moody(20, 30), callback=lambda a, b: a["self"].n_env_steps < 10, learning_starts=5)
    with pytest.warns(UserWarning, match="did not return to the state in which the run stopped"):
        agent.learn_online()
    assert agent.n_env_steps == 40


def bad_calls() -> Iterator[tuple[str, dict[str, Any], str]]:
    yield "ratio", {"offline_ratio": 1.5}, r"offline_ratio=1.5 must lie in \[0, 1\]"
    yield "word", {"offline_ratio": "half"}, r"offline_ratio='half'; choose from 'uniform'"
    yield "utd", {"utd": 0}, "utd=0 must be positive"
    yield "starts", {"learning_starts": -1}, "learning_starts=-1 must be"
    yield "buffer", {"buffer_size": 0}, "buffer_size=0 must be"
    yield "total", {"total_timesteps": 0}, "total_timesteps=0 must be a positive whole number of environment steps"
    yield "log", {"log_interval": 0}, "log_interval=0 must be"
    yield "only old", {"offline_ratio": 1}, "offline_ratio=1 learns from the dataset alone"
    yield "spaces", {"env": "Pendulum-v1"}, "the agent was built for"
    yield "flag", {"calibrate": 3}, "calibrate=3; choose from True, False"
    yield "nothing to finish", {"total_timesteps": None}, "there is no unfinished online run"


@pytest.mark.parametrize(("kwargs", "message"), [case[1:] for case in bad_calls()], ids=[case[0] for case in bad_calls()])
def test_bad_calls_change_nothing(kwargs: dict[str, Any], message: str) -> None:
    agent = offline("IQL")
    before, state = all_tensors(agent), dict(vars(agent))
    with pytest.raises(ValueError, match=message):
        agent.learn_online(**{"total_timesteps": 10, "env": pendulum(), **kwargs})
    assert vars(agent) == state
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_tensors(agent).items())


def test_what_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no environment is known: pass env="):
        small("IQL").learn_online(10)
    with pytest.raises(ValueError, match='reward_transform="iql_locomotion" is fitted on data: pass dataset='):
        small("IQL", reward_transform="iql_locomotion").learn_online(10, pendulum())
    # a file without critics
    stripped = tmp_path / "acts_only.zip"
    with zipfile.ZipFile(trained("SRPO")) as full, zipfile.ZipFile(stripped, "w") as part:
        for name in full.namelist():
            if not name.startswith(("learner", "optimizer", "trainer")):
                part.writestr(name, full.read(name))
    agent: Agent = diffagents.load(stripped, verbose=0)
    with pytest.raises(RuntimeError, match=r"loaded without learner.safetensors"):
        agent.learn_online(10, pendulum())
    # a resumed run without its buffer
    agent = offline("IQL")
    agent.learn_online(30, pendulum(), data(), lambda a, b: a["self"].n_env_steps < 15, learning_starts=5)
    again: Agent = diffagents.load(agent.save(tmp_path / "a"), verbose=0)
    with pytest.raises(RuntimeError, match=r"replay buffer of 15 steps.*load_replay_buffer"):
        again.learn_online(env=pendulum(), dataset=data())
    with pytest.raises(ValueError, match="the unfinished run continues with"):
        agent.learn_online(utd=3)


def test_vecnormalize_is_refused() -> None:
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    with pytest.raises(ValueError, match="inside a VecNormalize"):
        offline("IQL").learn_online(10, VecNormalize(DummyVecEnv([pendulum])))


def test_dict_observations() -> None:
    class Goal(Line):
        observation_space = gym.spaces.Dict(  # type: ignore[assignment]
            {name: gym.spaces.Box(-100, 100, (1,)) for name in ("observation", "achieved_goal", "desired_goal")}
        )

        def _dict(self, obs: Any) -> dict[str, Any]:
            return {"observation": obs, "achieved_goal": obs, "desired_goal": obs + 7}

        def reset(self, **kwargs: Any) -> Any:
            obs, info = super().reset(**kwargs)
            return self._dict(obs), info

        def step(self, action: Any) -> Any:
            obs, *rest = super().step(action)
            return self._dict(obs), *rest

    agent = small("TD3BC", normalize_obs=False).learn_online(12, Goal(4, 9), learning_starts=8)
    assert agent.replay_buffer is not None and agent.obs_dim == 3
    episodes = agent.replay_buffer.matrix
    assert torch.equal(episodes[:, 0], torch.arange(12.0) % 4) and torch.equal(episodes[:, 2], torch.arange(12.0) % 4 + 7)
    assert torch.equal(episodes[:, -3], torch.arange(12.0) % 4 + 1)


# ---- calibration -------------------------------------------------------------------------------------------------------
def test_floors_are_the_returns_that_followed() -> None:
    rew = torch.tensor([1.0, 2.0, 3.0, -4.0, 5.0])
    done = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    zero = torch.zeros(5)
    ends = torch.tensor([0, 3, 5])
    cut = Sampler(torch.stack([zero, zero, rew, done, zero], 1), 1, 1, ends)
    assert floors(cut, 0.5).tolist() == [1 + 1 + 0.75, 3.5, 3.0, -torch.inf, -torch.inf]  # what followed the cut is not known
    positive = Sampler(torch.stack([zero, zero, rew.abs(), done, zero], 1), 1, 1, ends)
    assert floors(positive, 0.5).tolist() == [2.75, 3.5, 3.0, 6.5, 5.0]


@pytest.mark.parametrize("name", ["DiffusionQL", "DiffCPS", "BDPO", "TD3BC"])
def test_calibrated_targets_reach_the_critic(name: str) -> None:
    """A floor far above every target is what Q is fitted to; where there is none, nothing changes."""
    losses = []
    for floor in (None, -torch.inf, 1000.0):
        agent = offline(name)
        batch = data().sampler("cpu", agent.reward_transform, agent.obs_normalizer).sample(32, torch.Generator().manual_seed(0))
        if floor is not None:
            batch = batch._replace(extras={"floor": torch.full((32,), floor)})
        part = agent.online_stage().updates[0]
        _, metrics = part.gradients(batch, part.draw(32, torch.Generator().manual_seed(1)))
        losses.append(float(next(value for key, value in metrics.items() if key in ("critic_loss", "q_loss"))))
    assert losses[0] == losses[1] and losses[2] > 1e5 > losses[0]


def test_calibration_in_a_run_and_where_it_is_refused() -> None:
    for ratio in (0.5, "uniform"):
        agent = offline("TD3BC").learn_online(40, pendulum(), data(), learning_starts=20, calibrate=True, offline_ratio=ratio)
        assert agent.n_env_steps == 40 and agent.state.online is not None and agent.state.online.settings.calibrate
    with pytest.raises(ValueError, match="not for SRPO at all"):
        offline("SRPO").learn_online(40, pendulum(), data(), calibrate=True)
    with pytest.raises(ValueError, match="takes its floors from dataset="):
        offline("TD3BC").learn_online(40, pendulum(), calibrate=True)


# ---- learning ----------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*another environment than the dataset", "ignore:.*is not the environment stored")
@pytest.mark.parametrize("name", ["TD3BC", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SRPO", "DiffusionQL"))])
def test_it_gets_better_online(name: str) -> None:
    """A random policy falls after 5 steps; what is learnt from its data is much improved by the live environment."""
    fast = {"learning_rate": 1e-3, "online_learning_rate": 1e-3, "online_halflife": 500, "batch_size": 64, "gamma": 0.97}
    fast |= {"policy_kwargs": {"net_arch": [32, 32]}, "reward_transform": "none"}
    steps = 300
    if name == "SRPO":
        steps, fast["beta"], fast["policy_kwargs"] = 1800, 0.2, {"net_arch": [32, 32], "behavior_width": 32}
    env = gym.make("InvertedPendulum-v5", max_episode_steps=200)
    agent = getattr(diffagents, name)(preset=None, seed=0, verbose=0, device="cpu", **fast).learn(data(), steps)
    before = agent.evaluate(env, 10).mean_return
    agent.learn_online(1500, gym.make("InvertedPendulum-v5", max_episode_steps=200), data(), learning_starts=100)
    after = agent.evaluate(env, 10).mean_return
    assert after > 1.5 * max(before, data().info["mean_return"]), (before, after)


# ---- found by review ---------------------------------------------------------------------------------------------------
def test_whole_numbers_in_any_dress_can_be_saved(tmp_path: pathlib.Path) -> None:
    agent = offline("IQL").learn_online(20, pendulum(), data(), learning_starts=5.0, buffer_size=1e4, utd=1, offline_ratio=1)  # type: ignore[arg-type]
    again: Agent = diffagents.load(agent.save(tmp_path / "a"), verbose=0)
    assert again.state.online == agent.state.online


def test_the_default_wait_leaves_something_of_a_short_run() -> None:
    assert offline("IQL").learn_online(50, pendulum()).n_updates > offline("IQL").n_updates
    with pytest.warns(UserWarning, match="which will only collect"):
        offline("IQL").learn_online(20, pendulum(), learning_starts=20)


def test_rewards_that_come_late_are_no_divergence() -> None:
    """All zero at first: Q may still grow once there are others."""

    class Late(Line):
        n = 0

        def step(self, action: Any) -> Any:
            Late.n += 1
            obs, _, *rest = super().step(action)
            return obs, 10.0 if Late.n > 30 else 0.0, *rest

    agent = small("TD3BC", gamma=0.9, learning_rate=1e-2)
    agent.learn_online(300, Late(5, 9), learning_starts=10, log_interval=50)
    assert agent.history[-1]["q"] > 1.5


def test_only_a_settled_policy_is_changed_slowly() -> None:
    agent = small("TD3BC", preset=None).learn_online(20, pendulum(), learning_starts=5)
    assert float(agent.optimizers["policy"].lr) == pytest.approx(3e-4)
    agent.learn_online(20, learning_starts=5)
    assert float(agent.optimizers["policy"].lr) == pytest.approx(3e-4)
    agent.learn(data(), 5).learn_online(20, learning_starts=5)
    assert float(agent.optimizers["policy"].lr) == pytest.approx(3e-5)


def test_a_dropped_buffer_is_waited_for_again() -> None:
    agent = offline("TD3BC").learn_online(40, pendulum(), data(), learning_starts=20, buffer_size=100)
    agent.learn_online(30, dataset=data(), learning_starts=20)  # the same buffer: 100
    assert agent.state.online is not None and agent.state.online.starts == 0 and agent.replay_buffer is not None
    assert agent.replay_buffer.capacity == 100 and len(agent.replay_buffer) == 70
    with pytest.warns(UserWarning, match="buffer_size differs: the replay buffer of the last online run is discarded"):
        agent.learn_online(30, dataset=data(), learning_starts=20, buffer_size=50)
    assert agent.state.online.starts == 20 and len(agent.replay_buffer) == 30


def test_pieces_of_episodes_are_not_whole_ones() -> None:
    replay = Replay(1, 1, 100, "cpu")
    fill(replay, 6)  # 0-3 ended, 4-5 running
    replay.cut()
    fill(replay, 4)
    whole = replay.episodes(whole=True)
    assert whole is not None and whole.episode_ends.tolist() == [4, 8] and whole.obs[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    ring = Replay(1, 1, 10, "cpu")
    fill(ring, 22, end_every=4)  # rows 12 to 21: 12-15 (its head may be lost), 16-19, 20-21 running
    whole = ring.episodes(whole=True)
    assert whole is not None and whole.obs[:, 0].tolist() == [16, 17, 18, 19]


def test_several_runs_on_one_and_many_environments_do_not_join_episodes() -> None:
    from stable_baselines3.common.env_util import make_vec_env

    agent = line_agent()
    agent.learn_online(
        60, make_vec_env(lambda: Line(9, 20), 2), callback=lambda a, b: a["self"].n_env_steps < 8, learning_starts=4
    )
    agent.set_env(Line(9, 20))
    agent.learn_online()
    assert agent.replay_buffer is not None
    episodes = agent.replay_buffer.episodes(whole=False)
    assert episodes is not None and episodes.episode_ends[:2].tolist() == [4, 13]


def test_evaluating_in_the_environment_that_is_learnt_in_is_refused() -> None:
    agent = line_agent()
    with pytest.raises(ValueError, match="is acting in this environment: evaluate in another"):
        agent.learn_online(9, Line(5, 9), callback=lambda a, b: bool(a["self"].evaluate(n_episodes=1)), learning_starts=4)
    assert len(agent.evaluate(n_episodes=1).returns) == 1


def test_a_stage_that_was_never_trained_is_named() -> None:
    with pytest.raises(ValueError, match="the stage 'behavior' was never trained"):
        small("SRPO", preset=None).learn(data(), stages=("critic",)).learn_online(20, pendulum())


def test_another_agents_buffer_is_refused_though_the_counts_agree(tmp_path: pathlib.Path) -> None:
    one, two = (small("TD3BC", seed=seed).learn(data()).learn_online(10, pendulum(), learning_starts=5) for seed in (0, 1))
    one.save_replay_buffer(tmp_path / "b")
    with pytest.raises(ArtifactError, match="load the two that were saved together"):
        two.load_replay_buffer(tmp_path / "b")


def test_vecenvs_time_outs_and_seeded_resets_that_are_not_allowed() -> None:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.monitor import Monitor

    agent = line_agent()
    agent.learn_online(16, make_vec_env(lambda: gym.wrappers.TimeLimit(Line(99, 99), 4), 2), learning_starts=15)
    obs, _, _, done, next_obs = columns(agent)
    mean, std = agent.obs_normalizer.mean, agent.obs_normalizer.std
    at = torch.arange(8).repeat_interleave(2) % 4
    assert torch.equal(done, torch.zeros(16)) and torch.allclose(next_obs * std + mean, at + 1.0, atol=1e-5)
    assert torch.allclose(obs * std + mean, at.float(), atol=1e-5)
    with pytest.raises(ValueError, match="allow_early_resets=True"):
        line_agent().learn_online(16, Monitor(Line(5, 9), allow_early_resets=False), learning_starts=4)


def test_episodes_are_seeded_one_by_one() -> None:
    """Each begins elsewhere, and the same seed makes the same ones."""

    def starts(seed: int) -> list[float]:
        agent = offline("TD3BC", seed=seed).learn_online(60, pendulum(), data(), learning_starts=50)
        assert agent.replay_buffer is not None
        episodes = agent.replay_buffer.episodes(whole=False)
        assert episodes is not None
        return [float(episodes.obs[at, 0]) for at in [0, *episodes.episode_ends.tolist()[:-1]]]

    first = starts(1)
    assert len(first) == len(set(first)) > 2
    assert starts(1) == first and starts(2)[0] != first[0]


def test_updates_see_the_loosening_of_their_step() -> None:
    agent, seen = offline("TD3BC", online_halflife=10), []
    loss = agent.critic_loss  # type: ignore[attr-defined]

    def watched(batch: Any, noise: Any) -> Any:
        seen.append((agent.n_env_steps, agent.state.constraint_relaxation))
        return loss(batch, noise)

    agent.critic_loss = watched  # type: ignore[attr-defined]
    agent.learn_online(30, pendulum(), data(), learning_starts=20)
    assert seen == [(step, 2.0 ** (step / 10)) for step in range(21, 31)] and agent.state.constraint_relaxation == 1.0


def test_a_q_that_runs_away_is_caught() -> None:
    agent = offline("TD3BC")

    def blow_up(local: dict[str, Any], _: Any) -> bool:
        if agent.n_env_steps == 25:
            with torch.no_grad():
                for parameter in agent.critic.parameters():  # type: ignore[attr-defined]
                    parameter.mul_(1000.0)
        return True

    with pytest.raises(TrainingDiverged, match="online diverged between its steps 20 and 30"):
        agent.learn_online(60, pendulum(), data(), blow_up, learning_starts=10, log_interval=10)


@pytest.mark.parametrize("name", ["BC", "DiffusionBC", "SfBC"])
def test_a_run_without_a_whole_episode_says_that_it_learnt_nothing(name: str) -> None:
    agent = small(name)
    with pytest.warns(UserWarning, match="no episode has ended, so this run has nothing to learn from"):
        agent.learn_online(30, Line(99, 99), learning_starts=10)
    assert agent.n_updates == 0 and agent.n_env_steps == 30


def test_the_card_tells_what_was_learnt_online(tmp_path: pathlib.Path) -> None:
    agent = small("TD3BC").learn_online(20, pendulum(), learning_starts=5)
    text = (agent.save_pretrained(tmp_path / "a") / "README.md").read_text()
    assert "| gradient steps | train 0, online 15 |" in text and "| environment steps | 20 |" in text
    assert "learned online in InvertedPendulum-v5" in text and "steps, episodes" not in text


@pytest.mark.parametrize(
    ("name", "knob"), [(name, knob) for name in NAMES for knob in sorted(set(fields(name)) - offline_knobs(name))]
)
def test_every_online_knob_changes_the_result(name: str, knob: str) -> None:
    other = {"online_halflife": 5, "online_noise": 0.5, "online_learning_rate": 3e-3, "online_top": 1.0, "n_online_states": 20}
    plain, changed = whole_run(name), offline(name, **{knob: other.get(knob, 3)})
    changed.learn_online(50, pendulum(), data(), learning_starts=20)
    networks = changed.get_parameters()
    assert any(
        not torch.equal(tensor, networks[network][key])
        for network, state in plain.get_parameters().items()
        for key, tensor in state.items()
    )
