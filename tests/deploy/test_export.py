"""export: every algorithm in both formats, run where diffagents cannot be imported, acts as `predict` does."""

import copy
import json
import logging
import pathlib
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import NAMES, small

import diffagents
from diffagents import functional
from diffagents.agent import Agent
from diffagents.agents import qgpo
from diffagents.deploy import export as module
from diffagents.deploy.export import METADATA_FILE, SUFFIXES, export
from diffagents.envs.vec_env import stub_env
from diffagents.types import Spec

logging.getLogger("torch.__trace").setLevel(logging.INFO)  # pytest would record its thousands of lines, which takes time
FORMATS = list(SUFFIXES)
# Files are written operation by operation. These algorithms act by no operation that the others lack (a test below), so their
# programs are traced and compared here, and their files are slow tests.
NOTHING_NEW = ["DiffusionQL", "DiffCPS", "DiffusionBC", "BC", "IQL", "TD3BC"]
FILES = [(name, format) for name in NAMES for format in FORMATS if name not in NOTHING_NEW]
SLOW = [(name, format) for name in NOTHING_NEW for format in FORMATS]
STEPS: dict[str, dict[str, Any]] = {  # of the samplers: a test's time goes with the length of the graph
    "DiffusionQL": {"n_diffusion_steps": 2},
    "DiffCPS": {"n_diffusion_steps": 1},
    "BDPO": {"n_diffusion_steps": 1},
    "DiffusionBC": {"n_diffusion_steps": 1},
    "IDQL": {
        "n_diffusion_steps": 1,
        "policy_kwargs": {"net_arch": [16, 16], "behavior_width": 16, "behavior_blocks": 1},
    },
    "SfBC": {"solver_steps": 1},
}
CHOICES: dict[str, dict[str, Any]] = {  # of some calls; `small` has 4 candidates
    "DiffCPS": {"n_candidates": 7},
    "IDQL": {"n_candidates": 5, "sampling_temperature": 0.5},
    "QGPO": {"guidance_scale": 0.1, "solver_steps": 1},
    "SfBC": {"average_top": 2},
}
SHRINK = {False: 0.004, True: 0.04}  # solvers of the SDE, chains
BOX = spaces.Box(-50.0, 50.0, (3,))
UNEQUAL = spaces.Box(np.array([-2.0, 0.5], np.float32), np.array([3.0, 0.75], np.float32))
SPECS = {  # of some; all others: BOX and UNEQUAL
    "SRPO": Spec(spaces.Dict({"a": BOX, "b": spaces.Box(-9.0, 9.0, (2, 2))}), UNEQUAL, ("b", "a")),
    "IQL": Spec(BOX, spaces.Box(-4.0, 1.0, (2, 1))),
    "AWR": Spec(BOX, spaces.Box(-90, 60, (2,), np.int32)),
}
RUNNER = """
import json, pathlib, sys
sys.modules["diffagents"] = None  # importing it raises ImportError
import numpy as np, onnxruntime, torch
torch.set_num_threads(1)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
folder = pathlib.Path(sys.argv[1])
actions, facts = {}, {}
for name, obs in np.load(folder / "obs.npz").items():
    for path in folder.glob(name + ".*"):
        if path.suffix == ".onnx":
            session = onnxruntime.InferenceSession(path, options)
            run = lambda x: session.run(["action"], {"obs": x})[0]
            facts[path.name] = session.get_modelmeta().custom_metadata_map
        else:
            extra = {"METADATA": ""}
            policy = torch.export.load(path, extra_files=extra).module()
            run = lambda x: policy(torch.from_numpy(x)).numpy()
            facts[path.name] = json.loads(extra["METADATA"])
        for n in (1, len(obs)):
            actions[path.name + str(n)] = run(obs[:n])
np.savez(folder / "actions.npz", **actions)
(folder / "facts.json").write_text(json.dumps(facts))
""".replace("METADATA", METADATA_FILE)


def acting(name: str, **knobs: Any) -> Agent:
    """A small agent that counts as trained, with a normaliser that matters and actions that are not all at the bounds."""
    spec = SPECS.get(name, Spec(BOX, UNEQUAL))
    given = {"env": stub_env(spec), "obs_keys": spec.obs_keys, "normalize_obs": True, "seed": 3}
    agent = small(name, **{**given, **STEPS.get(name, {}), **knobs})
    agent.obs_normalizer.fit(raw(agent))
    for network in agent.networks().values():
        if hasattr(network, "fixed_noise"):  # a sampler magnifies its noise and what an untrained network predicts of it
            *_, last = (layer for layer in network.modules() if isinstance(layer, torch.nn.Linear))
            for tensor in (network.fixed_noise, last.weight.detach(), last.bias.detach()):
                tensor.mul_(SHRINK[hasattr(network, "n_steps")])
    agent.set_parameters(agent.get_parameters())
    return agent


def raw(agent: Agent, n: int = 64) -> torch.Tensor:
    """Observations (n, S) far from the unit scale."""
    return 7.0 + 4.0 * torch.randn(n, agent.obs_dim, generator=torch.Generator().manual_seed(1))


def predict(agent: Agent, obs: np.ndarray, **choice: Any) -> np.ndarray:
    """`Agent.predict` on flat observations (B, S) -> flat actions (B, A)."""
    given: Any = obs
    if agent.obs_keys == ("b", "a"):
        given = {"a": obs[:, 4:], "b": obs[:, :4].reshape(-1, 2, 2)}
    return agent.predict(given, deterministic=True, **choice)[0].reshape(len(obs), -1)


class Exported:
    """Some algorithms in some formats, and what their files did in another process."""

    def __init__(self, folder: pathlib.Path, files: list[tuple[str, str]]) -> None:
        self.folder, self.agents = folder, {name: acting(name) for name, _ in files}
        self.errors: dict[str, Exception] = {}
        self.programs: dict[str, torch.export.ExportedProgram] = {}
        trace = module._trace

        def trace_once(policy: module.ExportedPolicy) -> Any:
            """One program for both formats."""
            name = type(policy.actor).__name__
            if name not in self.programs:
                self.programs[name] = trace(policy)
            return copy.deepcopy(self.programs[name])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_trace", trace_once)
            for name, format in files:
                file = name + SUFFIXES[format]
                try:
                    assert export(self.agents[name], folder / name, format, **CHOICES.get(name, {})) == folder / file
                except Exception as error:  # must not hide how the others fare
                    self.errors[file] = error
        np.savez(folder / "obs.npz", **{name: raw(agent).numpy() for name, agent in self.agents.items()})
        command = [sys.executable, "-I", "-c", RUNNER, str(folder)]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        self.actions = dict(np.load(folder / "actions.npz"))
        self.facts = json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("exported"), FILES)


@pytest.fixture(scope="module")
def slow_ones(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("slow"), SLOW)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format"), SLOW)
def test_slow_file_acts_as_predict_does_and_says_what_it_holds(name: str, format: str, slow_ones: Exported) -> None:
    acts_as_predict_does(name, format, slow_ones)
    says_what_it_holds(name, format, slow_ones)


def operations(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("name", NOTHING_NEW)
def test_slow_files_have_no_operation_of_their_own(name: str, exported: Exported) -> None:
    """And tracing succeeds, which compares the program with the agent."""
    agent = acting(name)
    own = operations(module._trace(module.ExportedPolicy(agent, agent.config)))
    written = set().union(*map(operations, exported.programs.values()))
    assert len(own) > 5 and own <= written, f"take {name} out of NOTHING_NEW"


@pytest.mark.parametrize(("name", "format"), FILES)
def test_file_acts_as_predict_does(name: str, format: str, exported: Exported) -> None:
    acts_as_predict_does(name, format, exported)


def acts_as_predict_does(name: str, format: str, exported: Exported) -> None:
    agent, file, choice = exported.agents[name], name + SUFFIXES[format], CHOICES.get(name, {})
    if file in exported.errors:
        raise exported.errors[file]
    obs = raw(agent).numpy()
    whole = predict(agent, obs, **choice)
    inside = (whole > agent.action_space.low.reshape(-1)) & (whole < agent.action_space.high.reshape(-1))
    assert inside.mean(0).min() > 0.5 and whole.std(0).min() > 2e-4, "the same everywhere: nothing would be compared"
    for n in (1, 64):
        action = exported.actions[file + str(n)]
        assert action.dtype == np.float32 and action.shape == (n, 2)
        np.testing.assert_allclose(action, predict(agent, obs[:n], **choice), atol=1e-5)


@pytest.mark.parametrize(("name", "format"), FILES)
def test_file_says_what_it_holds(name: str, format: str, exported: Exported) -> None:
    says_what_it_holds(name, format, exported)


def says_what_it_holds(name: str, format: str, exported: Exported) -> None:
    agent, facts = exported.agents[name], exported.facts[name + SUFFIXES[format]]
    if format == "onnx":
        facts = {key: value if key in ("algorithm", "diffagents") else json.loads(value) for key, value in facts.items()}
    space = agent.action_space
    assert facts == {
        "algorithm": name,
        "diffagents": diffagents.__version__,
        "obs_dim": 7 if name == "SRPO" else 3,
        "obs_keys": ["b", "a"] if name == "SRPO" else None,
        "obs_sizes": [4, 3] if name == "SRPO" else [3],
        "action_dim": 2,
        "action_shape": list(space.shape),
        "action_low": space.low.reshape(-1).tolist(),
        "action_high": space.high.reshape(-1).tolist(),
        "choice": {knob: getattr(agent.config, knob) for knob in agent.CHOICE} | CHOICES.get(name, {}),
    }
    content = (exported.folder / (name + SUFFIXES[format])).read_bytes()
    assert str(pathlib.Path(diffagents.__file__).parent).encode() not in content, "a path of this machine"


def test_onnx_names_its_sizes(exported: Exported) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported.folder / "QGPO.onnx")
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("obs", ["batch", 3], "tensor(float)")
    assert (answer.name, answer.shape, answer.type) == ("action", ["batch", 2], "tensor(float)")


def test_exporting_leaves_the_agent_alone(exported: Exported) -> None:
    for name, agent in exported.agents.items():
        fresh = acting(name)
        for network, state in fresh.get_parameters().items():
            assert all(torch.equal(value, agent.get_parameters()[network][key]) for key, value in state.items())
        for network, given in agent.networks().items():
            mine = fresh.networks()[network].named_parameters()
            assert all(p.requires_grad == given.get_parameter(key).requires_grad for key, p in mine)
        obs = raw(agent).numpy()
        np.testing.assert_array_equal(predict(agent, obs), predict(fresh, obs))
        assert torch.equal(agent.predict_generator.get_state(), fresh.predict_generator.get_state())
    assert not [name for name, value in sys.modules.items() if name.startswith("diffagents.") and "len" in vars(value)]
    assert qgpo.action_gradient is functional.action_gradient


@pytest.mark.parametrize("format", FORMATS)
def test_exporting_says_nothing(format: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(acting("TD3BC"), tmp_path / "policy", format)
    assert capfd.readouterr() == ("", "")


# ---- refusals ------------------------------------------------------------------------------------------------------
@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(policy: Any) -> Any:
        raise AssertionError("work had begun")

    monkeypatch.setattr(module, "_trace", traced)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"format": "ONNX"}, ValueError, r"format='ONNX'; choose from 'onnx', 'torch_export'"),
        ({"deterministic": False}, ValueError, "a file has no random generator"),
        ({"deterministic": None}, ValueError, "deterministic=None: a file has no random generator"),
        ({"path": "nowhere/policy"}, FileNotFoundError, "the folder .*nowhere does not exist: create it first"),
        ({"path": "."}, IsADirectoryError, r"is a folder: pass the name of a file, e\.g\. .*policy\.onnx"),
        ({"path": "policy.pt2"}, ValueError, r"pass format='torch_export', or a name that ends in \.onnx"),
        ({"path": "policy.onnx", "format": "torch_export"}, ValueError, r"pass format='onnx', or a name that ends in \.pt2"),
        ({"n_candidates": 5}, TypeError, "TD3BC.predict has no choice 'n_candidates'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_before_any_work(arguments: dict[str, Any], error: type, says: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / arguments.pop("path", "policy")
    with pytest.raises(error, match=says):
        export(acting("TD3BC"), path, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_work")
def test_agents_without_a_policy_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match=r"this SRPO has no policy to export yet: train it with learn\(data\)"):
        export(small("SRPO"), tmp_path / "policy")
    critic_only = acting("SRPO")
    critic_only.state.policy_missing = True
    with pytest.raises(RuntimeError, match=r'learn\(data, stages=\("policy",\)\)'):
        export(critic_only, tmp_path / "policy")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages(package: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} not found.*pip install onnx onnxscript"):
        export(acting("TD3BC"), tmp_path / "policy")
    assert export(acting("TD3BC"), tmp_path / "policy", "torch_export").is_file()


def test_an_untrained_policy_is_warned_of(tmp_path: pathlib.Path) -> None:
    with pytest.warns(UserWarning, match="TD3BC has not been trained: the file will contain a random policy"):
        export(small("TD3BC", env=stub_env(Spec(BOX, UNEQUAL))), tmp_path / "policy", "torch_export")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["DiffusionBC", "IQL"])
def test_a_policy_that_is_meant_to_sample_is_warned_of(name: str, tmp_path: pathlib.Path) -> None:
    for meant in (False, True):
        agent = acting(name, deterministic=meant)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(AssertionError, match="work had begun"):
                agent.export(tmp_path / "policy", "torch_export")
        told = [one for one in caught if "is meant to sample its actions" in str(one.message)]
        assert len(told) == (not meant) and all(one.category is UserWarning for one in told)


@pytest.mark.parametrize("format", FORMATS)
def test_a_policy_that_was_traced_wrongly_is_not_written(format: str, tmp_path: pathlib.Path) -> None:
    """One that counts its calls, for instance: the file would hold the count of the day."""
    agent, calls = acting("TD3BC"), []

    def act(obs: torch.Tensor, noise: Any, config: Any) -> torch.Tensor:
        calls.append(1)
        return torch.full((obs.shape[0], 2), 0.01 * len(calls))

    agent.act = act  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="acts differently from the agent on 65 of 65 observations, so nothing was written"):
        export(agent, tmp_path / "policy", format)
    assert not list(tmp_path.iterdir())


def test_the_comparison_itself() -> None:
    agent = acting("TD3BC")
    program = module._trace(module.ExportedPolicy(agent, agent.config))
    module._compare(module.ExportedPolicy(agent, agent.config), program, raw(agent))
    other = module.ExportedPolicy(acting("TD3BC", seed=4), agent.config)
    with pytest.raises(RuntimeError, match="the traced TD3BC acts differently from the agent on 65 of 65 observations"):
        module._compare(other, program, raw(agent))


def test_a_failed_write_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.pt2"
    path.write_text("old")

    def full(self: pathlib.Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", full)
        with pytest.raises(OSError, match="disk full"):
            export(acting("TD3BC"), path, "torch_export")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    export(acting("TD3BC"), path, "torch_export")
    assert path.stat().st_size > 1000 and list(tmp_path.iterdir()) == [path]
