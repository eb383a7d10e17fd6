"""Which hosts may be reached, and how: allowed hosts, proxy, certificates, keys, offline.

Every URL is checked here before a connection is opened; redirects are never followed, and nothing
but the configuration and the variables that it names decides where a request goes.
"""

import ipaddress
import os
import re
import ssl
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
# Headers that carry a secret: their values may stand in no configuration file.
SECRET_HEADERS = frozenset(
    "authorization proxy-authorization api-key x-api-key x-goog-api-key cookie "
    "ocp-apim-subscription-key x-auth-token".split()
)
_READABLE_BY_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class Network:
    """The settings of every connection of a run; `proxy_login` is "user:password"."""

    allow: tuple[str, ...] | None = None
    offline: bool = False
    ca_bundle: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    proxy: str | None = None
    proxy_login: str | None = field(default=None, repr=False)

    def check(self, url: str) -> None:
        """`ValueError` if the URL's host may not be reached."""
        host = host_of(url)
        if self.offline and not is_loopback(host):
            raise ValueError(
                f"{_shown(url)}: offline allows only this machine (localhost, 127.0.0.1, ::1); "
                "name a local teacher or leave offline out"
            )
        if self.allow is not None and not _is_allowed(host, self.allow):
            raise ValueError(
                f"{_shown(url)}: network.allow does not hold the host {host} "
                f"(allowed: {', '.join(self.allow) or 'none'}); add it to reach it"
            )

    def check_all(self, urls: Iterable[str]) -> None:
        """Check the URLs of every endpoint, and the proxy that stands before them."""
        for url in urls:
            self.check(url)
        if self.proxy is not None:
            self.check(self.proxy)

    def tls(self) -> ssl.SSLContext:
        """Certificates as configured; the system's authorities where none are named."""
        try:
            context = ssl.create_default_context(
                cafile=None if self.ca_bundle is None else str(self.ca_bundle)
            )
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"network.ca_bundle={self.ca_bundle}: {_reason(error)}") from None
        if self.client_certificate is not None:
            try:
                context.load_cert_chain(self.client_certificate, self.client_key)
            except (OSError, ssl.SSLError) as error:
                raise ValueError(
                    f"network.client_certificate={self.client_certificate}: {_reason(error)}"
                ) from None
        return context


def go_offline() -> None:
    """Tell the libraries of this process and its children to reach no hub and send no telemetry."""
    os.environ.update(OFFLINE)


PLAIN_URL = "it should be http(s)://host[:port][/path], without user, password or query"


def is_plain_url(value: object) -> bool:
    """Whether it is a URL that names a place and holds nothing else."""
    return isinstance(value, str) and re.fullmatch(r"https?://[^@?#\s]+", value) is not None


def host_of(url: str) -> str:
    """The host a URL names, in lower case."""
    try:
        host = urlsplit(url).hostname
    except ValueError:
        host = None
    if not host:
        raise ValueError(f"{_shown(url)}: no URL with a host")
    return host.lower().rstrip(".")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: by its address, or by the one name reserved for it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_headers(headers: Mapping[str, str]) -> None:
    """`ValueError` if a header that carries a secret stands in the configuration."""
    for name in headers:
        if name.lower() in SECRET_HEADERS:
            raise ValueError(
                f"headers.{name} would put a secret into the configuration; "
                "name an environment variable that holds it in headers_env"
            )


def read_variable(field_name: str, variable: str) -> str:
    """The value of an environment variable that a setting names."""
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"{field_name}={variable}: the environment variable is not set")
    return value


def read_key_file(path: Path) -> str:
    """The key in a file that only its owner can read."""
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) or mode & _READABLE_BY_OTHERS:
                raise ValueError(
                    f"api_key_file={path}: mode {stat.S_IMODE(mode):o} lets others read it; "
                    f"it should be 600: chmod 600 {path}"
                )
            key = file.read().strip()
    except OSError as error:
        raise ValueError(f"api_key_file={path}: {error.strerror}") from None
    if not key or any(character.isspace() for character in key):
        raise ValueError(f"api_key_file={path}: it should hold one key and nothing else")
    return key


def _is_allowed(host: str, allow: Iterable[str]) -> bool:
    return host in (name.lower().rstrip(".") for name in allow)


def _shown(url: str) -> str:
    """The URL without what may be secret in it."""
    return url.partition("?")[0].rpartition("@")[2] if "@" in url else url.partition("?")[0]


def _reason(error: OSError | ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"no certificate that can be used ({error.reason})"
    return error.strerror or str(error)
