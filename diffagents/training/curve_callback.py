"""`CurveCallback`: a few cheap evaluations while a policy is trained, from which `evaluation.curves` draws its returns."""

import time
from typing import Any

from diffagents.errors import one_line, printable
from diffagents.evaluation.evaluate import evaluate
from diffagents.training.plan import Plan
from diffagents.training.provenance import note_evaluation
from diffagents.training.state import Learner


class CurveCallback:
    """A callback of `learn` that plays a few episodes at evenly spaced steps.

    The mean returns are kept in `agent.provenance["evaluations"]`, as those of SB3's EvalCallback, and drawn on the model card.
    The trained agent is the same with this callback and without it: it plays in environments of its own, and what the policy
    draws at random for it is given back. An evaluation that fails ends the evaluations, with a line, and never the training.

    Args:
        env: An environment id or a stored spec. None: the environment that is stored with the dataset; without one nothing is
            played.
        points: Number of evaluations, evenly spaced from the first step of the stage that trains the policy to the last step of
            the run, which is the last of them.
        n_episodes: Episodes of each, always with the same resets.
        share: Share of the training time that the evaluations may take, in [0, 1]. One that would exceed it is left out, but
            for the first and the last.
    """

    def __init__(self, env: Any = None, *, points: int = 8, n_episodes: int = 3, share: float = 0.05) -> None:
        if points < 1 or n_episodes < 1:
            raise ValueError(f"points and n_episodes must be at least 1, not {points} and {n_episodes}")
        self.env, self.points, self.n_episodes, self.share = env, points, n_episodes, share
        self.plan: Plan | None = None  # of the present call of `learn`
        self.due: list[int] | None = None  # values of num_timesteps; None before the policy's stage
        self.started = time.perf_counter()
        self.spent = self.last = 0.0

    def __call__(self, local: dict[str, Any], _: dict[str, Any]) -> bool:
        """Evaluate if it is time to; True, which lets training continue."""
        learner: Learner = local["self"]
        step, plan = learner.state.num_timesteps, learner.state.plan
        if plan is None or learner.state.exploring:  # learn_online has episodes of its own
            return True
        if plan is not self.plan:
            self.plan, self.due, self.started, self.spent = plan, None, time.perf_counter(), 0.0
        if self.due is None:
            begun = plan.done.get(learner.POLICY_STAGE, 0)
            if not begun:
                return True
            before, end = step - begun, step + plan.remaining
            steps = {before + round((end - before) * k / self.points) for k in range(1, self.points + 1)}
            self.due = sorted(due for due in steps if due >= step)
        if self.due and step >= self.due[0]:
            is_last = len(self.due) == 1
            self.due = [due for due in self.due if due > step]
            trained = time.perf_counter() - self.started - self.spent
            if is_last or self.spent + self.last <= self.share * trained or not self.spent:
                self._evaluate(learner)
        return True

    def _evaluate(self, learner: Learner) -> None:
        """Play the episodes, and keep their mean return."""
        env = self.env if self.env is not None else (learner.state.dataset_info or {}).get("env_spec")
        if env is None:
            self.due = []
            return
        begun, drawn = time.perf_counter(), learner.predict_generator.get_state()
        try:
            found = evaluate(learner, env, self.n_episodes, n_envs=self.n_episodes)
        except Exception as error:  # whatever an environment raises
            self.due = []
            if learner.verbose:
                print(f"no evaluations while training: {printable(one_line(error))}", flush=True)
            return
        finally:
            learner.predict_generator.set_state(drawn)
            self.last = time.perf_counter() - begun
            self.spent += self.last
        note_evaluation(learner.state.provenance, learner.state.num_timesteps, found.mean_return)
        if learner.verbose:
            print(f"{'return':>8} {found.mean_return:.2f} in {self.n_episodes} episodes", flush=True)
