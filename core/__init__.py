"""The words every plane speaks: configuration, requests, messages, KV layout, block hash, errors, telemetry."""
