"""Nothing asks for an address outside of this machine unless a name on a hub was given, nor does a Ray that is started here.

An audit hook in every Python process refuses such addresses and notes them. Ray's processes that are not Python are not seen.
"""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import featpatch as fp

GUARD = """
import os, socket, sys

def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if event == "socket.connect" and arguments[0].type == socket.SOCK_DGRAM:
            return  # nothing is sent: this is how a process asks for its own address
        host = address[0] if isinstance(address, tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host and host not in os.environ["OWN"].split():
        with open(os.environ["NOTED"], "a") as file:
            file.write(f"{host}\\n")
        raise OSError(f"{host} is refused")

sys.addaudithook(guard)
"""

EVERYTHING = """
import featpatch as fp
from featpatch.cli import app

demo = fp.load_demo()
pairs = demo.pairs("capitals", n=2)
model, saes = fp.load(demo.folder / "model", [demo.folder / "saes" / "blocks.3.hook_resid_post"], pairs=pairs)
effects = fp.rank_features(model, saes, pairs, positions=["end"], progress=False)
fp.max_activating(model, saes, effects.top(1).nodes, demo.text()[:3])
pairs.check(model)
fp.Effects.load(effects.save("effects.safetensors"))
fp.report(effects, "report.html", model=model, saes=saes, pairs=pairs)
app(["info", "effects.safetensors"], standalone_mode=False)
"""

ON_RAY = """
import os, time
import featpatch as fp
import ray
from ray._common.usage import usage_lib

demo = fp.load_demo()
asked = []
original = ray.init

def noted(*arguments, **options):
    asked.append(usage_lib.usage_stats_enabled())
    made = original(*arguments, **options)
    asked.append(usage_lib.usage_stats_enabled())
    time.sleep(WAIT)
    return made

ray.init = noted
effects = fp.rank_features(demo.model, demo.saes[0], demo.pairs("capitals", n=2), executor=fp.Ray(workers=1), progress=False)
print(asked, os.environ.get("RAY_USAGE_STATS_ENABLED"))
"""

CONTROL = """
import socket
try:
    socket.create_connection(("example.com", 80))
except OSError as error:
    print(error)
"""


def guarded(program: str, folder: Path, **environment: str) -> tuple[str, list[str]]:
    """What a program prints, and which addresses its processes asked for."""
    (folder / "sitecustomize.py").write_text(GUARD)
    own = {"localhost", os.uname().nodename} | {each.address for several in psutil.net_if_addrs().values() for each in several}
    paths = os.pathsep.join([str(folder), str(Path(fp.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "RAY_USAGE_STATS_ENABLED")}
    settings = {"PYTHONPATH": paths, "OWN": " ".join(own), "NOTED": str(folder / "noted"), **environment}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=inherited | settings, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    noted = folder / "noted"
    return done.stdout, noted.read_text().split() if noted.exists() else []


def test_nothing_asks_the_network(tmp_path: Path) -> None:
    """What has names of files alone, with Hugging Face's libraries not told to stay offline; then that the guard sees."""
    said, noted = guarded(EVERYTHING + CONTROL, tmp_path)
    assert "example.com is refused" in said
    assert noted == ["example.com"]


@pytest.mark.extended
@pytest.mark.parametrize("before", [None, "1"])
def test_a_ray_of_its_own_reports_nothing(tmp_path: Path, before: str | None) -> None:
    """Its usage statistics are off while it starts; the setting of the user is afterwards what it was."""
    pytest.importorskip("ray")
    environment = {} if before is None else {"RAY_USAGE_STATS_ENABLED": before}
    said, noted = guarded(ON_RAY.replace("WAIT", "5"), tmp_path, **environment)
    assert said.splitlines()[-1] == f"[False, False] {before}"
    assert noted == []
