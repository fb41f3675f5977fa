"""The recipes of the zoo's datasets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffagents.data.load import load_dataset

RECIPES = Path(__file__).resolve().parents[1] / "zoo" / "recipes"
KERNELS = {"default": {}, "another processor": {"OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"}}


def test_other_kernels_of_the_arithmetic_give_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe gives the same bits where matrix products and exponentials are computed with other instructions."""
    contents = []
    for name, environment in KERNELS.items():
        command = ["make_datasets.py", "--root", str(tmp_path / name), "--steps", "800", "--only", "walker2d/medium-replay"]
        subprocess.run(
            [sys.executable, *command],
            cwd=RECIPES,
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
            timeout=120,
        )
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / name))
        contents.append(load_dataset("diffagents/walker2d/medium-replay-v0", cache=False).info["sha256"])
    assert contents[0] == contents[1]
