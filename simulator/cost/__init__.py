"""How long steps and transfers take on given GPUs and links: rooflines, and tables of measured kernels."""
