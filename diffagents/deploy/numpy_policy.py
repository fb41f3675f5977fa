"""The fast path of `predict`: a tanh MLP for one or a few observations on a CPU, in numpy, sharing memory with the networks.

A product of a matrix and one vector takes a few microseconds in numpy but tens of them in torch, because of its overhead. For a
batch the products take as long in both, but what is around them does not.
"""

from typing import Any

import numpy as np
from torch import nn

from diffagents.data.normalize import ObsNormalizer
from diffagents.networks.mlp import TanhPolicy
from diffagents.torch_internals import tensor_place
from diffagents.types import Spec, in_dtype

MOST_ROWS = 1024
"""Observations in a batch on the fast path; in larger ones nothing but the products counts, for which torch may use threads."""
_MOST = 1e18
"""The most that a normalised observation may hold on the fast path."""


class NumpyPath:
    """The fast path of one agent: keeps a `NumpyPolicy`, and creates a new one when the networks are replaced or moved."""

    def __init__(self) -> None:
        self._policy: NumpyPolicy | None = None

    def __call__(self, obs: np.ndarray, policy: TanhPolicy, normalizer: ObsNormalizer, spec: Spec) -> np.ndarray | None:
        """Act on one observation or a batch.

        Args:
            obs: The observation, in the environment's units, or a batch of them.
            policy: The agent's policy network.
            normalizer: The agent's observation normaliser.
            spec: The agent's spaces.

        Returns:
            As `NumpyPolicy`.
        """
        quick = self._policy
        if quick is None or not quick.current(policy, normalizer):
            quick = self._policy = NumpyPolicy(normalizer, policy, spec)
        return quick(obs)


class NumpyPolicy:
    """action = unscale(tanh(MLP(normalise(obs)))) for float observations.

    The arrays are views of the networks' parameters, so that training, which changes these in place, changes the policy too.
    `current` checks that they are still views of them.

    Args:
        normalizer: The observation normaliser.
        policy: The policy network, on the CPU.
        spec: The environment's spaces.
    """

    def __init__(self, normalizer: ObsNormalizer, policy: TanhPolicy, spec: Spec) -> None:
        self._shape = spec.observation_space.shape if spec.obs_keys is None else None
        linears = [layer for layer in policy.net if isinstance(layer, nn.Linear)]
        self._policy, self._normalizer = policy, normalizer
        places = [(tensor_place(layer, name), name) for layer in linears for name in ("weight", "bias")]
        places += [(tensor_place(normalizer, name), name) for name in ("mean", "std")]
        self._watched = [(place, name, place[name], place[name].data_ptr()) for place, name in places]
        arrays = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linears]
        reach = _MOST  # of the values after each layer
        for weight, bias in arrays:
            reach = float(np.abs(weight).sum(1, dtype=np.float64).max()) * reach + float(np.abs(bias).max())
        if not reach < 1e38:  # weights of a damaged file: torch overflows silently, numpy would warn
            self._shape = None
        self._hidden, (self._last, self._last_bias) = arrays[:-1], arrays[-1]
        self._mean, self._std = normalizer.mean.numpy(), normalizer.std.numpy()
        space = spec.action_space
        self._low, self._high = space.low.reshape(-1), space.high.reshape(-1)
        self._half = 0.5 * (self._high - self._low)
        self._action_shape, self._dtype = space.shape, space.dtype

    def current(self, policy: TanhPolicy, normalizer: ObsNormalizer) -> bool:
        """Whether it was made from these modules, and their tensors are still in the same memory."""
        if policy is not self._policy or normalizer is not self._normalizer:
            return False
        return all([place[name] is tensor and tensor.data_ptr() == at for place, name, tensor, at in self._watched])

    def __call__(self, obs: np.ndarray) -> np.ndarray | None:
        """Act on one observation, or on a small batch.

        Args:
            obs: The observation, in the environment's units, or up to MOST_ROWS of them.

        Returns:
            The action or actions, in the environment's units and dtype. None if the fast path does not apply: `obs` is no float
            array of the space's shape or a batch of such, or NaN or huge values are involved, which `predict` then reports.
        """
        if obs.dtype.kind != "f":
            return None
        if obs.shape == self._shape:
            batch: tuple[int, ...] = ()
        elif obs.shape[1:] == self._shape and 0 < len(obs) <= MOST_ROWS:
            batch = (len(obs),)
        else:
            return None
        h: Any = obs.reshape(*batch, -1).astype(np.float32, copy=False) - self._mean
        h /= self._std
        flat = h.reshape(-1)
        if not (np.maximum.reduce(flat) < _MOST and np.minimum.reduce(flat) > -_MOST):
            return None
        for weight, bias in self._hidden:
            h = weight.dot(h) if not batch else h.dot(weight.T)
            h += bias
            np.maximum(h, 0.0, out=h)
        h = self._last.dot(h) if not batch else h.dot(self._last.T)
        h += self._last_bias
        np.tanh(h, out=h)
        flat = h.reshape(-1)
        if (length := flat.dot(flat)) != length:  # NaN
            return None
        h += 1.0
        action = self._low + h * self._half
        np.maximum(action, self._low, out=action)
        np.minimum(action, self._high, out=action)
        return in_dtype(action.reshape((*batch, *self._action_shape)), self._dtype)
