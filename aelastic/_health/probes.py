"""Questions to a rank's port or server. Each is asked once and answers "" for yes, else why not.

Run in plain tasks, which may be cancelled. Names are looked up in the threads that are given, never on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from typing import Any
from urllib.parse import SplitResult, urlsplit

from .._conditions import HttpGet, TcpPort

CONNECT_WITHIN = 1.0
"""Seconds that a connection may take."""


async def ask_port(condition: TcpPort, threads: Executor) -> str:
    """Whether something accepts connections there."""
    try:
        async with asyncio.timeout(CONNECT_WITHIN):
            (await connected(condition.host, condition.port, threads)).close()
    except TimeoutError:
        return f"no answer within {CONNECT_WITHIN:g} s"
    except (OSError, ValueError) as error:  # the second for a host that can't be a name
        return why(error)
    return ""


async def ask_server(condition: HttpGet, threads: Executor) -> str:
    """Whether a GET is answered as expected."""
    try:
        async with asyncio.timeout(condition.timeout):
            status = await status_of(urlsplit(condition.url), threads)
    except TimeoutError:
        return f"no answer within {condition.timeout:g} s"
    except (OSError, ValueError) as error:
        return why(error)
    return "" if condition.expects(status) else f"status {status}"


def why(error: Exception) -> str:
    """The error in words."""
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)  # asyncio has put the address in its place
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


async def connected(host: str, port: int, threads: Executor) -> socket.socket:
    """Connect to the first address of the host that accepts.

    Raises:
        OSError: of the last address tried.
    """
    failed: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await _addresses(host, port, threads):
        made = socket.socket(family, kind, protocol)
        try:
            made.setblocking(False)  # noqa: FBT003  # positional only
            await asyncio.get_running_loop().sock_connect(made, address)
            # Where nobody listens on a port of the ephemeral range, the kernel may pick that very port for our end,
            # and the two ends of one socket meet.
            if made.getsockname() == made.getpeername():
                raise ConnectionRefusedError("nobody but this probe itself is there")
        except OSError as error:
            made.close()
            failed = error
        except BaseException:
            made.close()
            raise
        else:
            return made
    raise failed


async def _addresses(host: str, port: int, threads: Executor) -> list[Any]:
    def look_up(flags: int) -> list[Any]:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)

    with contextlib.suppress(socket.gaierror):
        return look_up(socket.AI_NUMERICHOST)  # asks nobody
    return await asyncio.get_running_loop().run_in_executor(threads, look_up, 0)


async def status_of(url: SplitResult, threads: Executor) -> int:
    """Ask for a page; the status code of the answer, of which nothing else is read.

    Raises:
        OSError: if there is no connection.
        ValueError: if the answer is no HTTP.
    """
    secure = _unverified() if url.scheme == "https" else None
    host = url.hostname or ""
    made = await connected(host, url.port or (443 if secure else 80), threads)
    async with _stream(made, secure, host) as (reader, writer):
        path = f"{url.path or '/'}{f'?{url.query}' if url.query else ''}"
        request = f"GET {path} HTTP/1.1\r\nHost: {url.netloc.rpartition('@')[2]}\r\nConnection: close\r\n"
        writer.write(f"{request}User-Agent: aelastic\r\nAccept: */*\r\n\r\n".encode())
        line = await reader.readline()
    protocol, _, rest = line.decode("latin-1").partition(" ")
    if not protocol.startswith("HTTP/") or not rest[:3].isdecimal():
        raise ValueError(f"an answer that is no HTTP: {line[:60]!r}" if line else "the connection was closed")
    return int(rest[:3])


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@contextlib.asynccontextmanager
async def _stream(
    made: socket.socket, secure: ssl.SSLContext | None, host: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    try:
        reader, writer = await asyncio.open_connection(sock=made, ssl=secure, server_hostname=host if secure else None)
    except BaseException:
        made.close()
        raise
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
