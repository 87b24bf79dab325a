"""An object store that answers 500, slowly, or not at all: a proxy before an S3 server (moto) does so.

What was published stays whole, a publication happens once, and a lease is neither lost nor held by two.
"""

from __future__ import annotations

import http.client
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import s3fs

from longreach.infra.artifact import Store
from longreach.infra.lease import Lease, LeaseHeld

RECORD = {"summary": {}, "inputs": {}, "recipe": {}}
ERROR = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


class Proxy:
    """Forwards to the S3 server; `refuse` and `lose` say for which requests it answers 500: before they are done, or
    after (the answer is lost)."""

    def __init__(self, server: str) -> None:
        self.refuse: Callable[[str, str], bool] = lambda method, path: False
        self.lose: Callable[[str, str], bool] = lambda method, path: False
        self.hang_up = False
        self.slow, self.delay_s = "", 0.0
        self.failed = 0
        proxy, target = self, urlsplit(server)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.command == proxy.slow:
                    time.sleep(proxy.delay_s)
                if proxy.hang_up:
                    self.close_connection = True
                    return
                status, headers, content = 500, {}, ERROR
                if not proxy.refuse(self.command, self.path):
                    status, headers, content = self.forward(body)
                    if proxy.lose(self.command, self.path):
                        status, headers, content = 500, {}, ERROR
                self.answer(status, headers, content)

            def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
                onward = http.client.HTTPConnection(target.hostname, target.port)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "connection")}
                onward.request(self.command, self.path, body, headers)
                got = onward.getresponse()
                return got.status, dict(got.getheaders()), got.read()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                proxy.failed += status == 500
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = len(body)
                if self.command == "HEAD":
                    length = int(next((v for k, v in headers.items() if k.lower() == "content-length"), 0))
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.handler, self.port = Handler, 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """On its port of before, if there was one."""
        self.hang_up = False
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Nobody listens any more, nor answers on connections that are open."""
        self.hang_up = True
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def proxy(s3_root: str, monkeypatch) -> Iterator[Proxy]:
    proxy = Proxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", "path")
    s3fs.S3FileSystem.clear_instance_cache()
    yield proxy
    proxy.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def store(proxy: Proxy, s3_root: str, tmp_path: Path) -> Store:
    return Store(f"{s3_root}/{tmp_path.name}", tmp_path / "scratch")


def attempt_of(store: Store, fingerprint: str):
    attempt = store.new_attempt("pack", fingerprint)
    (attempt.out / "rows").write_bytes(b"tokens" * 1000)
    return attempt


def test_an_answer_of_500_now_and_then_costs_nothing(store: Store, proxy: Proxy):
    asked = itertools.count()
    refused: Counter[str] = Counter()

    def refuse(method: str, path: str) -> bool:
        """Refuse each third request, but none five times: s3fs gives up then, and two holders take turns by chance."""
        now = next(asked) % 3 == 0 and refused[path] < 4
        refused[path] += now
        return now

    proxy.refuse = refuse
    store.publish(attempt_of(store, "f"), RECORD)
    assert (store.fetch("pack", "f").path / "rows").read_bytes() == b"tokens" * 1000
    lease = Lease(store, "tiny", "ann", beat_s=0.2).acquire(wait=False)
    with pytest.raises(LeaseHeld, match="ann"):
        Lease(store, "tiny", "bob", beat_s=0.2, patience_beats=300).acquire(wait=False)
    lease.release()
    assert proxy.failed > 10


def test_a_publication_whose_answer_was_lost_is_a_publication(store: Store, proxy: Proxy):
    """The manifest was created, but the answer was 500: asked again, the store says that it exists."""
    lost = iter([True])
    proxy.lose = lambda method, path: method == "PUT" and "artifact.json" in path and next(lost, False)
    store.publish(attempt_of(store, "f"), RECORD)
    assert proxy.failed == 1
    assert (store.fetch("pack", "f").path / "rows").read_bytes() == b"tokens" * 1000


def test_a_store_that_only_answers_500_is_named_and_the_attempt_is_published_later(store: Store, proxy: Proxy):
    store.publish(attempt_of(store, "good"), RECORD)
    attempt = attempt_of(store, "late")
    proxy.refuse = lambda method, path: method == "PUT"
    started = time.monotonic()
    with pytest.raises(OSError, match="internal error") as said:
        store.publish(attempt, RECORD)
    print(f"said after {time.monotonic() - started:.1f} s: {type(said.value).__name__}: {said.value}")
    proxy.refuse = lambda method, path: False
    assert store.find("pack", "late") is None
    store.fetch("pack", "good")
    store.publish(attempt, RECORD)
    assert (store.fetch("pack", "late").path / "rows").read_bytes() == b"tokens" * 1000


def test_a_slow_store_takes_no_lease_from_a_live_holder(store: Store, proxy: Proxy):
    """The holder's writes are slower than the other's beat; only its patience has to be longer than a write."""
    lease = Lease(store, "tiny", "ann", beat_s=0.3).acquire(wait=False)
    proxy.slow, proxy.delay_s = "PUT", 1.0
    with pytest.raises(LeaseHeld, match="ann"):
        Lease(store, "tiny", "bob", beat_s=0.3, patience_beats=200).acquire(wait=False)
    assert not lease.lost.is_set()
    proxy.delay_s = 0
    lease.release()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", ["500", "hangs up", "gone"])
def test_a_lease_outlives_a_store_that_is_away_for_a_while(store: Store, proxy: Proxy, monkeypatch, fault: str):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client gives up after 2 s; it takes 9 s without this
    lease = Lease(store, "tiny", "ann", beat_s=0.2).acquire(wait=False)
    if fault == "500":
        proxy.refuse = lambda method, path: True
    elif fault == "hangs up":
        proxy.hang_up = True
    else:
        proxy.stop()
    time.sleep(8)
    proxy.refuse, proxy.hang_up = (lambda method, path: False), False
    if fault == "gone":
        proxy.start()
    with pytest.raises(LeaseHeld, match="ann"):
        Lease(store, "tiny", "bob", beat_s=0.2, patience_beats=300).acquire(wait=False)
    lease.release()
