"""The hosts that other tests stand on: apart, reachable by name, and gone in the end."""

import subprocess
import sys

import pytest
from namespaces import hosts

pytestmark = pytest.mark.system
SERVE = """
import http.server
server = http.server.HTTPServer(("", 8000), http.server.SimpleHTTPRequestHandler)
print("up", flush=True)
server.serve_forever()
"""
ASK = "import sys, urllib.request as u; u.urlopen(f'http://{sys.argv[1]}:8000', timeout=1); print('reached')"


def test_hosts_reach_each_other_until_one_is_lost():
    with hosts(2) as (first, second):
        assert first.run("hostname").stdout == "node1\n"
        server = second.start(sys.executable, "-c", SERVE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert server.stdout.readline() == "up\n" and second.pids() == [server.pid] and first.pids() == []

        def reached() -> bool:
            return first.run(sys.executable, "-c", ASK, "node2").stdout == "reached\n"

        assert reached()
        second.unplug()
        assert not reached() and server.poll() is None
        second.plug()
        assert reached()
        second.crash()
        assert server.wait(timeout=20) == -9 and not reached()
        left = first.start("sleep", 1000)
    assert left.wait(timeout=20) == -9
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert first.namespace not in listed and second.namespace not in listed
