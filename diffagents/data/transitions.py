"""`Transitions`: a dataset as recorded, on the CPU, with its file format.

What the learner sees is a `Sampler` (sampler.py), which `Transitions.sampler` makes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffagents.data.normalize import ObsNormalizer, RewardTransform, fit_reward_transform
from diffagents.data.sampler import Sampler
from diffagents.errors import one_line, printable, short
from diffagents.functional import returns_to_go
from diffagents.types import Spec, space_from_json, space_to_json

FILE_FORMAT = 1
"""Number of the file layout of `Transitions.save`; files with another number are rejected."""
UNIT_RETURNS_GAMMA = 0.99
"""Discount of the returns whose standard deviation the reward transform "unit_returns" makes 1."""
_COLUMNS = (
    "obs",
    "action",
    "rew",
    "next_obs",
    "done",
    "episode_ends",
    "episode_returns",
    "episode_lengths",
    "episode_whole",
)
_ROWS_AT_ONCE = 65_536  # small enough for temporaries to be negligible next to the matrix, large enough to be quick


@dataclass
class Transitions:
    """N transitions of E episodes in the environment's units, with raw rewards; all tensors on the CPU.

    Some episodes have lost their last row (because its next observation is unknown), so `episode_ends` counts the rows that
    are left, while `episode_lengths` and `episode_returns` describe the episodes as recorded.
    """

    obs: Tensor  # (N, S) float32
    action: Tensor  # (N, A) float32, environment units
    rew: Tensor  # (N,) float32
    next_obs: Tensor  # (N, S) float32; arbitrary but finite where done is 1
    done: Tensor  # (N,) float32, 1 at a true termination
    episode_ends: Tensor  # (E,) int64, one past the episode's last row; equal neighbours: no row was left
    episode_returns: Tensor  # (E,) float32, undiscounted
    episode_lengths: Tensor  # (E,) int64
    episode_whole: Tensor  # (E,) bool, False if recording began or stopped in mid-episode
    spec: Spec
    info: dict[str, Any] = field(default_factory=dict)  # JSON values; `load_dataset` lists the keys

    def __len__(self) -> int:
        return len(self.rew)

    def fit_reward_transform(self, name: str) -> RewardTransform:
        """Fit a reward transform on these data.

        Returns of cut episodes are left out if at least two episodes are whole, because an episode that the end of the
        recording cut short has a low return, which would widen the range of returns.

        Args:
            name: A key of `REWARD_TRANSFORMS`.

        Returns:
            The fitted transform.

        Raises:
            ValueError: If the name is unknown, or the data make the transform impossible.
        """
        whole = self.episode_returns[self.episode_whole]
        returns = whole if len(whole) > 1 else self.episode_returns

        def discounted(rew: Tensor) -> Tensor:
            return returns_to_go(rew, self.done, self.episode_ends, UNIT_RETURNS_GAMMA)

        return fit_reward_transform(name, self.rew, returns, self.rew[self.done == 1], discounted)

    def sampler(
        self,
        device: torch.device | str,
        reward_transform: RewardTransform | None = None,
        obs_normalizer: ObsNormalizer | None = None,
    ) -> "Sampler":
        """Copy the data to a device in the learner's units.

        Args:
            device: The training device.
            reward_transform: Default: raw rewards.
            obs_normalizer: Default: raw observations.

        Returns:
            The sampler.
        """
        transform = reward_transform or RewardTransform()
        normalizer = ObsNormalizer(self.spec.obs_dim)
        if obs_normalizer is not None:
            normalizer.load_state_dict(obs_normalizer.state_dict())
        matrix = torch.empty(len(self), 2 * self.spec.obs_dim + self.spec.act_dim + 2, device=device)
        for start in range(0, len(self), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            columns = (
                normalizer(self.obs[part]),
                torch.from_numpy(self.spec.scale_action(self.action[part].numpy())),
                transform(self.rew[part])[:, None],
                self.done[part, None],
                normalizer(self.next_obs[part]),
            )
            matrix[part] = torch.cat(columns, dim=1).to(device)
        return Sampler(matrix, self.spec.obs_dim, self.spec.act_dim, self.episode_ends)

    def save(self, path: str | PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Write one safetensors file. The write is not atomic.

        Args:
            path: The file; an existing one is overwritten.
            extra: JSON values that are stored together with the data.

        Raises:
            ValueError: If a space cannot be stored.
        """
        header = {
            "format": FILE_FORMAT,
            "observation_space": space_to_json(self.spec.observation_space),
            "action_space": space_to_json(self.spec.action_space),
            "obs_keys": self.spec.obs_keys,
            "info": self.info,
            "extra": dict(extra or {}),
        }
        columns = {name: getattr(self, name).contiguous() for name in _COLUMNS}
        save_file(columns, path, {"diffagents": json.dumps(header)})

    @classmethod
    def load(cls, path: str | PathLike[str], extra: Mapping[str, Any] | None = None) -> "Transitions":
        """Read a file that `save` wrote.

        Args:
            path: The file.
            extra: What must have been stored with the data; None: anything.

        Returns:
            The data.

        Raises:
            ValueError: If the file has another format or is damaged, or `extra` differs.
        """
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError(f"{path} is no regular file; pass one that Transitions.save wrote")
        try:
            return cls._load(path, extra)
        except (KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            cause = printable(one_line(error))
            raise ValueError(f"{path} is damaged, or Transitions.save did not write it ({cause}); save it again") from None

    @classmethod
    def _load(cls, path: str | PathLike[str], extra: Mapping[str, Any] | None) -> "Transitions":
        """As `load`, with other errors for a damaged file."""
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("diffagents", "{}"))
            if header.get("format") != FILE_FORMAT:
                found = short(header.get("format"))
                raise ValueError(f"{path} has transitions format {found}, but this version reads {FILE_FORMAT}; save it again")
            if extra is not None and header["extra"] != dict(extra):
                raise ValueError(f"{path} was made from other data; delete it or save it again")
            columns = {name: file.get_tensor(name) for name in _COLUMNS}
        spec = Spec.from_spaces(
            space_from_json(header["observation_space"]), space_from_json(header["action_space"]), header["obs_keys"]
        )
        return cls(**columns, spec=spec, info=header["info"])

    def fingerprint(self) -> str:
        """SHA-256 of the content, in hexadecimal digits; takes about 0.1 s for a million steps."""
        digest = hashlib.sha256()
        for name in ("obs", "action", "rew", "next_obs", "done", "episode_ends"):
            tensor = getattr(self, name).contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(tensor.numpy().data)
        return digest.hexdigest()
