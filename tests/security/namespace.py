"""Runs a command in a network namespace of its own and writes down what it did to the network.

    unshare -Urn python -m tests.security.namespace REPORT COMMAND…

The namespace has loopback and one more interface with the default route, on which nobody answers. Every packet that
leaves by it is counted, and every listener that is not on loopback, sampled while the command runs.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

ALL = 0x0003  # ETH_P_ALL
LISTEN = "0A"


def listeners() -> set[str]:
    """Addresses off loopback that something listens on."""
    found = set()
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            loopback = address in ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
            if fields[3] == LISTEN and not loopback:
                found.add(f"{address}:{int(port, 16)}")
    return found


def main() -> int:
    report, command = Path(sys.argv[1]), sys.argv[2:]
    for words in (
        "link set lo up", "link add outside type veth peer name far", "addr add 10.99.0.1/24 dev outside", "link set outside up", "link set far up",
        "route add default via 10.99.0.2",
    ):  # fmt: skip
        subprocess.run(["ip", *words.split()], check=True)
    packets: list[str] = []
    open_ports: set[str] = set()
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL))
    sniffer.settimeout(0.05)
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            open_ports.update(listeners())
            try:
                data, (interface, *_) = sniffer.recvfrom(256)
            except TimeoutError:
                continue
            to_name_server = len(data) > 40 and data[23] == 17 and struct.unpack("!H", data[36:38])[0] == 53
            kind = struct.unpack("!H", data[12:14])[0]
            if to_name_server or (interface != "lo" and kind in (0x0800, 0x0806)):
                packets.append(f"{interface}: {data[:60].hex()}")

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = subprocess.run(command).returncode
    over.set()
    watcher.join()
    report.write_text(
        json.dumps({"code": code, "packets": packets[:20], "listeners": sorted(open_ports)}), encoding="utf-8"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
