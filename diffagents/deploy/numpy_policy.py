"""A policy that is one tanh MLP, for one observation on a CPU: numpy on the networks' own memory, no tensor in between.

A matrix times one vector takes a few microseconds; calling torch for it takes tens.
"""

import numpy as np
from torch import nn

from diffagents.data.normalize import ObsNormalizer
from diffagents.networks.mlp import TanhPolicy
from diffagents.torch_internals import tensor_place
from diffagents.types import Spec


class NumpyPath:
    """The fast path of an agent's `predict`: keeps a `NumpyPolicy` and makes a new one whenever the networks have moved."""

    def __init__(self) -> None:
        self._policy: NumpyPolicy | None = None

    def __call__(self, obs: np.ndarray, policy: TanhPolicy, normalizer: ObsNormalizer, spec: Spec) -> np.ndarray | None:
        """The action for one observation, or None if the fast path does not apply."""
        quick = self._policy
        if quick is None or not quick.current(policy, normalizer):
            quick = self._policy = NumpyPolicy(normalizer, policy, spec)
        return quick(obs)


class NumpyPolicy:
    """action = unscale(tanh(MLP(normalise(obs)))) for a float observation of exactly the space's shape.

    The arrays are views of the networks' parameters, so that whatever changes these in place changes the policy; `current`
    tells whether they still are.
    """

    def __init__(self, normalizer: ObsNormalizer, policy: TanhPolicy, spec: Spec) -> None:
        self._shape = spec.observation_space.shape if spec.obs_keys is None else None
        linears = [layer for layer in policy.net if isinstance(layer, nn.Linear)]
        self._policy, self._normalizer = policy, normalizer
        places = [(tensor_place(layer, name), name) for layer in linears for name in ("weight", "bias")]
        places += [(tensor_place(normalizer, name), name) for name in ("mean", "std")]
        self._watched = [(place, name, place[name], place[name].data_ptr()) for place, name in places]
        arrays = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linears]
        self._hidden, (self._last, self._last_bias) = arrays[:-1], arrays[-1]
        self._mean, self._std = normalizer.mean.numpy(), normalizer.std.numpy()
        space = spec.action_space
        self._low, self._high = space.low.reshape(-1), space.high.reshape(-1)
        self._half = 0.5 * (self._high - self._low)
        self._action_shape, self._dtype = space.shape, space.dtype

    def current(self, policy: TanhPolicy, normalizer: ObsNormalizer) -> bool:
        """Whether these are the modules that it was made of, their numbers where they were."""
        if policy is not self._policy or normalizer is not self._normalizer:
            return False
        return all([place[name] is tensor and tensor.data_ptr() == at for place, name, tensor, at in self._watched])

    def __call__(self, obs: np.ndarray) -> np.ndarray | None:
        """The action, in the environment's units; None where this is not one observation, or one to be looked at (NaN)."""
        if obs.shape != self._shape or obs.dtype.kind != "f":
            return None
        h = (obs.reshape(-1).astype(np.float32, copy=False) - self._mean) / self._std
        if not (np.maximum.reduce(h) < 1e18 and np.minimum.reduce(h) > -1e18):
            return None
        for weight, bias in self._hidden:
            h = weight.dot(h)
            h += bias
            np.maximum(h, 0.0, out=h)
        h = self._last.dot(h)
        h += self._last_bias
        np.tanh(h, out=h)
        if (length := h.dot(h)) != length:  # NaN
            return None
        h += 1.0
        action = self._low + h * self._half
        return np.minimum(np.maximum(action, self._low), self._high).reshape(self._action_shape).astype(self._dtype, copy=False)
