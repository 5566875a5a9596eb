"""What a server's refusals mean to a user: HTTP status and the Hub's error codes as `HubkitError`, tokens hidden.

The Hub explains a refusal in the headers ``X-Error-Code`` and ``X-Error-Message``.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from errno import ECONNREFUSED

from hubkit.compat.huggingface_hub import is_connect_timeout, is_forbidden
from hubkit.errors import UNDECIDED, HubkitError

_SECRETS = (
    re.compile(r"hf_[A-Za-z0-9]{6,}|hf_jwt_[\w.-]+|hf_oauth_[\w.-]+"),
    re.compile(r"(?i)(?<=bearer )[^\s'\",;]+"),
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),
)


@dataclass(frozen=True)
class Asked:
    """What was asked of a registry, for the message when it refuses.

    Args:
        registry: its name (an address without credentials).
        repo: ``org/name``.
        revision: branch, tag or commit.
        path: the file.
        known: whether a token went with the request.
    """

    registry: str
    repo: str = ""
    revision: str | None = None
    path: str = ""
    known: bool = False

    @property
    def where(self) -> str:
        """Registry, repository, revision and file in one line."""
        text = f"{self.registry}/{self.repo}" if self.repo else self.registry
        return text + (f"@{self.revision}" if self.revision else "") + (f"  {self.path}" if self.path else "")


def redact(text: str) -> str:
    """`text` with tokens, bearer credentials and user names in addresses replaced by ``<hidden>``."""
    for pattern in _SECRETS:
        text = pattern.sub("<hidden>", text)
    return text


def from_status(status: int, code: str, message: str, asked: Asked) -> HubkitError:
    """The refusal that an HTTP answer is.

    Args:
        status: HTTP status, 400 or higher.
        code: ``X-Error-Code`` or "".
        message: ``X-Error-Message`` or whatever text the server gave.
        asked: what was asked.
    """
    said = redact(message)[:300]
    if code == "GatedRepo":
        fix = f"ask for access at {asked.registry}/{asked.repo}" + ("" if asked.known else ", then: hf auth login")
        return HubkitError("HK-GATED", f"{asked.repo} is gated", where=asked.where, have=said, fix=fix)
    if code == "QuotaExceeded" or status == 507:
        fix = "remove repositories that nobody needs there, or ask whoever keeps the registry for more"
        return HubkitError("HK-QUOTA", "the registry has no room left for this", where=asked.where, have=said, fix=fix)
    if status == 404 or (status == 410 and not code):
        return _missing(code, said, asked)
    table = {
        400: ("HK-REGISTRY", "the registry finds the request wrong", ""),
        401: (
            "HK-AUTH",
            "the registry does not accept the token" if asked.known else "it does not exist, or a token is needed",
            _sign_in(asked),
        ),
        403: ("HK-FORBIDDEN", "the registry does not allow this", "use a token with the right to do this"),
        409: ("HK-EXISTS", "it is there already", ""),
        412: ("HK-STALE", "the branch has moved since it was read", "pull again, then push again"),
        413: ("HK-LIMIT", "larger than the registry takes", ""),
        429: ("HK-BUSY", "the registry asks to wait: too many requests", "run it again later"),
    }
    if status >= 500:
        return HubkitError("HK-OFFLINE", "the registry fails", where=asked.where, have=f"HTTP {status} {said}".strip())
    row = table.get(status, ("HK-REGISTRY", "the registry refuses", ""))
    return HubkitError(row[0], row[1], where=asked.where, have=f"HTTP {status} {said}".strip(), fix=row[2])


def _missing(code: str, said: str, asked: Asked) -> HubkitError:
    if code == "RevisionNotFound":
        what = f"{asked.repo} has no revision {asked.revision or 'main'}"
        return HubkitError("HK-NO-REVISION", what, where=asked.where, have=said)
    if code == "EntryNotFound":
        return HubkitError("HK-NOT-FOUND", "no such file", where=asked.where, have=said)
    what = f"no repository {asked.repo}" if asked.repo else "the registry does not know this request"
    fix = "check the name" + ("" if asked.known else f"; if it is private: {_sign_in(asked)}")
    return HubkitError("HK-NOT-FOUND", what, where=asked.where, have=said, fix=fix)


def _sign_in(asked: Asked) -> str:
    if asked.registry == "https://huggingface.co":
        return "hf auth login    or set HF_TOKEN"
    return f"set HUBKIT_REGISTRY={asked.registry} and HUBKIT_TOKEN to a token of it"


def offline(reason: BaseException | str, asked: Asked) -> HubkitError:
    """The registry does not answer: refused, unknown host, timeout, or switched off by HF_HUB_OFFLINE."""
    if isinstance(reason, BaseException) and any(map(is_forbidden, chain(reason))):
        fix = "unset HF_HUB_OFFLINE, or use --offline for what was pulled before"
        return HubkitError("HK-OFFLINE", "HF_HUB_OFFLINE forbids the network", where=asked.where, fix=fix)
    causes = [str(link) for link in chain(reason) if str(link)] if isinstance(reason, BaseException) else [reason]
    have = redact(" ".join((causes or [type(reason).__name__])[-1].split()))[:300]
    fix = "check the address and the network, or use --offline for what was pulled before"
    return HubkitError("HK-OFFLINE", "the registry does not answer", where=asked.where, have=have, fix=fix)


def malformed(what: str, asked: Asked, have: str = "") -> HubkitError:
    """The server's answer is not what its protocol promises."""
    return HubkitError(
        "HK-REGISTRY",
        f"the registry's answer is wrong: {what}",
        where=asked.where,
        have=redact(have)[:300],
        status=UNDECIDED,
    )


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it, as a traceback shows it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_hopeless(error: BaseException) -> bool:
    """Whether trying again at once is pointless: nobody there, no such host, no way to it, or offline by choice."""
    for link in chain(error):
        refused = isinstance(link, ConnectionRefusedError) or getattr(link, "errno", None) == ECONNREFUSED
        if refused or is_forbidden(link) or is_connect_timeout(link) or isinstance(link, socket.gaierror):
            return True
    return False
