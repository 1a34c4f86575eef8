"""Two hosts, made of network namespaces, that lose each other in the middle of an epoch."""

import itertools
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr_dist.runs import run_folder
from tests.faults.test_lost_workers import LIMIT_S, ROOT, SETTINGS, wait_until_in

pytestmark = [pytest.mark.ray, pytest.mark.nightly]
RAY = Path(sys.executable).with_name("ray")
PORT = 6399
LOSS = """
table inet loss {{
  chain input {{
    type filter hook input priority 0
    iifname != "lo" numgen random mod 1000 < {per_thousand} counter drop
  }}
}}
"""
"""For nftables: netem, which `tc` would use, is missing in many kernels."""
_COUNTED = re.compile(r"counter packets (\d+)")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def can_make_hosts() -> bool:
    if os.geteuid() or not shutil.which("ip"):
        return False
    made = subprocess.run(["ip", "netns", "add", "cxr-try"], check=False, capture_output=True).returncode == 0
    if made:
        ip("netns", "del", "cxr-try")
    return made


class Hosts:
    """Hosts `cxr-a`, with the head of a Ray cluster, and `cxr-b`, joined by a cable."""

    names, addresses = ("cxr-a", "cxr-b"), ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cxr-a0", "netns", "cxr-a", "type", "veth", "peer", "name", "cxr-b0", "netns", "cxr-b")
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{name}0")
            for device in ("lo", f"{name}0"):
                ip("-n", name, "link", "set", device, "up")
        common = ["--num-cpus=1", "--disable-usage-stats", "--block", "--object-store-memory=100000000"]
        head = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        join = [f"--address={self.addresses[0]}:{PORT}"]
        self.processes = []
        for number, role in enumerate((head, join)):
            address = f"--node-ip-address={self.addresses[number]}"
            self.processes.append(self.start(number, str(RAY), "start", *role, address, *common))
            time.sleep(8)

    def start(self, host: int, *command: str) -> subprocess.Popen[str]:
        line = ["ip", "netns", "exec", self.names[host], *command]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            line, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=self.environment, start_new_session=True
        )

    def cable(self, state: str) -> None:
        ip("-n", "cxr-b", "link", "set", "cxr-b0", state)

    def lose(self, percent: float) -> None:
        """Some of all packets, on their way into either host."""
        for name in self.names:
            command = ["ip", "netns", "exec", name, "nft", "-f", "-"]
            rules = LOSS.format(per_thousand=round(10 * percent))
            subprocess.run(command, input=rules, text=True, check=True, capture_output=True)

    def lost(self) -> int:
        """Packets so far."""
        return sum(int(packets) for name in self.names for packets in _COUNTED.findall(self._rules(name)))

    @staticmethod
    def _rules(name: str) -> str:
        command = ["ip", "netns", "exec", name, "nft", "list", "ruleset"]
        return subprocess.run(command, text=True, check=True, capture_output=True).stdout

    def remove(self) -> None:
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True)
            for process in found.stdout.split():
                os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)
        for started in self.processes:
            started.wait(timeout=30)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if not can_make_hosts():
        pytest.skip("needs the right to make network namespaces, and iproute2")
    made = Hosts()
    try:
        yield made
    finally:
        made.remove()


def train(hosts: Hosts, dataset: Path, run: Path) -> subprocess.Popen[str]:
    overrides = itertools.chain.from_iterable(("--set", each) for each in SETTINGS)
    command = [sys.executable, "-m", "cxr_dist", "train", str(dataset), "--out", str(run), "--workers", "1:2"]
    return hosts.start(0, *command, "--address", f"{hosts.addresses[0]}:{PORT}", *overrides)


@pytest.mark.parametrize("seed", range(10))
def test_a_partition_in_an_epoch_ends_in_a_recovery(hosts: Hosts, dataset: Path, tmp_path: Path, seed: int) -> None:
    """Whenever the cable is cut: the host that has the driver goes on alone, within the stated limits."""
    rng = random.Random(seed)
    process = train(hosts, dataset, tmp_path / "run")
    stage, epoch = rng.choice([(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)])
    wait_until_in(tmp_path / "run", stage, epoch, process)
    time.sleep(rng.random())
    hosts.cable("down")
    try:
        out, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, out
    result = run_folder.read_result(tmp_path / "run")
    assert result is not None
    assert (result["workers"] == 1) == ("workers were lost" in out), out
    assert len(run_folder.read_history(tmp_path / "run")) == 2 + 4


def test_packet_loss_slows_and_changes_nothing(hosts: Hosts, dataset: Path, tmp_path: Path) -> None:
    if not shutil.which("nft"):
        pytest.skip("needs nftables")
    hosts.lose(percent=2.0)
    process = train(hosts, dataset, tmp_path / "run")
    try:
        out, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, out
    result = run_folder.read_result(tmp_path / "run")
    assert result is not None
    assert (result["workers"], result["resumed_from"]) == (2, None)
    assert hosts.lost() > 100
