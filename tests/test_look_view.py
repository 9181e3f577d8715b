"""The server of a page about runs that go on: for this machine's user alone, and true to the file."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from test_look_payload import unpacked

from metricfold import JSONLSink, MetricsLogger, look
from metricfold.cli import main
from metricfold.look.view import view


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "run.jsonl", range(1, 4))
    return tmp_path / "run.jsonl"


@pytest.fixture
def server(path):
    with view(path) as made:
        made._followed._wait = 0
        yield made


def write(path, steps):
    with MetricsLogger([JSONLSink(path)]) as logger:
        for step in steps:
            logger.log(step, {"train/loss": 1 / step})


def ask(server, path=None, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    path = server.url.partition(str(server.port))[2] if path is None else path
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.body = answer.read()
    connection.close()
    return answer


def data(server, have=""):
    server._followed._next = 0.0  # or it would not look again so soon
    return ask(server, f"/{server.url.split('/')[3]}/data?have={have}")


def steps(answer):
    (column,) = unpacked(answer.body)["runs"][0]["columns"]
    return column["x"].tolist()


def test_the_page_comes_from_the_address_alone(server):
    page = ask(server)
    assert page.status == 200
    assert b"<title>metricfold" in page.body
    assert b"connect-src 'self'" in page.body
    token = server.url.split("/")[3]
    assert len(token) >= 32
    for path in ("/", "/data", f"/{token[:-1]}/", f"/{token}x/data", "/%2e%2e/", f"/x/{token}/"):
        assert ask(server, path).status == 404, path
    assert ask(server, f"/{token}/../../etc/passwd").status == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "0.0.0.0", "", "a:b:c"]
)
def test_another_host_is_refused_so_that_rebound_names_get_nothing(server, host):
    answer = ask(server, Host=host)
    assert answer.status == 403
    assert b"html" not in answer.body


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "LOCALHOST", "[::1]:80"])
def test_this_machine_is_answered_also_at_the_other_end_of_a_tunnel(server, host):
    assert ask(server, Host=host).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "X"])
def test_only_get_is_answered(server, method):
    answer = ask(server, method=method)
    assert answer.status == 405
    assert answer.getheader("Allow") == "GET"


def test_pages_of_others_are_refused_and_nothing_may_frame_or_keep_it(server):
    assert ask(server, Sec_Fetch_Site="cross-site").status == 403
    assert ask(server, Sec_Fetch_Site="same-site").status == 403  # other ports of this machine
    answer = ask(server, Sec_Fetch_Site="same-origin")
    assert answer.status == 200
    assert answer.getheader("Cache-Control") == "no-store"
    assert answer.getheader("X-Frame-Options") == "DENY"
    assert answer.getheader("Access-Control-Allow-Origin") is None
    assert answer.getheader("Referrer-Policy") == "no-referrer"


def test_it_listens_on_this_machine_alone(server):
    assert server._server.server_address[0] == "127.0.0.1"
    with pytest.raises(look.LookError, match=r"port \d+ of 127.0.0.1 cannot be had"):
        view(server._followed.runs, port=server.port)


def test_nothing_new_is_answered_by_nothing(server):
    first = data(server)
    assert (first.status, steps(first)) == (200, [1, 2, 3])
    again = data(server, first.getheader("X-Version"))
    assert (again.status, again.body) == (204, b"")


def test_what_is_appended_comes_and_half_a_line_when_it_is_whole(server, path):
    version = data(server).getheader("X-Version")
    line = json.dumps(
        {"step": 4, "wall_time": 1.0, "metrics": {"train/loss": 2.0}, "histograms": {}}
    )
    line = line.encode() + b"\n"
    with path.open("ab") as file:
        file.write(line[:30])
        file.flush()
        assert data(server, version).status == 204
        file.write(line[30:])
    answer = data(server, version)
    assert (answer.status, steps(answer)) == (200, [1, 2, 3, 4])


def test_a_rewind_and_a_truncation_take_the_steps_away(server, path):
    first = data(server).getheader("X-Version")
    with MetricsLogger([JSONLSink(path)]) as logger:
        logger.rewind(1)
        logger.log(2, {"train/loss": 5.0})
    answer = data(server, first)
    assert (answer.status, steps(answer)) == (200, [1, 2])
    os.truncate(path, 0)
    answer = data(server, answer.getheader("X-Version"))
    assert answer.status == 200
    assert unpacked(answer.body)["runs"][0]["columns"] == []


def test_a_file_that_is_gone_is_said_and_what_was_read_stays(server, path):
    version = data(server).getheader("X-Version")
    path.unlink()
    answer = data(server, version)
    assert (answer.status, answer.getheader("X-Problem")) == (
        204,
        "run.jsonl%20is%20gone%3B%20this%20is%20what%20was%20in%20it",
    )
    assert steps(data(server)) == [1, 2, 3]
    write(path, [7, 8])
    answer = data(server, version)
    assert (answer.status, answer.getheader("X-Problem"), steps(answer)) == (200, None, [7, 8])


def test_a_broken_file_is_said_and_followed_on(server, path):
    version = data(server).getheader("X-Version")
    with path.open("ab") as file:
        file.write(b'{"no": "record"}\n')
    answer = data(server, version)
    assert answer.status == 204
    assert "record" in answer.getheader("X-Problem")


def test_rubbish_on_the_line_stops_no_server_and_is_not_printed(server, capfd):
    for rubbish in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"G" * 70_000):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(rubbish)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"GET {server.url} HTTP/1.0\r\n".encode())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
    assert ask(server).status == 200
    assert capfd.readouterr().err == ""


def test_closing_twice_is_nothing_new(path):
    server = view([path, path])
    assert len(unpacked(data(server).body)["runs"]) == 2
    server.close()
    server.close()
    with pytest.raises(OSError):
        ask(server)


def test_the_command_writes_a_report_and_says_mistakes_in_a_sentence(path, tmp_path, capsys):
    assert main(["report", str(path), str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes().startswith(b"<!doctype html>")
    assert main(["report", str(tmp_path / "no"), "-o", str(tmp_path / "page.html")]) == 2
    assert main(["report", str(path), "-o", str(tmp_path / "no" / "page.html")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "does not exist" in said[0]
    assert "cannot be written" in said[1]
    with pytest.raises(SystemExit):
        main(["view", str(path), "--port", "99999"])
    assert "no port" in capsys.readouterr().err


def test_the_command_prints_the_address_and_serves_until_ctrl_c(path):
    command = [sys.executable, "-m", "metricfold", "view", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        url = process.stdout.readline().decode().strip()
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert b"metricfold" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == b""
