"""Routing rules that others published, each over the production seam, to be compared with on equal terms."""
