"""learn_many: every member ends where its single run would, is an ordinary agent, and fails or stops for itself."""

import itertools
import pathlib
import signal
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import NAMES, STEPS, fields, shallow, small
from toy import line_data

import diffagents
from diffagents import learn_many
from diffagents.agent import Agent
from diffagents.errors import TrainingDiverged
from diffagents.experiments import learn_many as learn_many_module

DATA = line_data()
OBS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")
# Its gradient is a difference that is zero but for rounding (the same bias on all of a state's actions), and Adam makes
# steps of full size of that.
ROUNDING = {("QGPO", "energy.net.4.bias")}


def varied(name: str, k: int) -> dict[str, Any]:
    """Every knob that is a number and no size, another for each member k."""
    knobs: dict[str, Any] = {}
    for knob, value in fields(name).items():
        if not isinstance(value, float):
            continue
        if knob == "expectile":
            knobs[knob] = value + 0.08 * k
        elif knob in ("gamma", "td_lambda"):
            knobs[knob] = value - 0.04 * k
        elif knob in ("tau", "ema_tau"):
            knobs[knob] = 0.05 * (k + 1)
        elif knob == "lambda_min":
            knobs[knob] = 0.1 * k
        else:
            knobs[knob] = value * (1.0 + 0.3 * k)
    return knobs


def members(name: str, n: int = 3, vary: bool = False, **knobs: Any) -> list[Agent]:
    return [small(name, seed=k, compile="eager", **{**(varied(name, k) if vary else {}), **knobs}) for k in range(n)]


def same_networks(a: Agent, b: Agent, rtol: float = 1e-5) -> None:
    """Relative to each tensor's size, and to how far training may have moved an element; 0 is to the bit.

    Adam moves an element by about its learning rate at every step, however small the gradient. Where a gradient nearly
    cancels, its rounding errors, which are others for many members at once than for one, decide on a part of that step.
    A thousandth of the longest way is allowed for it: a learning rate that is 1 % off leaves ten times as much.
    """
    longest = max(optimizer.learning_rate for optimizer in b.optimizers.values()) * max(b.stage_steps.values())
    for network, state in b.get_parameters().items():
        for key, value in state.items():
            name = f"{network}.{key}"
            if (type(a).__name__, name) in ROUNDING:
                continue
            actual, atol = a.get_parameters()[network][key], rtol * float(value.abs().max()) + 100 * rtol * longest
            torch.testing.assert_close(actual, value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def same(a: Agent, b: Agent, rtol: float = 1e-5, leave_out: tuple[str, ...] = ()) -> None:
    """Networks, history (but for some metrics), counters, schedules and the state of the generator."""
    same_networks(a, b, rtol)
    assert len(a.history) == len(b.history)
    for ours, theirs in zip(a.history, b.history, strict=True):
        assert ours.keys() == theirs.keys()
        for key, number in theirs.items():
            expected = pytest.approx(number, rel=1e-3, abs=1e-4) if rtol and isinstance(number, float) else number
            assert key in leave_out or ours[key] == expected, (theirs["stage"], theirs["stage_step"], key)
    counts = [(one.num_timesteps, one.n_updates, one.stage_steps, one.plan) for one in (a, b)]
    assert counts[0] == counts[1]
    for one, two in zip(a.optimizers.values(), b.optimizers.values(), strict=True):
        if "schedules" not in leave_out:
            torch.testing.assert_close(one.lr, two.lr, rtol=1e-6, atol=1e-9)
            assert not one.cosine or torch.equal(one.n_steps, two.n_steps)
    assert torch.equal(a.generator.get_state(), b.generator.get_state())


@pytest.mark.parametrize(("name", "vary"), [(name, True) for name in NAMES] + [("SRPO", False), ("DiffusionQL", False)])
def test_each_member_ends_as_its_single_run(name: str, vary: bool) -> None:
    gamma = {"gamma": 0.99} if name == "BDPO" else {}  # has a test of its own
    n = 3 if name in ("SRPO", "DiffusionQL") else 2
    given: dict[str, Any] = {"vary": vary, "preset": None if vary else "fast", **gamma}  # varied around the plain values
    together = members(name, n, **given)
    assert learn_many(together, DATA) == together
    alone = [agent.learn(DATA) for agent in members(name, n, **given)]
    for a, b in zip(together, alone, strict=True):
        same(a, b, leave_out=("q",) if name == "SfBC" else ())  # has a test of its own
    for a, b in itertools.pairwise(alone):
        assert not torch.allclose(*(torch.cat([p.flatten() for p in weights(one)]) for one in (a, b))), "all the same"


def another_learning_rate(agent: Any) -> None:
    agent.optimizers["behavior"].lr.mul_(1.01)


def another_batch(agent: Any) -> None:
    """One random number more before the second update."""
    torch.rand(1, generator=agent.generator)


def another_noise(agent: Any) -> None:
    draw, agent.draw_behavior = agent.draw_behavior, lambda n, generator: {k: 1.01 * v for k, v in draw(n, generator).items()}


@pytest.mark.parametrize("change", [another_learning_rate, another_batch, another_noise])
def test_the_comparison_sees_one_percent(change: Any) -> None:
    """What a member gets wrong is seen after the run: noise or a learning rate 1 % too large, other rows in the batches."""
    plain, changed = (small("QGPO", preset=None) for _ in range(2))  # a learning rate that stays

    def once(local: dict[str, Any], _: Any) -> bool:
        if local["self"].num_timesteps == 1:
            change(local["self"])
        return True

    plain.learn(DATA, stages=("behavior",))
    if change is another_noise:  # which the run looks up when it begins
        change(changed)
    changed.learn(DATA, stages=("behavior",), callback=None if change is another_noise else once)
    with pytest.raises(AssertionError, match=r"behavior\."):
        same_networks(changed, plain)


def test_sfbc_metric_q_is_each_members_own() -> None:
    together, alone = learn_many(members("SfBC", vary=True), DATA), members("SfBC", vary=True)
    for a, b in zip(together, alone, strict=True):
        same(a, b.learn(DATA))


def test_bdpo_with_several_gammas() -> None:
    together, alone = ([small("BDPO", gamma=g) for g in (0.99, 0.9)] for _ in range(2))
    learn_many(together, DATA)
    for a, b in zip(together, alone, strict=True):
        same(a, b.learn(DATA))


def weights(agent: Agent) -> list[torch.Tensor]:
    return [p.detach() for network in agent.networks().values() for p in network.parameters()]


@pytest.mark.parametrize("name", ["SRPO", "DiffCPS", "SfBC"])
def test_members_are_ordinary_agents_afterwards(name: str, tmp_path: pathlib.Path) -> None:
    """Tensors of their own, files, and learning alone."""
    together = learn_many(members(name, 2), DATA)
    owned = [storages(agent) for agent in together]
    assert not owned[0] & owned[1] and all(len(own) > 5 for own in owned)
    for agent in together:
        for tensor in agent.networks()[agent.MODEL[0]].state_dict().values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), "a view of all members"
    before = [tensor.clone() for tensor in weights(together[1])]
    with torch.no_grad():
        for tensor in weights(together[0]):
            tensor.add_(1.0)
    assert all(map(torch.equal, before, weights(together[1])))
    agent = together[1]
    loaded = diffagents.load(agent.save(tmp_path / "a"), verbose=0, compile="eager")
    for deterministic in (True, False):
        acts = [one.predict(OBS, deterministic=deterministic)[0] for one in (agent, loaded)]
        assert np.array_equal(*acts)
    for one in (agent, loaded):
        one.learn(DATA, total_timesteps=9, reset_num_timesteps=False)
    same(agent, loaded, rtol=0)


def storages(agent: Agent) -> set[int]:
    """Where the tensors are that are the agent's state: networks, moments, learning rates."""
    found = {tensor.untyped_storage().data_ptr() for n in agent.networks().values() for tensor in n.state_dict().values()}
    for optimizer in agent.optimizers.values():
        states = optimizer.state.values()
        found |= {value.untyped_storage().data_ptr() for state in states for value in state.values()}
        found |= {optimizer.lr.untyped_storage().data_ptr(), optimizer.n_steps.untyped_storage().data_ptr()}
    return found


def test_going_on_alone_is_going_on_as_the_single_run() -> None:
    together, alone = learn_many(members("IQL", 2), DATA), [agent.learn(DATA) for agent in members("IQL", 2)]
    for a, b in zip(together, alone, strict=True):
        a.learn(DATA)
        b.learn(DATA)
        same(a, b)


def test_some_stages_and_again() -> None:
    """Stages one after the other in calls of their own, on members that are equally far; total_timesteps; log_interval."""
    together, alone = members("SRPO", 2), members("SRPO", 2)
    for stages in (("critic", "behavior"), ("policy",)):
        learn_many(together, DATA, 7 * len(stages), 3, stages=stages)
        for a, b in zip(together, alone, strict=True):
            same(a, b.learn(DATA, 7 * len(stages), log_interval=3, stages=stages))
    assert [row["stage_step"] for row in together[0].history] == [3, 6, 7]


def test_every_member_has_its_schedule() -> None:
    together = learn_many(members("SRPO", vary=True), DATA, stages=("critic", "behavior", "policy"))
    share = 0.5 * (1 + np.cos(np.pi * (STEPS - 1) / STEPS))
    for k, agent in enumerate(together):
        policy = agent.optimizers["policy"]
        assert float(policy.lr) == pytest.approx(3e-4 * (1.0 + 0.3 * k) * share, rel=1e-5) and float(policy.n_steps) == STEPS
        policy.step([torch.zeros_like(p) for p in policy.parameters])
        assert float(policy.lr) == 0.0
        assert float(agent.optimizers["critic"].lr) == pytest.approx(3e-4 * (1.0 + 0.3 * k))


# ---- refusals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: [], "learn_many needs at least one agent"),
        (lambda: [small("IQL"), small("AWR")], "trains agents of one class, not IQL and AWR"),
        (lambda: [small("IQL")] * 2, "the same agent is in the list twice: make one for each seed or setting"),
        (lambda: [small("IQL"), small("IQL", batch_size=8)], "the agents differ in batch_size: 16 and 8"),
        (lambda: [small("IQL"), small("IQL", reward_transform="none")], "differ in reward_transform: 'unit_returns'"),
        (lambda: [small("IQL"), small("IQL", deterministic_policy=True)], "differ in deterministic_policy: False and True"),
        (lambda: [small("DiffusionQL"), small("DiffusionQL", max_grad_norm=None)], "differ in max_grad_norm: 5.0 and None"),
        (lambda: [small("IQL"), small("IQL", policy_kwargs={"net_arch": [8]})], "differ in policy_kwargs: .*16, 16.* and .*8"),
        (lambda: [small("IQL"), small("IQL", preset="auto")], "the agents differ in preset: 'fast' and 'auto'"),
        (lambda: [small("IQL"), small("IQL", returns_share=0.2)], "the agents differ in returns_share: 0.4 and 0.2"),
        (lambda: [small("IQL"), small("IQL", return_temperature=0.2)], "the agents differ in return_temperature: 0.1 and 0.2"),
        (lambda: [small("IQL"), small("IQL", train_steps=5)], "the agents differ in train_steps: 12 and 5"),
        (lambda: [small("IQL", dropout=0.1), small("IQL", dropout=0.0)], "the agents differ in dropout: 0.1 and 0.0"),
        (lambda: [small("IQL", dropout=0.0), small("IQL", dropout=0.1)], "the agents differ in dropout: 0.0 and 0.1"),
        (lambda: [small("BDPO", gamma=0.9), small("BDPO", gamma=0.0)], "the agents differ in gamma"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_refused_before_any_work(make: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("work had begun")

    monkeypatch.setattr(learn_many_module, "load_dataset", load)
    with pytest.raises(ValueError, match=says) as caught:
        learn_many(make(), DATA)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("far", [0, 1], ids=["the first", "the second"])
def test_agents_that_are_not_equally_far_are_refused(far: int) -> None:
    """And left as they were: a dataset that was refused leaves no transform behind."""
    agents = members("IQL", 2)
    agents[far].learn(DATA)
    history, plan = agents[far].history, agents[far].plan
    with pytest.raises(ValueError, match="plans of different lengths"):
        learn_many(agents, DATA)
    assert agents[far].history == history and agents[far].plan is plan
    other = agents[1 - far]
    assert other.spec is None and other.reward_transform is None and other.plan is None


def test_a_bad_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a tuple of some of"):
        learn_many(members("IQL", 2), DATA, stages=("nothing",))
    with pytest.raises(ValueError, match="total_timesteps"):
        learn_many(members("IQL", 2), DATA, -1)


def test_whole_numbers_for_a_knob_that_is_a_number() -> None:
    """beta=1 is 1.0."""
    agents = [small("IQL", beta=1), small("IQL", beta=0.5)]
    same(learn_many(agents, DATA)[0], small("IQL", beta=1.0).learn(DATA))


# ---- diverging and stopping ----------------------------------------------------------------------------------------
def test_a_member_that_diverges_falls_back_alone() -> None:
    """A NaN in one: named at the end, its last good state kept; the others never notice, and it can go on."""
    together = members("TD3BC", preset=None)
    sick, steps, follow = together[1], itertools.count(1), together[1].follow_both  # type: ignore[attr-defined]

    def poison() -> None:
        follow()
        if next(steps) == 3:  # the third policy step is the sixth in all
            sick.critic.biases[0].data.fill_(float("nan"))  # type: ignore[attr-defined]

    sick.follow_both = poison  # type: ignore[attr-defined]
    with pytest.raises(TrainingDiverged, match=r"^member 1: train diverged between its steps 5 and 6 .* try a lower") as caught:
        learn_many(together, DATA)
    assert "member 0" not in str(caught.value) and "\n" not in str(caught.value)
    for k in (0, 2):
        same(together[k], members("TD3BC", preset=None)[k].learn(DATA))
    assert all(tensor.isfinite().all() for tensor in weights(sick))
    assert len(sick.history) == 5 and sick.num_timesteps == 5


def test_a_member_that_diverged_goes_on_from_its_last_good_state() -> None:
    """Where what broke it is gone, by its own `learn`, as its single run would."""
    together = members("TD3BC", preset=None)
    sick, steps, follow = together[1], itertools.count(1), together[1].follow_both  # type: ignore[attr-defined]

    def poison() -> None:
        follow()
        if next(steps) == 3:
            sick.critic.biases[0].data.fill_(float("nan"))  # type: ignore[attr-defined]

    sick.follow_both = poison  # type: ignore[attr-defined]
    with pytest.raises(TrainingDiverged):
        learn_many(together, DATA)
    del sick.follow_both  # type: ignore[attr-defined]
    assert sick.plan is not None and sick.plan.done == {"train": 5} and sick.stage_steps == {"train": 5}
    same(sick.learn(DATA, reset_num_timesteps=False), members("TD3BC", preset=None)[1].learn(DATA))


def test_a_learning_rate_that_is_far_too_large() -> None:
    """Every stage of it; the state is finite, and the message names the member and where."""
    settings = [{}, {"learning_rate": 1e6}, {"learning_rate": 1e-3}]
    together = [small("SRPO", seed=k, preset=None, **given) for k, given in enumerate(settings)]
    with pytest.raises(TrainingDiverged, match=r"^member 1: critic diverged") as caught:
        learn_many(together, DATA)
    assert "member 0" not in str(caught.value) and "member 2" not in str(caught.value)
    assert all(tensor.isfinite().all() for tensor in weights(together[1]))
    for k in (0, 2):
        same(together[k], small("SRPO", seed=k, preset=None, **settings[k]).learn(DATA))
    with pytest.raises(TrainingDiverged, match="critic diverged"):
        small("SRPO", seed=1, preset=None, learning_rate=1e6).learn(DATA)


@pytest.mark.parametrize(("name", "method", "at"), [("SRPO", "follow_critic", 5), ("BDPO", "follow_policy", 2)])
def test_ctrl_c_leaves_members_that_finish(name: str, method: str, at: int, tmp_path: pathlib.Path) -> None:
    """After the running update of all; each goes on by its own `learn`, from a file too."""
    together = members(name, 2)
    calls, follow = itertools.count(1), getattr(together[0], method)

    def press() -> None:
        follow()
        if next(calls) == at:
            signal.raise_signal(signal.SIGINT)

    setattr(together[0], method, press)
    with pytest.raises(KeyboardInterrupt):
        learn_many(together, DATA)
    delattr(together[0], method)
    done = [agent.num_timesteps for agent in together]
    assert done[0] == done[1] and 0 < done[0] < STEPS * len(together[0].STAGE_SHARES)
    loaded = diffagents.load(together[1].save(tmp_path / "a"), verbose=0)
    for run, alone in zip((together[0], loaded), members(name, 2), strict=True):
        leave_out = ("schedules",) if run is loaded else ()  # a file holds none of a stage that has ended: each starts its own
        same(run.learn(DATA, reset_num_timesteps=False), alone.learn(DATA), leave_out=leave_out)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- compiled ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["SRPO", "TD3BC", "AWR", "DiffCPS"])
def test_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traced program of all members; what generates its code has tests in test_compiling.py."""
    import torch._inductor

    graphs: list[Any] = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graphs.append(graph) or graph)
    together, alone = (
        [shallow(name, preset=None, seed=k, compile="eager", **varied(name, k)) for k in range(2)] for _ in range(2)
    )
    together[0].compile = "compiled"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compiling failed")
        learn_many(together, DATA)
    assert graphs and all(agent.plan is not None and set(agent.plan.modes.values()) == {"compiled"} for agent in together)
    for a, b in zip(together, alone, strict=True):
        b.learn(DATA)
        b.plan.modes = a.plan.modes  # type: ignore[union-attr]
        same(a, b)


def test_without_a_compiler_the_plans_say_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    together = without_a_compiler(monkeypatch)
    assert [agent.plan.modes for agent in together] == [{"train": "eager"}] * 2  # type: ignore[union-attr]


def test_without_a_compiler_results_are_those_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    for a, b in zip(without_a_compiler(monkeypatch), learn_many(members("TD3BC", 2, preset=None), DATA), strict=True):
        a.plan.modes = b.plan.modes  # type: ignore[union-attr]
        same(a, b, rtol=0)


def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> list[Agent]:
    """Two that were to be compiled; one warning a part."""
    import torch._inductor

    def fail(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    together = members("TD3BC", 2, preset=None)
    together[0].compile = "compiled"
    with pytest.warns(UserWarning, match="compiling failed") as caught:
        learn_many(together, DATA)
    assert len([one for one in caught if "compiling failed" in str(one.message)]) == 2
    return together


def test_who_is_lost_in_one_stage_is_not_trained_in_the_next() -> None:
    """A critic that diverged: the member is as it was at its last good look, and its own plan goes on from there."""
    agents = [small("SRPO", seed=seed, preset=None) for seed in range(2)]
    object.__setattr__(agents[1].config, "learning_rate", 1e12)
    with pytest.raises(TrainingDiverged, match=r"member 1: critic diverged"):
        learn_many(agents, DATA, log_interval=2)
    lost = agents[1]
    assert lost.plan is not None and lost.plan.done.get("critic", 0) < STEPS and "policy" not in lost.plan.done
    assert lost.stage_steps["behavior"] == lost.stage_steps["policy"] == 0
    assert all(value.isfinite().all() for state in lost.get_parameters().values() for value in state.values())
    same(agents[0], small("SRPO", seed=0, preset=None).learn(DATA, log_interval=2))


def test_agents_that_learned_from_other_data_first_are_refused() -> None:
    agents = [small("IQL", seed=seed, reward_transform="normalize") for seed in range(2)]
    agents[0].learn(DATA)
    agents[1].learn({**DATA, "rewards": 7.0 * DATA["rewards"] + 1.0})
    with pytest.raises(ValueError, match="transforms that they fitted"):
        learn_many(agents, DATA)
