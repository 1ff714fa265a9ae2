"""The one case that nobody can know: the link dies right after "go". The operator decides."""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest

from kvmmig import stream

from .conftest import Kvmmig

pytestmark = pytest.mark.kvm


def vanish_after_go(server: socket.socket) -> None:
    """A destination that takes a guest, says that it is ready, hears "go", and is gone."""
    connection, _ = server.accept()
    encoder = stream.Encoder(stream.Direction.BACKWARDS)
    decoder = stream.Decoder(stream.Direction.FORWARDS)
    with connection:
        connection.sendall(encoder.preamble())
        while not decoder.finished:
            count = connection.recv_into(decoder.buffer())
            assert count, "the source has given up"
            match decoder.advance(count):
                case stream.Hello():
                    connection.sendall(encoder.signal(stream.Kind.ACCEPT))
                case stream.Pages(_, n_pages):
                    decoder.place([memoryview(bytearray(n_pages * stream.PAGE_SIZE))])
                case stream.End():
                    connection.sendall(encoder.signal(stream.Kind.READY))


def test_a_guest_whose_fate_is_unknown_is_kept_until_the_operator_lets_it_go_on(kvmmig: Kvmmig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        other_side = threading.Thread(target=vanish_after_go, args=(server,))
        other_side.start()
        uri = f"tcp:127.0.0.1:{server.getsockname()[1]}"
        source = kvmmig.start(
            "run", "dirtier", "--memory", "16MiB", "--set", "hot=1MiB", "--migrate-to", uri, "--after", "0.2"
        )
        source.wait_for(lambda it: f"kill -USR1 {it.pid} lets it go on here" in it.stderr)
        other_side.join()
    assert "Look there first" in source.stderr
    before = len(source.stdout)
    os.kill(source.pid, signal.SIGUSR1)
    source.wait_for(lambda it: len(it.stdout) > before + 3)
    source.wait_for(lambda it: "the guest goes on running here" in it.stderr)
    assert "FAIL" not in source.stdout
    source.interrupt()
    assert source.end() == 130
