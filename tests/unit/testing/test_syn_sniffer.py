"""How refused attempts are distinguished from accepted ones, on packets composed by hand."""

from __future__ import annotations

import struct
from collections import deque

import pytest

from resilient_pool.testing._syn_sniffer import SynSniffer, source_port


class Packets:
    """The raw socket that the sniffer reads."""

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


def test_an_attempt_that_was_not_accepted_was_refused():
    """Each attempt is taken once, with its own time, a repeated packet is the same attempt, and young ones wait."""
    packets = Packets()
    sniffer = SynSniffer(packets)
    packets.waiting.extend([packet(1), packet(2)])
    sniffer.drain(10.0)
    packets.waiting.extend([packet(2), packet(3)])
    sniffer.drain(11.0)
    sniffer.accepted(1)
    sniffer.accepted(99)
    assert sniffer.take(10.5) == [10.0]
    assert sniffer.take(20.0) == [11.0]
    assert sniffer.take(20.0) == []
