"""Records how a policy was made: the commands, the machine, the seconds of training and the evaluations during it.

The record is saved in config.json and shown on the model card. Commands are recorded only if an agent is asked to
(`record_command=True`), and of their words only those that are known to be harmless.
"""

import functools
import json
import os
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffagents.envs.make import spec_to_store
from diffagents.errors import encodable, printable, short
from diffagents.version import __version__

MAX_EVALUATIONS, MAX_COMMANDS, MAX_WORDS = 1000, 20, 100
MAX_DEPTH = 20
"""How deeply lists and dicts in a description from a file may be nested: far less than what Python can recurse into."""
_HIDDEN = "***"
_OPTION = re.compile(r"(?!--(hf|sk|gh[a-z]|glpat|xox[a-z])[-_])(--[a-z]{1,15}\d?([-_][a-z]{1,15}\d?){0,4}|-[a-z])", re.ASCII)
"""The name of an option, of ordinary words; not what begins like a token."""
_NUMBER = re.compile(r"[+-]?(\d{1,10}(\.\d{0,9})?|\.\d{1,9})(e[+-]?\d{1,3})?", re.IGNORECASE | re.ASCII)
_ID = re.compile(r"(\w{1,40}[/-]){0,6}\w{1,40}-v\d{1,3}", re.ASCII)
"""The id of an environment or of a Minari dataset, which is shown only where a command takes one: other words look alike."""
_PROGRAM = re.compile(r"[\w. -]{1,60}")
_SECRET = re.compile(r"key|token|secret|pass|pwd|phrase|auth|cred|phone|account|(?<![a-z])(pin|p|id|user)(?![a-z])")
"""The names of options whose values are never shown, not even numbers."""
_TAKES_ID = ("--env", "--dataset")
_ALGORITHMS = {
    *("SRPO", "DiffusionQL", "DiffCPS", "BDPO", "QGPO", "SfBC", "DiffusionBC", "BC", "IDQL", "IQL", "TD3BC", "AWR"),
}
_TEXTS = {"id": 1000, "kind": 100, "sha256": 100}
"""Texts in the description of a dataset, and how much is kept of them."""
_MOST_TEXT, _MOST_SPEC = 10_000, 100_000
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

    The words of its commands are checked anew, because earlier versions kept more of them.

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
    if "commands" in known:
        commands = [checked_command(command) for command in known["commands"][-MAX_COMMANDS:]]
        known["commands"] = [command for command in commands if command]
    if "machine" in known:
        known["machine"] = _text(known["machine"], 200)
    if "source" in known:
        known["source"] = {name: _text(source[name], 200) for name in ("repo_id", "sha")}
    return known


def checked_dataset(value: Any) -> dict[str, Any] | None:
    """Check the description of a dataset (`Transitions.info`) from a file; None means that the agent has not learned yet.

    Kept are the entries that this version knows, in bounded size; of the environment what may be published, or nothing, with a
    warning.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: It was not written by this library.
    """
    if value is None:
        return None
    made, keys = value.get("made"), value.get("obs_keys")
    texts = [*(value[name] for name in _TEXTS), *(made or {}).keys(), *(made or {}).values(), *(keys or ())]
    if not all(isinstance(text, str) for text in texts) or not isinstance(value.get("env_spec"), str | None):
        raise ValueError("dataset has an id, kind, key or other text that is not a string")
    if not all(_is_number(value[name]) for name in ("n_steps", "n_episodes", "mean_return")):
        raise ValueError("dataset has a size or mean return that is not a number")
    known: dict[str, Any] = {}
    for name, entry in value.items():
        if name in _TEXTS:
            known[name] = _text(entry, _TEXTS[name])
        elif name in ("n_steps", "n_episodes", "mean_return"):
            known[name] = entry
        elif name in ("std_return", "ref_min_score", "ref_max_score"):
            known[name] = entry if _is_number(entry) else None
        elif name == "bounds_from_data":
            known[name] = bool(entry)
        elif name == "obs_keys":
            known[name] = None if keys is None else [_text(key, 1000) for key in keys]
        elif name == "made" and made is not None:
            known[name] = {_text(key, 100): _text(text, _MOST_TEXT) for key, text in list(made.items())[:20]}
        elif name == "warnings" and isinstance(entry, list):
            known[name] = [_text(text, 1000) for text in entry[:20] if isinstance(text, str)]
        elif name == "env_spec":
            known[name] = None if entry is None else _checked_env_spec(entry)
    return known


def _checked_env_spec(text: str) -> str | None:
    """What may be stored of an environment's spec in JSON; None, with a warning, if it may not be, or cannot be read."""
    try:
        fields = json.loads(text) if len(text) <= _MOST_SPEC else None
        if not isinstance(fields, dict) or not _is_plain(fields) or not isinstance(fields.get("id"), str):
            raise ValueError("it is no JSON object of an environment with an id")
        wrappers = [wrapper["name"] for wrapper in fields.get("additional_wrappers") or ()]
        if not all(isinstance(name, str) for name in wrappers):
            raise ValueError("it has a wrapper without a name")
        stored, refused = spec_to_store({**fields, "kwargs": dict(fields.get("kwargs") or {})})
        reason = (
            f"its arguments {', '.join(map(short, refused))} may hold a path or a secret, or are no numbers and short words"
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        stored, reason = None, f"it cannot be read: {short(error)}"
    if stored is None:
        warnings.warn(f"the environment stored with the dataset is left out ({reason}): pass env= to evaluate", stacklevel=2)
    return stored


def _is_plain(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether a JSON value can be shown and stored: without control characters, and not too deeply nested."""
    if isinstance(value, str):
        return printable(value) == value
    if isinstance(value, Mapping):
        return depth > 0 and all(_is_plain(key) and _is_plain(item, depth - 1) for key, item in value.items())
    return not isinstance(value, list) or (depth > 0 and all(_is_plain(item, depth - 1) for item in value))


def _text(text: str, longest: int) -> str:
    """The beginning of a text, as it can be stored."""
    return encodable(text[:longest])


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
    kinds = int | float | np.integer | np.floating
    return isinstance(value, kinds) and not isinstance(value, bool) and bool(-1e30 < value < 1e30)


def command_line() -> str | None:
    """The command that started this process, as far as its words are harmless.

    Kept are the names of options, numbers, a few words such as `auto`, the commands of diffagents, the names of algorithms, and
    the id of an environment or dataset where a command takes one; the other words, which may be paths, names of machines or
    secrets, become `***`.

    Returns:
        For example `python train.py --seed 1` or, for a package, `python -m diffagents eval ***`. None in a notebook or an
        interactive interpreter.
    """
    script = sys.argv[0] if sys.argv else ""
    if not script or script == "-c" or "ipykernel" in script or not Path(script).exists():
        return None
    if Path(script).name == "__main__.py":
        program = ["python", "-m", Path(script).resolve().parent.name]
    elif script.endswith(".py"):
        program = ["python", Path(script).name]
    else:
        program = [Path(script).name]
    return _harmless_command(program, sys.argv[1:])


def checked_command(text: str) -> str | None:
    """A command from a file, as far as its words are harmless; None if it is none."""
    try:
        words = shlex.split(text)
    except ValueError:
        return None
    n_program = 3 if words[:2] == ["python", "-m"] else 2 if words[:1] == ["python"] else 1
    return _harmless_command(words[:n_program], words[n_program:]) if words else None


def _harmless_command(program: Sequence[str], words: Sequence[str]) -> str:
    """A command with `***` for what is not known to be harmless."""
    of_ours = program[-1] == "diffagents" and words[:1] != [] and words[0] in _COMMANDS
    shown = [words[0]] if of_ours else []
    trains = of_ours and words[0] in ("train", "tune")
    option = previous = ""
    for word in words[len(shown) : MAX_WORDS]:
        if word.startswith("-") and not _NUMBER.fullmatch(word):
            option = word.partition("=")[0]
        is_dataset = trains and previous in _ALGORITHMS and _ID.fullmatch(word)
        shown.append(word if is_dataset else harmless(word, option))
        previous = word
    more = [_HIDDEN] if len(words) > MAX_WORDS else []
    name = shlex.join(word for word in program if _PROGRAM.fullmatch(word)) or _HIDDEN
    return " ".join([name, *shown, *more])


def harmless(word: str, after: str = "") -> str:
    """A word of a command line if it is known to be harmless, with `***` for what is not; `after`: the option before it."""
    option, sign, value = word.partition("=")
    if sign and word.startswith("-"):
        return f"{harmless(option)}={harmless(value, option)}"
    if _OPTION.fullmatch(word):
        return word
    known = _NUMBER.fullmatch(word) or word.lower() in _WORDS or word in _ALGORITHMS
    is_id = after in _TAKES_ID and _ID.fullmatch(word)
    return word if (known or is_id) and not _SECRET.search(after.lower()) else _HIDDEN


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
    if package == "diffagents":  # whatever its name on an index
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
