"""Images that strangers send: data URLs decoded within limits, and http(s) only where the operator allows a host.

Fetching on a caller's behalf is how servers are turned against their own networks, so it is off by default, and where
it is on: names are resolved once, every address must be public, the connection goes to the very address that was
checked, and redirects are not followed. Nothing here knows about models.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from visrl.conversation import View
from visrl.data_url import is_data_url
from visrl.serve.errors import RequestError
from visrl.serve.image_decoders import ImageDecoders
from visrl.serve.schemas import ImageUrl, Limits

FETCH_S = 10.0
FETCHERS = 2  # images fetched at once
# The characters of RFC 3986 alone: a backslash, blank or control character is read differently by different parsers.
PLAIN_URL = re.compile(r"(https?)://([a-z0-9.-]+)(?::(\d{1,5}))?(/[A-Za-z0-9\-._~!$&'()*+,;=:@%/?]*)?", re.IGNORECASE)
# IANA's registries of special-purpose addresses. Tables of our own: what `ipaddress` knows changes with Python.
NOT_PUBLIC_4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
            "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24",
            "203.0.113.0/24", "224.0.0.0/3",
        ),
    )
)  # fmt: skip
PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
NOT_PUBLIC_6 = tuple(  # protocol assignments with Teredo, documentation twice, 6to4, the 6bone of old
    map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20", "2002::/16", "3ffe::/16"))
)
NAT64 = ipaddress.IPv6Network(
    "64:ff9b::/96"
)  # the well-known prefix; the local one (64:ff9b:1::/48) is a network's own

Resolve = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, from the system's resolver."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an address lies in the public internet. What is not known to, does not.

    Of version 6 that is the one block given out (2000::/3) without what is reserved in it, and version 4 wrapped in it
    where that is public itself. Tunnels (6to4, Teredo) are not followed: their ends are anybody's.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in NOT_PUBLIC_4)
    if ip.scope_id is not None:  # an address of one link only
        return False
    wrapped = ip.ipv4_mapped
    if wrapped is None and ip in NAT64:
        wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if wrapped is not None:
        return is_public(str(wrapped))
    return ip in PUBLIC_6 and not any(ip in network for network in NOT_PUBLIC_6)


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches images from the hosts that the operator allows, each as `name` or `name:port`; none by default."""

    allowed_hosts: frozenset[str] = frozenset()
    resolve: Resolve = resolve
    is_public: Callable[[str], bool] = is_public
    timeout_s: float = FETCH_S

    def fetch(self, url: str, max_bytes: int) -> bytes:
        """The bytes at `url`.

        Raises:
            RequestError: 400 where the URL is not allowed or does not give a body of at most `max_bytes` in time.
        """
        match = PLAIN_URL.fullmatch(url)
        if match is None:
            raise RequestError(400, "this picture URL is not plain http(s) (RFC 3986 characters, no user, no fragment)")
        scheme, host, port_text, path = match[1].lower(), match[2].lower(), match[3], match[4] or "/"
        port = int(port_text) if port_text else (443 if scheme == "https" else 80)
        allowed_as = f"{host}:{port}" if port_text and port not in (80, 443) else host
        if allowed_as not in self.allowed_hosts:
            raise RequestError(400, f"this server does not fetch pictures from {allowed_as}; send a data URL")
        try:
            addresses = self.resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise RequestError(400, f"the host {host} of a picture cannot be resolved") from error
        if not addresses or not all(self.is_public(address) for address in addresses):
            raise RequestError(400, f"the host {host} of a picture has an address that is not public")
        return self._get(scheme, host, port, path, addresses[0], max_bytes)

    def _get(self, scheme: str, host: str, port: int, path: str, address: str, max_bytes: int) -> bytes:
        connection = _PinnedConnection(scheme, host, port, address, self.timeout_s)
        # Time-outs of sockets start anew with every byte; this one ends the connection however slowly it drips.
        alarm = threading.Timer(self.timeout_s, connection.cut)
        alarm.daemon = True
        alarm.start()
        try:
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "visrl"})
            response = connection.getresponse()
            if response.status != 200:
                raise RequestError(400, f"{host} answered {response.status} for a picture; redirects are not followed")
            data = response.read(max_bytes + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = connection.is_cut or isinstance(error, TimeoutError)
            raise RequestError(400, f"a picture from {host} {'came too late' if late else 'is cut short'}") from error
        finally:
            alarm.cancel()
            connection.close()
        if connection.is_cut:  # the end of a body without a length looks like its whole
            raise RequestError(400, f"a picture from {host} came too late")
        if len(data) > max_bytes:
            raise RequestError(400, f"a picture from {host} is larger than {max_bytes:,} bytes")
        return data


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to one checked address; the name is used for the Host header and the certificate only."""

    def __init__(self, scheme: str, host: str, port: int, address: str, timeout_s: float) -> None:
        super().__init__(host, port, timeout=timeout_s)
        if scheme == "https":
            self.default_port = http.client.HTTPS_PORT  # so that the Host header leaves 443 out
        self._scheme, self._address = scheme, address
        self._held: socket.socket | None = None  # `sock` is forgotten as soon as a body without a length begins
        self.is_cut = False

    def connect(self) -> None:
        self._held = self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._scheme == "https":
            context = ssl.create_default_context()
            self._held = self.sock = context.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock.do_handshake()
        if self.is_cut:
            raise TimeoutError

    def cut(self) -> None:
        """End the connection from another thread."""
        self.is_cut = True
        if self._held is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself
                self._held.shutdown(socket.SHUT_RDWR)


class Opener:
    """Opens the images of requests, one after another for each."""

    def __init__(self, limits: Limits, fetcher: Fetcher) -> None:
        self.limits, self.fetcher = limits, fetcher
        self.decoders = ImageDecoders()
        # Threads of their own: one whose client has left still holds its place until its host has answered.
        self._fetchers = ThreadPoolExecutor(FETCHERS, "fetcher")

    async def open(
        self, image_urls: Sequence[ImageUrl], hold: Callable[[int], object] = lambda pixels: None
    ) -> list[View]:
        """The views of a request's images; equal bytes are one view. What they were sent as is dropped.

        `hold` is told the pixels of each as soon as it is open, and may refuse to have any more.

        Raises:
            RequestError: 400 with the number of the image and what is wrong with it.
        """
        opened: dict[str, tuple[str, Image.Image]] = {}  # by URL
        views: dict[str, View] = {}
        keys = []
        for number, asked in enumerate(image_urls, start=1):
            if asked.url not in opened:
                data = await self._data(asked.url, number)
                key, image = await self.decoders.open(
                    data, f"picture {number}", self.limits.image_pixels, self.limits.body_bytes
                )
                if key not in {known for known, _ in opened.values()}:
                    hold(image.width * image.height)
                opened[asked.url] = key, image
            key, image = opened[asked.url]
            is_crop = asked.detail == "low"
            key = f"{key}{'-crop' if is_crop else ''}"
            views.setdefault(key, View(key, image, is_crop))
            keys.append(key)
        for asked in image_urls:
            asked.url = ""
        return [views[key] for key in keys]

    async def _data(self, url: str, number: int) -> str | bytes:
        if is_data_url(url):
            return url
        if url[:7].lower() == "http://" or url[:8].lower() == "https://":
            return await asyncio.get_running_loop().run_in_executor(
                self._fetchers, self.fetcher.fetch, url, self.limits.body_bytes
            )
        raise RequestError(400, f"picture {number} must be a data URL (data:image/png;base64,…); paths are not read")

    def close(self) -> None:
        """Give up what is being opened."""
        self.decoders.close()
        self._fetchers.shutdown(wait=False, cancel_futures=True)
