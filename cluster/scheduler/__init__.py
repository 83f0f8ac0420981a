"""The global scheduler's decisions: prefix index, cost, admission. Pure."""

from cluster.compiled import prefer_compiled

prefer_compiled(__path__)
