"""diffagents: SB3-style agents for diffusion-based offline reinforcement learning in PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

from diffagents.registry import AGENTS, load
from diffagents.version import __version__ as __version__

if TYPE_CHECKING:
    from diffagents.agents.awr import AWR
    from diffagents.agents.bc import BC
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
    from diffagents.data.collect import collect
    from diffagents.data.load import load_dataset
    from diffagents.errors import ArtifactError, HubError, TrainingDiverged
    from diffagents.evaluation.curves import draw_curves
    from diffagents.evaluation.evaluate import Evaluation, evaluate
    from diffagents.evaluation.video import record_video
    from diffagents.experiments.describe import describe
    from diffagents.experiments.describe_report import DatasetReport
    from diffagents.experiments.learn_many import learn_many
    from diffagents.experiments.select import Selection, select
    from diffagents.experiments.tune import TuningReport, tune
    from diffagents.training.curve_callback import CurveCallback

_LAZY = {
    **AGENTS,
    "load_dataset": "diffagents.data.load",
    "evaluate": "diffagents.evaluation.evaluate",
    "CurveCallback": "diffagents.training.curve_callback",
    "draw_curves": "diffagents.evaluation.curves",
    "record_video": "diffagents.evaluation.video",
    "Evaluation": "diffagents.evaluation.evaluate",
    "ArtifactError": "diffagents.errors",
    "HubError": "diffagents.errors",
    "TrainingDiverged": "diffagents.errors",
    "describe": "diffagents.experiments.describe",
    "DatasetReport": "diffagents.experiments.describe_report",
    "learn_many": "diffagents.experiments.learn_many",
    "collect": "diffagents.data.collect",
    "select": "diffagents.experiments.select",
    "Selection": "diffagents.experiments.select",
    "tune": "diffagents.experiments.tune",
    "TuningReport": "diffagents.experiments.tune",
}

__all__ = [
    "AGENTS",
    "AWR",
    "BC",
    "BDPO",
    "IDQL",
    "IQL",
    "QGPO",
    "SRPO",
    "TD3BC",
    "ArtifactError",
    "CurveCallback",
    "DatasetReport",
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
    "describe",
    "draw_curves",
    "evaluate",
    "learn_many",
    "load",
    "load_dataset",
    "record_video",
    "select",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"diffagents has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
