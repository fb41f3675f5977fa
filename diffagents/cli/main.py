"""The command `diffagents`: its parser and its exit codes."""

import argparse
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffagents
from diffagents.cli import experiments
from diffagents.cli.options import (
    POLICY_HELP,
    add_episodes,
    add_hub,
    add_hyperparameters,
    add_policy,
    say,
)
from diffagents.cli.policies import enjoy, eval_, list_, pull, push, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = sys.argv[1:] if argv is None else argv  # --batch_size is --batch-size
    arguments = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in given]
    parsed = parser(arguments).parse_args(arguments)
    if parsed.run is None:
        parser(arguments).print_help()
        return 2
    warnings.showwarning = lambda message, *_, **__: print(f"diffagents: warning: {message}", file=sys.stderr)
    try:
        parsed.run(parsed)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return say("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing it raises nothing more
        return 141
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        if parsed.traceback:
            traceback.print_exc()
        return say(f"error: {error}", 1)
    return 0


def parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The whole command line. `arguments`: where an algorithm is among them, `train` also takes its hyperparameters."""
    top = argparse.ArgumentParser("diffagents", description="Train, judge, show and share policies of offline diffusion RL.")
    top.add_argument("--version", action="version", version=f"diffagents {diffagents.__version__}")
    top.add_argument("--traceback", action="store_true", help="show where an error came from")
    top.set_defaults(run=None)
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    def command(run: Any, example: str) -> argparse.ArgumentParser:
        text = inspect.getdoc(run) or ""
        made = commands.add_parser(
            run.__name__.rstrip("_"),
            help=text.partition("\n")[0],
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    algorithm = next((word for word in arguments if word in diffagents.AGENTS), None)
    one = command(train, "diffagents train SRPO mujoco/hopper/medium-v0 --beta 0.1 --eval")
    one.add_argument(
        "algorithm",
        choices=diffagents.AGENTS,
        help="see `diffagents list`; `diffagents train SRPO --help` lists its hyperparameters",
        metavar="ALGORITHM",
    )
    one.add_argument(
        "dataset", metavar="DATASET", help="a Minari id (hf://owner/name-v0 too), an .npz or a D4RL-style .hdf5 file"
    )
    one.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/ALGORITHM-DATASET-seedN")
    one.add_argument("--steps", type=int, metavar="N", help="gradient steps in all, split over the stages")
    one.add_argument("--preset", help='"auto" takes the paper\'s row for the dataset, "paper" its schedule too')
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--env", metavar="ID", help="gives the true spaces, and the place of --eval")
    one.add_argument("--eval", action="store_true", help="evaluate the last policy, in --env or the dataset's environment")
    one.add_argument("--episodes", type=int, default=10, metavar="N", help="episodes of --eval")
    one.add_argument("--video", action="store_true", help="render an episode beside it")
    one.add_argument("--net-arch", type=int, nargs="+", metavar="WIDTH", help="hidden layers, for example 256 256")
    one.add_argument("--resume", action="store_true", help="finish the interrupted run in --out")
    one.add_argument("--save-every", type=int, metavar="N", help="write --out every N steps, so that a kill loses little")
    one.add_argument("--progress", action="store_true", help="a progress bar")
    one.add_argument("--tensorboard", metavar="FOLDER")
    one.add_argument("--quiet", action="store_true")
    one.add_argument("--device", default="auto")
    add_hyperparameters(one, algorithm)

    one = command(eval_, "diffagents eval me/srpo-hopper --episodes 20 --json | jq .mean_return")
    add_policy(one)
    add_episodes(one)
    one.add_argument("--n-envs", type=int, default=1, metavar="N", help="episodes played side by side")
    one.add_argument("--json", action="store_true", help="everything measured, as one line of JSON")

    one = command(enjoy, "diffagents enjoy me/srpo-hopper --video hopper.mp4")
    add_policy(one)
    add_episodes(one, episodes=1)
    one.add_argument("--video", type=Path, metavar="FILE.mp4", help="write one episode here instead of opening a window")

    one = command(push, "diffagents push runs/srpo me/srpo-hopper --eval --video")
    one.add_argument("policy", metavar="POLICY", help=POLICY_HELP)
    one.add_argument("repo_id", metavar="HUB_ID", help="organisation/name; made where there is none")
    one.add_argument("--eval", action="store_true", help="evaluate first, in --env or the dataset's environment")
    one.add_argument("--env", metavar="ID")
    one.add_argument("--episodes", type=int, default=10, metavar="N", help="episodes of --eval")
    one.add_argument("--video", action="store_true", help="render an episode for the card")
    one.add_argument("--private", action="store_true", default=None)
    one.add_argument("--revision", metavar="BRANCH", help="made where there is none")
    one.add_argument("--message", metavar="TEXT", help="of the commit")
    one.add_argument("--license", default="mit", help="of the policy, as the Hub spells it; default: mit")
    one.add_argument("--trainer-state", action="store_true", help="so that others can resume the run itself")

    one = command(pull, "diffagents eval $(diffagents pull me/srpo-hopper --to hopper)")
    one.add_argument("repo_id", metavar="HUB_ID")
    one.add_argument("--to", type=Path, metavar="FOLDER", help="copy it here; default: only into the cache")
    add_hub(one)

    one = command(list_, "diffagents list runs")
    one.add_argument("where", nargs="?", metavar="WHERE", help="a folder, or an author or organisation on the Hub")
    one.add_argument("--zoo", action="store_true", help="the trained policies that lie in zoo/ of this checkout")
    experiments.add_commands(command)
    return top
