"""A server that speaks S3, for the tests of checkpoints that go through one."""

import os
import subprocess
import sys

BUCKET = "erpe-checkpoints"
KEYS = {"AWS_ACCESS_KEY_ID": "erpe", "AWS_SECRET_ACCESS_KEY": "a-secret-key", "AWS_DEFAULT_REGION": "us-east-1"}
SERVE = f"""
import signal, sys, boto3
from moto.server import ThreadedMotoServer
host, port = sys.argv[1:]
ThreadedMotoServer(host, int(port), verbose=False).start()
boto3.client("s3", endpoint_url=f"http://{{host}}:{{port}}").create_bucket(Bucket="{BUCKET}")
print("ready", flush=True)
signal.pause()
"""


class ObjectStore:
    """One with a bucket, in a process of its own, which may be stopped (and answers nobody) and go on.

    Args:
        prefix: what its command line begins with, to run it elsewhere.
        wait: until it answers.
    """

    def __init__(self, port, host="127.0.0.1", prefix=(), wait=True):
        self.environment = KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", SERVE, host, str(port)],
            env=os.environ | KEYS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if wait:
            self.wait()

    def wait(self):
        """Until it answers."""
        assert self.process.stdout.readline() == b"ready\n", "the object store did not start"

    def end(self):
        """Whatever it had is gone."""
        self.process.kill()
        self.process.communicate()
