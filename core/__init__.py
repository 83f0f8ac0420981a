"""The words every plane speaks: configuration, requests, messages, KV layout, block hash, errors, telemetry."""

from core.compiled import prefer_compiled

prefer_compiled(__path__, __name__)
