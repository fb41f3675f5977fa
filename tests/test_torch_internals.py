"""PyTorch's private parts: only one module touches them, and where one is missing or has changed everything still works."""

import ast
import copy
import logging
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch._inductor
import torch.fx.experimental.proxy_tensor
from small_agents import STEPS, small
from torch import Tensor, nn
from toy import line_data

from diffagents import load, torch_internals
from diffagents.agent import Agent
from diffagents.deploy import numpy_policy
from diffagents.deploy.export import export
from diffagents.training.state import load_optimizer, optimizer_tensors
from diffagents.training.updates import Optimizer

logging.getLogger("torch.__trace").setLevel(logging.INFO)  # pytest would record its thousands of lines, which takes time
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")
PACKAGE = Path(torch_internals.__file__).parent
DATA = line_data()
OBS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
FUSED = ["_fused_adam_", "_fused_adamw_"]
FOREACH = ["_foreach_add_", "_foreach_lerp_", "_foreach_zero_"]
SHAPES = [(5, 4), (4,), (2, 3, 4), ()]
SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"weight_decay": 0.1},
    "all": {"weight_decay": 0.1, "cosine": True, "max_grad_norm": 0.7},
}
N_STEPS = 20
CPU = torch.device("cpu")


def other_arguments(*, everything: Any) -> None:
    raise AssertionError("never called")


def does_nothing(*_: Any, **__: Any) -> None:
    pass


REPLACEMENTS = {"missing": None, "other arguments": other_arguments, "does nothing": does_nothing}
"""What a later torch may have in a private function's place."""
Switch = Callable[..., None]


@pytest.fixture
def switch() -> Any:
    """switch(False, how): the private kernels are gone from now on; switch(True): they are back."""
    before = {name: getattr(torch, name) for name in FUSED + FOREACH}

    def turn(on: bool, how: str = "missing") -> None:
        for name, kernel in before.items():
            if on or REPLACEMENTS[how] is not None:
                setattr(torch, name, kernel if on else REPLACEMENTS[how])
            else:
                delattr(torch, name)
        torch_internals.fused_adam.cache_clear()
        torch_internals.for_each.cache_clear()

    yield turn
    turn(True)


# ---- one module ----------------------------------------------------------------------------------------------------
def private_uses(source: str) -> list[str]:
    """What a file uses of torch that has an underscore or "experimental" in its name; and attributes known to be private."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
            if node.attr in ("_base", "_parameters", "_buffers", "_modules"):
                found.append(node.attr)
        for name in names:
            parts = name.split(".")
            if parts[0] == "torch" and any(p == "experimental" or (p.startswith("_") and p != "__version__") for p in parts):
                found.append(name)
    return found


def test_no_other_module_touches_what_torch_keeps_private() -> None:
    sources = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    own = private_uses(sources.pop("torch_internals.py"))
    assert not {name: uses for name, source in sources.items() if (uses := private_uses(source))}
    assert not own, "looked up by getattr and import_module, so that its absence is noticed where it is handled"
    code = "import torch._dynamo\nfrom torch.utils import _pytree\ntorch._C.f()\nfrom torch.fx.experimental import x\nt._base"
    seen = private_uses(code)
    assert seen == ["torch._dynamo", "torch.utils._pytree", "torch.fx.experimental.x", "_base", "torch._C.f", "torch._C"]


def test_the_fast_ways_are_taken_with_this_torch() -> None:
    assert torch_internals.fused_adam(False, CPU) is torch._fused_adam_
    assert torch_internals.fused_adam(True, CPU) is torch._fused_adamw_
    assert torch_internals.for_each("add_") is torch._foreach_add_
    assert torch_internals.for_each("lerp_") is torch._foreach_lerp_
    assert torch_internals.for_each("zero_") is torch._foreach_zero_
    linear = nn.Linear(2, 2)
    assert torch_internals.tensor_place(linear, "weight") is linear._parameters
    assert torch_internals.tensor_place(nn.BatchNorm1d(2), "running_mean")["running_mean"] is not None


def test_the_choice_is_made_on_the_cpu_while_networks_are_built_on_meta() -> None:
    torch_internals.for_each.cache_clear()
    with torch.device("meta"):
        assert torch_internals.for_each("lerp_") is torch._foreach_lerp_


# ---- Adam ----------------------------------------------------------------------------------------------------------
def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def gradients() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[10.0 ** (k % 3 - 1) * torch.randn(shape, generator=generator) for shape in SHAPES] for k in range(N_STEPS)]


def descend(optimizer: Optimizer, first: int, last: int) -> None:
    optimizer.start_schedule(N_STEPS, first)
    for some in gradients()[first:last]:
        optimizer.step([one.clone() for one in some])


def close(a: Optimizer, b: Optimizer) -> None:
    """float32 has 1.2e-7 of a number of size 1."""
    for mine, other in zip(a.parameters, b.parameters, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.0, atol=5e-7)
    ours, theirs = optimizer_tensors(a, "o"), optimizer_tensors(b, "o")
    assert list(ours) == list(theirs) and "o.0.step" in ours
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=0.0 if name.endswith("step") else 1e-6, msg=name)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("how", REPLACEMENTS)
def test_adam_without_the_fused_kernel(how: str, kind: str, switch: Switch) -> None:
    fast, slow = (Optimizer(parameters(), 3e-2, **SETTINGS[kind]) for _ in range(2))
    descend(fast, 0, N_STEPS)
    switch(False, how)
    assert torch_internals.fused_adam("weight_decay" in SETTINGS[kind], CPU) is None
    descend(slow, 0, N_STEPS)
    close(slow, fast)
    assert float(slow.state[slow.parameters[-1]]["step"]) == N_STEPS


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("fast_first", [True, False])
def test_optimizer_state_is_exchanged(kind: str, fast_first: bool, switch: Switch) -> None:
    """Stepped one way, saved, loaded and continued the other way; and both ways in turns on one optimiser."""
    whole = Optimizer(parameters(), 3e-2, **SETTINGS[kind])
    descend(whole, 0, N_STEPS)
    first, turns = (Optimizer(parameters(), 3e-2, **SETTINGS[kind]) for _ in range(2))
    switch(fast_first)
    descend(first, 0, 7)
    descend(turns, 0, 5)
    switch(not fast_first)
    second = Optimizer([p.detach().clone().requires_grad_() for p in first.parameters], 3e-2, **SETTINGS[kind])
    load_optimizer(second, {name: tensor.clone() for name, tensor in optimizer_tensors(first, "o").items()}, "o")
    descend(second, 7, N_STEPS)
    close(second, whole)
    descend(turns, 5, 9)
    switch(fast_first)
    descend(turns, 9, N_STEPS)
    close(turns, whole)


def test_steps_are_counted_after_the_state_was_replaced() -> None:
    """All counts share one memory, which is found out anew when others take their place."""
    optimizer = Optimizer(parameters(), 3e-2)
    descend(optimizer, 0, 3)
    optimizer.state.clear()
    descend(optimizer, 3, 5)
    copied = copy.deepcopy(optimizer)
    descend(copied, 5, 9)
    last = copied.state[copied.parameters[-1]]
    last["step"] = last["step"].clone()
    descend(copied, 9, 10)
    assert [float(state["step"]) for state in optimizer.state.values()] == [2.0] * len(SHAPES)
    assert [float(state["step"]) for state in copied.state.values()] == [7.0] * len(SHAPES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_cuda_graph_can_hold_the_step_of_torch_optim(kind: str, switch: Switch) -> None:
    fast, slow = (Optimizer([p.detach().cuda().requires_grad_() for p in parameters()], 3e-2, **SETTINGS[kind]) for _ in "ab")
    steps = [[one.cuda() for one in some] for some in gradients()]
    fast.start_schedule(N_STEPS)
    for some in steps:
        fast.step([one.clone() for one in some])
    switch(False)
    slow.start_schedule(N_STEPS)
    given = [one.clone() for one in steps[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slow.step([one.clone() for one in given])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slow.step([one.clone() for one in given])
    for some in steps[1:]:
        for place, one in zip(given, some, strict=True):
            place.copy_(one)
        graph.replay()
    close(slow, fast)


# ---- lists of tensors ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", REPLACEMENTS)
def test_lists_of_tensors_without_the_foreach_functions(how: str, switch: Switch) -> None:
    def results() -> list[Tensor]:
        with torch.no_grad():
            tensors, others = [p.detach() for p in parameters()], gradients()[0]
            zeros = [one.clone() for one in others]
            torch_internals.for_each("add_")(tensors, others)
            torch_internals.for_each("lerp_")(tensors, gradients()[1], 0.3)
            torch_internals.for_each("zero_")(zeros)
            return [*tensors, *zeros]

    fast = results()
    switch(False, how)
    assert torch_internals.for_each("zero_") is not getattr(torch, "_foreach_zero_", None)
    slow = results()
    torch.testing.assert_close(slow, fast, rtol=1e-6, atol=1e-7)
    assert not any(tensor.any() for tensor in slow[len(SHAPES) :]) and not torch.equal(slow[0], parameters()[0])


# ---- whole agents --------------------------------------------------------------------------------------------------
def agree(a: Agent, b: Agent, rtol: float = 1e-4) -> None:
    for network, state in b.get_parameters().items():
        for key, value in state.items():
            found = a.get_parameters()[network][key]
            torch.testing.assert_close(found, value, rtol=0, atol=rtol * float(value.abs().max()), msg=f"{network}.{key}")
    np.testing.assert_allclose(a.predict(OBS, deterministic=True)[0], b.predict(OBS, deterministic=True)[0], atol=1e-4)


@pytest.mark.parametrize("name", ["TD3BC", "SRPO", "DiffusionQL"])  # Adam; AdamW and a cosine; clipped gradients
def test_training_saving_resuming_and_acting(name: str, switch: Switch, tmp_path: Path) -> None:
    """Without the kernels; and a run stopped in its last stage, saved by either way, is finished by the other."""
    stop = STEPS * len(small(name).STAGE_SHARES) - 5

    def run(path: Path) -> Agent:
        stopped = small(name).learn(DATA, callback=lambda local, _: local["self"].num_timesteps < stop)
        stopped.save(path)
        return small(name).learn(DATA)

    def finish(path: Path) -> Agent:
        agent = load(path, verbose=0)
        assert agent.num_timesteps == stop
        return agent.learn(DATA, reset_num_timesteps=False)

    fast = run(tmp_path / "fast.zip")
    switch(False)
    slow = run(tmp_path / "slow.zip")
    agree(slow, fast)
    agree(finish(tmp_path / "fast.zip"), fast)
    switch(True)
    agree(finish(tmp_path / "slow.zip"), fast)
    with zipfile.ZipFile(tmp_path / "fast.zip") as a, zipfile.ZipFile(tmp_path / "slow.zip") as b:
        files = [safetensors.torch.load(file.read("optimizer.safetensors")) for file in (a, b)]
    kinds = [{key: (tensor.shape, tensor.dtype) for key, tensor in file.items()} for file in files]
    assert kinds[0] == kinds[1] and any(key.endswith(".exp_avg_sq") for key in kinds[0])


def quick(name: str, **knobs: Any) -> Agent:
    return small(name, **{"n_diffusion_steps": 2} if name == "DiffusionQL" else {}, **knobs)


@pytest.mark.parametrize(
    ("module", "part"),
    [("torch._inductor", "compile"), ("torch.fx.experimental.proxy_tensor", "make_fx")],
)
def test_compiling_falls_back_with_a_warning(module: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules[module], part)
    with pytest.warns(UserWarning, match="compiling failed") as caught:
        run = quick("TD3BC", compile="compiled").learn(DATA)
    texts = {str(one.message) for one in caught if "compiling failed" in str(one.message)}
    (text,) = texts
    says = f"compiling failed, so this runs eagerly (RuntimeError: torch {torch.__version__} has no {module}.{part} ("
    assert text.startswith(says)
    whole = quick("TD3BC", compile="eager").learn(DATA)
    agree(run, whole, rtol=0.0)
    with pytest.warns(UserWarning, match="compiling failed, so this runs eagerly"):
        run.compile_policy(n_obs=6)
    agree(run, whole, rtol=0.0)


# ---- export --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("module", "part"),
    [("torch._decomp", "decomposition_table"), ("torch.fx.experimental.proxy_tensor", "make_fx")],
)
def test_export_says_what_it_lacks(module: str, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is written; and an algorithm that takes no gradients while it acts is exported without these parts."""
    agent, other = small("QGPO").learn(DATA), small("TD3BC").learn(DATA)
    says = (
        f"torch {torch.__version__} has no {module}.{part} (",
        "), without which an algorithm that takes gradients while it acts cannot be exported: "
        "install another version of torch that diffagents allows",
    )
    with monkeypatch.context() as patch:
        patch.delattr(sys.modules[module], part)
        with pytest.raises(RuntimeError) as error:
            export(agent, tmp_path / "qgpo", "torch_export")
    assert str(error.value).startswith(says[0]) and str(error.value).endswith(says[1])

    def none(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch_internals, "_lookup", none)  # torch.export itself has use for them
    path = export(other, tmp_path / "td3bc", "torch_export")
    assert list(tmp_path.iterdir()) == [path]
    policy = torch.export.load(path).module()
    np.testing.assert_allclose(policy(torch.from_numpy(OBS)).detach(), other.predict(OBS, deterministic=True)[0], atol=1e-5)


# ---- modules -------------------------------------------------------------------------------------------------------
def test_a_tensor_is_found_where_modules_keep_it_otherwise() -> None:
    """As if a later nn.Module had neither `_parameters` nor `_buffers`."""
    module: Any = types.SimpleNamespace(weight=torch.ones(2))
    place = torch_internals.tensor_place(module, "weight")
    assert place["weight"] is module.weight and "weight" in list(place)
    module.weight = torch.zeros(2)
    assert place["weight"] is module.weight, "the present tensor"


def test_numpy_acts_where_modules_keep_tensors_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = small("TD3BC").learn(DATA)
    wanted = agent.predict(OBS[0], deterministic=True)[0]
    policy = agent.point_policy(True)
    assert policy is not None and agent.spec is not None
    monkeypatch.setattr(numpy_policy, "tensor_place", lambda module, _: torch_internals._Attributes(module))
    quick = numpy_policy.NumpyPolicy(agent.obs_normalizer, policy, agent.spec)
    assert quick.current(policy, agent.obs_normalizer)
    np.testing.assert_array_equal(quick(OBS[0]), wanted)
    last = [layer for layer in policy.net if isinstance(layer, nn.Linear)][-1]
    last.weight = nn.Parameter(last.weight.detach() + 1.0)
    assert not quick.current(policy, agent.obs_normalizer), "a new tensor in the place of an old one is noticed"
