"""A digital twin of the fleet: the production scheduler, pools and policies on a virtual clock."""
