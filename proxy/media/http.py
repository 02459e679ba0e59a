"""Pictures from http: and https: URLs, without becoming a door into private networks.

Each hop of a redirect chain is checked alike: scheme, host name (where only some may be) → all its addresses, every
one of them public or in an allowed network. The connection then goes to the address that was checked, not to the name,
so that a second look-up can't give another one. Nothing of the client's request (cookies, authorisation) is sent along.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx

from epd.errors import ConfigError, InvalidRequest, MediaForbidden, MediaUnavailable, RequestTooLarge

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Awaitable[list[str]]]

MAX_REDIRECTS = 3
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
_IPV4_COMPATIBLE = ipaddress.ip_network("::/96")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host, as numbers. Also reads the decimal and hexadecimal forms that the C library reads."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Networks such as 127.0.0.0/8 or fd00::/8.

    Raises:
        ConfigError: one is none.
    """
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as error:
        raise ConfigError(f"--allowed-private-media: {error}") from error


def is_allowed(address: IPAddress, allowed: Sequence[Network] = ()) -> bool:
    """Whether pictures may be fetched from `address`: it is in an allowed network, or public through and through."""
    if any(address in network for network in allowed):
        return True
    if isinstance(address, ipaddress.IPv6Address):
        inner = _embedded_ipv4(address)
        if inner is not None:
            return is_allowed(inner, allowed)
        if address.is_site_local:  # deprecated, but routed inside some networks; `is_global` calls it global
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one leads to: mapped, 6to4, Teredo, NAT64 or the old compatible form."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in network for network in _NAT64) or (address in _IPV4_COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


class Domains:
    """Hosts that pictures may come from: names as they are, and for `*.example.com` all below that.

    Args:
        texts: the names; none: all hosts.

    Raises:
        ConfigError: one is no name of a host.
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._is_open = not texts
        self._names: set[str] = set()
        self._parents: list[str] = []
        for text in texts:
            below = text.startswith("*.")
            name = _plain_host(text.removeprefix("*.").removeprefix("[").removesuffix("]"))
            if not name or set(name) & set("/*@?# ") or (":" in name and not _is_ipv6(name)):
                raise ConfigError(f"--allowed-media-domains {text}: want names such as example.com or *.example.com")
            if below:
                self._parents.append(f".{name}")
            else:
                self._names.add(name)

    def __contains__(self, host: object) -> bool:
        name = _plain_host(str(host))
        return self._is_open or name in self._names or name.endswith(tuple(self._parents))


def _plain_host(host: str) -> str:
    """As names are compared: small letters, other scripts encoded, without the dot of the root."""
    try:
        host = host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        return ""  # which nobody allows
    return host.lower().removesuffix(".")


def _is_ipv6(text: str) -> bool:
    try:
        return isinstance(ipaddress.ip_address(text), ipaddress.IPv6Address)
    except ValueError:
        return False


class HttpFetcher:
    """Fetches pictures within limits.

    Args:
        max_bytes: of one picture.
        timeout_s: for all hops together.
        allowed: private networks to allow.
        domains: hosts to allow, those that redirects lead to included.
        resolver: host and port → addresses; tests put their own in.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout_s: float,
        allowed: Sequence[Network] = (),
        domains: Domains | None = None,
        resolver: Resolver = resolve,
    ) -> None:
        self._max_bytes = max_bytes
        self._domains = domains or Domains()
        self._timeout_s = timeout_s
        self._allowed = tuple(allowed)
        self._resolve = resolver
        self._tls: ssl.SSLContext | None = None

    async def fetch(self, url: str, hold: Callable[[int], None] = lambda _: None) -> bytes:
        """The body that `url` leads to.

        Args:
            url: of a picture.
            hold: is told of bytes as they come; what it raises ends the fetch.

        Raises:
            InvalidRequest: not a URL.
            MediaForbidden: a host on the way is not allowed, or its address not public.
            MediaUnavailable: no answer in time, or not a 200.
            RequestTooLarge: more bytes than allowed.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(url, hold)
        except TimeoutError:
            raise MediaUnavailable(f"The image URL did not answer within {self._timeout_s:g} s.") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise MediaUnavailable(f"The image URL could not be fetched ({type(error).__name__}).") from error

    async def _follow(self, url: str, hold: Callable[[int], None]) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            parts = _checked_url(url)
            result = await self._get(parts, await self._checked_address(parts), hold)
            if isinstance(result, bytes):
                return result
            url = _joined(url, result)
        raise MediaUnavailable(f"The image URL redirects more than {MAX_REDIRECTS} times.")

    async def _checked_address(self, parts: SplitResult) -> IPAddress:
        host = parts.hostname or ""
        if host not in self._domains:
            raise MediaForbidden("The image URL leads to a host that is not among --allowed-media-domains.")
        try:
            found = await self._resolve(host, _port(parts))
        except (OSError, UnicodeError):
            raise MediaUnavailable("The host of the image URL could not be found.") from None
        addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in found]
        # One bad address among good ones is how a rebinding name looks like; refuse them all.
        if not addresses or not all(is_allowed(address, self._allowed) for address in addresses):
            raise MediaForbidden("The image URL leads to an address that is not public; nothing is fetched there.")
        return addresses[0]

    async def _get(self, parts: SplitResult, address: IPAddress, hold: Callable[[int], None]) -> bytes | str:
        """The body, or where a redirect points to."""
        host, name = _bracketed(str(address)), _ascii_host(parts)
        pinned = parts._replace(netloc=f"{host}:{_port(parts)}", fragment="").geturl()
        headers = {
            "host": name if parts.port is None else f"{name}:{parts.port}",
            "accept": "image/*",
            "accept-encoding": "identity",
            "user-agent": "epd",
        }
        async with httpx.AsyncClient(trust_env=False, verify=self._tls_context(parts.scheme)) as client:
            extensions = {"sni_hostname": name.strip("[]")}  # certificates are checked against the name
            request = client.build_request(
                "GET", pinned, headers=headers, extensions=extensions, timeout=self._timeout_s
            )
            response = await client.send(request, stream=True)
            try:
                return await self._read(response, hold)
            finally:
                await response.aclose()

    async def _read(self, response: httpx.Response, hold: Callable[[int], None]) -> bytes | str:
        if response.status_code in _REDIRECTS and "location" in response.headers:
            return response.headers["location"]
        if response.status_code != 200:
            raise MediaUnavailable(f"The image URL answered with status {response.status_code}.")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise MediaUnavailable("The image URL answered compressed though it was asked not to.")
        length = response.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_bytes:
            raise RequestTooLarge(f"The image is larger than {self._max_bytes} bytes.")
        data = bytearray()
        async for chunk in response.aiter_raw():
            if len(data) + len(chunk) > self._max_bytes:
                raise RequestTooLarge(f"The image is larger than {self._max_bytes} bytes.")
            hold(len(chunk))
            data += chunk
        return bytes(data)

    def _tls_context(self, scheme: str) -> ssl.SSLContext | bool:
        """One context for all fetches, made when first needed: loading the certificates takes a while."""
        if scheme != "https":
            return False
        if self._tls is None:
            self._tls = httpx.create_ssl_context(trust_env=False)
        return self._tls


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise InvalidRequest(f"The image URL redirects to a malformed one: {error}") from error


def _checked_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises on a bad port
    except ValueError as error:
        raise InvalidRequest(f"The image URL is malformed: {error}") from error
    if parts.scheme not in ("http", "https"):
        raise MediaForbidden("Redirects of image URLs may lead to http: and https: only.")
    if not parts.hostname:
        raise InvalidRequest("The image URL has no host.")
    return parts


def _ascii_host(parts: SplitResult) -> str:
    """The host as headers carry it; names in other scripts as the look-up encodes them."""
    host = parts.hostname or ""
    return _bracketed(host) if host.isascii() else host.encode("idna").decode()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)
