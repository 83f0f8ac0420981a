"""`baton doctor`: whether hosts are fit to serve, before they do."""
