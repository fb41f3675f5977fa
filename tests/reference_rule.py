"""Reading a reference file: its arrays, its settings, and the rule that makes the weights from their names."""

import json
import os
import pathlib
import zlib
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor


def read_reference(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    folder = pathlib.Path(os.environ.get("DIFFAGENTS_REFERENCE") or pathlib.Path(__file__).parent / "reference")
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        keys = file.keys()  # the file itself cannot be iterated
        return {key: file.get_tensor(key) for key in keys}, json.loads(file.metadata()["info"])


def make_weights(info: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Every weight whose name starts with `prefix`, that prefix removed. Torch matrices are [out, in], flax's [in, out]."""
    return {
        name.removeprefix(prefix): make_weight(name, tuple(shape), info["seed"])
        for name, shape in info["weights"].items()
        if name.startswith(prefix)
    }


def make_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    w = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).randn(*shape)
    if name.endswith("embed.0.W"):
        w = 30.0 * w
    elif "layer_norm.weight" in name or name.endswith(".scale"):
        w = 1.0 + 0.1 * w
    elif name.endswith(".kernel"):
        w = w / np.sqrt(shape[-2])
    elif name.endswith(".bias"):
        w = 0.1 * w
    elif len(shape) > 1:
        w = w / np.sqrt(shape[1])
    else:
        w = 0.1 * w
    return torch.from_numpy(w.astype(np.float32))
