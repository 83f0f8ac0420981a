"""The process that every rank runs, whatever its role: engine thread, transfer agent, RPC server, control loop."""

from core.compiled import prefer_compiled

prefer_compiled(__path__, __name__)
