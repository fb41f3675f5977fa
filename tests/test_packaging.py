"""What a user installs: the contents of wheel and source distribution, the version, the citation."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import diffagents
from diffagents.registry import AGENTS

ROOT = Path(__file__).resolve().parents[1]
POLICY = "srpo-hopper-medium-expert-v0"
"""The policy of the zoo that is in the wheel."""
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy of the sources, in which zoo/ also holds what must stay outside."""
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed: nothing can be built offline")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    for name in ("diffagents", "zoo", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "zoo" / "trained" / "agent").mkdir(parents=True)
    for decoy in ("zoo/model.safetensors", "zoo/trained/agent/config.yml", "zoo/results.md", "diffagents/notes.txt"):
        (source / decoy).write_text("not for users")
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(sdist)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.whl")
    return built


def for_users() -> set[str]:
    """The files of the package, the presets and the policy, as paths in the checkout."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffagents").rglob("*.py")}
    presets = {f"zoo/{path.name}" for path in (ROOT / "zoo").glob("*.yml")}
    assert "zoo/srpo.yml" in presets
    policy = {f"zoo/{POLICY}/{name}" for name in ("README.md", "config.json", "model.safetensors", "results.json")}
    return modules | presets | policy | {"diffagents/py.typed"}


def test_source_distribution_holds_what_the_wheel_is_built_from(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    ours = {name for name in inside if ".egg-info/" not in name} - {"PKG-INFO", "setup.cfg"}
    papers = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"}
    assert ours == for_users() | papers | {"pyproject.toml", "setup.py", "MANIFEST.in", "constraints.txt"}
    assert sdist.stat().st_size < 800_000


def test_wheel_holds_the_package_the_presets_and_one_small_policy(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    inside = set(archive.namelist())
    package = {name for name in inside if ".dist-info/" not in name}
    assert package == {f"diffagents/{name}" if name.startswith("zoo/") else name for name in for_users()}
    assert any(name.endswith("/licenses/LICENSE") for name in inside)
    policy = [name for name in inside if POLICY in name]
    assert len(policy) == 4 and sum(archive.getinfo(name).compress_size for name in policy) < 300_000
    assert wheel.stat().st_size < 800_000


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, away from the checkout, where zoo/ is no neighbour of the package."""
    folder = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def _run(installed: Path, folder: Path, code: str, **environment: str) -> list[str]:
    """The lines that a program prints with the installed package, run in `folder`, which asks no Hub."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{code}"]
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DIFFAGENTS_ZOO")}
    everything = {**clean, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", **environment}
    result = subprocess.run(command, cwd=folder, env=everything, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_unpacked_wheel_finds_its_presets(installed: Path, tmp_path: Path) -> None:
    code = (
        "import diffagents.config.presets as p; print(p.__file__)\n"
        "print(p.resolve_preset('SRPO', None, None)[1]['policy_steps'] > 0)"
    )
    assert _run(installed, tmp_path, code) == [str(installed / "diffagents" / "config" / "presets.py"), "True"]


def test_unpacked_wheel_acts_with_its_policy_and_says_where_the_others_are(installed: Path, tmp_path: Path) -> None:
    """The lines of the README, without a network and outside a checkout; another name says what to do."""
    pytest.importorskip("mujoco")
    code = f"""
import diffagents, gymnasium
from diffagents import SRPO
agent = SRPO.from_pretrained("zoo/{POLICY}")
obs, _ = gymnasium.make("Hopper-v5").reset(seed=0)
action, _ = agent.predict(obs)
print(diffagents.__file__, action.shape, diffagents.load("zoo/{POLICY}").seed == agent.seed)
try:
    diffagents.load("zoo/bdpo-hopper-medium-expert-v0")
except FileNotFoundError as error:
    print(error)
from diffagents.cli.main import main
main(["list", "--zoo"])
"""
    acted, refused, listed = _run(installed, tmp_path, code)
    assert acted == f"{installed / 'diffagents' / '__init__.py'} (3,) True"
    assert f"here are zoo/{POLICY};" in refused and "checkout" in refused and "set DIFFAGENTS_ZOO" in refused
    assert listed.startswith(f"zoo/{POLICY}\tSRPO\t")
    code = "import diffagents; print(diffagents.load('zoo/bc-hopper-medium-v0').act_dim)"
    assert _run(installed, tmp_path, code, DIFFAGENTS_ZOO=str(ROOT / "zoo")) == ["3"]


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path: Path) -> None:
    """In an editable installation, as this one of `make test` is: somebody's script lies beside the clone."""
    (tmp_path / "diffagents").mkdir()
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", "import diffagents; print(diffagents.__version__)"]
    result = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == diffagents.__version__, result.stderr


def test_an_index_gets_links_that_lead_somewhere(tmp_path: Path) -> None:
    """`make dist URL=...`: an index shows README.md without the files beside it. The addresses are those of existing files."""
    dist = runpy.run_path(str(ROOT / ".ci" / "make_dist.py"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    dist["name_repository"](tmp_path, "https://example.org/me/it")
    shown, ref = (tmp_path / "README.md").read_text(), f"v{PROJECT['project']['version']}"
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", shown)
    assert len(links) > 10 and ("!", f"https://example.org/me/it/raw/{ref}/docs/images/zoo.png") in links
    for picture, link in links:
        path = link.removeprefix(f"https://example.org/me/it/{'raw' if picture else 'blob'}/{ref}/")
        assert path != link and (ROOT / path.partition("#")[0]).exists(), link
    assert "git clone https://example.org/me/it &&" in shown
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == "https://example.org/me/it" and urls["Changelog"].endswith(f"/{ref}/CHANGELOG.md")
    assert dist["absolute_links"]("[a](#b) [c](mailto:d) ![e](f)", "U", "v1") == "[a](#b) [c](mailto:d) ![e](U/raw/v1/f)"


def test_version_is_said_once() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = PROJECT["project"]["version"]
    assert diffagents.__version__ == version
    assert str(citation["version"]) == version
    assert version in (ROOT / "CHANGELOG.md").read_text()


def test_citation_names_the_papers_of_all_algorithms() -> None:
    """That titles, years and numbers are those of the code and the documentation: tests/storage/test_card.py."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    papers = {paper["notes"]: paper for paper in citation["references"]}
    names = {"DiffusionQL": "Diffusion-QL", "DiffusionBC": "Diffusion-QL", "TD3BC": "TD3+BC"}
    assert set(papers) == {names.get(name, name) for name in AGENTS}
    for paper in papers.values():
        assert {"type", "title", "authors", "year"} <= set(paper) and ("identifiers" in paper or "url" in paper)
        assert all({"family-names", "given-names"} <= set(author) for author in paper["authors"])


def test_every_range_has_a_tested_version() -> None:
    """constraints.txt pins what pyproject.toml asks for, so that a fresh machine repeats what was tested."""
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    asked = {_plain(re.split(r"[\[<>=]", line)[0]) for group in groups for line in group}
    asked.remove(PROJECT["project"]["name"])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_plain(line.split("==")[0]) for line in lines if line and not line.startswith("#")}
    assert asked <= pinned, f"constraints.txt lacks {sorted(asked - pinned)}"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
