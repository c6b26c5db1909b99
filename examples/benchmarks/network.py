"""Emulated links: one network namespace a rank, joined by a bridge, each sending at a limited rate.

    namespace 0: eth0 ──┐
    namespace 1: eth0 ──┼── bridge in a namespace of its own
    namespace 2: eth0 ──┘

Every ``eth0`` is one end of a veth pair with a token bucket filter (``tc ... tbf``). Nothing outside the namespaces is
touched, and all of it goes away with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TypeVar

INTERFACE = "eth0"
# Mbit/s by the name of the link. Loopback is as fast as the machine.
LINKS: dict[str, int | None] = {"loopback": None, "100mbit": 100, "1gbit": 1_000, "10gbit": 10_000}

T = TypeVar("T")

# Debian keeps `ip` and `tc` where an ordinary user's path does not lead.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_CLONE_NEWNET = 0x40000000


class NetworkError(RuntimeError):
    """An emulated link cannot be had here; the message says what it would need."""


def over_links(links: Sequence[str], measure: Callable[[str], T]) -> tuple[dict[str, T], list[str]]:
    """Measure over each link that can be had.

    Args:
        links: their names.
        measure: what to do over a link.

    Returns:
        The results by link, and a remark on each that was skipped.

    Raises:
        SystemExit: if none can be had.
    """

    def attempt(link: str) -> T | NetworkError:
        try:
            return measure(link)
        except NetworkError as error:
            return error

    outcomes = {link: attempt(link) for link in links}
    results = {link: outcome for link, outcome in outcomes.items() if not isinstance(outcome, NetworkError)}
    remarks = [f"Skipped the link {link}. {outcome}" for link, outcome in outcomes.items() if link not in results]
    if not results:
        raise SystemExit("\n".join(["No link could be measured.", *remarks]))
    return results, remarks


@contextlib.contextmanager
def emulated_network(ranks: int) -> Iterator[list[str]]:
    """Make one network namespace a rank, and remove them all at the end, however it comes.

    The links are unlimited at first (see `limit_rate`). Ranks have the addresses 10.0.0.1, 10.0.0.2, …

    Args:
        ranks: how many.

    Yields:
        The names of the namespaces, by rank.

    Raises:
        NetworkError: if it lacks a tool or a privilege.
    """
    _require_tools()
    switch, *names = (f"powersgd-{os.getpid()}-{end}" for end in ("switch", *range(ranks)))
    with _terminate_as_exit():
        try:
            _add_namespace(switch)
            _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", switch, "link", "set", "bridge", "up")
            for rank, name in enumerate(names):
                port = f"port{rank}"
                _add_namespace(name)
                pair = ["type", "veth", "peer", "name", port, "netns", switch]
                _run("ip", "link", "add", INTERFACE, "netns", name, *pair)
                _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
                _run("ip", "-n", name, "address", "add", f"10.0.0.{rank + 1}/24", "dev", INTERFACE)
                _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            yield names
        finally:
            for name in (*names, switch):
                _run("ip", "netns", "delete", name, check=False)


def enter(namespace: str) -> None:
    """Move the calling thread, and all threads that it will start, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)  # Python has os.setns from 3.12 on
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise NetworkError(f"Cannot enter the network namespace {namespace}: {os.strerror(ctypes.get_errno())}.")


def limit_rate(megabits: int) -> None:
    """Limit what this rank, inside its namespace, sends from now on.

    The bucket of the filter holds what the link carries in a millisecond. A smaller one misses the rate, since the
    kernel's timers are too coarse for it; a larger one lets short messages through for nothing.

    Args:
        megabits: per second.
    """
    bucket = ["tbf", "rate", f"{megabits}mbit", "burst", f"{megabits * 125}b", "latency", "100ms"]
    _run("tc", "qdisc", "replace", "dev", INTERFACE, "root", *bucket)


def _require_tools() -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool, path=_PATH) is None]
    if not sys.platform.startswith("linux"):
        missing = ["Linux"]
    elif os.geteuid() != 0:
        missing.append("root's privileges")
    if missing:
        raise NetworkError(
            f"An emulated link needs {' and '.join(missing)}, which this run does not have. It takes Linux, the"
            " programs `ip` and `tc` (Debian's package iproute2), and root's privileges (in a container: CAP_NET_ADMIN"
            " and CAP_SYS_ADMIN). Provide them, or use `--link loopback`."
        )


def _add_namespace(name: str) -> None:
    _run("ip", "netns", "add", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": _PATH},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode != 0:
        raise NetworkError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}. An emulated link needs CAP_NET_ADMIN and"
            " CAP_SYS_ADMIN, and a kernel with network namespaces, veth, bridge and sch_tbf. Provide them, or use"
            " `--link loopback`."
        )


@contextlib.contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, through its clean-up."""

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
