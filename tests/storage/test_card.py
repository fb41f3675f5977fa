"""The model card: what its lines of code do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from small_agents import small

import diffagents
from diffagents.errors import ArtifactError, printable
from diffagents.evaluation.evaluate import Evaluation
from diffagents.registry import AGENTS
from diffagents.storage.card import ACTS_ONLY, MARK, PAPERS, make_card, stored_env
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
    assert body.count(f"]({PAPERS['TD3BC'].link})") == 1  # the only link is ours
    body = body.replace(f"]({PAPERS['TD3BC'].link})", "]")
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
    for _ in range(100_000):  # from Python 3.13 on some thousands are not too deep
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        card_of(tmp_path, seed=deep)


def test_a_card_says_that_a_policy_can_only_act(tmp_path: Path) -> None:
    folder = small("TD3BC", env="Pendulum-v1").save_pretrained(tmp_path / "policy")
    assert ACTS_ONLY not in (folder / "README.md").read_text()
    (folder / "learner.safetensors").unlink()
    renew_card(folder, "me/policy")
    assert f"Note: {ACTS_ONLY}" in (folder / "README.md").read_text()
    again = diffagents.load(folder, verbose=0).save_pretrained(tmp_path / "again")
    assert f"Note: {ACTS_ONLY}" in (again / "README.md").read_text() and not (again / "learner.safetensors").exists()


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


ROOT = Path(__file__).resolve().parents[2]
HOPPER = {"id": "Hopper-v5"}


def compared(data: dict[str, Any], result: Evaluation | None, **results: Any) -> str:
    """The paragraph below the title of a card: the verdict if there is one, otherwise the return."""
    fields = {"id": "x", "kind": "arrays", "n_steps": 9, "n_episodes": 3, "std_return": 1.0, "env_spec": json.dumps(HOPPER)}
    config = {"algorithm": "SRPO", "dataset": {**fields, **data}}
    stored: dict[str, Any] | None = None
    if result is not None:
        stored = {"mean_reward": result.mean_return, "std_reward": result.std_return, "n_eval_episodes": len(result.returns)}
        stored |= {"is_deterministic": True, "normalized_score": result.score, **result.to_json(), **results}
    title, paragraph = make_card(config, stored, name="me/x").partition(MARK)[2].strip().split("\n\n")[:2]
    assert title.startswith("# SRPO")
    return paragraph


def played(*returns: float, env_id: str | None = "Hopper-v5", successes: tuple[bool, ...] | None = None) -> Evaluation:
    return Evaluation(returns, (5,) * len(returns), successes, env_id=env_id)


def test_it_says_whether_the_policy_beats_its_data() -> None:
    """On the D4RL scale where there is one, (x + 20.27) / 32.55 for Hopper, otherwise by returns or successes."""
    paragraph = compared({"mean_return": 2000.0}, played(3000.0, 3002.0))
    assert paragraph.startswith("**It beats its data: 92.8 against 62.1 on the D4RL scale.** ")
    assert compared({"mean_return": 3100.0}, played(3000.0, 3002.0)).startswith("**It stays below its data: 92.8 against 95.9 ")
    mine = {"mean_return": -4.0, "env_spec": json.dumps({"id": "Mine-v0"})}
    assert compared(mine, played(1.0, 1.5, env_id="Mine-v0")).startswith(
        "**It beats its data: a mean return of 1.25 against -4.00.** "
    )
    counted = {"mean_return": 0.25, "env_spec": json.dumps({"id": "Mine-v0"})}
    result = played(*[1.0] * 9, 0.0, env_id="Mine-v0", successes=(True,) * 9 + (False,))
    assert compared(counted, result).startswith("**It beats its data: 90 % against 25 % of the episodes succeed.** ")
    pushed = {"mean_return": 36.0, "env_spec": json.dumps({"id": "Mine-v0"})}
    assert not compared(pushed, played(114.0, 115.0, env_id="Mine-v0", successes=(False, False))).startswith("**It "), (
        "failing takes longer"
    )


def test_it_claims_nothing_that_the_episodes_leave_open() -> None:
    """The interval of two episodes, 3000 +- 1000, reaches from below zero to far above."""
    for mean in (2900.0, 3100.0):
        paragraph = compared({"mean_return": mean}, played(2000.0, 4000.0))
        assert paragraph.startswith("**It is neither clearly better nor clearly worse than its data: 92.8 against ")
        assert "The 95 % interval of the first number contains the second" in paragraph


@pytest.mark.parametrize(
    ("data", "result"),
    [
        ({"mean_return": 2000.0}, None),
        ({"mean_return": 2000.0}, played(3000.0)),  # one episode has no interval
        ({"mean_return": 2000.0}, played(3000.0, 3002.0, env_id="Walker2d-v5")),
        ({"mean_return": 2000.0, "env_spec": None}, played(3000.0, 3002.0)),
        ({"mean_return": 2000.0, "env_spec": None}, played(3000.0, 3002.0, env_id=None)),
        ({"mean_return": 0.0, "n_steps": 0, "n_episodes": 0}, played(3000.0, 3002.0)),  # learned online
        ({"mean_return": 0.0, "std_return": 0.0}, played(3000.0, 3002.0)),  # no rewards
        ({"mean_return": float("nan")}, played(3000.0, 3002.0)),
        ({"mean_return": "2000"}, played(3000.0, 3002.0)),
    ],
)
def test_what_cannot_be_compared_is_not(data: dict[str, Any], result: Evaluation | None) -> None:
    paragraph = compared(data, result)
    assert "its data" not in paragraph and paragraph.startswith(("**Return 30", "This policy has not been evaluated"))


def test_results_without_their_returns_are_not_compared() -> None:
    assert compared({"mean_return": 2000.0}, played(3000.0, 3002.0), returns=None).startswith("**Return 3001.00")


@pytest.mark.parametrize(
    ("kind", "identity", "repositories"),
    [
        ("minari", "mujoco/hopper/medium-v0", ["farama-minari/mujoco"]),
        ("minari", "D4RL/door/human-v2", ["farama-minari/D4RL"]),
        ("minari", "diffagents/hopper/medium-expert-v0", None),
        ("minari", "mujoco/my-robot/medium-v0", None),
        ("minari", "mujoco/hopper-medium-v0", None),
        ("minari", "farama-minari/mujoco/hopper/medium-v0", None),
        ("hdf5", "mujoco/hopper/medium-v0", None),
        ("arrays", "arrays", None),
    ],
)
def test_datasets_are_repositories_of_the_hub_or_absent(
    kind: str, identity: str, repositories: list[str] | None, tmp_path: Path
) -> None:
    """As huggingface_hub reads the front matter. The id of a Minari set is not one of the Hub."""
    text = card_of(tmp_path, dataset={"kind": kind, "id": identity})
    assert ModelCard(text).data.datasets == repositories
    assert ("datasets" in yaml.safe_load(text.split("---\n")[1])) == (repositories is not None)


@pytest.mark.parametrize("dataset", [None, {"kind": "minari"}, {"kind": "minari", "id": ["mujoco", "hopper", "x-v0"]}])
def test_a_dataset_without_an_id_names_no_repository(dataset: Any) -> None:
    assert "farama" not in make_card({"algorithm": "SRPO", "dataset": dataset}, None, name="me/x")


def test_each_algorithm_has_a_paper_that_the_rest_of_the_library_names_too(tmp_path: Path) -> None:
    """The card, the first lines of the algorithm's file, its page of the documentation, and CITATION.cff agree."""
    assert set(PAPERS) == set(AGENTS)
    cited = {paper["title"]: paper for paper in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]}
    for name, paper in PAPERS.items():
        file = ROOT / (AGENTS[name].replace(".", "/") + ".py")
        head = "\n".join(file.read_text().splitlines()[:3])
        page = (ROOT / "docs" / "algorithms" / f"{file.stem}.md").read_text()
        year = paper.source[-4:]
        assert f"title     = {{{paper.title}}}" in page or f"title   = {{{paper.title}}}" in page, name
        assert re.search(rf"year +=\s*\{{{year}\}}", page) and str(cited[paper.title]["year"]) == year and year in head, name
        if (arxiv := paper.link.removeprefix("https://arxiv.org/abs/")) != paper.link:
            assert f"arXiv:{arxiv}" in head and f"arXiv:{arxiv}" in page, name
            assert f"arXiv:{arxiv}" in [one["value"] for one in cited[paper.title]["identifiers"]], name
        text = card_of(tmp_path / name, algorithm=name)
        assert f"{name} {paper.role} [{paper.title}]({paper.link}) ({paper.source})." in text, name


def test_an_algorithm_of_the_users_own_has_no_paper(tmp_path: Path) -> None:
    assert "](http" not in card_of(tmp_path, algorithm="Mine")
