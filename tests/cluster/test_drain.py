"""A machine's end reaches Ray: `cluster/drain.py`, against a metadata service that answers as EC2's."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from tests.support import REPO

spec = importlib.util.spec_from_file_location("drain", REPO / "cluster/drain.py")
drain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drain)


class Metadata(BaseHTTPRequestHandler):
    """IMDSv2: a token by PUT, then the notice with it; 404 as long as there is none."""

    notice: str | None = None
    looks = 0
    after = 0

    def do_PUT(self):
        assert self.path == "/latest/api/token" and int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21_600
        self._answer(200, "the-token")

    def do_GET(self):
        if self.headers.get("X-aws-ec2-metadata-token") != "the-token":
            return self._answer(401, "")
        assert self.path == "/latest/meta-data/spot/instance-action"
        type(self).looks += 1
        there = self.notice is not None and self.looks > self.after
        return self._answer(200, self.notice) if there else self._answer(404, "Not Found")

    def _answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata():
    Metadata.notice, Metadata.looks, Metadata.after = None, 0, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def asked(monkeypatch):
    """One raylet is here; what `ray` is asked is noted, and answered with `code`."""
    calls = SimpleNamespace(commands=[], code=0)

    def run(command, **_):
        calls.commands.append(command)
        return subprocess.CompletedProcess(command, calls.code, "", "Traceback\nError: The drain request is not accepted: no")

    monkeypatch.setattr(drain, "raylets", lambda: iter([drain.Raylet("ab" * 28, "10.0.0.1:6379")]))
    monkeypatch.setattr(drain.subprocess, "run", run)
    return calls


def notice_in(seconds: float) -> str:
    when = datetime.fromtimestamp(time.time() + seconds, UTC)
    return json.dumps({"action": "terminate", "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_now_sends_rays_notice(asked, capsys):
    assert drain.main(["now", "--seconds", "90"]) == 0
    (command,) = asked.commands
    assert command[1:] == [
        "drain-node",
        "--address",
        "10.0.0.1:6379",
        "--node-id",
        "ab" * 28,
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "the machine is taken away",
        "--deadline-remaining-seconds",
        "90",
    ]
    assert "gone in 90 s" in capsys.readouterr().out


def test_rays_command_takes_it():
    """The command is not of Ray's stable interface; its options are those of the pinned Ray."""
    from ray.scripts.scripts import cli

    options = {word: option for option in cli.commands["drain-node"].params for word in option.opts}
    assert {"--address", "--node-id", "--reason", "--reason-message", "--deadline-remaining-seconds"} <= set(options)
    assert "DRAIN_NODE_REASON_PREEMPTION" in options["--reason"].type.choices


def test_a_refusal_is_told(asked, capsys):
    asked.code = 1
    assert drain.main(["now", "--seconds", "90"]) == 1
    assert "The drain request is not accepted: no" in capsys.readouterr().err


def test_without_a_raylet_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(drain, "raylets", lambda: iter([drain.Raylet("ab", "another:6379")]))
    assert drain.main(["now", "--seconds", "90", "--cluster", "10.0.0.1:6379"]) == 1
    assert "no worker's raylet" in capsys.readouterr().err


def test_a_notice_of_ec2_is_handed_on(asked, metadata):
    """Nothing for two looks, then the notice: what is left of it, less the reserve."""
    Metadata.notice, Metadata.after = notice_in(120), 2
    assert drain.main(["watch", "--every", "0.01", "--reserve", "10", "--metadata", metadata]) == 0
    (command,) = asked.commands
    assert 105 <= int(command[-1]) <= 110 and Metadata.looks == 3


def test_a_notice_that_is_late_leaves_a_second(asked, metadata):
    Metadata.notice = notice_in(-5)
    assert drain.main(["watch", "--every", "0.01", "--metadata", metadata]) == 0
    assert asked.commands[0][-1] == "1"


def test_a_notice_that_cannot_be_read_is_an_error(metadata):
    Metadata.notice = "<html>"
    with pytest.raises(OSError, match="cannot be read"):
        drain.spot_action(metadata)


def test_elsewhere_watch_ends(monkeypatch, capsys):
    monkeypatch.setattr(drain, "UNANSWERED", 2)
    assert drain.main(["watch", "--every", "0.01", "--metadata", "127.0.0.1:9"]) == 2
    assert "for EC2 machines" in capsys.readouterr().err


def test_raylets_are_told_by_their_command_lines(monkeypatch):
    """A head's is left alone."""
    line = ["/x/raylet", "--raylet_socket_name=/tmp/ray/s", f"--node_id={'cd' * 28}", "--gcs-address=10.0.0.2:6379"]
    listed = [
        SimpleNamespace(info={"name": "raylet", "cmdline": line}),
        SimpleNamespace(info={"name": "raylet", "cmdline": [*line[:2], f"--node_id={'12' * 28}", line[3], "--head"]}),
        SimpleNamespace(info={"name": "raylet", "cmdline": None}),
        SimpleNamespace(info={"name": "python", "cmdline": ["python", f"--node_id={'ef' * 28}", "--gcs-address=a:1"]}),
    ]
    monkeypatch.setattr(drain.psutil, "process_iter", lambda _: iter(listed))
    assert list(drain.raylets()) == [drain.Raylet("cd" * 28, "10.0.0.2:6379")]


def test_it_stands_alone():
    """The image and the machines have it beside the project, not in it."""
    done = subprocess.run(
        [sys.executable, str(REPO / "cluster/drain.py"), "now", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "--seconds" in done.stdout
    assert "vidfuse." not in (REPO / "cluster/drain.py").read_text().split('"""')[2]
