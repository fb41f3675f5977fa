"""Publishes an agent: writes the folder with the artifact, its results, model card and pictures, and pushes it to the Hub."""

import datetime
import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagents import errors
from diffagents.errors import ArtifactError, HubError, printable, short
from diffagents.evaluation.curves import draw_curves
from diffagents.evaluation.evaluate import Evaluation
from diffagents.evaluation.video import record_video
from diffagents.files import replacing, scratch_folder
from diffagents.storage import artifact, card, checkpoint, hub
from diffagents.training.state import Learner

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


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
    """Write the folder that `push_to_hub` uploads: the artifact, README.md (the model card), results.json and pictures.

    Args:
        learner: The agent.
        folder: The folder. A README.md in it that was not generated here is kept.
        include_trainer_state: Include what others need to resume training.
        eval_env: The environment to evaluate the agent in (an id, an environment, or True for the dataset's own), or an
            existing Evaluation; None: no evaluation.
        n_eval_episodes: Number of episodes of the evaluation.
        video: Render an episode; if that fails, there is a warning and no video.
        license: Licence of the policy, as the Hub spells it.
        name: The name by which the card loads the policy; None: the name of the folder.

    Returns:
        The folder.

    Raises:
        RuntimeError: The agent has no networks yet.
        ArtifactError: The card cannot be made from config.json and results.json.
        OSError: The folder cannot be written; what was there before is unchanged.
    """
    learner.require_spec()
    results, notes = _results(learner, eval_env, n_eval_episodes), []
    companions: dict[str, bytes] = {}
    if results is not None:
        companions["results.json"] = json.dumps(artifact.to_json_safe(results, "results"), indent=1).encode() + b"\n"
    try:
        curves = draw_curves(learner)
        if curves is not None:
            companions["curves.png"] = curves
    except ImportError:
        notes.append("there is no picture of the curves because matplotlib is missing (pip install matplotlib)")
    if video:
        replay = _video(learner, eval_env)
        if replay is not None:
            companions["replay.mp4"] = replay
        else:
            notes.append("there is no video because it could not be rendered where this policy was published")
    config, tensors, state = checkpoint.pack(learner, include_trainer_state)
    name, plain = name or Path(folder).name, artifact.to_json_safe(config)
    notes += [] if "learner" in tensors else [card.ACTS_ONLY]
    text = _make_card(plain, results, name=name, license=license, pictures=companions, notes=notes)
    companions["README.md"] = _hand_written(_readme(folder)) or text.encode()
    return artifact.write(folder, config, tensors, state, folder=True, companions=companions)


def _make_card(config: Mapping[str, Any], results: Mapping[str, Any] | None, **settings: Any) -> str:
    """`card.make_card`, which trusts its input, for a config and results that may come from a stranger's files."""
    try:
        return card.make_card(config, results, **settings)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ArtifactError(
            f"the model card cannot be made from config.json and results.json ({short(error)}): {errors.AGAIN}"
        ) from None


def _results(learner: Learner, eval_env: Any, n_eval_episodes: int) -> dict[str, Any] | None:
    """The content of results.json: the agent's score if it is evaluated now, and the evaluations during training."""
    results: dict[str, Any] = {}
    if eval_env is not None and eval_env is not False:
        if isinstance(eval_env, Evaluation):
            done = eval_env
        else:
            done = learner.evaluate(None if eval_env is True else eval_env, n_eval_episodes)
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
    """An MP4 of one episode in the environment of the evaluation or the dataset; None, with a warning, if that fails."""
    stored = (learner.state.dataset_info or {}).get("env_spec")
    env = eval_env if isinstance(eval_env, str) else getattr(eval_env, "spec", None) or stored
    if env is None:
        warnings.warn(
            "no video was made, because no environment is known that could be created for it: pass eval_env as an id",
            stacklevel=4,
        )
        return None
    with scratch_folder(Path(tempfile.gettempdir()) / "video") as folder:
        path = record_video(learner, env, folder / "replay.mp4")
        return None if path is None else path.read_bytes()


def _hand_written(text: bytes | None) -> bytes | None:
    """The text of a README if it is to be kept: not marked as generated, and more than front matter. None otherwise."""
    if text is None or card.MARK.encode() in text:
        return None
    return text if re.sub(rb"\A---\r?\n.*?\r?\n---\s*", b"", text, flags=re.DOTALL).strip() else None


def _readme(folder: str | Path) -> bytes | None:
    """The README.md of a folder; None if it has none."""
    path = Path(folder).expanduser() / "README.md"
    return path.read_bytes() if path.is_file() else None


def what_is_published(folder: Path, repo_id: str) -> str:
    """What a push of this folder makes public, in words, to be shown before it: its files, and what users may not expect."""
    config = artifact.read(folder).config
    provenance = config.get("provenance") or {}
    env, commands, source = card.stored_env(config), provenance.get("commands") or (), provenance.get("source")
    parts = [
        f"publishing to {repo_id}: {', '.join(file.name for file in hub.publishable(folder))}",
        *([f"environment: {env}"] if env else []),
        *([f"started from: {source.get('repo_id')}"] if isinstance(source, dict) else []),
        *(f"command: {command}" for command in commands),
    ]
    return printable("; ".join(parts))


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
    """Publish the policy as a model repository of the Hugging Face Hub, in one commit.

    With `verbose` of the agent, what becomes public is printed before.

    Args:
        learner: The agent. If it was downloaded to act only, its other networks are downloaded now.
        repo_id: "organisation/name".
        private: Make a new repository private; None leaves the choice to the account's settings.
        revision: A branch, created if it does not exist.
        commit_message: Message of the commit; None names the algorithm.
        token: None: that of `hf auth login` or HF_TOKEN.
        contents: The keyword arguments of `save_pretrained` except `name`.

    Returns:
        The commit.

    Raises:
        ValueError: Not a valid repository id.
        HubError: As in `Agent.push_to_hub`.
    """
    learner.require_spec()
    if learner.origin is not None:
        checkpoint.fetch_training_networks(learner)  # otherwise the push would remove it from the repository
    repository = hub.Repository.open(repo_id, private=private, revision=revision, token=token)
    with scratch_folder(Path(tempfile.gettempdir()) / "push") as scratch:
        folder = scratch / "policy"
        save_pretrained(learner, folder, name=repo_id, **contents)
        if theirs := _hand_written(repository.readme):
            with replacing(folder / "README.md", "the model card") as part:
                part.write_bytes(theirs)
        if learner.verbose:
            print(what_is_published(folder, repo_id), flush=True)
        try:
            return repository.commit(folder, commit_message or f"{type(learner).__name__} trained with diffagents")
        except HubError as error:
            if contents.get("eval_env") is None and not contents.get("video"):
                raise
            kept = Path(tempfile.mkdtemp(prefix="diffagents-push-")) / "policy"  # evaluating it took time
            folder.rename(kept)
            raise HubError(f"{error}. The finished folder is kept: diffagents push {kept} {repo_id}") from error


def renew_card(folder: Path, name: str) -> None:
    """Rewrite the model card of a folder, unless it was edited and its mark removed.

    Args:
        folder: A folder that `save_pretrained` wrote.
        name: The name by which the card loads the policy.

    Raises:
        ArtifactError: config.json or results.json is damaged.
    """
    if _hand_written(_readme(folder)) is not None:
        return
    results = artifact.read_json(folder, "results.json") if (folder / "results.json").is_file() else None
    pictures = [file for file in artifact.COMPANIONS if (folder / file).is_file()]
    stated = re.search(r"^license: (\S+)$", (_readme(folder) or b"").decode(errors="replace"), re.M)
    license, config = stated[1] if stated else "mit", artifact.read(folder).config
    notes = [] if (folder / "learner.safetensors").is_file() else [card.ACTS_ONLY]
    text = _make_card(config, results, name=name, license=license, pictures=pictures, notes=notes)
    with replacing(folder / "README.md", "the model card") as part:
        part.write_text(text, encoding="utf-8")
