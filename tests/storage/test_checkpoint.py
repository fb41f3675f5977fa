"""An artifact whose JSON somebody garbled is refused with one line, and takes no memory for what it claims."""

import json
import pathlib
import resource
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
from gymnasium import spaces
from small_agents import small
from toy import line_data

import diffagents
from diffagents import SRPO, ArtifactError
from diffagents.types import Spec

DATA = line_data(60)
KNOBS: dict[str, Any] = {
    "seed": 0,
    "verbose": 0,
    "critic_steps": 2,
    "behavior_steps": 2,
    "policy_steps": 2,
    "behavior_batch_size": 8,
    "policy_kwargs": {"net_arch": [24], "behavior_width": 20, "behavior_blocks": 1},
}

GARBLED: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "counters null": lambda c, t: c.update(counters=None),
    "counter text": lambda c, t: c["counters"].update(num_timesteps="many"),
    "counter negative": lambda c, t: c["counters"].update(n_updates=-1),
    "stage missing": lambda c, t: c["counters"].update(stage_steps={}),
    "knobs a list": lambda c, t: c.update(knobs=[]),
    "knob of another version": lambda c, t: c["knobs"].update(warp=9),
    "knob out of range": lambda c, t: c["knobs"].update(beta=-1),
    "dataset text": lambda c, t: c.update(dataset="x"),
    "seed text": lambda c, t: c.update(seed="x"),
    "no spec": lambda c, t: c.pop("spec"),
    "spec of another task": lambda c, t: c["spec"]["observation_space"].update(shape=[99], low="-inf", high="inf"),
    "transform garbled": lambda c, t: c.update(reward_transform={"name": "x"}),
    "transform that cannot be": lambda c, t: c["reward_transform"].update(scale=0.0),
    "transform with a denormal scale": lambda c, t: c["reward_transform"].update(scale=5e-324),
    "transform beyond float32": lambda c, t: c["reward_transform"].update(scale=1e39),
    "shift beyond float32": lambda c, t: c["reward_transform"].update(shift=-1e39),
    "action bounds with a denormal width": lambda c, t: c["spec"]["action_space"].update(low=0.0, high=1e-45),
    "sizes nested": lambda c, t: c.update(policy_kwargs={"net_arch": json.loads("[" * 600 + "]" * 600)}),
    "sizes nested a little": lambda c, t: c.update(policy_kwargs={"net_arch": json.loads("[" * 30 + "]" * 30)}),
    "transform without end": lambda c, t: c["reward_transform"].update(shift="inf"),
    "network too wide": lambda c, t: c["policy_kwargs"].update(behavior_width=60_000),
    "too many layers": lambda c, t: c["policy_kwargs"].update(behavior_blocks=100_000),
    "plan a number": lambda c, t: t["plan"].update(lengths=5),
    "plan of another algorithm": lambda c, t: t["plan"].update(lengths={"actor": 5}, done={}),
    "plan overdone": lambda c, t: t["plan"]["done"].update(critic=99),
    "history a number": lambda c, t: t.update(history=5),
}


@pytest.fixture(scope="module")
def agent() -> SRPO:
    return SRPO(**KNOBS).learn(DATA)


@pytest.fixture(scope="module")
def good(agent: SRPO, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return agent.save_pretrained(tmp_path_factory.mktemp("good") / "agent", include_trainer_state=True)


@pytest.mark.parametrize("name", GARBLED)
def test_garbled_json_is_refused(name: str, good: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(good, tmp_path / "agent")
    files = folder / "config.json", folder / "trainer_state.json"
    config, state = (json.loads(file.read_text()) for file in files)
    GARBLED[name](config, state)
    for file, data in zip(files, (config, state), strict=True):
        file.write_text(json.dumps(data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError) as caught:
        SRPO.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("std", [0.0, -1.0, 1e-40])
def test_a_normaliser_that_cannot_be_is_refused(std: float, good: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(good, tmp_path / "agent")
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["obs_normalizer.std"][0] = std
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"obs_normalizer.std contains .*, which is no standard deviation"):
        SRPO.load(folder)


def test_the_ungarbled_one_loads(agent: SRPO, good: pathlib.Path) -> None:
    loaded = SRPO.load(good, verbose=0)
    assert loaded.plan == agent.plan and loaded.history == agent.history and loaded.config == agent.config


def test_what_an_earlier_version_kept_of_commands_and_environments_is_not_published_again(
    good: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(good, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    config["provenance"]["commands"] = ["python train.py --password hunter2 --seed 1"]
    kwargs = {"api_key": "sk-hunter2", "data": "/home/alice/clients"}
    config["dataset"]["env_spec"] = json.dumps({"id": "Pendulum-v1", "entry_point": "acme:Env", "kwargs": kwargs})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="arguments api_key, data may hold a path or a secret") as caught:
        agent = SRPO.load(folder, verbose=0)
    assert sum("left out" in str(warning.message) for warning in caught) == 1
    new = agent.save_pretrained(tmp_path / "new")
    for name in ("config.json", "README.md"):
        text = (new / name).read_text()
        assert "python train.py --password" in text and "--seed 1" in text
        assert not any(secret in text for secret in ("hunter2", "/home/alice", "acme"))


def test_an_agent_that_observes_nothing_loads(tmp_path: pathlib.Path) -> None:
    agent = small("TD3BC")
    agent.set_up(Spec(spaces.Box(-1, 1, (0,)), spaces.Box(-1, 1, (2,))))
    assert diffagents.load(agent.save(tmp_path / "agent"), device="cpu").obs_dim == 0
