"""One transmission of one chat request: sent once, never redirected, its outcome named.

The request goes out through aiohttp, whose parser is compiled: a call costs the client a fraction
of what the `openai` client costs. POST is never sent a second time by the library.
"""

import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple

import aiohttp

from data_gen.limiter import Gate
from data_gen.network import Network
from data_gen.prices import Usage

BUSY = {429}
BROKEN = {408, 409, 425}  # and every 5xx
MAYBE_PAID = {502, 504}  # a gateway gave up on an answer that may have been made
ABOUT_ONE_REQUEST = {400, 413, 422}  # and not about the endpoint or the key
KEEP_ALIVE_SECONDS = 4.0  # below the 5 s of common servers: a stale connection would cut a call
_JSON = {"Content-Type": "application/json"}
REQUEST_ID_HEADERS = ("x-request-id", "apim-request-id", "request-id")


class Reply(NamedTuple):
    """An answer. `usage` is None where the provider gave none; `raw_usage` is its JSON."""

    text: str
    finish: str
    usage: Usage | None
    raw_usage: str
    request_id: str


Kind = Literal["busy", "broken", "refused", "lasting"]


class Failure(Exception):
    """A transmission without an answer.

    busy: too many requests; broken: a later try may succeed; refused: this request will never be
    answered; lasting: no request will be. `wait` is what the server asked for, in seconds.
    """

    def __init__(
        self, message: str, kind: Kind, wait: float = 0.0, maybe_paid: bool = False
    ) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.wait = wait
        self.maybe_paid = maybe_paid


@dataclass(frozen=True)
class Address:
    """How a role's endpoints are spoken to; `secrets` are kept out of every message."""

    headers: Mapping[str, str] = field(repr=False)
    query: Mapping[str, str]
    timeout: float
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def hide(self, text: object) -> str:
        """The text in one line, without secrets, at most 200 characters."""
        line = " ".join(str(text).split())
        for secret in self.secrets:
            line = line.replace(secret, "***")
        return line if len(line) <= 200 else line[:197] + "..."


class Wire:
    """The connections of a run, and the gate of every endpoint."""

    def __init__(self, session: aiohttp.ClientSession, network: Network) -> None:
        self.session = session
        self._network = network
        self._gates: dict[tuple[object, ...], Gate] = {}
        self._timeouts: dict[float, aiohttp.ClientTimeout] = {}
        self._proxy: dict[str, Any] = {}
        self._login: dict[str, str] = {}
        if network.proxy is not None:
            self._proxy["proxy"] = network.proxy
            if network.proxy_login is not None:
                login = base64.b64encode(network.proxy_login.encode()).decode()
                self._login = {"Proxy-Authorization": f"Basic {login}"}

    def gate(
        self, url: str, at_once: int, requests_per_minute: int | None, tokens_per_minute: int | None
    ) -> Gate:
        """The gate of an endpoint: one for all roles that ask it with the same limits."""
        self._network.check(url)
        name = (url, at_once, requests_per_minute, tokens_per_minute)
        if name not in self._gates:
            self._gates[name] = Gate(url, at_once, requests_per_minute, tokens_per_minute)
        return self._gates[name]

    async def post_chat(self, url: str, data: bytes, address: Address) -> Reply:
        """Send one chat request; the answer, or the `Failure` that it came to."""
        status, headers, content = await self.send(
            "POST", f"{url}/chat/completions", address, data=data, headers=_JSON
        )
        if status != 200:
            raise failure_of(status, headers, content, address)
        return read_reply(content, headers, address)

    async def send(
        self, method: str, url: str, address: Address, **request: Any
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content of one request."""
        self._network.check(url)
        if address.timeout not in self._timeouts:
            self._timeouts[address.timeout] = aiohttp.ClientTimeout(total=address.timeout)
        headers = {**address.headers, **request.pop("headers", {})}
        proxy = self._proxy
        if self._login and url.startswith("https:"):
            proxy = {**proxy, "proxy_headers": self._login}  # for the tunnel, not for the server
        elif self._login:
            headers |= self._login
        params = {**address.query, **request.pop("params", {})}
        try:
            async with self.session.request(
                method,
                url,
                headers=headers,
                params=params or None,
                timeout=self._timeouts[address.timeout],
                allow_redirects=False,
                **proxy,
                **request,
            ) as response:
                return response.status, response.headers, await response.read()
        except aiohttp.ConnectionTimeoutError:
            raise Failure(f"no connection within {address.timeout:g} s", "broken") from None
        except TimeoutError:
            said = f"no answer within {address.timeout:g} s"
            raise Failure(said, "broken", maybe_paid=True) from None
        except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError) as error:
            raise Failure(f"cannot be reached: {address.hide(error)}", "broken") from None
        except aiohttp.InvalidURL:
            raise Failure("its URL cannot be used", "lasting") from None
        except (aiohttp.ClientError, OSError) as error:
            said = f"the connection was cut: {address.hide(error) or type(error).__name__}"
            raise Failure(said, "broken", maybe_paid=True) from None


@asynccontextmanager
async def open_wire(network: Network | None = None) -> AsyncIterator[Wire]:
    """The connections of one run: no proxy, key or cookie from the environment."""
    network = Network() if network is None else network
    connector = aiohttp.TCPConnector(
        limit=0, ssl=network.tls(), keepalive_timeout=KEEP_ALIVE_SECONDS, ttl_dns_cache=60
    )
    async with aiohttp.ClientSession(
        connector=connector,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": "data-gen"},
    ) as session:
        yield Wire(session, network)


def failure_of(
    status: int, headers: Mapping[str, str], content: bytes, address: Address
) -> Failure:
    """What a status that is not 200 means."""
    message, code = _read_error(content)
    said = f"HTTP {status}: {address.hide(message)}"
    wait = read_retry_after(headers.get("Retry-After"))
    if code == "insufficient_quota":
        return Failure(said, "lasting")
    if status in BUSY:
        return Failure(said, "busy", wait)
    if status in BROKEN or status >= 500:
        return Failure(said, "broken", wait, maybe_paid=status in MAYBE_PAID)
    return Failure(said, "refused" if status in ABOUT_ONE_REQUEST else "lasting")


def read_reply(content: bytes, headers: Mapping[str, str], address: Address) -> Reply:
    """The answer in a body; one that cannot be read may have been paid for."""
    try:
        value = json.loads(content)
        choice = value["choices"][0]
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, RecursionError):
        raise _unreadable(f"an answer that cannot be read: {address.hide(content[:80])}") from None
    except (AttributeError, IndexError, KeyError, TypeError):
        raise _unreadable("an answer that is no chat completion") from None
    text = "" if text is None else text
    if not isinstance(text, str) or not isinstance(finish, str | None):
        raise _unreadable("an answer that is no chat completion")
    usage = value.get("usage")
    request_id = next((headers[name] for name in REQUEST_ID_HEADERS if name in headers), "")
    if not request_id and isinstance(value.get("id"), str):
        request_id = value["id"]
    raw = "" if usage is None else json.dumps(usage, ensure_ascii=False)
    return Reply(text, finish or "", read_usage(usage), raw, request_id)


def _unreadable(message: str) -> Failure:
    return Failure(message, "broken", maybe_paid=True)


def read_usage(usage: Any) -> Usage | None:
    """Tokens as the provider counted them; None where it did not."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    return Usage(prompt, completion, min(prompt, cached) if isinstance(cached, int) else 0)


def read_retry_after(value: str | None) -> float:
    """Seconds to wait, from a number or a date; 0 for what is neither."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
        return seconds if 0 <= seconds < float("inf") else 0.0
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _read_error(content: bytes) -> tuple[str, str]:
    """(message, code) of an error body in any of the usual forms."""
    text = content[:2000].decode(errors="replace")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return text, ""
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return str(error), ""
    message = error.get("message")
    return str(message if message is not None else text), str(error.get("code") or "")
