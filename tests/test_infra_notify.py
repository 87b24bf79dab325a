"""Webhooks: the text says why, receivers read it in their own way, and none of them can hold a run."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from longreach.infra.notify import LONGEST_TEXT, notify, text_of

REFUSAL = "perplexity_ratio at 12,288 tokens, to the champion: 1.05, required: at most 1.01"


@pytest.mark.parametrize(
    ("ending", "facts", "text"),
    [
        ("success", {"headline": "Use 8,192 tokens."}, "longreach: retrain done. Use 8,192 tokens."),
        ("refused", {"refusals": [REFUSAL]}, f"longreach: retrain refused by the gate: {REFUSAL}"),
        (
            "failure",
            {"failed": {"pack": "no such file: a.txt", "finetune[lora]": "not run, since pack failed"}},
            "longreach: retrain FAILED: pack: no such file: a.txt (and 1 more stages)",
        ),
        (
            "undecided",
            {"undecided": "MLflow is away"},
            "longreach: retrain done, but the gate has not decided: MLflow is away",
        ),
        ("stopped", {"headline": "SystemExit: 143"}, "longreach: retrain stopped. SystemExit: 143"),
    ],
)
def test_the_text_says_how_it_ended_and_why(ending, facts, text):
    assert text_of(ending, "retrain", facts) == text


def test_a_long_text_is_cut_to_what_receivers_take():
    assert len(text_of("failure", "retrain", {"failed": {"pack": "x" * 10_000}})) == LONGEST_TEXT


class Receiver(BaseHTTPRequestHandler):
    """What Slack, ntfy and a plain receiver do with a POST; `server.shown` has what people would read."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        place = urlsplit(self.path)
        choices = {key: values[0] for key, values in parse_qs(place.query).items()}
        if place.path == "/slack":
            message = json.loads(body)["text"]
        elif choices.get("tpl") == "1":  # ntfy: a Go template over the JSON
            message = re.sub(r"\{\{\.(\w+)\}\}", lambda field: str(json.loads(body)[field[1]]), choices["m"])
        else:
            message = body.decode()
        self.server.shown.append(message)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_slack_ntfy_and_a_plain_receiver_get_what_they_read():
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        server.shown = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        for path in ("/slack", "/topic?tpl=1&t={{.recipe}}&m={{.text}}", "/plain"):
            assert notify(base + path, "refused", "retrain", {"refusals": [REFUSAL], "gate": {"passed": False}}) == ""
        server.shutdown()
    slack, ntfy, plain = server.shown
    assert slack == ntfy == f"longreach: retrain refused by the gate: {REFUSAL}"
    assert json.loads(plain)["gate"] == {"passed": False}


def test_a_message_that_was_redirected_is_not_called_delivered():
    class Elsewhere(Receiver):
        def do_POST(self):
            if self.path == "/plain":
                super().do_POST()
            else:
                self.send_response(int(self.path.strip("/")))
                self.send_header(
                    "Location", "/plain" if self.path in ("/303", "/308") else "https://hooks.example.org:8443/secret"
                )
                self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        server.shown = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        said = [
            notify(f"{base}/{code}", "success", "retrain", {}, timeout_s=60) for code in (301, 302, 307, 304, 308, 303)
        ]
        server.shutdown()
    to = "redirects to https://hooks.example.org:8443"
    assert said[:3] == [f"the webhook at 127.0.0.1 {to} (HTTP {n}): give the address there" for n in (301, 302, 307)]
    assert said[3:5] == ["the webhook at 127.0.0.1 answered HTTP 304", ""]
    assert said[5] == f"the webhook at 127.0.0.1 redirects to {base} (HTTP 303): give the address there"
    assert len(server.shown) == 1, "308 on the same host keeps the message"


@pytest.fixture(params=["status line", "headers", "body", "nothing"])
def trickler(request):
    """A receiver whose answer goes on for ever, a byte every tenth of a second."""
    parts = {"status line": b"HTTP/1.1 2", "headers": b"HTTP/1.1 200 OK\r\nX-A: ", "body": b"HTTP/1.1 200 OK\r\n\r\n"}

    def serve():
        client, _ = listener.accept()
        with client:
            client.recv(65536)
            client.sendall(parts.get(request.param, b""))
            while not over.wait(0.1):
                try:
                    client.sendall(b"0" if request.param != "nothing" else b"")
                except OSError:
                    return

    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield request.param, f"http://127.0.0.1:{listener.getsockname()[1]}/secret"
        over.set()


def test_a_receiver_that_trickles_does_not_hold_a_run_or_change_its_exit_code(trickler):
    kind, url = trickler
    timeout_s = 20 if kind == "body" else 1  # a status that comes at once is awaited on a busy machine, too
    code = (
        "import sys; from longreach.infra.notify import notify; "
        f"print(notify({url!r}, 'refused', 'retrain', {{}}, timeout_s={timeout_s})); sys.exit(3)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert time.monotonic() - began < 30
    said = done.stdout.strip()
    if kind == "body":  # its status says all
        assert said == ""
    else:
        assert re.fullmatch(r"the webhook at 127\.0\.0\.1 (did not answer within 1 s|was not reached \(\w+\))", said)
