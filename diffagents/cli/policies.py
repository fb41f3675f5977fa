"""Commands for one policy: train, eval, enjoy, push, pull and list. Each is a thin layer over one call of the library.

Their docstrings are the texts of --help.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffagents.cli.options import check_new_folder, env_arguments, environment, hyperparameters, policy, preset, say
from diffagents.errors import ArtifactError, TrainingDiverged, printable, short
from diffagents.registry import AGENTS, agent_class


def train(args: argparse.Namespace) -> None:
    """Train an algorithm on a dataset, save the policy as a folder and print its path.

    Ctrl-C saves the progress; the same command with --resume, without hyperparameters and --steps, then finishes the run.
    """
    out = args.out or Path("runs") / re.sub(r"[^-.\w]+", "-", f"{args.algorithm.lower()}-{args.dataset}-seed{args.seed}")
    if args.save_every is not None and args.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, not {args.save_every}")
    from diffagents.data.load import load_dataset  # these two import torch, for which --help need not wait
    from diffagents.training.curve_callback import CurveCallback

    values = hyperparameters(args)
    cls: Any = agent_class(args.algorithm)
    settings = {"device": args.device, "verbose": int(not args.quiet), "tensorboard_log": args.tensorboard}
    settings |= {"threads": args.threads, "record_command": args.record_command}
    chosen = preset(args)
    if args.resume:
        if values or chosen or args.net_arch or args.steps:
            raise ValueError("--resume continues the run as planned: omit hyperparameters, --preset, --net-arch and --steps")
        del settings["device"]
        agent = cls.load(out, env=args.env, device=args.device, **settings)
    elif out.exists():
        raise FileExistsError(f"{out} exists: resume it with --resume, or pass another --out")
    else:
        check_new_folder(out, tensorboard=args.tensorboard)
        kwargs = {"net_arch": args.net_arch} if args.net_arch else None
        agent = cls(env=args.env, policy_kwargs=kwargs, seed=args.seed, **chosen, **settings, **values)

    dataset = args.dataset
    if (args.eval or args.video) and args.env is None:
        with contextlib.redirect_stdout(sys.stderr):
            dataset = load_dataset(dataset, env=agent.env, obs_keys=agent.obs_keys, verbose=agent.verbose)
        if dataset.info.get("env_spec") is None:
            wanted = " and ".join(option for option, given in (("--eval", args.eval), ("--video", args.video)) if given)
            raise ValueError(f"{wanted} plays episodes, but no environment is stored with {args.dataset}: pass --env ID")

    def save_regularly(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if agent.num_timesteps % args.save_every == 0:
            agent.save_pretrained(out, include_trainer_state=True)
        return True

    # The environment of --env, else of the dataset, which is known only when the dataset has been loaded.
    watching: list[Any] = [CurveCallback(args.env, points=args.evaluations)] if args.evaluations else []
    callback = [*watching, *([save_regularly] if args.save_every is not None else [])] or None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            agent.learn(dataset, args.steps, callback, progress_bar=args.progress, reset_num_timesteps=not args.resume)
        except (KeyboardInterrupt, TrainingDiverged):
            if agent.spec is not None:
                agent.save_pretrained(out, include_trainer_state=True)
                say(
                    f"progress saved in {out}; continue with the same command and --resume, without hyperparameters and --steps"
                )
            raise
        agent.save_pretrained(out, include_trainer_state=True)  # before the evaluation, which may fail
        if args.eval or args.video:
            evaluated = {"eval_env": (args.env or True) if args.eval else None, "n_eval_episodes": args.episodes}
            agent.save_pretrained(out, include_trainer_state=True, video=args.video, **evaluated)
        if args.eval:
            from diffagents.evaluation.evaluate import Evaluation
            from diffagents.storage import artifact

            print(Evaluation.from_json(artifact.read_json(out, "results.json")), flush=True)
    print(out)


def eval_(args: argparse.Namespace) -> None:
    """Play whole episodes and print the return with its interval, and the D4RL score and success rate if they exist."""
    result = policy(args).evaluate(
        args.env,
        args.episodes,
        seed=args.seed,
        deterministic=args.deterministic,
        n_envs=args.n_envs,
        env_kwargs=env_arguments(args) or None,
    )
    print(json.dumps(result.to_json()) if args.json else result)


def enjoy(args: argparse.Namespace) -> None:
    """Watch a policy in a window, or write a video."""
    from diffagents.envs.make import make_env
    from diffagents.evaluation.video import record_video

    agent = policy(args)
    env = environment(args, agent)
    if args.video is not None:
        settings: dict[str, Any] = {"seed": args.seed, "deterministic": args.deterministic, "env_kwargs": env_arguments(args)}
        settings["verbose"] = 1
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            path = record_video(agent, env, args.video, **settings)
        print(path)
        return
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ValueError("no screen is available: pass --video FILE.mp4")
    with contextlib.closing(make_env(env, render_mode="human", **env_arguments(args))) as window:
        print(agent.evaluate(window, args.episodes, seed=args.seed, deterministic=args.deterministic))


def push(args: argparse.Namespace) -> None:
    """Publish a policy on the Hugging Face Hub in one commit and print its URL.

    Log in first with `hf auth login`, or set the environment variable HF_TOKEN.
    """
    commit = {"private": args.private, "revision": args.revision, "commit_message": args.message}
    local = Path(args.policy)
    if local.is_dir() and not (args.eval or args.video or args.trainer_state):
        from diffagents.registry import push_folder

        with contextlib.redirect_stdout(sys.stderr):
            done = push_folder(local, args.repo_id, **commit)
    else:
        agent = policy(argparse.Namespace(policy=args.policy))
        agent.verbose = 1
        contents = {
            "eval_env": (args.env or True) if args.eval else None,
            "n_eval_episodes": args.episodes,
            "video": args.video,
            "license": args.license,
            "include_trainer_state": args.trainer_state,
        }
        with contextlib.redirect_stdout(sys.stderr):
            done = agent.push_to_hub(args.repo_id, **contents, **commit)
    print(done.commit_url)


def pull(args: argparse.Namespace) -> None:
    """Download a complete policy from the Hugging Face Hub and print its folder."""
    from diffagents.storage import hub

    print(hub.pull(args.repo_id, args.to, args.revision, local_files_only=args.offline))


def list_(args: argparse.Namespace) -> None:
    """List the algorithms, or the policies in a folder, in the zoo, or of an author on the Hub."""
    if args.zoo:
        rows: Iterator[Sequence[Any]] = _zoo()
        args.where = "the zoo"
    elif args.where is None:
        rows = ((name, (agent_class(name).__doc__ or "").partition("\n")[0]) for name in AGENTS)
    elif Path(args.where).is_dir():
        rows = _local_policies(Path(args.where))
    else:
        rows = _published(args.where)
    count = 0
    for count, row in enumerate(rows, start=1):  # noqa: B007
        print("\t".join(printable(item) for item in row))
    if not count:
        say(f"there is no policy of diffagents in {args.where}")


def _local_policies(folder: Path) -> Iterator[Sequence[Any]]:
    """(path, algorithm, dataset, score) of every policy in a folder, at most three levels deep."""
    from diffagents.storage import artifact

    places = {path.parent for depth in ("", "*/", "*/*/", "*/*/*/") for path in folder.glob(f"{depth}{artifact.CONFIG}")}
    for place in sorted({*places, *folder.glob("**/*.zip")}):
        with contextlib.suppress(ArtifactError, OSError):
            config = artifact.read(place).config
            data = config.get("dataset") if isinstance(config.get("dataset"), dict) else None
            yield place, short(config["algorithm"]), short((data or {}).get("id", "-")), _score(place)


def _zoo() -> Iterator[Sequence[Any]]:
    """(zoo/<name>, algorithm, dataset, score) of every policy of the zoo here, then those of its organisation, if set."""
    from diffagents.storage import hub

    found: dict[str, Sequence[Any]] = {}
    for folder in hub.zoo_folders():
        for place, *rest in _local_policies(folder):
            if place.parent == folder:
                found.setdefault(place.name, (f"{hub.ZOO}/{place.name}", *rest))
    yield from (found[name] for name in sorted(found))
    if (organisation := hub.zoo_organisation()) is not None:
        yield from _published(organisation)


def _published(author: str) -> Iterator[Sequence[Any]]:
    """(id, algorithm, environment) of every policy that an author or organisation has published on the Hub."""
    from diffagents.storage import hub

    for name, tags in hub.list_policies(author):
        yield name, *sorted(set(tags) & set(AGENTS)), _env_tag(tags)


def _score(place: Path) -> str:
    """The results stored with a policy, in one line."""
    from diffagents.storage import artifact

    with contextlib.suppress(ArtifactError, OSError, KeyError, TypeError, ValueError):
        results = artifact.read_json(place, "results.json")
        line = f"return {results['mean_reward']:.2f} ± {results['std_reward']:.2f}"
        if results.get("normalized_score") is not None:
            line += f"; D4RL scale {results['normalized_score']:.1f}"
        if results.get("success_rate") is not None:
            line += f"; success {100 * results['success_rate']:.0f} %"
        return line
    return "not evaluated"


def _env_tag(tags: Sequence[str]) -> str:
    """The environment id among the tags of a Hub repository, else a dash."""
    return next((tag for tag in tags if re.search(r"-v\d+$", tag)), "-")
