"""Tell Ray that the machine this runs on is about to be taken away, so that trainings save a checkpoint before it is gone.

    python cluster/drain.py now --seconds 90
    python cluster/drain.py watch [--every 5] [--reserve 10]

`now` sends Ray's drain notice (reason: preemption) for this machine's raylet; a Kubernetes preStop hook runs it. `watch` is for
EC2 spot machines: it asks the instance metadata service (IMDSv2) for the interruption notice, which comes two minutes ahead,
and then does the same with the time that is left, less `--reserve`. Ray's own cluster launcher does not look for that notice.

Exit codes: 0 the notice was accepted; 1 Ray refused it, or no raylet is here; 2 `watch` is not on EC2. Stand-alone: nothing of
vidfuse is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psutil

METADATA = "169.254.169.254"
"""Instance metadata service of EC2."""
TOKEN_SECONDS = 300
"""How long a session token of IMDSv2 is asked for."""
ANSWER_SECONDS = 5.0
"""How long the metadata service may take."""
UNANSWERED = 12
"""Looks in a row without an answer after which this is taken not to be EC2, if there never was one."""


class Raylet(NamedTuple):
    """A raylet of this machine."""

    node: str
    """Ray's id of the node, in hex."""
    cluster: str
    """host:port of its cluster's GCS."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = _parse(argv)
    seconds = options.seconds if options.command == "now" else notice(options.every, options.reserve, options.metadata)
    if seconds is None:
        print(f"drain: no metadata service at {options.metadata}: `watch` is for EC2 machines", file=sys.stderr)
        return 2
    found = sorted({raylet for raylet in raylets() if options.cluster in (None, raylet.cluster)})
    if not found:
        print("drain: no worker's raylet runs on this machine; nothing to do", file=sys.stderr)
        return 1
    return max(drain(raylet, seconds) for raylet in found)


def raylets() -> Iterator[Raylet]:
    """The raylets that this user can see; one on a machine or in a container, unless somebody tests.

    A head's is left out: idle, it would end as soon as it is drained (seen with Ray 2.60.0), and its cluster with it.
    """
    for process in psutil.process_iter(["name", "cmdline"]):
        line = process.info["cmdline"] or []
        if process.info["name"] != "raylet" or "--head" in line:
            continue
        values = dict(word.lstrip("-").split("=", 1) for word in line if word.startswith("--") and "=" in word)
        address = values.get("gcs-address") or values.get("gcs_address")
        if "node_id" in values and address:
            yield Raylet(values["node_id"], address)


def drain(raylet: Raylet, seconds: int) -> int:
    """Have Ray take a node for one that is gone in some seconds; returns the exit code of `ray drain-node`."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", raylet.cluster, "--node-id", raylet.node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine is taken away"]
    done = subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        print(f"drain: Ray did not take the notice for node {raylet.node}: {last}", file=sys.stderr)
        return 1
    print(
        f"drain: node {raylet.node} of {raylet.cluster} is gone in {seconds} s; trainings there save a checkpoint", flush=True
    )
    return 0


def notice(every: float, reserve: int, metadata: str = METADATA) -> int | None:
    """Wait for a spot interruption notice.

    Returns:
        Seconds until the machine is stopped, less `reserve`; at least 1. `None`: this is not EC2.
    """
    heard, silent = False, 0
    while silent < UNANSWERED or heard:
        try:
            action = spot_action(metadata)
        except OSError:
            silent += 1
        else:
            heard, silent = True, 0
            if action is not None:
                return max(1, int(action - time.time()) - reserve)
        time.sleep(every)
    return None


def spot_action(metadata: str) -> float | None:
    """When this machine is stopped, in seconds of the epoch; `None`: nobody has said so.

    Raises:
        OSError: the service does not answer as it should.
    """
    token = _ask(metadata, "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)})
    if token is None:
        raise OSError("the metadata service gives no token")
    answer = _ask(metadata, "GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if answer is None:
        return None
    try:
        return datetime.fromisoformat(json.loads(answer)["time"].replace("Z", "+00:00")).timestamp()
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"the metadata service's notice cannot be read: {answer[:200]!r}") from error


def _ask(host: str, method: str, path: str, headers: dict[str, str]) -> str | None:
    """The answer's text; `None`: there is no such thing (404)."""
    with contextlib.closing(http.client.HTTPConnection(host, timeout=ANSWER_SECONDS)) as connection:
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error
    if answer.status not in (200, 404):
        raise OSError(f"{method} {path}: {answer.status}")
    return text if answer.status == 200 else None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    now = commands.add_parser("now", help="send the notice")
    now.add_argument("--seconds", type=int, required=True, help="until the machine is gone")
    watch = commands.add_parser("watch", help="wait for EC2's interruption notice, then send it")
    watch.add_argument("--every", type=float, default=5.0, help="seconds between two looks (5, as AWS advises)")
    watch.add_argument("--reserve", type=int, default=10, help="seconds kept for the machine's own shutdown (10)")
    watch.add_argument("--metadata", default=METADATA, help=argparse.SUPPRESS)
    for command in (now, watch):
        command.add_argument(
            "--cluster", metavar="HOST:PORT", help="only raylets of this cluster; default: all of this machine"
        )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
