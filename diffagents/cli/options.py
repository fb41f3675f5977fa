"""Options and helper functions that several commands share."""

import argparse
import ast
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagents import registry
from diffagents.errors import printable

if TYPE_CHECKING:
    from diffagents.agent import Agent

POLICY_HELP = "Folder or .zip file of a policy, or a Hub id (organisation/name); - reads it from stdin."
DEVICE_HELP = 'Device: "cpu", "cuda", "cuda:1", ... or "auto" (default).'
THREADS_HELP = 'CPU threads of the training. "auto" (default): one or all, whichever is faster when it begins.'
HYPERPARAMETER = "hyperparameter "
"""Prefix of the hyperparameters among the parsed arguments, so that their names do not clash with those of other options."""


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a policy and the environment in which it acts."""
    parser.add_argument("policy", metavar="POLICY", help=POLICY_HELP)
    parser.add_argument("--env", metavar="ID", help="Id of the environment. Default: the one stored with the dataset.")
    parser.add_argument(
        "--env-arg", action="append", default=[], metavar="NAME=VALUE", help="Argument of the environment; may be repeated."
    )
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    add_hub(parser)


def add_episodes(parser: argparse.ArgumentParser, episodes: int = 10) -> None:
    """Add the options for the episodes that a policy plays; `episodes` is their default number."""
    parser.add_argument("--episodes", type=int, default=episodes, metavar="N", help=f"Number of episodes. Default: {episodes}.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the first episode. Default: 0.")
    add_how(parser)


def add_how(parser: argparse.ArgumentParser) -> None:
    """Add --sampled and --deterministic, for how a policy acts; without them `deterministic` is None, as it is meant to act."""
    group, default = parser.add_mutually_exclusive_group(), "Default: as the policy is meant to act."
    group.add_argument("--sampled", dest="deterministic", action="store_false", help=f"Sample the actions. {default}")
    group.add_argument("--deterministic", action="store_true", help=f"Act without randomness. {default}")
    parser.set_defaults(deterministic=None)


def add_hub(parser: argparse.ArgumentParser) -> None:
    """Add the options for reading a repository of the Hugging Face Hub."""
    parser.add_argument("--revision", metavar="NAME", help="Branch, tag or commit on the Hub. Default: main.")
    parser.add_argument("--offline", action="store_true", help="Use the local cache only.")


def add_hyperparameters(parser: argparse.ArgumentParser, algorithm: str | None) -> None:
    """Add every hyperparameter of the algorithm as an option, with its description, type, range and default."""
    if algorithm is None:
        return
    from diffagents.config.hyperparameters import describe  # imports torch, for which the other commands need not wait
    from diffagents.config.presets import FAST, resolve_preset

    cls = registry.agent_class(algorithm)
    values = resolve_preset(cls.presets_name(), FAST, None)[1]
    shown = ", ".join(f"{name}={setting}" for name, setting in values.items()).replace("%", "%%")
    about = f"The defaults shown are those of --preset none. The preset {FAST!r} sets {shown}."
    group = parser.add_argument_group(f"hyperparameters of {algorithm}", about)
    for each in describe(cls.Config):
        text = f"{each.description} ({each.summary})".replace("%", "%%")  # argparse formats it
        flag, dest = f"--{each.name.replace('_', '-')}", HYPERPARAMETER + each.name
        group.add_argument(flag, dest=dest, type=value, metavar="VALUE", default=argparse.SUPPRESS, help=text)


def hyperparameters(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the options of `add_hyperparameters`, by name; only those that were passed."""
    return {k.removeprefix(HYPERPARAMETER): v for k, v in vars(args).items() if k.startswith(HYPERPARAMETER)}


def preset(args: argparse.Namespace) -> dict[str, Any]:
    """The argument `preset` of the constructor if --preset was passed, else nothing; --preset none passes None."""
    return {"preset": args.preset} if "preset" in args else {}


def value(text: str) -> Any:
    """The value of a word of the command line: a Python literal, true, false, none or null, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)


def policy(args: argparse.Namespace) -> "Agent":
    """Load the agent named by the options of `add_policy`; - reads its name from stdin."""
    where = args.policy if args.policy != "-" else sys.stdin.readline().strip()
    revision, offline = getattr(args, "revision", None), getattr(args, "offline", False)
    device = getattr(args, "device", "auto")
    return registry.load(where, revision=revision, local_files_only=offline, device=device, verbose=0)


def environment(args: argparse.Namespace, agent: "Agent") -> Any:
    """The environment of --env, else the one stored with the agent's dataset.

    Raises:
        ValueError: if there is neither.
    """
    env = args.env or (agent.dataset_info or {}).get("env_spec")
    if env is None:
        raise ValueError("no environment is stored with this policy's dataset: pass --env ID")
    return env


def env_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the environment from all --env-arg options."""
    pairs = [text.partition("=") for text in args.env_arg]
    return {name: value(text) for name, _, text in pairs}


def check_new_folder(out: Path, **written: str | None) -> None:
    """Check, before hours of work, that a policy can be saved as `out` at the end.

    Args:
        out: The folder, which does not exist yet.
        written: Options that name what is written meanwhile. Inside `out` it would make a folder of no policy, which is never
            overwritten.

    Raises:
        ValueError: One of them lies inside `out`.
        OSError: No folder can be made there.
    """
    place = out.expanduser().resolve()
    for option, other in written.items():
        if other is not None and "://" not in other and Path(other).expanduser().resolve().is_relative_to(place):
            raise ValueError(f"--{option} {other} lies inside --out {out}, which will be a new folder: pass a place beside it")
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"--out {out}: {above} is no folder; pass another --out")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"--out {out}: {above} is read-only; pass another --out")


def say(text: str, code: int = 0) -> int:
    """Print one line to stderr and return the exit code `code`."""
    print(f"diffagents: {printable(text)}", file=sys.stderr)
    return code
