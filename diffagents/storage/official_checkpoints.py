"""Loads the checkpoints of the papers' authors into our networks; `weights_only=True` admits tensors only and runs no code.

SRPO (thu-ml/SRPO) saves the behaviour model as `diffusion_behavior.*` and the critic as `q0.*`, `q0_target.*` and `vf.v.*`,
but never the extracted policy. Layers are named by their index in an `nn.Sequential`, the twin critics `q1` and `q2`.
Diffusion-QL, and DiffCPS as a fork of it, save the actor as `model.{time_mlp,mid_layer,final_layer}.*` together with the
buffers of its schedule, and the critic as `q1_model.*` and `q2_model.*`; they save neither an EMA nor a target network.
"""

import contextlib
import pathlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from diffagents.config.presets import resolve_preset
from diffagents.diffusion.chain import vp_chain
from diffagents.errors import ArtifactError, one_line, printable, short
from diffagents.training.state import Learner, check_alike, load_state, networks_on_meta
from diffagents.types import Spec

State = Mapping[str, Tensor]
"""A state dict: name -> tensor."""
Checkpoint = str | pathlib.Path | State
"""The path of an official file, or its state dict."""
L = TypeVar("L", bound=Learner)
MAX_SHARED = 4
"""How many times the tensors of a checkpoint may use the same memory on average; networks with their targets may share it."""


def srpo_from_official(
    cls: type[L], behavior: Checkpoint, critic: Checkpoint, policy: Checkpoint | None = None, *, env: Any = None, **kwargs: Any
) -> L:
    """Build an SRPO agent from official files; see `SRPO.from_official`.

    Args:
        cls: The class SRPO.
        behavior: Path or state dict of the behaviour model.
        critic: Path or state dict of the critic.
        policy: Path or state dict of an extracted policy; None leaves the policy to be trained.
        env: As in the constructor; None assumes unbounded observations and actions in [-1, 1].
        kwargs: Arguments of the constructor. Default preset: None. Another must be named; of `policy_kwargs` only the size of
            a missing policy matters, as the files give all other sizes.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file does not contain such a network.
    """
    kwargs = _with_preset(cls, kwargs)
    asked = kwargs.pop("policy_kwargs", {}).get("net_arch", {})
    policy_state = None
    with _naming(behavior, critic, policy):
        behavior_state = srpo_behavior_state(read_checkpoint(behavior, "behavior"))
        critic_state = srpo_critic_state(read_checkpoint(critic, "critic"))
        act_dim = len(behavior_state["net.output.bias"])
        v_layers = _linear_sizes(critic_state, "v")
        obs_dim = v_layers[0]
        q_hidden = [critic_state[f"q.weights.{i}"].shape[2] for i in range(len(v_layers) - 2)]
        arch: dict[str, Any] = {"qf": q_hidden, "vf": v_layers[1:-1]}
        if policy is not None:
            policy_state = srpo_policy_state(read_checkpoint(policy, "policy"))
            arch["pi"] = _linear_sizes(policy_state, "net")[1:-1]
        n_blocks = len([key for key in behavior_state if key.endswith("norm.weight")])
        width = len(behavior_state["net.input.bias"])
    if policy_state is None and asked:  # the user chooses the policy's size, the files all others
        arch["pi"] = asked["pi"] if isinstance(asked, dict) else asked
    policy_kwargs = {"net_arch": arch, "behavior_width": width, "behavior_blocks": n_blocks}
    trial = cls(policy_kwargs=policy_kwargs, **kwargs)
    with _naming(behavior, critic, policy):
        given = {"behavior.": behavior_state, "critic.": critic_state}
        _check_shapes(trial, obs_dim, act_dim, given | ({} if policy_state is None else {"policy.": policy_state}))
    learner = cls(env=env, policy_kwargs=policy_kwargs, **kwargs)
    networks = _networks(learner, obs_dim, act_dim)
    noise = networks["behavior"].get_buffer("noise")  # ours: the official file has no such tensor
    load_state(networks["behavior"], {**behavior_state, "noise": noise})
    load_state(networks["critic"], critic_state)
    if policy_state is None:
        learner.state.policy_missing = True
    else:
        load_state(networks["policy"], policy_state)
    return learner


def chain_from_official(cls: type[L], actor: Checkpoint, critic: Checkpoint, *, env: Any = None, **kwargs: Any) -> L:
    """Build a Diffusion-QL or DiffCPS agent from official files; see `DiffusionQL.from_official`.

    EMA policy and target critic start as copies, with a warning.

    Args:
        cls: The class DiffusionQL or DiffCPS.
        actor: Path or state dict of the actor.
        critic: Path or state dict of the critic.
        env: As in the constructor; None assumes unbounded observations and actions in [-1, 1].
        kwargs: Arguments of the constructor. Default preset: None. Another must be named.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file does not contain such a network, or the actor was trained on another diffusion schedule.
    """
    kwargs = _with_preset(cls, kwargs)
    with _naming(actor, critic):
        actor_file, critic_state = read_checkpoint(actor, "actor"), chain_critic_state(read_checkpoint(critic, "critic"))
        actor_state = chain_actor_state(actor_file)
        trunk = _linear_sizes(actor_state, "trunk")
        act_dim, obs_dim = trunk[-1], critic_state["weights.0"].shape[1] - trunk[-1]
        q_hidden = [critic_state[f"weights.{i}"].shape[2] for i in range(len(critic_state) // 2 - 1)]
        if "betas" in actor_file:
            betas = actor_file["betas"].float()
            kwargs.setdefault("n_diffusion_steps", len(betas))
            if kwargs["n_diffusion_steps"] != len(betas) or not torch.allclose(betas, vp_chain(len(betas)).beta, atol=1e-6):
                raise ValueError(
                    f"the official actor was trained on {len(betas)} diffusion steps with beta from {betas[0]:.4f} to "
                    f"{betas[-1]:.4f}; only the VP schedule with the same number of steps can be loaded "
                    f"(n_diffusion_steps={kwargs['n_diffusion_steps']}): leave n_diffusion_steps out"
                )
    policy_kwargs = {"net_arch": {"pi": trunk[1:-1], "qf": q_hidden}}
    trial = cls(policy_kwargs=policy_kwargs, **kwargs)
    with _naming(actor, critic):
        _check_shapes(trial, obs_dim, act_dim, {"policy.net.": actor_state, "critic.": critic_state})
    learner = cls(env=env, policy_kwargs=policy_kwargs, **kwargs)
    networks = _networks(learner, obs_dim, act_dim)
    load_state(networks["policy"].get_submodule("net"), actor_state)
    load_state(networks["critic"], critic_state)
    networks["policy_ema"].load_state_dict(networks["policy"].state_dict())
    networks["critic_target"].load_state_dict(networks["critic"].state_dict())
    warnings.warn("official files contain neither the EMA policy nor the target critic: both start as copies", stacklevel=3)
    return learner


@contextlib.contextmanager
def _naming(*sources: Checkpoint | None) -> Iterator[None]:
    """Turn what Python and torch raise for tensors of other names and shapes into one ValueError that names the files."""
    try:
        yield
    except (ArtifactError, LookupError, TypeError, ArithmeticError, RuntimeError, AttributeError) as error:
        paths = [printable(source) for source in sources if isinstance(source, (str, pathlib.Path))]
        raise ValueError(
            f"{' and '.join(paths) or 'the state dicts'} do not contain the networks of this algorithm "
            f"({printable(one_line(error))[:200]}): pass the files that the official code saved"
        ) from None


def _check_shapes(trial: Learner, obs_dim: int, act_dim: int, given: Mapping[str, State]) -> None:
    """Compare the tensors with those of the networks that their sizes imply, before any memory is allocated for these.

    Args:
        trial: A learner without environment and networks.
        obs_dim: S.
        act_dim: A.
        given: Prefix -> tensors of the networks or modules whose names begin with it.
    """
    expected = networks_on_meta(trial, _official_spec(obs_dim, act_dim))
    for prefix, state in given.items():
        ours = {key.removeprefix(prefix): value for key, value in expected.items() if key.startswith(prefix)}
        ours.pop("noise", None)  # the official file has no such tensor
        check_alike(state, ours)


def _official_spec(obs_dim: int, act_dim: int) -> Spec:
    """The spaces of the official tasks: unbounded observations and actions in [-1, 1]."""
    box = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
    return Spec(box, spaces.Box(-1.0, 1.0, (act_dim,), np.float32))


def _networks(learner: Learner, obs_dim: int, act_dim: int) -> dict[str, nn.Module]:
    """The networks of a learner by name, built if necessary; they are about to be loaded."""
    if learner.spec is None:
        learner.set_up(_official_spec(obs_dim, act_dim))
    learner.state.pristine = False
    return learner.networks()


def _with_preset(cls: type[Learner], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Replace the argument `preset` by its hyperparameters, so that networks and optimisers are built with them at once.

    None is the default here: the files contain the papers' networks.
    """
    preset = kwargs.pop("preset", None)
    if preset is None:
        return {**kwargs, "preset": None}
    if preset == "auto":
        raise ValueError('preset="auto" needs a dataset id, which official files do not contain: name the row')
    values = resolve_preset(cls.presets_name(), preset, None)[1]
    return {**{name: value for name, value in values.items() if name != "policy_kwargs"}, **kwargs, "preset": None}


def read_checkpoint(source: Checkpoint, what: str) -> dict[str, Tensor]:
    """Read a checkpoint, without running code from it.

    Args:
        source: A path, or a state dict that has been read already.
        what: "actor", "critic", ...; for error messages.

    Returns:
        Name -> tensor.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a state dict of tensors.
    """
    if isinstance(source, (str, pathlib.Path)):
        path = pathlib.Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no official {what} checkpoint at {path}: check the path")
        try:
            _check_inflated(path)
            source = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises several types for a bad file
            reason = printable(one_line(error)).partition(". ")[0][:200]
            raise ValueError(
                f"{printable(path)} is not a checkpoint of plain tensors ({reason}): save its state_dict() with torch.save"
            ) from None
    if not isinstance(source, Mapping) or not all(isinstance(value, Tensor) for value in source.values()):
        raise ValueError(f"the official {what} checkpoint must be a state dict of tensors, not {type(source).__name__}")
    for name, value in source.items():
        if not isinstance(name, str):
            raise ValueError(f"the official {what} checkpoint has a tensor without a name ({short(name)}): pass a state dict")
        plain = value.layout == torch.strided and not value.is_complex() and not value.is_quantized
        if not plain or value.device.type == "meta" or value.numel() == 0:
            raise ValueError(f"{short(name)} of the official {what} checkpoint is empty, or no plain array of real numbers")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # a few bytes that pretend to be many
            raise ValueError(
                f"{short(name)} of the official {what} checkpoint has the shape {tuple(value.shape)}, but its file holds fewer "
                "numbers: save its state_dict() with torch.save"
            )
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in source.values()}
    if sum(value.numel() * value.element_size() for value in source.values()) > MAX_SHARED * sum(storages.values()):
        raise ValueError(
            f"the tensors of the official {what} checkpoint share their memory: save its state_dict() with torch.save"
        )
    return dict(source)


def _check_inflated(path: pathlib.Path) -> None:
    """Raise ValueError for a zip file that is much larger once it is read: torch.save does not compress."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > 2 * path.stat().st_size:
                raise ValueError("it is compressed")


def srpo_behavior_state(official: State) -> dict[str, Tensor]:
    """Rename the tensors of the official `ScoreNet` as in our `Behavior`, whose `noise` it lacks.

    The `residual` layers, which the official code never uses, are dropped.

    Raises:
        ValueError: It is not such a network.
    """
    rules = [
        (r"embed\.0\.W", "net.frequencies"),
        (r"cond_model\.(\d)\.(weight|bias)", r"net.time_mlp.\1.\2"),
        (r"main\.fc\.(weight|bias)", r"net.input.\1"),
        (r"main\.blocks\.(\d+)\.layer_norm\.(weight|bias)", r"net.blocks.\1.norm.\2"),
        (r"main\.blocks\.(\d+)\.fc1\.(weight|bias)", r"net.blocks.\1.expand.\2"),
        (r"main\.blocks\.(\d+)\.fc2\.(weight|bias)", r"net.blocks.\1.project.\2"),
        (r"main\.out_fc\.(weight|bias)", r"net.output.\1"),
    ]
    state: dict[str, Tensor] = {}
    for name, value in official.items():
        for pattern, ours in rules:
            match = re.fullmatch(rf"(?:.*\.)?{pattern}", name)
            if match:
                state[match.expand(ours)] = value.float()
    if "net.output.bias" not in state:
        raise ValueError(
            f"there is no SRPO behaviour network among the tensors {_some(official)}...: expected diffusion_behavior.main.*"
        )
    return state


def srpo_critic_state(official: State) -> dict[str, Tensor]:
    """Rename the official twin Q, its target and V as in our `IQLCritic`.

    The E = 2 twins are stacked: weights (out, in) -> (E, in, out), biases (out,) -> (E, 1, out).

    Raises:
        ValueError: It is not such a critic, or one of the twins is missing.
    """
    state: dict[str, Tensor] = {}
    for theirs, ours in ((r"(?:.*\.)?(?:q0|q)", "q"), (r"(?:.*\.)?(?:q0_target|q_target)", "q_target")):
        for kind, place in (("weight", "weights"), ("bias", "biases")):
            twins: dict[int, dict[int, Tensor]] = {}
            for name, value in official.items():
                match = re.fullmatch(rf"{theirs}\.q([12])\.(\d+)\.{kind}", name)
                if match:
                    twins.setdefault(int(match[2]), {})[int(match[1])] = value.float()
            for i, (_, pair) in enumerate(sorted(twins.items())):
                if set(pair) != {1, 2}:
                    raise ValueError(
                        f"layer {i} of the official critic's {ours} has only one of the twins: the file is incomplete"
                    )
                tensors = [pair[1], pair[2]]
                stacked = [t.T for t in tensors] if kind == "weight" else [t[None] for t in tensors]
                state[f"{ours}.{place}.{i}"] = torch.stack(stacked).contiguous()
    for name, value in official.items():
        match = re.fullmatch(r"(?:.*\.)?(?:vf|v)\.v\.(\d+)\.(weight|bias)", name)
        if match:
            state[f"v.{match[1]}.{match[2]}"] = value.float()
    if not {"q.biases.0", "q_target.biases.0", "v.0.bias"} <= set(state):
        raise ValueError(
            f"there is no SRPO critic among the tensors {_some(official)}...: expected q0.*, q0_target.* and vf.v.*"
        )
    return state


def srpo_policy_state(official: State) -> dict[str, Tensor]:
    """Rename the tensors of the official `Dirac_Policy` (`net.<i>.weight`, any prefix) as in our `TanhPolicy`.

    Raises:
        ValueError: It is not such a policy.
    """
    state = {}
    for name, value in official.items():
        match = re.fullmatch(r"(?:.*\.)?net\.(\d+)\.(weight|bias)", name)
        if match:
            state[f"net.{match[1]}.{match[2]}"] = value.float()
    if not state:
        raise ValueError(f"there is no SRPO policy among the tensors {_some(official)}...: expected net.0.weight, ...")
    return state


def chain_actor_state(official: State) -> dict[str, Tensor]:
    """Rename the tensors of the official `MLP` (`time_mlp`, `mid_layer`, `final_layer`, any prefix) as in our `MLPDenoiser`.

    Raises:
        ValueError: It is not such an actor.
    """
    state: dict[str, Tensor] = {}
    last = 0
    for name, value in official.items():
        if match := re.fullmatch(r"(?:.*\.)?time_mlp\.([13])\.(weight|bias)", name):
            state[f"time_mlp.{int(match[1]) - 1}.{match[2]}"] = value.float()
        elif match := re.fullmatch(r"(?:.*\.)?mid_layer\.(\d+)\.(weight|bias)", name):
            state[f"trunk.{match[1]}.{match[2]}"] = value.float()
            last = max(last, int(match[1]) + 2)
    for name, value in official.items():
        if match := re.fullmatch(r"(?:.*\.)?final_layer\.(weight|bias)", name):
            state[f"trunk.{last}.{match[1]}"] = value.float()
    if not {"time_mlp.0.bias", "trunk.0.bias", f"trunk.{last}.bias"} <= set(state) or last == 0:
        raise ValueError(
            f"there is no Diffusion-QL actor among the tensors {_some(official)}...: expected time_mlp.*, mid_layer.* and "
            "final_layer.*"
        )
    return state


def chain_critic_state(official: State) -> dict[str, Tensor]:
    """Rename the official twins `q1_model.<i>`, `q2_model.<i>` (any prefix) as in our `EnsembleMLP`.

    The E = 2 twins are stacked: weights (out, in) -> (E, in, out), biases (out,) -> (E, 1, out).

    Raises:
        ValueError: It is not such a critic, or one of the twins is missing.
    """
    state: dict[str, Tensor] = {}
    for kind, place in (("weight", "weights"), ("bias", "biases")):
        twins: dict[int, dict[int, Tensor]] = {}
        for name, value in official.items():
            if match := re.fullmatch(rf"(?:.*\.)?q([12])_model\.(\d+)\.{kind}", name):
                twins.setdefault(int(match[2]), {})[int(match[1])] = value.float()
        for i, (_, pair) in enumerate(sorted(twins.items())):
            if set(pair) != {1, 2}:
                raise ValueError(f"layer {i} of the official critic has only one of the twins: the file is incomplete")
            stacked = [pair[j].T if kind == "weight" else pair[j][None] for j in (1, 2)]
            state[f"{place}.{i}"] = torch.stack(stacked).contiguous()
    if not {"weights.0", "biases.0"} <= set(state):
        raise ValueError(
            f"there is no Diffusion-QL critic among the tensors {_some(official)}...: expected q1_model.*, q2_model.*"
        )
    return state


def _some(state: State) -> str:
    """The names of the first tensors, for a message."""
    return f"[{', '.join(repr(short(name)) for name in list(state)[:3])}]"


def _linear_sizes(state: State, prefix: str) -> list[int]:
    """The sizes [in, hidden..., out] of a Sequential of Linear layers named `<prefix>.<i>.weight`."""
    found = sorted(
        (int(m[1]), value) for name, value in state.items() if (m := re.fullmatch(rf"{prefix}\.(\d+)\.weight", name))
    )
    return [found[0][1].shape[1], *(value.shape[0] for _, value in found)]
