"""Evaluation with lm-evaluation-harness: importing this registers the model class `dlm_jax`."""

try:
    from dlm_jax.eval import tasks
    from dlm_jax.eval.model import DiffusionLM
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    raise ModuleNotFoundError(
        "dlm_jax.eval needs lm-evaluation-harness; install the extra eval: "
        "pip install 'dlm-jax[eval]'.",
        name=error.name,
    ) from error

__all__ = ["DiffusionLM", "tasks"]
