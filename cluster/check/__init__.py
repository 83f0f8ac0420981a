"""`baton check`: what a configuration will allocate, and why it cannot."""
