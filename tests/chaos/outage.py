"""What an outage of the tracking server costs training: interleaved rounds of the same study.

well     an MLflow server that answers
down     nobody listens at its address
hangs    somebody accepts the connection and never says a word
"""

import json
import socket
import statistics

from case import Case
from mlflow_server import hanging_server

EPOCHS = 40


class At:
    """A home whose tracking server is somewhere else."""

    name = "outage"

    def __init__(self, uri):
        self.uri = uri

    def environment(self):
        """What the command needs to find it."""
        return {"MLFLOW_TRACKING_URI": self.uri}


def seconds_per_epoch(case):
    """From the first epoch begun to the last one saved, reporting and spooling included; the first left out."""
    case.start().wait(600)
    times = [float(line.split()[0]) for line in case.journal.read_text().splitlines() if " saved " in line]
    assert len(times) == EPOCHS, case.log.read_text()
    return (times[-1] - times[0]) / (EPOCHS - 1)


def measure(home, folder, rounds):
    """Median seconds an epoch in each state, and the range over the rounds."""
    found = {"well": [], "down": [], "hangs": []}
    with hanging_server() as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
        closed.close()
        places = {
            "well": home.environment()["MLFLOW_TRACKING_URI"],
            "down": f"http://127.0.0.1:{port}",
            "hangs": silent,
        }
        for turn in range(rounds):
            for state, uri in places.items():
                case = Case(At(uri), folder / f"{state}-{turn}", "inline", trials=1, epochs=EPOCHS, slow=0)
                case.arguments[case.arguments.index("data.train_limit=200")] = "data.train_limit=1000"
                found[state].append(seconds_per_epoch(case))
                print(f"{state}: {found[state][-1] * 1000:.1f} ms an epoch", flush=True)
    normal = statistics.median(found["well"])
    return [
        {
            "state": state, "ms": statistics.median(times) * 1000, "low": min(times) * 1000, "high": max(times) * 1000,
            "ratio": statistics.median(times) / normal, "n": rounds,
        }
        for state, times in found.items()
    ]  # fmt: skip


def as_table(text):
    """Markdown of what `measure` found, a JSON list."""
    lines = ["| tracking server | ms an epoch, median | lowest to highest | ratio |", "|---|---:|---:|---:|"]
    for row in json.loads(text):
        spread = f"{row['low']:.1f} to {row['high']:.1f} (n={row['n']})"
        lines.append(f"| {row['state']} | {row['ms']:.1f} | {spread} | {row['ratio']:.3f} |")
    return "\n".join(lines)
