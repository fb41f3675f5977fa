"""An agent as the folder that is published: the artifact, its results, its card, pictures; and that folder on the Hub."""

import datetime
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffagents import errors
from diffagents.errors import ArtifactError, HubError, short
from diffagents.evaluation.evaluate import Evaluation
from diffagents.evaluation.video import record_video
from diffagents.storage import artifact, card, checkpoint, hub
from diffagents.storage.artifact import Artifact
from diffagents.training.state import Learner

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


L = TypeVar("L", bound=Learner)


def save_pretrained(
    learner: Learner,
    folder: str | Path,
    *,
    include_trainer_state: bool = False,
    eval_env: Any = None,
    n_eval_episodes: int = 10,
    video: bool = False,
    license: str = "mit",
    name: str | None = None,
) -> Path:
    """Write the folder that is published; see `Agent.save_pretrained`.

    Args:
        learner: The agent.
        folder: The folder.
        include_trainer_state: As in `Agent.push_to_hub`, like all but the last.
        eval_env: Evaluate in it first.
        n_eval_episodes: Number of episodes.
        video: Render an episode.
        license: Of this policy.
        name: What the card tells people to load; the folder's own name by default.
    """
    learner.require_spec()
    results, notes = _results(learner, eval_env, n_eval_episodes), []
    companions: dict[str, bytes] = {}
    if results is not None:
        companions["results.json"] = json.dumps(artifact.to_json_safe(results, "results"), indent=1).encode() + b"\n"
    try:
        curves = card.draw_curves(learner.state.history, learner.state.provenance.get("evaluations", ()))
        if curves is not None:
            companions["curves.png"] = curves
    except ImportError:
        notes.append('no picture of the curves: matplotlib is missing (pip install "diffagents[plot]")')
    if video:
        replay = _video(learner, eval_env)
        if replay is not None:
            companions["replay.mp4"] = replay
        else:
            notes.append("no video: it could not be rendered where this policy was published")
    config, tensors, state = checkpoint.pack(learner, include_trainer_state)
    name, plain = name or Path(folder).name, artifact.to_json_safe(config)
    text = _card(plain, results, name=name, license=license, pictures=companions, notes=notes)
    companions["README.md"] = _hand_written(_readme(folder)) or text.encode()
    return artifact.write(folder, config, tensors, state, folder=True, companions=companions)


def _card(*config_and_results: Any, **how: Any) -> str:
    try:
        return card.make_card(*config_and_results, **how)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"no card can be made of config.json or results.json ({short(error)}): {errors.AGAIN}") from None


def _results(learner: Learner, eval_env: Any, n_eval_episodes: int) -> dict[str, Any] | None:
    """What results.json holds: the last policy's score if it is evaluated now, and the best one met in training."""
    results: dict[str, Any] = {}
    if eval_env is not None and eval_env is not False:
        made = isinstance(eval_env, Evaluation)
        done: Evaluation = eval_env if made else learner.evaluate(None if eval_env is True else eval_env, n_eval_episodes)
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
    if evaluations := learner.state.provenance.get("evaluations"):
        results["best_in_training"] = max(evaluations, key=lambda row: row["mean_return"])
        results["evaluations_in_training"] = evaluations
    if not results:
        return None
    return {**results, "dataset": (learner.state.dataset_info or {}).get("id"), "training_seed": learner.seed}


def _video(learner: Learner, eval_env: Any) -> bytes | None:
    """One episode in the environment of the evaluation, else of the dataset; None, with a warning, where it cannot be."""
    stored = (learner.state.dataset_info or {}).get("env_spec")
    env = eval_env if isinstance(eval_env, str) else getattr(eval_env, "spec", None) or stored
    if env is None:
        warnings.warn("no video: no environment is known that could be made anew for it", stacklevel=4)
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = record_video(learner, env, Path(folder) / "replay.mp4")
        return None if path is None else path.read_bytes()


def _hand_written(text: bytes | None) -> bytes | None:
    """A README that somebody wrote, or took our mark out of, stays; one of nothing but front matter is none."""
    if text is None or card.MARK.encode() in text:
        return None
    return text if re.sub(rb"\A---\r?\n.*?\r?\n---\s*", b"", text, flags=re.DOTALL).strip() else None


def _readme(folder: str | Path) -> bytes | None:
    path = Path(folder) / "README.md"
    return path.read_bytes() if path.is_file() else None


def find_pretrained(
    where: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Artifact, hub.Origin | None]:
    """The artifact in a folder or .zip that exists, else in the Hub repository of that name: there only what acting needs.

    Args:
        where: A path, or "organisation/name".
        revision: Branch, tag or commit.
        token: For the Hub.
        cache_dir: The Hub's cache.
        local_files_only: From the cache alone.

    Returns:
        The artifact, and the commit that it was downloaded from, None for a path.

    Raises:
        FileNotFoundError: There is nothing of that name, and it is no repository id.
        ValueError: A revision of a path.
        HubError, ArtifactError: The download failed, or it is no artifact.
    """
    path = Path(where)
    if path.exists() or Path(f"{path}.zip").exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for the Hub, but {path} exists here and wins: rename it")
        return artifact.read(path), None
    try:
        origin = hub.resolve(str(where), revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    except ValueError as error:
        raise FileNotFoundError(str(error)) from None
    folder = origin.fetch(hub.ACTING, needed=hub.ACTING)
    with _named_as(origin, folder):
        source = artifact.read(folder)
    return Artifact(source.path, source.config, hub.ACTING), origin


def load_pretrained(
    cls: type[L], found: tuple[Artifact, hub.Origin | None], env: Any, device: Any, overrides: dict[str, Any]
) -> L:
    """The agent in what `find_pretrained` returned; `cls` is its class, the rest as in `Agent.load`."""
    source, origin = found
    with _named_as(origin, source.path):
        learner = checkpoint.unpack(cls, source, device, overrides)
        if env is not None:
            learner.set_env(env)
    if origin is not None:
        learner.origin = origin
        learner.state.provenance |= {"source": {"repo_id": origin.repo_id, "sha": origin.sha}}
    return learner


@contextmanager
def _named_as(origin: hub.Origin | None, folder: Path) -> Iterator[None]:
    """Let an ArtifactError name the repository instead of the folder in the cache."""
    try:
        yield
    except ArtifactError as error:
        if origin is None:
            raise
        raise ArtifactError(str(error).replace(str(folder), str(origin))) from None


def push_to_hub(
    learner: Learner,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    **contents: Any,
) -> "CommitInfo":
    """See `Agent.push_to_hub`; `contents` as in `save_pretrained`."""
    learner.require_spec()
    if learner.origin is not None:
        checkpoint.fetch_learner(learner)  # otherwise the push would remove it from the repository
    push = hub.begin_push(repo_id, private=private, revision=revision, token=token)
    folder = Path(tempfile.mkdtemp(prefix="diffagents-push-"))
    keep = False
    try:
        save_pretrained(learner, folder / "policy", name=repo_id, **contents)
        keep = contents.get("eval_env") is not None or bool(contents.get("video"))
        if theirs := _hand_written(push.readme):
            (folder / "policy" / "README.md").write_bytes(theirs)
        commit = push.commit(folder / "policy", commit_message or f"{type(learner).__name__} trained with diffagents")
        keep = False
    except HubError as error:
        if keep:
            raise HubError(f"{error}. The finished folder is kept: diffagents push {folder / 'policy'} {repo_id}") from error
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
