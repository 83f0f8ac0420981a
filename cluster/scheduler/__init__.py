"""The global scheduler's decisions: prefix index, cost, admission. Pure."""
