"""Many requests: in batches, answered once, kept on disk as they come."""
