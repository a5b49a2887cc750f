"""Another node's keeper: a connection to it, and a single question."""

from __future__ import annotations

from typing import Any

from holdfast.snapshot.view import Member
from holdfast.snapshot.wire import Connection


def reach(member: Member, *, timeout_s: float = 60.0) -> Connection:
    """A connection to a keeper, where its membership says it listens. Raises KeeperUnreachable."""
    return Connection((member.address, member.port), member.token, timeout_s=timeout_s)


def ask(member: Member, verb: str, /, *, timeout_s: float = 600.0, **fields: Any) -> Any:
    """One question to a keeper; a long answer is waited for. Raises KeeperUnreachable, or what the keeper answers with."""
    connection = reach(member, timeout_s=timeout_s)
    try:
        return connection.ask(verb, **fields)
    finally:
        connection.close()
