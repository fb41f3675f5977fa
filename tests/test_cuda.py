"""On a GPU: a stage as CUDA graphs ends where eager steps end. Skipped where there is no CUDA device."""

import pytest
import torch
from small_agents import NAMES, small
from toy import line_data

from diffagents import learn_many

DATA = line_data()
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:action bounds"),
]


def close(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]], name: str) -> None:
    for network, state in one.items():
        for key, value in state.items():
            if (name, network, key) != ("QGPO", "energy", "net.4.bias"):  # its gradient is zero but for rounding
                torch.testing.assert_close(value, other[network][key], rtol=1e-4, atol=1e-5, msg=f"{network}.{key}")


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_ends_where_eager_steps_end(name: str) -> None:
    """Schedules, clipping, lagged copies, parts of every d-th step and the generator are inside the captured steps."""
    agents = {
        mode: small(name, device="cuda", compile=mode, tf32=False).learn(DATA, log_interval=5) for mode in ("eager", "graph")
    }
    assert agents["graph"].plan is not None and set(agents["graph"].plan.modes.values()) == {"graph"}
    close(agents["eager"].get_parameters(), agents["graph"].get_parameters(), name)
    assert torch.equal(agents["eager"].generator.get_state(), agents["graph"].generator.get_state())
    for ours, theirs in zip(agents["eager"].history, agents["graph"].history, strict=True):
        assert ours.keys() == theirs.keys()
        assert [value for value in ours.values() if isinstance(value, float)] == pytest.approx(
            [value for value in theirs.values() if isinstance(value, float)], rel=1e-3, abs=1e-5
        )


@pytest.mark.parametrize("name", ["SRPO", "DiffusionQL", "DiffCPS"])
def test_many_in_a_graph(name: str) -> None:
    def members(mode: str) -> list:
        return [small(name, seed=seed, device="cuda", compile=mode, tf32=False) for seed in range(2)]

    for agent, alone in zip(learn_many(members("graph"), DATA), members("eager"), strict=True):
        close(agent.get_parameters(), alone.learn(DATA).get_parameters(), name)


def test_tf32_is_on_while_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(local: dict, _: dict) -> bool:
        seen.append(torch.get_float32_matmul_precision())
        return True

    before = torch.get_float32_matmul_precision()
    small("TD3BC", device="cuda").learn(DATA, callback=look)
    assert set(seen) == {"high"} and torch.get_float32_matmul_precision() == before
    seen.clear()
    small("TD3BC", device="cuda", tf32=False).learn(DATA, callback=look)
    assert set(seen) == {before}
