"""Programs of the HumanEval tasks."""

from dlm_jax.eval import code
from dlm_jax.eval.tasks.programs import pass_at_k

__all__ = ["build_predictions", "pass_at_k"]


def build_predictions(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """What of prompt and response defines the function that is asked for."""
    return [
        [_program(response, doc) for response in of_one]
        for of_one, doc in zip(resps, docs, strict=True)
    ]


def _program(response: str, doc: dict) -> str:
    text = f"{doc['prompt']}\n{code.cut_fences(response)}"
    return code.sanitise(text, doc["entry_point"])
