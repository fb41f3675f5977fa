"""Bad calls of the agent, its files, observations and environments: each gives one line with the cause and the cure.

Bad datasets have a table of their own in test_bad_data.py, bad artifacts in test_artifact.py.
"""

import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import FlattenObservation
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from toy import line_data

import diffagents
from diffagents import SRPO

SMALL: dict[str, Any] = {"seed": 0, "verbose": 0, "device": "cpu", "critic_steps": 2, "behavior_steps": 2, "policy_steps": 2,
                         "batch_size": 8, "behavior_batch_size": 8,
                         "policy_kwargs": {"net_arch": [8], "behavior_width": 8, "behavior_blocks": 1}}  # fmt: skip
DATA = line_data(60)


@pytest.fixture(scope="module")
def agent() -> SRPO:
    return SRPO(**SMALL).learn(DATA)


@pytest.fixture(scope="module")
def files(agent: SRPO, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One good agent and every kind of bad file."""
    folder = tmp_path_factory.mktemp("files")
    agent.save(folder / "good.zip")
    agent.save_pretrained(folder / "folder")
    (folder / "cut.zip").write_bytes((folder / "good.zip").read_bytes()[:-200])
    TD3("MlpPolicy", "Pendulum-v1", buffer_size=10).save(folder / "sb3.zip")
    torch.save({"a": torch.zeros(1)}, folder / "weights.pth")
    with zipfile.ZipFile(folder / "empty.zip", "w") as archive:
        archive.writestr("notes.txt", "hello")
    for name, changes in (("newer", {"format": 99}), ("other", {"algorithm": "DreamQL"})):
        agent.save_pretrained(folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, **changes}))
    agent.save_pretrained(folder / "gutted")
    (folder / "gutted" / "model.safetensors").unlink()
    agent.save_pretrained(folder / "actor")
    (folder / "actor" / "learner.safetensors").unlink()
    big = SRPO(**{**SMALL, "policy_kwargs": {"net_arch": [9], "behavior_width": 8, "behavior_blocks": 1}}).learn(DATA)
    big.save_pretrained(folder / "shapes")
    (folder / "shapes" / "config.json").write_bytes((folder / "folder" / "config.json").read_bytes())
    (folder / "busy").mkdir()
    (folder / "busy" / "thesis.tex").write_text("precious")
    return folder


class Discrete(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Discrete(2)  # type: ignore[assignment]


class Pixels(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (2,))


class Unbounded(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))


Call = Callable[[SRPO, pathlib.Path], Any]
OLD_GYM = type("TimeLimit", (), {"__module__": "gym.wrappers.time_limit"})()
BAD: dict[str, tuple[Call, type[Exception], str]] = {
    # arguments
    "unknown name": (lambda a, f: SRPO(betta=1), TypeError, r"no hyperparameter 'betta'; did you mean 'beta'\? Valid: beta, expectile"),
    "beta zero": (lambda a, f: SRPO(beta=0), ValueError, r"^beta=0 must be positive\. Weight of Q against the behaviour model: large is greedy, small"),
    "beta a word": (lambda a, f: SRPO(beta="large"), ValueError, r"beta='large' must be a number"),
    "expectile one": (lambda a, f: SRPO(expectile=1.0), ValueError, r"expectile=1\.0 must lie strictly between 0 and 1"),
    "gamma one": (lambda a, f: SRPO(gamma=1.0), ValueError, r"gamma=1\.0 must lie in \[0, 1\)"),
    "tau": (lambda a, f: SRPO(tau=2), ValueError, r"tau=2 must lie in \(0, 1\]"),
    "batch size": (lambda a, f: SRPO(batch_size=0), ValueError, r"batch_size=0 must be a positive whole number"),
    "negative steps": (lambda a, f: SRPO(critic_steps=-1), ValueError, r"critic_steps=-1 must be zero or a positive whole number"),
    "learning rate": (lambda a, f: SRPO(learning_rate=-1e-3), ValueError, r"learning_rate=-0\.001 must be positive"),
    "weight": (lambda a, f: SRPO(weight="vds"), ValueError, r"weight='vds'; choose from"),
    "q_grad_norm": (lambda a, f: SRPO(q_grad_norm="L2"), ValueError, r"q_grad_norm='L2'; choose from"),
    "reward transform": (lambda a, f: SRPO(**SMALL, reward_transform="iql"), ValueError, r"'iql'.*iql_locomotion"),
    "policy": (lambda a, f: SRPO("CnnPolicy"), ValueError, r"policy='CnnPolicy'.*MlpPolicy"),
    "env as policy": (lambda a, f: SRPO(gymnasium.make("Pendulum-v1")), ValueError, r"pass an environment as env="),
    "device": (lambda a, f: SRPO(device="gpu"), ValueError, r'device=\'gpu\' is not usable here.*device="auto"'),
    "seed": (lambda a, f: SRPO(seed=-1), ValueError, r"seed=-1 must be zero or a positive whole number"),
    "policy_kwargs": (lambda a, f: SRPO(env="Pendulum-v1", policy_kwargs={"width": 3}), TypeError, r"no 'width'; valid: net_arch"),
    "net_arch part": (lambda a, f: SRPO(env="Pendulum-v1", policy_kwargs={"net_arch": {"actor": [3]}}), TypeError, r"'actor'.*pi, qf"),
    "net_arch size": (lambda a, f: SRPO(env="Pendulum-v1", policy_kwargs={"net_arch": [-3]}), ValueError, r"positive whole numbers"),
    "preset": (lambda a, f: SRPO(preset="hoper-medium").learn(DATA), ValueError, r"hoper-medium.*hopper-medium"),
    "clone fresh": (lambda a, f: a.clone(fresh=("actor",)), ValueError, r"fresh=\('actor',\) .*'actor'; the networks are"),
    # learn
    "no data": (lambda a, f: a.learn(None), TypeError, r"^there is no dataset: .*learn\(dataset, total_timesteps\).*learn_online\(total_timesteps, env="),
    "no argument": (lambda a, f: a.learn(), TypeError, r"^there is no dataset: .*a dict of arrays.*learn_online"),
    "steps alone": (lambda a, f: a.learn(total_timesteps=100), TypeError, r"^there is no dataset: "),
    "steps as data": (lambda a, f: a.learn(10_000), TypeError, r"^the dataset is the number 10000: .*learn_online\(total_timesteps, env="),
    "env as data": (lambda a, f: a.learn(gymnasium.make("Pendulum-v1")), TypeError, r"a TimeLimit is an environment, not a dataset: .*diffagents\.collect.*learn_online"),
    "VecEnv as data": (lambda a, f: a.learn(make_vec_env("Pendulum-v1")), TypeError, r"a DummyVecEnv is an environment, not a dataset"),
    "env id as data": (lambda a, f: a.learn("Pendulum-v1"), ValueError, r"'Pendulum-v1' is an environment, not a dataset: .*diffagents\.collect.*learn_online"),
    "model as data": (lambda a, f: a.learn(TD3("MlpPolicy", "Pendulum-v1", buffer_size=10)), TypeError, r"a TD3 is a model, not a dataset: .*model\.replay_buffer"),
    "clip_actions of the constructor": (lambda a, f: SRPO(clip_actions=True), TypeError, r"no hyperparameter 'clip_actions': it is an argument of load_dataset"),
    "SB3's buffer_size": (lambda a, f: SRPO(buffer_size=100), TypeError, r"no hyperparameter 'buffer_size': it is an argument of learn_online"),
    "stage": (lambda a, f: a.learn(DATA, stages=("actor",)), ValueError, r"stages=\('actor',\) must be a tuple of some of"),
    "stage as a word": (lambda a, f: a.learn(DATA, stages="policy"), ValueError, r"stages='policy' must be a tuple"),
    "no stage": (lambda a, f: a.learn(DATA, stages=()), ValueError, r"stages=\(\) must be a tuple"),
    "no steps": (lambda a, f: a.learn(DATA, total_timesteps=0), ValueError, r"total_timesteps=0 must be a positive whole number"),
    "half a step": (lambda a, f: a.learn(DATA, total_timesteps=9.5), ValueError, r"total_timesteps=9\.5"),
    "fewer steps than stages": (lambda a, f: a.learn(DATA, total_timesteps=2), ValueError, r"fewer than the 3 stages"),
    "log interval": (lambda a, f: a.learn(DATA, log_interval=0), ValueError, r"log_interval=0 must be a positive"),
    "actions beyond bounds": (lambda a, f: a.learn({**DATA, "actions": 3 * DATA["actions"]}), ValueError, r"leave the agent's bounds \[-"),
    "learn without learner": (lambda a, f: SRPO.load(f / "actor", verbose=0).learn(DATA), RuntimeError, r"learner\.safetensors"),
    "callback": (lambda a, f: a.learn(DATA, callback=3), TypeError, r"callback must be an SB3 callback.*not int"),
    "other data": (lambda a, f: a.learn(line_data(60, obs_dim=5)), ValueError, r"\(5,\).*\(3,\)"),
    "other actions": (lambda a, f: a.learn(line_data(60, act_dim=4)), ValueError, r"4.*2"),
    "nothing to prefer": (lambda a, f: SRPO(**SMALL).learn({**DATA, "rewards": np.zeros(60), "terminations": np.zeros(60, bool)}),
                          ValueError, r"every reward is 0 .*imitate only, with BC or DiffusionBC"),
    # observations
    "wrong length": (lambda a, f: a.predict(np.zeros(4)), ValueError, r"observation has shape \(4,\), expected \(3,\) or a batch"),
    "too many axes": (lambda a, f: a.predict(np.zeros((2, 2, 3))), ValueError, r"shape \(2, 2, 3\), expected \(3,\)"),
    "reset tuple": (lambda a, f: a.predict((np.zeros(3), {})), TypeError, r"tuple.*obs, info = env\.reset\(\)"),
    "dict for box": (lambda a, f: a.predict({"observation": np.zeros(3)}), ValueError, r"observation is a dict"),
    "NaN": (lambda a, f: a.predict(np.array([0, np.nan, 0])), ValueError, r"NaN or infinity"),
    "words": (lambda a, f: a.predict(["a", "b", "c"]), ValueError, r"cannot be read as float32"),
    "untrained": (lambda a, f: SRPO(**SMALL).predict(np.zeros(3)), RuntimeError, r"no policy yet: train it with learn\(data\)"),
    # environments
    "unknown env": (lambda a, f: SRPO(env="Hoper-v5"), ValueError, r"Hoper"),
    "an old gym's env": (lambda a, f: SRPO(env=OLD_GYM), TypeError, r"TimeLimit of the package gym, which Gymnasium has replaced"),
    "an old gym's env to evaluate in": (lambda a, f: a.evaluate(OLD_GYM), TypeError, r"TimeLimit of the package gym"),
    "env of no kind": (lambda a, f: SRPO(env=3), TypeError, r"env must be an environment id.*not int"),
    "discrete actions": (lambda a, f: SRPO(env=Discrete()), ValueError, r"not a Box: diffusion agents need continuous actions"),
    "pixels": (lambda a, f: SRPO(env=Pixels()), ValueError, r"looks like an image"),
    "unbounded actions": (lambda a, f: SRPO(env=Unbounded()), ValueError, r"bounds must be finite"),
    "gym vector env": (lambda a, f: a.set_env(gymnasium.make_vec("Pendulum-v1", 2)), TypeError, r"make_vec_env"),
    "set_env of another task": (lambda a, f: a.set_env("Pendulum-v1"), ValueError, r"observations \(3,\) and actions \(1,\)"),
    "evaluate nowhere": (lambda a, f: a.evaluate(), ValueError, r"no environment is stored.*pass env="),
    "evaluate elsewhere": (lambda a, f: a.evaluate("MountainCarContinuous-v0"), ValueError, r"\(2,\).*\(3,\)|\(3,\).*\(2,\)"),
    "no episodes": (lambda a, f: diffagents.evaluate(a, "Pendulum-v1", 0), ValueError, r"n_episodes"),
    "obs_keys of a box": (lambda a, f: SRPO(env="Pendulum-v1", obs_keys=("observation",)), ValueError, r"needs a Dict observation"),
    # files
    "load on no device": (lambda a, f: SRPO.load(f / "good.zip", device="gpu"), ValueError, r"^device='gpu' is not usable here"),
    "load with a bad seed": (lambda a, f: SRPO.load(f / "good.zip", seed=-1), ValueError, r"^seed=-1 must be"),
    "no file": (lambda a, f: diffagents.load(f / "nothing"), FileNotFoundError, r"nothing"),
    "Hub id of load": (lambda a, f: SRPO.load("me/nothing"), FileNotFoundError, r"no artifact at me/nothing .*from_pretrained also load from the Hub"),
    "file of parameters": (lambda a, f: a.set_parameters("nothing"), FileNotFoundError, r"no artifact at nothing"),
    "cut zip": (lambda a, f: diffagents.load(f / "cut.zip"), ValueError, r"cut\.zip"),
    "SB3 zip": (lambda a, f: SRPO.load(f / "sb3.zip"), ValueError, r"Stable-Baselines3"),
    "torch file": (lambda a, f: SRPO.load(f / "weights.pth"), ValueError, r"pickle|torch"),
    "foreign zip": (lambda a, f: SRPO.load(f / "empty.zip"), ValueError, r"not a diffagents artifact|config\.json"),
    "newer format": (lambda a, f: SRPO.load(f / "newer"), ValueError, r"newer"),
    "unknown algorithm": (lambda a, f: diffagents.load(f / "other"), ValueError, r"'DreamQL', but this version knows only SRPO"),
    "other algorithm": (lambda a, f: SRPO.load(f / "other"), ValueError, r"contains an agent of DreamQL, not of SRPO"),
    "no model": (lambda a, f: SRPO.load(f / "gutted"), ValueError, r"model\.safetensors"),
    "wrong shapes": (lambda a, f: SRPO.load(f / "shapes"), ValueError, r"\(9"),
    "save over a folder of others": (lambda a, f: a.save_pretrained(f / "busy"), FileExistsError, r"busy"),
    "save before learning": (lambda a, f: SRPO(**SMALL).save(f / "x"), RuntimeError, r"does not know its spaces yet"),
    "official file missing": (lambda a, f: SRPO.from_official(f / "b.pth", f / "c.pth"), FileNotFoundError, r"no official behavior"),
    "official file foreign": (lambda a, f: SRPO.from_official(f / "weights.pth", f / "weights.pth"), ValueError, r"no SRPO behaviour network"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_call(name: str, agent: SRPO, files: pathlib.Path) -> None:
    call, kind, pattern = BAD[name]
    before = {key: value.clone() for key, value in agent.policy.state_dict().items()}
    with pytest.raises(kind, match=pattern) as caught:
        call(agent, files)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, message
    assert all(torch.equal(value, before[key]) for key, value in agent.policy.state_dict().items())  # nothing was done


def test_the_good_ones_pass(agent: SRPO, files: pathlib.Path) -> None:
    """The table's neighbours: what is right does not raise."""
    assert diffagents.load(files / "folder", verbose=0).predict(np.zeros(3))[0].shape == (2,)
    assert SRPO("MlpPolicy", make_vec_env("Pendulum-v1", 2), verbose=0).n_envs == 2
    SRPO("MlpPolicy", FlattenObservation(gymnasium.make("Pendulum-v1")), verbose=0)
