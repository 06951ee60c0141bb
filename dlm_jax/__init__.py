"""Diffusion language models in JAX."""
