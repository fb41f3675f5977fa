"""How a policy came to be, as far as a machine can tell: the command, the machine, the time, the scores on the way.

Kept in config.json and shown on the card. A command line may hold secrets and private paths: both are taken out.
"""

import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

MAX_EVALUATIONS, MAX_COMMANDS = 1000, 20
_TOKEN = re.compile(r"\bhf_\w+")


def begin(before: dict[str, Any], device: torch.device, reset: bool) -> dict[str, Any]:
    """What is known when a training starts; reset: it starts from nothing, but for what the agent was pulled from."""
    kept = {name: value for name, value in before.items() if name == "source" or not reset}
    commands = [*kept.get("commands", ()), command_line()]
    return {**kept, "commands": [command for command in commands if command][-MAX_COMMANDS:], "machine": machine(device)}


def command_line() -> str | None:
    """What started this process, as one would type it again in the same folder; None in a notebook or a shell."""
    script = sys.argv[0] if sys.argv else ""
    if not script or script == "-c" or "ipykernel" in script or not Path(script).exists():
        return None
    program = ["python", _plain(script)] if script.endswith(".py") else [Path(script).name]
    return _TOKEN.sub("hf_***", shlex.join([*program, *map(_plain, sys.argv[1:])]))


def _plain(argument: str) -> str:
    """An absolute path relative to here, or by its name alone: whose machine this is is nobody's business."""
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
