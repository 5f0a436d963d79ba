"""Two servers over one store behind the load balancer of `compose.yaml`, which loses one of them under load."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from lora_gpt2.serving.http import bind
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.manifest import WEIGHTS
from tests.builders import make_adapter
from tests.serving import ask

NGINX = os.environ.get("LORA_GPT2_NGINX") or shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
COMPOSE = Path(__file__).parents[2] / "compose.yaml"
KEY = {"Authorization": "Bearer secret"}
NUM_CLIENTS = 6

AROUND = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  {settings}
}}
"""
TO_HERE = (("$$", "$"), (" resolve max_fails=0", " max_fails=0"), ("resolver 127.0.0.11 valid=1s;", ""))
"""What Compose does itself, and addresses that change: nginx before 1.27.3 cannot look them up again."""

pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx here: apt install nginx, or set LORA_GPT2_NGINX")


@dataclass(frozen=True)
class Answered:
    """What a client got: the adapter's version that wrote it, "" where it failed."""

    is_stream: bool
    began: float
    ended: float
    version: str


class Clients:
    """Clients that ask one request after another, whole and as streams, each over connections of its own."""

    def __init__(self, port):
        self.port, self.answers, self._is_over = port, [], threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(index,)) for index in range(NUM_CLIENTS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._is_over.set()
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive()

    def _ask(self, index):
        connection, count = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30), 0
        while not self._is_over.is_set():
            count += 1
            body = {"model": "law", "prompt": "the cat", "max_tokens": 24, "stream": (index + count) % 2 == 0}
            began, version = time.monotonic(), ""
            try:
                connection.request(
                    "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"} | KEY
                )
                answer = connection.getresponse()
                version = read_version(answer.status, answer.read())
            except (OSError, http.client.HTTPException):
                connection.close()  # the next request opens it again
            self.answers.append(Answered(body["stream"], began, time.monotonic(), version))
        connection.close()


def read_version(status, content):
    """Returns the adapter that a complete answer names."""
    if status != 200:
        return ""
    if content.startswith(b"data:"):
        *events, last = [line.removeprefix(b"data: ") for line in content.split(b"\n\n") if line.strip()]
        if last != b"[DONE]":
            return ""
        content = next(event for event in events if b'"provenance"' in event)
    return json.loads(content)["provenance"]["adapters"][0]["adapter"]


class Replicas:
    """Servers on ports that stay theirs, and nginx with the settings of `compose.yaml` before them."""

    def __init__(self, base_folder, store, folder):
        self.base_folder, self.store, self.folder = base_folder, store, folder
        found = [bind("127.0.0.1", 0) for _ in range(3)]
        self.ports, self.port = [each.getsockname()[1] for each in found[:2]], found[2].getsockname()[1]
        for each in found:
            each.close()
        self.processes = [None, None]

    def __enter__(self):
        for index in range(2):
            self.start(index)
        settings = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["configs"]["balancer"]["content"]
        for old, new in (
            *TO_HERE,
            ("replica-1:8000", f"127.0.0.1:{self.ports[0]}"),
            ("replica-2:8000", f"127.0.0.1:{self.ports[1]}"),
            ("listen 8000", f"listen 127.0.0.1:{self.port}"),
        ):
            assert old in settings
            settings = settings.replace(old, new)
        written = self.folder / "nginx.conf"
        written.write_text(AROUND.format(folder=self.folder, settings=settings), encoding="utf-8")
        self.balancer = subprocess.Popen([NGINX, "-c", written, "-e", self.folder / "error.log"])
        for index in range(2):
            self.wait_until_ready(self.ports[index])
        self.wait_until_ready(self.port)
        return self

    def __exit__(self, *error):
        for process in (*self.processes, self.balancer):
            process.kill()
            process.wait()

    def start(self, index):
        command = [sys.executable, "-m", "lora_gpt2", "serve", "--port", str(self.ports[index]), "--base"]
        command += [self.base_folder, "--store", self.store.root, "--set", "serve.lameduck_seconds=1"]
        environment = os.environ | {"LORA_GPT2_API_KEY": "secret"}
        self.processes[index] = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    def wait_until_ready(self, port):
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                if ask(port, "/readyz", headers=KEY)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        pytest.fail(f"nobody is ready at {port}")

    def count_answers(self, index):
        """Returns how many completions a replica has answered since it started."""
        text = ask(self.ports[index], "/metrics", headers=KEY)[2].decode()
        rows = [
            line
            for line in text.splitlines()
            if line.startswith("lora_gpt2_requests_total{") and '"completions"' in line
        ]
        return sum(float(line.split()[-1]) for line in rows)


def wait_for(clients, count):
    """Waits until the clients have so many more answers."""
    wanted, until = len(clients.answers) + count, time.monotonic() + 60
    while len(clients.answers) < wanted:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_replica_that_is_killed_costs_what_it_was_answering_and_one_that_leaves_costs_nothing(
    base, base_folder, trained, tmp_path
):
    before = {path: path.stat().st_mtime_ns for path in trained.root.rglob("*")}
    with Replicas(base_folder, trained, tmp_path) as replicas:
        with Clients(replicas.port) as clients:
            wait_for(clients, 40)
            killed = time.monotonic()
            replicas.processes[0].kill()
            replicas.processes[0].wait()
            gone = time.monotonic()
            wait_for(clients, 40)
            replicas.start(0)
            replicas.wait_until_ready(replicas.ports[0])
            wait_for(clients, 40)
        failed = [answer for answer in clients.answers if not answer.version]
        assert len(clients.answers) > 100
        assert len(failed) <= NUM_CLIENTS
        assert all(answer.is_stream and answer.began < gone and answer.ended > killed for answer in failed)
        assert all(replicas.count_answers(index) > 0 for index in range(2)), "who comes back is asked again"
        assert {path: path.stat().st_mtime_ns for path in trained.root.rglob("*")} == before, "a store is only read"

        publish_adapter(trained, "broken", make_adapter(base.config, 3), base, Origin())
        weights = trained.folder_of("broken") / "1" / WEIGHTS
        weights.write_bytes(b"x" + weights.read_bytes()[1:])
        for _ in range(3):
            body = {"model": "broken", "prompt": "the cat"}
            assert ask(replicas.port, "/v1/completions", body, KEY)[0] == 503
            body = {"model": "law", "prompt": "the cat"}
            assert ask(replicas.port, "/v1/completions", body, KEY)[0] == 200, "nobody else is sent away"

        with Clients(replicas.port) as clients:
            wait_for(clients, 20)
            publish_adapter(trained, "law", make_adapter(base.config, 9), base, Origin())
            published = time.monotonic()
            wait_for(clients, 40)
            replicas.processes[1].send_signal(signal.SIGTERM)
            assert replicas.processes[1].wait(timeout=30) == 143
            wait_for(clients, 40)
        assert {a.version for a in clients.answers if a.ended < published} <= {"law@1", "law@2"}
        assert {a.version for a in clients.answers if a.began > published} == {"law@2"}
