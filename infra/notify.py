"""Tell people how a run ended: one JSON POST to a webhook (Slack, Teams and ntfy read its `text`;
programs the rest).

The address is often a secret, so it is taken from the command line or LONGREACH_NOTIFY_URL, and of
it only the host is ever shown; a bearer token comes from LONGREACH_NOTIFY_TOKEN alone. A webhook
that fails changes no exit code.

    LONGREACH_NOTIFY_URL=https://hooks.example.org/T0/B0/secret longreach run retrain
"""

import os
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

URL, TOKEN = "LONGREACH_NOTIFY_URL", "LONGREACH_NOTIFY_TOKEN"
Ending = Literal["success", "failure", "refused", "stopped"]


def check_url(url: str) -> None:
    """Raise ValueError, which does not repeat the address, unless it is an http(s) one."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--notify and {URL} want an http:// or https:// address, got one of scheme {parts.scheme!r}")


def notify(url: str, ending: Ending, recipe: str, facts: Mapping[str, Any], timeout_s: float = 10.0) -> str:
    """POST {"text", "recipe", "status", ...facts}; return "", or why it did not arrive, without the
    address."""
    import requests

    mark = {"success": "done", "failure": "FAILED", "refused": "refused by the gate", "stopped": "stopped"}[ending]
    body = {"text": f"longreach: {recipe} {mark}. {facts.get('headline', '')}".strip(), "recipe": recipe}
    token = os.environ.get(TOKEN)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = requests.post(url, json={**body, "status": ending, **facts}, headers=headers, timeout=timeout_s)
    except (requests.RequestException, ValueError) as error:  # ValueError: a token that no header can hold
        return f"the webhook at {urlsplit(url).hostname} was not reached ({type(error).__name__})"
    return "" if answer.ok else f"the webhook at {urlsplit(url).hostname} answered HTTP {answer.status_code}"
