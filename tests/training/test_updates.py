"""The engine's own pieces: optimiser and schedule against PyTorch's, parts, sums of metrics, the steps of a stage."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from diffagents.data.sampler import Sampler
from diffagents.training.state import load_optimizer, optimizer_tensors
from diffagents.training.updates import MetricSums, Optimizer, Runner, Stage, Update

N_STEPS = 20
SHAPES = [(5, 4), (4,), (2, 3, 4), ()]
SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"weight_decay": 0.1},
    "cosine": {"cosine": True},
    "clipped": {"max_grad_norm": 0.7},
    "all": {"weight_decay": 0.1, "cosine": True, "max_grad_norm": 0.7},
}
settings = pytest.mark.parametrize("kind", SETTINGS)


def parameters(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def gradients(n: int = N_STEPS) -> list[list[Tensor]]:
    """For each step; some steps are steep and some are flat, so that clipping acts in some."""
    generator = torch.Generator().manual_seed(1)
    return [[10.0 ** (k % 3 - 1) * torch.randn(shape, generator=generator) for shape in SHAPES] for k in range(n)]


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance)


@settings
def test_a_step_is_pytorchs(kind: str) -> None:
    """Twenty steps beside Adam or AdamW, CosineAnnealingLR and clip_grad_norm_: the same parameters and moments."""
    given = SETTINGS[kind]
    ours = Optimizer(own := parameters(), 3e-2, **given)
    ours.start_schedule(N_STEPS)
    decay = given.get("weight_decay")
    twins = parameters()
    theirs: Any = torch.optim.Adam(twins, 3e-2) if decay is None else torch.optim.AdamW(twins, 3e-2, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, N_STEPS) if given.get("cosine") else None
    for some in gradients():
        ours.step([one.clone() for one in some])
        for parameter, one in zip(twins, some, strict=True):
            parameter.grad = one.clone()
        if "max_grad_norm" in given:
            torch.nn.utils.clip_grad_norm_(twins, given["max_grad_norm"])
        assert float(ours.lr) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-6, abs=1e-9)
        theirs.step()
        if schedule is not None:
            schedule.step()
    # another kernel rounds otherwise: float32 has 1.2e-7 of a number of size 1
    close(own, twins, 5e-7)
    for a, b in zip(own, twins, strict=True):
        mine, its = ours.state[a], theirs.state[b]
        assert float(mine["step"]) == float(its["step"]) == N_STEPS
        torch.testing.assert_close(mine["exp_avg"], its["exp_avg"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mine["exp_avg_sq"], its["exp_avg_sq"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay", [None, 0.1])
def test_the_direct_call_of_the_kernel_is_the_fused_optimizers_step(decay: float | None) -> None:
    """torch.optim with the same kernel: equal to the bit, moments and counts too."""
    ours, twins = Optimizer(parameters(), 3e-2, weight_decay=decay), parameters()
    lr = torch.tensor(3e-2)
    theirs: Any = (
        torch.optim.Adam(twins, lr, fused=True)
        if decay is None
        else torch.optim.AdamW(twins, lr, weight_decay=decay, fused=True)
    )
    for some in gradients():
        ours.step([one.clone() for one in some])
        for parameter, one in zip(twins, some, strict=True):
            parameter.grad = one.clone()
        theirs.step()
    close(ours.parameters, twins, 0.0)
    for a, b in zip(ours.parameters, twins, strict=True):
        for key, value in theirs.state[b].items():
            assert torch.equal(ours.state[a][key], value), key


@settings
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "in-place"])
def test_saved_and_loaded_in_the_middle_it_goes_on_to_the_bit(kind: str, fresh: bool) -> None:
    """Into a new optimiser over copied parameters, or into one that has gone astray meanwhile."""
    whole = Optimizer(parameters(), 3e-2, **SETTINGS[kind])
    whole.start_schedule(N_STEPS)
    steps = gradients()
    for some in steps[:7]:
        whole.step([one.clone() for one in some])
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(whole, "o").items()}
    weights = [p.detach().clone() for p in whole.parameters]
    other = Optimizer(copy.deepcopy(whole.parameters), 3e-2, **SETTINGS[kind])
    if not fresh:
        for some in steps[3:6]:
            other.step([one.clone() for one in some])
        with torch.no_grad():
            for parameter, weight in zip(other.parameters, weights, strict=True):
                parameter.copy_(weight)
    load_optimizer(other, saved, "o")
    other.start_schedule(N_STEPS, 7)
    for some in steps[7:]:
        whole.step([one.clone() for one in some])
        other.step([one.clone() for one in some])
    close(whole.parameters, other.parameters, 0.0)
    for name, tensor in optimizer_tensors(whole, "o").items():
        assert torch.equal(optimizer_tensors(other, "o")[name], tensor), name
    assert torch.equal(whole.lr, other.lr)


def test_gradients_in_another_order_of_memory() -> None:
    """The fused kernel reads memory in order; compiled code may give a gradient whose strides are not the parameter's."""
    steps = gradients()
    plain, odd = Optimizer(parameters(), 3e-2), Optimizer(parameters(), 3e-2)
    for some in steps[:4]:
        plain.step([one.clone() for one in some])
        turned = [one.transpose(0, -1).contiguous().transpose(0, -1) if one.dim() > 1 else one.clone() for one in some]
        assert not turned[0].is_contiguous() and torch.equal(turned[0], some[0])
        odd.step(turned)
    close(plain.parameters, odd.parameters, 0.0)
    expanded = torch.tensor(0.5).expand(5, 4)
    plain.step([expanded.contiguous(), *steps[4][1:]])
    odd.step([expanded, *steps[4][1:]])
    close(plain.parameters, odd.parameters, 0.0)


def test_the_schedule_ends_at_zero_and_begins_anew() -> None:
    optimizer = Optimizer(parameters(), 1e-2, cosine=True)
    optimizer.start_schedule(4)
    rates = []
    for some in gradients(6):
        optimizer.step(some)
        rates.append(float(optimizer.lr))
    assert rates == pytest.approx([1e-2, 0.5e-2 * (1 + 0.5**0.5), 0.5e-2, 0.5e-2 * (1 - 0.5**0.5), 0.0, 0.0], abs=1e-9)
    optimizer.start_schedule(4)
    optimizer.step(gradients(1)[0])
    assert float(optimizer.lr) == pytest.approx(1e-2)
    constant = Optimizer(parameters(), 1e-2)
    constant.start_schedule(4)
    for some in gradients(5):
        constant.step(some)
    assert float(constant.lr) == pytest.approx(1e-2)


# ---- parts, sums, steps --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("every", "start"), [(1, 0), (2, 1), (5, 3), (3, 10)])
def test_how_often_a_part_is_due(every: int, start: int) -> None:
    update = Update(every=every, start=start)
    due = [k for k in range(30) if update.due(k)]
    assert due == list(range(start, 30, every))
    for first in range(30):
        for last in range(first, 30):
            assert update.times(first, last) == sum(first <= k < last for k in due)


def test_gradients_reach_only_the_parameters_of_their_optimizer() -> None:
    """Two losses over one graph: each is minimised by its own optimiser, and nobody's `.grad` is touched."""
    one, two, frozen = (torch.tensor([value], requires_grad=True) for value in (2.0, 3.0, 5.0))

    def loss(batch: Any, noise: Any) -> Any:
        both = one * two * frozen
        return (both.sum(), (both * two).sum()), {"both": both.detach().sum()}

    update = Update(loss, optimizers=(Optimizer([one], 0.1), Optimizer([two], 0.1)))
    found, metrics = update.gradients(None, {})  # type: ignore[arg-type]
    assert [float(gradient[0]) for gradient in found] == [15.0, 60.0] and float(metrics["both"]) == 30.0
    assert one.grad is None and two.grad is None and frozen.grad is None
    update.apply(found)
    assert [float(x.detach()) for x in (one, two, frozen)] == pytest.approx([1.9, 2.9, 5.0])
    assert Update().gradients(None, {}) == ([], {})  # type: ignore[arg-type]


def test_sums_of_metrics() -> None:
    sums = MetricSums()
    assert sums.take() == {}
    value = torch.tensor(0.0)
    for number in (1.0, 2.0, 6.0):
        value.fill_(number)  # in place: what was added before must not follow
        sums.add({"a": value, "b": -value})
    assert sums.count == 3 and sums.take() == {"a": 3.0, "b": -3.0}
    assert sums.count == 0 and sums.take() == {}
    sums.add({"a": torch.tensor(5.0), "b": torch.tensor(1.0)})
    assert sums.take() == {"a": 5.0, "b": 1.0}
    nothing = MetricSums()
    nothing.add({})
    assert nothing.take() == {}
    stacked = MetricSums()  # of many agents
    for number in (1.0, 3.0):
        stacked.add({"a": torch.tensor([number, -number])})
    assert stacked.take() == {"a": [2.0, -2.0]}


def test_one_batch_a_step_and_the_parts_that_are_due_in_order() -> None:
    """Means are over the steps at which a part was due, not over all."""
    weight, seen = torch.zeros(1, requires_grad=True), []

    def update(name: str, **when: int) -> Update:
        def loss(batch: Any, noise: Any) -> Any:
            seen.append((name, batch.obs, noise["z"]))
            return weight.sum(), {name: batch.obs.mean()}

        def draw(n: int, generator: torch.Generator) -> dict[str, Tensor]:
            return {"z": torch.randn(n, generator=generator)}

        return Update(loss, draw, (Optimizer([weight], 0.1),), lambda: seen.append((name, "after")), **when)  # type: ignore[arg-type]

    stage = Stage("s", 4, (update("first"), update("second", every=2, start=1)))
    sampler = Sampler(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), 2, 2)
    runner = Runner(stage, sampler, torch.Generator().manual_seed(3))
    for k in range(4):
        runner.step(k)
    names = [("second" if one[0] == "second" else "first", len(one)) for one in seen]
    both = [("first", 3), ("first", 2), ("second", 3), ("second", 2)]
    assert names == [*both[:2], *both, *both[:2], *both]
    assert torch.equal(seen[2][1], seen[4][1]) and not torch.equal(seen[0][1], seen[2][1]), "one batch a step"
    firsts = [one[1].mean().item() for one in seen if one[0] == "first" and len(one) == 3]
    seconds = [one[1].mean().item() for one in seen if one[0] == "second" and len(one) == 3]
    means = runner.means()
    assert means == pytest.approx({"first": sum(firsts) / 4, "second": sum(seconds) / 2}, rel=1e-5)
    replay = torch.Generator().manual_seed(3)
    assert torch.equal(sampler.sample(4, replay).obs, seen[0][1]) and torch.equal(torch.randn(4, generator=replay), seen[0][2])
    assert runner.means() == {}
