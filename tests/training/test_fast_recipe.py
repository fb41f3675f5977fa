"""The fast recipe: every algorithm learns, resumes and acts by it, and each of its pieces does what it says."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import NAMES, agent_class, small
from toy import line_data

import diffagents
from diffagents.config.presets import load_presets, resolve_preset
from diffagents.functional import LEAST_GAIN, gradient_ascent_loss, returns_to_go, spread_gradient
from diffagents.training.plan import Plan, opening_steps
from diffagents.training.state import training_tensors
from diffagents.training.updates import Update

DATA = line_data()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_default_and_none_is_the_plain_config(name: str) -> None:
    cls = agent_class(name)
    default, fast, plain = cls(), cls(preset="fast"), cls(preset=None)
    assert (default.preset, default.config, default.policy_kwargs) == ("fast", fast.config, fast.policy_kwargs)
    block = load_presets(default.presets_name())["fast"]
    values = {key: value for key, value in block.items() if key not in ("source", "policy_kwargs")}
    assert {key: getattr(default.config, key) for key in values} == values
    assert (plain.preset, plain.config, plain.policy_kwargs) == (None, cls.Config(), {})
    assert cls(learning_rate=0.0123).config == dataclasses.replace(fast.config, learning_rate=0.0123)


def test_an_algorithm_without_presets_has_none() -> None:
    class Mine(diffagents.SRPO):
        """As if it derived from Agent in a user's script."""

        @classmethod
        def presets_name(cls) -> str:
            return "__main__"

    assert (Mine().preset, Mine().config) == (None, diffagents.SRPO.Config())
    with pytest.raises(ValueError, match="there are no presets for '__main__'"):
        Mine(preset="auto")


def test_what_contradicts_it_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"'policy' needs precondition=True.*; preset='fast' set the other value: .*preset=None"
    ):
        diffagents.SRPO(precondition=False)
    with pytest.raises(ValueError, match="beta=-1 must be positive") as caught:
        diffagents.SRPO(beta=-1)
    assert "preset" not in str(caught.value)
    assert not diffagents.SRPO(preset=None, precondition=False).config.precondition


def test_it_is_announced_in_a_word_and_a_row_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    small("TD3BC", verbose=1).learn(DATA)
    assert [line for line in capsys.readouterr().out.splitlines() if "preset" in line] == ["preset 'fast' (see .config)"]
    small("IQL", preset="hopper-medium", verbose=1).learn(DATA)
    assert "preset 'hopper-medium': hopper-medium; {'reward_transform': 'iql_locomotion'" in capsys.readouterr().out
    small("TD3BC", preset=None, verbose=1).learn(DATA)
    assert "preset" not in capsys.readouterr().out


def test_an_agent_that_is_saved_keeps_the_recipe_of_its_day(tmp_path: Path) -> None:
    """As if the block of the file had been another one then: nothing of today's is mixed in, on loading or on learning."""
    agent: Any = diffagents.SRPO(
        verbose=0, seed=0, device="cpu", critic_steps=2, behavior_steps=2, policy_steps=2, batch_size=8
    )
    agent.config = dataclasses.replace(agent.config, beta=0.07, q_layer_norm=False, behavior_batch_size=8)
    agent.policy_kwargs = {"net_arch": [8], "behavior_width": 8}  # three blocks, as in the paper
    agent.set_env("Pendulum-v1")
    data = line_data(100, act_dim=1)
    loaded: Any = diffagents.load(agent.save(tmp_path / "new"), verbose=0, device="cpu")
    for one in (loaded, loaded.clone(), loaded.learn({**data, "actions": 2 * data["actions"]}), loaded.clone()):
        assert (one.preset, one.config, one.policy_kwargs) == ("fast", agent.config, agent.policy_kwargs)
        assert len(one.behavior.net.net.blocks) == 3
    assert set(loaded.explicit) == {"critic_steps", "behavior_steps", "policy_steps", "batch_size"}


@pytest.mark.parametrize("share", [0.2, 0.7])  # where one stage is all, in its opening and after it
@pytest.mark.parametrize("name", NAMES)
def test_interrupted_and_saved_it_ends_as_the_whole_run(name: str, share: float, tmp_path: Path) -> None:
    whole = small(name, preset="fast").learn(DATA)
    half = small(name, preset="fast")
    half.learn(DATA, callback=lambda local, _: local["self"].num_timesteps < share * local["self"].plan.total)
    assert half.plan is not None and half.plan.remaining > 0
    again = diffagents.load(half.save(tmp_path / "half.zip"), verbose=0, device="cpu")
    again.learn(DATA, reset_num_timesteps=False)
    for key, value in training_tensors(whole).items():
        torch.testing.assert_close(training_tensors(again)[key], value, atol=0, rtol=0, msg=key)
    obs = np.zeros((4, 3), np.float32)
    np.testing.assert_array_equal(again.predict(obs, deterministic=True)[0], whole.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("name", NAMES)
def test_its_values_are_known_before_learning_and_give_way_to_explicit_ones(name: str) -> None:
    agent = small(name, preset="fast", learning_rate=0.0123)
    values = resolve_preset(agent.presets_name(), "fast", None)[1]
    kept = {"normalize_obs", "precondition", "return_temperature", "q_layer_norm", "cosine", "bootstrap"} & set(values)
    assert {key: getattr(agent.config, key) for key in kept} == {key: values[key] for key in kept}
    assert agent.config.learning_rate == 0.0123
    assert type(agent)(preset=None).config == type(agent).Config()


def test_without_it_every_piece_is_off() -> None:
    for name in NAMES:
        config = dataclasses.asdict(type(small(name)).Config())
        off: dict[str, Any] = {
            "precondition": False, "return_temperature": None, "returns_share": 0.0, "cosine": False,
            "q_norm": "none" if name == "BDPO" else "value", "deterministic_backup": False, "bootstrap": "expectile",
            "constraint": "data",
        }  # fmt: skip
        assert {key: config[key] for key in off.keys() & config.keys()} == {key: off[key] for key in off.keys() & config.keys()}


def test_a_subclass_elsewhere_shares_the_presets_of_its_algorithm() -> None:
    class Mine(diffagents.SRPO):
        """As in a user's script."""

    assert Mine(preset="fast", verbose=0).config == diffagents.SRPO(preset="fast", verbose=0).config


def test_what_builds_on_the_clone_needs_it() -> None:
    with pytest.raises(ValueError, match="bootstrap='policy' needs precondition=True"):
        diffagents.SRPO(preset=None, bootstrap="policy")
    with pytest.raises(ValueError, match="constraint='behavior' needs returns_share"):
        diffagents.DiffCPS(preset=None, constraint="behavior")
    agent = small("SRPO", preset="fast")
    with pytest.raises(ValueError, match="which the behaviour stage trains"):
        agent.learn(DATA, stages=("critic",))
    agent.learn(DATA, stages=("behavior",)).learn(DATA, stages=("critic",))


# ---- its pieces ------------------------------------------------------------------------------------------------------
def test_srpo_starts_its_policy_as_the_clone_also_when_the_policy_is_new() -> None:
    agent: Any = small("SRPO", preset="fast").learn(DATA, stages=("behavior", "critic"))
    obs = torch.randn(50, 3)
    torch.testing.assert_close(agent.policy(obs), agent.behavior.net.clone(obs), atol=0, rtol=0)
    agent.learn(DATA, stages=("policy",))
    again: Any = agent.clone(fresh=("policy",), policy_steps=1, learning_rate=1e-9).learn(DATA, stages=("policy",))
    torch.testing.assert_close(again.policy(obs), agent.behavior.net.clone(obs), atol=1e-6, rtol=0)


def test_a_second_behaviour_stage_leaves_the_trained_policy_alone() -> None:
    agent: Any = small("SRPO", preset="fast").learn(DATA)
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    agent.learn(DATA, stages=("behavior",))
    for name, value in agent.policy.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_online_without_data(name: str) -> None:
    agent = small(name, preset="fast", env="Pendulum-v1").learn_online(260, learning_starts=210, log_interval=1000)
    assert agent.state.n_updates == 50
    assert agent.reward_transform is not None and agent.reward_transform.name == "none"


def test_clones_see_the_best_episodes_and_critics_half_of_all() -> None:
    rng = np.random.default_rng(0)
    reward = np.repeat(rng.permutation(10), 10).astype(np.float32)  # of ten episodes of ten steps
    data = {**line_data(100), "rewards": reward}
    sampler = diffagents.load_dataset(data).sampler("cpu").prefer_returns(0.05)
    generator = torch.Generator().manual_seed(0)
    best = sampler.sample(4000, generator, True).rew
    mixed = sampler.sample(4000, generator).rew
    share = 1.0 / sum(np.exp(-k / 9 / 0.05) for k in range(10))
    assert abs(float((best == 9).float().mean()) - share) < 0.03
    assert abs(float((mixed == 9).float().mean()) - 0.5 * (share + 0.1)) < 0.03
    equal = diffagents.load_dataset({**data, "rewards": np.ones(100, np.float32)}).sampler("cpu")
    assert equal.prefer_returns(0.05).cumulative is None


def test_returns_go_on_after_a_time_out_and_end_at_a_termination() -> None:
    rew, gamma = torch.tensor([5.0, 1.0, 1.0, 1.0]), 0.5  # the horizon is two steps
    ended = returns_to_go(rew, torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([4]), gamma)
    cut = returns_to_go(rew, torch.zeros(4), torch.tensor([4]), gamma)
    torch.testing.assert_close(ended, torch.tensor([5 + 0.5 * 1.75, 1.75, 1.5, 1.0]))
    torch.testing.assert_close(cut, torch.tensor([6.0, 2.0, 2.0, 2.0]))


def test_the_ascent_does_not_depend_on_the_scale_of_a_steep_q() -> None:
    gradient, act, var = torch.randn(8, 2), torch.randn(8, 2, requires_grad=True), torch.tensor([0.25, 0.5])

    def ascent(k: float) -> torch.Tensor:
        return torch.autograd.grad(gradient_ascent_loss(lambda a: (k * gradient * a).sum(-1), act, var), act)[0]

    torch.testing.assert_close(ascent(10.0), ascent(100.0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ascent(1.0), -spread_gradient(gradient, var) / 16)


def test_steps_are_measured_in_the_spread_of_the_data_and_bounded() -> None:
    """In a = m + sqrt(v) u: u = sqrt(v) g / r, divided by sqrt(1 + mean u^2) in each row."""
    torch.manual_seed(0)
    gradient, var = torch.randn(500, 3), torch.tensor([0.01, 0.2, 1.0])
    gradient[0] *= 1000.0
    step = spread_gradient(gradient, var) / var.sqrt()
    u = var.sqrt() * gradient
    u = u / (u.square().mean() + LEAST_GAIN**2).sqrt()
    size = u.square().mean(-1, keepdim=True)
    torch.testing.assert_close(step, u / (1.0 + size).sqrt())
    assert 0.99 < step[0].square().mean().sqrt() < 1.0 and step.square().mean(-1).max() < 1.0


def test_a_value_that_promises_little_is_followed_little() -> None:
    """With gradients much below LEAST_GAIN, the step is v g / LEAST_GAIN, whatever its size among the others."""
    gradient, var = 1e-3 * LEAST_GAIN * torch.randn(500, 3), torch.tensor([0.01, 0.2, 1.0])
    torch.testing.assert_close(spread_gradient(gradient, var), var * gradient / LEAST_GAIN, rtol=1e-4, atol=0.0)


def test_unit_returns_have_standard_deviation_one() -> None:
    data = diffagents.load_dataset(line_data())
    transform = data.fit_reward_transform("unit_returns")
    returns = returns_to_go(transform(data.rew), data.done, data.episode_ends, 0.99)
    assert abs(float(returns.std()) - 1.0) < 0.01 and transform.shift == 0.0


def test_the_opening_belongs_to_the_first_plan_alone() -> None:
    plan = Plan({"train": 100}, {"train": 30})
    assert opening_steps(0.4, plan, "train", {"train": 30}) == 40
    assert opening_steps(0.4, plan, "train", {"train": 130}) == 0
    assert opening_steps(0.4, None, "train", {"train": 0}) == 0


def test_an_update_stops_before_its_stop() -> None:
    update = Update(every=2, start=1, stop=6)
    due = [step for step in range(10) if update.due(step)]
    assert due == [1, 3, 5]
    for first in range(10):
        for last in range(first, 11):
            assert update.times(first, last) == len([step for step in due if first <= step < last])
