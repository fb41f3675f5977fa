"""Whatever goes wrong on the way to the Hub or back: an error of our own says it in one line, and nothing is half-written."""

import contextlib
import json
import resource
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from hub_clients import Client, Refused, attempt, client, kept
from hub_server import Answer, Fault, Hub, RequestHandler
from small_agents import agent_class, small
from write_format_fixture import OBS, toy_data

import diffagents
from diffagents import registry

QUIET: dict[str, Any] = {"verbose": 0, "device": "cpu"}
FAULTY: list[Any] = [500, 403, 404, "drop"]


# ---- what the clients do -----------------------------------------------------------------------------------------------


def train(path: Path) -> Any:
    """The agent that is pushed all the time."""
    agent = agent_class("TD3BC").load(path, **QUIET)
    kept["agent"] = agent
    return agent.predict(OBS, deterministic=True)[0]


def push(repo_id: str, **how: Any) -> Any:
    got = attempt(kept["agent"].push_to_hub, repo_id, **how)
    return got if isinstance(got, Refused) else got.oid


def pull(repo_id: str, cache: Path, **how: Any) -> Any:
    got = attempt(diffagents.load, repo_id, cache_dir=cache, **QUIET, **how)
    if isinstance(got, Refused):
        return got
    kept["pulled"] = got
    return got.predict(OBS, deterministic=True)[0]


def learn_pulled() -> Any:
    agent = kept["pulled"]
    before = {key: value.clone() for key, value in agent.policy.state_dict().items()}
    got = attempt(agent.learn, toy_data(), 3)
    if isinstance(got, Refused):
        assert not agent.has_training_networks and all(
            (before[key] == value).all() for key, value in agent.policy.state_dict().items()
        )
        return got
    return agent.has_training_networks


def save_pulled(path: Path) -> tuple[list[str], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept["pulled"].save(path)
    loaded = diffagents.load(path, **QUIET)
    assert (loaded.predict(OBS, deterministic=True)[0] == kept["pulled"].predict(OBS, deterministic=True)[0]).all()
    return [str(one.message) for one in caught], [str(loaded.has_training_networks)]


@contextlib.contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """No file can be longer than that, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def on_a_full_disk(n_bytes: int, function: Callable[..., Any], *args: Any, **how: Any) -> Any:
    with full_disk(n_bytes):
        return function(*args, **how)


def save_pretrained(folder: Path) -> Any:
    return attempt(kept["agent"].save_pretrained, folder)


# ---- one server, one client, one policy --------------------------------------------------------------------------------


class World(NamedTuple):
    hub: Hub
    here: Client
    actions: np.ndarray
    repo: str
    """A repository with that policy, new for each test."""
    cache: Path

    def head(self, repo: str | None = None) -> str:
        return self.hub.repository(repo or self.repo).branches["main"]

    def pull(self, repo: str | None = None, **how: Any) -> Any:
        return self.here(pull, repo or self.repo, self.cache, **how)

    def push(self, repo: str | None = None, **how: Any) -> Any:
        return self.here(push, repo or self.repo, **how)

    def pulls_well(self) -> None:
        actions = self.pull()
        assert isinstance(actions, np.ndarray) and np.array_equal(actions, self.actions), actions

    def nothing_damaged(self) -> None:
        """Whatever lies in a snapshot is whole."""
        files = {data for name in {self.repo, "me/seed"} for data in self.hub.files(name).values()}
        for path in self.cache.glob("models--*/snapshots/*/*"):
            assert path.read_bytes() in files, path

    def fails(self, *fault: Any) -> None:
        self.hub.faults.append(Fault(*fault))

    def mend(self) -> None:
        self.hub.faults.clear()
        if self.hub.stopped.is_set():
            self.hub.start()


@pytest.fixture(scope="module", params=["lfs"])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Hub, Client, np.ndarray]]:
    folder = tmp_path_factory.mktemp(request.param)
    agent: Any = small("TD3BC", normalize_obs=True).learn(toy_data())
    agent.save(folder / "agent.zip", include_trainer_state=False)
    with Hub(request.param, folder) as hub, client(hub, folder / "home", ["matplotlib"]) as here:
        actions = here(train, folder / "agent.zip")
        sha = here(push, "me/seed")
        assert hub.repository("me/seed").branches["main"] == sha
        yield hub, here, actions


@pytest.fixture
def world(running: Any, tmp_path: Path) -> Iterator[World]:
    hub, here, actions = running
    repo = f"me/r{len(hub.repositories)}"
    hub.put(repo, {})
    repository = hub.repository(repo)
    files = hub.repository("me/seed").files("main")
    repository.commit("main", dict(files), "seed")
    hub.large_files |= {file.sha256: file.content for file in files.values() if file.sha256 and file.content}
    made = World(hub, here, actions, repo, tmp_path / "cache")
    yield made
    made.mend()


def put_instead(world: World, repo: str, lfs: bool = True, **files: bytes | None) -> None:
    """A repository like the good one with some files others (`model_safetensors=...`), or gone (None)."""
    good = {name: data for name, data in world.hub.files("me/seed").items() if name != ".gitattributes"}
    for name, content in files.items():
        name = ".".join(name.rsplit("_", 1))
        good.pop(name, None)
        if content is not None:
            good[name] = content
    large = {name: data for name, data in good.items() if name.endswith(".safetensors") and lfs}
    world.hub.put(repo, {name: data for name, data in good.items() if name not in large})
    world.hub.put(repo, large, lfs=True)


# ---- pulling -----------------------------------------------------------------------------------------------------------

PULL_STEPS = {
    "resolve": ("GET", r"/api/models/me/\w+$"),
    "paths": ("POST", "/paths-info/"),
    "head_config": ("HEAD", "/config.json"),
    "get_config": ("GET", "/resolve/.*/config.json"),
    "head_model": ("HEAD", "/model.safetensors"),
    "get_model": ("GET", "/_lfs/"),
}


@pytest.mark.parametrize("action", FAULTY)
@pytest.mark.parametrize("step", PULL_STEPS)
def test_a_pull_that_fails_says_so_and_works_later(step: str, action: Any, world: World) -> None:
    world.fails(*PULL_STEPS[step], action)
    got = world.pull()
    assert isinstance(got, Refused)
    got.says("HubError", world.repo)
    world.nothing_damaged()
    world.mend()
    world.pulls_well()


@pytest.mark.parametrize("step", PULL_STEPS)
def test_a_server_that_dies_while_it_is_asked(step: str, world: World) -> None:
    world.fails(*PULL_STEPS[step], lambda handler: handler.server.hub.stop())
    world.pull().says("HubError", world.repo)
    world.nothing_damaged()
    world.mend()
    world.pulls_well()


@pytest.mark.parametrize("damage", ["truncate", "corrupt"])
@pytest.mark.parametrize("step", ["get_config", "get_model"])
def test_what_arrives_damaged_is_removed(step: str, damage: str, world: World) -> None:
    world.fails(*PULL_STEPS[step], damage)
    got = world.pull()
    if damage == "corrupt":
        got.says("ArtifactError", world.repo, "damaged", "pull it again")
    elif isinstance(got, Refused):
        got.says("HubError", world.repo)
    else:  # the client asks for the rest, again and again
        assert np.array_equal(got, world.actions)
    world.nothing_damaged()
    world.mend()
    world.pulls_well()


def test_what_failed_once_is_tried_again(world: World) -> None:
    """But for a status of the store of large files, which the client takes as an answer."""
    for step, action in (("head_config", 500), ("get_config", "truncate"), ("get_model", "truncate")):
        world.fails(*PULL_STEPS[step], action, 1)
    world.pulls_well()
    assert all(fault.times == 0 for fault in world.hub.faults)


def test_the_cache_serves_while_the_hub_does_not(world: World) -> None:
    world.pulls_well()
    for action in (500, 503, "drop"):
        world.fails(*PULL_STEPS["resolve"], action)
        world.pulls_well()
        world.mend()
    world.hub.stop()
    world.pulls_well()
    world.here(learn_pulled).says("HubError", world.repo, "nothing was changed")
    world.mend()
    assert world.here(learn_pulled) is True


def test_nothing_listens_and_nothing_is_cached(world: World) -> None:
    world.hub.stop()
    world.pull().says("HubError", world.repo, "not in the cache", "HF_ENDPOINT")
    world.push().says("HubError", world.repo, "connection failed")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"token": False}, "log in"),
        ({"token": "hf_stranger"}, "log in"),
    ],
)
def test_a_private_repository_is_absent_to_others(how: dict[str, Any], words: str, world: World) -> None:
    world.hub.repository(world.repo).private = True
    world.pull(**how).says("HubError", world.repo, "no such repository, or it is private", words)
    assert not list(world.cache.glob("models--*/snapshots/*/*"))
    assert np.array_equal(world.pull(token="hf_read_only"), world.actions)


def test_a_gated_repository_asks_for_access(world: World) -> None:
    world.hub.repository(world.repo).gated = True
    for token in (False, "hf_stranger"):
        world.pull(token=token).says("HubError", world.repo, "ask for access")
    world.pulls_well()


def test_what_is_not_there_is_told_apart(world: World) -> None:
    world.pull("me/nothing-here").says("HubError", "me/nothing-here", "no such repository")
    world.pull(revision="nowhere").says("HubError", world.repo, "nowhere", "no such branch, tag or commit")
    world.pull(revision="nowhere").says("HubError", "(no such file or folder here; on the Hub, revision nowhere)")
    world.pull(revision="0" * 40).says("HubError", world.repo)
    assert not list(world.cache.glob("models--*/snapshots/*/*"))


def changed(config: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(config), **fields}).encode()


PICKLE = b"\x80\x04\x95" + b"x" * 99
STRANGE: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "2 MB": ({"config_json": lambda c: changed(c, more="x" * (2 << 20))}, "ArtifactError", ("config.json", "allowed")),
    "algorithm": ({"config_json": lambda c: changed(c, algorithm="Magic")}, "ArtifactError", ("'Magic'", "upgrade")),
    "algorithm_path": ({"config_json": lambda c: changed(c, algorithm="os.system")}, "ArtifactError", ("os.system",)),
    "future": ({"config_json": lambda c: changed(c, format=2)}, "ArtifactError", ("format 2", "upgrade")),
    "format": ({"config_json": lambda c: changed(c, format="1")}, "ArtifactError", ("format",)),
    "library": ({"config_json": lambda c: b'{"model_type": "bert"}'}, "ArtifactError", ("library", "own library")),
    "deep": (
        {"config_json": lambda c: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"},
        "ArtifactError",
        ("nested too deep",),
    ),
    "huge number": ({"config_json": lambda c: b'{"a":' + b"9" * 100_000 + b"}"}, "ArtifactError", ("config.json",)),
    "1e999": ({"config_json": lambda c: c[:-2] + b', "a": 1e999}'}, "ArtifactError", ("not finite",)),
    "NaN": ({"config_json": lambda c: c[:-2] + b', "a": NaN}'}, "ArtifactError", ("not finite",)),
    "a list": ({"config_json": lambda c: b"[]"}, "ArtifactError", ("a list, not an object",)),
    "not JSON": ({"config_json": lambda c: PICKLE}, "ArtifactError", ("config.json",)),
    "header": (
        {"model_safetensors": lambda m: struct.pack("<Q", 1 << 60) + m[8:]},
        "ArtifactError",
        ("model.safetensors", "header"),
    ),
    "pickled": ({"model_safetensors": lambda m: PICKLE}, "ArtifactError", ("pickle", "never opened")),
    "cut": ({"model_safetensors": lambda m: m[:-10]}, "ArtifactError", ("truncated or damaged",)),
    "nan": ({"model_safetensors": lambda m: with_nan(m)}, "ArtifactError", ("NaN or infinity", "earlier checkpoint")),
    "empty": ({"model_safetensors": lambda m: b""}, "ArtifactError", ("model.safetensors",)),
    "no model": ({"model_safetensors": None}, "ArtifactError", ("no model.safetensors", "check the name")),
    "no config": ({"config_json": None}, "ArtifactError", ("no config.json", "check the name")),
}


def with_nan(model: bytes) -> bytes:
    tensors = safetensors.numpy.load(model)
    name = next(name for name, tensor in tensors.items() if tensor.dtype.kind == "f" and tensor.size > 2)
    tensors[name].flat[1] = np.nan
    return safetensors.numpy.save(tensors)


@pytest.mark.parametrize("what", STRANGE)
def test_a_strange_artifact_is_refused(what: str, world: World) -> None:
    """By name and cause, and nothing is kept of it but what the cache holds whole."""
    changes, kind, words = STRANGE[what]
    good, repo = world.hub.files("me/seed"), f"{world.repo}-strange"
    made = {key: change and change(good[".".join(key.rsplit("_", 1))]) for key, change in changes.items()}
    put_instead(world, repo, **made)
    world.pull(repo).says(kind, *words)
    world.pull(repo).says(kind, repo, *words)


OTHERS: dict[str, tuple[dict[str, bytes], tuple[str, ...], tuple[str, ...]]] = {
    "pickle": ({"model.pkl": PICKLE}, ("is a pickle", "model.pkl"), ("model.pkl", "another name")),
    "torch": ({"pytorch_model.bin": PICKLE}, ("is a pickle",), ("pytorch_model.bin", "another name")),
    "sb3": (
        {"ppo-Pendulum-v1.zip": b"PK", "config.json": b'{"policy_class": {}}', "replay.mp4": b"", "results.json": b"{}"},
        ("Stable-Baselines3",),
        ("another library", "another name"),
    ),
    "sb3_zip": ({"sac-Hopper-v5.zip": b"PK"}, ("Stable-Baselines3",), ("sac-Hopper-v5.zip", "another name")),
    "transformers": (
        {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x", "tokenizer.json": b"{}"},
        ("library",),
        ("another library", "another name"),
    ),
    "escape": ({"\x1b[31m\n.pkl": b""}, ("is a pickle",), ("another name",)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_somebody_else_s_repository_is_neither_read_nor_overwritten(what: str, world: World) -> None:
    files, pull_words, push_words = OTHERS[what]
    repo = f"{world.repo}-{what}"
    world.hub.put(repo, files)
    head = world.head(repo)
    world.pull(repo).says("ArtifactError", repo, *pull_words)
    assert {path.name for path in world.cache.glob("models--*/snapshots/*/*")} <= {"config.json", "model.safetensors"}
    world.push(repo).says("HubError", repo, *push_words)
    assert world.head(repo) == head


def test_an_empty_repository_is_nothing_to_pull_and_good_to_push_to(world: World) -> None:
    repo = f"{world.repo}-empty"
    world.hub.put(repo, {})
    world.pull(repo).says("ArtifactError", repo, "no config.json", "check the name and the revision")
    assert world.push(repo) == world.head(repo)
    assert np.array_equal(world.pull(repo), world.actions)


# ---- a Hub that lies ---------------------------------------------------------------------------------------------------


def answering(change: Callable[[Any], Any]) -> Callable[[RequestHandler], None]:
    """The real answer with its body changed."""

    def answer(handler: RequestHandler) -> None:
        real = handler.real_answer(handler.path.partition("?")[0])
        handler.send(Answer(change(real.body), real.status, real.headers))

    return answer


def test_a_size_out_of_all_reason_is_not_downloaded(world: World) -> None:
    for size in (10**12, 1 << 33, "big", None, -1):
        lie = answering(lambda body, size=size: [{**entry, "size": size} for entry in body])
        world.fails(*PULL_STEPS["paths"], lie)
        start = len(world.hub.log)
        world.pull().says("ArtifactError", world.repo, "config.json")
        if size != -1:
            assert not [request for request in world.hub.log[start:] if "/resolve/" in request.path]
        world.nothing_damaged()
        world.mend()
    world.pulls_well()


def test_a_path_out_of_the_cache_is_never_written(world: World, tmp_path: Path) -> None:
    def evil(body: Any) -> Any:
        return [{**body[0], "path": "../../evil"}, {**body[0], "path": "/tmp/evil"}, *body]

    world.fails(*PULL_STEPS["paths"], answering(evil))
    world.pulls_well()
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/evil").exists()
    assert {path.name for path in world.cache.glob("models--*/snapshots/*/*")} == {"config.json", "model.safetensors"}
    world.mend()
    world.fails("GET", r"/api/models/me/\w+$", answering(lambda body: {**body, "siblings": [{"rfilename": "../../evil"}]}))
    world.push().says("HubError", world.repo, "../../evil", "another name")


@pytest.mark.parametrize("sha", ["../../x", "0" * 39, "main", "A" * 40, "", None, 7])
def test_a_commit_that_is_none_is_refused(sha: Any, world: World, tmp_path: Path) -> None:
    world.fails(*PULL_STEPS["resolve"], answering(lambda body: {**body, "sha": sha}))
    world.pull().says("HubError", world.repo)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("x"))
    world.mend()
    world.pulls_well()


@pytest.mark.parametrize("sha", ["../../../../x", "0" * 40])
def test_a_file_of_another_commit_is_not_taken(sha: str, world: World, tmp_path: Path) -> None:
    def other(handler: RequestHandler) -> None:
        real = handler.real_answer(handler.path.partition("?")[0])
        handler.send(Answer(real.body, real.status, {**real.headers, "X-Repo-Commit": sha}))

    world.fails(*PULL_STEPS["head_config"], other)
    got = world.pull()
    assert not [path for path in tmp_path.rglob("config.json") if "snapshots" not in path.parts]
    if isinstance(got, Refused):
        assert "HubError" in got.kinds or "ArtifactError" in got.kinds, got
    world.mend()
    world.pulls_well()


# ---- pushing -----------------------------------------------------------------------------------------------------------

PUSH_STEPS = {
    "create": ("POST", "/api/repos/create"),
    "info": ("GET", r"/api/models/me/\w+$"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "put": ("PUT", "/_lfs/"),
    "verify": ("POST", "/_lfs/.*/verify"),
    "commit": ("POST", "/commit/"),
}


@pytest.fixture
def other(world: World) -> World:
    """The repository holds an older policy, whose large files are not those that are pushed."""
    model = world.hub.files("me/seed")["model.safetensors"]
    world.hub.put(world.repo, {"model.safetensors": model[:-8] + b"\0" * 8, "LICENSE": b"mine"}, lfs=True)
    for file in list(world.hub.large_files):
        if world.hub.large_files[file] in world.hub.files("me/seed").values():
            del world.hub.large_files[file]
    return world


@pytest.mark.parametrize(
    ("step", "action"),
    # refused to make the repository, the client looks whether it is there
    [(step, action) for step in PUSH_STEPS for action in (500, 403, "drop", "stop") if (step, action) != ("create", 403)],
)
def test_a_push_that_fails_changes_nothing(step: str, action: Any, other: World) -> None:
    head, files = other.head(), other.hub.files(other.repo)
    other.fails(*PUSH_STEPS[step], (lambda handler: handler.server.hub.stop()) if action == "stop" else action)
    other.push().says("HubError", other.repo, *(["hf auth login"] if action == 403 and step not in ("put", "verify") else []))
    assert other.head() == head and other.hub.files(other.repo) == files
    other.mend()
    assert other.push() == other.head() != head
    other.pulls_well()


@pytest.mark.parametrize("token", [False, "hf_read_only", "hf_stranger", "hf_unknown"])
def test_a_token_that_may_not_write_is_told(token: Any, other: World) -> None:
    head = other.head()
    other.push(token=token).says("HubError", other.repo, "hf auth login")
    other.push("me/new-by-token", token=token).says("HubError", "me/new-by-token", "hf auth login")
    assert other.head() == head and ("models", "me/new-by-token") not in other.hub.repositories


@pytest.mark.parametrize("evaluated", [False, True])
def test_of_two_pushers_the_slower_is_told(evaluated: bool, other: World, tmp_path: Path) -> None:
    """And the folder is kept and named where work went into it."""
    other.fails("POST", "/commit/", lambda handler: other.hub.put(other.repo, {"notes.txt": b"first"}), 1)
    how = {"video": True} if evaluated else {}
    got = other.here(pushed_from, tmp_path / "scratch", other.repo, **how)
    got.says("HubError", other.repo, "somebody else pushed", "push again")
    files = other.hub.files(other.repo)
    assert files["notes.txt"] == b"first" and files["LICENSE"] == b"mine"
    assert "README.md" in files and files["model.safetensors"][-8:] == b"\0" * 8
    left = list((tmp_path / "scratch").iterdir())
    if not evaluated:
        assert not left and "diffagents push" not in got.text
        return
    (folder,) = left
    assert f"diffagents push {folder / 'policy'} {other.repo}" in got.text
    assert other.here(push_folder, folder / "policy", other.repo) == other.head()
    other.pulls_well()


def pushed_from(scratch: Path, repo_id: str, **how: Any) -> Any:
    """A push whose temporary folder is made in `scratch`."""
    import tempfile

    scratch.mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        return push(repo_id, **how)
    finally:
        tempfile.tempdir = before


def push_folder(folder: Path, repo_id: str) -> str:
    oid: str = registry.push_folder(folder, repo_id).oid
    return oid


def test_a_push_that_fails_leaves_no_folder_behind(other: World, tmp_path: Path) -> None:
    other.fails(*PUSH_STEPS["commit"], 500)
    other.here(pushed_from, tmp_path / "scratch", other.repo).says("HubError", other.repo, "500")
    assert not list((tmp_path / "scratch").iterdir())


EDGES = ["me/\u00e9", "../x", "me/..", "-me/x", "me/x.git", "me/a--b"]


@pytest.mark.parametrize("name", ["no-owner", "a/b/c", "me/x y", "me/x" * 40, "me/", *EDGES])
def test_a_name_that_is_none_is_refused_before_any_request(name: str, world: World) -> None:
    start = len(world.hub.log)
    world.push(name).says("ValueError", "organisation/name")
    assert len(world.hub.log) == start


def push_pulled(repo_id: str) -> Any:
    kept["agent"], before = kept["pulled"], kept["agent"]
    try:
        return push(repo_id)
    finally:
        kept["agent"] = before


def test_a_pulled_agent_is_not_pushed_without_its_learner(world: World) -> None:
    """Else the push would take it out of the repository."""
    world.pulls_well()
    head = world.head()
    world.fails("HEAD", "/learner.safetensors", 500)
    world.here(push_pulled, world.repo).says("HubError", world.repo, "learner.safetensors")
    assert world.head() == head
    world.mend()
    assert world.here(push_pulled, world.repo) == world.head() != head
    assert "learner.safetensors" in world.hub.files(world.repo)


# ---- full disks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bytes", [64, 2100])
def test_a_full_disk_while_pulling(n_bytes: int, world: World) -> None:
    """The first has no room for config.json, the second none for model.safetensors."""
    sizes = {name: len(data) for name, data in world.hub.files("me/seed").items()}
    assert 64 < sizes["config.json"] < 2100 < sizes["model.safetensors"], sizes
    got = world.here(on_a_full_disk, n_bytes, pull, world.repo, world.cache)
    got.says("HubError", "HF_HOME")
    world.nothing_damaged()
    world.pulls_well()


def test_a_full_disk_while_saving_and_pushing(other: World, tmp_path: Path) -> None:
    folder, head = tmp_path / "saved", other.head()
    other.here(on_a_full_disk, 1000, save_pretrained, folder).says("OSError", "was not written", "saved")
    assert not list(tmp_path.iterdir())
    assert not isinstance(other.here(save_pretrained, folder), Refused)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other.here(on_a_full_disk, 1000, save_pretrained, folder).says("OSError", "an older one is unchanged")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
    other.here(on_a_full_disk, 1000, pushed_from, tmp_path / "scratch", other.repo).says("OSError")
    assert not list((tmp_path / "scratch").iterdir()) and other.head() == head


# ---- offline, and Xet --------------------------------------------------------------------------------------------------


def test_offline_acts_from_the_cache_and_says_what_it_lacks(world: World, tmp_path: Path) -> None:
    world.pulls_well()
    start = len(world.hub.log)
    with client(world.hub, tmp_path / "other", ["matplotlib"], HF_HUB_OFFLINE="1") as offline:
        offline(pull, world.repo, tmp_path / "empty").says("HubError", world.repo, "not in the cache")
        got = offline(pull, world.repo, world.cache)
        assert isinstance(got, np.ndarray) and np.array_equal(got, world.actions)
        offline(learn_pulled).says("HubError", world.repo, "learner.safetensors", "not in the cache", "offline")
        (warning,), (has_training_networks,) = offline(save_pulled, tmp_path / "saved.zip")
        assert "learner.safetensors" in warning and has_training_networks == "False"
        offline(pull, world.repo, world.cache, revision="nowhere").says("HubError", world.repo, "nowhere")
        offline(push_another, world.repo).says("HubError", world.repo)
    world.pull(local_files_only=True)
    world.here(learn_pulled).says("HubError", world.repo, "learner.safetensors")
    assert len(world.hub.log) == start


def push_another(repo_id: str) -> Any:
    kept["agent"] = small("TD3BC").learn(toy_data())
    return push(repo_id)


@pytest.fixture(scope="module")
def xet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("xet")
    agent: Any = small("TD3BC", normalize_obs=True).learn(toy_data())
    agent.save(folder / "agent.zip", include_trainer_state=False)
    with Hub("xet", folder) as hub, client(hub, folder / "home", ["matplotlib"]) as here:
        actions = here(train, folder / "agent.zip")
        yield World(hub, here, actions, "me/xet", folder)
        hub.faults.clear()


def test_xet_that_fails_while_pushing_and_pulling(xet: World, tmp_path: Path) -> None:
    """Refused only: at a 500 and a lost connection hf_xet tries for minutes, by a clock of its own."""
    at = xet._replace(cache=tmp_path / "cache")
    at.fails("GET", "xet-write-token", 403)
    at.push().says("HubError", xet.repo)
    at.mend()
    assert xet.hub.files(xet.repo).keys() == {".gitattributes"}
    assert at.push() == at.head()
    at.fails("GET", "xet-read-token", 403)
    at.pull().says("HubError", xet.repo)
    at.mend()
    assert {path.name for path in at.cache.glob("models--*/snapshots/*/*")} <= {"config.json"}
    at.pulls_well()
    got = xet.here(on_a_full_disk, 1900, pull, xet.repo, tmp_path / "full")
    if isinstance(got, Refused):
        got.says("HubError", xet.repo)
    assert np.array_equal(xet.here(pull, xet.repo, tmp_path / "full"), xet.actions)
