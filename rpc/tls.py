"""gRPC's credentials, and what a failed handshake says about two ends that differ in `cluster.tls`."""

import grpc

from core.security import TlsConfig

_WHY = {  # of what gRPC says, when we speak TLS
    "WRONG_VERSION_NUMBER": "it speaks no TLS, and we do (cluster.tls)",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not signed by our cluster.tls.ca_file, or has expired",
    "Hostname Verification": "its certificate does not carry our cluster.tls.server_name",
    "Socket closed": "it speaks no TLS, or refuses our certificate (cluster.tls)",
}


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """Callers without a certificate of the fleet's CA are refused. Raises ConfigurationError naming a bad file."""
    files = tls.read()
    return grpc.ssl_server_credentials([(files.key, files.certificate)], files.ca, require_client_auth=True)


def channel_credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    """Raises ConfigurationError naming a bad file."""
    files = tls.read()
    return grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)


def name_option(tls: TlsConfig) -> tuple[str, str]:
    """The channel option that has the fleet's name looked for in a certificate, in place of the peer's address."""
    return ("grpc.ssl_target_name_override", tls.server_name)


def why_refused(details: str, tls: TlsConfig) -> str:
    """What differs, as far as the text of a failed connection tells; empty when it is not about TLS."""
    if not details.startswith("failed to connect"):
        return ""
    if tls.is_on:
        return next((why for sign, why in _WHY.items() if sign in details), "")
    return "it may speak TLS, and we do not (cluster.tls)" if "Socket closed" in details else ""
