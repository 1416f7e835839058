"""Every service of docker-compose.yml at work: a study goes through them while they stop, start and grow."""

import json
import os
import re
import shutil
import signal
import time
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from books import Books, compare_books
from browsing import chromium, programs, visit, wait
from engine import ROOT, SPACE, command_line, send
from readme import commands

from erpe.execution.ray_tune.jobs import JobError, Jobs
from erpe.store import Store
from erpe.tracking.connection import connect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # minutes on two cores, more where others work, too

TRIALS = 3
# A trial lasts longer than a new worker needs to start: else the old one takes its trials away.
TUNE = f"tune -v relu -d digits --name stack --trials {TRIALS} --epochs 30 --pruner none --space studies/small.toml"

EPOCH = r"  epoch (\d+)/"
"""An epoch that is recorded; lines on where a trial is have a comma before it."""


def until(condition, seconds=300):
    """Wait; the condition's answer."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)
    return answer


def trains(stack, container):
    """Whether a worker of Ray plays a trial in this container."""
    titles = map(command_line, stack.containers("ray-worker").get(container, []))
    return any(re.match(r"ray::\w*Trainable", title) for title in titles)


def kill(stack, service):
    """As a machine that loses its power."""
    while left := [pid for pids in stack.containers(service).values() for pid in pids]:
        for pid in left:
            send(pid, signal.SIGKILL)


def with_token_of_the_stack(monkeypatch, shell):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)  # that of these tests; it comes before a file
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(shell.project / "secrets/ray_token"))


def enter(shell, monkeypatch):
    """This process in the place of the container `erpe` -> its store."""
    for name, value in shell.stack.environment("erpe", "here").items():
        if name.startswith(("ERPE_", "MLFLOW_", "PG")) and name != "ERPE_STACK_CONTAINER":
            monkeypatch.setenv(name, value)
    for name in ("MLFLOW_TRACKING_PASSWORD", "PGPASSWORD"):  # read from their files; to be forgotten afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return Store.open(shell.state / "volumes/runs")


def test_a_study_goes_on_while_services_stop_start_grow_and_shrink(shell, monkeypatch, tmp_path):
    """One worker, two, one; the tracking server away, the database restarted: the books agree at the end."""
    (shell.project / "studies/small.toml").write_text(SPACE)
    log = tmp_path / "log"
    study = shell.start(f"docker compose run --rm erpe {TUNE}", log)

    def epochs():
        assert study.poll() is None, log.read_text()
        return len(re.findall(EPOCH, log.read_text()))

    until(lambda: epochs() >= 2)
    assert not shell.stack.containers("ray-worker").keys() - {"ray-worker.1"}
    shell("docker compose stop mlflow")
    shell("docker compose up -d --scale ray-worker=2 ray-worker")
    until(lambda: epochs() and trains(shell.stack, "ray-worker.1") and trains(shell.stack, "ray-worker.2"))
    shell("docker compose stop postgres")
    shell("docker compose start postgres mlflow")
    shell("docker compose up -d --scale ray-worker=1 ray-worker")
    assert study.wait(300) in (0, 3), log.read_text()
    shell("docker compose run --rm erpe sync")
    assert compare_books(enter(shell, monkeypatch), "stack", TRIALS) == Books()
    assert not shell.stack.containers("erpe"), "a command left processes behind"


JOB = "tune -v relu -d digits --name job --trials 1 --epochs 40 --pruner none --space studies/small.toml"


def test_a_job_outlives_who_submitted_it_and_goes_on_after_a_stop_and_a_new_head(shell, monkeypatch):
    (shell.project / "studies/small.toml").write_text(SPACE)
    with_token_of_the_stack(monkeypatch, shell)
    jobs = Jobs(f"http://127.0.0.1:{shell.stack.ports['jobs']}")

    def epochs(log):
        return [int(number) for number in re.findall(EPOCH, log)]

    first = re.match(r"job (\S+): ", shell(f"docker compose run --rm erpe submit {JOB}"))[1]
    until(lambda: len(epochs(jobs.log(first))) >= 2)
    assert not shell.stack.containers("erpe"), "who submitted it is not gone"
    assert f"erpe submit {JOB}" in shell(f"docker compose run --rm erpe jobs stop {first} --wait")
    before = epochs(jobs.log(first))[-1]
    assert before < 40
    second = re.match(r"job (\S+): ", shell(f"docker compose run --rm erpe submit {JOB}"))[1]
    until(lambda: epochs(jobs.log(second)))
    assert epochs(jobs.log(second))[0] == before + 1, "it began anew"
    kill(shell.stack, "ray-head")  # a stop would give the trial half a minute, in which it may end
    kill(shell.stack, "ray-worker")  # which would look for its head for as long
    shell("docker compose start ray-head")
    third = re.match(r"job (\S+): ", shell(f"docker compose run --rm erpe submit {JOB}"))[1]
    until(lambda: "starting the workers" in jobs.log(third))
    shell("docker compose start ray-worker")  # for which the job waits
    said = shell(f"docker compose run --rm erpe jobs logs {third} --follow")
    assert epochs(said)[0] > before + 1, "the head took it along"
    assert "1 complete" in said and "look: http://127.0.0.1:5000" in said
    assert compare_books(enter(shell, monkeypatch), "job", 1) == Books()
    known = jobs.all()
    assert [(job.state, job.code) for job in known] == [("SUCCEEDED", 0)], "a new head knows new jobs"
    told = [str(jobs._ask("GET", f"/api/jobs/{job.id}")) + jobs.log(job.id) for job in known]
    secrets = [path.read_text() for path in (shell.project / "secrets").iterdir()]
    assert not [text for text in told if any(secret in text for secret in secrets)]


def ask(shell, user="", password="", host=None):
    """The status of MLflow's answer."""
    port = shell.stack.ports["mlflow"]
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1")
    if user:
        request.add_header("Authorization", f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}")
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_tracking_server_answers_who_signs_in_and_by_its_own_names(shell):
    shell.stack.await_healthy("mlflow")
    password = (shell.project / "secrets/mlflow_admin_password").read_text()
    assert ask(shell, "erpe", password) == 200
    assert ask(shell, "erpe", password, "mlflow:5000") == 200
    assert ask(shell, "erpe", password, "localhost:5000") == 200
    assert ask(shell, "erpe", password, "elsewhere.example") == 403
    assert ask(shell) == ask(shell, "erpe", "password1234") == ask(shell, "admin", "password1234") == 401


@pytest.mark.skipif(not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), reason="no nginx here")
def test_the_proxy_lets_in_who_trusts_its_certificate_and_others_hear_why(shell, monkeypatch):
    shell("infra/tls/certificate localhost 127.0.0.1")
    shell("docker compose up -d proxy")
    shell.stack.await_healthy("proxy")
    certificate = shell.project / "secrets/tls_certificate"
    address = f"-e MLFLOW_TRACKING_URI=https://localhost:{shell.stack.ports['tls']}"
    trusting = f"{address} -e MLFLOW_TRACKING_SERVER_CERT_PATH={certificate}"
    command = "erpe tune -v relu -d digits --name tls --trials 1 --epochs 1 --executor inline"
    told = shell(f"docker compose run --rm {address} {command}", code=1).splitlines()
    shell(f"docker compose run --rm {trusting} {command}")
    assert compare_books(enter(shell, monkeypatch), "tls", 1) == Books()
    assert len(told) == 1 and "certificate not trusted; set MLFLOW_TRACKING_SERVER_CERT_PATH" in told[0]

    with_token_of_the_stack(monkeypatch, shell)
    jobs = Jobs(f"https://localhost:{shell.stack.ports['tls-jobs']}")
    with pytest.raises(JobError, match=r"certificate not trusted \(self-signed certificate\); set SSL_CERT_FILE"):
        jobs.all()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert isinstance(jobs.all(), list)
    shell("docker compose stop proxy")


def exposed(url, **headers):
    """Names of what is measured there."""
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return set(re.findall(r"^([a-z]\w*)", answer.read().decode(), re.M))


GPU = {"ray_node_gpus_utilization", "ray_node_gram_used"}
"""Not exposed where there is none."""


def test_the_dashboard_and_the_alerts_ask_for_what_the_stack_measures(shell):
    folder = ROOT / "infra/monitoring"
    scraped = yaml.safe_load(shell.stack.here((folder / "prometheus.yml").read_text(), "prometheus"))["scrape_configs"]
    ray, mlflow = scraped[0]["http_sd_configs"][0], scraped[1]

    def secret(about, key):
        return (shell.project / "secrets" / Path(about[key]).name).read_text()

    listing = urllib.request.Request(ray["url"])
    listing.add_header(
        "Authorization", f"{ray['authorization']['type']} {secret(ray['authorization'], 'credentials_file')}"
    )
    login = f"{mlflow['basic_auth']['username']}:{secret(mlflow['basic_auth'], 'password_file')}"
    signed = f"Basic {b64encode(login.encode()).decode()}"
    asked = [
        each["expr"] for panel in json.loads((folder / "erpe.json").read_text())["panels"] for each in panel["targets"]
    ]
    asked += [
        rule["expr"] for each in yaml.safe_load((folder / "alerts.yml").read_text())["groups"] for rule in each["rules"]
    ]
    names = set(re.findall(r"\b(?:ray|mlflow)_\w+|\bup\b", " ".join(asked)))
    assert len(names) > 10

    def there():
        """What is measured by now: a node begins some seconds after its start."""
        with urllib.request.urlopen(listing, timeout=20) as answer:
            nodes = [target for each in json.load(answer) for target in each["targets"]]
        found = {"up"}
        for node in nodes:
            with suppress(urllib.error.URLError):  # two of the head's ports are another head's on the same machine
                found |= exposed(f"http://{node}/metrics")
        for target in mlflow["static_configs"][0]["targets"]:
            exposed(f"http://{target}/api/2.0/mlflow/experiments/search?max_results=1", Authorization=signed)
            found |= exposed(f"http://{target}/metrics", Authorization=signed)
        return found

    until(lambda: names - there() == GPU, 120)


ONE = "tune -v relu -d digits --name one --trials 1 --epochs 1"


@pytest.mark.parametrize(
    ("variable", "command", "line"),
    [
        ("MLFLOW_TRACKING_PASSWORD_FILE", "sync", "does not know erpe with this password"),
        ("PGPASSWORD_FILE", "status", "password authentication failed"),
        ("RAY_AUTH_TOKEN_PATH", ONE, "does not know our token"),
        ("RAY_AUTH_TOKEN_PATH", f"submit {ONE}", "does not know our token"),
    ],
)
def test_a_wrong_secret_is_one_clear_line(shell, variable, command, line):
    wrong = shell.state / "wrong"
    wrong.write_text("0" * 64)
    said = shell(f"docker compose run --rm -e {variable}={wrong} erpe {command}", code=1)
    told = [each for each in said.splitlines() if not re.match(r" +\d+\.\d s  ", each)]  # its progress
    assert len(told) == 1 and told[0].startswith("erpe: ") and line in told[0], said


def test_no_secret_is_in_a_command_line_or_in_a_log(shell):
    secrets = [path.read_text() for path in (shell.project / "secrets").iterdir()]
    lines = [command_line(pid) for pids in shell.stack.containers().values() for pid in pids]
    written = [*shell.state.glob("*.log"), *shell.state.glob("ray/ray/session_2*/logs/*.*")]
    logs = [path.read_text(errors="replace") for path in written]
    assert len(lines) > 10 and logs
    assert not [text for text in lines + logs if any(secret in text for secret in secrets)]


def studies(shell):
    """What `erpe status` tells of each study, but for the time that passes meanwhile."""
    told = json.loads(shell("docker compose run --rm erpe status --json"))
    return [{key: value for key, value in study.items() if key != "lag_seconds"} for study in told]


def test_the_commands_of_the_readme_lead_to_a_comparison_and_a_backup_holds_everything(shell, monkeypatch, tmp_path):
    """In their order. The volumes are deleted where the README takes the stack down."""
    before = None
    for line in commands():
        if line == "docker compose down":
            before = studies(shell)
            line += " -v"
        said = shell(line)
        if line.endswith("doctor"):
            assert " wrong " not in said and "ray cluster" in said and "ray jobs" in said
    assert before, "the README has no backup"
    assert studies(shell) == before
    assert shell("docker compose run --rm erpe sync")
    assert "paired" in shell("docker compose run --rm erpe compare digits-nine")
    password = (shell.project / "secrets/mlflow_admin_password").read_text()
    assert ask(shell, "erpe", password) == 200
    store = enter(shell, monkeypatch)
    assert compare_books(store, "digits-relu_general", 2) == Books()
    assert re.search(r"database mlflow: .*; \d+ rows, \d+ KiB a trial", shell("infra/capacity"))
    assert list(shell.state.glob("migrate/migrate.run*/versions")), "restored, and not brought up to date"
    log = (shell.state / "migrate.1.log").read_text()
    (shell.state / "migrate.done").unlink()  # compose starts it again before each command
    shell("docker compose up -d migrate")
    assert (shell.state / "migrate.1.log").read_text() == log, "it did all its work again"
    shell("docker compose up -d optuna-dashboard")
    shell.stack.await_healthy("optuna-dashboard")
    with urllib.request.urlopen(f"http://127.0.0.1:{shell.stack.ports['optuna-dashboard']}/api/studies") as answer:
        assert "digits-nine" in answer.read().decode()
    if all(programs()):
        sees_the_comparison(f"127.0.0.1:{shell.stack.ports['mlflow']}", password, store, tmp_path)


def sees_the_comparison(server, password, store, profile):
    """A browser signs in and opens the page that Compare leads to."""
    client = connect(store.tracking_uri)
    experiment = client.get_experiment_by_name("digits-nine").experiment_id
    runs = client.search_runs([experiment])
    chosen = [run.info.run_id for run in runs if "test/accuracy" in run.data.metrics][:2]
    assert len(chosen) == 2
    with chromium(profile) as browser:
        visit(browser, f"http://erpe:{password}@{server}/")
        query = f"runs={quote(json.dumps(chosen))}&experiments={quote(json.dumps([experiment]))}"
        visit(browser, f"http://{server}/#/compare-runs?{query}")
        wait(browser, lambda: "Comparing 2 Runs from 1 Experiment" in browser.find_element("tag name", "body").text)
