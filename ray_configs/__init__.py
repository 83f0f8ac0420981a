"""Configurations: for `ray up`, for Serve, for this laptop."""
