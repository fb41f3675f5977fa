"""Transitions and their sampler: layout, units, uniformity, files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from diffagents.data.normalize import ObsNormalizer, RewardTransform
from diffagents.data.transitions import Transitions
from diffagents.types import Spec

N, S, A = 40, 3, 2
LOW, HIGH = np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32)


@pytest.fixture
def data() -> Transitions:
    g = torch.Generator().manual_seed(0)
    unit = torch.rand(N, A, generator=g) * 2 - 1
    return Transitions(
        obs=torch.randn(N, S, generator=g),
        action=torch.from_numpy(LOW) + (unit + 1) / 2 * torch.from_numpy(HIGH - LOW),
        rew=torch.arange(N, dtype=torch.float32),  # tells rows apart
        next_obs=torch.randn(N, S, generator=g),
        done=(torch.arange(N) % 10 == 9).float(),
        episode_ends=torch.tensor([10, 20, 30, 40]),
        episode_returns=torch.tensor([45.0, 145.0, 245.0, 1.0]),
        episode_lengths=torch.tensor([10, 10, 10, 10]),
        episode_whole=torch.tensor([True, True, True, False]),
        spec=Spec(spaces.Box(-np.inf, np.inf, (S,)), spaces.Box(LOW, HIGH)),
        info={"id": "made up", "n_steps": N},
    )


def test_a_batch_holds_rows_of_the_data_in_the_learners_units(data: Transitions) -> None:
    normalizer = ObsNormalizer(S).fit(data.obs)
    sampler = data.sampler("cpu", RewardTransform("x", 2.0, -1.0), normalizer)
    batch = sampler.sample(64, torch.Generator().manual_seed(1))
    rows = ((batch.rew + 1) / 2).long()
    torch.testing.assert_close(batch.obs, normalizer(data.obs[rows]))
    torch.testing.assert_close(batch.next_obs, normalizer(data.next_obs[rows]))
    torch.testing.assert_close(batch.done, data.done[rows])
    back = data.spec.unscale_action(batch.act.numpy())
    np.testing.assert_allclose(back, data.action[rows].numpy(), atol=1e-5)
    assert batch.act.abs().max() <= 1
    assert [tuple(x.shape) for x in batch[:5]] == [(64, S), (64, A), (64,), (64, S), (64,)]
    assert torch.equal(sampler.with_extras(row=torch.arange(len(sampler))).gather(rows).extras["row"], rows)
    assert {x.dtype for x in batch[:5]} == {torch.float32}


def test_head_is_the_first_rows_with_their_episodes_cut(data: Transitions) -> None:
    sampler = data.sampler("cpu")
    first = int(data.episode_ends[0])
    few = sampler.head(first + 1)
    assert len(few) == first + 1 and few.episode_ends.tolist() == [first, first + 1]
    assert torch.equal(few.all().obs, sampler.all().obs[: first + 1])
    assert sampler.head(10**6).episode_ends.tolist() == torch.unique(data.episode_ends).tolist()


def test_without_transforms_nothing_changes_but_the_action_scale(data: Transitions) -> None:
    sampler = data.sampler("cpu")
    assert torch.equal(sampler.obs, data.obs)
    assert torch.equal(sampler.gather(torch.arange(N)).rew, data.rew)
    assert sampler.max_abs_reward == N - 1
    assert len(sampler) == len(data) == N


def test_building_a_sampler_leaves_data_and_normalizer_alone(data: Transitions) -> None:
    before, normalizer = data.obs.clone(), ObsNormalizer(S).fit(data.obs)
    state = {key: value.clone() for key, value in normalizer.state_dict().items()}
    data.sampler("cpu", obs_normalizer=normalizer)
    assert torch.equal(data.obs, before)
    assert all(torch.equal(value, state[key]) for key, value in normalizer.state_dict().items())


def test_sampling_is_uniform_with_replacement_and_repeatable(data: Transitions) -> None:
    sampler = data.sampler("cpu")
    n = 40_000
    noise = sampler.sample(n, torch.Generator().manual_seed(2)).rew.long()
    counts = torch.bincount(noise, minlength=N).double()
    chi2 = float(((counts - n / N) ** 2 / (n / N)).sum())
    assert chi2 < 72.1  # 99.9 % point of chi-square with 39 degrees of freedom
    again = sampler.sample(n, torch.Generator().manual_seed(2)).rew.long()
    assert torch.equal(noise, again)
    assert len(sampler.sample(3 * N, torch.Generator().manual_seed(0)).rew) == 3 * N


def test_a_large_set_is_filled_in_parts_without_seams(data: Transitions, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.sampler("cpu").matrix
    monkeypatch.setattr("diffagents.data.transitions._ROWS_AT_ONCE", 7)
    assert torch.equal(data.sampler("cpu").matrix, whole)


def test_the_range_of_returns_leaves_out_episodes_that_were_cut(data: Transitions) -> None:
    assert data.fit_reward_transform("iql_locomotion").scale == pytest.approx(1000 / (245 - 45))
    data.episode_whole[:] = False
    assert data.fit_reward_transform("iql_locomotion").scale == pytest.approx(1000 / (245 - 1))


def test_a_file_gives_back_the_same(data: Transitions, tmp_path: Path) -> None:
    data.save(tmp_path / "d.safetensors", extra={"made": [1, 2]})
    back = Transitions.load(tmp_path / "d.safetensors", extra={"made": [1, 2]})
    assert back.spec == data.spec
    assert back.info == data.info
    assert back.fingerprint() == data.fingerprint()
    for name in ("obs", "action", "rew", "next_obs", "done", "episode_returns", "episode_lengths", "episode_whole"):
        assert torch.equal(getattr(back, name), getattr(data, name)), name
    with pytest.raises(ValueError, match="made from other data"):
        Transitions.load(tmp_path / "d.safetensors", extra={"made": [1, 3]})


def test_a_file_of_another_format_is_refused(data: Transitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.save(tmp_path / "d.safetensors")
    monkeypatch.setattr("diffagents.data.transitions.FILE_FORMAT", 2)
    with pytest.raises(ValueError, match="format 1, but this version reads 2; save it again"):
        Transitions.load(tmp_path / "d.safetensors")


@pytest.mark.parametrize("name", ["obs", "action", "rew", "next_obs", "done", "episode_ends"])
def test_the_fingerprint_sees_every_column(data: Transitions, name: str) -> None:
    before = data.fingerprint()
    assert data.fingerprint() == before
    column = getattr(data, name)
    column.view(-1)[3] += 1
    assert data.fingerprint() != before
