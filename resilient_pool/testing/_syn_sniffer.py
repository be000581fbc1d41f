"""Counts connection attempts that the kernel refuses; needs Linux, and root or CAP_NET_RAW."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import sys
from typing import Self

_SO_ATTACH_FILTER = 26
_RECEIVE_BUFFER = 1 << 20
_WORD_LENGTH = 4
_INSTRUCTION = struct.Struct("HBBI")
_PROGRAM = struct.Struct("HP")


class SynSniffer:
    """Reads the SYN packets that are sent to a port, whether it is open or closed.

    The kernel answers a SYN to a closed port with RST and reports it to no socket. The alternatives count something
    else: a listener that accepts and resets gives the client ECONNRESET in place of ECONNREFUSED, a socket filter on a
    listener drops the SYN, and the counters in /proc/net are for the whole host. So the packets are read, which takes a
    raw socket: Linux, and root or CAP_NET_RAW.

    Args:
        packets: A raw socket that receives the packets.
    """

    def __init__(self, packets: socket.socket) -> None:
        self._packets = packets
        self._unmatched: dict[int, float] = {}

    @classmethod
    def open(cls, host: str, port: int) -> Self | None:
        """Start to watch a port of an IPv4 address, or return None if this process may not."""
        if sys.platform != "linux":
            return None
        try:
            packets = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        except PermissionError:
            return None
        packets.setblocking(False)
        packets.bind((host, 0))
        packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        _attach(packets, _filter(port))
        sniffer = cls(packets)
        # Packets that came before the filter was attached may belong to other ports.
        sniffer.drain(0.0)
        sniffer.take(0.0)
        return sniffer

    def fileno(self) -> int:
        """Return what a selector needs."""
        return self._packets.fileno()

    def drain(self, now: float) -> None:
        """Read what has come."""
        with contextlib.suppress(BlockingIOError):
            while packet := self._packets.recv(_RECEIVE_BUFFER):
                self._unmatched.setdefault(source_port(packet), now)

    def accepted(self, client_port: int) -> None:
        """Take an attempt off the list, because a listener got it; its packet must have been read."""
        self._unmatched.pop(client_port, None)

    def take(self, until: float) -> list[float]:
        """Take and return the times of the attempts, no later than `until`, that were not accepted."""
        taken = {port: at for port, at in self._unmatched.items() if at <= until}
        for port in taken:
            del self._unmatched[port]
        return sorted(taken.values())

    def close(self) -> None:
        """Stop watching."""
        self._packets.close()


def source_port(packet: bytes) -> int:
    """Return the source port of an IPv4 packet with a TCP header."""
    port: int = struct.unpack_from("!H", packet, (packet[0] & 0xF) * _WORD_LENGTH)[0]
    return port


def _filter(port: int) -> list[tuple[int, int, int, int]]:
    # A classic BPF program, as tcpdump would write it: "tcp dst port N, SYN set and ACK not".
    return [
        (0xB1, 0, 0, 0),  # X = length of the IP header
        (0x48, 0, 0, 2),  # A = destination port
        (0x15, 0, 4, port),  # another port: reject
        (0x50, 0, 0, 13),  # A = TCP flags
        (0x54, 0, 0, 0x12),  # A &= SYN | ACK
        (0x15, 0, 1, 0x02),  # not SYN alone: reject
        (0x06, 0, 0, 0xFFFF),  # accept
        (0x06, 0, 0, 0),  # reject
    ]


def _attach(packets: socket.socket, program: list[tuple[int, int, int, int]]) -> None:
    code = b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)
    kept = ctypes.create_string_buffer(code, len(code))
    packets.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(len(program), ctypes.addressof(kept)))
