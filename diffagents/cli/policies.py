"""The command `diffagents`: train, eval, enjoy, push, pull, list; collect, bench, tune, select stand in cli_lab.py. Each is a
thin line over one call of the library.

Results go to stdout, everything else to stderr, so that commands work in pipes. Exit codes: 0 done, 1 failed (one line says
why), 2 not understood, 130 interrupted by Ctrl-C, 141 nobody reads the output any more.
"""

import argparse
import contextlib
import inspect
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffagents
from diffagents import cli_lab
from diffagents.cli_options import (
    POLICY_HELP,
    add_episodes,
    add_hub,
    add_knobs,
    add_policy,
    env_arguments,
    environment,
    policy,
    say,
)


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
    """The whole command line. `arguments`: where an algorithm is among them, `train` also takes its knobs."""
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
        help="see `diffagents list`; `diffagents train SRPO --help` lists its knobs",
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
    add_knobs(one, algorithm)

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
    cli_lab.add_commands(command)
    return top


# ---- the commands: their docstrings are their --help -----------------------------------------------------------------


def train(given: argparse.Namespace) -> None:
    """Train an algorithm on a dataset and write the policy as a folder, whose path is printed.

    Ctrl-C keeps what has been trained; `--resume` then finishes the same run.
    """
    out = given.out or Path("runs") / re.sub(r"[^-.\w]+", "-", f"{given.algorithm.lower()}-{given.dataset}-seed{given.seed}")
    if given.save_every is not None and given.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, not {given.save_every}")
    knobs = {name.removeprefix("knob "): value for name, value in vars(given).items() if name.startswith("knob ")}
    cls: Any = getattr(diffagents, given.algorithm)
    settings = {"device": given.device, "verbose": int(not given.quiet), "tensorboard_log": given.tensorboard}
    if given.resume:
        if knobs or given.preset or given.net_arch or given.steps:
            raise ValueError("--resume finishes the run as it was planned: leave knobs, --preset, --net-arch and --steps out")
        del settings["device"]
        agent = cls.load(out, env=given.env, device=given.device, **settings)
    elif out.exists():
        raise FileExistsError(f"{out} exists: finish it with --resume, or give another --out")
    else:
        kwargs = {"net_arch": given.net_arch} if given.net_arch else None
        agent = cls(env=given.env, preset=given.preset, policy_kwargs=kwargs, seed=given.seed, **settings, **knobs)
    evaluated = {"eval_env": (given.env or True) if given.eval else None, "n_eval_episodes": given.episodes}

    def save_now_and_then(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if agent.num_timesteps % given.save_every == 0:
            agent.save_pretrained(out, include_trainer_state=True)
        return True

    callback = save_now_and_then if given.save_every is not None else None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            agent.learn(given.dataset, given.steps, callback, progress_bar=given.progress, reset_num_timesteps=not given.resume)
        except (KeyboardInterrupt, diffagents.TrainingDiverged):
            if agent.spec is not None:
                agent.save_pretrained(out, include_trainer_state=True)
                say(f"what there is lies in {out}; go on with the same command and --resume, knobs left out")
            raise
        agent.save_pretrained(out, include_trainer_state=True)  # before anything else can fail
        if given.eval or given.video:
            agent.save_pretrained(out, include_trainer_state=True, video=given.video, **evaluated)
    print(out)


def eval_(given: argparse.Namespace) -> None:
    """Play whole episodes and print the return, with its interval, the D4RL scale and the success rate where there are any."""
    found = policy(given).evaluate(
        given.env,
        given.episodes,
        seed=given.seed,
        deterministic=not given.sampled,
        n_envs=given.n_envs,
        env_kwargs=env_arguments(given) or None,
    )
    print(json.dumps(found.to_json()) if given.json else found)


def enjoy(given: argparse.Namespace) -> None:
    """Watch a policy: in a window, or as a video."""
    from diffagents.environments import make_env

    agent = policy(given)
    env = environment(given, agent)
    if given.video is not None:
        settings: dict[str, Any] = {"seed": given.seed, "deterministic": not given.sampled, "env_kwargs": env_arguments(given)}
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            path = diffagents.record_video(agent, env, given.video, **settings)
        print(path)
        return
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ValueError("there is no screen here: give --video FILE.mp4")
    with contextlib.closing(make_env(env, render_mode="human", **env_arguments(given))) as window:
        print(agent.evaluate(window, given.episodes, seed=given.seed, deterministic=not given.sampled))


def push(given: argparse.Namespace) -> None:
    """Publish a policy on the Hugging Face Hub in one commit, whose address is printed.

    Log in first: `hf auth login`, or the variable HF_TOKEN.
    """
    commit = {"private": given.private, "revision": given.revision, "commit_message": given.message}
    local = Path(given.policy)
    if local.is_dir() and not (given.eval or given.video or given.trainer_state):
        from diffagents.publish import push_folder

        print(push_folder(local, given.repo_id, **commit).commit_url)
        return
    agent = policy(argparse.Namespace(policy=given.policy))
    print(
        agent.push_to_hub(
            given.repo_id,
            eval_env=(given.env or True) if given.eval else None,
            n_eval_episodes=given.episodes,
            video=given.video,
            license=given.license,
            include_trainer_state=given.trainer_state,
            **commit,
        ).commit_url
    )


def pull(given: argparse.Namespace) -> None:
    """Fetch a policy from the Hugging Face Hub, the whole of it, and print the folder where it lies."""
    from diffagents import hub

    print(hub.pull(given.repo_id, given.to, given.revision, local_files_only=given.offline))


def list_(given: argparse.Namespace) -> None:
    """List the algorithms; or the policies in a folder, or of the zoo; or those of an author on the Hub."""
    if given.zoo:
        given.where = _zoo()
    if given.where is None:
        rows: Iterator[Sequence[Any]] = (
            (name, (getattr(diffagents, name).__doc__ or "").partition("\n")[0]) for name in diffagents.AGENTS
        )
    elif Path(given.where).is_dir():
        rows = _local_policies(Path(given.where))
    else:
        from diffagents import hub

        rows = (
            (name, *sorted(set(tags) & set(diffagents.AGENTS)), _env_tag(tags)) for name, tags in hub.list_policies(given.where)
        )
    found = 0
    for found, row in enumerate(rows, start=1):  # noqa: B007
        print("\t".join(str(item) for item in row))
    if not found:
        say(f"no policy of diffagents in {given.where}")


def _local_policies(folder: Path) -> Iterator[Sequence[Any]]:
    """(path, algorithm, dataset, score) of every artifact below, at most three folders deep."""
    from diffagents import artifact

    places = {found.parent for depth in ("", "*/", "*/*/", "*/*/*/") for found in folder.glob(f"{depth}{artifact.CONFIG}")}
    for place in sorted({*places, *folder.glob("**/*.zip")}):
        with contextlib.suppress(diffagents.ArtifactError, OSError):
            config = artifact.read(place).config
            data = config.get("dataset") if isinstance(config.get("dataset"), dict) else None
            yield place, artifact.short(config["algorithm"]), artifact.short((data or {}).get("id", "-")), _score(place)


def _zoo() -> Path:
    """The folder `zoo` of the checkout, as one would type it from here."""
    folder = Path(diffagents.__file__).resolve().parents[1] / "zoo"
    if not any(folder.glob("*/config.json")):
        raise ValueError(
            "there is no zoo beside this installation: its policies lie in a checkout of the repository, in zoo/; "
            "published ones are listed by `diffagents list ORGANISATION`"
        )
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _score(place: Path) -> str:
    from diffagents import artifact

    with contextlib.suppress(diffagents.ArtifactError, OSError, KeyError, TypeError, ValueError):
        results = artifact.read_json(place, "results.json")
        told = f"return {results['mean_reward']:.2f} ± {results['std_reward']:.2f}"
        if results.get("normalized_score") is not None:
            told += f"; D4RL scale {results['normalized_score']:.1f}"
        if results.get("success_rate") is not None:
            told += f"; success {100 * results['success_rate']:.0f} %"
        return told
    return "not evaluated"


def _env_tag(tags: Sequence[str]) -> str:
    return next((tag for tag in tags if re.search(r"-v\d+$", tag)), "-")


if __name__ == "__main__":
    sys.exit(main())
