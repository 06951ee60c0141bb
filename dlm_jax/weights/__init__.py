"""Where weights come from, below `dlm_jax.checkpoint`: files, the hub, adapters."""
