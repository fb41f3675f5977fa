"""What a user installs: the wheel's contents, the version, the citation."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import diffagents

ROOT = Path(__file__).resolve().parents[1]
POLICY = "srpo-hopper-medium-expert-v0"
"""The policy of the zoo that is in the wheel."""
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources, in which zoo/ also holds what must stay outside."""
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed: the wheel cannot be built offline")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("diffagents", "zoo", "tests", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "zoo" / "trained" / "agent").mkdir(parents=True)
    for decoy in ("model.safetensors", "trained/agent/config.yml", "results.md"):
        (source / "zoo" / decoy).write_text("not for the wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_package_the_presets_and_one_small_policy(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    inside = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffagents").rglob("*.py")}
    presets = {f"diffagents/zoo/{path.name}" for path in (ROOT / "zoo").glob("*.yml")}
    assert "diffagents/zoo/srpo.yml" in presets
    files = ("README.md", "config.json", "model.safetensors", "results.json")
    policy = {f"diffagents/zoo/{POLICY}/{name}" for name in files}
    package = {name for name in inside if ".dist-info/" not in name}
    assert package == modules | presets | policy | {"diffagents/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in inside)
    assert sum(archive.getinfo(name).compress_size for name in policy) < 300_000
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
    result = subprocess.run(command, cwd=folder, env=everything, capture_output=True, text=True, timeout=120)
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


def test_version_is_said_once() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = PROJECT["project"]["version"]
    assert diffagents.__version__ == version
    assert str(citation["version"]) == version
    assert version in (ROOT / "CHANGELOG.md").read_text()


def test_citation_names_the_four_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    papers = {paper["notes"]: paper for paper in citation["references"]}
    identifiers = {name: paper["identifiers"][0]["value"] for name, paper in papers.items()}
    assert identifiers == {
        "SRPO": "arXiv:2310.07297",
        "Diffusion-QL": "arXiv:2208.06193",
        "DiffCPS": "arXiv:2310.05333",
        "BDPO": "arXiv:2502.04778",
    }
    for paper in papers.values():
        assert {"type", "title", "authors"} <= set(paper)
        assert all({"family-names", "given-names"} <= set(author) for author in paper["authors"])


def test_every_range_has_a_tested_version() -> None:
    """constraints.txt pins what pyproject.toml asks for, so that a fresh machine repeats what was tested."""
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    asked = {_plain(re.split(r"[\[<>=]", line)[0]) for group in groups for line in group} - {"diffagents"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_plain(line.split("==")[0]) for line in lines if line and not line.startswith("#")}
    assert asked <= pinned, f"constraints.txt lacks {sorted(asked - pinned)}"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
