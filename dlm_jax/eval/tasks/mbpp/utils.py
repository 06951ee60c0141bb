"""Examples and programs of the MBPP tasks."""

from collections.abc import Iterable

from dlm_jax.eval import code
from dlm_jax.eval.tasks.programs import pass_at_1

__all__ = ["build_predictions", "examples", "pass_at_1"]

EXAMPLES = (2, 3, 4)  # task_id, within the data's own split for prompts


def examples(prompts: Iterable[dict]) -> list[dict]:
    """The problems that are shown before the question, in this order."""
    found = {doc["task_id"]: doc for doc in prompts}
    return [found[task_id] for task_id in EXAMPLES]


def build_predictions(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """The first fenced block of each response."""
    del docs
    return [[code.first_block(response) for response in of_one] for of_one in resps]
