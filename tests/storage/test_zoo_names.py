"""`zoo/<name>`: a policy of this library's own, from a folder or an organisation, and never from somebody called `zoo`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_agents import small

import diffagents
from diffagents.cli import main
from diffagents.errors import HubError
from diffagents.storage import hub

NAME = "bc-hopper-medium-v0"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder without a zoo, and the ids that the Hub was asked for."""
    asked: list[str] = []

    def resolve_revision(self: Any, repo_id: str, **_: Any) -> Any:
        asked.append(repo_id)
        raise HubError("there is no Hub in this test")

    monkeypatch.setattr("huggingface_hub.HfApi.resolve_revision", resolve_revision)
    monkeypatch.setattr("huggingface_hub.HfApi.list_models", lambda self, author, **_: asked.append(author) or [])
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: asked.append(repo_id))
    monkeypatch.delenv(hub.ZOO_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_checkout_has_the_zoo_wherever_one_works(elsewhere: list[str], tmp_path: Path) -> None:
    agent = diffagents.load(f"zoo/{NAME}", device="cpu", verbose=0)
    assert diffagents.BC.from_pretrained(f"zoo/{NAME}", device="cpu", verbose=0).seed == agent.seed
    assert hub.pull(f"zoo/{NAME}").name == NAME
    assert diffagents.load(hub.pull(f"zoo/{NAME}", tmp_path / "copy"), device="cpu").seed == agent.seed
    with pytest.raises(ValueError, match=r"revision='v1' applies to the Hub, but zoo/.* is the folder"):
        diffagents.load(f"zoo/{NAME}", revision="v1")
    assert elsewhere == []


@pytest.mark.parametrize("name", ["zoo/xx", "ZOO/xx", "zoo", "zoo/", "zoo/../secret", "zoo/a/b"])
def test_a_name_that_is_not_here_says_how_to_get_there(name: str, elsewhere: list[str]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no policy '.*' of the zoo; here are zoo/.*checkout.*DIFFAGENTS_ZOO"
    ) as caught:
        diffagents.load(name)
    assert len(str(caught.value)) < 600 and elsewhere == []
    with pytest.raises(FileNotFoundError, match="here are zoo/srpo-hopper-medium-expert-v0, "):
        diffagents.load("zoo/srpo-hoper-medium-expert-v0")  # the nearest names first


def test_the_variable_names_a_folder_or_an_organisation(
    elsewhere: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small("BC", env="Pendulum-v1").save_pretrained(tmp_path / "mine" / "tiny")
    monkeypatch.setenv(hub.ZOO_VARIABLE, str(tmp_path / "mine"))
    assert diffagents.load("zoo/tiny", verbose=0).act_dim == 1
    assert diffagents.load(f"zoo/{NAME}", verbose=0).act_dim == 3  # the others are still there
    assert main.main(["list", "--zoo"]) == 0
    names = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert "zoo/tiny" in names and f"zoo/{NAME}" in names and names == sorted(names)
    monkeypatch.setenv(hub.ZOO_VARIABLE, "someone")
    assert diffagents.load(f"zoo/{NAME}", verbose=0).act_dim == 3 and elsewhere == []
    for name, revision in (("zoo/tiny", None), (f"zoo/{NAME}", "v1")):
        with pytest.raises(HubError):
            diffagents.load(name, revision=revision)
    with pytest.raises(HubError):
        hub.pull("zoo/tiny")
    assert main.main(["list", "--zoo"]) == 0
    assert elsewhere == ["someone/tiny", f"someone/{NAME}", "someone/tiny", "someone"]
    for bad in (str(tmp_path / "nothing"), "zoo", "a/b"):
        monkeypatch.setenv(hub.ZOO_VARIABLE, bad)
        with pytest.raises(ValueError, match=r"DIFFAGENTS_ZOO=.* is neither an existing folder nor an organisation"):
            diffagents.load("zoo/tiny")


def test_a_folder_here_called_zoo_comes_first(tmp_path: Path) -> None:
    source = Path(diffagents.__file__).parents[1] / "zoo" / NAME
    shutil.copytree(source, tmp_path / "zoo" / "copy")
    assert diffagents.load("zoo/copy", verbose=0).act_dim == 3


def test_nothing_is_pushed_to_or_asked_of_an_organisation_called_zoo(elsewhere: list[str]) -> None:
    agent = small("BC", env="Pendulum-v1")
    with pytest.raises(ValueError, match="a name of this library's zoo: push to an account or organisation of your own"):
        agent.push_to_hub("zoo/mine")
    with pytest.raises(ValueError, match="not a repository of the Hub"):
        hub.resolve("zoo/mine")
    with pytest.raises(ValueError, match="diffagents list --zoo"):
        list(hub.list_policies("zoo"))
    assert elsewhere == []
