"""What all jobs share: the command line, printing, the live line, exit codes. `print` and `os.environ` live here.

Exit codes: 0 done; 1 the job ran and failed or found faults; 2 bad input, said in one message before long work;
130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from vidfuse import presets
from vidfuse.config import Config, ConfigError, Section, override, read_file

SomeSection = TypeVar("SomeSection", bound=Section)

# Said at every import on a machine without a GPU, where it is no news.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

RAY_SETTINGS = {
    # How long Ray Train waits for room for its workers before it looks again how many fit: a node that died after it looked.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # How often Ray Train asks its workers whether they live.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A node that does not answer five times in a row is dead: 5 s for one that is gone, 30 s for one that hangs (15 and 65 in Ray).
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
    # A reading process that waits for room in the buffer is kept; Ray would end it after a second and start another one.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray Tune's tables are for notebooks; the job tells each trial in a line.
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""What a cluster that a job starts, and its driver, find in their environment, unless it is there already."""


def parser(doc: str | None, *, config: bool = False) -> argparse.ArgumentParser:
    """A job's argument parser; `config`: with --preset, --config, --set and --dry-run."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    if config:
        source = made.add_mutually_exclusive_group(required=True)
        source.add_argument("--preset", help=f"a named config: {', '.join(sorted(presets.PRESETS))}")
        source.add_argument("--config", metavar="FILE", help="a config file, such as the config.yaml of a run")
        made.add_argument("--dry-run", action="store_true", help="resolve and check everything, print the plan, train nothing")
        add_set(made)
    return made


def add_set(made: argparse.ArgumentParser) -> None:
    """Add --set."""
    made.add_argument(
        "--set", metavar="a.b=value", nargs="+", action="extend", default=[], help="override fields of the config"
    )


def add_restarts(made: argparse.ArgumentParser) -> None:
    """Add --restarts."""
    about = "how often this process is started again if it is killed (out of memory, say); the run continues. Default: 0"
    made.add_argument("--restarts", type=int, default=0, metavar="N", help=about)


def restarted(times: int) -> int:
    """Run this very command in a process of its own, without --restarts, and again as often as it is killed, `times` at most.

    Returns:
        Its exit code. SIGTERM is handed on to it; after one it is not started again.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_restarts(own)
    words = own.parse_known_args()[1]
    stopped = threading.Event()
    for left in range(times, -1, -1):
        process = subprocess.Popen([sys.executable, "-m", _module(), *words])

        def stop(number: int, _: object, process: subprocess.Popen[bytes] = process) -> None:
            stopped.set()
            process.send_signal(number)

        signal.signal(signal.SIGTERM, stop)
        code = process.wait()
        if code >= 0 or stopped.is_set() or not left:
            return code if code >= 0 else 128 - code
        say(f"the driver was killed ({signal.Signals(-code).name}) and is started again, {left - 1} more times at most")
    raise AssertionError("unreachable")


def add_fields(made: argparse.ArgumentParser, *sections: type[Section]) -> None:
    """Add an option for each field of some sections, with its docstring as help."""
    for section in sections:
        for name, field in section.model_fields.items():
            flag, about = f"--{name.replace('_', '-')}", (field.description or "").replace("%", "%%")
            if field.annotation is bool:
                made.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=about)
            else:
                default = "" if field.default is None else f" Default: {field.default}."
                made.add_argument(flag, default=argparse.SUPPRESS, help=about + default)


def fields_of(options: argparse.Namespace, section: type[SomeSection]) -> SomeSection:
    """A section of what was given on the command line.

    Raises:
        ConfigError: a value that the field refuses.
    """
    try:
        return section.model_validate({name: value for name, value in vars(options).items() if name in section.model_fields})
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        about = " ".join((section.model_fields[name].description or "").split())
        raise ConfigError(f"--{name.replace('_', '-')} {fault['input']}: {fault['msg']}. {about}") from None


def config_of(options: argparse.Namespace) -> Config:
    """The config that --preset, --config and --set ask for."""
    base = read_file(options.config) if options.config else presets.get(options.preset)
    return override(base, options.set)


def main(job: Callable[[], int]) -> NoReturn:
    """Run a job's `main` and leave with its exit code; people's mistakes become one message, not a traceback."""
    from vidfuse.data.shards import DataError
    from vidfuse.on_ray.storage import StorageError
    from vidfuse.train.errors import CheckpointError, RunError

    _log()
    try:
        code = job()
    except (ConfigError, DataError, StorageError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def _log() -> None:
    """Show what vidfuse has to tell (licences, parts of a weights file that are not used) on stderr, each line once."""
    told: set[str] = set()

    def first(record: logging.LogRecord) -> bool:
        return not (record.getMessage() in told or told.add(record.getMessage()))  # type: ignore[func-returns-value]

    handler = logging.StreamHandler()
    handler.addFilter(first)
    logging.getLogger("vidfuse").addHandler(handler)
    logging.getLogger("vidfuse").setLevel(logging.INFO)


def say(line: str = "") -> None:
    """Print a line at once."""
    print(line, flush=True)


def start_ray(**options: Any) -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job's own), or start one on this machine.

    Raises:
        ConfigError: it cannot be joined.
    """
    import ray

    from vidfuse.on_ray.joining import joining

    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    with joining(address):
        ray.init(
            address=address or "local",
            logging_level=logging.ERROR,
            log_to_driver=bool(os.environ.get("VIDFUSE_WORKER_LOGS")),
            **({} if address else {"include_dashboard": False, **options}),
        )


def facts() -> dict[str, str]:
    """What the records say of how a run was started: git revision, command, date."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=False)
    return {
        "git_revision": git.stdout.strip() or "unknown",
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else sys.argv[0]


def stop_event() -> threading.Event:
    """An event that SIGTERM sets (a submitted job that is stopped, a preempted machine); a second one ends the process.

    To be called after `start_ray`: Ray puts a handler of its own in place, which ends the process at once.
    """
    event = threading.Event()

    def handle(number: int, _: object) -> None:
        if event.is_set():
            sys.exit(128 + number)
        event.set()

    signal.signal(signal.SIGTERM, handle)
    return event


class ProgressLine:
    """How far a run is: one live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, name: str, every_seconds: float = 10.0) -> None:
        self._name, self._every, self._last, self._live = name, every_seconds, 0.0, sys.stdout.isatty()
        self._width = 0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show an event of `train.worker.Worker.progress`."""
        judged = "top1" in event
        if not self._live and not judged and time.monotonic() - self._last < self._every:
            return
        self._last = time.monotonic()
        line = describe(self._name, event)
        if self._live:
            print("\r" + line.ljust(self._width), end="\n" if judged else "", flush=True)
            self._width = 0 if judged else len(line)
        else:
            say(line)

    def close(self) -> None:
        """End the live line."""
        if self._live and self._width:
            print(flush=True)


def describe(name: str, event: Mapping[str, Any]) -> str:
    """An event in words."""
    if "features" in event:
        return f"{name}  features  {event['features']}"
    parts = [f"{name}  epoch {event['epoch']}/{event['epochs']}  step {event['step']}/{event['steps']}"]
    parts += [f"{key} {event[key]:.4f}" for key in ("loss", "top1") if key in event]
    parts.append(f"{event['clips_per_second']:.1f} clips/s  data wait {100 * event['data_wait_fraction']:.0f} %")
    if event.get("unreadable_share"):
        known = ", ".join(event["unreadable_last"])  # of rank 0; another worker's are told at the end of the epoch
        parts.append(f"unreadable {100 * event['unreadable_share']:.2g} %{f' (last {known})' if known else ''}")
    if event.get("eta_seconds") is not None:
        minutes, seconds = divmod(int(event["eta_seconds"]), 60)
        parts.append(f"eta {minutes}:{seconds:02d}")
    return "  ".join(parts)
