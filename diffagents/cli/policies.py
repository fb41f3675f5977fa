"""The command `diffagents`: train, eval, enjoy, push, pull, list; collect, bench, tune, select stand in cli_lab.py. Each is a
thin line over one call of the library.

Results go to stdout, everything else to stderr, so that commands work in pipes. Exit codes: 0 done, 1 failed (one line says
why), 2 not understood, 130 interrupted by Ctrl-C, 141 nobody reads the output any more.
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

import diffagents
from diffagents.cli.options import (
    env_arguments,
    environment,
    given_hyperparameters,
    policy,
    say,
)

# ---- the commands: their docstrings are their --help -----------------------------------------------------------------


def train(given: argparse.Namespace) -> None:
    """Train an algorithm on a dataset and write the policy as a folder, whose path is printed.

    Ctrl-C keeps what has been trained; `--resume` then finishes the same run.
    """
    out = given.out or Path("runs") / re.sub(r"[^-.\w]+", "-", f"{given.algorithm.lower()}-{given.dataset}-seed{given.seed}")
    if given.save_every is not None and given.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, not {given.save_every}")
    hyperparameters = given_hyperparameters(given)
    cls: Any = getattr(diffagents, given.algorithm)
    settings = {"device": given.device, "verbose": int(not given.quiet), "tensorboard_log": given.tensorboard}
    if given.resume:
        if hyperparameters or given.preset or given.net_arch or given.steps:
            raise ValueError(
                "--resume finishes the run as it was planned: leave out hyperparameters, --preset, --net-arch and --steps"
            )
        del settings["device"]
        agent = cls.load(out, env=given.env, device=given.device, **settings)
    elif out.exists():
        raise FileExistsError(f"{out} exists: finish it with --resume, or give another --out")
    else:
        kwargs = {"net_arch": given.net_arch} if given.net_arch else None
        settings |= {"env": given.env, "preset": given.preset, "policy_kwargs": kwargs, "seed": given.seed}
        agent = cls(**settings, **hyperparameters)
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
                say(f"saved in {out}; to continue, repeat the command with --resume and without hyperparameters")
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
    from diffagents.envs.make import make_env

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
        from diffagents.registry import push_folder

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
    from diffagents.storage import hub

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
        from diffagents.storage import hub

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
    from diffagents import errors
    from diffagents.storage import artifact

    places = {found.parent for depth in ("", "*/", "*/*/", "*/*/*/") for found in folder.glob(f"{depth}{artifact.CONFIG}")}
    for place in sorted({*places, *folder.glob("**/*.zip")}):
        with contextlib.suppress(diffagents.ArtifactError, OSError):
            config = artifact.read(place).config
            data = config.get("dataset") if isinstance(config.get("dataset"), dict) else None
            yield place, errors.short(config["algorithm"]), errors.short((data or {}).get("id", "-")), _score(place)


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
    from diffagents.storage import artifact

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
