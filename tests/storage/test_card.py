"""The model card: what its lines of code do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_agents import small

from diffagents.errors import ArtifactError, printable
from diffagents.evaluation.evaluate import Evaluation
from diffagents.storage.card import MARK, make_card, stored_env
from diffagents.storage.publish import renew_card


def lines_of_use(agent: Any, folder: Path, evaluated: bool | None, **more: Any) -> tuple[str, str]:
    """The calls of `predict` and `evaluate` on the card of an agent, evaluated deterministically or not, or not at all."""
    result = (
        None if evaluated is None else Evaluation((1.0, 2.0), (5, 5), env_id="Pendulum-v1", deterministic=evaluated, **more)
    )
    text = (agent.save_pretrained(folder, eval_env=result) / "README.md").read_text()
    assert evaluated is None or ("deterministic actions" in text) == evaluated != ("sampled actions" in text)
    (predict,) = (line for line in text.splitlines() if "agent.predict(" in line)
    (evaluate,) = (line for line in text.splitlines() if "agent.evaluate(" in line)
    return predict, evaluate.partition("  # the episodes")[0]


@pytest.mark.parametrize("meant", [True, False])
def test_its_code_acts_as_in_the_evaluation_and_says_so_only_if_it_must(meant: bool, tmp_path: Path) -> None:
    agent = small("DiffusionQL", env="Pendulum-v1", deterministic=meant)
    predict, evaluate = lines_of_use(agent, tmp_path, None)
    assert predict == "action, _ = agent.predict(obs)"
    assert evaluate == "# print(agent.evaluate(env, n_episodes=10))  # env: your environment, or its id"
    predict, evaluate = lines_of_use(agent, tmp_path, meant)
    assert predict == "action, _ = agent.predict(obs)"
    assert evaluate == 'print(agent.evaluate("Pendulum-v1", n_episodes=2, n_envs=10))'
    predict, evaluate = lines_of_use(agent, tmp_path, not meant)
    assert predict == f"action, _ = agent.predict(obs, deterministic={not meant})"
    assert evaluate == f'print(agent.evaluate("Pendulum-v1", n_episodes=2, n_envs=10, deterministic={not meant}))'


def test_its_code_repeats_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Number of episodes, resets, and what was chosen for them: the program is run as it is, in the folder above the policy."""
    agent = small("DiffusionQL", env="Pendulum-v1", deterministic=True, n_candidates=1)
    how = {"seed": 7, "env_kwargs": None, "n_envs": 10}
    usual = agent.evaluate("Pendulum-v1", 2, **how)
    result = agent.evaluate("Pendulum-v1", 2, **how, choice={"n_candidates": 40, "select": "argmax"})
    assert (
        usual.choice is None and result.choice == {"n_candidates": 40, "select": "argmax"} and result.returns != usual.returns
    )
    text = (agent.save_pretrained(tmp_path / "policy", eval_env=result) / "README.md").read_text()
    assert 'seed=7, n_envs=10, choice={"n_candidates": 40, "select": "argmax"}' in text
    assert 'agent.predict(obs, n_candidates=40, select="argmax")' in text
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    assert capsys.readouterr().out == f"{result}\n" and names["action"].shape == (1,)


@pytest.mark.parametrize("choice", [{"n_candidates": "__import__('os')"}, {"x)\nevil(": 1}, {"a": [1]}, {"a": 'b"'}, [1]])
def test_a_strangers_choice_does_not_become_a_program(choice: Any, tmp_path: Path) -> None:
    folder = small("TD3BC", env="Pendulum-v1").save_pretrained(tmp_path / "policy")
    results = {
        "mean_reward": 1.0,
        "std_reward": 1.0,
        "is_deterministic": True,
        "n_eval_episodes": 1,
        "seed": 0,
        "choice": choice,
    }
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(ArtifactError, match="the model card cannot be made"):
        renew_card(folder, "me/policy")


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


def card_of(tmp_path: Path, **changes: Any) -> str:
    """The card of a policy whose config.json was changed, e.g. by a stranger."""
    config = json.loads((small("TD3BC", env="Pendulum-v1").save_pretrained(tmp_path / "policy") / "config.json").read_text())
    data = {"id": "x", "kind": "arrays", "sha256": "", "n_steps": 1, "n_episodes": 1, "mean_return": 0.0}
    config["dataset"] = {**data, **changes.pop("dataset", {})}
    return make_card(config | changes, None, name="me/x")


def test_a_strangers_texts_become_neither_links_nor_mentions_nor_escapes(tmp_path: Path) -> None:
    evil = "\x1b[2J\u202ehttps://evil.example www.evil.example @someone me@evil.example\n---\n# Owned"
    source = {"source": {"repo_id": evil, "sha": evil}}
    text = card_of(tmp_path, dataset={"id": evil, "env_spec": json.dumps({"id": evil})}, provenance=source, seed=evil)
    assert printable(text) == text and "\n# Owned" not in text and text.count("\n---\n") == 1
    body = re.sub(r"```python.*?\n```", "", text.partition(MARK)[2], flags=re.DOTALL)
    assert not any(sign in body for sign in ("https:", "www.", "@")) and "https&#58;//evil.example" in body


def test_the_name_of_an_algorithm_cannot_be_a_program(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the algorithm has no name"):
        card_of(tmp_path, algorithm="x\n```\n<img>")


@pytest.mark.parametrize("spec", ["[" * 100_000, "[1]", "x", '{"id": 7}', '{"id": "P-v0", "kwargs": [1]}', 3])
def test_a_stored_environment_that_makes_no_sense_is_no_error(spec: Any) -> None:
    assert stored_env({"dataset": {"env_spec": spec}}) in (None, "P-v0 with kwargs=[1]")
    assert stored_env({"dataset": "x"}) is None


def test_what_is_nested_too_deeply_is_a_value_error(tmp_path: Path) -> None:
    deep: Any = 0
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        card_of(tmp_path, seed=deep)


def test_results_without_their_episodes_have_no_interval(tmp_path: Path) -> None:
    folder = small("TD3BC", env="Pendulum-v1").save_pretrained(tmp_path / "policy")
    results: dict[str, Any] = {"mean_reward": 1.0, "std_reward": 1.0, "is_deterministic": True, "n_eval_episodes": 2, "seed": 0}
    results |= {"env_id": "Pendulum-v1", "success_rate": 0.5}
    for episodes in ({}, {"returns": [0.0, 2.0], "successes": [True, False]}):
        (folder / "results.json").write_text(json.dumps({**results, **episodes}))
        renew_card(folder, "me/policy")
        text = (folder / "README.md").read_text()
        assert "**Return 1.00 ± 1.00**" in text and "Success rate: 50 % of the episodes" in text
        assert ("interval of the mean over these episodes" in text) == ("(95 % interval 9 to 91 %)" in text) == bool(episodes)
