"""The agent's verbs with the real Stable-Baselines3 pieces, and how runs are planned, stopped and counted."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from small_agents import small
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize
from toy import line_data

import diffagents
from diffagents import SRPO, TrainingDiverged

SMALL: dict[str, Any] = {
    "seed": 0,
    "verbose": 0,
    "device": "cpu",
    "critic_steps": 10,
    "behavior_steps": 10,
    "policy_steps": 10,
    "batch_size": 16,
    "behavior_batch_size": 8,
    "policy_kwargs": {"net_arch": [16, 16], "behavior_width": 16, "behavior_blocks": 1},
}
DATA = line_data()


def pendulum_data() -> dict[str, Any]:
    """Random torque on the real Pendulum-v1: actions in [-2, 2], episodes end by time limit only."""
    env = gymnasium.make("Pendulum-v1")
    env.action_space.seed(0)
    rows: dict[str, list[Any]] = {
        k: [] for k in ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    }
    for episode in range(2):
        obs, _ = env.reset(seed=episode)
        over = False
        while not over:
            action = env.action_space.sample()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            for key, value in zip(rows, (obs, action, reward, next_obs, terminated, truncated), strict=True):
                rows[key].append(value)
            obs, over = next_obs, terminated or truncated
    return {key: np.array(value) for key, value in rows.items()}


PENDULUM = pendulum_data()


@pytest.fixture(scope="module")
def pendulum_agent() -> SRPO:
    return SRPO("MlpPolicy", "Pendulum-v1", **SMALL).learn(PENDULUM)


# ---- Stable-Baselines3 -----------------------------------------------------------------------------------------------
def test_callbacks_all_together(tmp_path: pathlib.Path) -> None:
    agent = SRPO("MlpPolicy", "Pendulum-v1", **SMALL)
    seen: list[int] = []

    class Note(BaseCallback):
        def _on_step(self) -> bool:
            seen.append(self.num_timesteps)
            return True

    evaluation = EvalCallback(
        gymnasium.make("Pendulum-v1"),
        n_eval_episodes=1,
        eval_freq=15,
        verbose=0,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
    )
    callbacks = [
        evaluation,
        CheckpointCallback(10, str(tmp_path), "step"),
        EveryNTimesteps(10, Note()),
        LogEveryNTimesteps(10),
        StopTrainingOnMaxEpisodes(1000),
        lambda local, _: local["total_timesteps"] == 30,
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not of the same type")  # EvalCallback, of a training env it mistrusts
        agent.learn(PENDULUM, callback=callbacks, progress_bar=True)  # type: ignore[arg-type]
    assert agent.num_timesteps == 30 and seen == [10, 20, 30]
    assert sorted(p.name for p in tmp_path.glob("*.zip")) == [
        "best_model.zip",
        "step_10_steps.zip",
        "step_20_steps.zip",
        "step_30_steps.zip",
    ]
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [15, 30]
    obs = np.zeros(3, np.float32)
    assert np.array_equal(SRPO.load(tmp_path / "step_30_steps.zip").predict(obs)[0], agent.predict(obs)[0])


def test_callbacks_find_what_they_read_of_sb3s_models() -> None:
    """The attributes of self.model in SB3's documentation: HParamCallback's, the buffer of episodes, the progress."""
    progress: list[tuple[int, float]] = []
    read: dict[str, Any] = {}

    class Read(BaseCallback):
        def _on_step(self) -> bool:
            model: Any = self.model
            progress.append((model._total_timesteps, model._current_progress_remaining))
            for name in ("learning_rate", "gamma", "tau", "batch_size", "_n_updates", "_episode_num", "ep_info_buffer"):
                read[name] = getattr(model, name)
            return True

    agent = SRPO(**SMALL, env=make_vec_env("Pendulum-v1", env_kwargs={"max_episode_steps": 5})).learn(PENDULUM, callback=Read())
    assert [total for total, _ in progress] == [30] * 30
    assert [left for _, left in progress] == pytest.approx([1 - (i + 1) / 30 for i in range(30)])
    assert read["gamma"] == agent.config.gamma == 0.99 and read["learning_rate"] == agent.config.learning_rate
    assert read["batch_size"] == agent.config.batch_size and read["tau"] == agent.config.tau and not read["ep_info_buffer"]
    progress.clear()
    agent.learn_online(12, learning_starts=8, callback=Read())
    assert {total for total, _ in progress} == {42} and progress[-1][1] == 0.0
    assert [episode["l"] for episode in agent.ep_info_buffer] == [5, 5] and read["_episode_num"] == 2
    assert agent.replay_buffer is not None and agent.replay_buffer.size() == 12 and 30 < read["_n_updates"] <= agent.n_updates
    with pytest.raises(AttributeError, match="'SRPO' object has no attribute 'learning_rates'"):
        agent.learning_rates  # noqa: B018


def test_without_an_environment_callbacks_still_work(tmp_path: pathlib.Path) -> None:
    """EvalCallback and the progress bar insist on a training VecEnv: `get_env` gives a stand-in."""
    agent = SRPO(**SMALL).learn(
        PENDULUM,
        callback=EvalCallback(make_vec_env("Pendulum-v1"), n_eval_episodes=1, eval_freq=30, verbose=0),
        progress_bar=True,
    )
    with pytest.raises(RuntimeError, match=r"set_env"):
        agent.get_env().reset()


def test_threshold_stops_and_run_can_be_finished() -> None:
    stop = EvalCallback(
        gymnasium.make("Pendulum-v1"),
        callback_on_new_best=StopTrainingOnRewardThreshold(-1e9, verbose=0),
        n_eval_episodes=1,
        eval_freq=12,
        verbose=0,
    )
    agent = SRPO("MlpPolicy", "Pendulum-v1", **SMALL).learn(PENDULUM, callback=stop)
    assert agent.num_timesteps == 12
    agent.learn(PENDULUM, reset_num_timesteps=False)
    assert agent.num_timesteps == 30 and agent.plan is not None and agent.plan.remaining == 0


def test_no_improvement_stops() -> None:
    """The policy does not change before its own stage, so evaluations from seeded starts stop improving before step 20."""
    stop = EvalCallback(
        make_vec_env("Pendulum-v1", seed=0),
        callback_after_eval=StopTrainingOnNoModelImprovement(1, verbose=0),
        n_eval_episodes=1,
        eval_freq=2,
        verbose=0,
    )
    agent = SRPO("MlpPolicy", "Pendulum-v1", **SMALL).learn(PENDULUM, callback=stop)
    assert agent.num_timesteps < 20


def test_logger_outputs(tmp_path: pathlib.Path) -> None:
    agent = SRPO(**SMALL, preset=None)
    agent.set_logger(configure(str(tmp_path), ["csv", "json", "log"]))
    agent.learn(DATA, log_interval=5)
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert len(rows) == 6
    assert {"critic/q_loss", "time/updates_per_second"} <= set(rows[0]) and "policy/policy_loss" in rows[-1]
    assert (tmp_path / "progress.csv").stat().st_size > 0 and (tmp_path / "log.txt").stat().st_size > 0


def test_tensorboard(tmp_path: pathlib.Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    SRPO(**SMALL, tensorboard_log=str(tmp_path)).learn(DATA, tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1"))
    events.Reload()
    assert {"critic/q_loss", "behavior/behavior_loss", "policy/q_grad_norm"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("n_envs", [1, 3])
def test_evaluate_policy(pendulum_agent: SRPO, n_envs: int) -> None:
    returns, lengths = evaluate_policy(pendulum_agent, make_vec_env("Pendulum-v1", n_envs), 4, return_episode_rewards=True)
    assert lengths == [200] * 4 and all(-2000 < r < 0 for r in returns)


def test_vec_normalize_is_found() -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2), norm_obs=False, norm_reward=False)
    agent = SRPO("MlpPolicy", env, **SMALL)
    assert agent.get_vec_normalize_env() is env and agent.n_envs == 2 and agent.get_env() is env


def test_set_env(pendulum_agent: SRPO) -> None:
    agent = SRPO(**SMALL).learn(DATA)
    with pytest.raises(ValueError, match=r"observations \(3,\) and actions \(1,\)"):
        agent.set_env("Pendulum-v1")
    pendulum_agent.set_env(gymnasium.make("Pendulum-v1"))
    assert pendulum_agent.get_env().num_envs == 1


# ---- acting ----------------------------------------------------------------------------------------------------------
def test_predict_shapes_and_units(pendulum_agent: SRPO) -> None:
    one, state = pendulum_agent.predict(np.array([1.0, 0.0, 0.0]), deterministic=True)
    many, _ = pendulum_agent.predict(np.tile([1.0, 0.0, 0.0], (5, 1)), deterministic=True)
    assert one.shape == (1,) and many.shape == (5, 1) and state is None and one.dtype == np.float32
    np.testing.assert_allclose(many, np.tile(one, (5, 1)), atol=1e-6)
    agent = SRPO("MlpPolicy", "Pendulum-v1", **SMALL)
    torch.nn.init.constant_(agent.policy.net[-1].bias, 100.0)  # tanh at its limit: the space's bound, 2 Nm
    assert agent.predict(np.zeros(3))[0].tolist() == [2.0]


def test_an_agent_is_evaluated_as_it_is_meant_to_act() -> None:
    """With a choice for this evaluation too; SB3's own evaluation asks for deterministic actions unless told None."""
    env = make_vec_env("Pendulum-v1")
    for meant in (True, False):
        agent: Any = small("DiffusionQL", preset=None, env="Pendulum-v1", deterministic=meant)
        told: list[bool] = []
        draw = agent.draw_act
        agent.draw_act = lambda n, deterministic, *rest: (told.append(deterministic), draw(n, deterministic, *rest))[1]  # noqa: B023
        for choice in (None, {"n_candidates": 2}):
            assert agent.evaluate("Pendulum-v1", 1, choice=choice).deterministic == meant
            assert agent.evaluate("Pendulum-v1", 1, choice=choice, deterministic=not meant).deterministic != meant
            assert told == [meant] * 200 + [not meant] * 200
            told.clear()
        for asked, expected in ((None, meant), (True, True)):
            evaluate_policy(agent, env, 1, deterministic=asked)  # type: ignore[arg-type]
            assert set(told) == {expected}
            told.clear()


def test_evaluating_never_changes_training() -> None:
    plain = SRPO("MlpPolicy", "Pendulum-v1", **SMALL).learn(PENDULUM)
    env = gymnasium.make("Pendulum-v1")

    class Act(BaseCallback):
        def _on_step(self) -> bool:
            obs, _ = env.reset(seed=0)
            self.model.predict(obs)
            self.model.behavior_policy().predict(obs)  # type: ignore[attr-defined]
            return True

    watched = SRPO("MlpPolicy", "Pendulum-v1", **SMALL).learn(PENDULUM, callback=Act())
    same_networks(plain, watched)


def same_networks(a: SRPO, b: SRPO) -> None:
    for name, state in a.get_parameters().items():
        for key, value in state.items():
            assert torch.equal(value, b.get_parameters()[name][key]), f"{name}.{key}"


def test_same_seed_same_result_and_global_generator_untouched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = SRPO(**SMALL).learn(DATA)
    assert torch.equal(torch.rand(3), expected)
    same_networks(a, SRPO(**SMALL).learn(DATA))
    other = SRPO(**{**SMALL, "seed": 1}).learn(DATA)
    assert not torch.equal(a.policy.net[0].weight, other.policy.net[0].weight)


# ---- plan ------------------------------------------------------------------------------------------------------------
def test_total_timesteps_is_split_as_in_the_paper() -> None:
    agent = SRPO(**{k: v for k, v in SMALL.items() if not k.endswith("_steps")}).learn(DATA, total_timesteps=45)
    assert agent.plan is not None and agent.plan.lengths == {"critic": 15, "behavior": 20, "policy": 10}
    assert agent.num_timesteps == agent.n_updates == 45


def test_counting_over_several_learns() -> None:
    agent = SRPO(**SMALL).learn(DATA)
    agent.learn(DATA, stages=("policy",), reset_num_timesteps=False)
    assert agent.num_timesteps == agent.n_updates == 40 and agent.stage_steps == {
        "critic": 10,
        "behavior": 10,
        "policy": 20,
    }
    agent.learn(DATA, stages=("policy",))
    assert agent.num_timesteps == 10 and agent.n_updates == 50


def test_learning_rate_follows_the_cosine_in_the_policy_stage_only() -> None:
    agent = SRPO(**SMALL, preset=None).learn(DATA)  # the tenth of ten steps was taken at share 9 / 10
    assert agent.optimizers["policy"].lr.item() == pytest.approx(3e-4 * 0.5 * (1 + np.cos(np.pi * 0.9)), rel=1e-5)
    assert agent.optimizers["critic"].lr.item() == pytest.approx(3e-4)


SCRIPT = """
import sys
from diffagents import SRPO
from toy import line_data
agent = SRPO.load(sys.argv[1]).learn(line_data(), reset_num_timesteps=False)
agent.save(sys.argv[2])
"""


def test_stopped_run_finished_in_a_new_process_is_the_uninterrupted_run(tmp_path: pathlib.Path) -> None:
    """In the middle of the second stage; stops in every stage, of every algorithm: test_all_agents.py."""
    whole = SRPO(**SMALL).learn(DATA)
    part = SRPO(**SMALL).learn(DATA, callback=lambda local, _: local["self"].num_timesteps < 15)
    assert part.num_timesteps == 15
    part.save(tmp_path / "part")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "part.zip"), str(tmp_path / "done.zip")], check=True, env=env)
    finished = SRPO.load(tmp_path / "done.zip", verbose=0)
    same_networks(whole, finished)
    for name, optimizer in whole.optimizers.items():
        ours, theirs = (dict(enumerate(one.state.values())) for one in (optimizer, finished.optimizers[name]))
        assert ours.keys() == theirs.keys() and len(ours) > 0
        for i in ours:
            for key in ours[i]:
                assert torch.equal(ours[i][key], theirs[i][key]), (name, i, key)
    assert [row["num_timesteps"] for row in whole.history][-1] == finished.history[-1]["num_timesteps"] == 30


@pytest.fixture
def python_sigint() -> Iterator[None]:
    """A shell that starts something in the background lets it ignore Ctrl-C; here Python's own handler is wanted."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_ignored_ctrl_c_stays_ignored(python_sigint: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    agent = SRPO(**SMALL).learn(DATA, callback=lambda local, _: signal.raise_signal(signal.SIGINT) is None)
    assert agent.num_timesteps == 30 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_ctrl_c_stops_between_updates_and_the_run_can_be_finished(python_sigint: None) -> None:
    whole = SRPO(**SMALL).learn(DATA)
    agent = SRPO(**SMALL)

    def press(local: dict[str, Any], _: Any) -> bool:
        if local["self"].num_timesteps == 13:
            signal.raise_signal(signal.SIGINT)
        return True

    with pytest.raises(KeyboardInterrupt):
        agent.learn(DATA, callback=press)
    assert agent.num_timesteps == 13
    same_networks(whole, agent.learn(DATA, reset_num_timesteps=False))


def test_nan_stops_with_the_last_good_state() -> None:
    agent = SRPO(**SMALL, preset=None)

    def poison(local: dict[str, Any], _: Any) -> bool:
        if local["self"].num_timesteps == 6:
            agent.critic.v[0].weight.data.fill_(float("nan"))
        return True

    with pytest.raises(TrainingDiverged, match=r"critic diverged between its steps 4 and 8 .*learning_rate"):
        agent.learn(DATA, callback=poison, log_interval=4)
    assert agent.num_timesteps == 4 and all(torch.isfinite(p).all() for p in agent.critic.parameters())
    same_networks(SRPO(**SMALL, preset=None).learn(DATA), agent.learn(DATA, reset_num_timesteps=False))  # as if never


def test_announcement_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    big = {**SMALL, "critic_steps": 120}
    loud = SRPO(**{**big, "verbose": 1}).learn(DATA)
    out = capsys.readouterr().out
    assert "plan: critic 0/120, behavior 0/10, policy 0/10 gradient steps; about 0:0" in out and "mean return" in out
    same_networks(loud, SRPO(**big).learn(DATA))
    assert capsys.readouterr().out == ""


def test_reward_transform_and_normaliser_are_kept() -> None:
    agent = SRPO(**{**SMALL, "normalize_obs": True, "reward_transform": "normalize"}).learn(DATA)
    scale, mean = agent.reward_transform.scale, agent.obs_normalizer.mean.clone()  # type: ignore[union-attr]
    other = line_data(seed=9)
    agent.learn({**other, "actions": 0.9 * other["actions"]}, stages=("policy",))
    assert agent.reward_transform.scale == scale and torch.equal(agent.obs_normalizer.mean, mean)  # type: ignore[union-attr]


def test_refused_data_leave_nothing_behind() -> None:
    agent, fresh = SRPO(**SMALL), SRPO(**SMALL).learn(DATA)
    with pytest.raises(ValueError, match="no action is better than another"):
        agent.learn({**DATA, "rewards": np.ones(400), "terminations": np.zeros(400, bool)})
    assert agent.reward_transform is None and agent.dataset_info is None and agent.spec is None
    same_networks(agent.learn(DATA), fresh)
    assert agent.reward_transform == fresh.reward_transform


def test_transitions_with_other_keys_are_refused() -> None:
    """The columns would be swapped without a word."""
    rng = np.random.default_rng(0)
    both = {"a": rng.normal(size=(400, 2)), "b": rng.normal(size=(400, 2))}
    read = diffagents.load_dataset({**DATA, "observations": both, "next_observations": both}, obs_keys=("b", "a"))
    with pytest.raises(ValueError, match=r"read with obs_keys=\('b', 'a'\)"):
        SRPO(**SMALL, obs_keys=("a", "b")).learn(read)
    agent = SRPO(**SMALL, obs_keys=("b", "a")).learn(read)
    other = diffagents.load_dataset({**DATA, "observations": both, "next_observations": both}, obs_keys=("a", "b"))
    with pytest.raises(ValueError, match="read the source again"):
        agent.learn(other)


def test_resuming_is_never_something_else(tmp_path: pathlib.Path) -> None:
    stop = {"callback": lambda local, _: local["self"].num_timesteps < 15}
    agent = SRPO(**SMALL).learn(DATA, **stop)
    for asked in ({"stages": ("policy",)}, {"total_timesteps": 1000}):
        with pytest.raises(ValueError, match=r"a plan of 30 steps over .* is unfinished"):
            agent.learn(DATA, reset_num_timesteps=False, **asked)
    with pytest.warns(UserWarning, match="differs from the first one .arrays., whose unfinished plan"):
        agent.clone().learn({**DATA, "rewards": DATA["rewards"] + 1}, reset_num_timesteps=False)
    agent.learn(DATA, reset_num_timesteps=False, total_timesteps=30)
    before = agent.policy.net[0].weight.clone()
    agent.learn(DATA, reset_num_timesteps=False)  # finished: nothing to do
    assert agent.num_timesteps == 30 and torch.equal(before, agent.policy.net[0].weight)
    bare = SRPO.load(agent.save(tmp_path / "bare", include_trainer_state=False), verbose=0)
    with pytest.raises(ValueError, match="saved without its trainer state"):
        bare.learn(DATA, reset_num_timesteps=False)
    assert bare.learn(DATA).num_timesteps == 30


def test_seeds_of_clones_and_loaded_agents_count(tmp_path: pathlib.Path) -> None:
    base = SRPO(**SMALL).learn(DATA, stages=("critic", "behavior"))
    path = base.save(tmp_path / "base")
    runs = [base.clone(seed=1), base.clone(seed=2), SRPO.load(path, seed=1, verbose=0)]
    weights = [run.learn(DATA, stages=("policy",)).policy.net[0].weight for run in runs]
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_loading_on_an_instance_warns_that_it_changes_nothing(tmp_path: pathlib.Path) -> None:
    """SB3's trap: `model.load(path)` throws its result away. On the class there is nothing to warn of."""
    agent = SRPO(**SMALL).learn(DATA)
    agent.save(tmp_path / "a")
    agent.save_pretrained(tmp_path / "b")
    other = SRPO(verbose=0)
    for load, path in ((other.load, "a"), (other.from_pretrained, "b")):
        with pytest.warns(UserWarning, match=r"returns a new agent and leaves this one as it is: write agent = SRPO\."):
            assert load(tmp_path / path, verbose=0).num_timesteps == agent.num_timesteps
    with pytest.raises(RuntimeError, match="no policy yet"):
        other.predict(np.zeros(3, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SRPO.load(tmp_path / "a", verbose=0)


def test_a_tilde_is_the_home_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every path that is written or read; and no folder called ~ appears."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    agent = SRPO(**SMALL, env="Pendulum-v1", tensorboard_log="~/logs").learn(PENDULUM)
    assert agent.save("~/kept") == home / "kept.zip"
    assert SRPO.load("~/kept", verbose=0).num_timesteps == agent.num_timesteps
    agent.save_pretrained("~/folder")
    (home / "folder" / "README.md").write_text("written by hand")
    agent.save_pretrained("~/folder")
    assert (home / "folder" / "README.md").read_text() == "written by hand"
    assert diffagents.load("~/folder", verbose=0).num_timesteps == agent.num_timesteps
    assert agent.export("~/policy", format="torch_export").parent == home
    with pytest.raises(FileNotFoundError, match=str(home / "missing")):
        SRPO.from_official("~/missing", "~/missing")
    agent.learn_online(20, learning_starts=20)
    agent.load_replay_buffer(agent.save_replay_buffer("~/buffer"))
    made = sorted(path.name for path in home.iterdir())
    assert made == ["buffer.safetensors", "folder", "kept.zip", "logs", "policy.pt2"] and not list(here.iterdir())


def test_fitted_transforms_cannot_be_changed_later(tmp_path: pathlib.Path) -> None:
    agent = SRPO(**SMALL).learn(DATA)
    path = agent.save(tmp_path / "a")
    for name, value in (("reward_transform", "none"), ("normalize_obs", False)):
        for call in (lambda k: agent.clone(**k), lambda k: SRPO.load(path, **k)):
            with pytest.raises(ValueError, match=f"{name} was fitted when the agent first learned"):
                call({name: value})
    with pytest.raises(TypeError, match="policy_kwargs belongs to the saved networks"):
        SRPO.load(path, policy_kwargs={})


@pytest.mark.parametrize("how", ["stop", "exception", "checkpoint"])
def test_nan_between_looks_is_caught_when_somebody_stops(tmp_path: pathlib.Path, how: str) -> None:
    agent = SRPO(**SMALL, preset=None)

    def poison(local: dict[str, Any], _: Any) -> bool:
        if local["self"].num_timesteps == 6:
            agent.critic.v[0].weight.data.fill_(float("nan"))
        if local["self"].num_timesteps == 7:
            if how == "exception":
                raise ZeroDivisionError
            return how != "stop"
        return True

    with pytest.raises(TrainingDiverged, match="critic diverged between its steps 5 and 7"):
        agent.learn(DATA, callback=[poison, CheckpointCallback(7, str(tmp_path))], log_interval=5)
    assert agent.num_timesteps == 5
    agent.save(tmp_path / "good")


def test_history_of_a_long_run_stays_small() -> None:
    agent = SRPO(**SMALL).learn(DATA)
    agent.state.history = agent.history * 400
    agent.learn(DATA, stages=("policy",), reset_num_timesteps=False)
    assert len(agent.history) <= 6011 and agent.history[-1]["num_timesteps"] == 40


def test_preset_survives_saving_before_training(tmp_path: pathlib.Path) -> None:
    """What the user set explicitly, and nothing else, wins over the preset, before and after a round trip."""
    knobs = {k: v for k, v in SMALL.items() if k != "policy_kwargs"}
    agent = SRPO(env="Pendulum-v1", preset="antmaze-umaze", expectile=0.6, reward_transform="normalize", **knobs)
    loaded = SRPO.load(agent.save(tmp_path / "untrained"), verbose=0).learn(PENDULUM)
    assert (loaded.config.beta, loaded.config.expectile, loaded.config.q_grad_norm) == (0.02, 0.6, "rms")
    assert len([m for m in loaded.policy.net if isinstance(m, torch.nn.Linear)]) == 5
    assert SRPO.load(loaded.save(tmp_path / "trained"), verbose=0).config == loaded.config


def test_paper_preset_merges_with_explicit_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    knobs = {k: v for k, v in SMALL.items() if k not in ("policy_kwargs", "verbose")}
    small = {"behavior_width": 16, "behavior_blocks": 1}
    agent = SRPO(preset="antmaze-umaze", beta=0.3, reward_transform="none", policy_kwargs=small, **knobs).learn(DATA)
    assert len([m for m in agent.policy.net if isinstance(m, torch.nn.Linear)]) == 5 and agent.behavior.net.width == 16
    out = capsys.readouterr().out
    assert "'beta'" not in out.splitlines()[1] and "'expectile': 0.9" in out


def test_progress_bar_counts_gradient_steps(capsys: pytest.CaptureFixture[str]) -> None:
    from stable_baselines3.common.callbacks import ProgressBarCallback

    totals: list[tuple[float, float]] = []
    original = ProgressBarCallback._on_training_end
    try:
        ProgressBarCallback._on_training_end = lambda self: totals.append((self.pbar.n, self.pbar.total)) or original(self)  # type: ignore
        SRPO("MlpPolicy", make_vec_env("Pendulum-v1", 3), **SMALL).learn(PENDULUM, progress_bar=True)
    finally:
        ProgressBarCallback._on_training_end = original  # type: ignore[method-assign]
    assert totals == [(30, 30)]


def test_agent_of_bare_arrays_gets_its_environment_later() -> None:
    agent = SRPO(**SMALL).learn(PENDULUM)  # bounds from the data: a little narrower than [-2, 2]
    with pytest.warns(UserWarning, match="uses only the part"):
        agent.set_env("Pendulum-v1")
    agent.set_env(agent.get_env())


def test_evaluate_warns_of_another_environment() -> None:
    agent = SRPO("MlpPolicy", "Pendulum-v1", **SMALL).learn(PENDULUM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.evaluate(n_episodes=1)
        agent.evaluate("Pendulum-v1", 1)
    with pytest.warns(UserWarning, match=r"g=1\.0 instead of 10\.0"):
        agent.evaluate(gymnasium.make("Pendulum-v1", g=1.0), 1)


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", [False, True])
def test_save_load_acts_and_updates_the_same(tmp_path: pathlib.Path, folder: bool) -> None:
    agent = SRPO(**{**SMALL, "normalize_obs": True}).learn(DATA)
    path = agent.save_pretrained(tmp_path / "agent", include_trainer_state=True) if folder else agent.save(tmp_path / "agent")
    loaded = diffagents.load(path, verbose=0)
    obs = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    assert type(loaded) is SRPO and np.array_equal(loaded.predict(obs)[0], agent.predict(obs)[0])
    assert np.array_equal(loaded.behavior_policy().predict(obs)[0], agent.behavior_policy().predict(obs)[0])  # type: ignore[attr-defined]
    same_networks(agent.learn(DATA, total_timesteps=6), loaded.learn(DATA, total_timesteps=6))  # type: ignore[arg-type]


def test_artifact_loads_without_environment_or_dataset_packages(tmp_path: pathlib.Path) -> None:
    """predict from a file needs torch, numpy, gymnasium and safetensors; nothing else is imported."""
    path = SRPO(**SMALL).learn(DATA).save(tmp_path / "agent")
    code = (
        "import sys, numpy as np, diffagents; a = diffagents.load(sys.argv[1], verbose=0); a.predict(np.zeros(3));"
        "bad = {'minari', 'h5py', 'stable_baselines3', 'mujoco', 'matplotlib', 'huggingface_hub'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_no_trainer_state_on_request(tmp_path: pathlib.Path) -> None:
    agent = SRPO(**SMALL).learn(DATA)
    small = agent.save(tmp_path / "small.zip", include_trainer_state=False).stat().st_size
    assert small < 0.5 * agent.save(tmp_path / "full.zip").stat().st_size
    assert diffagents.load(tmp_path / "small.zip", verbose=0).plan is None


def test_load_with_other_knobs(tmp_path: pathlib.Path) -> None:
    path = SRPO(**SMALL).learn(DATA).save(tmp_path / "agent")
    assert SRPO.load(path, beta=0.5, seed=4).config.beta == 0.5
    with pytest.raises(TypeError, match=r"no hyperparameter 'betta'; did you mean 'beta'"):
        SRPO.load(path, betta=0.5)


def test_parameters_round_trip() -> None:
    a, b = SRPO(**SMALL).learn(DATA), SRPO(**{**SMALL, "seed": 1}).learn(DATA)
    b.set_parameters(a.get_parameters())
    same_networks(a, b)
    with pytest.raises(ValueError, match="policy"):
        b.set_parameters({"policy": a.policy.state_dict()})
    b.set_parameters({"policy": a.policy.state_dict()}, exact_match=False)


def test_parameters_of_a_file(tmp_path: pathlib.Path) -> None:
    """As in SB3, a path stands for the parameters that were saved there."""
    a = SRPO(**SMALL).learn(DATA)
    path, actor = a.save(tmp_path / "agent"), a.save_pretrained(tmp_path / "actor")
    (actor / "learner.safetensors").unlink()
    for given in (path, str(tmp_path / "agent"), a.save_pretrained(tmp_path / "folder")):
        b = SRPO(**{**SMALL, "seed": 1}).learn(DATA)
        b.set_parameters(given)
        same_networks(a, b)
    c = SRPO(**{**SMALL, "seed": 1}).learn(DATA)
    before = {name: tensor.clone() for name, tensor in c.critic.state_dict().items()}
    with pytest.raises(ValueError, match=r"parameters has the keys .* exact_match=False loads some of them only"):
        c.set_parameters(actor)
    c.set_parameters(actor, exact_match=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in c.critic.state_dict().items())  # the critic stays its own
    np.testing.assert_array_equal(c.predict(np.zeros(3))[0], a.predict(np.zeros(3))[0])
    with pytest.raises(FileNotFoundError, match="there is no artifact"):
        c.set_parameters(tmp_path / "nothing")


def test_load_has_the_arguments_of_sb3(tmp_path: pathlib.Path) -> None:
    path = SRPO("MlpPolicy", "Pendulum-v1", **SMALL).save(tmp_path / "agent")
    agent = diffagents.load(path, gymnasium.make("Pendulum-v1"), "cpu", custom_objects={}, print_system_info=False)
    assert agent.env is not None and agent.device.type == "cpu"


def test_dict_observations(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    data = {
        **DATA,
        "observations": {
            "observation": rng.normal(size=(400, 4)),
            "achieved_goal": rng.normal(size=(400, 2)),
            "desired_goal": rng.normal(size=(400, 2)),
        },
    }
    data["next_observations"] = data["observations"]
    agent = SRPO(**SMALL).learn(data)
    assert (
        agent.obs_keys == ("observation", "achieved_goal", "desired_goal")
        and agent.spec is not None
        and agent.spec.obs_dim == 8
    )
    obs = {"desired_goal": np.ones(2), "observation": np.zeros(4), "achieved_goal": np.zeros(2)}
    loaded = diffagents.load(agent.save(tmp_path / "a"), verbose=0)
    assert loaded.obs_keys == agent.obs_keys and np.array_equal(loaded.predict(obs)[0], agent.predict(obs)[0])
    reordered = SRPO(**SMALL, obs_keys=("desired_goal", "observation")).learn(data)
    assert not np.array_equal(reordered.predict(obs)[0], agent.predict(obs)[0])


def test_official_checkpoint_without_policy(tmp_path: pathlib.Path) -> None:
    source = SRPO(**{**SMALL, "policy_kwargs": {}}, preset=None).learn(DATA)
    net, critic = source.behavior.net, source.critic
    behavior = {"diffusion_behavior.embed.0.W": net.frequencies}
    names = {
        "time_mlp": "cond_model",
        "input": "main.fc",
        "output": "main.out_fc",
        "blocks": "main.blocks",
        "norm": "layer_norm",
        "expand": "fc1",
        "project": "fc2",
    }
    for key, value in net.named_parameters():
        behavior["diffusion_behavior." + ".".join(names.get(part, part) for part in key.split("."))] = value.data
    twins: dict[str, torch.Tensor] = {f"vf.v.{k}": v for k, v in critic.v.state_dict().items()}
    for ours, theirs in ((critic.q, "q0"), (critic.q_target, "q0_target")):
        for i in range(3):
            for twin in (0, 1):
                twins[f"{theirs}.q{twin + 1}.{2 * i}.weight"] = ours.weights[i].data[twin].T.contiguous()
                twins[f"{theirs}.q{twin + 1}.{2 * i}.bias"] = ours.biases[i].data[twin, 0]
    torch.save(behavior, tmp_path / "behavior.pth")
    torch.save(twins, tmp_path / "critic.pth")
    knobs = {k: v for k, v in SMALL.items() if k != "policy_kwargs"}
    agent = SRPO.from_official(tmp_path / "behavior.pth", tmp_path / "critic.pth", **knobs)
    for name in ("behavior", "critic"):
        ours_state, theirs_state = source.get_parameters()[name], agent.get_parameters()[name]
        assert all(torch.equal(ours_state[k], theirs_state[k]) for k in ours_state if k != "noise")
    with pytest.raises(RuntimeError, match=r'learn\(data, stages=\("policy",\)\)'):
        agent.predict(np.zeros(3))
    again = SRPO.load(agent.save(tmp_path / "no_policy"), verbose=0)
    with pytest.raises(RuntimeError, match=r"stages"):
        again.predict(np.zeros(3))
    assert again.learn(DATA, stages=("policy",)).predict(np.zeros(3, np.float32))[0].shape == (2,)


class _Raises(BaseCallback):
    def _init_callback(self) -> None:
        raise ValueError("this callback cannot be initialised")

    def _on_step(self) -> bool:
        return True


@pytest.mark.filterwarnings("ignore:action bounds")
def test_a_callback_that_cannot_be_initialised_leaves_the_agent_unchanged() -> None:
    agent = SRPO(**SMALL)
    before = dict(vars(agent))
    with pytest.raises(ValueError, match="cannot be initialised"):
        agent.learn(DATA, callback=_Raises())
    assert vars(agent) == before and agent.spec is None and agent.dataset_info is None and agent.reward_transform is None


@pytest.mark.filterwarnings("ignore:action bounds")
def test_a_call_of_learn_inside_a_callback_counts_on_the_same_state() -> None:
    """The outer run goes on counting, though the inner call has adopted the data and its own plan."""
    agent, seen = SRPO(**SMALL, preset=None), []

    def nested(local: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append(agent.num_timesteps)
        if len(seen) == 3:
            agent.learn(DATA, total_timesteps=4, stages=("critic",), reset_num_timesteps=True)
        return True

    state = agent.state
    agent.learn(DATA, total_timesteps=20, stages=("critic",), callback=nested)
    assert agent.state is state and seen[:3] == [1, 2, 3] and seen[3:] == list(range(5, 5 + len(seen) - 3))
    assert agent.n_updates == 24
