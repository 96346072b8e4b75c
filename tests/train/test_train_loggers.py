"""TensorBoard and wandb hold what was logged, over several sessions; where they fail, the run does not."""

# ruff: noqa: E402  the two packages are optional

import errno
import http.server
import io
import json
import re
import struct
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")
wandb = pytest.importorskip("wandb")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import record_writer
from wandb.proto import wandb_internal_pb2

from visattn.train import loggers
from visattn.train.config import Config, recipe
from visattn.train.errors import ConfigError
from visattn.train.metrics import make_console

ROW = {"epoch": 1, "update": 20, "train_loss": 0.5, "top1": 97.5, "ema_top1": None, "bad_images": 3}


@pytest.fixture(autouse=True)
def _own_wandb(tmp_path, monkeypatch):
    """Its settings come from this test alone, and its service ends with it."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def session(tmp_path):
    """Log some updates and an epoch as one process does; returns what it said."""

    def call(updates, start=0, row=None, break_down=None, **options):
        said = io.StringIO()
        logger = loggers.Loggers(tmp_path, Config(**options), make_console(said), start)
        for update in updates:
            logger.update(update, {"train_loss": 1 / update, "lr": 1e-3 * (start + 1)})
            if break_down:
                break_down()
        if row:
            logger.epoch(row, updates[-1])
        logger.close()
        wandb.teardown()  # as the end of the process does: its service may still be writing
        return said.getvalue()

    return call


def wandb_records(path):
    """The records in a .wandb file: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    data, place, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def wandb_session(path):
    """(run id, config, {step: values}) of a .wandb file."""
    run_id, config, history = None, {}, {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "run":
            run_id = record.run.run_id
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            values = {key: json.loads(text) for key, text in items.items() if not key.startswith("_")}
            history[record.history.step.num] = values
    return run_id, config, history


def offline_files(folder):
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def test_wandb_offline_reads_back_over_two_sessions(tmp_path, session):
    options = {"wandb": "offline", "lr": 0.125, "model": "test_vit", "config": Path("some.yaml")}
    assert session([10, 20], row=ROW, **options) == ""
    time.sleep(1)  # their folders are named by the second
    assert session([30], start=20, **options) == ""
    (first_id, config, first), (second_id, _, second) = map(wandb_session, offline_files(tmp_path))
    assert first_id == second_id == (tmp_path / "wandb_id.txt").read_text()
    wanted = recipe(Config(**options))
    assert {key: config[key] for key in wanted} == wanted
    epoch = {"epoch/train_loss": 0.5, "epoch/top1": 97.5, "epoch/bad_images": 3}
    assert first == {
        10: {"update/train_loss": 1 / 10, "update/lr": 1e-3},
        20: {"update/train_loss": 1 / 20, "update/lr": 1e-3} | epoch,
    }
    assert second == {30: {"update/train_loss": 1 / 30, "update/lr": 21e-3}}


def events(folder):
    """{tag: {step: value}} as TensorBoard shows them; no step of a tag twice."""
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = {tag: shown.Scalars(tag) for tag in shown.Tags()["scalars"]}
    values = {tag: {event.step: event.value for event in points} for tag, points in tags.items()}
    assert all(len(values[tag]) == len(points) for tag, points in tags.items())
    return values


def test_tensorboard_shows_a_resumed_run_once(tmp_path, session):
    """The second session got to update 30, but the last checkpoint was after update 20."""
    for updates, start, row in (([10, 20], 0, ROW), ([30], 20, None), ([30, 40], 20, None)):
        assert session(updates, start, row, tensorboard=True) == ""
        time.sleep(1)  # files are read in the order of the seconds in their names
    shown = events(tmp_path)
    assert shown["update/train_loss"] == pytest.approx({10: 1 / 10, 20: 1 / 20, 30: 1 / 30, 40: 1 / 40})
    assert shown["update/lr"] == pytest.approx({10: 1e-3, 20: 1e-3, 30: 21e-3, 40: 21e-3})
    assert shown["epoch/top1"] == {20: 97.5}
    assert not {"epoch/ema_top1", "epoch/epoch", "epoch/update"} & shown.keys()


def test_unreachable_server(tmp_path, session, monkeypatch):
    """Nothing listens on the port: one warning, and the values are kept in an offline run."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    said = session([10], wandb="online")
    assert said.count("warning") == said.count("\n") == 1
    assert said.startswith("warning: wandb: ")
    assert "wandb sync" in said
    (file,) = offline_files(tmp_path)
    assert wandb_session(file)[2] == {10: {"update/train_loss": 0.1, "update/lr": 1e-3}}


def test_missing_login(tmp_path, session, monkeypatch):
    """On a terminal too it must not wait for somebody to type a key."""
    monkeypatch.setattr("wandb.errors.term._sys_stderr_isatty", lambda: True)
    monkeypatch.setattr("wandb.errors.term._sys_stdin_isatty", lambda: True)
    said = session([10], wandb="online")
    assert said.count("warning") == said.count("\n") == 1
    assert "No API key" in said
    assert len(offline_files(tmp_path)) == 1


class Server(http.server.BaseHTTPRequestHandler):
    """The least of a wandb server that a run needs; keeps the history it receives."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_PUT(self):
        self.do_POST()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = {"data": {}}
        if self.path == "/graphql":
            body = json.loads(body)
            self.server.asked.append(body.get("variables", {}))
            if "mutation UpsertBucket" in body["query"]:
                project = {"id": "p", "name": "visattn", "entity": {"id": "e", "name": "e"}}
                bucket = {"id": "b", "name": "n", "displayName": "d", "config": "{}", "project": project}
                answer["data"] = {"upsertBucket": {"bucket": bucket, "inserted": True}}
            elif "mutation CreateRunFiles" in body["query"]:
                url = f"http://127.0.0.1:{self.server.server_port}/upload"
                files = [{"name": name, "uploadUrl": url} for name in body["variables"]["files"]]
                answer["data"] = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            elif "query RunResumeStatus" in body["query"]:
                answer["data"] = {"model": None}
        elif self.path.endswith("file_stream"):
            files = json.loads(body).get("files", {})
            lines = files.get("wandb-history.jsonl", {}).get("content", [])
            self.server.history += [json.loads(line) for line in lines]
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.history, server.asked = [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield server
        server.shutdown()


def test_online(tmp_path, session, server):
    assert session([10, 20], wandb="online").startswith(f"wandb: http://127.0.0.1:{server.server_port}/e/visattn/runs")
    steps = {line["_step"]: line["update/train_loss"] for line in server.history}
    assert steps == {10: 0.1, 20: 0.05}
    assert (tmp_path / "wandb_id.txt").read_text() in {asked.get("name") for asked in server.asked}


def test_server_that_goes_away_does_not_hold_the_run(session, server, monkeypatch):
    """By itself wandb waits for the server without end."""
    monkeypatch.setattr(loggers, "WANDB_SECONDS", 2)
    said = session([10, 20], wandb="online", break_down=lambda: (server.shutdown(), server.server_close()))
    _, warning = said.splitlines()  # the first is the address
    assert re.fullmatch(r"warning: wandb: Timed out.*; what did not get there is in .*wandb", warning)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_one_logger_only(tmp_path, session, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    said = session(
        [10, 20, 30],
        row=ROW,
        tensorboard=True,
        wandb="offline",
        break_down=lambda: monkeypatch.setattr(record_writer.RecordWriter, "write", full),
    )
    assert said == "warning: tensorboard: [Errno 28] No space left on device; training goes on without it\n"
    assert events(tmp_path)["update/lr"] == pytest.approx({10: 1e-3})
    (file,) = offline_files(tmp_path)
    assert list(wandb_session(file)[2]) == [10, 20, 30]


@pytest.mark.parametrize("options", [{"tensorboard": True}, {"wandb": "offline"}])
@pytest.mark.parametrize("folder", [False, True])
def test_missing_package(tmp_path, session, monkeypatch, options, folder):
    """A folder that has the package's name is no package."""
    (package,) = options
    if folder:
        (tmp_path / package).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package)
    with pytest.raises(ConfigError, match=rf'expected the package {package}.*pip install -e "\.\[log\]"'):
        session([], **options)


def test_nothing_is_made_unless_asked_for(tmp_path, session):
    assert session([10], row=ROW) == ""
    assert list(tmp_path.iterdir()) == []
