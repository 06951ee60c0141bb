"""How XLA compiles for tests, and how it compiles for users."""

import os

import jax

FLAG = "--xla_cpu_use_fusion_emitters=false"
"""XLA's older way to emit code for CPUs, which compiles in about half the time."""


def compile_as_users_do(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """For tests that look at what XLA makes of a program: its text, its count of memory.

    LLVM, which comes after both, is in a hurry all the same.
    """
    options: dict[str, bool | int] = dict(xla_backend_optimization_level=0)
    if FLAG in os.environ.get("XLA_FLAGS", ""):
        options["xla_cpu_use_fusion_emitters"] = True
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        return lowered.compile(options)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
