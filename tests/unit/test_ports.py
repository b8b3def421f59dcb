"""Ports on loopback that are chosen one after another, before anybody listens."""

import socket

import pytest

from ops import ports
from ops.ports import LOOPBACK, choose_port, keep_port


def test_ports_that_are_chosen_at_once_differ() -> None:
    assert len({choose_port() for _ in range(100)}) == 100


def test_a_port_that_is_kept_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = choose_port(), choose_port()
    monkeypatch.setattr(ports, "_PORTS", range(min(first, second), min(first, second) + 1))
    monkeypatch.setattr(ports, "_kept", [])
    keep_port(min(first, second))
    with pytest.raises(StopIteration):
        choose_port()


def test_the_wanted_port_is_given_again_unless_somebody_listens() -> None:
    port = choose_port()
    assert choose_port(port) == port
    with socket.socket() as taken:
        taken.bind((LOOPBACK, port))
        taken.listen()
        assert choose_port(port) != port
