"""How refused attempts are told from accepted ones, on packets composed by hand."""

from __future__ import annotations

import struct
from collections import deque

import pytest

from resilient_pool.testing._syn_sniffer import RefusalWatch, source_port


class Packets:
    """A raw socket's side that the watch reads."""

    def __init__(self) -> None:
        self.waiting: deque[bytes] = deque()

    def recv(self, size: int) -> bytes:
        if not self.waiting:
            raise BlockingIOError
        return self.waiting.popleft()


def packet(port: int, words: int = 5) -> bytes:
    """An IPv4 header of that many words, and the beginning of a TCP header."""
    return bytes([0x40 | words]) + bytes(4 * words - 1) + struct.pack("!HH", port, 5432)


@pytest.mark.parametrize("words", [5, 6, 15])
def test_the_client_is_known_by_its_port(words):
    """However long the options of the IP header are."""
    assert source_port(packet(50_123, words)) == 50_123


def test_what_nobody_accepted_was_refused():
    """Each attempt is taken once, with its own time, a repeated packet is the same attempt, and young ones wait."""
    packets = Packets()
    watch = RefusalWatch(packets)
    packets.waiting.extend([packet(1), packet(2)])
    watch.drain(10.0)
    packets.waiting.extend([packet(2), packet(3)])
    watch.drain(11.0)
    watch.accepted(1)
    watch.accepted(99)
    assert watch.take(10.5) == [10.0]
    assert watch.take(20.0) == [11.0]
    assert watch.take(20.0) == []
