"""The model card: what its lines of code do."""

from pathlib import Path
from typing import Any

import pytest
from small_agents import small

from diffagents.evaluation.evaluate import Evaluation


def lines_of_use(agent: Any, folder: Path, evaluated: bool | None) -> tuple[str, str]:
    """The calls of `predict` and `evaluate` on the card of an agent, evaluated deterministically or not, or not at all."""
    result = None if evaluated is None else Evaluation((1.0, 2.0), (5, 5), env_id="Pendulum-v1", deterministic=evaluated)
    text = (agent.save_pretrained(folder, eval_env=result) / "README.md").read_text()
    assert evaluated is None or ("deterministic actions" in text) == evaluated != ("sampled actions" in text)
    (predict,) = (line for line in text.splitlines() if "agent.predict(" in line)
    (evaluate,) = (line for line in text.splitlines() if "agent.evaluate(" in line)
    return predict.partition("  #")[0], evaluate


@pytest.mark.parametrize("meant", [True, False])
def test_its_code_acts_as_in_the_evaluation_and_says_so_only_if_it_must(meant: bool, tmp_path: Path) -> None:
    agent = small("DiffusionQL", env="Pendulum-v1", deterministic=meant)
    env = '"Pendulum-v1"'
    for evaluated in (None, meant):
        predict, evaluate = lines_of_use(agent, tmp_path, evaluated)
        assert predict == "action, _ = agent.predict(obs)"
        assert evaluate == f"print(agent.evaluate({'env' if evaluated is None else env}, n_episodes=10))"
    predict, evaluate = lines_of_use(agent, tmp_path, not meant)
    assert predict == f"action, _ = agent.predict(obs, deterministic={not meant})"
    assert evaluate == f"print(agent.evaluate({env}, n_episodes=10, deterministic={not meant}))"


def test_a_policy_without_randomness_needs_no_word(tmp_path: Path) -> None:
    agent = small("TD3BC", env="Pendulum-v1")
    assert {lines_of_use(agent, tmp_path, how)[0] for how in (None, True, False)} == {"action, _ = agent.predict(obs)"}
