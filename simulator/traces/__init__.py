"""Recorded loads, read into requests that the twin can play."""
