"""An agent as the folder that is published: the artifact, its results, its card, pictures; and that folder on the Hub."""

import datetime
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffagents import errors
from diffagents.errors import ArtifactError, short
from diffagents.evaluation.evaluate import Evaluation
from diffagents.evaluation.video import record_video
from diffagents.storage import artifact, card, checkpoint, hub

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from diffagents.agent import Agent


class How(NamedTuple):
    """What to put into the folder: the arguments of `Agent.push_to_hub` of these names."""

    include_trainer_state: bool
    eval_env: Any
    n_eval_episodes: int
    video: bool
    license: str


def save_pretrained(agent: "Agent", folder: str | Path, how: How, name: str | None = None) -> Path:
    """See `Agent.save_pretrained`. name: what the card tells people to load; None: the folder's own name."""
    agent._need_networks()
    results, notes = _results(agent, how.eval_env, how.n_eval_episodes), []
    companions: dict[str, bytes] = {}
    if results is not None:
        companions["results.json"] = json.dumps(artifact.to_json_safe(results, "results"), indent=1).encode() + b"\n"
    try:
        curves = card.draw_curves(agent.history, agent.provenance.get("evaluations", ()))
        if curves is not None:
            companions["curves.png"] = curves
    except ImportError:
        notes.append('no picture of the curves: matplotlib is missing (pip install "diffagents[plot]")')
    if how.video:
        replay = _video(agent, how.eval_env)
        if replay is not None:
            companions["replay.mp4"] = replay
        else:
            notes.append("no video: it could not be rendered where this policy was published")
    config, tensors, state = checkpoint.pack(agent, how.include_trainer_state)
    name, plain = name or Path(folder).name, artifact.to_json_safe(config)
    text = _card(plain, results, name=name, license=how.license, pictures=companions, notes=notes)
    companions["README.md"] = _hand_written(_readme(folder)) or text.encode()
    return artifact.write(folder, config, tensors, state, folder=True, companions=companions)


def _card(*config_and_results: Any, **how: Any) -> str:
    try:
        return card.make_card(*config_and_results, **how)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"no card can be made of config.json or results.json ({short(error)}): {errors.AGAIN}") from None


def _results(agent: "Agent", eval_env: Any, n_eval_episodes: int) -> dict[str, Any] | None:
    """What results.json holds: the last policy's score if it is evaluated now, and the best one met in training."""
    results: dict[str, Any] = {}
    if eval_env is not None and eval_env is not False:
        made = isinstance(eval_env, Evaluation)
        done: Evaluation = eval_env if made else agent.evaluate(None if eval_env is True else eval_env, n_eval_episodes)
        results = {
            "mean_reward": done.mean_return,
            "std_reward": done.std_return,
            "is_deterministic": done.deterministic,
            "n_eval_episodes": len(done.returns),
            "eval_datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "checkpoint": "last",
            "normalized_score": done.score,
            **{key: value for key, value in done.to_json().items() if key not in ("mean_return", "std_return", "score")},
        }
    if evaluations := agent.provenance.get("evaluations"):
        results["best_in_training"] = max(evaluations, key=lambda row: row["mean_return"])
        results["evaluations_in_training"] = evaluations
    if not results:
        return None
    return {**results, "dataset": (agent.dataset_info or {}).get("id"), "training_seed": agent.seed}


def _video(agent: "Agent", eval_env: Any) -> bytes | None:
    """One episode in the environment of the evaluation, else of the dataset; None, with a warning, where it cannot be."""
    stored = (agent.dataset_info or {}).get("env_spec")
    env = eval_env if isinstance(eval_env, str) else getattr(eval_env, "spec", None) or stored
    if env is None:
        warnings.warn("no video: no environment is known that could be made anew for it", stacklevel=4)
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = record_video(agent, env, Path(folder) / "replay.mp4")
        return None if path is None else path.read_bytes()


def _hand_written(text: bytes | None) -> bytes | None:
    """A README that somebody wrote, or took our mark out of, stays; one of nothing but front matter is none."""
    if text is None or card.MARK.encode() in text:
        return None
    return text if re.sub(rb"\A---\r?\n.*?\r?\n---\s*", b"", text, flags=re.DOTALL).strip() else None


def _readme(folder: str | Path) -> bytes | None:
    path = Path(folder) / "README.md"
    return path.read_bytes() if path.is_file() else None


def open_pretrained(
    class_of: Callable[[artifact.Artifact], "type[Agent]"],
    where: str | Path,
    revision: str | None,
    how: dict[str, Any],
    load: dict[str, Any],
) -> "Agent":
    """The agent in a folder or .zip that exists, else in the Hub repository of that name: there at first what acting needs.

    class_of: the agent's class. how: token, cache_dir, local_files_only. load: what `Agent.load` takes.
    """
    path = Path(where)
    if path.exists() or Path(f"{path}.zip").exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for the Hub, but {path} exists here and wins: rename it")
        source = artifact.read(path)
        return class_of(source).load(source.path, **load)
    try:
        origin = hub.resolve(str(where), revision, **how)
    except ValueError as error:
        raise FileNotFoundError(str(error)) from None
    folder = origin.fetch(hub.ACTING, needed=hub.ACTING)
    try:
        source = artifact.read(folder)
        source = artifact.Artifact(source.path, source.config, hub.ACTING)
        env, device, overrides = load.get("env"), load.get("device", "auto"), load.keys() - {"env", "device"}
        agent: Agent = checkpoint.unpack(class_of(source), source, device, {name: load[name] for name in overrides})
        if env is not None:
            agent.set_env(env)
    except ArtifactError as error:
        raise ArtifactError(str(error).replace(str(folder), str(origin))) from None
    agent.origin = origin
    agent.provenance = {**agent.provenance, "source": {"repo_id": origin.repo_id, "sha": origin.sha}}
    return agent


def push_to_hub(
    agent: "Agent",
    repo_id: str,
    how: How,
    private: bool | None,
    revision: str | None,
    commit_message: str | None,
    token: str | bool | None,
) -> "CommitInfo":
    """See `Agent.push_to_hub`."""
    agent._need_networks()
    if agent.origin is not None:
        checkpoint.need_learner(agent)  # else the push would take it out of the repository
    push = hub.begin_push(repo_id, private=private, revision=revision, token=token)
    folder = Path(tempfile.mkdtemp(prefix="diffagents-push-"))
    keep = False
    try:
        save_pretrained(agent, folder / "policy", how, name=repo_id)
        keep = how.eval_env is not None or how.video
        if theirs := _hand_written(push.readme):
            (folder / "policy" / "README.md").write_bytes(theirs)
        commit = push.commit(folder / "policy", commit_message or f"{type(agent).__name__} trained with diffagents")
        keep = False
    except errors.HubError as error:
        if keep:
            raise errors.HubError(
                f"{error}. The finished folder is kept: diffagents push {folder / 'policy'} {repo_id}"
            ) from error
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return commit


def renew_card(folder: Path, name: str) -> None:
    """Write the README.md of a folder anew, for people who load it as `name`, unless it was written by hand."""
    if _hand_written(_readme(folder)) is not None:
        return
    results = artifact.read_json(folder, "results.json") if (folder / "results.json").is_file() else None
    pictures = [file for file in artifact.COMPANIONS if (folder / file).is_file()]
    said = re.search(r"^license: (\S+)$", (folder / "README.md").read_text() if "README.md" in pictures else "", re.M)
    license, config = said[1] if said else "mit", artifact.read(folder).config
    text = _card(config, results, name=name, license=license, pictures=pictures)
    (folder / "README.md").write_text(text)
