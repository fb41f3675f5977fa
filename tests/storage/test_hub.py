"""A policy pushed to a Hub acts the same when pulled elsewhere: the real client, against the server of hub_server.py."""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hub_clients import NOT_FOR_ACTING, Client, Refused, attempt, client, kept
from hub_server import Hub
from small_agents import NAMES, STEPS, agent_class, small
from write_format_fixture import OBS, toy_data

import diffagents
from diffagents import registry
from diffagents.storage import card
from diffagents.storage import hub as hub_of_diffagents

MODES = ("xet", "lfs", "inline")
RESUMED = ("SRPO", "TD3BC")
ARTIFACT = {"config.json", "model.safetensors", "learner.safetensors"}
STATE = {"optimizer.safetensors", "trainer_state.json"}
QUIET: dict[str, Any] = {"verbose": 0, "device": "cpu"}


def acts(agent: Any) -> np.ndarray:
    actions: np.ndarray = agent.predict(OBS, deterministic=True)[0]
    return actions


def everything(agent: Any) -> dict[str, np.ndarray]:
    """Every weight, and what the agent does with them."""
    weights = {
        f"{name}.{key}": value.numpy().copy()
        for name, net in agent.networks().items()
        for key, value in net.state_dict().items()
    }
    return {**weights, "actions": acts(agent)}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not np.array_equal(one[name], other[name])]
    assert not different


class Trained(NamedTuple):
    """Agents on disk as <name>.zip (two also interrupted, as <name>-half.zip), and what they and their successors do."""

    folder: Path
    actions: dict[str, np.ndarray]
    learned_on: dict[str, np.ndarray]
    finished: dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    made = Trained(tmp_path_factory.mktemp("trained"), {}, {}, {})
    for name in NAMES:
        agent: Any = small(name, normalize_obs=True).learn(toy_data())
        agent.save(made.folder / f"{name}.zip", include_trainer_state=False)
        made.actions[name] = acts(agent)
        again = agent_class(name).load(made.folder / f"{name}.zip", **QUIET)
        made.learned_on[name] = acts(again.learn(toy_data(), 6))
        if name in RESUMED:
            made.finished[name] = everything(agent)
            half = small(name, normalize_obs=True).learn(toy_data(), callback=stop_half_way)
            assert 0 < half.num_timesteps < agent.num_timesteps
            half.save(made.folder / f"{name}-half.zip")
    return made


def stop_half_way(local: dict[str, Any], _: dict[str, Any]) -> bool:
    agent = local["self"]
    return bool(agent.num_timesteps < local["total_timesteps"] - STEPS // 2)


# ---- what clients do, in processes of their own ------------------------------------------------------------------------


def push_all(folder: Path) -> dict[str, str]:
    shas = {}
    for name in NAMES:
        shas[name] = diffagents.load(folder / f"{name}.zip", **QUIET).push_to_hub(f"me/{name}").oid
    for name in RESUMED:
        half = diffagents.load(folder / f"{name}-half.zip", **QUIET)
        half.push_to_hub(f"me/{name}-half", include_trainer_state=True)
    return shas


def pull_all(**how: Any) -> dict[str, Any]:
    """By class, and by `diffagents.load`; the agents stay."""
    for name in NAMES:
        kept[name] = agent_class(name).from_pretrained(f"me/{name}", **QUIET, **how)
        assert type(diffagents.load(f"me/{name}", **QUIET, **how)) is agent_class(name)
    return {name: (acts(kept[name]), kept[name].origin.sha, kept[name].has_training_networks) for name in NAMES}


def learn_on(name: str) -> np.ndarray:
    return acts(kept[name].learn(toy_data(), 6))


def finish(name: str) -> tuple[bool, dict[str, np.ndarray]]:
    agent = agent_class(name).from_pretrained(f"me/{name}-half", **QUIET)
    acts(agent)  # acting uses up no random numbers of the training
    agent.predict(OBS)
    first = agent.has_training_networks
    agent.learn(toy_data(), reset_num_timesteps=False)
    return first, everything(agent)


def pull(repo_id: str, **how: Any) -> Any:
    agent = agent_class("SRPO").from_pretrained(repo_id, **QUIET, **how)
    kept["agent"] = agent
    return acts(agent)


def push(path: Path, repo_id: str, **how: Any) -> str:
    oid: str = diffagents.load(path, **QUIET).push_to_hub(repo_id, **how).oid
    return oid


def try_to_load(name: str, what: Any, **how: Any) -> Any:
    got = attempt(agent_class(name).from_pretrained, what, **QUIET, **how)
    return got if isinstance(got, Refused) else (acts(got), got.origin is None)


# ---- the round trip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_class_round_trips(mode: str, trained: Trained, tmp_path: Path) -> None:
    """Pushed, pulled elsewhere without any dataset library, trained on, finished, and again from the cache alone."""
    home = tmp_path / "home"
    with Hub(mode, tmp_path) as hub, contextlib.ExitStack() as stack:
        shas = stack.enter_context(client(hub, tmp_path / "pusher", ["matplotlib"]))(push_all, trained.folder)
        puller = stack.enter_context(client(hub, home, NOT_FOR_ACTING))
        start = len(hub.log)
        pulled = puller(pull_all)
        for name in NAMES:
            actions, sha, has_training_networks = pulled[name]
            assert np.array_equal(actions, trained.actions[name]), name
            assert sha == shas[name] and not has_training_networks
        assert not [request for request in hub.log[start:] if "learner" in request.path]
        snapshots = list(home.glob("hub/models--me--*/snapshots/*/*"))
        assert len(snapshots) == 2 * len(NAMES) and {path.name for path in snapshots} == {"config.json", "model.safetensors"}

        start = len(hub.log)
        for name in NAMES:
            assert np.array_equal(puller(learn_on, name), trained.learned_on[name]), name
            assert [r for r in hub.log[start:] if f"me/{name}/" in r.path and r.path.endswith("/learner.safetensors")], name
        for name in RESUMED:
            has_training_networks, end = puller(finish, name)
            assert not has_training_networks
            assert_same(end, trained.finished[name])

        start = len(hub.log)
        for how, environment in (({}, {"HF_HUB_OFFLINE": "1"}), ({"local_files_only": True}, {})):
            offline = stack.enter_context(client(hub, home, NOT_FOR_ACTING, **environment))
            for name, (actions, sha, _) in offline(pull_all, **how).items():
                assert np.array_equal(actions, trained.actions[name]) and sha == shas[name], name
            assert np.array_equal(offline(learn_on, "SRPO"), trained.learned_on["SRPO"])  # its learner is in the cache by now
        assert len(hub.log) == start


@pytest.fixture(scope="module")
def second(trained: Trained) -> dict[str, np.ndarray]:
    """SRPO-2.zip: another policy."""
    agent: Any = small("SRPO", seed=1).learn(toy_data())
    agent.save(trained.folder / "SRPO-2.zip", include_trainer_state=False)
    return {"actions": acts(agent)}


@pytest.mark.parametrize("mode", MODES)
def test_an_old_revision_stays_what_it_was(mode: str, trained: Trained, second: Any, tmp_path: Path) -> None:
    old, new = trained.actions["SRPO"], second["actions"]
    assert not np.array_equal(old, new)
    with Hub(mode, tmp_path) as hub, client(hub, tmp_path / "a", ["matplotlib"]) as here, client(hub, tmp_path / "b") as there:
        first = here(push, trained.folder / "SRPO.zip", "me/x")
        assert np.array_equal(there(pull, "me/x"), old)
        newest = here(push, trained.folder / "SRPO-2.zip", "me/x")
        branched = here(push, trained.folder / "SRPO.zip", "me/x", revision="v1")
        hub.repository("me/x").tags["release"] = first
        assert len({first, branched, newest}) == 3
        for revision, sha, actions in (
            (first, first, old),
            (None, newest, new),
            ("main", newest, new),
            ("v1", branched, old),
            ("release", first, old),
        ):
            assert np.array_equal(there(pull, "me/x", revision=revision), actions), revision
            assert there(origin)[:2] == ("me/x", sha), revision
        hub.stop()
        assert np.array_equal(there(pull, "me/x", revision=first), old)
        assert np.array_equal(there(pull, "me/x"), new)


def origin() -> tuple[str, str, Any]:
    return kept["agent"].origin.repo_id, kept["agent"].origin.sha, kept["agent"].provenance["source"]


# ---- one server and one client for what follows ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub("lfs", tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def here(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with client(hub, tmp_path_factory.mktemp("here"), ["matplotlib"]) as made:  # a picture takes seconds
        yield made


def test_what_is_here_wins_over_the_hub(hub: Hub, here: Client, trained: Trained, second: Any, tmp_path: Path) -> None:
    old, new = trained.actions["SRPO"], second["actions"]
    here(push, trained.folder / "SRPO-2.zip", "me/same")
    shutil.copy(trained.folder / "SRPO.zip", tmp_path / "zipped.zip")
    diffagents.load(trained.folder / "SRPO.zip", **QUIET).save_pretrained(tmp_path / "me" / "same")
    start = len(hub.log)
    here(change_folder, tmp_path)
    for what in ("me/same", tmp_path / "me" / "same", "zipped.zip", "zipped"):
        actions, from_here = here(try_to_load, "SRPO", what)
        assert np.array_equal(actions, old) and from_here, what
    here(try_to_load, "SRPO", "me/same", revision="main").says("ValueError", "revision='main'", "me/same")
    assert len(hub.log) == start
    for what in ("no-such-thing", "a/b/c", "me/../x", "me/x y", "./nothing"):
        here(try_to_load, "SRPO", what).says("FileNotFoundError", repr(what))
    assert len(hub.log) == start
    shutil.rmtree(tmp_path / "me")
    actions, from_here = here(try_to_load, "SRPO", "me/same")
    assert np.array_equal(actions, new) and not from_here
    here(change_folder, trained.folder)


def change_folder(path: Path) -> None:
    import os

    os.chdir(path)


def test_another_class_is_refused_by_name(here: Client, trained: Trained, tmp_path: Path) -> None:
    here(push, trained.folder / "TD3BC.zip", "me/other")
    here(try_to_load, "SRPO", "me/other").says("ArtifactError", "me/other", "contains an agent of TD3BC, not of SRPO", "TD3BC")
    here(try_to_load, "SRPO", trained.folder / "TD3BC.zip").says("ArtifactError", "contains an agent of TD3BC, not of SRPO")


# ---- the push ----------------------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_of_the_known_files(hub: Hub, here: Client, trained: Trained) -> None:
    """It takes out what an earlier push has left and it has not, and leaves what is not ours."""
    others = {"LICENSE": b"mine", "notes.txt": b"to myself", "sub/config.json": b"{}"}
    hub.put("me/push", {"LICENSE": b"mine", "notes.txt": b"to myself"})
    repository = hub.repository("me/push")
    n = len(repository.commits)
    half = trained.folder / "SRPO-half.zip"
    sha = here(push, half, "me/push", include_trainer_state=True, commit_message="the first of all")
    ours = ARTIFACT | STATE | {"README.md"}
    files = hub.files("me/push")
    assert files.keys() == ours | {".gitattributes", "LICENSE", "notes.txt"}
    assert len(repository.commits) == n + 1 and repository.branches == {"main": sha}
    assert repository.commits[sha].title == "the first of all" and not repository.private
    hub.put("me/push", {"replay.mp4": b"old", "results.json": b"{}", "sub/config.json": b"{}"})
    second = here(push, trained.folder / "SRPO.zip", "me/push")
    files = hub.files("me/push")
    assert files.keys() == ARTIFACT | {"README.md", ".gitattributes"} | set(others)
    assert {name: files[name] for name in others} == others
    assert len(repository.commits) == n + 3 and repository.branches["main"] == second
    assert repository.commits[second].title == "SRPO trained with diffagents"


def test_private_and_branch_are_as_asked(hub: Hub, here: Client, trained: Trained) -> None:
    sha = here(push, trained.folder / "TD3BC.zip", "me/hidden", private=True, revision="try/2")
    repository = hub.repository("me/hidden")
    assert repository.private and repository.branches["try/2"] == sha
    assert hub.files("me/hidden").keys() == {".gitattributes"}
    assert hub.files("me/hidden", sha).keys() > ARTIFACT


def push_again(repo_id: str, to: str, **how: Any) -> tuple[bool, dict[str, str]]:
    agent: Any = diffagents.load(repo_id, **QUIET)
    before = agent.has_training_networks
    agent.push_to_hub(to, **how)
    return before, agent.provenance["source"]


@pytest.mark.parametrize("to", ["me/pulled", "me/copy"])
def test_a_pulled_agent_is_pushed_whole(to: str, hub: Hub, here: Client, trained: Trained) -> None:
    """Though it had only what acting needs."""
    sha = here(push, trained.folder / "SRPO.zip", "me/pulled")
    before = hub.files("me/pulled")
    had_learner, source = here(push_again, "me/pulled", to)
    assert not had_learner and source == {"repo_id": "me/pulled", "sha": sha}
    after = hub.files(to)
    assert after["learner.safetensors"] == before["learner.safetensors"]
    assert after["model.safetensors"] == before["model.safetensors"]
    assert json.loads(after["config.json"])["provenance"]["source"] == source
    assert "base_model: me/pulled" in after["README.md"].decode()


def traces_of_the_token(path: Path) -> list[str]:
    """Where a token given by hand shows, of the agent before a push, after it, and pulled with it."""
    import os

    from huggingface_hub import constants

    token, found = "hf_test", []
    del os.environ["HF_TOKEN"]
    agent: Any = diffagents.load(path, **QUIET)
    agent.push_to_hub("me/secret", token=token, include_trainer_state=True, private=True)
    pulled: Any = diffagents.load("me/secret", token=token, **QUIET)
    pulled.learn(toy_data(), 3)
    folder = pulled.save_pretrained(Path(constants.HF_HOME) / "secret", include_trainer_state=True)
    pulled.push_to_hub("me/secret2", token=token)
    os.environ["HF_TOKEN"] = token
    for one in (agent, pulled):
        found += [text for text in (repr(one), str(one), repr(one.__dict__), str(one.__dict__)) if token in text]
        found += [text for text in (repr(one.origin), str(one.origin)) if token in text]
    found += [str(file) for file in folder.iterdir() if token.encode() in file.read_bytes()]
    assert token not in json.dumps(pulled.provenance)
    return found


def test_the_token_is_written_nowhere(hub: Hub, here: Client, trained: Trained) -> None:
    start = len(hub.log)
    assert here(traces_of_the_token, trained.folder / "SRPO.zip") == []
    seen = {request.headers.get("authorization") for request in hub.log[start:] if "/api/models/" in request.path}
    assert seen == {"Bearer hf_test"}
    for repo_id in ("me/secret", "me/secret2"):
        for name, data in hub.files(repo_id).items():
            assert b"hf_test" not in data, name


def pendulum(steps: int = 60) -> dict[str, np.ndarray]:
    r = np.random.default_rng(0)
    angle = r.uniform(-np.pi, np.pi, steps)
    ends = np.arange(steps) % 20 == 19
    return {
        "observations": np.stack([np.cos(angle), np.sin(angle), r.uniform(-8, 8, steps)], 1).astype(np.float32),
        "actions": r.uniform(-2, 2, (steps, 1)).astype(np.float32),
        "rewards": r.uniform(-10, 0, steps).astype(np.float32),
        "terminations": np.zeros(steps, bool),
        "truncations": ends,
    }


def push_evaluated(repo_id: str, eval_env: Any) -> dict[str, Any]:
    """What the card says, read by the Hub's own library."""
    from huggingface_hub import ModelCard

    agent: Any = small("TD3BC", env="Pendulum-v1").learn(pendulum())
    agent.push_to_hub(repo_id, eval_env=eval_env, n_eval_episodes=2, license="apache-2.0")
    read = ModelCard.load(repo_id, ignore_metadata_errors=False)
    meta = read.data.to_dict()
    (model,) = meta["model-index"]
    assert read.data.eval_results is not None
    return {
        "name": model["name"],
        "names": {(result.dataset_name, result.dataset_type, result.task_type) for result in read.data.eval_results},
        "metrics": {result.metric_type: result.metric_value for result in read.data.eval_results},
        "meta": {key: meta[key] for key in ("library_name", "pipeline_tag", "license", "tags")},
        "text": read.text,
    }


@pytest.mark.parametrize("eval_env", ["Pendulum-v1", True])
def test_an_evaluated_policy_shows_its_score(eval_env: Any, hub: Hub, here: Client) -> None:
    said = here(push_evaluated, f"me/score-{eval_env}".lower(), eval_env)
    results = json.loads(hub.files(f"me/score-{eval_env}".lower())["results.json"])
    assert (results["n_eval_episodes"], results["is_deterministic"], results["checkpoint"]) == (2, True, "last")
    assert -4000 < results["mean_reward"] < 0 and len(results["interval"]) == 2
    score = f"{results['mean_reward']:.2f}"
    assert said["name"] == "TD3BC" and said["names"] == {("Pendulum-v1", "Pendulum-v1", "reinforcement-learning")}
    assert said["metrics"]["mean_reward"] == f"{score} +/- {results['std_reward']:.2f}"
    head = said["meta"]
    assert (head["library_name"], head["pipeline_tag"], head["license"]) == (
        "diffagents",
        "reinforcement-learning",
        "apache-2.0",
    )
    assert {"Pendulum-v1", "TD3BC", "reinforcement-learning", "deep-reinforcement-learning"} <= set(head["tags"])
    assert f"Return {score}" in said["text"] and f'TD3BC.from_pretrained("me/score-{eval_env}"'.lower() in said["text"].lower()


def push_and_save(path: Path, folder: Path) -> None:
    agent = diffagents.load(path, **QUIET)
    agent.push_to_hub("me/both", include_trainer_state=True)
    agent.save_pretrained(folder, include_trainer_state=True)


def test_save_pretrained_makes_the_files_that_a_push_uploads(hub: Hub, here: Client, trained: Trained, tmp_path: Path) -> None:
    here(push_and_save, trained.folder / "SRPO-half.zip", tmp_path / "both")
    pushed = hub.files("me/both")
    del pushed[".gitattributes"]
    made = {path.name: path.read_bytes() for path in (tmp_path / "both").iterdir()}
    assert made.keys() == pushed.keys()
    assert [name for name in made if made[name] != pushed[name]] == ["README.md"]
    assert made["README.md"].decode().replace('"both"', '"me/both"') == pushed["README.md"].decode()


def push_folder(folder: Path, repo_id: str) -> str:
    oid: str = registry.push_folder(folder, repo_id).oid
    return oid


def test_a_folder_is_pushed_with_its_card_made_anew(hub: Hub, here: Client, trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    diffagents.load(trained.folder / "SRPO-half.zip", **QUIET).save_pretrained(folder, license="cc-by-4.0")
    (folder / "secret.txt").write_text("not for the Hub")
    here(push_folder, folder, "me/folder")
    files = hub.files("me/folder")
    assert files.keys() == ARTIFACT | {"README.md", "curves.png", ".gitattributes"}
    for name in (*ARTIFACT, "curves.png"):
        assert files[name] == (folder / name).read_bytes(), name
    text = files["README.md"].decode()
    assert 'from_pretrained("me/folder")' in text and "license: cc-by-4.0" in text and "curves.png" in text
    (folder / "model.safetensors").write_bytes(b"damaged")
    head = hub.repository("me/folder").branches["main"]
    here(attempt, push_folder, folder, "me/folder").says("ArtifactError", "model.safetensors")
    here(attempt, push_folder, tmp_path / "nothing", "me/folder").says("FileNotFoundError", "nothing")
    assert hub.repository("me/folder").branches["main"] == head


@pytest.mark.parametrize("name", ["curves.png", "README.md", "model.safetensors", "learner.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_folder_with_something_from_elsewhere_is_not_pushed(
    name: str, kind: str, hub: Hub, here: Client, trained: Trained, tmp_path: Path
) -> None:
    """A stranger's folder may hold a link to a private file, or one to everything."""
    folder, private = tmp_path / "folder", tmp_path / "id_rsa"
    diffagents.load(trained.folder / "SRPO-half.zip", **QUIET).save_pretrained(folder)
    private.write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    os.symlink(private, folder / name) if kind == "link" else os.mkfifo(folder / name)
    requests = len(hub.log)
    words = "is a link to a file elsewhere" if kind == "link" else "is not a regular file"
    here(attempt, push_folder, folder, "me/linked").says("ArtifactError", name, words)
    assert len(hub.log) == requests


def test_what_lies_beside_a_policy_is_not_even_read(hub: Hub, here: Client, trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    diffagents.load(trained.folder / "SRPO-half.zip", **QUIET).save_pretrained(folder)
    os.symlink(tmp_path, folder / "everything")
    os.mkfifo(folder / "pipe")  # a copy of the folder would wait here for ever
    os.rename(folder / "curves.png", folder / "picture")
    os.symlink("picture", folder / "curves.png")  # inside of the folder
    here(push_folder, folder, "me/beside")
    assert hub.files("me/beside").keys() == ARTIFACT | {"README.md", "curves.png", ".gitattributes"}
    assert hub.files("me/beside")["curves.png"] == (folder / "picture").read_bytes()


def pull_and_push(repo_id: str, to: str) -> str:
    return push_folder(hub_of_diffagents.pull(repo_id), to)


def test_a_folder_in_the_cache_of_the_hub_is_pushed(hub: Hub, here: Client, trained: Trained) -> None:
    """It consists of links, to the blobs beside it."""
    here(push, trained.folder / "TD3BC.zip", "me/first")
    here(pull_and_push, "me/first", "me/second")
    for name in ("config.json", "model.safetensors", "learner.safetensors"):
        assert hub.files("me/second")[name] == hub.files("me/first")[name]


def pull_into(repo_id: str, folder: Path) -> Path:
    return hub_of_diffagents.pull(repo_id, folder)


def test_a_pull_removes_nothing_that_it_did_not_make(hub: Hub, here: Client, trained: Trained, tmp_path: Path) -> None:
    here(push, trained.folder / "TD3BC.zip", "me/pulled-into")
    for name in (".policy.part", ".policy-0.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("precious")
    folder = here(pull_into, "me/pulled-into", tmp_path / "policy")
    assert diffagents.load(folder, **QUIET) is not None
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".policy")} == {".policy.part", ".policy-0.part"}
    assert (tmp_path / ".policy.part" / "thesis.txt").read_text() == "precious"
    here(attempt, pull_into, "me/pulled-into", tmp_path / "policy").says("FileExistsError", "exists already")
    assert (folder.stat().st_mode & 0o777) == ((tmp_path / ".policy.part").stat().st_mode & 0o777)


def pull_into_twice(repo_id: str, folder: Path) -> list[Any]:
    """Two threads, each with its own download."""
    results: list[Any] = []
    both = threading.Barrier(2)

    def work() -> None:
        both.wait()
        results.append(attempt(hub_of_diffagents.pull, repo_id, folder))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_pulls_into_one_folder(hub: Hub, here: Client, trained: Trained, tmp_path: Path) -> None:
    """One makes it, the other is told, and what is there is whole."""
    here(push, trained.folder / "TD3BC.zip", "me/raced")
    for i in range(5):
        folder = tmp_path / f"policy{i}"
        results = here(pull_into_twice, "me/raced", folder)
        (refused,) = [result for result in results if result != folder]
        refused.says("FileExistsError", "choose a new folder")
        assert diffagents.load(folder, **QUIET) is not None
    assert {path.name for path in tmp_path.iterdir()} == {f"policy{i}" for i in range(5)}


@pytest.mark.parametrize("way", ["save_pretrained", "push_folder"])
def test_a_card_written_by_hand_stays_and_ours_does_not(
    way: str, hub: Hub, here: Client, trained: Trained, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    agent = diffagents.load(trained.folder / "TD3BC.zip", **QUIET)
    agent.save_pretrained(folder)
    (folder / "README.md").write_text(f"# By hand, but with the mark\n{card.MARK}\n")
    for text, stays in ((None, False), ("# All by hand\n", True)):
        if text:
            (folder / "README.md").write_text(text)
        if way == "save_pretrained":
            agent.save_pretrained(folder)
            found = (folder / "README.md").read_text()
        else:
            here(push_folder, folder, "me/by-hand")
            found = hub.files("me/by-hand")["README.md"].decode()
        assert ("by hand" in found.lower()) == stays
        assert (card.MARK in found) != stays


def test_a_card_edited_on_the_hub_stays(hub: Hub, here: Client, trained: Trained) -> None:
    """As its first line promises to whoever takes that out."""
    here(push, trained.folder / "TD3BC.zip", "me/edited")
    hub.put("me/edited", {"README.md": b"# Edited on the site\n"})
    here(push, trained.folder / "SRPO-half.zip", "me/edited")
    assert hub.files("me/edited")["README.md"] == b"# Edited on the site\n"


@pytest.mark.usefixtures("real_pictures")
def test_an_eval_callback_s_scores_are_kept_and_the_best_shown_apart(tmp_path: Path) -> None:
    import gymnasium
    from stable_baselines3.common.callbacks import EvalCallback
    from stable_baselines3.common.monitor import Monitor

    env = Monitor(gymnasium.make("Pendulum-v1", max_episode_steps=20))
    watch = EvalCallback(env, eval_freq=STEPS // 3, n_eval_episodes=1, verbose=0, warn=False)
    agent: Any = small("TD3BC", env="Pendulum-v1").learn(pendulum(), callback=watch)
    rows = agent.provenance["evaluations"]
    assert [row["num_timesteps"] for row in rows] == [STEPS // 3, 2 * STEPS // 3, STEPS]
    assert rows[-1]["mean_return"] == pytest.approx(watch.last_mean_reward)
    best = max(rows, key=lambda row: row["mean_return"])
    assert best["mean_return"] == pytest.approx(watch.best_mean_reward)
    agent.save(tmp_path / "saved.zip")
    loaded = agent_class("TD3BC").load(tmp_path / "saved.zip", **QUIET)
    assert loaded.provenance["evaluations"] == rows
    loaded.save_pretrained(tmp_path / "card", eval_env=env, n_eval_episodes=1)
    text = (tmp_path / "card" / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("Best score seen while training")]
    assert f"{best['mean_return']:.2f} after {best['num_timesteps']} steps" in line and "not the policy in these files" in line
    results = json.loads((tmp_path / "card" / "results.json").read_text())
    assert results["best_in_training"] == best and results["evaluations_in_training"] == rows
    (score,) = [line for line in text.splitlines() if line.startswith("**Return")]
    assert f"{results['mean_reward']:.2f}" in score and "last policy" in score
    assert f"value: {results['mean_reward']:.2f} +/-" in text.partition("\n---\n")[0]
    assert len((tmp_path / "card" / "curves.png").read_bytes()) > 5000


# ---- datasets from the Hub ---------------------------------------------------------------------------------------------


def upload_dataset() -> None:
    import minari
    import minari.namespace
    from gymnasium import spaces
    from minari import upload_dataset as upload
    from minari.data_collector import EpisodeBuffer

    r = np.random.default_rng(0)
    episodes = [
        EpisodeBuffer(
            id=i,
            observations=r.normal(size=(21, 3)).astype(np.float32),
            actions=r.uniform(-1, 1, (20, 2)).astype(np.float32),
            rewards=r.normal(size=20).tolist(),
            terminations=[False] * 20,
            truncations=[False] * 19 + [True],
            infos={},
        )
        for i in range(2)
    ]
    minari.namespace.create_namespace("ns")  # Minari 0.5.4 finds none without a namespace on a Hub
    where = {"observation_space": spaces.Box(-9, 9, (3,), np.float32), "action_space": spaces.Box(-1, 1, (2,), np.float32)}
    minari.create_dataset_from_buffers("ns/name-v0", episodes, **where)
    upload("ns/name-v0", "hf_test")


def load_dataset(source: str) -> tuple[int, str]:
    data = diffagents.load_dataset(source)
    return len(data), data.info["id"]


def learn_from(source: str) -> int:
    agent: Any = small("TD3BC").learn(source)
    assert np.isfinite(acts(agent)).all()
    return int(agent.num_timesteps)


@pytest.mark.parametrize(
    "remote",
    [
        pytest.param({"MINARI_REMOTE": "hf://toys"}, id="remote_set"),
        pytest.param({}, id="by_its_name_alone"),
    ],
)
def test_minari_sets_come_from_the_hub(remote: dict[str, str], tmp_path: Path) -> None:
    def at(place: str) -> dict[str, str]:
        return remote | {
            "MINARI_DATASETS_PATH": str(tmp_path / place / "minari"),
            "DIFFAGENTS_CACHE": str(tmp_path / place / "cache"),
        }

    with Hub("xet", tmp_path) as hub, contextlib.ExitStack() as stack:
        stack.enter_context(client(hub, tmp_path / "a", **(at("a") | {"MINARI_REMOTE": "hf://toys"})))(upload_dataset)
        assert "name-v0/data/main_data.hdf5" in hub.files("toys/ns", kind="datasets")
        here, there = (stack.enter_context(client(hub, tmp_path / name, **at(name))) for name in "bc")
        assert here(load_dataset, "hf://toys/ns/name-v0") == (40, "ns/name-v0")
        start = len(hub.log)
        assert start > 0 and here(load_dataset, "hf://toys/ns/name-v0") == (40, "ns/name-v0")
        assert here(load_dataset, "ns/name-v0") == (40, "ns/name-v0")
        assert len(hub.log) == start
        assert there(learn_from, "hf://toys/ns/name-v0") == STEPS
        for missing in ("hf://toys/ns/other-v0", "hf://nobody/ns/name-v1", "hf://toys/nothing/name-v0"):
            here(attempt, load_dataset, missing).says("FileNotFoundError", missing.split("/", 3)[3], "hf://")
        hub.stop()
        here(attempt, load_dataset, "hf://toys/ns/other-v0").says("ConnectionError", "ns/other-v0", "HF_ENDPOINT")
        assert here(load_dataset, "hf://toys/ns/name-v0")[0] == 40
