"""The algorithms by name; loading and publishing an agent of whatever algorithm a file holds.

Importing this module is quick: what it needs is imported when it is called.
"""

import importlib
import pathlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from diffagents.agent import Agent
    from diffagents.storage.artifact import Artifact

AGENTS = {
    "SRPO": "diffagents.agents.srpo",
    "DiffusionQL": "diffagents.agents.diffusion_ql",
    "DiffCPS": "diffagents.agents.diffcps",
    "BDPO": "diffagents.agents.bdpo",
    "QGPO": "diffagents.agents.qgpo",
    "SfBC": "diffagents.agents.sfbc",
    "DiffusionBC": "diffagents.agents.diffusion_bc",
    "BC": "diffagents.agents.bc",
    "IDQL": "diffagents.agents.idql",
    "IQL": "diffagents.agents.iql",
    "TD3BC": "diffagents.agents.td3_bc",
    "AWR": "diffagents.agents.awr",
}
"""Algorithm name -> the module that holds the class of that name; it is imported on first use."""


def agent_class(algorithm: str) -> "type[Agent]":
    """The class of an algorithm.

    Args:
        algorithm: a key of `AGENTS`.

    Raises:
        ValueError: for any other name.
    """
    if algorithm not in AGENTS:
        raise ValueError(f"algorithm={algorithm!r}; choose from {', '.join(AGENTS)}")
    cls: type[Agent] = getattr(importlib.import_module(AGENTS[algorithm]), algorithm)
    return cls


def load(
    path: str | pathlib.Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | pathlib.Path | None = None,
    local_files_only: bool = False,
    env: Any = None,
    device: Any = "auto",
    **overrides: Any,
) -> "Agent":
    """Load an agent of whatever algorithm a folder, a .zip or a Hub repository holds.

    Args:
        path: A folder or .zip that exists, else "organisation/name" on the Hub.
        revision: As in `Agent.from_pretrained`, like all that follow.
        token: For the Hub.
        cache_dir: The Hub's cache.
        local_files_only: From the cache alone.
        env: As in `Agent.load`.
        device: As in `Agent.load`.
        overrides: As in `Agent.load`.

    Raises:
        FileNotFoundError: There is nothing of that name.
        HubError: No such repository, no access, no connection.
        ArtifactError: It is no policy of ours, damaged, or from a newer version; the message says what to do.
    """
    from diffagents.storage import publish

    found = publish.find_pretrained(path, revision, token, cache_dir, local_files_only)
    return publish.load_pretrained(class_of(found[0]), found, env, device, overrides)


def class_of(source: "Artifact") -> "type[Agent]":
    """The class of the algorithm that an artifact holds. Raises ArtifactError if this version does not know it."""
    from diffagents.errors import ArtifactError, short

    algorithm = source.config["algorithm"]
    if algorithm not in AGENTS:
        known = ", ".join(AGENTS)
        raise ArtifactError(
            f"{source} holds the algorithm {short(algorithm)!r}; this version knows {known}: upgrade diffagents"
        )
    return agent_class(algorithm)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> "CommitInfo":
    """Push a folder that `save_pretrained` made, after seeing that it loads; only its card is made anew, with the new name.

    Raises FileNotFoundError, ArtifactError (it would not load), HubError.
    """
    from diffagents.storage import hub
    from diffagents.storage.publish import renew_card

    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder: push what save_pretrained made, or load a .zip and push the agent")
    agent = load(path, device="cpu", verbose=0)
    push = hub.begin_push(repo_id, private=private, revision=revision, token=token)
    message = commit_message or f"{type(agent).__name__} trained with diffagents"
    with tempfile.TemporaryDirectory(prefix="diffagents-push-") as scratch:
        copy = Path(shutil.copytree(path, Path(scratch) / "policy"))
        renew_card(copy, repo_id)
        return push.commit(copy, message)
