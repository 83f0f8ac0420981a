"""Everything that knows Ray: deployments, supervisors, ingress, global scheduler, command line."""
