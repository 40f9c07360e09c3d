"""An MLflow server on loopback for tests: what `vidfuse.train.tracking` asks of one, over MLflow's own database store.

The full server needs packages beside `mlflow-skinny`, whose client, messages and store are the real ones here.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.proto_json_utils import message_to_json

API, ARTEFACTS = "/api/2.0/mlflow/", "/api/2.0/mlflow-artifacts/artifacts/"


class Server:
    """Answers until `stop`; `start` again on the same port. While `open_gate` is cleared, requests that write wait."""

    def __init__(self, folder: Path, *, user: str | None = None, password: str | None = None) -> None:
        self.store = SqlAlchemyStore(f"sqlite:///{folder}/server.db", "mlflow-artifacts:/")
        self.artefacts: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.open_gate = threading.Event()
        self.open_gate.set()
        login = f"{user}:{password}".encode()
        self.login = None if user is None else f"Basic {base64.b64encode(login).decode()}"
        self._port = 0
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                words = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
                self._answer(words, b"")

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer({}, content)

            do_PUT = do_POST  # noqa: N815

            def _answer(self, words: Mapping[str, Any], content: bytes) -> None:
                path = urlsplit(self.path).path
                server.calls.append(path.removeprefix(API))
                code, body = 200, "{}"
                if server.login is not None and self.headers.get("Authorization") != server.login:
                    code, body = 401, "You are not authenticated."
                elif path.startswith(ARTEFACTS):
                    server.artefacts[path.removeprefix(ARTEFACTS)] = content
                else:
                    try:
                        body = server.answer(path.removeprefix(API), words or json.loads(content or b"{}"))
                    except MlflowException as error:
                        code, body = error.get_http_status_code(), error.serialize_as_json()
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body.encode())

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._http = Http(("127.0.0.1", self._port), Handler)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, call: str, words: Mapping[str, Any]) -> str:
        """The JSON of an answer."""
        store = self.store
        match call:
            case "experiments/get-by-name":
                found = store.get_experiment_by_name(words["experiment_name"])
                if found is None:
                    raise MlflowException("no such experiment", error_code=RESOURCE_DOES_NOT_EXIST)
                return f'{{"experiment": {message_to_json(found.to_proto())}}}'
            case "experiments/create":
                return json.dumps({"experiment_id": store.create_experiment(words["name"])})
            case "runs/create":
                tags = [RunTag(tag["key"], tag["value"]) for tag in words.get("tags", [])]
                made = store.create_run(words["experiment_id"], "", words["start_time"], tags, words["run_name"])
                return f'{{"run": {message_to_json(made.to_proto())}}}'
            case "runs/get":
                return f'{{"run": {message_to_json(store.get_run(words["run_id"]).to_proto())}}}'
            case "runs/update":
                status, end = RunStatus.from_string(words["status"]), words.get("end_time")
                done = store.update_run_info(words["run_id"], status, end and int(end), None)
                return f'{{"run_info": {message_to_json(done.to_proto())}}}'
            case "runs/log-batch":
                self.open_gate.wait(60)
                metrics = [
                    Metric(m["key"], float(m["value"]), int(m["timestamp"]), int(m["step"])) for m in words.get("metrics", [])
                ]
                params = [Param(p["key"], p["value"]) for p in words.get("params", [])]
                tags = [RunTag(t["key"], t["value"]) for t in words.get("tags", [])]
                store.log_batch(words["run_id"], metrics, params, tags)
                return "{}"
            case "metrics/get-history":
                history = store.get_metric_history(words["run_id"], words["metric_key"])
                return f'{{"metrics": [{", ".join(message_to_json(metric.to_proto()) for metric in history)}]}}'
        raise AssertionError(f"{call} is more than the tests answer")
