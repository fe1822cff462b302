"""Names and addresses of this machine alone."""

import ipaddress

ORIGIN = r"https?://(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?"


def is_loopback(host: str) -> bool:
    """By name or by address; names are the same in any case, and with the dot of the root behind them."""
    host = host.lower().removesuffix(".")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
