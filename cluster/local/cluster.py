"""A Ray cluster on this machine: a head and nodes, an S3 server, Prometheus (and Grafana, if it is installed), all on loopback.

    python cluster/local/cluster.py up [--nodes 2] [--cpus 1] [--port 6379 --dashboard-port 8265 --s3-port 8333 ...]
    python cluster/local/cluster.py status
    python cluster/local/cluster.py down

`up` returns when every part has answered, and says what to type next. Everything is below --folder (default runs/cluster): the token
without which Ray answers nobody, the store's objects and credentials, Prometheus' series, logs; they are there again after `down` and
`up`. What is up is in state.json. `down` ends the processes that `up` started, and no others.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from object_store import HOST, PORT_RANGE, is_free, write_private  # noqa: E402  (of this folder)

from jobs.cli import RAY_SETTINGS  # noqa: E402

ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Set to 0, Ray 2.60 takes 127.0.0.1 for this machine's address, as it does on macOS. Else it puts the network's in its place, and then
metrics and agents listen on all interfaces."""
RAY = f"""
import os
import ray._private.services as services
from ray.scripts.scripts import main
services.resolve_ip_for_localhost = str
os.environ["{ONE_MACHINE}"] = "0"  # now: with it from the beginning, `ray start` refuses further nodes
main()
"""
"""`ray` on loopback."""
BUCKET = "vidfuse"
READY_SECONDS = 120.0
"""How long a part may take to answer."""
END_SECONDS = 20.0
"""How long a process may take to end by itself."""
MONITORING = REPO / "cluster" / "monitoring"
PORTS = {
    "port": (6379, "Ray's head"),
    "dashboard-port": (8265, "the dashboard (jobs are submitted to it)"),
    "client-port": (10001, "Ray's client server"),
    "s3-port": (8333, "the S3 server"),
    "prometheus-port": (9090, "Prometheus"),
    "grafana-port": (3000, "Grafana"),
}


class ClusterError(Exception):
    """What keeps the cluster from coming up, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = _parse(argv)
    folder = Path(options.folder).absolute()
    try:
        {"up": up, "down": down, "status": status}[options.what](folder, options)
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 2
    return 0


def up(folder: Path, options: argparse.Namespace) -> None:
    """Start what is to run, one part after the other, each until it answers.

    Raises:
        ClusterError: it is up already, a port is taken, or a part does not answer; what was started is ended again.
    """
    if running(folder):
        raise ClusterError(f"it is up already ({folder / 'state.json'}): `make cluster-down` first, or use it: {_hint(folder)}")
    for name, (_, what) in PORTS.items():
        port = getattr(options, name.replace("-", "_"))
        if not is_free(port):
            raise ClusterError(f"port {port} of {what} is taken; give another one: --{name} PORT")
    for name in ("logs", "store", "prometheus"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "state.json").unlink(missing_ok=True)
    try:
        store = _start_store(folder, options.s3_port)
        environment = _environment(folder, options, store)
        _start_ray(folder, options, environment)
        write_private(folder / "env.sh", "".join(f"export {n}={shlex.quote(v)}\n" for n, v in _for_users(environment).items()))
        _start_prometheus(folder, options)
        _start_grafana(folder, options)
    except BaseException:
        _end(folder)
        raise
    status(folder, options)
    print(
        f"\nnext:\n  {_hint(folder)}\n  python -m jobs.pack VIDEOS s3://{BUCKET}/set\n"
        f"  ray job submit --working-dir . -- python -m jobs.train --preset NAME --set data.url=s3://{BUCKET}/set "
        f"run.storage=s3://{BUCKET}/runs\n  make cluster-down"
    )


def status(folder: Path, _options: argparse.Namespace) -> None:
    """Print what is up.

    Raises:
        ClusterError: nothing is, or a part has ended.
    """
    parts = _state(folder)
    if not parts:
        raise ClusterError(f"nothing is up in {folder}: `make cluster-up` starts it")
    lost = [name for name, part in parts.items() if not _alive(part)]
    for name, part in parts.items():
        print(f"{name:<12}{'lost' if name in lost else 'up':<6}process {part['pid']:<9}{part['about']}")
    for name in ("prometheus", "grafana"):
        if name not in parts:
            print(f"{name:<12}off   {_why_not(name)}")
    if lost:
        raise ClusterError(
            f"{', '.join(lost)} ended; the log is in {folder / 'logs'}; `make cluster-down cluster-up` starts anew"
        )


def down(folder: Path, _options: argparse.Namespace) -> None:
    """End what `up` started."""
    count = _end(folder)
    print(f"{count} parts were ended" if count else f"nothing was up in {folder}")


def running(folder: Path) -> bool:
    """Whether any part is up."""
    return any(_alive(part) for part in _state(folder).values())


# --- parts ---


def _start_store(folder: Path, port: int) -> dict[str, Any]:
    script = Path(__file__).with_name("object_store.py")
    command = [sys.executable, str(script), "--dir", str(folder / "store"), "--port", str(port), "--bucket", BUCKET]
    log = _start(folder, "store", command, dict(os.environ), f"s3://{BUCKET} on {HOST}:{port}")
    _wait(folder, "store", lambda: bool(log.read_text().strip().endswith("}")))
    told: dict[str, Any] = json.loads(log.read_text().strip().splitlines()[-1])
    return told


def _environment(folder: Path, options: argparse.Namespace, store: dict[str, Any]) -> dict[str, str]:
    """Of the processes of Ray: theirs to inherit to whatever they start."""
    token = folder / "token"
    if not token.exists():
        write_private(token, secrets.token_hex(32))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    return {
        **kept,
        **RAY_SETTINGS,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_ADDRESS": f"{HOST}:{options.port}",  # `ray job submit` finds the dashboard by it, too
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "AWS_ENDPOINT_URL": store["endpoint"],
        "AWS_SHARED_CREDENTIALS_FILE": store["credentials_file"],
        "AWS_REGION": "us-east-1",
    }


def _for_users(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(("RAY_A", "AWS_"))} | {ONE_MACHINE: "0"}


def _start_ray(folder: Path, options: argparse.Namespace, environment: dict[str, str]) -> None:
    scratch = _scratch(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    inside = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    memory = int(0.25 * min(psutil.virtual_memory().available, shutil.disk_usage("/dev/shm").free) / (options.nodes + 1))
    ray = [sys.executable, "-c", RAY, "start", "--block", f"--node-ip-address={HOST}", "--disable-usage-stats"]
    ray += [f"--object-store-memory={max(memory, 100_000_000)}"]
    head = [*ray, "--head", "--num-cpus=0", f"--port={options.port}", f"--ray-client-server-port={options.client_port}"]
    head += [f"--dashboard-host={HOST}", f"--dashboard-port={options.dashboard_port}", f"--temp-dir={scratch}"]
    _start(folder, "head", [*head, _agent_port()], inside, f"http://{HOST}:{options.dashboard_port}")
    dashboard = f"http://{HOST}:{options.dashboard_port}"
    _wait(folder, "head", lambda: _answers(f"{dashboard}/api/version", _token(environment)))
    for number in range(1, options.nodes + 1):
        node = [*ray, f"--address={HOST}:{options.port}", f"--num-cpus={options.cpus}", _agent_port()]
        _start(folder, f"node-{number}", node, inside, f"{options.cpus} CPUs")
        # Two that start at once would share their sockets.
        _wait(folder, f"node-{number}", partial(_has_nodes, dashboard, environment, number + 1))


def _has_nodes(dashboard: str, environment: dict[str, str], count: int) -> bool:
    """Whether as many nodes are alive, as the dashboard has it."""
    try:
        summary = json.loads(_get(f"{dashboard}/nodes?view=summary", _token(environment)))["data"]["summary"]
    except (OSError, ValueError, KeyError):
        return False
    return sum(node["raylet"].get("state") == "ALIVE" for node in summary) == count


def _start_prometheus(folder: Path, options: argparse.Namespace) -> None:
    if _why_not("prometheus"):
        return
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["rule_files"] = [str(MONITORING / "alerts.yml")]
    for job in config["scrape_configs"]:
        for found in job.get("file_sd_configs", ()):
            found["files"] = [str(_scratch(folder) / "prom_metrics_service_discovery.json")]
    (folder / "prometheus" / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"{HOST}:{options.prometheus_port}"
    command = ["prometheus", f"--config.file={folder / 'prometheus' / 'prometheus.yml'}", f"--web.listen-address={address}"]
    command += [f"--storage.tsdb.path={folder / 'prometheus' / 'data'}"]
    _start(folder, "prometheus", command, dict(os.environ), f"http://{address}")
    _wait(folder, "prometheus", lambda: _answers(f"http://{address}/-/ready"))


def _start_grafana(folder: Path, options: argparse.Namespace) -> None:
    if _why_not("grafana"):
        return
    password = folder / "grafana-password"
    if not password.exists():
        write_private(password, secrets.token_hex(16))
    environment = {
        **os.environ,
        "GF_SERVER_HTTP_ADDR": HOST,
        "GF_SERVER_HTTP_PORT": str(options.grafana_port),
        "GF_PATHS_DATA": str(folder / "grafana"),
        "GF_PATHS_PROVISIONING": str(MONITORING / "grafana" / "provisioning"),
        "GF_SECURITY_ADMIN_PASSWORD__FILE": str(password),
        "VIDFUSE_DASHBOARDS": str(MONITORING / "grafana"),
        "VIDFUSE_PROMETHEUS": f"http://{HOST}:{options.prometheus_port}",
    }
    address = f"http://{HOST}:{options.grafana_port}"
    home = os.environ.get("GF_PATHS_HOME", "/usr/share/grafana")
    _start(folder, "grafana", ["grafana-server", "--homepath", home], environment, f"{address} (admin, {password})")
    _wait(folder, "grafana", lambda: _answers(f"{address}/api/health"))


def _why_not(name: str) -> str:
    """Why a part that is not needed is left out; empty: it is not."""
    binary = {"prometheus": "prometheus", "grafana": "grafana-server"}[name]
    if shutil.which(binary) is None:
        return f"there is no {binary} on PATH (Debian: apt-get install {name})"
    return "" if (MONITORING / "prometheus.yml").exists() else f"{MONITORING} has no configuration"


# --- processes ---


def _start(folder: Path, name: str, command: Sequence[str], environment: dict[str, str], about: str) -> Path:
    """Start a part in a session of its own; its log. It is in state.json before it can be lost."""
    log = folder / "logs" / f"{name}.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, cwd=folder, start_new_session=True
        )
    parts = _state(folder)
    parts[name] = {"pid": process.pid, "created": psutil.Process(process.pid).create_time(), "about": about}
    temporary = folder / ".state.json.part"
    temporary.write_text(json.dumps(parts, indent=1))
    temporary.replace(folder / "state.json")
    return log


def _wait(folder: Path, name: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    log = folder / "logs" / f"{name}.log"
    while not ready():
        ended = not _alive(_state(folder)[name])
        if ended or time.monotonic() > deadline:
            how = "ended" if ended else f"did not answer in {READY_SECONDS:g} s"
            last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])
            raise ClusterError(f"{name} {how}; {log} ends with: {last}")
        time.sleep(0.2)


def _end(folder: Path) -> int:
    """End all parts, what they started, and what says that it belongs to this cluster's session; how many parts there were."""
    parts = [part for part in _state(folder).values() if _alive(part)]
    processes = [process for part in reversed(parts) for process in _family(part["pid"])]
    for part in reversed(parts):
        with contextlib.suppress(ProcessLookupError):
            os.kill(part["pid"], signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=END_SECONDS if parts else 0)
    scratch = str(_scratch(folder))
    left += [
        process for process in psutil.process_iter(["cmdline"]) if any(scratch in w for w in process.info["cmdline"] or ())
    ]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=END_SECONDS)
    shutil.rmtree(scratch, ignore_errors=True)
    (folder / "state.json").unlink(missing_ok=True)
    return len(parts)


def _family(pid: int) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        yield from (process, *process.children(recursive=True))


def _alive(part: dict[str, Any]) -> bool:
    """Whether it is still that process, and not another one that was given its number."""
    try:
        process = psutil.Process(part["pid"])
        return abs(process.create_time() - part["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _state(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "state.json"
    return json.loads(path.read_text()) if path.exists() else {}


# --- small things ---


def _scratch(folder: Path) -> Path:
    """Ray's own folder: a short path, since the names of its sockets may have 107 characters."""
    return Path("/tmp") / f"vidfuse-{os.getuid()}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"


def _hint(folder: Path) -> str:
    return f"source {os.path.relpath(folder / 'env.sh')}"


def _token(environment: dict[str, str]) -> str:
    return Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()


def _get(url: str, token: str | None = None) -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=5) as answer:
        content: bytes = answer.read()
        return content


def _answers(url: str, token: str | None = None) -> bool:
    try:
        _get(url, token)
    except (OSError, urllib.error.URLError):
        return False
    return True


def _agent_port() -> str:
    """An option with a port for a node's agent, of those that systems do not hand to outgoing connections."""
    return f"--dashboard-agent-listen-port={next(port for port in random.sample(PORT_RANGE, 200) if is_free(port))}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("up", "down", "status"))
    parser.add_argument("--folder", default="runs/cluster", help="where everything is kept (default runs/cluster)")
    parser.add_argument("--nodes", type=int, default=2, help="nodes beside the head (default 2)")
    cpus = max((os.cpu_count() or 2) // 2, 1)
    parser.add_argument("--cpus", type=int, default=cpus, help=f"CPUs of each node (default {cpus}: half of this machine's)")
    for name, (port, what) in PORTS.items():
        parser.add_argument(f"--{name}", type=int, default=port, help=f"of {what} (default {port})")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
