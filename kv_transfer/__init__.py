"""Moves paged KV blocks between replicas: leases, sessions, copy plans, channels."""
