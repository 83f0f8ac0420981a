"""The process that every rank runs, whatever its role: engine thread, transfer agent, RPC server, control loop."""
