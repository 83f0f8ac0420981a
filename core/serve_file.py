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
