"""Report how a run ended, with one JSON POST to a webhook. Slack reads its `text`, programs the other
fields; docs/gate.md describes ntfy.

The URL is often a secret, so it comes from the command line or LONGREACH_NOTIFY_URL, and only its
host is ever shown. A bearer token comes from LONGREACH_NOTIFY_TOKEN only. A webhook that fails or
hangs does not change the run's exit code.

    LONGREACH_NOTIFY_URL=https://hooks.example.org/T0/B0/secret longreach run retrain
"""

import os
import threading
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urljoin, urlsplit

URL, TOKEN = "LONGREACH_NOTIFY_URL", "LONGREACH_NOTIFY_TOKEN"
Ending = Literal["success", "failure", "refused", "undecided", "stopped"]
MARKS: dict[Ending, str] = {
    "success": "done",
    "failure": "FAILED",
    "refused": "refused by the gate",
    "undecided": "done, but the gate has not decided",
    "stopped": "stopped",
}
LONGEST_TEXT = 2000
"""In characters; ntfy accepts messages of up to 4,096 bytes, Slack longer ones."""
MOST_REDIRECTS = 5


def check_url(url: str) -> None:
    """Raise ValueError unless the URL is an http(s) one. The message does not contain the URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--notify and {URL} need an http:// or https:// URL, but the scheme is {parts.scheme!r}")


def notify(url: str, ending: Ending, recipe: str, facts: Mapping[str, Any], timeout_s: float = 10.0) -> str:
    """POST {"text", "recipe", "status", ...facts}. Return "" or the reason for a failure, without the
    URL. Returns after `timeout_s` at the latest, whatever the receiver does."""
    import requests  # noqa: F401 (before the time counts: on a busy machine this takes seconds)

    body = {"text": text_of(ending, recipe, facts), "recipe": recipe, "status": ending, **facts}
    outcome = [f"did not answer within {timeout_s:g} s"]

    def post() -> None:
        outcome[0] = _post(url, body, timeout_s)

    # A thread, since the timeout of requests is between two bytes: a receiver that trickles never hits it.
    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    thread.join(timeout_s)
    trouble = outcome[0]
    return f"the webhook at {urlsplit(url).hostname} {trouble}" if trouble else ""


def text_of(ending: Ending, recipe: str, facts: Mapping[str, Any]) -> str:
    """Return the message for people: how the run ended, why, and the report's headline."""
    reasons = list(facts.get("refusals") or ())
    for stage, why in (facts.get("failed") or {}).items():  # the first one failed, the others depend on it
        reason = f"{stage}: {why}"
        if more := len(facts["failed"]) - 1:
            reason += f" (and {more} more stages)"
        reasons.append(reason)
        break
    if facts.get("undecided"):
        reasons.append(facts["undecided"])
    text = f"longreach: {recipe} {MARKS[ending]}"
    if reasons:
        text += f": {'; '.join(reasons)}"
    if facts.get("headline"):
        text += f". {facts['headline']}"
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 3] + "..."


def _post(url: str, body: Mapping[str, Any], timeout_s: float) -> str:
    """Return "" or, for the end of a sentence, what happened to the request."""
    import requests

    token = os.environ.get(TOKEN)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        for _ in range(1 + MOST_REDIRECTS):
            # stream: the body of the response is not read
            with requests.post(
                url, json=body, headers=headers, timeout=timeout_s, stream=True, allow_redirects=False
            ) as answer:
                if not answer.is_redirect:
                    return "" if 200 <= answer.status_code < 300 else f"answered HTTP {answer.status_code}"
                target = urlsplit(urljoin(url, answer.headers["Location"]))
            # 301, 302 and 303 turn a POST into a GET without the message; the token must not go to another host, nor
            # unencrypted where it was encrypted before
            elsewhere = target.hostname != urlsplit(url).hostname
            opened = urlsplit(url).scheme == "https" != target.scheme
            if answer.status_code not in (307, 308) or elsewhere or opened:
                place = f"{target.scheme}://{target.netloc.rpartition('@')[2]}"
                return f"redirects to {place} (HTTP {answer.status_code}): give the address there"
            url = target.geturl()
        return f"redirects more than {MOST_REDIRECTS} times"
    except Exception as error:  # noqa: BLE001 (a webhook never changes how a run ends)
        return f"was not reached ({type(error).__name__})"
