"""Quick policies, one observation by numpy and `compile_policy`: equal to the plain path, and following all changes."""

import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import NAMES, shallow, small
from toy import line_data

import diffagents
from diffagents.agent import Agent
from diffagents.deploy.numpy_policy import MOST_ROWS
from diffagents.envs.vec_env import stub_env
from diffagents.types import Spec

DATA = line_data()
ROWS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
BOX = spaces.Box(-50.0, 50.0, (3,))
UNEQUAL = spaces.Box(np.array([-2.0, 0.5], np.float32), np.array([3.0, 0.75], np.float32))
GRID = Spec(spaces.Box(-9.0, 9.0, (3, 2)), spaces.Box(-4.0, 1.0, (2, 1), np.float64))
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {  # algorithm, deterministic, knobs
    "SRPO": ("SRPO", True, {}),
    "SRPO-random": ("SRPO", False, {}),
    "TD3BC": ("TD3BC", False, {}),
    "IQL": ("IQL", True, {}),
    "AWR": ("AWR", True, {}),
    "IQL-point": ("IQL", False, {"deterministic_policy": True}),
    "BC": ("BC", False, {}),
}
cases = pytest.mark.parametrize("case", CASES)
logging.getLogger("torch.__trace").setLevel(logging.INFO)  # pytest would record its thousands of lines, which takes time
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")


def acting(name: str, spec: Spec | None = None, **knobs: Any) -> Agent:
    """A small agent that counts as trained, with a normaliser that matters."""
    given = spec or Spec(BOX, UNEQUAL)
    agent = small(name, env=stub_env(given), obs_keys=given.obs_keys, **{"normalize_obs": True, **knobs})
    agent.obs_normalizer.fit(torch.from_numpy(raw(64 * agent.obs_dim).reshape(64, -1)))
    agent.set_parameters(agent.get_parameters())
    return agent


def raw(n: int) -> np.ndarray:
    """Numbers far from the unit scale, (n,) float32."""
    return (7.0 + 4.0 * np.random.default_rng(1).normal(size=n)).astype(np.float32)


class Slow:
    """Counts the calls of `agent.act`, which only the torch path makes."""

    def __init__(self, agent: Agent) -> None:
        self.calls, act = 0, agent.act

        def counted(*args: Any) -> Any:
            self.calls += 1
            return act(*args)

        agent.act = counted  # type: ignore[method-assign]


def check(agent: Agent, deterministic: bool, obs: np.ndarray) -> np.ndarray:
    """The action for one observation: by numpy alone, and as torch gives it."""
    slow = Slow(agent)
    action = agent.predict(obs, deterministic=deterministic)[0]
    assert slow.calls == 0, "not by numpy"
    batch = agent.predict(np.stack([obs, obs + 1]), deterministic=deterministic)[0]
    assert slow.calls == 0, "the batch not by numpy"
    np.testing.assert_allclose(batch[0], action, atol=1e-6, rtol=1e-6)
    expected = agent.predict(torch.from_numpy(obs.astype(np.float64))[None], deterministic=deterministic)[
        0
    ]  # a tensor: by torch
    del agent.act  # type: ignore[method-assign]
    assert slow.calls == 1 and type(action) is np.ndarray
    assert action.shape == expected[0].shape == agent.action_space.shape and action.dtype == expected.dtype
    assert action.dtype == agent.action_space.dtype and agent.action_space.contains(action)
    np.testing.assert_allclose(action, expected[0], atol=1e-6, rtol=1e-6)
    return action


def different(agent: Agent, case: str, obs: np.ndarray, before: np.ndarray) -> np.ndarray:
    action = check(agent, CASES[case][1], obs)
    assert not np.allclose(action, before, atol=1e-5), "it acts as before: nothing was followed"
    return action


@cases
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_equals_torch(case: str, dtype: Any) -> None:
    name, deterministic, knobs = CASES[case]
    agent = acting(name, **knobs)
    actions = [check(agent, deterministic, obs) for obs in raw(60).reshape(20, 3).astype(dtype)]
    assert np.std(actions, 0).min() > 1e-3, "the same everywhere: nothing would be compared"
    inside = (np.array(actions) > UNEQUAL.low) & (np.array(actions) < UNEQUAL.high)
    assert inside.mean() > 0.5


@pytest.mark.parametrize("normalize", [True, False])
def test_odd_shapes_and_sizes(normalize: bool) -> None:
    """Spaces of two dimensions, float64 actions, no hidden layer, observations that are no contiguous memory."""
    for arch in ([], [7], [16, 8, 4]):
        agent = acting("SRPO", GRID, policy_kwargs={"net_arch": arch or [5]}, normalize_obs=normalize)
        for obs in raw(60).reshape(10, 3, 2):
            check(agent, True, np.clip(obs, -9, 9))
        turned = np.asfortranarray(raw(6).reshape(3, 2))
        np.testing.assert_array_equal(check(agent, True, turned), check(agent, True, turned.copy(order="C")))
        check(agent, True, raw(24).reshape(6, 4)[::2, ::2])


@cases
@pytest.mark.parametrize("n", [1, 64, MOST_ROWS, MOST_ROWS + 1])
def test_batches(case: str, n: int) -> None:
    """Each row as alone; from a size on by torch. What is wrong in one row is refused as a whole."""
    name, deterministic, knobs = CASES[case]
    agent = acting(name, **knobs)
    obs, slow = raw(3 * n).reshape(n, 3), Slow(agent)
    actions = agent.predict(obs, deterministic=deterministic)[0]
    assert slow.calls == (n > MOST_ROWS) and actions.shape == (n, 2) and actions.dtype == agent.action_space.dtype
    expected = agent.predict(torch.from_numpy(obs), deterministic=deterministic)[0]
    np.testing.assert_allclose(actions, expected, atol=1e-6, rtol=1e-6)
    obs[-1, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        agent.predict(obs, deterministic=deterministic)
    with pytest.raises(ValueError, match="shape"):
        agent.predict(raw(4 * n).reshape(n, 4), deterministic=deterministic)
    with pytest.raises(ValueError, match="shape"):
        agent.predict(np.zeros((n, 1, 3), np.float32), deterministic=deterministic)


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of a batch in memory
    "rows": np.ascontiguousarray,
    "columns": np.asfortranarray,
    "gaps": lambda obs: np.repeat(np.repeat(obs, 2, 0), 3, 1)[::2, ::3],
    "backwards": lambda obs: np.ascontiguousarray(obs[::-1, ::-1])[::-1, ::-1],
}


def acts_as_torch(agent: Agent, obs: np.ndarray) -> np.ndarray:
    """The actions for a batch: by numpy alone, as torch gives them, and as for each observation alone."""
    kept, slow = obs.copy(), Slow(agent)
    actions = agent.predict(obs, deterministic=True)[0]
    alone = np.stack([agent.predict(one, deterministic=True)[0] for one in obs])
    assert slow.calls == 0, "not by numpy"
    expected = agent.predict(torch.from_numpy(kept.astype(np.float64)), deterministic=True)[0]
    del agent.act  # type: ignore[method-assign]
    assert slow.calls == 1 and actions.dtype == expected.dtype and actions.flags.c_contiguous and actions.flags.writeable
    np.testing.assert_allclose(actions, expected, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(actions, alone, atol=1e-6, rtol=1e-6)
    assert np.array_equal(obs, kept) and not np.shares_memory(actions, obs)
    return actions


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_batches_of_any_memory_layout(dtype: Any, layout: str, normalize: bool) -> None:
    """Without a normaliser nothing is between the observations and the first product."""
    agent = acting("SRPO", normalize_obs=normalize)
    obs = LAYOUTS[layout](raw(120).reshape(40, 3).astype(dtype))
    assert np.std(acts_as_torch(agent, obs), 0).min() > 1e-3, "the same everywhere: nothing would be compared"


@cases
def test_batches_follow_training(case: str) -> None:
    name, _, knobs = CASES[case]
    agent = small(name, normalize_obs=True, compile="eager", **knobs).learn(DATA)
    obs = raw(24 * agent.obs_dim).reshape(24, -1).astype(np.float64) - 7.0
    before = acts_as_torch(agent, obs)
    agent.learn(DATA, 30)
    assert not np.allclose(before, acts_as_torch(agent, obs), atol=1e-5), "it acts as before: nothing was followed"


@pytest.mark.parametrize("row", [0, 31, 63])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_bad_row_is_found(dtype: Any, row: int) -> None:
    agent = acting("SRPO")
    for column in range(3):
        for bad in (np.nan, np.inf, -np.inf):
            obs = raw(192).reshape(64, 3).astype(dtype)
            obs[row, column] = bad
            with pytest.raises(ValueError, match="observation contains NaN or infinity"):
                agent.predict(obs)
        for huge in (1e25, -1e25):
            obs = raw(192).reshape(64, 3).astype(dtype)
            obs[row, column] = huge
            slow = Slow(agent)
            actions = agent.predict(obs)[0]
            assert slow.calls == 1 and np.isfinite(actions).all()
            del agent.act  # type: ignore[method-assign]


@pytest.mark.parametrize("parameter", range(6))
def test_nan_in_any_parameter_is_found(parameter: int) -> None:
    """After the first call, as an update that diverges causes it."""
    agent, obs = acting("TD3BC", policy_kwargs={"net_arch": [8, 8]}), raw(60).reshape(20, 3)
    agent.predict(obs)
    with torch.no_grad():
        list(agent.policy.parameters())[parameter].view(-1)[-1] = np.nan  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="actions contain NaN"):
        agent.predict(obs)


def test_threads_act_in_batches_of_their_own() -> None:
    """No thread meets the numbers of another."""
    agent = acting("SRPO")
    batches = [raw(3 * n).reshape(n, 3) + n for n in (1, 2, 7, 64, 64, 200, 1024)]
    alone = [agent.predict(obs)[0] for obs in batches]

    def work(first: int) -> None:
        for k in np.roll(np.tile(np.arange(len(batches)), 20), -first):
            np.testing.assert_array_equal(agent.predict(batches[k])[0], alone[k])

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)


UNIT = spaces.Box(-1.0, 1.0, (2,))
SPACES = {
    "unequal": UNEQUAL,
    "unit": UNIT,
    "half unit": spaces.Box(np.array([-1.0, -1.0], np.float32), np.array([1.0, 2.0], np.float32)),
    "unit float64": spaces.Box(-1.0, 1.0, (2,), np.float64),
    # whose middle plus or minus half their width is beyond them in float32
    "rounded": spaces.Box(np.array([-0.1, 0.1], np.float32), np.array([0.7, 0.9], np.float32)),
    "float16": spaces.Box(np.float16(1000), np.float16(1001.5), (2,), np.float16),  # which has no number in their middle
}


@pytest.mark.parametrize("space", SPACES)
def test_saturated_actions_are_the_bounds(space: str) -> None:
    """And those between them are as torch's."""
    box = SPACES[space]
    agent = acting("TD3BC", Spec(BOX, box))
    check(agent, True, raw(3))
    acts_as_torch(agent, raw(60).reshape(20, 3))
    for biases, bounds in (([1e3, -1e3], [box.high[0], box.low[1]]), ([-1e3, 1e3], [box.low[0], box.high[1]])):
        with torch.no_grad():
            agent.policy.net[-1].bias.copy_(torch.tensor(biases))  # type: ignore[union-attr, index, operator]
        action = check(agent, True, raw(3))
        assert box.contains(action)
        np.testing.assert_allclose(action, bounds, rtol=1e-6)
        batch = agent.predict(raw(60).reshape(20, 3), deterministic=True)[0]
        np.testing.assert_array_equal(batch, np.tile(action, (20, 1)))


@cases
def test_follows_whatever_changes_the_policy(case: str) -> None:
    """Learning (which fits the normaliser), parameters put, in-place changes, a clone, a file, learn_many."""
    name, deterministic, knobs = CASES[case]
    data = {**DATA, "observations": 3 + 2 * DATA["observations"], "next_observations": 3 + 2 * DATA["next_observations"]}
    agent, obs = small(name, normalize_obs=True, compile="eager", **knobs).learn(data), raw(3)
    action = check(agent, deterministic, obs)
    agent.learn(data, 30)
    action = different(agent, case, obs, action)
    other = small(name, seed=5, normalize_obs=True, compile="eager", **knobs).learn(data)
    agent.set_parameters(other.get_parameters())
    action = different(agent, case, obs, action)
    np.testing.assert_array_equal(action, check(other, deterministic, obs))
    clone = agent.clone()
    np.testing.assert_array_equal(action, check(clone, deterministic, obs))
    with torch.no_grad():
        agent.policy.net[0].weight.mul_(1.5)  # type: ignore[union-attr, index, operator]
    action = different(agent, case, obs, action)
    clone.policy.load_state_dict(agent.policy.state_dict())
    np.testing.assert_array_equal(action, check(clone, deterministic, obs))
    diffagents.learn_many([agent, clone], data, 30)
    action = different(agent, case, obs, action)
    agent.obs_normalizer.mean.add_(1.0)  # type: ignore[operator]
    action = different(agent, case, obs, action)
    agent.policy = other.policy
    different(agent, case, obs, action)


def test_follows_the_normaliser_that_learning_fits() -> None:
    """An agent that knows its spaces acts before it is trained, with observations as they are."""
    agent, obs = small("TD3BC", env=stub_env(Spec(BOX, spaces.Box(-1.0, 1.0, (2,)))), compile="eager"), raw(3)
    before = check(agent, True, obs)
    agent.learn({**DATA, "observations": 5 + 3 * DATA["observations"]}, 1)
    different(agent, "TD3BC", obs, before)


@cases
def test_every_result_is_an_array_of_its_own(case: str) -> None:
    name, deterministic, knobs = CASES[case]
    agent, obs = acting(name, **knobs), raw(3)
    kept = obs.copy()
    one = check(agent, deterministic, obs)
    first = one.copy()
    two = check(agent, deterministic, obs + 1)
    assert np.array_equal(one, first) and not np.shares_memory(one, two)
    one.fill(99.0)
    np.testing.assert_array_equal(check(agent, deterministic, obs), first)
    assert np.array_equal(obs, kept), "the observation was changed"
    obs.flags.writeable = False
    np.testing.assert_array_equal(agent.predict(obs, deterministic=deterministic)[0], first)


# ---- the slow path -------------------------------------------------------------------------------------------------
@cases
def test_errors_are_those_of_the_slow_path(case: str) -> None:
    name, deterministic, knobs = CASES[case]
    agent = acting(name, **knobs)
    agent.predict(raw(3), deterministic=deterministic)
    for bad in (np.nan, np.inf, -np.inf):
        for dtype in (np.float32, np.float64):
            obs = raw(3).astype(dtype)
            obs[1] = bad
            with pytest.raises(ValueError, match="observation contains NaN or infinity"):
                agent.predict(obs, deterministic=deterministic)
    with pytest.raises(ValueError, match=r"observation has shape \(4,\), expected \(3,\) or a batch"):
        agent.predict(raw(4), deterministic=deterministic)
    with pytest.raises(ValueError, match=r"has shape \(\)"):
        agent.predict(np.array(1.0), deterministic=deterministic)
    with pytest.raises(TypeError, match=f"{name}.predict has no choice 'n_candidates'"):
        agent.predict(raw(3), deterministic=deterministic, n_candidates=3)
    with pytest.raises(TypeError, match="the observation is a tuple"):
        agent.predict((raw(3), {}), deterministic=deterministic)
    with pytest.raises(RuntimeError, match="no policy yet"):
        small(name, **knobs).predict(raw(3))


def test_huge_observations_take_the_slow_path() -> None:
    """Where a sum of squares would overflow nothing is lost, and nothing is said."""
    agent = acting("TD3BC")
    slow = Slow(agent)
    action = agent.predict(np.full(3, 1e25, np.float32))[0]
    assert slow.calls == 1 and np.isfinite(action).all()


@cases
@pytest.mark.parametrize(
    "given",
    [
        lambda obs: obs.round().astype(np.int64),
        lambda obs: obs.round().astype(np.uint8),
        lambda obs: obs.tolist(),
        lambda obs: torch.from_numpy(obs),
        lambda obs: np.ma.masked_array(obs),
    ],
    ids=["int", "uint8", "list", "tensor", "subclass"],
)
def test_what_is_no_float_array_takes_the_slow_path_and_agrees(case: str, given: Any) -> None:
    name, deterministic, knobs = CASES[case]
    agent, obs = acting(name, **knobs), raw(3).round()
    expected = check(agent, deterministic, obs)
    slow = Slow(agent)
    action = agent.predict(given(obs), deterministic=deterministic)[0]
    assert slow.calls == 1 and action.dtype == agent.action_space.dtype
    np.testing.assert_allclose(action.reshape(-1), expected, atol=1e-6)


def test_dict_observations_take_the_slow_path() -> None:
    spec = Spec(spaces.Dict({"a": BOX, "b": spaces.Box(-9.0, 9.0, (2, 2))}), UNEQUAL, ("b", "a"))
    agent, parts = acting("SRPO", spec), {"a": raw(3), "b": raw(4).reshape(2, 2)}
    slow = Slow(agent)
    one = agent.predict(parts)[0]
    many = agent.predict({key: value[None] for key, value in parts.items()})[0]
    assert slow.calls == 2
    np.testing.assert_allclose(one, many[0], atol=1e-6)
    with pytest.raises(ValueError, match="must be a dict"):
        agent.predict(raw(7))


@pytest.mark.parametrize("name", ["IQL", "AWR"])
def test_random_actions_are_not_numpys(name: str) -> None:
    agent = acting(name)
    slow = Slow(agent)
    one, two = (agent.predict(raw(3), deterministic=False)[0] for _ in range(2))
    assert slow.calls == 2 and not np.array_equal(one, two)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CASES])
def test_policies_that_are_no_single_network_have_no_such_path(name: str) -> None:
    agent = acting(name)
    assert agent.point_policy(True) is None and agent.point_policy(False) is None


def test_a_policy_that_was_not_trained_yet_is_refused() -> None:
    agent = acting("SRPO")
    agent.state.policy_missing = True
    with pytest.raises(RuntimeError, match="no policy yet"):
        agent.predict(raw(3))


def test_whole_actions_are_those_of_the_slow_path() -> None:
    agent = acting("AWR", Spec(BOX, spaces.Box(-90, 60, (2,), np.int32)))
    slow = Slow(agent)
    for obs in raw(90).reshape(30, 3):
        one = agent.predict(obs, deterministic=True)[0]
        assert slow.calls == 0 and one.dtype == np.int32
        np.testing.assert_array_equal(one, agent.predict(torch.from_numpy(obs)[None], deterministic=True)[0][0])
        slow.calls = 0


# ---- compile_policy ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained() -> dict[str, Agent]:
    return {}


def eager(name: str, trained: dict[str, Agent], **knobs: Any) -> Agent:
    """Trained once for this file, which copies it."""
    key = f"{name} {knobs}"
    if key not in trained:
        trained[key] = shallow(name, compile="eager", **knobs).learn(DATA)
    return trained[key]


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """All of compiling but the code generator, which test_compiling.py runs: traced graphs run as they are, and are kept."""
    import torch._inductor

    graphs: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graphs.append(graph) or graph)
    return graphs


@pytest.mark.parametrize(
    ("name", "deterministic"), [(name, False) for name in NAMES] + [("SRPO", True), ("DiffusionQL", True), ("SfBC", True)]
)
def test_a_compiled_policy_acts_as_the_eager_one(
    name: str, deterministic: bool, traced_only: list[Any], trained: dict[str, Agent]
) -> None:
    """And follows what is learnt, put and cloned later; with the same random numbers."""
    plain, agent = (eager(name, trained).clone() for _ in range(2))
    agent.compile_policy(3, deterministic=deterministic)
    assert len(traced_only) == 1
    for change in (lambda one: None, lambda one: shake(one)):
        change(plain), change(agent)
        agent.predict_generator.set_state(plain.predict_generator.get_state())
        act = agent.act
        for _ in range(2):
            agent.act = None  # type: ignore[assignment]  # the compiled one is what acts
            found = agent.predict(ROWS[:3], deterministic=deterministic)[0]
            agent.act = act  # type: ignore[method-assign]
            np.testing.assert_allclose(found, plain.predict(ROWS[:3], deterministic=deterministic)[0], atol=1e-5)
        for obs in (ROWS, ROWS[:1], ROWS[0]):  # other sizes are as they were, to the bit
            assert np.array_equal(
                agent.predict(obs, deterministic=deterministic)[0], plain.predict(obs, deterministic=deterministic)[0]
            )


def shake(agent: Agent) -> None:
    """Move all parameters and buffers in place, a little."""
    with torch.no_grad():
        for network in agent.networks().values():
            for parameter in network.parameters():
                parameter.mul_(1.05)
            for buffer in network.buffers():
                buffer.mul_(0.99)


def test_a_compiled_policy_follows_learning(traced_only: list[Any], trained: dict[str, Agent]) -> None:
    """By `learn`, in place; after `learn_many`, whose tensors are others, it acts by the new ones however it does so."""
    plain, agent = (eager("DiffusionQL", trained).clone(learning_rate=1e-2) for _ in range(2))
    agent.compile_policy(3, True)
    before = agent.predict(ROWS[:3], deterministic=True)[0]
    for one in (plain, agent):
        one.learn(DATA)
    acts_alike(agent, plain)
    assert not np.allclose(before, agent.predict(ROWS[:3], deterministic=True)[0], atol=1e-3)
    for one in (plain, agent):
        diffagents.learn_many([one], DATA)
    acts_alike(agent, plain)
    agent.compile_policy(3, True)
    acts_alike(agent, plain)
    agent.set_parameters(eager("DiffusionQL", trained).get_parameters())
    np.testing.assert_allclose(agent.predict(ROWS[:3], deterministic=True)[0], before, atol=1e-5)


def acts_alike(agent: Agent, plain: Agent) -> None:
    np.testing.assert_allclose(
        agent.predict(ROWS[:3], deterministic=True)[0], plain.predict(ROWS[:3], deterministic=True)[0], atol=1e-5
    )


def unsaturated(trained: dict[str, Agent]) -> Any:
    """A QGPO whose actions are within the bounds, so that its choice is seen."""
    agent: Any = eager("QGPO", trained, preset=None).clone()
    for tensor in (agent.behavior.fixed_noise, agent.behavior.net.output.weight.data, agent.behavior.net.output.bias.data):
        tensor.mul_(0.004)
    agent.energy.net[-1].weight.data.mul_(0.004)
    return agent


def test_a_compiled_choice(traced_only: list[Any], trained: dict[str, Agent]) -> None:
    """Compiled for one choice; calls with another are as they were."""
    plain, agent = (unsaturated(trained) for _ in range(2))
    agent.compile_policy(3, True, guidance_scale=30.0)
    act, agent.act = agent.act, None  # type: ignore[assignment, method-assign]
    found = agent.predict(ROWS[:3], deterministic=True, guidance_scale=30.0)[0]
    agent.act = act  # type: ignore[method-assign]
    np.testing.assert_allclose(found, plain.predict(ROWS[:3], deterministic=True, guidance_scale=30.0)[0], atol=1e-5)
    for choice in ({}, {"guidance_scale": 3.0}):
        assert np.array_equal(
            agent.predict(ROWS[:3], deterministic=True, **choice)[0], plain.predict(ROWS[:3], deterministic=True, **choice)[0]
        )
    with pytest.raises(TypeError, match="no choice 'stochastic'"):
        agent.compile_policy(3, stochastic=1)
    with pytest.raises(RuntimeError, match="does not know its spaces yet"):
        small("DiffusionQL").compile_policy()


def test_a_policy_without_a_compiler(monkeypatch: pytest.MonkeyPatch, trained: dict[str, Agent]) -> None:
    import torch._inductor

    tried: list[int] = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: tried.append(1) or 1 / 0)
    plain, agent = (unsaturated(trained) for _ in range(2))
    with pytest.warns(UserWarning, match="compiling failed, so this runs eagerly"):
        agent.compile_policy(3)
    agent.predict_generator.set_state(plain.predict_generator.get_state())
    for deterministic in (True, False):
        assert np.array_equal(
            agent.predict(ROWS[:3], deterministic=deterministic)[0], plain.predict(ROWS[:3], deterministic=deterministic)[0]
        )
    assert len(tried) == 2
    with pytest.warns(UserWarning, match="compiling failed, so this runs eagerly"):
        agent.compile_policy(3, True, guidance_scale=30.0)
    acts = [one.predict(ROWS[:3], deterministic=True, guidance_scale=30.0)[0] for one in (plain, agent)]
    assert np.array_equal(*acts) and not np.array_equal(acts[0], plain.predict(ROWS[:3], deterministic=True)[0])


def test_compiling_a_policy_draws_no_random_number(traced_only: list[Any], trained: dict[str, Agent]) -> None:
    """What a seed gives must not depend on how the agent acts."""
    agent = eager("DiffusionQL", trained).clone()
    before = [agent.predict_generator.get_state(), agent.generator.get_state(), torch.get_rng_state()]
    agent.compile_policy(3)
    after = [agent.predict_generator.get_state(), agent.generator.get_state(), torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
