"""Compiled updates and policies: the traced program is the eager one, reads everything live, and falls back where it must."""

import logging
import os
import pathlib
import shutil
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import NAMES, STEPS, shallow, small
from torch.utils import _pytree as pytree
from toy import line_data

import diffagents
from diffagents import load_dataset
from diffagents.agent import Agent
from diffagents.data.sampler import Sampler
from diffagents.training import offline
from diffagents.training.compiled import Compiled, gradient_program
from diffagents.training.plan import Plan
from diffagents.training.updates import Stage, Update

logging.getLogger("torch.__trace").setLevel(logging.INFO)  # pytest would record its thousands of lines, which takes time
DATA = line_data()
OBS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
# A C++ compiler takes a second a kernel.
TINY: dict[str, Any] = {"n_diffusion_steps": 1, "policy_kwargs": {"net_arch": [8]}}
TINY_SRPO: dict[str, Any] = {"policy_kwargs": {"net_arch": [8], "behavior_width": 8, "behavior_blocks": 1}}
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")
compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
    reason="no C++ compiler: nothing can be compiled on this machine's CPU",
)


# In torch 2.8 (no longer in 2.13), tracing changes how some gradients are rounded, by 4e-7 of their size. Adam takes full steps
# even where a gradient is 0 but for its rounding, as that of the last bias of QGPO's energy is, so that whole runs differ more.
WHOLE_RUN = 1e-5 if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13) else 5e-3


def states_agree(a: Agent, b: Agent, rtol: float = 1e-5) -> None:
    """Every network, relative to its tensor's size; 0 is to the bit."""
    for network, state in b.get_parameters().items():
        for key, value in state.items():
            found = a.get_parameters()[network][key]
            torch.testing.assert_close(found, value, rtol=0, atol=rtol * float(value.abs().max()), msg=f"{network}.{key}")


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """All of `compile="compiled"` but the code generator: the traced graphs run as they are, and are kept in this list."""
    import torch._inductor

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", keep)
    return graphs


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compiling raises; how often it was tried."""
    import torch._inductor

    tried: list[int] = []

    def fail(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    return tried


# ---- the traced program --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained() -> dict[str, Agent]:
    return {}


def eager(name: str, trained: dict[str, Agent]) -> Agent:
    """Trained once for this file, which copies it."""
    if name not in trained:
        trained[name] = shallow(name, compile="eager").learn(DATA)
    return trained[name]


def samplers(agent: Agent) -> Iterator[tuple[Stage, Sampler]]:
    """Every stage, and what it samples from."""
    assert agent.reward_transform is not None
    data = load_dataset(DATA, verbose=0).sampler("cpu", agent.reward_transform, agent.obs_normalizer)
    for stage in agent.stages():
        yield stage, data if stage.prepare is None else stage.prepare(data, offline.stage_generator(agent, stage))


@pytest.mark.parametrize("name", NAMES)
def test_the_traced_program_is_the_eager_one_and_nothing_is_baked_in(name: str, trained: dict[str, Agent]) -> None:
    """Every part of every stage, on real batches; and again after all networks moved in place, on another batch."""
    agent = eager(name, trained).clone()
    random, n_parts = torch.Generator().manual_seed(0), 0
    pointers = {t.data_ptr() for network in agent.networks().values() for t in (*network.parameters(), *network.buffers())}
    for stage, sampler in samplers(agent):
        for update in stage.updates:
            if update.loss is None:
                continue
            n_parts += 1
            tensors, program = gradient_program(update, agent.networks())
            args = [(sampler.sample(stage.batch_size, random), update.draw(stage.batch_size, random)) for _ in range(2)]
            graph, inputs = Compiled(tensors, program, update.gradients).trace(args[0])
            constants = {getattr(graph, str(node.target)).data_ptr() for node in graph.graph.nodes if node.op == "get_attr"}
            assert not constants & pointers, "a network's tensor is no input: generated code may keep its value"
            before = agrees(graph, inputs, update, args[0])
            for batch, noise in args:
                update.step(batch, noise)
            with torch.no_grad():
                for network in agent.networks().values():
                    for parameter in network.parameters():
                        parameter.mul_(1.1).add_(0.01)
                    for buffer in network.buffers():
                        buffer.mul_(0.99)
            moved = agrees(graph, inputs, update, args[0])
            assert not torch.allclose(before, moved, rtol=1e-3), "the same gradient: nothing would be seen"
            agrees(graph, [*inputs[: len(tensors)], *pytree.tree_leaves(args[1])], update, args[1])
    assert n_parts == {"BC": 1, "DiffusionBC": 1, "AWR": 2, "QGPO": 3, "SfBC": 3, "IDQL": 3, "IQL": 3, "BDPO": 5}.get(name, 4)


def agrees(graph: Any, inputs: list[torch.Tensor], update: Any, args: Any) -> torch.Tensor:
    """Graph and `Update.gradients` give the same gradients and metrics; all of these in a row."""
    expected = pytree.tree_leaves(update.gradients(*args))
    with torch.no_grad():
        found = graph(*inputs)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()) + 1e-7)
    assert all(a.is_contiguous() for a in found[: sum(len(o.parameters) for o in update.optimizers)]), "as parameters are"
    return torch.cat([b.flatten() for b in expected])


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_run_is_an_eager_run(name: str, traced_only: list[Any], trained: dict[str, Agent]) -> None:
    """Whole runs, with every second step's parts, schedules and lagged copies; the code generator has tests of its own."""
    whole, run = eager(name, trained), shallow(name, compile="compiled").learn(DATA)
    states_agree(run, whole, WHOLE_RUN)
    assert run.plan is not None and set(run.plan.modes.values()) == {"compiled"}
    updates = {id(update.loss.__func__) for stage in run.stages() for update in stage.updates if update.loss}  # type: ignore[attr-defined]
    assert len(traced_only) >= len(updates)
    for ours, theirs in zip(run.history, whole.history, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value), key
    for ours, theirs in zip(run.optimizers.values(), whole.optimizers.values(), strict=True):
        assert torch.equal(ours.lr, theirs.lr) and torch.equal(ours.n_steps, theirs.n_steps)


# ---- with the code generator ---------------------------------------------------------------------------------------
@compiler
def test_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy stage of few kernels, and acting: what the traced graph is handed over to, and what comes back."""
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)  # trying out vector instructions takes seconds
    base = small("AWR", compile="eager", policy_kwargs={"net_arch": [8]}).learn(DATA)
    runs = [base.clone(fresh=("policy",)) for _ in range(2)]
    for run, mode in zip(runs, ("eager", "compiled"), strict=True):
        run.compile = mode
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="compiling failed")
            run.learn(DATA, stages=("policy",))
    assert runs[1].plan is not None and runs[1].plan.modes == {"policy": "compiled"}
    states_agree(runs[1], runs[0])
    runs[1].compile_policy(2, deterministic=True)
    assert not any(one.failed for one in runs[1]._compiled.values())
    acts = [run.predict(OBS[:2], deterministic=True)[0] for run in runs]
    np.testing.assert_allclose(*acts, atol=1e-5)


@compiler
@pytest.mark.slow
def test_inductor_srpo_policy() -> None:
    """The policy stage, its cosine included; and then acting."""
    base = small("SRPO", compile="eager", **TINY_SRPO).learn(DATA)
    runs = [base.clone(fresh=("policy",)) for _ in range(2)]
    for run, mode in zip(runs, ("eager", "compiled"), strict=True):
        run.compile = mode
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="compiling failed")
            run.learn(DATA, stages=("policy",))
    assert runs[1].plan is not None and runs[1].plan.modes == {"policy": "compiled"}
    states_agree(runs[1], runs[0])
    assert float(runs[1].optimizers["policy"].n_steps) == STEPS
    runs[1].compile_policy(2, deterministic=True)
    assert not any(one.failed for one in runs[1]._compiled.values())
    acts = [run.predict(OBS[:2], deterministic=True)[0] for run in runs]
    np.testing.assert_allclose(*acts, atol=1e-5)


@pytest.fixture(scope="module")
def diffusion_ql() -> list[Agent]:
    """Eager and compiled, with the code generator."""
    runs = [small("DiffusionQL", compile=mode, **TINY) for mode in ("eager", "compiled")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="action bounds")
        warnings.filterwarnings("error", message="compiling failed")
        return [run.learn(DATA) for run in runs]


@compiler
@pytest.mark.slow
def test_inductor_diffusion_ql(diffusion_ql: list[Agent]) -> None:
    run, compiled = diffusion_ql
    assert compiled.plan is not None and compiled.plan.modes == {"train": "compiled"}
    states_agree(compiled, run)
    pairs = zip(run.networks()["policy"].parameters(), run.networks()["policy_ema"].parameters(), strict=True)
    moved = [float((p - q).detach().abs().max()) for p, q in pairs]
    assert max(moved) > 1e-4, "the lagged copy lags, else its period would not be seen"


@compiler
@pytest.mark.slow
def test_inductor_acts(diffusion_ql: list[Agent]) -> None:
    run, other = (agent.clone() for agent in diffusion_ql)
    compiled = other.compile_policy(2, deterministic=False)
    compiled.predict_generator.set_state(run.predict_generator.get_state())
    for _ in range(2):
        np.testing.assert_allclose(compiled.predict(OBS[:2])[0], run.predict(OBS[:2])[0], atol=1e-5)
    assert not any(one.failed for one in compiled._compiled.values())


@compiler
@pytest.mark.slow
def test_inductor_srpo_whole(trained: dict[str, Agent]) -> None:
    run = shallow("SRPO", compile="compiled").learn(DATA)
    assert run.plan is not None and set(run.plan.modes.values()) == {"compiled"}
    states_agree(run, eager("SRPO", trained))


@compiler
@pytest.mark.slow
def test_inductor_many_srpo_policies(trained: dict[str, Agent]) -> None:
    base = eager("SRPO", trained)
    together, alone = ([base.clone(fresh=("policy",), beta=b) for b in (0.05, 0.3)] for _ in range(2))
    together[0].compile = "compiled"
    diffagents.learn_many(together, DATA, stages=("policy",))
    for a, b in zip(together, alone, strict=True):
        states_agree(a, b.learn(DATA, stages=("policy",)))


# ---- falling back --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "n_parts"), [("SRPO", 4), ("DiffusionQL", 4)])
def test_without_a_compiler_it_runs_eagerly(name: str, n_parts: int, no_compiler: list[int], trained: dict[str, Agent]) -> None:
    """One warning for each part, which is tried once; equal to the bit; the plan tells."""
    with pytest.warns(UserWarning, match="compiling failed") as caught:
        run = shallow(name, compile="compiled").learn(DATA)
    said = [str(one.message) for one in caught if "compiling failed" in str(one.message)]
    assert said == ["compiling failed, so this runs eagerly (RuntimeError: no C++ compiler was found)"] * n_parts
    assert len(no_compiler) == n_parts
    assert run.plan is not None and set(run.plan.modes.values()) == {"eager"}
    states_agree(run, eager(name, trained), rtol=0)
    assert run.history == eager(name, trained).history


def test_graphs_need_a_gpu(traced_only: list[Any], trained: dict[str, Agent]) -> None:
    with pytest.warns(UserWarning, match='compile="graph" needs a CUDA device: training runs compiled'):
        run = shallow("TD3BC", compile="graph").learn(DATA)
    assert run.plan is not None and run.plan.modes == {"train": "compiled"} and len(traced_only) == 4
    states_agree(run, eager("TD3BC", trained))


def test_bad_modes(trained: dict[str, Agent], tmp_path: pathlib.Path) -> None:
    says = "compile='nonsense'; choose from 'auto', 'eager', 'compiled', 'graph'"
    with pytest.raises(ValueError, match=says):
        small("TD3BC", compile="nonsense")
    path = eager("TD3BC", trained).save(tmp_path / "a")
    with pytest.raises(ValueError, match=says):
        diffagents.load(path, compile="nonsense")
    with pytest.raises(ValueError, match=r"modes \['nonsense'\] are not among"):
        Plan.from_json({"lengths": {"a": 3}, "done": {}, "modes": {"a": "nonsense"}}, ["a"])
    with pytest.raises(ValueError, match="steps, modes or threads of a stage that it does not have"):
        Plan.from_json({"lengths": {"a": 3}, "done": {}, "modes": {"b": "eager"}}, ["a", "b"])


# ---- which mode, and keeping it ------------------------------------------------------------------------------------
def stand_in(compile: str, device: str = "cpu", n_updates: int = 1) -> Any:
    """An agent with two stages, "short" and "long", of some updates each, and one that only follows other networks."""
    updates = (*[Update(loss=lambda batch, noise: (OBS, {}))] * n_updates, Update())
    stages = [Stage(name, 16, updates) for name in ("short", "long", "critic")]
    return types.SimpleNamespace(compile=compile, device=torch.device(device), stages=lambda plan: stages)


@pytest.mark.parametrize("n_updates", [1, 2])
@pytest.mark.parametrize(("device", "mode"), [("cpu", "compiled"), ("cuda", "graph")])
def test_auto_compiles_what_ends_sooner_compiling_included(device: str, mode: str, n_updates: int) -> None:
    plan, (compile_seconds, share) = Plan({"short": 10, "long": 10, "critic": 5}), offline.COMPILING[device]
    tie = n_updates * compile_seconds / (1 - share)
    offline.choose_modes(stand_in("auto", device, n_updates), plan, {"short": 0.99 * tie, "long": 1.01 * tie})
    assert plan.modes == {"short": "eager", "long": mode, "critic": "eager"}


def test_what_has_begun_goes_on_as_it_began() -> None:
    plan = Plan({"short": 10})
    offline.choose_modes(stand_in("auto"), plan, {})
    assert plan.modes == {"short": "eager"}
    plan.done["short"] = 3
    offline.choose_modes(stand_in("compiled"), plan, {})
    assert plan.modes == {"short": "eager"}
    run = small("SRPO").learn(DATA)
    assert run.compile == "auto" and run.plan is not None
    assert run.plan.modes == dict.fromkeys(("critic", "behavior", "policy"), "eager")


def test_auto_compiles_a_long_run(traced_only: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `learn` estimates is what decides."""
    monkeypatch.setattr(offline, "estimate", lambda *_, **__: {"critic": 0.0, "policy": 1e4})
    monkeypatch.setattr(offline, "estimate_compiling", lambda *_: {})
    run = small("SRPO").learn(DATA)
    assert run.plan is not None
    assert run.plan.modes == {"critic": "eager", "behavior": "eager", "policy": "compiled"} and len(traced_only) == 1


@pytest.mark.parametrize(("began", "then"), [("eager", "compiled"), ("compiled", "eager")])
def test_a_stage_goes_on_as_it_began(
    began: str, then: str, traced_only: list[Any], trained: dict[str, Agent], tmp_path: pathlib.Path
) -> None:
    """Saved in the middle and loaded with another `compile`: bit for bit as uninterrupted."""
    whole = small("TD3BC", compile=began).learn(DATA)
    run = small("TD3BC", compile=began).learn(DATA, callback=lambda local, _: local["self"].num_timesteps < 5)
    run = diffagents.load(run.save(tmp_path / "a"), compile=then, verbose=0)
    assert run.plan is not None and run.plan.modes == {"train": began} and run.plan.done == {"train": 5}
    traced_only.clear()
    run.learn(DATA, reset_num_timesteps=False)
    assert run.plan.modes == {"train": began} and len(traced_only) == (0 if began == "eager" else 2)
    states_agree(run, whole, rtol=0)


def test_a_stage_that_has_not_begun_runs_as_compile_says(traced_only: list[Any], tmp_path: pathlib.Path) -> None:
    run = small("SRPO", compile="eager").learn(DATA, callback=lambda local, _: local["self"].num_timesteps < 5)
    run = diffagents.load(run.save(tmp_path / "a"), compile="compiled", verbose=0).learn(DATA, reset_num_timesteps=False)
    assert run.plan is not None and run.plan.modes == {"behavior": "eager", "critic": "compiled", "policy": "compiled"}


def test_load_takes_compile_and_tf32(trained: dict[str, Agent], tmp_path: pathlib.Path) -> None:
    path = eager("TD3BC", trained).save(tmp_path / "a")
    plain, other = diffagents.load(path), diffagents.load(path, compile="compiled", tf32=False)
    assert (plain.compile, plain.tf32) == ("auto", True) and (other.compile, other.tf32) == ("compiled", False)


def test_a_clone_keeps_compile_and_tf32() -> None:
    agent = small("TD3BC", env="Pendulum-v1", compile="eager", tf32=False)
    assert (agent.clone().compile, agent.clone().tf32) == ("eager", False)
    assert agent.clone(compile="compiled", tf32=True).compile == "compiled"


def test_a_graph_s_run_goes_on_without_one_where_there_is_no_gpu() -> None:
    plan = Plan({"critic": 10}, {"critic": 5}, {"critic": "graph"})
    with pytest.warns(UserWarning, match="needs a CUDA device"):
        offline.choose_modes(stand_in("auto"), plan, {})
    assert plan.modes == {"critic": "compiled"}
