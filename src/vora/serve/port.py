"""Whether a server may listen somewhere, asked before a model is loaded for it."""

import socket


def check_port(host: str, port: int | None) -> None:
    """ValueError where nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port or 0), family=family):
            pass
    except OSError as error:
        raise ValueError(
            f"Nothing can listen at {host}, port {port or 'any'} ({error.strerror}): give another --port."
        ) from None
