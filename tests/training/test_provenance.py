"""Provenance: the command line as it is kept in files."""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from small_agents import small
from write_format_fixture import toy_data

from diffagents import TD3BC
from diffagents.cli.main import parser as parser_of
from diffagents.registry import AGENTS, agent_class
from diffagents.storage import artifact
from diffagents.training import prepare, provenance


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("train.py", ["--seed", "1"], "python train.py --seed 1"),
        (
            "train.py",
            ["--env=Hopper-v5", "--beta", ".05", "--cosine=True"],
            "python train.py --env=Hopper-v5 --beta .05 --cosine=True",
        ),
        ("diffagents/__main__.py", ["eval", "runs/a b", "--episodes", "20"], "python -m diffagents eval *** --episodes 20"),
        ("bin/diffagents", ["list"], "diffagents list"),
        (
            "bin/diffagents",
            ["train", "SRPO", "mujoco/hopper/medium-v0", "--eval"],
            "diffagents train SRPO mujoco/hopper/medium-v0 --eval",
        ),
        ("bin/diffagents", ["--secret", "train"], "diffagents --secret ***"),
        ("missing.py", [], None),
    ],
)
def test_the_command_can_be_typed_again(
    script: str, words: list[str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / script
    if script != "missing.py":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    assert provenance.command_line() == expected


OPTIONS = {"wandb", "key", "password", "api", "data", "paths", "mail", "host", "pin", "1"}
PRIVATE = [
    ["--wandb-key", "0123456789abcdef0123456789abcdef01234567"],
    ["--password=hunter2"],
    ["--password", "hunter2"],
    ["--api-key", "sk-proj-abcdefghij"],
    ["hf_abcdefghijklmnop"],
    ["aws=AKIAIOSFODNN7EXAMPLE"],
    ["--data", "a.npz,/home/alice/secret-project/b.npz"],
    ["--paths=[/home/alice/secret/x]"],
    ["../../alice/secret-project/data.hdf5"],
    ["-o/home/alice/secret"],
    ["~alice/x"],
    ["alice@internal-host:/srv/secret"],
    ["--mail", "alice@example.org"],
    ["fe80::1ff:fe23:4567:890a"],
    ["--host", "gpu07.corp.example"],
    ["--pin=12345678901234567890"],
    ["--alice/secret=1"],
    ["https://alice:hunter2@example.org"],
    ["clients/acme/merger-v2"],
    ["--data", "alice/secret-project/x-v1"],
    ["hunter2-v1"],
    ["--host", "123456789012"],
    ["--hf_AbCdEfGhIjKl"],
    ["--hf_abcdefghij"],
    ["--pin=4711"],
    ["--pin", "4711", "0815"],
    ["--password", "auto"],
]


@pytest.mark.parametrize("words", PRIVATE, ids=str)
def test_only_what_is_known_to_be_harmless_is_kept(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").touch()
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py"), *words])
    shown = provenance.command_line()
    assert shown is not None and "***" in shown
    for part in re.findall(r"[\w.]+", " ".join(words).replace("--", " ")):
        assert part not in shown or part in (
            "wandb",
            "key",
            "password",
            "api",
            "data",
            "paths",
            "mail",
            "host",
            "pin",
            "1",
            "o",
        ), part


def test_the_algorithms_and_options_of_the_command_line_are_kept() -> None:
    assert set(AGENTS) == provenance._ALGORITHMS
    parsers = [parser_of(["train", name]) for name in AGENTS]
    (commands,) = {id(a): a for a in parsers[0]._actions if isinstance(a, argparse._SubParsersAction)}.values()
    options = {option for parser in commands.choices.values() for action in parser._actions for option in action.option_strings}
    options |= {f"--{field.name}" for name in AGENTS for field in dataclasses.fields(agent_class(name).Config)}
    assert len(options) > 90
    for option in options - {"--address", "--id", "--obs-keys"}:
        assert provenance.harmless(f"{option}=1") == f"{option}=1"


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        ("python train.py --password hunter2 --host db7.internal", "python train.py --password *** --host ***"),
        ("python -m diffagents eval 'runs/a b' --episodes 20", "python -m diffagents eval *** --episodes 20"),
        ("diffagents train SRPO mujoco/hopper/medium-v0 --seed 1", "diffagents train SRPO mujoco/hopper/medium-v0 --seed 1"),
        ("diffagents train acme hopper/medium-v0", "diffagents train *** ***"),
        ("/home/alice/acme.py 1", "*** 1"),
        ("python train.py " + "x " * 5000, "python train.py" + " ***" * (provenance.MAX_WORDS + 1)),
        ("what's that", None),
        ("", None),
    ],
)
def test_a_command_from_a_file_is_reduced_in_the_same_way(stored: str, kept: str | None) -> None:
    assert provenance.checked_command(stored) == kept
    assert kept is None or provenance.checked_command(kept) == kept
    assert provenance.checked({"commands": [stored]})["commands"] == ([kept] if kept else [])


def description(**changes: Any) -> dict[str, Any]:
    return {"id": "x", "kind": "arrays", "sha256": "", "n_steps": 1, "n_episodes": 1, "mean_return": 0.0, **changes}


@pytest.mark.parametrize(
    "spec",
    [
        "[" * 100_000,
        "[1]",
        "x",
        '{"id": "Pendulum-v1", "kwargs": [1]}',
        '{"id": "Pendulum-v1", "kwargs": {"g": ' + "[" * 400 + "]" * 400 + "}}",
        '{"id": "\\ud800"}',
        '{"id": "\\u001b[2J"}',
        '{"id": 7}',
        '{"id": "Pendulum-v1", "additional_wrappers": [1]}',
        '{"id": "Pendulum-v1", "additional_wrappers": [{"name": [1]}]}',
        '{"id": "Pendulum-v1", "kwargs": {"api_key": "sk-hunter2", "data": "/home/alice"}}',
    ],
    ids=lambda spec: str(spec)[:40],
)
def test_an_environment_that_may_not_be_stored_is_left_out(spec: str) -> None:
    with pytest.warns(UserWarning, match="the environment stored with the dataset is left out") as caught:
        known = provenance.checked_dataset(description(env_spec=spec))
    assert known == description(env_spec=None) and len(caught) == 1 and str(caught[0].message).isprintable()


def test_of_a_description_only_what_is_known_is_kept_and_in_bounded_size() -> None:
    deep: Any = json.loads("[" * 600 + "]" * 600)
    spec = '{"id": "Pendulum-v1", "entry_point": "acme.secret:Env", "kwargs": {"g": 9.8}, "max_episode_steps": 200}'
    known = provenance.checked_dataset(
        description(
            id="\ud800" + "x" * 5000,
            junk=deep,
            ref_min_score=deep,
            std_return=1.5,
            warnings=["a", deep],
            made={"description": "x" * 2_000_000},
            obs_keys=["a"],
            bounds_from_data=True,
            env_spec=spec,
        )
    )
    assert known is not None
    assert known.pop("env_spec") == (
        '{"id": "Pendulum-v1", "max_episode_steps": 200, "kwargs": {"g": 9.8}, "additional_wrappers": []}'
    )
    assert known == description(
        id="?" + "x" * 999,
        ref_min_score=None,
        std_return=1.5,
        warnings=["a"],
        made={"description": "x" * 10_000},
        obs_keys=["a"],
        bounds_from_data=True,
    )
    assert len(json.dumps(known)) < 15_000


def test_what_cannot_be_saved_is_refused_before_the_first_step() -> None:
    assert artifact.MAX_BYTES[artifact.CONFIG] > prepare.MAX_DESCRIPTION_BYTES + 100_000
    n, dims = 12, 30_000
    low = -np.linspace(1, 3, dims, dtype=np.float32)

    class Wide(gym.Env[Any, Any]):
        observation_space = gym.spaces.Box(low, -low)
        action_space = gym.spaces.Box(-1, 1, (2,))

    data = {
        "observations": np.linspace(0, 1, n, dtype=np.float32)[:, None] + np.zeros((n, dims), np.float32),
        "actions": np.linspace(-1, 1, 2 * n, dtype=np.float32).reshape(n, 2),
        "rewards": np.linspace(0, 1, n, dtype=np.float32),
        "terminations": np.arange(n) % 6 == 5,
        "truncations": np.zeros(n, bool),
    }
    agent = TD3BC(env=Wide(), policy_kwargs={"net_arch": [2]}, verbose=0, device="cpu")
    with pytest.raises(ValueError, match=r"the agent could not be saved: its spaces and dataset take .* bytes"):
        agent.learn(data, 1)
    assert agent.dataset_info is None


@pytest.mark.parametrize("record", [False, True])
def test_a_command_is_stored_only_if_asked_for(record: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").touch()
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py"), "--seed", "3", "secret"])
    agent = small("TD3BC", record_command=record).learn(toy_data(), 4)
    assert agent.provenance["commands"] == (["python train.py --seed 3 ***"] if record else [])
    folder = agent.save_pretrained(tmp_path / "policy")
    for name in ("config.json", "README.md"):
        assert ("train.py" in (folder / name).read_text()) == record
    again = agent.clone().learn(toy_data(), 4)
    assert len(again.provenance["commands"]) == record
