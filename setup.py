"""Puts the presets of zoo/ and one policy into the wheel, as diffagents/zoo; everything else is in pyproject.toml."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

POLICY = "srpo-hopper-medium-expert-v0"  # that of README.md, which works right after installing
FILES = ("*.yml", *(f"{POLICY}/{name}" for name in ("README.md", "config.json", "model.safetensors", "results.json")))


class BuildWithZoo(build_py):  # type: ignore[misc]
    """`build_py`, and zoo/ as diffagents/zoo."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the library reads the zoo of the checkout
            return
        zoo = pathlib.Path(__file__).parent / "zoo"
        for file in (file for pattern in FILES for file in zoo.glob(pattern)):
            target = pathlib.Path(self.build_lib, "diffagents", "zoo", file.relative_to(zoo))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


setup(cmdclass={"build_py": BuildWithZoo})
