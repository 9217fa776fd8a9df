"""Connections of `mien monitor` whose clients dawdle: dropped in time, and few at a time."""

import socket
import threading

import pytest

pytest.importorskip("starlette", reason="the page's server is an extra: pip install '.[monitor]'")
pytest.importorskip("plotly", reason="the page's graphs are an extra: pip install '.[monitor]'")

from mien.cli.monitor.access import Access
from mien.cli.monitor.connection import Connection, make_server
from mien.cli.monitor.server import make_app

STATUS = b"GET /api/status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
FORM = b"POST /request/save HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4000\r\n\r\ntoken="


@pytest.fixture
def connect(tmp_path):
    """Open connections to a server in a thread of this process."""
    access = Access(host="127.0.0.1", token="a-token-of-the-tests", is_open=False, allows=True)
    server = make_server(make_app([tmp_path], access))
    opened = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()

        def begin(sent: bytes) -> socket.socket:
            opened.append(socket.create_connection(listener.getsockname()))
            opened[-1].sendall(sent)
            return opened[-1]

        yield begin
        for connection in opened:
            connection.close()
        server.should_exit = True
        thread.join()


def _received(connection: socket.socket) -> bytes:
    """What is answered until the connection is dropped."""
    answer = b""
    try:
        while part := connection.recv(1 << 16):
            answer += part
    except ConnectionResetError:
        pass
    return answer


@pytest.mark.parametrize("sent", [b"", b"GET", STATUS[:-2], FORM], ids=["", "verb", "head", "body"])
def test_a_request_that_never_ends_is_dropped(connect, monkeypatch, sent):
    monkeypatch.setattr(Connection, "REQUEST_SECONDS", 0.2)
    assert _received(connect(sent)) == b""


@pytest.mark.parametrize("sent", [STATUS[:-2], FORM], ids=["head", "body"])
def test_bytes_that_trickle_in_win_no_time(connect, monkeypatch, sent):
    monkeypatch.setattr(Connection, "REQUEST_SECONDS", 0.5)
    connection = connect(sent)
    connection.settimeout(0.05)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
        while True:
            connection.sendall(b"x")
            try:
                if connection.recv(1 << 16) == b"":
                    raise ConnectionResetError
            except TimeoutError:
                pass


def test_the_rest_of_a_request_that_is_answered_is_not_awaited(connect, monkeypatch):
    monkeypatch.setattr(Connection, "REQUEST_SECONDS", 0.5)
    connection = connect(FORM.replace(b"/request/save", b"/api/status"))
    assert _received(connection).startswith(b"HTTP/1.1 405")


def test_an_answer_that_is_not_taken_is_dropped(connect, monkeypatch):
    ends, lost = Connection.connection_lost, threading.Event()
    monkeypatch.setattr(Connection, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(Connection, "connection_lost", lambda *_: lost.set() or ends(*_))
    connection = connect(STATUS.replace(b"api/status", b"plotly.js") * 20)
    assert lost.wait(300)
    assert _received(connection).count(b"HTTP/1.1 200") < 20


def test_requests_on_one_connection_are_answered(connect):
    connection = connect(STATUS)
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    last = STATUS.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    connection.sendall(STATUS + STATUS + last)
    assert _received(connection).count(b"HTTP/1.1 200") == 3


def test_the_oldest_of_too_many_are_dropped(connect, monkeypatch):
    monkeypatch.setattr(Connection, "MOST_WITHOUT_REQUEST", 3)
    half_open = [connect(b"GET /") for _ in range(5)]
    assert [_received(connection) for connection in half_open[:2]] == [b"", b""]
    assert connect(STATUS).recv(1 << 16).startswith(b"HTTP/1.1 200")
    half_open[-1].sendall(STATUS.removeprefix(b"GET /"))
    assert half_open[-1].recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_client_that_leaves_before_its_request_ends_is_no_failure(connect, capfd, caplog):
    for _ in range(3):
        connect(FORM).close()
    for _ in range(3):  # answered after those
        assert connect(STATUS).recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert "Traceback" not in capfd.readouterr().err
    assert not [record for record in caplog.records if record.exc_info]
