"""A decode replica: receives KV blocks, batches sequences continuously, streams their tokens."""
