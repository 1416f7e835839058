"""A server that speaks S3, for the tests of checkpoints that go through one."""

import contextlib
import subprocess
import sys
import time
import urllib.request

SERVE = "import sys; from moto.server import main; main(['-H', sys.argv[1], '-p', sys.argv[2]])"
KEYS = {"AWS_ACCESS_KEY_ID": "erpe", "AWS_SECRET_ACCESS_KEY": "a-secret-key", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "erpe-checkpoints"


class ObjectStore:
    """One with a bucket, in a process of its own, which may be stopped (and answers nobody) and go on."""

    def __init__(self, port, host="127.0.0.1", prefix=()):
        self.address = f"http://{host}:{port}"
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", SERVE, host, str(port)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def make_bucket(self):
        """Once it answers."""
        request = urllib.request.Request(f"{self.address}/{BUCKET}", method="PUT")
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=10).close()
                return
            assert time.monotonic() < deadline and self.process.poll() is None, "the object store did not start"
            time.sleep(0.1)

    @property
    def environment(self):
        """Of its clients."""
        return KEYS | {"AWS_ENDPOINT_URL": self.address}

    def end(self):
        """Whatever it had is gone."""
        self.process.kill()
        self.process.wait()
