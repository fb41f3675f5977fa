"""The command `diffagents`: its parser, its entry point and its exit codes.

Results go to stdout and everything else to stderr, so that the commands work in pipes. Exit codes: 0 success, 1 failure (one
line on stderr gives the reason), 2 invalid usage, 130 interrupted by Ctrl-C, 141 the reader of the output has gone.
"""

import argparse
import difflib
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffagents.cli import experiments
from diffagents.cli.options import (
    DEVICE_HELP,
    POLICY_HELP,
    THREADS_HELP,
    add_episodes,
    add_hub,
    add_hyperparameters,
    add_policy,
    say,
    value,
)
from diffagents.cli.policies import enjoy, eval_, list_, pull, push, train
from diffagents.errors import one_line, printable
from diffagents.registry import AGENTS
from diffagents.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `diffagents`. Default: `sys.argv[1:]`.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if argv is None else argv
    # Accept the Python spelling of options: --batch_size is --batch-size.
    words = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in words]
    top = parser(words)
    args, unknown = top.parse_known_args(words)
    if unknown:
        top.error(_unknown_arguments(unknown, args, words))
    if args.run is None:
        top.print_help()
        return 2
    warnings.showwarning = lambda message, *_, **__: print(f"diffagents: warning: {printable(message)}", file=sys.stderr)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return say("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # closing stdout must not raise again
        return 141
    except Exception as error:
        if args.traceback:
            traceback.print_exc()
        expected = isinstance(error, OSError | ValueError | TypeError | RuntimeError | ImportError | Warning)
        if expected and not isinstance(error, RecursionError):
            return say(f"error: {error}", 1)
        cause = f"{type(error).__name__}: {one_line(error)[:200]}"
        where = "" if args.traceback else "; --traceback shows where"
        return say(f"error: {cause}; this is a bug or a damaged file{where}", 1)
    return 0


def _unknown_arguments(unknown: Sequence[str], args: argparse.Namespace, words: Sequence[str]) -> str:
    """What is wrong with words that no option takes, and the option that each was perhaps meant to be."""
    message = f"unrecognized arguments: {' '.join(unknown)}; "
    if args.run is None:
        return f"{message}see `diffagents --help`"
    from diffagents.config.hyperparameters import LENGTHS, OTHER_NAMES  # for which a command that is understood need not wait

    meant = OTHER_NAMES | dict.fromkeys((*LENGTHS, "total_timesteps"), "steps")
    known = sorted(set(re.findall(r"--[a-z][-a-z0-9]*", args.options())) - {"--help"})
    wrong = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    guesses: dict[str, None] = {}  # in order, each once
    for word in wrong:
        own = "--" + meant.get(word[2:].replace("-", "_"), "").replace("_", "-")
        guesses |= dict.fromkeys([own] if own in known else difflib.get_close_matches(word, known, 1))
    if guesses:
        message += f"did you mean {' and '.join(guesses)}? "
    command = " ".join([args.run.__name__.rstrip("_"), *(word for word in words if word in AGENTS)][:2])
    return f"{message}`diffagents {command} --help` lists all options"


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Build the parser of the whole command line.

    Args:
        words: the words to parse. If one of them names an algorithm, `train` also takes its hyperparameters.
    """
    top = argparse.ArgumentParser(
        "diffagents", description="Train, evaluate, show and share policies of diffusion-based offline reinforcement learning."
    )
    top.add_argument("--version", action="version", version=f"diffagents {__version__}")
    top.add_argument("--traceback", action="store_true", help="Show the traceback of an error.")
    top.set_defaults(run=None)
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    def command(run: Any, example: str) -> argparse.ArgumentParser:
        text = inspect.getdoc(run) or ""
        added = commands.add_parser(
            run.__name__.rstrip("_"),
            help=text.partition("\n")[0],
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run, options=added.format_help)
        return added

    algorithm = next((word for word in words if word in AGENTS), None)
    one = command(train, "diffagents train SRPO mujoco/hopper/medium-v0 --beta 0.1 --eval")
    one.add_argument(
        "algorithm",
        choices=AGENTS,
        help="Name of the algorithm, see `diffagents list`. `diffagents train SRPO --help` lists its hyperparameters.",
        metavar="ALGORITHM",
    )
    one.add_argument(
        "dataset",
        metavar="DATASET",
        help="A Minari id (also hf://owner/name-v0), an .npz file or a D4RL-style .hdf5 file.",
    )
    one.add_argument("--out", type=Path, metavar="FOLDER", help="Where to write. Default: runs/ALGORITHM-DATASET-seedN.")
    one.add_argument("--steps", type=int, metavar="N", help="Total number of gradient steps, split over the stages.")
    one.add_argument(
        "--preset",
        type=value,
        default=argparse.SUPPRESS,
        help='"fast" (default): a recipe for all datasets that takes minutes on a CPU. "none": the algorithm of the paper. '
        'Published settings: "auto" takes the row for the dataset, "paper" also the schedule of the paper, "official_code" the '
        "settings of the released code; or the name of a row.",
    )
    one.add_argument("--seed", type=int, default=0, help="Seed of the agent. Default: 0.")
    one.add_argument("--env", metavar="ID", help="Environment that provides the exact spaces and is used by --eval.")
    one.add_argument("--eval", action="store_true", help="Evaluate the last policy in --env or the dataset's environment.")
    one.add_argument("--episodes", type=int, default=10, metavar="N", help="Number of episodes of --eval. Default: 10.")
    one.add_argument(
        "--evaluations",
        type=int,
        default=8,
        metavar="N",
        help="How often to play 3 episodes while the policy is trained, in --env or the dataset's environment, for the curve "
        "of returns on the card; fewer if they would take more than a twentieth of the time. 0: never. Default: 8.",
    )
    one.add_argument("--video", action="store_true", help="Also render a video of the policy.")
    one.add_argument("--net-arch", type=int, nargs="+", metavar="WIDTH", help="Widths of the hidden layers, e.g. 256 256.")
    one.add_argument("--resume", action="store_true", help="Resume the interrupted run in --out.")
    one.add_argument("--save-every", type=int, metavar="N", help="Write --out every N steps, so that a crash loses little.")
    one.add_argument("--progress", action="store_true", help="Show a progress bar.")
    one.add_argument("--tensorboard", metavar="FOLDER", help="Write TensorBoard logs into this folder.")
    one.add_argument("--quiet", action="store_true", help="Print no training log.")
    one.add_argument(
        "--record-command",
        action="store_true",
        help="Store this command with the policy and show it on its card, without the words that are not known to be harmless.",
    )
    one.add_argument("--device", default="auto", help=DEVICE_HELP)
    one.add_argument("--threads", type=value, default="auto", metavar="N", help=THREADS_HELP)
    add_hyperparameters(one, algorithm)

    one = command(eval_, "diffagents eval me/srpo-hopper --episodes 20 --json | jq .mean_return")
    add_policy(one)
    add_episodes(one)
    one.add_argument("--n-envs", type=int, default=1, metavar="N", help="Number of environments in parallel. Default: 1.")
    one.add_argument("--json", action="store_true", help="Print all results as one line of JSON.")

    one = command(enjoy, "diffagents enjoy me/srpo-hopper --video hopper.mp4")
    add_policy(one)
    add_episodes(one, episodes=1)
    one.add_argument(
        "--video",
        type=Path,
        metavar="FILE.mp4",
        help="Write a video, of 3 seconds or more, instead of opening a window.",
    )

    one = command(push, "diffagents push runs/srpo me/srpo-hopper --eval --video")
    one.add_argument("policy", metavar="POLICY", help=POLICY_HELP)
    one.add_argument("repo_id", metavar="HUB_ID", help="Target repository, organisation/name; created if it does not exist.")
    one.add_argument("--eval", action="store_true", help="Evaluate first, in --env or the dataset's environment.")
    one.add_argument("--env", metavar="ID", help="Id of the environment of --eval.")
    one.add_argument("--episodes", type=int, default=10, metavar="N", help="Number of episodes of --eval. Default: 10.")
    one.add_argument("--video", action="store_true", help="Render a video for the model card.")
    one.add_argument("--private", action="store_true", default=None, help="Create the repository as private.")
    one.add_argument("--revision", metavar="BRANCH", help="Target branch, created if it does not exist. Default: main.")
    one.add_argument("--message", metavar="TEXT", help="Commit message.")
    one.add_argument("--license", default="mit", help="Licence of the policy, as the Hub spells it. Default: mit.")
    one.add_argument("--trainer-state", action="store_true", help="Include the trainer state, so that others can resume.")

    one = command(pull, "diffagents eval $(diffagents pull me/srpo-hopper --to hopper)")
    one.add_argument("repo_id", metavar="HUB_ID", help="Repository, organisation/name.")
    one.add_argument(
        "--to", type=Path, metavar="FOLDER", help="Copy the policy into this folder. Default: only into the cache."
    )
    add_hub(one)

    one = command(list_, "diffagents list runs")
    one.add_argument("where", nargs="?", metavar="WHERE", help="A folder, or an author or organisation on the Hub.")
    one.add_argument("--zoo", action="store_true", help="List the trained policies of the zoo.")
    experiments.add_commands(command)
    return top
