"""Exchanges the folder of a trained agent with a model repository of the Hugging Face Hub.

A download resolves the revision to a commit once, takes only files whose names are known here, and checks their sizes before
and their hashes after the transfer. A push is one commit or nothing: it names the commit that it builds on, so if two people
push at the same time, the slower one gets an error. The token is passed to huggingface_hub and stored nowhere else.
"""

import contextlib
import difflib
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffagents.errors import ArtifactError, HubError, short
from diffagents.files import find_moved, scratch_folder, write_errors
from diffagents.storage import artifact
from diffagents.storage.artifact import CONFIG, LIBRARY, MAX_BYTES, TENSOR_FILES, TRAINER_STATE, Artifact

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.hf_api import RepoFile

ACTING = (CONFIG, TENSOR_FILES["model"])
"""The files that `predict` needs; the others are downloaded when the agent continues learning."""
LEARNING = (TENSOR_FILES["learner"], TENSOR_FILES["optimizer"], TRAINER_STATE)
ALL_FILES = (*ACTING, *LEARNING, *artifact.COMPANIONS)
"""Every file that is pushed or pulled; the contents of other files in a repository are never read."""

ZOO = "zoo"
"""What precedes the slash in the names of this library's own policies. The Hub is never asked for an organisation so called."""
ZOO_VARIABLE = "DIFFAGENTS_ZOO"
"""Environment variable with the place of the zoo: a folder with one folder for each policy, or an organisation of the Hub."""
_PACKAGE = Path(__file__).resolve().parents[1]
_ZOO_FOLDERS = (_PACKAGE.parent / "zoo", _PACKAGE / "zoo")  # of a checkout, and of an installed package, which has one policy
_MOST_NAMED = 5  # policies in a message

_PART = r"(?![.-])(?!\w*\.git$)[\w.-]{1,96}(?<![.-])"
_REPO_ID = re.compile(rf"(?!.*(--|\.\.)){_PART}/{_PART}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HARMLESS = re.compile(r"\.git\w*|\.?README.*|LICEN[CS]E.*|CITATION.*|.*\.(md|txt|png|jpg|gif|mp4)", re.IGNORECASE)


@dataclass(frozen=True)
class Origin:
    """The commit that an agent was downloaded from, and the settings for downloading the rest of it.

    Args:
        repo_id: "organisation/name".
        sha: The id of the commit, 40 hexadecimal digits.
        token: As in `Agent.push_to_hub`; hidden in the object's repr.
        cache_dir: The Hub's cache; None is its default location.
        local_files_only: Use the cache only and make no request.
    """

    repo_id: str
    sha: str
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def __str__(self) -> str:
        return f"{self.repo_id} (commit {self.sha[:8]})"

    def fetch(self, names: Sequence[str], needed: Sequence[str] = ()) -> Path:
        """Download the files that are not in the cache yet.

        Args:
            names: The files to download, if the commit has them.
            needed: Those without which the download is useless. Offline, it is enough that these are in the cache.

        Returns:
            The folder of this commit in the cache.

        Raises:
            HubError: The download failed.
            ArtifactError: The commit lacks a needed file, or a file is too large or damaged.
        """
        have = {name: path for name in names if (path := self._cached(name)) is not None}
        if not set(names) - set(have) or (needed and not set(needed) - set(have) and self._offline):
            return next(iter(have.values())).parent
        if self._offline:
            missing = ", ".join(sorted(set(needed or names) - set(have)))
            raise HubError(f"{self}: {missing} is not in the cache, and no request is made while offline: pull it once online")
        from huggingface_hub.hf_api import RepoFile  # only here: importing it takes long

        with explained(str(self)):
            entries = self._api.get_paths_info(self.repo_id, list(names), revision=self.sha)
            found = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        if missing_files := [name for name in needed if name not in found and name not in have]:
            raise ArtifactError(f"{self} {self._describe_other(missing_files)}")
        for name in names:
            if name in found and name not in have:
                have[name] = self._download(found[name])
        if not have:
            raise ArtifactError(f"{self} has none of the files {', '.join(names)}: check the name and the revision")
        return next(iter(have.values())).parent

    @property
    def _offline(self) -> bool:
        """Whether no request may be made."""
        from huggingface_hub.constants import is_offline_mode

        return self.local_files_only or is_offline_mode()

    @property
    def _api(self) -> "HfApi":
        """The Hub's client with the token of this origin."""
        return _api(self.token)

    def _cached(self, name: str) -> Path | None:
        """The file in the cache; None if it is not there."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo_id, name, cache_dir=self.cache_dir, revision=self.sha)
        return Path(path) if isinstance(path, str) else None

    def _download(self, entry: "RepoFile") -> Path:
        """Download one file, checking its size before and its hash after; a wrong file is removed from the cache."""
        limit = MAX_BYTES.get(entry.path, min(artifact.MAX_COMPANION_BYTES, artifact.max_bytes(entry.path)))
        if not isinstance(entry.size, int) or entry.size > limit:
            raise ArtifactError(f"{self}: {entry.path} has {short(entry.size)} bytes, more than the {limit} allowed")
        from huggingface_hub import hf_hub_download

        with explained(f"{self}: {entry.path}"):
            given = hf_hub_download(
                self.repo_id, entry.path, revision=self.sha, token=self.token, cache_dir=self.cache_dir, library_name=LIBRARY
            )
        path = Path(given)
        if path.parent.name != self.sha:  # the client has stored the wrong commit under this name
            (path.parents[2] / "refs" / self.sha).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise HubError(f"{self}: the Hub sent a file of another commit, {short(path.parent.name)}: check HF_ENDPOINT")
        data = path.read_bytes()
        whole = hashlib.sha256(data).hexdigest() if entry.lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if len(data) != entry.size or whole != (entry.lfs.sha256 if entry.lfs else entry.blob_id):
            for damaged in (path.resolve(), path):
                damaged.unlink(missing_ok=True)
            raise ArtifactError(f"{self}: {entry.path} arrived damaged (wrong size or hash) and was removed: pull it again")
        return path

    def _describe_other(self, missing: Sequence[str]) -> str:
        """What the repository contains instead of a policy of diffagents, for an error message."""
        with explained(str(self)):
            tree = self._api.list_repo_tree(self.repo_id, revision=self.sha)
            names = [entry.path for entry in itertools.islice(tree, 200)]
        what = f"is not a policy of {LIBRARY}: it has no {' and no '.join(missing)}"
        if any(re.fullmatch(r"[\w.-]+-v\d+\.zip", name) for name in names):
            return f"contains a Stable-Baselines3 policy (a .zip with pickles), not one of {LIBRARY}: load it with SB3"
        if pickled := [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".d3"))]:
            return f"{what}. Its {short(pickled[0])} is a pickle, which may run code and is never opened here"
        return f"{what}; check the name and the revision"


def find_artifact(
    where: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Artifact:
    """Open the folder or .zip file at a path if it exists, otherwise the Hub repository of that name.

    Of a repository only the files that acting needs are downloaded. "zoo/<name>" is a policy of this library's zoo, see
    `find_in_zoo`.

    Args:
        where: A path, or "organisation/name".
        revision: Branch, tag or commit.
        token: As in `Agent.push_to_hub`.
        cache_dir: The Hub's cache; None is its default location.
        local_files_only: Use the cache only and make no request.

    Raises:
        FileNotFoundError: There is nothing at this path, and it is not a repository id.
        ValueError: A revision of a path.
        HubError: The download failed.
        ArtifactError: It is not an artifact, or it is damaged or from a newer version.
    """
    path = Path(where).expanduser()
    if path.exists() or Path(f"{path}.zip").exists() or find_moved(path) is not None:
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} applies to the Hub, but {path} exists here and takes precedence: rename it"
            )
        return artifact.read(path)
    repo_id = str(where)
    if _is_of_the_zoo(repo_id):
        found = find_in_zoo(repo_id, revision)
        if isinstance(found, Path):
            return artifact.read(found)
        repo_id = found
    try:
        origin = resolve(repo_id, revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    except ValueError as error:
        raise FileNotFoundError(str(error)) from None
    return artifact.read(origin.fetch(ACTING, needed=ACTING), origin, ACTING)


def zoo_folders() -> list[Path]:
    """The folders with policies of the zoo: that of $DIFFAGENTS_ZOO, `zoo/` of the checkout, that of the installed package."""
    chosen = os.environ.get(ZOO_VARIABLE)
    return [folder for folder in (*([Path(chosen).expanduser()] if chosen else []), *_ZOO_FOLDERS) if folder.is_dir()]


def zoo_organisation() -> str | None:
    """The organisation of the Hub that $DIFFAGENTS_ZOO names; None if it names a folder, or is not set.

    Raises:
        ValueError: It is neither.
    """
    chosen = os.environ.get(ZOO_VARIABLE)
    if not chosen or Path(chosen).expanduser().is_dir():
        return None
    if not re.fullmatch(_PART, chosen, re.ASCII) or chosen.lower() == ZOO:
        raise ValueError(f"{ZOO_VARIABLE}={chosen!r} is neither an existing folder nor an organisation of the Hub: correct it")
    return chosen


def find_in_zoo(repo_id: str, revision: str | None = None) -> Path | str:
    """The folder of a policy of the zoo, else its id on the Hub.

    Args:
        repo_id: "zoo/<name>".
        revision: Branch, tag or commit. If there is one, folders are left out, which have none.

    Returns:
        The folder, or "<organisation>/<name>" with the organisation of $DIFFAGENTS_ZOO.

    Raises:
        FileNotFoundError: There is no such policy in any folder, and no organisation is set.
        ValueError: $DIFFAGENTS_ZOO is neither a folder nor an organisation, or a folder has the policy but no revisions.
    """
    name, organisation, folders = repo_id.partition("/")[2], zoo_organisation(), zoo_folders()
    named = bool(re.fullmatch(_PART, name, re.ASCII))
    if named and (revision is None or organisation is None):
        for place in (folder / name for folder in folders):
            if not (place / CONFIG).is_file():
                continue
            if revision is not None:
                raise ValueError(f"revision={revision!r} applies to the Hub, but {repo_id} is the folder {place}: leave it out")
            return place
    if named and organisation is not None:
        return f"{organisation}/{name}"
    known = sorted({file.parent.name for folder in folders for file in folder.glob(f"*/{CONFIG}")})
    shown = difflib.get_close_matches(name, known, _MOST_NAMED) or known[:_MOST_NAMED]
    more = f" and {len(known) - len(shown)} more (`diffagents list --zoo`)" if len(known) > len(shown) else ""
    here = f"here are {', '.join(f'{ZOO}/{each}' for each in shown)}{more}" if known else "this installation has no policy"
    raise FileNotFoundError(
        f"there is no policy {short(repo_id)!r} of the zoo; {here}; all are in {ZOO}/ of a checkout of the repository: use "
        f"diffagents from there, or set {ZOO_VARIABLE} to that folder, or to an organisation of the Hub that publishes them"
    )


def _is_of_the_zoo(repo_id: str) -> bool:
    return repo_id.partition("/")[0].lower() == ZOO


def resolve(
    repo_id: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Origin:
    """Find the commit that a revision means now; if the Hub cannot be reached, the one that it meant last time.

    Args:
        repo_id: "organisation/name".
        revision: Branch, tag or commit; None is the main branch.
        token: As in `Agent.push_to_hub`.
        cache_dir: The Hub's cache; None is its default location.
        local_files_only: Use the cache only and make no request.

    Raises:
        ValueError: Not a valid repository id.
        HubError: There is no such repository or revision, no access, or no connection and nothing in the cache.
    """
    from huggingface_hub.constants import is_offline_mode

    if not _REPO_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is neither an existing file or folder nor a Hub id, which looks like organisation/name")
    if _is_of_the_zoo(repo_id):
        raise ValueError(f"{repo_id!r} is a policy of this library's zoo, not a repository of the Hub: pass it to load or pull")
    offline = local_files_only or is_offline_mode()
    here = "" if Path(repo_id).exists() else "no such file or folder here; on the Hub, "
    with explained(f"{repo_id} ({here}revision {revision or 'main'})", offline):
        resolved = _api(token).resolve_revision(repo_id, revision=revision, cache_dir=cache_dir, local_files_only=offline)
    sha = resolved.resolved
    if not _COMMIT.fullmatch(sha):
        raise HubError(f"the Hub named {short(sha)} as the commit of {repo_id}, which is not a commit id: check HF_ENDPOINT")
    return Origin(repo_id, sha, token, cache_dir, local_files_only)


def pull(
    repo_id: str,
    folder: str | Path | None = None,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download a whole artifact with its model card, results and pictures.

    Args:
        repo_id: "organisation/name".
        folder: A folder to copy it to, which must not exist yet; None leaves it in the cache.
        revision: Branch, tag or commit; None is the main branch.
        token: As in `Agent.push_to_hub`.
        cache_dir: The Hub's cache; None is its default location.
        local_files_only: Use the cache only and make no request.

    Returns:
        The folder.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: Not a valid repository id.
        HubError: The download failed.
        ArtifactError: The repository does not contain an artifact.
    """
    target = Path(folder).expanduser() if folder is not None else None
    if target is not None and target.exists():
        raise FileExistsError(f"{target} exists already: choose a new folder")
    found = find_in_zoo(repo_id, revision) if _is_of_the_zoo(repo_id) else repo_id
    if isinstance(found, Path):
        cached = found
        artifact.read(cached)
    else:
        origin = resolve(found, revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        cached = origin.fetch(ALL_FILES, needed=ACTING)
        artifact.read(cached, origin)
    if target is None:
        return cached
    with write_errors("the policy", target), scratch_folder(target) as scratch:
        part = scratch / "policy"
        part.mkdir()
        for name in ALL_FILES:
            if (cached / name).exists():
                shutil.copyfile(cached / name, part / name)
        try:
            part.rename(target)
        except OSError:
            if target.exists():
                raise FileExistsError(f"{target} came into being during the download: choose a new folder") from None
            raise
    return target


def publishable(folder: str | Path) -> list[Path]:
    """The files of a folder that a push may read: those of ALL_FILES, which are regular files of that folder.

    Links are followed inside the folder, and in the Hub's cache, which consists of links, to the blobs beside it.

    Args:
        folder: A folder that `save_pretrained` wrote, or one in the Hub's cache.

    Raises:
        ArtifactError: A file is a link to elsewhere, or a pipe or device.
    """
    folder = Path(folder)
    real = folder.resolve()
    homes = [real]
    if real.parent.name == "snapshots":
        homes.append(real.parents[1] / "blobs")
    files = []
    for name in ALL_FILES:
        file = folder / name
        if not os.path.lexists(file):
            continue
        try:
            home = file.resolve().parent
            with contextlib.suppress(FileNotFoundError):  # a link to nothing: refused below
                file.stat()  # since Python 3.13 `resolve` accepts a link that leads to itself
        except (OSError, RuntimeError):
            raise ArtifactError(f"{file} is a link that leads to itself: remove it") from None
        if home not in homes:
            raise ArtifactError(f"{file} is a link to a file elsewhere: put the file itself there if it is to be published")
        if not file.is_file():
            raise ArtifactError(f"{file} is not a regular file: remove it")
        files.append(file)
    return files


@dataclass(frozen=True)
class Repository:
    """A model repository that is ready for a push: it exists, and the token may write to it.

    Args:
        repo_id: "organisation/name".
        revision: The branch to push to; None is the main branch.
        head: The commit that the push builds on.
        files: The names of the files in `head`.
        readme: The README.md of `head`; None if it has none.
        token: As in `Agent.push_to_hub`; hidden in the object's repr.
    """

    repo_id: str
    revision: str | None
    head: str
    files: frozenset[str]
    readme: bytes | None
    token: str | bool | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls, repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | bool | None = None
    ) -> "Repository":
        """Create the repository and the branch if they do not exist, and check that it may be pushed to.

        This comes before a policy is evaluated for the push, which may take long.

        Args:
            repo_id: "organisation/name".
            private: Make a new repository private; None leaves the choice to the account's settings.
            revision: The branch to push to; None is the main branch.
            token: As in `Agent.push_to_hub`.

        Raises:
            ValueError: Not a valid repository id.
            HubError: There is no token, access or connection, or the repository contains something else.
        """
        if not _REPO_ID.fullmatch(repo_id):
            raise ValueError(f"{repo_id!r} is not a Hub id, which looks like organisation/name")
        if _is_of_the_zoo(repo_id):
            raise ValueError(f"{repo_id!r} is a name of this library's zoo: push to an account or organisation of your own")
        api = _api(token)
        with explained(f"{repo_id} (revision {revision or 'main'})"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            head = api.model_info(repo_id, revision=revision)
            names = frozenset(sibling.rfilename for sibling in head.siblings or ())
            assert head.sha is not None and _COMMIT.fullmatch(head.sha)
        present = Origin(repo_id, head.sha, token)
        others = sorted(name for name in names if name not in ALL_FILES and not _HARMLESS.fullmatch(name))
        if CONFIG in names:
            if artifact.read_json(present.fetch([CONFIG]), CONFIG).get("library") != LIBRARY:
                raise HubError(f"{repo_id} contains a model of another library (see its {CONFIG}): push to another name")
        elif others:
            raise HubError(
                f"{repo_id} contains other files ({short(others[0])}) but no policy of {LIBRARY}: push to another name"
            )
        readme = (present.fetch(["README.md"]) / "README.md").read_bytes() if "README.md" in names else None
        return cls(repo_id, revision, head.sha, names, readme, token)

    def commit(self, folder: str | Path, message: str) -> "CommitInfo":
        """Push the known files of a folder as one commit.

        Files of an earlier push that the folder does not have are deleted; other files in the repository are kept.

        Args:
            folder: A folder that `save_pretrained` wrote.
            message: The message of the commit.

        Raises:
            HubError: The push failed; the repository is unchanged.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        present = [file.name for file in publishable(folder)]
        stale = [name for name in ALL_FILES if name in self.files and name not in present]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=Path(folder) / name) for name in present),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ]
        with explained(f"{self.repo_id} (revision {self.revision or 'main'})"):
            return _api(self.token).create_commit(
                self.repo_id, operations, commit_message=message, revision=self.revision, parent_commit=self.head
            )


def list_policies(author: str, token: str | bool | None = None) -> Iterator[tuple[str, list[str]]]:
    """Iterate over the policies of diffagents that a user or organisation has published.

    Args:
        author: The user or organisation.
        token: As in `Agent.push_to_hub`.

    Yields:
        The repository id and its tags.

    Raises:
        HubError: No connection, or an error of the Hub.
        ValueError: The author is "zoo", which stands for this library's own policies.
    """
    if _is_of_the_zoo(author):
        raise ValueError(
            f"{author!r} stands for this library's own policies: `diffagents list --zoo` shows those that are here"
        )
    with explained(author):
        for model in _api(token).list_models(author=author, filter=LIBRARY):
            yield model.id, list(model.tags or ())


def _api(token: str | bool | None) -> "HfApi":
    """The Hub's client."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name=LIBRARY)


@contextlib.contextmanager
def explained(what: str, offline: bool = False) -> Iterator[None]:
    """Turn the exceptions of huggingface_hub and its HTTP client into a HubError that states the cause and the cure.

    Args:
        what: What was being transferred: the beginning of the message.
        offline: Whether the caller allowed no request.
    """
    try:
        yield
    except (HubError, ArtifactError):
        raise
    except Exception as error:  # of many types: huggingface_hub's, the HTTP library's, hf_xet's RuntimeError, OSError
        cause = _cause(error, offline)
        if cause is None:
            raise
        raise HubError(f"{what}: {cause}") from error


def _cause(error: Exception, offline: bool) -> str | None:
    """What went wrong and what to do; None for an error that has nothing to do with the Hub."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = short(" ".join(str(getattr(error, "server_message", None) or error).split())[:200])
    if "GatedRepoError" in kinds:
        return "its owner must grant access first: ask for access on its page, then log in (hf auth login)"
    if "RepositoryNotFoundError" in kinds:
        return "there is no such repository, or it is private: check the name, or log in (hf auth login, HF_TOKEN, token=)"
    if "RevisionNotFoundError" in kinds:
        return "there is no such branch, tag or commit: check the revision"
    if "RemoteEntryNotFoundError" in kinds:
        return "this commit does not contain it: check the revision"
    if "OfflineModeIsEnabled" in kinds or (offline and kinds & {"RevisionResolutionError", "LocalEntryNotFoundError"}):
        return (
            "it is not in the cache, and no request is made while offline (--offline, local_files_only=True, HF_HUB_OFFLINE): "
            "pull it once online"
        )
    if "RevisionResolutionError" in kinds or "LocalEntryNotFoundError" in kinds:
        return f"it is not in the cache, and the Hub could not be reached ({_root(error)}): go online, or check HF_ENDPOINT"
    if status in (401, 403) or "LocalTokenNotFoundError" in kinds:
        return f"the Hub denies access ({status or 'no token'}: {reason}): use a token with the rights to it (hf auth login)"
    if status == 412:
        return "somebody else pushed since this push began: check the new commit, then push again"
    if status == 429:
        return "the Hub refuses because of too many requests (429): wait a few minutes"
    if status is not None:
        return f"the Hub answered {status} ({reason}): nothing was changed; try again later"
    if kinds & {"TransportError", "HTTPError", "ConnectionError", "TimeoutError", "XetDownloadError"}:
        return f"the connection failed ({_root(error)}): nothing was changed; try again"
    if re.search(r"\b40[13]\b", reason):  # hf_xet mentions the status only in its text
        return f"the Hub denies access ({reason}): use a token with the rights to it (hf auth login)"
    if isinstance(error, OSError) and error.errno is not None:  # disk full, read-only cache
        return (
            f"{error.strerror or error} ({error.filename or 'in the cache'}): free some space, or set HF_HOME to another folder"
        )
    if isinstance(error, OSError | RuntimeError):  # a wrong size; hf_xet raises RuntimeErrors
        return f"the transfer failed ({_root(error)}): nothing was changed; try again"
    if isinstance(error, AssertionError | TypeError | KeyError | ValueError):
        return f"the Hub's answer is not what its protocol prescribes ({_root(error)}): check HF_ENDPOINT"
    return None


def _root(error: BaseException) -> str:
    """The innermost cause of an exception in one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {short(' '.join(str(error).split()))}"
