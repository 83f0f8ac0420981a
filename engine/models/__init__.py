"""What differs between model families, one module each."""
