"""A socket's path may be longer than its address."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mesh.linux.unix_sockets import unix_address


def test_a_socket_is_bound_and_reached_at_a_path_that_no_address_holds(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 200) / "here.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        with unix_address(path) as address:
            listener.bind(address)
        listener.listen()
        with unix_address(path) as address:
            client.connect(address)
        assert path.is_socket()


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConnectionError), unix_address(tmp_path / "x"):
        raise ConnectionError
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), unix_address(tmp_path / "no" / "x"):
        pass
