"""A trained agent's folder <-> a model repository of the Hugging Face Hub.

A pull resolves the revision to a commit once, takes only files whose names are known here, and checks their sizes before
and their hashes after the download. A push is one commit or nothing: it names the commit it builds on, so that of two
people who push at once the slower one is told. The token is handed on to huggingface_hub and kept nowhere else.
"""

import contextlib
import hashlib
import itertools
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagents.errors import ArtifactError, HubError, short
from diffagents.storage import artifact
from diffagents.storage.artifact import CONFIG, LIBRARY, MAX_BYTES, TENSOR_FILES, TRAINER_STATE

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

ACTING = (CONFIG, TENSOR_FILES["model"])
"""What `predict` needs; the rest is fetched when learning goes on."""
LEARNING = (TENSOR_FILES["learner"], TENSOR_FILES["optimizer"], TRAINER_STATE)
ALL_FILES = (*ACTING, *LEARNING, *artifact.COMPANIONS)
"""Every file that is pushed or pulled; nothing else in a repository is ever looked at."""

_PART = r"(?![.-])(?!\w*\.git$)[\w.-]{1,96}(?<![.-])"
_REPO_ID = re.compile(rf"(?!.*(--|\.\.)){_PART}/{_PART}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HARMLESS = re.compile(r"\.git\w*|\.?README.*|LICEN[CS]E.*|CITATION.*|.*\.(md|txt|png|jpg|gif|mp4)", re.IGNORECASE)


@dataclass(frozen=True)
class Origin:
    """The commit that an agent was pulled from, and how to get the rest of it."""

    repo_id: str
    sha: str
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def __str__(self) -> str:
        return f"{self.repo_id} (commit {self.sha[:8]})"

    def fetch(self, names: Sequence[str], needed: Sequence[str] = ()) -> Path:
        """The cached folder of this commit with those files of `names` that it has. Raises HubError, ArtifactError.

        needed: files without which there is no point; with some of them only in the cache, no request is made.
        """
        have = {name: path for name in names if (path := self._cached(name)) is not None}
        if not set(names) - set(have) or (needed and not set(needed) - set(have) and self._offline):
            return next(iter(have.values())).parent
        if self._offline:
            missing = ", ".join(sorted(set(needed or names) - set(have)))
            raise HubError(f"{self}: {missing} is not in the cache, and the Hub is not asked (offline): pull it once online")
        with explained(str(self)):
            found = {entry.path: entry for entry in self._api.get_paths_info(self.repo_id, list(names), revision=self.sha)}
        if missing_files := [name for name in needed if name not in found and name not in have]:
            raise ArtifactError(f"{self} {self._what_it_is(missing_files)}")
        for name in names:
            if name in found and name not in have:
                have[name] = self._download(found[name])
        if not have:
            raise ArtifactError(f"{self} has none of {', '.join(names)}")
        return next(iter(have.values())).parent

    @property
    def _offline(self) -> bool:
        from huggingface_hub.constants import is_offline_mode

        return self.local_files_only or is_offline_mode()

    @property
    def _api(self) -> "HfApi":
        return _api(self.token)

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo_id, name, cache_dir=self.cache_dir, revision=self.sha)
        return Path(path) if isinstance(path, str) else None

    def _download(self, entry: Any) -> Path:
        """One file, its size checked before and its hash after: what does not fit is taken out of the cache again."""
        limit = MAX_BYTES.get(entry.path, artifact.MAX_COMPANION_BYTES)
        if not isinstance(entry.size, int) or entry.size > limit:
            raise ArtifactError(f"{self}: {entry.path} has {short(entry.size)} bytes, more than the {limit} allowed")
        from huggingface_hub import hf_hub_download

        with explained(f"{self}: {entry.path}"):
            given = hf_hub_download(
                self.repo_id, entry.path, revision=self.sha, token=self.token, cache_dir=self.cache_dir, library_name=LIBRARY
            )
        path = Path(given)
        if path.parent.name != self.sha:  # what the client took for this commit's name spoils its cache
            (path.parents[2] / "refs" / self.sha).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise HubError(f"{self}: the Hub answered with another commit, {short(path.parent.name)}: check HF_ENDPOINT")
        data = path.read_bytes()
        whole = hashlib.sha256(data).hexdigest() if entry.lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if len(data) != entry.size or whole != (entry.lfs.sha256 if entry.lfs else entry.blob_id):
            for damaged in (path.resolve(), path):
                damaged.unlink(missing_ok=True)
            raise ArtifactError(f"{self}: {entry.path} arrived damaged (size or hash differ) and was removed: pull it again")
        return path

    def _what_it_is(self, missing: Sequence[str]) -> str:
        with explained(str(self)):
            tree = self._api.list_repo_tree(self.repo_id, revision=self.sha)
            names = [entry.path for entry in itertools.islice(tree, 200)]
        what = f"is not a policy of {LIBRARY}: it has no {' and no '.join(missing)}"
        if any(re.fullmatch(r"[\w.-]+-v\d+\.zip", name) for name in names):
            return f"holds a Stable-Baselines3 policy (a .zip, with pickles in it), not one of {LIBRARY}: load it with SB3"
        if pickled := [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".d3"))]:
            return f"{what}. Its {short(pickled[0])} is a pickle, which may run code and is never opened here"
        return f"{what}; check the name and the revision"


def resolve(
    repo_id: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Origin:
    """The commit that a branch, tag or commit id means now; the cached answer where the Hub cannot be reached.

    Raises ValueError for what is no repository id, HubError where there is none, or no access, or no way to it.
    """
    from huggingface_hub.constants import is_offline_mode

    if not _REPO_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is neither an existing file or folder nor a Hub id, which looks like organisation/name")
    with explained(f"{repo_id} (revision {revision or 'main'})"):
        resolved = _api(token).resolve_revision(
            repo_id, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only or is_offline_mode()
        )
    sha = resolved.resolved
    if not _COMMIT.fullmatch(sha):
        raise HubError(f"the Hub answered the commit {short(sha)} for {repo_id}, which is none: check HF_ENDPOINT")
    return Origin(repo_id, sha, token, cache_dir, local_files_only)


def pull(repo_id: str, folder: str | Path | None = None, revision: str | None = None, **how: Any) -> Path:
    """Fetch the whole artifact, card and all; return its folder: in the cache, or a copy at `folder`, which must not exist.

    how: token, cache_dir, local_files_only. Raises HubError, ArtifactError, FileExistsError.
    """
    target = Path(folder) if folder is not None else None
    if target is not None and target.exists():
        raise FileExistsError(f"{target} exists: give a new folder")
    origin = resolve(repo_id, revision, **how)
    cached = origin.fetch(ALL_FILES, needed=ACTING)
    artifact.read(cached)
    if target is None:
        return cached
    part = target.with_name(f".{target.name}.part")
    try:
        part.mkdir(parents=True)
        for name in ALL_FILES:
            if (cached / name).exists():
                shutil.copyfile(cached / name, part / name)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


@dataclass(frozen=True)
class Push:
    """A push that has been let in: the repository exists, the token may write, `head` is the commit it will build on."""

    repo_id: str
    revision: str | None
    head: str
    files: frozenset[str]
    readme: bytes | None  # of `head`
    token: str | bool | None = field(default=None, repr=False)

    def commit(self, folder: str | Path, message: str) -> "CommitInfo":
        """The folder's known files as one commit; those of an earlier push that it no longer has are deleted.

        Raises HubError; then nothing of it is visible in the repository.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        here = [name for name in ALL_FILES if (Path(folder) / name).is_file()]
        stale = [name for name in ALL_FILES if name in self.files and name not in here]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=Path(folder) / name) for name in here),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ]
        with explained(f"{self.repo_id} (revision {self.revision or 'main'})"):
            return _api(self.token).create_commit(
                self.repo_id, operations, commit_message=message, revision=self.revision, parent_commit=self.head
            )


def begin_push(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | bool | None = None
) -> Push:
    """Make the repository (and the branch) where there is none, and see that it is ours to write to, before any other work.

    Raises ValueError for what is no repository id, HubError: no token, no access, offline, a repository of something else.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is no Hub id, which looks like organisation/name")
    api = _api(token)
    with explained(f"{repo_id} (revision {revision or 'main'})"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
        names = frozenset(sibling.rfilename for sibling in head.siblings or ())
        assert head.sha is not None and _COMMIT.fullmatch(head.sha)
    others = sorted(name for name in names if name not in ALL_FILES and not _HARMLESS.fullmatch(name))
    if CONFIG in names:
        config = artifact.read_json(Origin(repo_id, head.sha, token).fetch([CONFIG]), CONFIG)
        if config.get("library") != LIBRARY:
            raise HubError(f"{repo_id} holds a model of another library ({CONFIG} says so): push to another name")
    elif others:
        raise HubError(f"{repo_id} holds other files ({short(others[0])}) and no policy of ours: push to another name")
    readme = (
        (Origin(repo_id, head.sha, token).fetch(["README.md"]) / "README.md").read_bytes() if "README.md" in names else None
    )
    return Push(repo_id, revision, head.sha, names, readme, token)


def list_policies(author: str, token: str | bool | None = None) -> Iterator[tuple[str, list[str]]]:
    """(repository id, tags) of every policy of ours that an author or organisation has published. Raises HubError."""
    with explained(author):
        for model in _api(token).list_models(author=author, filter=LIBRARY):
            yield model.id, list(model.tags or ())


def _api(token: str | bool | None) -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name=LIBRARY)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into HubError with a cause and a cure."""
    try:
        yield
    except (HubError, ArtifactError):
        raise
    except Exception as error:  # from several families: hub, HTTP library, hf_xet's RuntimeError, OSError
        cause = _cause(error)
        if cause is None:
            raise
        raise HubError(f"{what}: {cause}") from error


def _cause(error: Exception) -> str | None:
    """What went wrong and what to do, or None for what is not the Hub's fault."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = short(" ".join(str(getattr(error, "server_message", None) or error).split())[:200])
    if "GatedRepoError" in kinds:
        return "its owner asks readers to be admitted first: ask for access on its page, then log in (hf auth login)"
    if "RepositoryNotFoundError" in kinds:
        return "there is no such repository, or it is private: check the name, or log in (hf auth login, HF_TOKEN, token=)"
    if "RevisionNotFoundError" in kinds:
        return "there is no such branch, tag or commit"
    if "RemoteEntryNotFoundError" in kinds:
        return "it is not in this commit"
    if "OfflineModeIsEnabled" in kinds:
        return "the Hub is not asked, HF_HUB_OFFLINE is set, and the cache does not have it: pull it once online"
    if "RevisionResolutionError" in kinds or "LocalEntryNotFoundError" in kinds:
        return f"it is not in the cache, and the Hub was not reached ({_root(error)}): go online, or check HF_ENDPOINT"
    if status in (401, 403) or "LocalTokenNotFoundError" in kinds:
        return (
            f"the Hub does not let this token in ({status or 'no token'}: {said}): use one that may write there (hf auth login)"
        )
    if status == 412:
        return "somebody else pushed since this push began: look at what is there now, then push again"
    if status == 429:
        return "the Hub says that these are too many requests (429): wait a few minutes"
    if status is not None:
        return f"the Hub answered {status} ({said}): nothing was changed; try again later"
    if kinds & {"TransportError", "HTTPError", "ConnectionError", "TimeoutError", "XetDownloadError"}:
        return f"the connection failed ({_root(error)}): nothing was changed; try again"
    if re.search(r"\b40[13]\b", said):  # hf_xet says it in words only
        return f"the Hub does not let this token in ({said}): use one that may write there (hf auth login)"
    if isinstance(error, OSError) and error.errno is not None:  # disk full, read-only cache
        return f"{error.strerror or error} ({error.filename or 'in the cache'}): make room, or set HF_HOME to another place"
    if isinstance(error, OSError | RuntimeError):  # a size that does not fit; hf_xet speaks in RuntimeErrors
        return f"the transfer failed ({_root(error)}): nothing was changed; try again"
    if isinstance(error, AssertionError | TypeError | KeyError | ValueError):
        return f"the Hub's answer makes no sense ({_root(error)}): check HF_ENDPOINT"
    return None


def _root(error: BaseException) -> str:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {short(' '.join(str(error).split()))}"
