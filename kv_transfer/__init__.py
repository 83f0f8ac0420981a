"""Moves paged KV blocks between replicas: leases, sessions, copy plans, channels."""

from core.compiled import prefer_compiled

prefer_compiled(__path__, __name__)
