"""A digital twin of the fleet: the production scheduler, pools and policies on a virtual clock."""

from core.compiled import prefer_compiled

prefer_compiled(__path__, __name__)
