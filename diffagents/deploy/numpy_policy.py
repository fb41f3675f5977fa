"""The fast path of `predict`: a tanh MLP for one or a few observations on a CPU, in numpy, sharing memory with the networks.

A product of a matrix and one vector takes a few microseconds in numpy but tens of them in torch, because of its overhead. For a
batch the products take as long in both, but what is around them does not: a call of numpy on a small array takes about a
microsecond, so that their number counts.
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
"""The largest norm of the normalised observations on the fast path; its square is finite in float32."""


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
        self._places = [(tensor_place(layer, name), name) for layer in linears for name in ("weight", "bias")]
        self._places += [(tensor_place(normalizer, name), name) for name in ("mean", "std")]
        self._addresses = [place[name].data_ptr() for place, name in self._places]
        arrays = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linears]
        reach = _MOST  # of the values after each layer
        for weight, bias in arrays:
            reach = float(np.abs(weight).sum(1, dtype=np.float64).max()) * reach + float(np.abs(bias).max())
        if not reach < 1e38:  # weights of a damaged file: torch overflows silently, numpy would warn
            self._shape = None
        # The zeros are for the ReLU: numpy's maximum of two arrays takes half as long as that of an array and a number.
        self._hidden = [(weight.T, bias, np.zeros_like(bias)) for weight, bias in arrays[:-1]]
        self._last, self._last_bias = arrays[-1][0].T, arrays[-1][1]
        self._mean, self._std = normalizer.mean.numpy(), normalizer.std.numpy()
        space = spec.action_space
        self._low, self._high = space.low.reshape(-1), space.high.reshape(-1)
        self._half = 0.5 * (self._high - self._low)
        self._middle = self._low.astype(np.result_type(self._low, np.float32)) + self._half  # float16 would round it
        self._unscales = not ((self._low == -1.0).all() and (self._high == 1.0).all())  # tanh has these bounds already
        # Rounding is monotonic: where -1 and 1 stay within the bounds, everything between them does.
        self._clips = bool((self._middle - self._half < self._low).any() or (self._middle + self._half > self._high).any())
        self._action_shape, self._dtype = space.shape, space.dtype

    def current(self, policy: TanhPolicy, normalizer: ObsNormalizer) -> bool:
        """Whether it was made from these modules, and their tensors are still in the same memory.

        The arrays keep that memory alive, so that a new tensor is never at the address of an old one.
        """
        if policy is not self._policy or normalizer is not self._normalizer:
            return False
        return [place[name].data_ptr() for place, name in self._places] == self._addresses

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
        h: Any = obs.reshape((*batch, -1)).astype(np.float32, copy=False) - self._mean
        h /= self._std
        if not np.vdot(h, h) < _MOST**2:  # also where it is NaN
            return None
        for weight, bias, zeros in self._hidden:
            h = h.dot(weight)
            h += bias
            np.maximum(h, zeros, out=h)
        h = h.dot(self._last)
        h += self._last_bias
        np.tanh(h, out=h)
        if not np.vdot(h, h) < _MOST**2:  # NaN, from the weights
            return None
        if self._unscales:
            h = h * self._half  # float64 where the bounds need it
            h += self._middle
            if self._clips:
                np.clip(h, self._low, self._high, out=h)
        action = h.reshape((*batch, *self._action_shape))
        return action if action.dtype == self._dtype else in_dtype(action, self._dtype)
