"""What must hold for every algorithm: files, resuming, acting, choices, bad knobs, the reading budget."""

import dataclasses
import itertools
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import NAMES, STEPS, agent_class, fields, small
from toy import line_data

import diffagents
from diffagents import load_dataset
from diffagents.agent import Agent
from diffagents.config.presets import load_presets
from diffagents.training.offline import announce, choose_modes, estimate
from diffagents.training.plan import Plan
from diffagents.training.state import training_tensors

DATA = line_data()
OBS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")


def same_networks(a: Agent, b: Agent) -> None:
    for name, state in a.get_parameters().items():
        for key, value in b.get_parameters()[name].items():
            assert torch.equal(state[key], value), f"{name}.{key}"


def same_optimizers(a: Agent, b: Agent) -> None:
    for name, optimizer in a.optimizers.items():
        ours, theirs = (dict(enumerate(one.state.values())) for one in (optimizer, b.optimizers[name]))
        assert ours.keys() == theirs.keys() and len(ours) > 0, name
        for i, state in ours.items():
            for key, value in state.items():
                assert torch.equal(value, theirs[i][key]), (name, i, key)


@pytest.fixture(scope="module")
def trained() -> dict[str, Agent]:
    return {}


def train(name: str, trained: dict[str, Agent]) -> Agent:
    """Trained once for all tests of this file, which only read it or copy it."""
    if name not in trained:
        trained[name] = small(name).learn(DATA)
    return trained[name]


@pytest.fixture
def agent(request: pytest.FixtureRequest, trained: dict[str, Agent]) -> Agent:
    return train(request.param, trained)


every = pytest.mark.parametrize("agent", NAMES, indirect=True)


@every
def test_every_network_is_saved_and_every_optimizer_has_one(agent: Agent) -> None:
    """No network is forgotten: every module of the agent is in MODEL or TRAINING_NETWORKS, and learning moves each of them."""
    modules = {name for name, value in vars(agent).items() if isinstance(value, torch.nn.Module)} - {"obs_normalizer"}
    assert modules == {*agent.MODEL, *agent.TRAINING_NETWORKS}
    assert set(agent.optimizers) <= modules
    fresh = small(type(agent).__name__, env=None)
    fresh.set_up(agent.spec)  # type: ignore[arg-type]
    for name in modules:
        pairs = zip(getattr(agent, name).parameters(), getattr(fresh, name).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), f"{name} never moved"
    assert agent.num_timesteps == STEPS * len(agent.STAGE_SHARES)


@every
@pytest.mark.parametrize("folder", [False, True], ids=["zip", "folder"])
def test_save_load_acts_and_updates_the_same(agent: Agent, folder: bool, tmp_path: pathlib.Path) -> None:
    path = agent.save_pretrained(tmp_path / "a", include_trainer_state=True) if folder else agent.save(tmp_path / "a")
    one, two = diffagents.load(path, verbose=0), diffagents.load(path, verbose=0)
    assert type(one) is type(agent)
    same_networks(agent, one)
    same_optimizers(agent, one)
    assert np.array_equal(agent.predict(OBS, deterministic=True)[0], one.predict(OBS, deterministic=True)[0])
    assert np.array_equal(two.predict(OBS)[0], one.predict(OBS)[0])
    total = 2 * len(agent.STAGE_SHARES)
    other = agent.clone().learn(DATA, total_timesteps=total)
    one.learn(DATA, total_timesteps=total)
    same_networks(other, one)
    same_optimizers(other, one)


@every
def test_model_file_is_all_that_acting_needs(agent: Agent, tmp_path: pathlib.Path) -> None:
    folder = agent.save_pretrained(tmp_path / "a")
    (folder / "learner.safetensors").unlink()
    actor = diffagents.load(folder, verbose=0)
    assert np.array_equal(agent.predict(OBS, deterministic=True)[0], actor.predict(OBS, deterministic=True)[0])
    actor.predict(OBS)
    with pytest.raises(RuntimeError, match=r"without learner\.safetensors"):
        actor.learn(DATA)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stopped_anywhere_and_loaded_ends_as_the_uninterrupted_one(
    name: str, trained: dict[str, Agent], tmp_path: pathlib.Path
) -> None:
    """Stopped in the middle and at the end of each stage; weights, lagged copies and moments are equal to the bit."""
    whole = train(name, trained).clone()
    run, stops = small(name), [k * STEPS + part for k in range(len(whole.STAGE_SHARES)) for part in (5, STEPS)]
    for i, stop in enumerate(stops[:-1]):
        run.learn(DATA, reset_num_timesteps=i == 0, callback=lambda local, _: local["self"].num_timesteps < stop)  # noqa: B023
        assert run.num_timesteps == stop
        run = diffagents.load(run.save(tmp_path / f"{i}.zip"), verbose=0)
    run.learn(DATA, reset_num_timesteps=False)
    same_networks(whole, run)
    same_optimizers(whole, run)
    assert np.array_equal(whole.predict(OBS)[0], run.predict(OBS)[0])


@every
def test_actions(agent: Agent) -> None:
    """In the space and its dtype; deterministic ones depend on the observation only; acting never touches training."""
    before = agent.generator.get_state().clone()
    assert agent.spec is not None
    for deterministic in (True, False):
        action, _ = agent.predict(OBS, deterministic=deterministic)
        assert action.shape == (6, 2) and action.dtype == np.float32
        assert all(agent.action_space.contains(a) for a in action)
        assert agent.predict(OBS[0], deterministic=deterministic)[0].shape == (2,)
    one, two = agent.predict(OBS, deterministic=True)[0], agent.predict(OBS[::-1].copy(), deterministic=True)[0][::-1]
    np.testing.assert_allclose(one, two, atol=2e-6)
    np.testing.assert_allclose(one[2], agent.predict(OBS[2], deterministic=True)[0], atol=2e-6)
    assert torch.equal(before, agent.generator.get_state())


BY_THE_PAPER = {"IQL": True, "AWR": True}  # the mean of the Gaussian; diffusion policies sample


def acts(agent: Agent, **how: Any) -> np.ndarray:
    """Actions of an agent for Pendulum whose generator is as at the beginning."""
    agent.predict_generator.manual_seed(0)
    return agent.predict(np.ones((8, 3), np.float32), **how)[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_that_can_sample_stores_how_it_is_meant_to_act(name: str) -> None:
    """By the recipe without randomness, by the paper as in its evaluation; `deterministic=` is the word for it."""
    cls = agent_class(name)
    samples = cls.draw_act is not Agent.draw_act
    assert ("deterministic" in fields(name)) == samples and "deterministic" not in cls.CHOICE
    assert cls().acts_deterministically
    if samples:
        assert cls.Config().deterministic == cls(preset=None).acts_deterministically == BY_THE_PAPER.get(name, False)
        for value in (True, False):
            assert cls(deterministic=value).acts_deterministically == value
    else:
        assert cls(preset=None).acts_deterministically


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["fast", None])
def test_predict_acts_as_the_policy_is_meant_to(preset: str | None, name: str, tmp_path: pathlib.Path) -> None:
    """And so does what `save` wrote and what `load` is told to act otherwise."""
    agent: Any = small(name, preset=preset, env="Pendulum-v1")
    choices = {value: acts(agent, deterministic=value) for value in (True, False)}
    samples = "deterministic" in fields(name)
    assert np.array_equal(choices[True], choices[False]) != samples
    for meant in (agent.acts_deterministically, *((True, False) if samples else ())):
        one = agent.clone(**{"deterministic": meant} if samples else {})
        loaded = diffagents.load(one.save(tmp_path / f"{meant}"), verbose=0)
        for each in (one, loaded):
            assert each.acts_deterministically == meant
            assert np.array_equal(acts(each), choices[meant])
            assert np.array_equal(acts(each, deterministic=True), choices[True])
            assert np.array_equal(acts(each, deterministic=False), choices[False])
        if samples:
            assert one.explicit["deterministic"] == loaded.explicit["deterministic"] == meant
            other = type(agent).load(tmp_path / f"{meant}", deterministic=not meant, verbose=0)
            assert np.array_equal(acts(other), choices[not meant])


@every
def test_choices_at_predict_time(agent: Agent) -> None:
    """What CHOICE names is accepted, checked, and forgotten after the call; anything else is refused by name."""
    name, known = type(agent).__name__, fields(type(agent).__name__)
    assert set(agent.CHOICE) <= set(known)
    config = agent.config
    for choice in agent.CHOICE:
        agent.predict(OBS, **{choice: getattr(config, choice)})
        with pytest.raises(ValueError, match=rf"{choice}=.*must|{choice}=.*choose"):
            agent.predict(OBS, **{choice: "nonsense"})
    assert agent.config is config
    with pytest.raises(TypeError, match=rf"{name}\.predict has no choice 'stochastic'"):
        agent.predict(OBS, stochastic=True)


CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (name, {"select": "first"}, {"select": "argmax"})
    for name in NAMES
    if {"select", "n_candidates"} <= set(agent_class(name).CHOICE)
]


@pytest.mark.parametrize(("name", "one", "two"), CHANGES)
def test_the_choice_counts(name: str, one: dict[str, Any], two: dict[str, Any], trained: dict[str, Agent]) -> None:
    """ "first" is one plain sample; "argmax" another, and another again where the candidates are fewer."""
    agent = train(name, trained)
    obs = np.random.default_rng(2).normal(size=(64, 3)).astype(np.float32)
    n = {"n_candidates": 32}
    first = agent.predict(obs, deterministic=True, **n, **one)[0]
    best = agent.predict(obs, deterministic=True, **n, **two)[0]
    assert not np.array_equal(first, best)
    more = agent.predict(obs, deterministic=True, n_candidates=2, **two)[0]
    assert not np.array_equal(more, best)
    with pytest.raises(ValueError, match="n_candidates=257 must be at most 256"):
        agent.predict(obs, n_candidates=257, **two)


SCORES = {"DiffusionQL": lambda q: q.amin(0), "DiffCPS": lambda q: q.amin(0), "BDPO": lambda q: q.mean(0)}


@pytest.mark.parametrize("name", SCORES)
def test_candidates_are_scored_by_the_lagged_critics(name: str, trained: dict[str, Agent]) -> None:
    """argmax takes the candidate whose score is highest: the lower of the lagged twins, or the mean of BDPO's ensemble."""
    agent: Any = train(name, trained).clone()
    offered: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []

    def critic(obs: torch.Tensor, act: torch.Tensor) -> torch.Tensor:
        offered.append(act)
        members = 3 if name == "BDPO" else 2
        scores.append(torch.randn(members, *act.shape[:2], generator=torch.Generator().manual_seed(0)))
        return scores[-1]

    agent.critic_target.on_parts = critic
    action = agent.predict(OBS, deterministic=True, n_candidates=5, select="argmax")[0]
    candidates, score = offered[0], SCORES[name](scores[0])
    best = candidates[torch.arange(6), score.argmax(1)]
    np.testing.assert_allclose(agent.spec.scale_action(action), best.numpy(), atol=1e-6)


CHAINS = ["DiffusionQL", "DiffCPS", "BDPO", "DiffusionBC", "IDQL"]


@pytest.mark.parametrize("name", CHAINS)
def test_samplers_at_predict_time(name: str, trained: dict[str, Agent]) -> None:
    """The chain or DDIM, all steps or some; what the network never learnt is refused, and so is any where there is none."""
    agent: Any = train(name, trained).clone()
    T = agent.config.n_diffusion_steps
    for network in agent.networks().values():
        if hasattr(network, "fixed_noise"):
            network.fixed_noise.mul_(0.03)  # so that a network that has learnt nothing stays within the bounds
            torch._foreach_mul_([p.detach() for p in network.net.parameters()][-2:], 0.02)
    actions = [
        agent.predict(OBS, deterministic=True, **choice)[0]
        for choice in ({}, {"solver": "ddim"}, {"solver": "ddim", "solver_steps": 2}, {"solver": "ddim", "solver_steps": 1})
    ]
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(actions, 2))
    np.testing.assert_array_equal(agent.predict(OBS, deterministic=True, solver_steps=T)[0], actions[0])
    for choice, words in (
        ({"solver_steps": 2}, 'use solver="ddim"'),
        ({"solver": "ddim", "solver_steps": T + 1}, f"more than the chain's n_diffusion_steps={T}"),
        ({"solver": "ddim", "solver_steps": 0}, "solver_steps"),
        ({"solver": "dpm++"}, "continuous time"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            agent.predict(OBS, **choice)


@pytest.mark.parametrize("name", ["SRPO", "TD3BC", "IQL", "AWR"])
def test_no_sampler_to_choose(name: str, trained: dict[str, Agent]) -> None:
    agent = train(name, trained)
    with pytest.raises(TypeError, match="it has no such choices"):
        agent.predict(OBS, solver_steps=3)


@pytest.mark.parametrize("name", NAMES)
def test_bad_knobs(name: str) -> None:
    """Every knob refuses nonsense by its own name, in one line, before anything is built."""
    cls = agent_class(name)
    with pytest.raises(TypeError, match=rf"{name} has no hyperparameter 'nonsense'.*Valid: "):
        cls(nonsense=1)
    for field in dataclasses.fields(cls.Config):
        for value in ("nonsense", float("nan"), -1.5, [1]):
            with pytest.raises((ValueError, TypeError), match=field.name) as caught:
                cls(**{field.name: value})
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(TypeError, match="policy_kwargs has no 'width'"):
        small(name, policy_kwargs={"width": 3}).set_up(small_spec())
    with pytest.raises(ValueError, match="positive whole numbers"):
        small(name, policy_kwargs={"net_arch": [-3]}).set_up(small_spec())


def small_spec() -> Any:
    return small("SRPO", env="Pendulum-v1").spec


@pytest.mark.parametrize("name", NAMES)
def test_bad_calls(name: str, trained: dict[str, Agent]) -> None:
    agent = train(name, trained)
    with pytest.raises(RuntimeError, match="no policy yet"):
        small(name).predict(OBS)
    with pytest.raises(ValueError, match="4"):
        agent.predict(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="NaN"):
        agent.predict(np.full(3, np.nan, np.float32))
    with pytest.raises(ValueError, match=r"stages=\('nothing',\) must be a tuple of some of"):
        agent.learn(DATA, stages=("nothing",))
    with pytest.raises(ValueError, match=r"fresh=\('nothing',\) .*the networks are"):
        agent.clone(fresh=("nothing",))
    short = {key: value[:, :1] if key == "actions" else value for key, value in DATA.items()}
    with pytest.raises(ValueError, match="1 dimension"):
        agent.learn(short)
    with pytest.raises(ValueError, match=r"preset='no-such'.*unknown"):
        small(name, preset="no-such")


@pytest.mark.parametrize("name", NAMES)
def test_nan_stops_with_the_last_good_state(name: str) -> None:
    """A network that turns NaN in mid-run: the error names the stage, and what is left acts and is finite."""
    agent = small(name)

    def poison(local: dict[str, Any], _: Any) -> bool:
        run = local["self"]
        if run.num_timesteps == STEPS - 1:
            optimizer = next(iter(run.stages()[0].updates[0].optimizers))
            with torch.no_grad():
                optimizer.parameters[0].fill_(float("nan"))
        return True

    with pytest.raises(diffagents.TrainingDiverged, match="diverged between its steps"):
        agent.learn(DATA, callback=poison, log_interval=3)
    assert all(bool(v.isfinite().all()) for state in agent.get_parameters().values() for v in state.values())
    assert np.isfinite(agent.predict(OBS)[0]).all()


STAGED = [name for name in NAMES if len(agent_class(name).STAGE_SHARES) > 1]


@pytest.mark.parametrize("name", STAGED)
def test_a_stage_on_untrained_ones_is_refused(name: str) -> None:
    cls = agent_class(name)
    last = list(cls.STAGE_SHARES)[-1]
    if last == "behavior":  # fitted to the data alone
        assert small(name).learn(DATA, stages=("behavior",)).num_timesteps == STEPS
        return
    with pytest.raises(ValueError, match=rf"leaves out .* which '{last}' builds on and which was never trained"):
        small(name).learn(DATA, stages=(last,))


@pytest.mark.parametrize("name", NAMES)
def test_clone_with_fresh_networks_begins_their_stage_anew(name: str, trained: dict[str, Agent]) -> None:
    agent = train(name, trained)
    fresh = next(iter(agent.stages()[-1].updates[0].optimizers))
    network = next(key for key, optimizer in agent.optimizers.items() if optimizer is fresh)
    other = agent.clone(fresh=(network,))
    assert other.stage_steps[agent.stages()[-1].name] == 0 and other.plan is None
    assert not other.optimizers[network].state and other.num_timesteps == agent.num_timesteps
    other.learn(DATA, stages=tuple(stage for stage, steps in other.stage_steps.items() if steps == 0))


@pytest.mark.parametrize("name", NAMES)
def test_divergence_at_the_start_of_a_stage_leaves_what_was_there_before_it(name: str) -> None:
    """Also where the stage prepares networks: nothing is lost to a stage that fails in its first steps."""
    agent, last = small(name), list(agent_class(name).STAGE_SHARES)[-1]
    begin = STEPS * (len(agent.STAGE_SHARES) - 1)
    if begin:
        agent.learn(DATA, callback=lambda local, _: local["self"].num_timesteps < begin)
    else:
        agent.set_up(load_dataset(DATA).spec)
    before = {key: value.clone() for key, value in named_networks(agent).items()}

    def poison(local: dict[str, Any], _: Any) -> bool:
        optimizer = local["self"].stages()[-1].updates[0].optimizers[0]
        with torch.no_grad():
            optimizer.parameters[0].fill_(float("nan"))
        return True

    with pytest.raises(diffagents.TrainingDiverged):
        agent.learn(DATA, callback=poison, log_interval=2, reset_num_timesteps=not begin)
    assert agent.plan is not None and agent.plan.done.get(last, 0) == 0
    for key, value in named_networks(agent).items():
        assert key.startswith("obs_normalizer") or torch.equal(before[key], value), key


def named_networks(agent: Agent) -> dict[str, torch.Tensor]:
    return {f"{n}.{key}": value for n, state in agent.get_parameters().items() for key, value in state.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cannot_claim_sizes_that_its_tensors_do_not_have(
    name: str, trained: dict[str, Agent], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes are compared before memory is taken: no network is built of a file whose tensors have other shapes."""
    agent = train(name, trained)
    folder = agent.save_pretrained(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(agent_class(name), "set_up", lambda *_: pytest.fail("memory was taken"))
    other_shapes = "in the artifact but|the artifact lacks|the artifact has the unexpected|cannot be built"
    for size in {"n_critics", "n_diffusion_steps"} & config["knobs"].keys():
        changed = {**config, "knobs": {**config["knobs"], size: 10**7}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(diffagents.ArtifactError, match=other_shapes):
            diffagents.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "policy_kwargs": {"net_arch": [10**9, 10**9]}}))
    with pytest.raises(diffagents.ArtifactError, match=other_shapes):
        diffagents.load(folder)


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_complete(name: str) -> None:
    """The file is named like the module; its default block sizes every stage, and no key is anything but a knob."""
    cls = agent_class(name)
    table, known = load_presets(cls.presets_name()), {*fields(name), "aliases", "source", "paper", "policy_kwargs"}
    assert {f"{stage}_steps" for stage in cls.STAGE_SHARES} <= set(table["default"])
    assert all(set(row) <= known for row in table.values())
    for row in table:
        if row not in ("default", "paper", "official_code"):
            small(name, preset=row).set_up(small_spec())


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_agent(name: str, trained: dict[str, Agent]) -> None:
    """Two runs agree to the bit, another seed does not."""
    one, two, other = train(name, trained), small(name).learn(DATA), small(name, seed=1).learn(DATA)
    same_networks(one, two)
    with pytest.raises(AssertionError):
        same_networks(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_announcing_changes_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The updates that time a long plan, and what they prepare, are undone: every tensor of training is as before."""
    agent = small(name)
    agent.learn(DATA, callback=lambda local, _: False)  # one step: moments exist
    plan = Plan(dict.fromkeys(agent.STAGE_SHARES, 1000))
    agent.state.plan = plan
    assert agent.reward_transform is not None
    sampler = load_dataset(DATA).sampler("cpu", agent.reward_transform, agent.obs_normalizer)
    before = {key: value.clone() for key, value in training_tensors(agent).items()}
    counts = (agent.num_timesteps, agent.n_updates, dict(agent.stage_steps), dict(plan.done))
    seconds = estimate(agent, plan, sampler)
    choose_modes(agent, plan, seconds)
    announce(agent, plan, seconds)
    assert re.search(r"about \d+:\d\d", capsys.readouterr().out)
    after = training_tensors(agent)
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    assert counts == (agent.num_timesteps, agent.n_updates, dict(agent.stage_steps), dict(plan.done))
