"""The algorithms by name; loading and publishing agents of any algorithm.

Importing this module is fast: its functions import what they need when they are called.
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
"""Algorithm name -> the module with the class of that name; it is imported on first use."""


def agent_class(algorithm: str) -> "type[Agent]":
    """The class of an algorithm.

    Args:
        algorithm: A key of `AGENTS`.

    Raises:
        ValueError: Any other name.
    """
    if algorithm not in AGENTS:
        raise ValueError(f"algorithm={algorithm!r}; choose from {', '.join(AGENTS)}")
    cls: type[Agent] = getattr(importlib.import_module(AGENTS[algorithm]), algorithm)
    return cls


def load(
    path: str | pathlib.Path,
    env: Any = None,
    device: Any = "auto",
    custom_objects: dict[str, Any] | None = None,
    print_system_info: bool = False,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | pathlib.Path | None = None,
    local_files_only: bool = False,
    **overrides: Any,
) -> "Agent":
    """Load an agent of any algorithm from a folder, a .zip file or a Hub repository.

    Args:
        path: A folder or .zip that exists, else "organisation/name" on the Hub. "zoo/<name>" is a policy of this library's zoo:
            in a checkout, in the installed package (one small policy), or where the environment variable DIFFAGENTS_ZOO says, a
            folder or an organisation of the Hub.
        env: As in `Agent.set_env`; None: no environment.
        device: As in the constructor.
        custom_objects: Ignored; for SB3 compatibility.
        print_system_info: Ignored; for SB3 compatibility.
        revision: Branch, tag or commit; for the Hub only.
        token: As in `Agent.push_to_hub`.
        cache_dir: The Hub's cache; None is its default location.
        local_files_only: Use the cache only and make no request, as with HF_HUB_OFFLINE=1.
        overrides: Other hyperparameters (e.g. beta=0.1), `seed`, `verbose`, `tensorboard_log`, `compile`, `threads`,
            `tf32` or `record_command`.

    Returns:
        The agent, of the class that is named in the file.

    Raises:
        FileNotFoundError: There is nothing of that name.
        HubError: No such repository, no access or no connection.
        ArtifactError: It is not a policy of diffagents, or it is damaged or from a newer version; the message says what to do.
    """
    from diffagents.storage import artifact, checkpoint, hub

    def load_once() -> "Agent":
        source = hub.find_artifact(path, revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        return checkpoint.unpack(class_of(source), source, device, overrides, env)

    return artifact.retried(load_once)


def class_of(source: "Artifact") -> "type[Agent]":
    """The class of an artifact's algorithm. Raises ArtifactError if this version does not know it."""
    from diffagents.errors import ArtifactError, short

    algorithm = source.config["algorithm"]
    if algorithm not in AGENTS:
        known = ", ".join(AGENTS)
        raise ArtifactError(
            f"{source} has the algorithm {short(algorithm)!r}, but this version knows only {known}: upgrade diffagents"
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
    verbose: int = 1,
) -> "CommitInfo":
    """Push a folder that `save_pretrained` wrote, after checking that it loads.

    Only files of a policy are read from it: what else lies there is neither pushed nor copied, and links to elsewhere are
    refused.
    The folder itself is unchanged. The pushed card names the repository, unless the card was edited and its mark removed.

    Args:
        folder: The folder.
        repo_id: "organisation/name".
        private: Make a new repository private; None leaves the choice to the account's settings.
        revision: A branch, created if it does not exist.
        commit_message: Message of the commit; None names the algorithm.
        token: None: that of `hf auth login` or HF_TOKEN.
        verbose: 1 prints what becomes public before it does.

    Returns:
        The commit.

    Raises:
        FileNotFoundError: There is no such folder.
        ArtifactError: It cannot be loaded, or a file of it is a link to elsewhere.
        ValueError: Not a valid repository id.
        HubError: No access, no connection, or somebody else pushed meanwhile.
    """
    from diffagents.errors import ArtifactError
    from diffagents.files import find_moved, scratch_folder
    from diffagents.storage import artifact, hub
    from diffagents.storage.publish import renew_card, what_is_published

    path = Path(folder).expanduser()
    with scratch_folder(Path(tempfile.gettempdir()) / "push") as scratch:
        copy = scratch / "policy"

        def copy_once() -> None:
            """One save of the folder, also if another process saves there meanwhile."""
            found = path if path.is_dir() else find_moved(path)
            if found is None:
                raise FileNotFoundError(
                    f"there is no folder {path}: push one that save_pretrained wrote, or load a .zip and push the agent"
                )
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir()
            with artifact.read(found).of_one_save():
                for file in hub.publishable(found):
                    shutil.copyfile(file, copy / file.name)

        artifact.retried(copy_once)
        try:
            agent = load(copy, device="cpu", verbose=0)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(str(copy), str(path))) from None
        repository = hub.Repository.open(repo_id, private=private, revision=revision, token=token)
        message = commit_message or f"{type(agent).__name__} trained with diffagents"
        renew_card(copy, repo_id)
        if verbose:
            print(what_is_published(copy, repo_id), flush=True)
        return repository.commit(copy, message)
