"""Options and small things that the commands share."""

import argparse
import ast
import sys
from typing import TYPE_CHECKING, Any

import diffagents
from diffagents.config.hyperparameters import describe

if TYPE_CHECKING:
    from diffagents.agent import Agent

POLICY_HELP = "a folder or .zip of ours, or a Hub id (organisation/name); - reads it from stdin"
HYPERPARAMETER = "hyperparameter "
"""What the names of hyperparameters begin with among the parsed arguments, so that none clashes with another option."""


def add_policy(one: argparse.ArgumentParser) -> None:
    """The policy, and where it acts."""
    one.add_argument("policy", metavar="POLICY", help=POLICY_HELP)
    one.add_argument("--env", metavar="ID", help="default: the environment stored with the dataset")
    one.add_argument(
        "--env-arg", action="append", default=[], metavar="NAME=VALUE", help="for the environment; may be repeated"
    )
    one.add_argument("--device", default="auto")
    add_hub(one)


def add_episodes(one: argparse.ArgumentParser, episodes: int = 10) -> None:
    """Which episodes it plays, and how."""
    one.add_argument("--episodes", type=int, default=episodes, metavar="N", help=f"default: {episodes}")
    one.add_argument("--seed", type=int, default=0, help="of the first episode; default: 0")
    one.add_argument("--sampled", action="store_true", help="sample actions; default: deterministic ones")


def add_hub(one: argparse.ArgumentParser) -> None:
    """Which state of a Hub repository."""
    one.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    one.add_argument("--offline", action="store_true", help="from the cache alone")


def add_hyperparameters(one: argparse.ArgumentParser, algorithm: str | None) -> None:
    """Every hyperparameter of the algorithm as an option, with its description, type, range and default."""
    if algorithm is None:
        return
    group = one.add_argument_group(f"hyperparameters of {algorithm}")
    for each in describe(getattr(diffagents, algorithm).Config):
        text = f"{each.description} ({each.summary})".replace("%", "%%")  # argparse formats it
        flag, dest = f"--{each.name.replace('_', '-')}", HYPERPARAMETER + each.name
        group.add_argument(flag, dest=dest, type=value, metavar="VALUE", default=argparse.SUPPRESS, help=text)


def given_hyperparameters(given: argparse.Namespace) -> dict[str, Any]:
    """Name -> value of the hyperparameters that the command line sets."""
    return {k.removeprefix(HYPERPARAMETER): v for k, v in vars(given).items() if k.startswith(HYPERPARAMETER)}


def value(text: str) -> Any:
    """What a word of the command line means: a Python literal, true, false, none, else itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)


def policy(given: argparse.Namespace) -> "Agent":
    """The agent that `add_policy` asked for."""
    where = given.policy if given.policy != "-" else sys.stdin.readline().strip()
    revision, offline = getattr(given, "revision", None), getattr(given, "offline", False)
    device = getattr(given, "device", "auto")
    return diffagents.load(where, revision=revision, local_files_only=offline, device=device, verbose=0)


def environment(given: argparse.Namespace, agent: "Agent") -> Any:
    """What --env names, else what is stored with the agent's dataset. Raises ValueError where there is neither."""
    env = given.env or (agent.dataset_info or {}).get("env_spec")
    if env is None:
        raise ValueError("no environment is stored with this policy's dataset: give --env ID")
    return env


def env_arguments(given: argparse.Namespace) -> dict[str, Any]:
    """Every --env-arg."""
    pairs = [text.partition("=") for text in given.env_arg]
    return {name: value(text) for name, _, text in pairs}


def say(text: str, code: int = 0) -> int:
    """One line on stderr; returns the exit code."""
    print(f"diffagents: {text}", file=sys.stderr)
    return code
