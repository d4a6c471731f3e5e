"""How a request is refused, and one that is not."""

from __future__ import annotations

from typing import Any

CHAT = {"model": "red", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}


def refused(response: Any, status: int, parameter: str | None, code: str) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (parameter, code)
    assert response.headers["x-request-id"]
    return str(error["message"])
