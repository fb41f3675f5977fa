"""Records how a policy was made: the commands, the machine, the seconds of training and the evaluations during it.

The record is saved in config.json and shown on the model card. Commands are recorded only if an agent is asked to
(`record_command=True`), and of their words only those that are known to be harmless.
"""

import functools
import os
import platform
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

MAX_EVALUATIONS, MAX_COMMANDS = 1000, 20
_HIDDEN = "***"
_OPTION = re.compile(r"--[a-z][a-z0-9_-]*|-[a-z]", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(\d{1,12}(\.\d{0,12})?|\.\d{1,12})(e[+-]?\d{1,3})?", re.IGNORECASE)
_ID = re.compile(r"(\w{1,40}[/-]){0,6}\w{1,40}-v\d{1,3}", re.ASCII)
"""The id of an environment or of a Minari dataset."""
_WORDS = {"true", "false", "none", "auto", "cpu", "cuda", "fast", "paper", "official_code", "argmax", "softmax", "first"}
_COMMANDS = {"train", "eval", "enjoy", "push", "pull", "list", "bench", "collect", "data", "select", "tune"}


def begin(before: dict[str, Any], device: torch.device, reset: bool, record_command: bool) -> dict[str, Any]:
    """The record of a run that starts now.

    Args:
        before: The agent's record so far.
        device: The device of the training.
        reset: Whether the counters restart, so that only `source` (the Hub repository) is kept of `before`.
        record_command: Whether to add the command line of this process.

    Returns:
        A new record with the machine and, if asked for, the present command.
    """
    kept = {name: value for name, value in before.items() if name == "source" or not reset}
    commands = [*kept.get("commands", ()), command_line() if record_command else None]
    return {**kept, "commands": [command for command in commands if command][-MAX_COMMANDS:], "machine": machine(device)}


def checked(value: Any) -> dict[str, Any]:
    """Check a record from a file, dropping entries that this version does not know.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: It was not written by this library.
    """
    kinds = {"commands": list, "machine": str, "seconds": float, "trained_together": int, "evaluations": list, "source": dict}
    known = {name: value[name] for name in kinds if name in value}
    if any(type(entry) is not kinds[name] for name, entry in known.items()):
        raise ValueError("provenance has an entry of the wrong type")
    source = known.get("source", {"repo_id": "", "sha": ""})
    if not all(isinstance(text, str) for text in (*known.get("commands", ()), source["repo_id"], source["sha"])):
        raise ValueError("provenance has a command or source that is not a string")
    for row in known.get("evaluations", ()):
        if set(row) != {"num_timesteps", "mean_return"} or not all(map(_is_number, row.values())):
            raise ValueError("provenance has an invalid evaluation: it needs numbers num_timesteps and mean_return")
    return known


def checked_dataset(value: Any) -> dict[str, Any] | None:
    """Check the description of a dataset (`Transitions.info`) from a file; None means that the agent has not learned yet.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: It was not written by this library.
    """
    if value is None:
        return None
    texts = [value["id"], value["kind"], value["sha256"], *(value.get("made") or {}).values(), *(value.get("obs_keys") or ())]
    if not all(isinstance(text, str) for text in texts) or not isinstance(value.get("env_spec"), str | None):
        raise ValueError("dataset has an id, kind, key or other text that is not a string")
    if not all(_is_number(value[name]) for name in ("n_steps", "n_episodes", "mean_return")):
        raise ValueError("dataset has a size or mean return that is not a number")
    return dict(value)


def checked_history(rows: Any) -> list[dict[str, Any]]:
    """Check the rows of `Agent.history` from a file.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: They were not written by this library.
    """
    for row in rows:
        others = [entry for name, entry in row.items() if name != "stage"]
        if not isinstance(row["stage"], str) or type(row["num_timesteps"]) is not int or not all(map(_is_number, others)):
            raise ValueError("history has an invalid row: it needs a stage, the integer num_timesteps and numbers")
    return [dict(row) for row in rows]


def _is_number(value: Any) -> bool:
    """Whether it is a number of ordinary size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def command_line() -> str | None:
    """The command that started this process, as far as its words are harmless.

    Kept are the names of options, numbers, ids of environments and datasets, a few words such as `auto`, and the commands of
    diffagents; the other words, which may be paths, names of machines or secrets, become `***`.

    Returns:
        For example `python train.py --seed 1` or, for a package, `python -m diffagents eval ***`. None in a notebook or an
        interactive interpreter.
    """
    script = sys.argv[0] if sys.argv else ""
    if not script or script == "-c" or "ipykernel" in script or not Path(script).exists():
        return None
    words = sys.argv[1:]
    if Path(script).name == "__main__.py":
        program = ["python", "-m", Path(script).resolve().parent.name]
    elif script.endswith(".py"):
        program = ["python", Path(script).name]
    else:
        program = [Path(script).name]
    shown = []
    if program[-1] == "diffagents" and words[:1] and words[0] in _COMMANDS:
        shown, words = [words[0]], words[1:]
        if shown[0] in ("train", "tune") and words[:1] and re.fullmatch(r"\w{1,12}", words[0]):  # an algorithm
            shown, words = [*shown, words[0]], words[1:]
    return shlex.join([*program, *shown]) + "".join(f" {harmless(word)}" for word in words)


def harmless(word: str) -> str:
    """A word of a command line if it is known to be harmless, with `***` for what is not."""
    option, sign, value = word.partition("=")
    if sign and word.startswith("-"):
        return f"{option if _OPTION.fullmatch(option) else _HIDDEN}={harmless(value)}"
    known = _NUMBER.fullmatch(word) or _ID.fullmatch(word) or _OPTION.fullmatch(word) or word.lower() in _WORDS
    return word if known else _HIDDEN


def machine(device: torch.device) -> str:
    """The name of the GPU, or the number and architecture of the CPU cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def note_evaluation(provenance: dict[str, Any], num_timesteps: int, mean_return: float) -> None:
    """Add the score of an evaluation during training; a list longer than MAX_EVALUATIONS is thinned out, keeping its best row.

    Args:
        provenance: The agent's record; its list `evaluations` is changed.
        num_timesteps: As `Agent.num_timesteps` at the evaluation.
        mean_return: Mean return of its episodes.
    """
    rows = provenance.setdefault("evaluations", [])
    rows.append({"num_timesteps": num_timesteps, "mean_return": mean_return})
    if len(rows) > MAX_EVALUATIONS:
        best = max(rows, key=lambda row: row["mean_return"])
        provenance["evaluations"] = [row for i, row in enumerate(rows) if i % 2 or row is best]


@functools.cache  # a third of the time of a save, otherwise
def package_version(package: str) -> str:
    """The version of an installed package, "unknown" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
