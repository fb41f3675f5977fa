"""The test server is one that the real huggingface_hub client accepts, and each of its faults is seen by a client.

The client runs in processes of its own: it reads its environment when it is imported.
"""

import hashlib
import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Answer, Fault, Hub, RequestHandler

MODES = ("xet", "lfs", "inline")
WEIGHTS = bytes(range(256)) * 4096
PRELUDE = """
import json, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete, HfApi, snapshot_download
from huggingface_hub import errors
argument, api = json.loads(sys.argv[1]), HfApi()
weights = bytes(range(256)) * 4096

def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as raised:
        return type(raised).__name__
    return "nothing"

def pull(sha, **kwargs):
    folder = Path(snapshot_download("org/agent", revision=sha, **kwargs))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
"""


def client(hub: Hub, home: Path, code: str, argument: Any = None, **environment: str) -> Any:
    """Run code with the real client in a fresh process; what it assigns to `result` comes back."""
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(home), "TQDM_DISABLE": "1", **environment}
    script = f"{PRELUDE}\n{code}\nprint('result', json.dumps(result))"
    command = [sys.executable, "-c", script, json.dumps(argument)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("result ")[2])


def fetch(hub: Hub, path: str, token: str | None = None, method: str = "GET", body: bytes | None = None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(hub.url + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.headers["X-Error-Code"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub("lfs", tmp_path) as hub:
        yield hub


PUSH = """
result = {"user": api.whoami()["name"]}
for _ in range(2):
    result["url"] = api.create_repo("org/agent", exist_ok=True)
result["again"] = error(api.create_repo, "org/agent")
adds = [Add("model.safetensors", weights), Add("sub/config.json", b"{}"), Add("old.txt", b"old")]
first = api.create_commit("org/agent", adds, commit_message="first").oid
info = api.model_info("org/agent", files_metadata=True)
assert info.sha == first
result["files"] = {file.rfilename: [file.size, file.blob_id, file.lfs and dict(file.lfs)] for file in info.siblings}
pulled = pull(first, allow_patterns=["*.safetensors", "*.json"])
assert pulled == {"model.safetensors": weights, "sub/config.json": b"{}"}, pulled.keys()
result["first"] = first
"""

# the same pull again, while no server runs
PULL_AGAIN = 'result = sorted(pull(argument, allow_patterns=["*.safetensors", "*.json"]))'

CHANGE = """
first = argument
changes = [Add("model.safetensors", weights[::-1]), Delete("old.txt")]
second = api.create_commit("org/agent", changes, commit_message="second", parent_commit=first).oid
assert api.list_repo_files("org/agent") == [".gitattributes", "model.safetensors", "sub/config.json"]
assert "old.txt" in api.list_repo_files("org/agent", revision=first)
assert pull(first)["model.safetensors"] == weights
assert pull(second)["model.safetensors"] == weights[::-1]
assert pull("main")["model.safetensors"] == weights[::-1]
assert [commit.title for commit in api.list_repo_commits("org/agent")] == ["second", "first", "initial commit"]
api.create_branch("org/agent", branch="seed/1", revision=first)
api.create_tag("org/agent", tag="v1", revision=first)
refs = api.list_repo_refs("org/agent")
assert {ref.name: ref.target_commit for ref in refs.branches + refs.tags} == {"main": second, "seed/1": first, "v1": first}
assert api.model_info("org/agent", revision="seed/1").sha == api.model_info("org/agent", revision="v1").sha == first
assert [file.path for file in api.get_paths_info("org/agent", ["model.safetensors", "absent"])] == ["model.safetensors"]
stale = error(api.create_commit, "org/agent", [Add("a.txt", b"a")], commit_message="late", parent_commit=first)
result = {
    "stale": stale,
    "repository": error(api.model_info, "org/absent"),
    "revision": error(api.model_info, "org/agent", revision="absent"),
    "file": error(api.hf_hub_download, "org/agent", "absent.json"),
    "tag": error(api.create_tag, "org/agent", tag="v1"),
    "second": second,
}
"""


@pytest.mark.parametrize("mode", MODES)
def test_the_real_client_pushes_and_pulls(mode: str, tmp_path: Path) -> None:
    with Hub(mode, tmp_path) as hub:
        pushed = client(hub, tmp_path / "home", PUSH)
        assert (pushed["user"], pushed["again"]) == ("tester", "HfHubHTTPError")
        assert pushed["url"] == f"{hub.url}/org/agent"
        size, blob, large = pushed["files"]["model.safetensors"]
        assert size == len(WEIGHTS)
        if mode == "inline":
            assert large is None and blob == hashlib.sha1(b"blob %d\0" % size + WEIGHTS).hexdigest()
        else:
            assert large["sha256"] == hashlib.sha256(WEIGHTS).hexdigest() and large["size"] == size
        assert pushed["files"]["sub/config.json"][::2] == [2, None]
        # the mode is the one that was asked for
        paths = [request.path for request in hub.log]
        assert any("xet-write-token" in path for path in paths) == (mode == "xet")
        assert any(path.startswith("/_lfs/") for path in paths) == (mode == "lfs")

        requests = len(hub.log)
        assert client(hub, tmp_path / "home", PULL_AGAIN, pushed["first"]) == ["model.safetensors", "sub/config.json"]
        assert len(hub.log) == requests

        changed = client(hub, tmp_path / "other_home", CHANGE, pushed["first"])
        second = changed.pop("second")
        assert changed == {
            "stale": "HfHubHTTPError",
            "repository": "RepositoryNotFoundError",
            "revision": "RevisionNotFoundError",
            "file": "RemoteEntryNotFoundError",
            "tag": "HfHubHTTPError",
        }
        assert "seed/1" in hub.repository("org/agent").branches
        files = hub.files("org/agent", second)
        assert files.keys() == {".gitattributes", "model.safetensors", "sub/config.json"}
        assert files["model.safetensors"] == WEIGHTS[::-1] and files["sub/config.json"] == b"{}"
        assert hub.files("org/agent", "v1")["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("mode", MODES)
def test_the_client_pulls_what_was_seeded(mode: str, tmp_path: Path) -> None:
    with Hub(mode, tmp_path) as hub:
        hub.put("org/agent", {"config.json": b"{}"})
        sha = hub.put("org/agent", {"model.safetensors": WEIGHTS}, lfs=True)
        code = 'result = sorted(path for path, data in pull("main").items() if data)\nassert pull("main")[result[2]] == weights'
        assert client(hub, tmp_path / "home", code) == [".gitattributes", "config.json", "model.safetensors"]
        assert hub.repository("org/agent").resolve("main") == sha


UPLOAD_FOLDER = """
(folder := Path(argument)).mkdir()
(folder / "model.safetensors").write_bytes(weights)
(folder / "README.md").write_text("---\\ntags: [a]\\n---\\n")
api.create_repo("org/agent")
first = api.upload_folder(repo_id="org/agent", folder_path=folder).oid
second = api.upload_folder(repo_id="org/agent", folder_path=folder).oid
result = [first, second, api.model_info("org/agent").tags]
"""


@pytest.mark.parametrize("mode", ["xet", "lfs"])
def test_an_unchanged_folder_makes_no_commit(mode: str, tmp_path: Path) -> None:
    with Hub(mode, tmp_path) as hub:
        first, second, tags = client(hub, tmp_path / "home", UPLOAD_FOLDER, str(tmp_path / "folder"))
        assert first == second and tags == ["a"]
        assert len(hub.repository("org/agent").commits) == 2
        assert hub.files("org/agent")["model.safetensors"] == WEIGHTS


RIGHTS = """
from huggingface_hub import hf_hub_download
read_only, stranger = argument
result = {name: [
    error(api.model_info, "org/private", token=token),
    error(hf_hub_download, "org/private", "a.json", token=token),
    error(api.model_info, "org/gated", token=token),
    error(hf_hub_download, "org/gated", "a.json", token=token),
    error(api.create_repo, "org/new", token=token),
    error(api.create_commit, "org/open", [Add("b.txt", b"")], commit_message="b", token=token),
    sorted(model.id for model in api.list_models(author="org", token=token)),
] for name, token in {"anonymous": False, "stranger": stranger, "read_only": read_only, "owner": None}.items()}
"""


def test_tokens_decide_who_sees_and_who_writes(hub: Hub, tmp_path: Path) -> None:
    for name in ("private", "gated", "open"):
        hub.put(f"org/{name}", {"a.json": b"{}"})
    hub.repository("org/private").private = hub.repository("org/gated").gated = True
    absent, gated, refused = "RepositoryNotFoundError", "GatedRepoError", "HfHubHTTPError"
    some, every = ["org/gated", "org/open"], ["org/gated", "org/open", "org/private"]
    rights = client(hub, tmp_path / "home", RIGHTS, [hub.read_only_token, hub.stranger_token])
    # The files are asked for before the owner's copy of them is in the cache
    assert rights["stranger"] == [absent, absent, "nothing", gated, refused, refused, some]
    assert rights["read_only"] == ["nothing", "nothing", "nothing", "nothing", refused, refused, every]
    assert rights["owner"] == ["nothing"] * 6 + [[*every[:1], "org/new", *every[1:]]]
    assert rights["anonymous"][:4] == [absent, absent, "nothing", gated] and rights["anonymous"][6] == some
    assert "nothing" not in rights["anonymous"][4:6]
    private = "/api/models/org/private"
    answers = [fetch(hub, private, token)[0] for token in (None, hub.stranger_token, hub.read_only_token, hub.token)]
    assert answers == [401, 404, 200, 200]
    gate = "/org/gated/resolve/main/a.json"
    assert [fetch(hub, gate, token) for token in (None, hub.stranger_token)] == [(401, "GatedRepo"), (403, "GatedRepo")]
    assert fetch(hub, "/api/models/org/open/commit/main", hub.read_only_token, "POST", b"{}")[0] == 403


def test_models_are_found_by_author_and_tag(hub: Hub, tmp_path: Path) -> None:
    card = b"---\nlibrary_name: diffagents\ntags: [offline-rl, Hopper-v5]\n---\n# A card\n"
    hub.put("org/ours", {"README.md": card})
    hub.put("org/theirs", {"README.md": b"no head"})
    hub.put("other/ours", {"README.md": card})
    code = """
result = [sorted(model.id for model in api.list_models(**query)) for query in argument]
(model,) = api.list_models(author="org", filter="diffagents")
result += [sorted(model.tags), model.library_name]
"""
    queries = [{"author": "org"}, {"filter": "diffagents"}, {"author": "org", "filter": ["diffagents", "offline-rl"]}]
    found = client(hub, tmp_path / "home", code, [*queries, {"filter": ["diffagents", "absent"]}])
    expected = [["org/ours", "org/theirs"], ["org/ours", "other/ours"], ["org/ours"], []]
    assert found == [*expected, ["Hopper-v5", "diffagents", "offline-rl"], "diffagents"]


MINARI = """
import numpy as np, minari, minari.namespace
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
rewards, ends = [1.0, 2.0, 3.0], [False] * 3
buffer = EpisodeBuffer(
    id=0, observations=np.arange(8.0).reshape(4, 2), actions=np.zeros((3, 1)), rewards=rewards,
    terminations=ends, truncations=[False, False, True], infos={},
)
box = spaces.Box(-9, 9, (2,), np.float64)
minari.namespace.create_namespace("toys")  # Minari 0.5.4 finds none without a namespace on a Hub
actions = spaces.Box(-1, 1, (1,), np.float64)
minari.create_dataset_from_buffers("toys/line-v0", [buffer], observation_space=box, action_space=actions)
from minari import upload_dataset
upload_dataset("toys/line-v0", argument)
minari.delete_dataset("toys/line-v0")
assert "toys/line-v0" not in minari.list_local_datasets()
minari.download_dataset("hf://org/toys/line-v0")
(episode,) = minari.load_dataset("toys/line-v0").iterate_episodes()
result = [episode.rewards.tolist(), episode.observations.tolist()]
"""


@pytest.mark.parametrize("mode", ["xet", "lfs"])
def test_minari_uploads_and_downloads(mode: str, tmp_path: Path) -> None:
    with Hub(mode, tmp_path) as hub:
        places = {"MINARI_DATASETS_PATH": str(tmp_path / "minari"), "MINARI_REMOTE": "hf://org"}
        data = client(hub, tmp_path / "home", MINARI, hub.token, **places)
        assert data == [[1.0, 2.0, 3.0], [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]]
        assert "line-v0/data/main_data.hdf5" in hub.files("org/toys", kind="datasets")


SMALL = "/org/agent/resolve/main/config.json"


@pytest.fixture
def filled(hub: Hub) -> Hub:
    hub.put("org/agent", {"config.json": b'{"a": 1}'})
    hub.put("org/agent", {"model.safetensors": WEIGHTS}, lfs=True)
    return hub


@pytest.mark.parametrize("status", [401, 403, 404, 412, 429, 500])
def test_a_status_is_answered_as_often_as_asked(filled: Hub, status: int) -> None:
    filled.faults.append(("GET", "config", status, 2))
    assert [fetch(filled, SMALL)[0] for _ in range(3)] == [status, status, 200]
    filled.faults.append(Fault("GET", "config", status))
    assert [fetch(filled, SMALL)[0] for _ in range(3)] == [status] * 3
    assert fetch(filled, "/api/models/org/agent")[0] == 200
    assert fetch(filled, SMALL, method="HEAD")[0] == 200


def test_drop_and_truncate_and_corrupt_and_stall(filled: Hub) -> None:
    large = "/_lfs/" + hashlib.sha256(WEIGHTS).hexdigest()
    for path, whole in ((SMALL, b'{"a": 1}'), (large, WEIGHTS)):
        filled.faults[:] = [("GET", path, action, 1) for action in ("drop", "truncate", "corrupt")]
        with pytest.raises(http.client.RemoteDisconnected):
            fetch(filled, path)
        with pytest.raises(http.client.IncompleteRead) as half:
            fetch(filled, path)
        assert half.value.partial == whole[: len(whole) // 2]
        _, damaged = fetch(filled, path)
        assert len(damaged) == len(whole) and sum(a != b for a, b in zip(damaged, whole, strict=True)) == 1
        assert fetch(filled, path) == (200, whole)
    filled.stall_seconds = 0.3
    filled.faults[:] = [Fault("GET", "config", "stall", 1)]
    start = time.monotonic()
    assert fetch(filled, SMALL) == (200, b'{"a": 1}')
    assert time.monotonic() - start >= 0.3


def test_a_function_may_look_or_answer(filled: Hub) -> None:
    seen = []
    filled.faults.append(("GET", "config", lambda handler: seen.append(handler.path), 1))
    assert fetch(filled, SMALL)[0] == 200 and seen == [SMALL]

    def refuse(handler: RequestHandler) -> None:
        handler.send(Answer({"error": "tea"}, 418))

    filled.faults.append(("GET", "config", refuse, 1))
    assert fetch(filled, SMALL)[0] == 418


def test_an_upload_with_the_wrong_sha256_is_refused(hub: Hub) -> None:
    path = "/_lfs/" + hashlib.sha256(b"right").hexdigest()
    assert fetch(hub, path, method="PUT", body=b"wrong")[0] == 422
    assert fetch(hub, path)[0] == 404
    assert fetch(hub, path, method="PUT", body=b"right")[0] == 200
    assert fetch(hub, path) == (200, b"right")


def test_what_the_client_makes_of_faults(filled: Hub, tmp_path: Path) -> None:
    filled.faults += [("GET", "/org/agent/revision", 403, 1), ("GET", "/org/agent/revision", 401, 1)]
    filled.faults += [("PUT", "/_lfs/", 500, 1), ("GET", "/_lfs/", "truncate", 1)]
    code = """
result = [error(api.model_info, "org/agent", revision="main") for _ in range(3)]
api.create_commit("org/agent", [Add("new.safetensors", b"new")], commit_message="retried")
assert pull("main")["model.safetensors"] == weights
"""
    assert client(filled, tmp_path / "home", code) == ["HfHubHTTPError", "HfHubHTTPError", "nothing"]
    assert all(fault.times == 0 for fault in filled.faults)
    assert filled.files("org/agent")["new.safetensors"] == b"new"


def test_the_server_dies_in_the_middle_of_an_upload_and_returns(filled: Hub, tmp_path: Path) -> None:
    filled.faults.append(("POST", "/commit/", lambda handler: handler.server.hub.stop(), 1))
    before = filled.repository("org/agent").resolve("main")
    code = 'result = error(api.create_commit, "org/agent", [Add("new.txt", b"new")], commit_message="lost")'
    assert client(filled, tmp_path / "home", code) in ("ConnectError", "RemoteProtocolError", "ReadError")
    assert filled.repository("org/agent").resolve("main") == before
    with pytest.raises(urllib.error.URLError):
        fetch(filled, SMALL)
    filled.start()
    assert client(filled, tmp_path / "home", code) == "nothing"
    assert filled.files("org/agent")["new.txt"] == b"new"
