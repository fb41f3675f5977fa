"""How a policy came to be, as far as a machine can tell: the command, the machine, the time, the scores on the way.

Kept in config.json and shown on the card. A command line may hold secrets and private paths: both are taken out.
"""

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
_TOKEN = re.compile(r"\bhf_\w+")
_ADDRESS = re.compile(
    r"\b(?!hf://)[a-z][\w+.-]*://\S*|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?"
)  # with the password that may be in it


def begin(before: dict[str, Any], device: torch.device, reset: bool) -> dict[str, Any]:
    """What is known when a training starts; reset: it starts from nothing, but for what the agent was pulled from."""
    kept = {name: value for name, value in before.items() if name == "source" or not reset}
    commands = [*kept.get("commands", ()), command_line()]
    return {**kept, "commands": [command for command in commands if command][-MAX_COMMANDS:], "machine": machine(device)}


def checked(value: Any) -> dict[str, Any]:
    """Provenance as a file has it, what this version does not know left out. Raises ValueError, TypeError, KeyError, ..."""
    kinds = {"commands": list, "machine": str, "seconds": float, "trained_together": int, "evaluations": list, "source": dict}
    known = {name: value[name] for name in kinds if name in value}
    if any(type(entry) is not kinds[name] for name, entry in known.items()):
        raise ValueError("provenance has an entry of another kind")
    source = known.get("source", {"repo_id": "", "sha": ""})
    if not all(isinstance(text, str) for text in (*known.get("commands", ()), source["repo_id"], source["sha"])):
        raise ValueError("provenance has a text that is none")
    for row in known.get("evaluations", ()):
        if set(row) != {"num_timesteps", "mean_return"} or not all(map(_is_number, row.values())):
            raise ValueError("provenance has an evaluation that is none")
    return known


def checked_dataset(value: Any) -> dict[str, Any] | None:
    """What is kept of a dataset (`Transitions.info`) as a file has it; None where the agent has learned from none."""
    if value is None:
        return None
    texts = [value["id"], value["kind"], value["sha256"], *(value.get("made") or {}).values(), *(value.get("obs_keys") or ())]
    if not all(isinstance(text, str) for text in texts) or not isinstance(value.get("env_spec"), str | None):
        raise ValueError("dataset has a text that is none")
    if not all(_is_number(value[name]) for name in ("n_steps", "n_episodes", "mean_return")):
        raise ValueError("dataset has a number that is none")
    return dict(value)


def checked_history(rows: Any) -> list[dict[str, Any]]:
    """The rows of `Agent.history` as a file has them."""
    for row in rows:
        others = [entry for name, entry in row.items() if name != "stage"]
        if not isinstance(row["stage"], str) or type(row["num_timesteps"]) is not int or not all(map(_is_number, others)):
            raise ValueError("history has a row that is none")
    return [dict(row) for row in rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def command_line() -> str | None:
    """The command that started this process, as one would type it in the same folder, without secrets and private paths.

    Returns:
        For example `python train.py --seed 1` or, for a package, `python -m diffagents eval runs/a`. None in a notebook or an
        interactive interpreter.
    """
    script = sys.argv[0] if sys.argv else ""
    if not script or script == "-c" or "ipykernel" in script or not Path(script).exists():
        return None
    if Path(script).name == "__main__.py":
        program = ["python", "-m", Path(script).resolve().parent.name]
    elif script.endswith(".py"):
        program = ["python", plain(script)]
    else:
        program = [Path(script).name]
    return _TOKEN.sub("hf_***", shlex.join([*program, *map(plain, sys.argv[1:])]))


def plain(argument: str) -> str:
    """An absolute path relative to here, or by its name alone, and no address: whose machine this is is nobody's business."""
    argument = _ADDRESS.sub("***", argument)
    head, sign, path = argument.rpartition("=")
    if not os.path.isabs(path):
        return argument
    here = Path.cwd()
    return f"{head}{sign}{Path(path).relative_to(here) if Path(path).is_relative_to(here) else Path(path).name}"


def machine(device: torch.device) -> str:
    """The GPU's name, or the kind and number of CPU cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def note_evaluation(provenance: dict[str, Any], num_timesteps: int, mean_return: float) -> None:
    """Add a score of training time. A long list is thinned, its best row kept."""
    rows = provenance.setdefault("evaluations", [])
    rows.append({"num_timesteps": num_timesteps, "mean_return": mean_return})
    if len(rows) > MAX_EVALUATIONS:
        best = max(rows, key=lambda row: row["mean_return"])
        provenance["evaluations"] = [row for i, row in enumerate(rows) if i % 2 or row is best]


def package_version(package: str) -> str:
    """The version of an installed package, "unknown" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
