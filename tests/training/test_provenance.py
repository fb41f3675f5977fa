"""Provenance: the command line as it is kept in files."""

import re
import sys
from pathlib import Path

import pytest
from small_agents import small
from write_format_fixture import toy_data

from diffagents.training import provenance


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
