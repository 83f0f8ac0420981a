"""How many replicas each pool shall have: signals in, targets out. Pure."""
