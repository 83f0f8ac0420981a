"""A Ray Serve config file that carries our configuration tree as the arguments of its applications."""

from typing import Any

from core.errors import ConfigurationError

IMPORT_PATH = "cluster.serve_app:front"


def application_args(tree: dict[str, Any]) -> dict[str, Any]:
    """The configuration tree inside: `args` of the one application whose `import_path` is ours.

    Raises ConfigurationError when there is none, or more than one, or its `args` are no mapping.
    """
    applications = tree.get("applications")
    if not isinstance(applications, list) or not all(isinstance(a, dict) for a in applications):
        raise ConfigurationError("applications must be a list of mappings", field="applications")
    ours = [application for application in applications if application.get("import_path") == IMPORT_PATH]
    if len(ours) != 1:
        raise ConfigurationError(
            f"applications must hold exactly one with import_path {IMPORT_PATH}, not {len(ours)}", field="applications"
        )
    args = ours[0].get("args") or {}
    if not isinstance(args, dict):
        raise ConfigurationError(f"args of the application {IMPORT_PATH} must be a mapping", field="applications.args")
    return args


def require_same_http(tree: dict[str, Any], host: str, port: int) -> None:
    """Raises ConfigurationError when a Serve config's http_options are not the ingress section's host and port.

    `serve deploy` goes by the first, `baton serve` by the second. A tree without applications has no http_options.
    """
    options = tree.get("http_options") or {}
    if "applications" not in tree:
        return
    for name, ours, default in (("host", host, "0.0.0.0"), ("port", port, 8000)):
        theirs = options.get(name, default)
        if theirs != ours:
            message = f"http_options.{name} is {theirs}, but ingress.{name} is {ours}"
            raise ConfigurationError(message, field=f"http_options.{name}")
