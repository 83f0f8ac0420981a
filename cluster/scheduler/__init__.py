"""The global scheduler's decisions: prefix index, cost, admission. Pure."""

from core.compiled import prefer_compiled

prefer_compiled(__path__, __name__)
