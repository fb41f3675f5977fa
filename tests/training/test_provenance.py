"""Provenance: the command line as it is kept in files."""

import sys
from pathlib import Path

import pytest

from diffagents.training import provenance


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("train.py", ["--seed", "1"], "python train.py --seed 1"),
        ("diffagents/__main__.py", ["eval", "runs/a b"], "python -m diffagents eval 'runs/a b'"),
        ("bin/diffagents", ["list"], "diffagents list"),
        ("train.py", ["--token", "hf_secret"], "python train.py --token hf_***"),
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
