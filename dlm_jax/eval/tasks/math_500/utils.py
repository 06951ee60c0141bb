"""What math-500 shares with lm-evaluation-harness's Minerva tasks."""

from lm_eval.tasks.minerva_math.utils import (
    doc_to_text,
    list_fewshot_samples,
    process_docs,
    process_results,
)

__all__ = ["doc_to_text", "list_fewshot_samples", "process_docs", "process_results"]
