"""Ports for servers that are given their number before they listen."""

import random
import socket
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LEAST = 20_000
"""Above those of Ray's workers."""


def free_ports(number: int) -> list[int]:
    """Ports where nothing listens, and which the system gives to nobody who leaves the choice to it.

    Those that it chooses itself it may give to another process before the server listens: a cluster takes hundreds.
    """
    most = int(RANGE.read_text().split()[0]) if RANGE.exists() else 1 << 15
    candidates = range(LEAST, most) if most > LEAST + number else range(1 << 15, 1 << 16)
    found: list[int] = []
    for port in random.SystemRandom().sample(candidates, len(candidates)):
        if len(found) == number:
            break
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        found.append(port)
    return found
