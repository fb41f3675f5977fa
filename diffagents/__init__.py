"""diffagents: SB3-style agents for diffusion-based offline reinforcement learning in PyTorch."""

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

AGENTS = {
    "SRPO": "diffagents.agents.srpo",
    "DiffusionQL": "diffagents.agents.diffusion_ql",
    "DiffCPS": "diffagents.agents.diffcps",
    "BDPO": "diffagents.agents.bdpo",
    "QGPO": "diffagents.agents.qgpo",
    "SfBC": "diffagents.agents.sfbc",
    "DiffusionBC": "diffagents.agents.diffusion_bc",
    "IDQL": "diffagents.agents.idql",
    "IQL": "diffagents.agents.iql",
    "TD3BC": "diffagents.agents.td3_bc",
    "AWR": "diffagents.agents.awr",
}
"""Algorithm name -> the module that holds the class of that name; imported when first asked for."""

_LAZY = {
    **AGENTS,
    "load_dataset": "diffagents.datasets",
    "evaluate": "diffagents.evaluation",
    "record_video": "diffagents.evaluation",
    "Evaluation": "diffagents.evaluation",
    "ArtifactError": "diffagents.artifact",
    "HubError": "diffagents.hub",
    "TrainingDiverged": "diffagents.training",
    "learn_many": "diffagents.many",
    "collect": "diffagents.collecting",
    "select": "diffagents.selection",
    "Selection": "diffagents.selection",
    "tune": "diffagents.tuning",
    "TuningReport": "diffagents.tuning",
}

__all__ = [
    "AGENTS",
    "AWR",
    "BDPO",
    "IDQL",
    "IQL",
    "QGPO",
    "SRPO",
    "TD3BC",
    "ArtifactError",
    "DiffCPS",
    "DiffusionBC",
    "DiffusionQL",
    "Evaluation",
    "HubError",
    "Selection",
    "SfBC",
    "TrainingDiverged",
    "TuningReport",
    "collect",
    "evaluate",
    "learn_many",
    "load",
    "load_dataset",
    "record_video",
    "select",
    "tune",
]

if TYPE_CHECKING:
    from diffagents.agent import Agent
    from diffagents.agents.awr import AWR
    from diffagents.agents.bdpo import BDPO
    from diffagents.agents.diffcps import DiffCPS
    from diffagents.agents.diffusion_bc import DiffusionBC
    from diffagents.agents.diffusion_ql import DiffusionQL
    from diffagents.agents.idql import IDQL
    from diffagents.agents.iql import IQL
    from diffagents.agents.qgpo import QGPO
    from diffagents.agents.sfbc import SfBC
    from diffagents.agents.srpo import SRPO
    from diffagents.agents.td3_bc import TD3BC
    from diffagents.artifact import Artifact, ArtifactError
    from diffagents.collecting import collect
    from diffagents.datasets import load_dataset
    from diffagents.evaluation import Evaluation, evaluate, record_video
    from diffagents.hub import HubError
    from diffagents.many import learn_many
    from diffagents.selection import Selection, select
    from diffagents.training import TrainingDiverged
    from diffagents.tuning import TuningReport, tune


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"diffagents has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def load(
    path: str | pathlib.Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | pathlib.Path | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> "Agent":
    """Load an agent of whatever algorithm a folder, a .zip or a Hub repository holds; arguments as `Agent.from_pretrained`.

    Raises FileNotFoundError, HubError or ArtifactError with the cause and the cure.
    """
    from diffagents import publish

    how = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    return publish.open_pretrained(_class_of, path, revision, how, kwargs)


def _class_of(source: "Artifact") -> "type[Agent]":
    from diffagents.artifact import ArtifactError, short

    algorithm = source.config["algorithm"]
    if algorithm not in AGENTS:
        known = ", ".join(AGENTS)
        raise ArtifactError(
            f"{source.path} holds the algorithm {short(algorithm)!r}; this version knows {known}: upgrade diffagents"
        )
    found: type[Agent] = getattr(importlib.import_module(AGENTS[algorithm]), algorithm)
    return found
