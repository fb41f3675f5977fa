"""What of an environment goes into the files of an agent, which may be published."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from small_agents import small
from toy import RandomEnv

import diffagents
from diffagents.envs import make
from diffagents.envs.make import difference_of_specs, make_env, spec_to_store, warn_of_another_env
from diffagents.evaluation.evaluate import evaluate
from diffagents.storage.publish import what_is_published


class Robot(RandomEnv):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,)))
        self.arguments = arguments
        assert "fails" not in arguments

    def reset(self, **how: Any) -> Any:
        assert "fails_later" not in self.arguments
        if "bad_reset" in self.arguments:
            raise ValueError("mine")
        return super().reset(**how)

    def step(self, action: Any) -> Any:
        assert "fails_in_step" not in self.arguments, "mine"
        return super().step(action)


class Still:
    """A policy that does nothing."""

    def predict(self, observation: Any, **_: Any) -> tuple[Any, None]:
        return np.zeros((len(observation), 2), np.float32), None


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    gym.register("StoredRobot-v0", Robot, max_episode_steps=7)
    yield
    del gym.registry["StoredRobot-v0"]


FINE: dict[str, Any] = {
    "none": {},
    "numbers": {"weight": 0.5, "n": 3, "dense": True, "range": (0.7, float("inf")), "nothing": None},
    "names": {"reward_type": "sparse", "maze_map": [[1, "r"], ["g", 0]]},
    "words": {"tasks_to_complete": ["bottom burner", "light switch"], "obs_type": "environment_state_agent_pos"},
    "nested": {"default_camera_config": {"distance": 4.0, "trackbodyid": 0}, "keyframe": 1, "frame_skip": 1000},
}
REFUSED: dict[str, Any] = {
    "path": {"robot": "/home/alice/secret-project/robot.xml"},
    "nested path": {"config": {"files": ["../robot.xml"]}},
    "home": {"robot": "~alice"},
    "named key": {"api_key": "abc"},
    "named token": {"wandb_token": 3},
    "password": {"passwd": "x"},
    "known token": {"x": "sk-proj-abcdefghij"},
    "other token": {"x": "ghp_16C7e42F292c6912E7710c838347Ae178B4a"},
    "long word": {"x": "0123456789abcdef0123456789abcdef01234567"},
    "module": {"x": "evil:Env-v0"},
    "nested name": {"config": {"password": "hunter2"}},
    "name in a list": {"config": [{"dbHost": "db7"}]},
    "path as a name": {"files": {"/home/alice/clients/acme": 1}},
    "email as a name": {"files": {"alice@acme.com": 1}},
    "file": {"x": "patients.csv"},
    "machine": {"x": "db7.internal.acme.com"},
    "hash": {"x": ["d41d8cd98f00b204e9800998ecf8427e"]},
    "card": {"x": "4111111111111111"},
    "sentence": {"x": "the correct horse battery staple of alice"},
    "many steps in one": {"frame_skip": 5000},
    "object": {"x": np.zeros(3)},
}


@pytest.mark.parametrize("arguments", FINE.values(), ids=FINE)
def test_arguments_that_rebuild_the_environment_are_stored(arguments: dict[str, Any]) -> None:
    spec = gym.make("StoredRobot-v0", **arguments).spec
    assert spec is not None
    stored, refused = spec_to_store(spec)
    assert stored is not None and not refused
    assert set(json.loads(stored)) == {"id", "max_episode_steps", "kwargs", "additional_wrappers"}
    again = make_env(stored)
    assert again.spec.max_episode_steps == 7
    assert json.dumps(again.unwrapped.arguments) == json.dumps(arguments)


@pytest.mark.parametrize(
    "name",
    [
        "passphrase",
        "pwd",
        "pass_",
        "api_keys",
        "access_key_id",
        "host",
        "db_host",
        "dbHost",
        "server",
        "user",
        "user_name",
        "pin",
        "dataset",
        "email",
        "ip",
        "url",
    ],
)
def test_names_of_secrets_people_and_machines_are_refused_at_every_depth(name: str) -> None:
    for arguments in ({name: 4711}, {"config": {name: 4711}}, {"config": [{"more": {name: [4711]}}]}):
        assert spec_to_store({"id": "StoredRobot-v0", "kwargs": arguments}) == (None, [next(iter(arguments))])
    for harmless in ("ghost", "n_hostiles", "spin", "compass", "shipping"):
        assert spec_to_store({"id": "StoredRobot-v0", "kwargs": {harmless: 3}})[0] is not None


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("how", ["learn", "learn_online"])
def test_others_are_neither_stored_nor_published(arguments: dict[str, Any], how: str, tmp_path: Path) -> None:
    env = gym.make("StoredRobot-v0", other=1, **arguments)
    agent = small("TD3BC", env=env)
    learn = {"learn": lambda: agent.learn(recorded(env), 4), "learn_online": lambda: agent.learn_online(12, learning_starts=8)}
    with pytest.warns(UserWarning, match=rf"StoredRobot-v0 is not stored .* its arguments {next(iter(arguments))} may hold"):
        learn[how]()
    folder = agent.save_pretrained(tmp_path / "policy", include_trainer_state=True)
    written = "".join(file.read_text(errors="replace") for file in folder.iterdir())
    assert "StoredRobot" not in written.replace("no dataset: learned online in StoredRobot-v0", "")
    assert not any(str(value) in written for value in arguments.values() if len(str(value)) > 4)
    with pytest.raises(ValueError, match="env"):
        diffagents.load(folder, device="cpu", verbose=0).evaluate(n_episodes=1)


def recorded(env: Any) -> list[dict[str, Any]]:
    obs = [env.reset(seed=0)[0], *(env.step(env.action_space.sample())[0] for _ in range(5))]
    end = np.arange(5) == 4
    actions = np.stack([env.action_space.sample() for _ in range(5)])
    return [
        {
            "observations": np.stack(obs),
            "actions": actions,
            "rewards": np.ones(5),
            "terminations": end,
            "truncations": ~end & end,
        }
    ]


def test_wrappers_are_named_only() -> None:
    env = gym.wrappers.TransformObservation(gym.make("Pendulum-v1"), lambda obs: obs, None)
    assert env.spec is not None
    stored, _ = spec_to_store(env.spec)
    assert stored is not None and json.loads(stored)["additional_wrappers"] == [{"name": "TransformObservation"}]
    with pytest.warns(UserWarning, match="without the wrappers"):
        make_env(stored)


@pytest.mark.parametrize("argument", ["fails", "fails_later"])
def test_an_environment_that_fails_is_one_error(argument: str) -> None:
    stored = json.dumps({"id": "StoredRobot-v0", "kwargs": {argument: 1}})
    with pytest.raises(ValueError, match=rf"'StoredRobot-v0' does not work with the stored arguments {argument} \("):
        make_env(stored)
    with pytest.raises(AssertionError):  # the caller's own arguments are the caller's own mistake
        make_env("StoredRobot-v0", fails=1)


def test_what_a_push_publishes_is_said_and_on_the_card(tmp_path: Path) -> None:
    """With the keyword arguments, of which only the user can tell whether they are harmless."""
    env = gym.make("StoredRobot-v0", weight=4.5)
    folder = small("TD3BC", env=env).learn(recorded(env), 4).save_pretrained(tmp_path / "a")
    said = what_is_published(folder, "me/x")
    assert said.startswith("publishing to me/x: config.json, model.safetensors, learner.safetensors")
    assert said.endswith("curves.png; environment: StoredRobot-v0 with weight=4.5, max_episode_steps=7")
    assert "| environment | StoredRobot-v0 with weight=4.5, max_episode_steps=7 |" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kwargs": {"files": {"/etc/passwd": 1}}}, r"has files='/etc/passwd', which looks like a path"),
        ({"kwargs": {"frame_skip": 5000}}, "frame_skip='5000', which is larger than 1,000"),
        ({"kwargs": {"config": {"action_repeat": 1001}}}, "config='1001', which is larger than 1,000"),
        ({"max_episode_steps": 1_000_001}, "a whole number from 1 to 1,000,000"),
    ],
)
def test_what_a_strangers_spec_may_not_ask_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env(json.dumps({"id": "StoredRobot-v0", **changes}))


def test_a_deeply_nested_spec_is_one_error() -> None:
    with pytest.raises(ValueError, match="stored"):
        make_env('{"id": "StoredRobot-v0", "kwargs": {"fails": ' + "[" * 500 + '"/"' + "]" * 500 + "}}")


def test_the_difference_of_two_specs_is_printable_and_short() -> None:
    strange = {f"\x1b]0;{n}": f"\x1b[2J{n}" for n in range(100)}
    said = difference_of_specs(json.dumps({"id": "StoredRobot-v0", "kwargs": strange}), {"id": "StoredRobot-v0"})
    assert said is not None and said.isprintable() and said.endswith("and 92 more") and len(said) < 1000


class Walker(RandomEnv):
    def __init__(self, map: Any = ((1, 0), (0, 1)), dense: bool = False, size: int = 3) -> None:
        super().__init__(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,)))


@pytest.fixture
def walker() -> Iterator[str]:
    gym.register("StoredWalker-v0", Walker, max_episode_steps=7, kwargs={"dense": True})
    yield "StoredWalker-v0"
    del gym.registry["StoredWalker-v0"]


def test_an_argument_that_is_registered_or_the_default_makes_no_other_environment(walker: str) -> None:
    """Whether it is written out or not, in either of the two."""
    whole: dict[str, Any] = {"map": [[1, 0], [0, 1]], "dense": True, "size": 3}
    for kwargs in ({}, {"dense": True}, {"map": ((1, 0), (0, 1))}, whole):
        for other in ({}, {"size": 3}, whole):
            stored, given = ({"id": walker, "kwargs": each} for each in (kwargs, other))
            assert difference_of_specs(json.dumps(stored), given) is None, (kwargs, other)
    stored = json.dumps({"id": walker, "kwargs": whole})
    assert difference_of_specs(stored, {"id": walker, "kwargs": {"dense": False}}) == "dense=False instead of True"
    assert difference_of_specs(stored, {"id": walker, "kwargs": {"size": 4}}) == "size=4 instead of 3"
    assert "id=Pendulum-v1 instead of StoredWalker-v0" in str(difference_of_specs(stored, {"id": "Pendulum-v1"}))


@pytest.mark.parametrize("env_id", ["AntMaze_UMaze-v5", "AdroitHandPen-v1", "PointMaze_UMaze-v3"])
def test_environments_of_the_robotics_package_are_compared_with_their_registered_arguments(
    env_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gymnasium_robotics")
    with make_env(env_id) as env:
        stored = spec_to_store(env.spec)[0]
    registered = gym.registry.pop(env_id)  # as in a process that has not made one yet
    monkeypatch.setattr(make, "_register_extra", lambda _: gym.registry.update({env_id: registered}))
    try:
        assert stored is not None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_another_env(env_id, stored)
    finally:
        gym.registry[env_id] = registered


def test_mujoco_says_nothing_about_model_files_that_are_not_ours(capfd: pytest.CaptureFixture[str]) -> None:
    mujoco = pytest.importorskip("mujoco")
    deprecated = '<mujoco><compiler settotalmass="1"/><worldbody><body><geom size="1"/></body></worldbody></mujoco>'

    class Outdated(RandomEnv):
        def __init__(self) -> None:
            super().__init__(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,)))
            mujoco.MjModel.from_xml_string(deprecated)
            mujoco.get_mju_user_warning()("a plain warning") if mujoco.get_mju_user_warning() else None

    def mine(text: str) -> None:
        seen.append(text)

    seen: list[str] = []
    gym.register("StoredOutdated-v0", Outdated)
    try:
        for handler in (None, mine):
            mujoco.set_mju_user_warning(handler)
            make_env("StoredOutdated-v0").close()
            assert mujoco.get_mju_user_warning() is handler
        assert capfd.readouterr().err == "WARNING: a plain warning\n" and seen == ["a plain warning"]
        mujoco.MjModel.from_xml_string(deprecated)
        assert len(seen) == 2 or "settotalmass" not in str(seen)  # an older MuJoCo has nothing to say
    finally:
        mujoco.set_mju_user_warning(None)
        del gym.registry["StoredOutdated-v0"]


@pytest.mark.parametrize("argument", ["fails_in_step", "bad_reset"])
def test_an_environment_that_fails_later_names_its_stored_arguments(argument: str) -> None:
    stored = json.dumps({"id": "StoredRobot-v0", "kwargs": {argument: 1}})
    with pytest.raises(ValueError, match=rf"'StoredRobot-v0' does not work with the stored arguments {argument} \("):
        evaluate(Still(), stored, 1)
    with pytest.raises((AssertionError, ValueError), match="mine"):  # the caller's own
        evaluate(Still(), "StoredRobot-v0", 1, env_kwargs={argument: 1})
