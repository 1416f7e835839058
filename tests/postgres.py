"""A real PostgreSQL server for the tests, from the machine's own programs."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import sqlalchemy

# Debian keeps them off the PATH, one folder a version.
VERSIONS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
PROGRAMS = os.pathsep.join([os.environ["PATH"], *map(str, VERSIONS)])


class Postgres:
    """A PostgreSQL server of our own."""

    def __init__(self, folder):
        self.folder, self.user = folder, ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.user:
            folder.chmod(0o755)
            shutil.chown(folder, "postgres")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.call("initdb", "-E", "UTF8", "-A", "trust", "-U", "erpe")
        self.start()

    def address(self, database):
        return f"postgresql+psycopg://erpe@127.0.0.1:{self.port}/{database}"

    def create(self, database):
        """A new, empty database -> its address."""
        engine = sqlalchemy.create_engine(self.address("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(f'CREATE DATABASE "{database}"'))
        engine.dispose()
        return self.address(database)

    def call(self, *command):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        program = shutil.which(command[0], path=PROGRAMS)
        subprocess.run([*self.user, program, *command[1:], "-D", self.folder / "db"], check=True, cwd="/", **quiet)

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self.call("pg_ctl", "-l", self.folder / "log", "-o", options, "-w", "start")

    def stop(self):
        self.call("pg_ctl", "-m", "immediate", "stop")
