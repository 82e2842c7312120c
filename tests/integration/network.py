"""Hosts on one machine: network namespaces, each on a wire that delays, loses or stops packets.

A wire is a pair of TUN devices and a thread that carries packets between them, because not every kernel has netem.
Nothing leaves the machine.
"""

import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from loadtest.selfcheck import go_first

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 1500
IP = shutil.which("ip") or "ip is missing: apt-get install iproute2"


def ip(*arguments: str) -> None:
    """Run `ip`; raises CalledProcessError with what it said."""
    subprocess.run([IP, *arguments], check=True, capture_output=True, text=True)


def unavailable() -> str:
    """Why there can be no hosts here; empty: there can."""
    if os.geteuid():
        return "network namespaces need root"
    name = f"hr-try-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
        os.close(os.open("/dev/net/tun", os.O_RDWR))
        time_namespace = ["unshare", "--time", "--uts", "--pid", "--fork", "--monotonic", "1", "true"]
        subprocess.run(time_namespace, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{error} {getattr(error, 'stderr', '')}".strip()
    return ""


class Wire:
    """Carries packets between two TUN devices; the attributes may be changed at any time.

    `delays`: seconds that packets take to the host, and from it. `loss`: share of packets that are dropped.
    """

    def __init__(self, near: str, far: str, delays: tuple[float, float] = (0.0, 0.0), loss: float = 0.0):
        self.delays, self.loss, self.is_cut = delays, loss, False
        self._random = random.Random(0)
        self._ends = (_tun(near), _tun(far))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and take both devices away."""
        self._stop.set()
        self._thread.join()
        for end in self._ends:
            os.close(end)

    def _carry(self) -> None:
        go_first()  # a busy machine is no slow network
        # When a packet is due, the order among equals, where it goes, what it holds.
        under_way: list[tuple[float, int, int, bytes]] = []
        order = itertools.count()
        near, far = self._ends
        while not self._stop.is_set():
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.1
            ready, _, _ = select.select([near, far], [], [], min(wait, 0.1))
            for source in ready:
                packet = os.read(source, MTU + 100)
                if not self.is_cut and self._random.random() >= self.loss:
                    delay, target = (self.delays[0], far) if source == near else (self.delays[1], near)
                    heapq.heappush(under_way, (time.monotonic() + delay, next(order), target, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(under_way)
                if not self.is_cut:
                    with suppress(OSError):  # a device that is not up yet drops what comes
                        os.write(target, packet)


class Host:
    """A network namespace with a host name, which reaches this machine alone, at `master`, over its wire."""

    def __init__(self, number: int, stack: ExitStack):
        net = f"198.18.{os.getpid() % 250}"  # a range for tests of networks (RFC 2544)
        self.name, self._namespace = f"host-{number}", f"hr-{os.getpid()}-{number}"
        near, far = (f"hr{os.getpid() % 10000}-{number}{end}" for end in "nf")
        self.master, own = f"{net}.{4 * number + 1}", f"{net}.{4 * number + 2}"
        ip("netns", "add", self._namespace)
        stack.callback(ip, "netns", "delete", self._namespace)
        self.wire = Wire(near, far)
        stack.callback(self.wire.close)
        ip("link", "set", far, "netns", self._namespace)
        ip("address", "add", self.master, "peer", own, "dev", near)
        ip("link", "set", near, "up", "mtu", str(MTU))
        inside = ("-n", self._namespace)
        ip(*inside, "address", "add", own, "peer", self.master, "dev", far)
        ip(*inside, "link", "set", far, "up", "mtu", str(MTU))
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "route", "add", "default", "via", self.master)

    def command(self, arguments: list[str], clock_seconds: int = 0) -> list[str]:
        """What runs a program on this host, with CLOCK_MONOTONIC so many seconds ahead; it dies with its parent."""
        unshare = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        if clock_seconds:
            unshare += ["--time", "--monotonic", str(clock_seconds)]
        named = ["sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"', self.name, *arguments]
        return ["ip", "netns", "exec", self._namespace, *unshare, *named]


def _tun(name: str) -> int:
    device = os.open(Path("/dev/net/tun"), os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device
