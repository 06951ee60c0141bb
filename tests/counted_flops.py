"""Matrix products of a small generation, counted by hand."""

from dlm_jax.decoding.config import DecodeConfig

P, G, BLOCK = 6, 8, 4
L = P + G
DECODE = DecodeConfig(gen_length=G, block_length=BLOCK, steps=G)


def flops_by_hand(config, size, *, read, narrow=True):
    """Matrix products of `size` queries that attend to all slots, and of `read` rows of logits.

    Where the last layer is `narrow`, it computes of the others keys and values only.
    """
    c = config
    attended = L * c.num_heads * c.head_dim
    kept = 2 * c.width * c.num_kv_heads * c.head_dim  # key and value projections
    per_query = (
        2 * c.width * c.num_heads * c.head_dim  # query and output projections
        + 2 * attended  # scores and sums of values
        + 3 * c.width * c.mlp_width
    )
    outputs = size * (c.num_layers - 1) + (min(size, read) if narrow else size)
    return 2 * (size * c.num_layers * kept + outputs * per_query + read * c.width * c.vocab_size)
