"""The model card: what its lines of code do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_agents import small

from diffagents.evaluation.evaluate import Evaluation
from diffagents.storage.publish import renew_card


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


@pytest.mark.parametrize("field", ["n_eval_episodes", "seed", "env_id", "score_reference"])
def test_markup_of_a_strangers_results_does_not_reach_the_card(field: str, tmp_path: Path) -> None:
    folder = small("TD3BC", env="Pendulum-v1").save_pretrained(tmp_path / "policy")
    evil = "<img src=x onerror=alert(1)>\n\n# Owned"
    results = {
        "mean_reward": 1.0,
        "std_reward": 1.0,
        "returns": [0.0, 2.0],
        "is_deterministic": True,
        "n_eval_episodes": 10,
        "seed": 0,
        "env_id": "Pendulum-v1",
        "normalized_score": 1.0,
        "score_reference": ["table", 0.0, 1.0],
    }
    results[field] = evil if field != "score_reference" else [evil, 0.0, 1.0]
    (folder / "results.json").write_text(json.dumps(results))
    renew_card(folder, "me/policy")
    text = re.sub(r"```python.*?\n```", "", (folder / "README.md").read_text().split("---\n", 2)[2], flags=re.DOTALL)
    assert "<img" not in text.replace("\\<img", "") and "\n# Owned" not in text
    assert "10 episodes" in text or field == "n_eval_episodes"
