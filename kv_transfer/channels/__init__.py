"""Channels: how the bytes of one ordered (sender rank, receiver rank) pair travel."""
