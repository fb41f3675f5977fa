"""What a user installs: the wheel's contents, the version, the citation."""

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


def test_wheel_holds_the_package_and_the_presets_and_nothing_else(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffagents").rglob("*.py")}
    presets = {f"diffagents/zoo/{path.name}" for path in (ROOT / "zoo").glob("*.yml")}
    assert "diffagents/zoo/srpo.yml" in presets
    package = {name for name in inside if ".dist-info/" not in name}
    assert package == modules | presets | {"diffagents/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in inside)
    assert wheel.stat().st_size < 500_000


def test_unpacked_wheel_finds_its_presets(wheel: Path, tmp_path: Path) -> None:
    """Away from the checkout, where zoo/ is no neighbour of the package."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import diffagents.config.presets as p; print(p.__file__); "
        "print(p.resolve_preset('SRPO', None, None)[1]['policy_steps'] > 0)"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "diffagents" / "config" / "presets.py"), "True"]


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
