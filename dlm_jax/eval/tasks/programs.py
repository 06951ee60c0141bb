"""Metrics of tasks whose answers are programs: only these run what a model wrote."""

from collections.abc import Sequence

from dlm_jax.eval import sandbox


def pass_at_k(
    references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
) -> dict[str, float]:
    """Mean probability that one of `k` programs passes the tests of its problem.

    Args:
        references: the tests of each problem.
        predictions: the programs for each problem.
        k: numbers of programs; one that is larger than the number of programs there are is skipped.

    Returns:
        "pass@k" -> mean over the problems, for each k.
    """
    counts = [
        _passed(tests, programs) for tests, programs in zip(references, predictions, strict=True)
    ]
    samples = min(len(programs) for programs in predictions)
    return {f"pass@{size}": _mean_pass(counts, size) for size in k if size <= samples}


def pass_at_1(references: Sequence[str], predictions: Sequence[str | Sequence[str]]) -> float:
    """Share of the programs that pass; each problem has one program or a list of them."""
    programs = [[p] if isinstance(p, str) else p for p in predictions]
    return pass_at_k(references, programs, k=[1])["pass@1"]


def _passed(tests: str, programs: Sequence[str]) -> tuple[int, int]:
    """How many programs there are, and how many pass."""
    outcomes = sandbox.run_all([f"{program}\n{tests}" for program in programs])
    return len(outcomes), sum(outcome.passed for outcome in outcomes)


def _mean_pass(counts: Sequence[tuple[int, int]], k: int) -> float:
    return sum(sandbox.pass_at_k(n, c, k) for n, c in counts) / len(counts)
