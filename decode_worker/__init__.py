"""A decode replica: receives KV blocks, batches sequences continuously, streams their tokens."""

from core.compiled import prefer_compiled

prefer_compiled(__path__, __name__)
