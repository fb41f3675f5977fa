"""Checks of the user's arguments. Messages name the argument, its value and the rule."""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

MOST = 10**7
"""The largest value of any count: batch size, critics, samples."""
N_FIXED = 256
"""Number of stored noise vectors for deterministic actions, and so the largest number of candidates."""


def whole_number(name: str, value: Any, least: int, unit: str = "") -> int:
    """`value` as an int (16.0 counts). Raises ValueError unless it is a whole number from `least` to 2**53."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not (real and abs(float(value)) <= 2**53 and int(value) == value and value >= least):
        kind = "a positive whole number" if least == 1 else "zero or a positive whole number"
        raise ValueError(f"{name}={str(value)[:40] if real else repr(value)} must be {kind}{unit}")
    return int(value)


def check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> None:
    """Raise ValueError, with the name, the value and the rule, unless `value` is a finite number for which `holds` is true."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name}={value!r} must be a number")
    if not abs(float(value)) < 1e38:  # the range of float32
        raise ValueError(f"{name}={str(value)[:20]} must be finite")
    if not holds(float(value)):
        raise ValueError(f"{name}={value!r} {rule}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ValueError, listing the choices, unless `value` is one of them."""
    choices = list(choices)  # a list compares where a dict would hash
    if value not in choices:
        raise ValueError(f"{name}={value!r}; choose from {', '.join(map(repr, choices))}")


def net_arch(
    policy_kwargs: dict[str, Any], default: dict[str, Sequence[int]], extra: dict[str, int] | None = None
) -> dict[str, Any]:
    """`policy_kwargs` -> hidden sizes for each part of `default` and the integers of `extra`, checked.

    `net_arch` may be a list (for all parts) or a dict by part, as in SB3; "vf" follows "qf" if only that is given.
    Raises TypeError for an unknown key.
    """
    parts, extra = list(default), extra or {}
    if not isinstance(policy_kwargs, dict):
        raise TypeError(f"policy_kwargs must be a dict, not {type(policy_kwargs).__name__}")
    unknown = set(policy_kwargs) - {"net_arch", *extra}
    if unknown:
        raise TypeError(f"policy_kwargs has no {sorted(unknown)[0]!r}; valid: {', '.join(['net_arch', *extra])}")
    arch = policy_kwargs.get("net_arch", dict(default))
    sizes_of = arch.values() if isinstance(arch, dict) else [arch]
    if not all(isinstance(sizes, (list, tuple)) for sizes in sizes_of):
        raise ValueError(f"net_arch={arch!r} must be a list of layer sizes, or a dict of such lists by part")
    by_part: dict[str, Any] = dict(arch) if isinstance(arch, dict) else dict.fromkeys(parts, arch)
    if set(by_part) - set(parts):
        raise TypeError(f"net_arch names {sorted(set(by_part) - set(parts))[0]!r}; its parts are {', '.join(parts)}")
    if "vf" in parts and "qf" in by_part:
        by_part.setdefault("vf", by_part["qf"])
    sizes: dict[str, Any] = {part: tuple(by_part.get(part, default[part])) for part in parts}
    sizes |= {name: policy_kwargs.get(name, value) for name, value in extra.items()}
    flat = [n for size in sizes.values() for n in (size if isinstance(size, tuple) else (size,))]
    if not all(isinstance(n, int) and n > 0 for n in flat):
        raise ValueError(f"policy_kwargs {policy_kwargs} must contain positive whole numbers")
    return sizes


def check_arguments(policy: Any, obs_keys: Any, policy_kwargs: Any) -> None:
    """Raise ValueError or TypeError for values that no agent's constructor accepts."""
    if policy not in ("MlpPolicy", "MultiInputPolicy"):
        raise ValueError(f'policy={policy!r}; the only policy is "MlpPolicy" (pass an environment as env=...)')
    if policy_kwargs is not None and not isinstance(policy_kwargs, dict):
        raise TypeError(f"policy_kwargs must be a dict, not {type(policy_kwargs).__name__}")
    if isinstance(obs_keys, str):
        raise TypeError(f"obs_keys={obs_keys!r} must be a sequence of names: obs_keys=({obs_keys!r},)")


def find_device(device: str | torch.device) -> torch.device:
    """The device of this name; "auto" is CUDA if it is available. Raises ValueError if the device cannot be used."""
    if device == "auto":
        return torch.device("cuda" if n_cuda_devices() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'device={device!r} is not usable here: {str(error).splitlines()[0]}; try device="auto"') from None
    return found


@functools.cache
def n_cuda_devices() -> int:
    """The number of CUDA devices that can be used, without torch's warnings if there is none.

    Only a driver that is there and does not work, for example because it is too old, causes a warning, of one line.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    said = (" ".join(str(warning.message).split()) for warning in caught)
    broken = next((text for text in said if text.startswith("CUDA initialization") and "no NVIDIA driver" not in text), None)
    if n == 0 and broken is not None:
        cause = broken.removeprefix("CUDA initialization:").strip().partition(". ")[0]
        warnings.warn(f'torch cannot use the GPU ({cause}): device="auto" is the CPU', stacklevel=4)
    return n
