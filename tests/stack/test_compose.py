"""What docker-compose.yml promises, read off it."""

import json
import re
import subprocess
from importlib.resources import files

import jsonschema
import pytest
import yaml
from clone import project
from engine import ROOT, Refused, Stack, interpolated

FILES = ("docker-compose.yml", "infra/docker-compose.gpu.yml")
SCHEMA = files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
SECRETS = {
    "postgres_password",
    "optuna_password",
    "mlflow_password",
    "mlflow_admin_password",
    "mlflow_secret_key",
    "ray_token",
}

READ_ELSEWHERE = {"proxy": "infra/tls/nginx.conf", "prometheus": "infra/monitoring/prometheus.yml"}
"""Services whose own files name what they read."""


@pytest.fixture
def clone(tmp_path):
    return project(tmp_path)


@pytest.fixture
def services(clone):
    subprocess.run(["infra/secrets"], cwd=clone, check=True, capture_output=True)
    return Stack(clone, clone).tree["services"]


def keys(node):
    """Every key of a tree."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from keys(value)
    elif isinstance(node, list):
        for value in node:
            yield from keys(value)


@pytest.mark.parametrize("name", FILES)
def test_compose_files_are_what_the_specification_allows(name):
    jsonschema.validate(yaml.safe_load((ROOT / name).read_text()), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("name", FILES)
def test_compose_files_have_nothing_that_an_older_compose_rejects(name):
    tree = yaml.safe_load((ROOT / name).read_text())
    assert not {"name", "version", "include", "configs"} & tree.keys()
    newer = {"start_interval", "develop", "gpus", "dockerfile_inline", "required", "ulimits", "env_file"}
    assert not newer & set(keys(tree))
    assert not re.search(r"\$\{\w+:?\+", (ROOT / name).read_text())


def test_variables_are_read_as_compose_reads_them():
    given = {"A": "a", "EMPTY": ""}
    assert interpolated("${A} ${A:-b} ${B:-b} ${EMPTY:-b} ${EMPTY-b} $$A", given) == "a a b b  $A"
    for text in ("${B:?make it}", "${EMPTY:?make it}"):
        with pytest.raises(Refused, match="make it"):
            interpolated(text, given)


def test_nothing_starts_without_secrets(clone):
    with pytest.raises(Refused, match="run infra/secrets first"):
        Stack(clone, clone)


def test_secrets_are_made_once_each_its_own_in_a_closed_folder(clone):
    for count in ("6 made, 0 were", "0 made, 6 were"):
        said = subprocess.run(["infra/secrets"], cwd=clone, check=True, capture_output=True, text=True).stdout
        assert count in said
        found = {path.name: path.read_text() for path in (clone / "secrets").iterdir()}
        assert found.keys() == SECRETS and len(set(found.values())) == len(SECRETS)
        assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in found.values())
        assert not any(value in said for value in found.values())
        assert (clone / "secrets").stat().st_mode & 0o777 == 0o700
    assert (clone / ".env").read_text() == "ERPE_SECRETS=./secrets\n"


def test_each_service_gets_the_secrets_it_reads_and_no_others(services):
    own = {"tls_certificate", "tls_key"}  # infra/tls/certificate, or the user's
    assert set().union(*(about.get("secrets", []) for about in services.values())) == SECRETS | own
    for name, about in services.items():
        read = set(re.findall(r"/run/secrets/(\w+)", json.dumps(about)))
        if name in READ_ELSEWHERE:
            read = set(re.findall(r"/run/secrets/(\w+)", (ROOT / READ_ELSEWHERE[name]).read_text()))
        if name in ("postgres", "migrate"):  # their scripts read, by name, those of both roles
            read |= {"optuna_password", "mlflow_password"}
        assert set(about.get("secrets", [])) == read, name
        values = about.get("environment", {})
        assert not [key for key in values if re.search("PASSWORD$|TOKEN$|KEY$", key)], f"{name}: a secret as a variable"


def test_every_service_is_bounded_and_answers_on_this_machine_only(services):
    for name, about in services.items():
        assert about["deploy"]["resources"]["limits"]["memory"], name
        assert all(port.startswith("127.0.0.1:") for port in about.get("ports", [])), name
        assert re.search(r":v?\d[\w.-]*$", about["image"]), f"{name}: no version"
        assert "privileged" not in about and "network_mode" not in about and "container_name" not in about
        if "restart" in about:
            assert about["healthcheck"]["retries"], name
        for needed, how in about.get("depends_on", {}).items():
            wanted = "service_healthy" if "restart" in services[needed] else "service_completed_successfully"
            assert how["condition"] == wanted, f"{name} needs {needed}"


def test_the_health_of_the_tracking_server_is_that_of_a_client(services):
    """Under the name that the others use, with a login, on a route that both guard."""
    test = services["mlflow"]["healthcheck"]["test"]
    assert test[-1] == services["erpe"]["environment"]["MLFLOW_TRACKING_URI"]
    script = (ROOT / "infra/docker/bin/healthy-tracking").read_text()
    assert "/api/2.0/mlflow/" in script and "Authorization" in script


@pytest.mark.parametrize("name", ["erpe", "mlflow"])
def test_images_are_pinned_and_run_as_nobody_special(name):
    lines = (ROOT / f"infra/docker/{name}.Dockerfile").read_text().splitlines()
    assert {line.split()[1] for line in lines if line.startswith("FROM")} == {"python:3.11-slim-bookworm"}
    assert [line for line in lines if line.startswith("USER")] == ["USER erpe"]
    assert any("--constraint" in line for line in lines) and not lines[0].startswith("# syntax")


def test_the_overlay_adds_gpus_to_workers_only():
    overlay = yaml.safe_load((ROOT / "infra/docker-compose.gpu.yml").read_text())["services"]
    base = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert overlay.keys() == {name for name, about in base.items() if about["image"] == "erpe:0.1.0"}
    assert {name for name, about in overlay.items() if "deploy" in about} == {"ray-worker"}
    assert all(about["build"]["args"] == {"TORCH_INDEX": ""} for about in overlay.values())


@pytest.mark.parametrize("path", sorted((ROOT / "infra/docker/bin").iterdir()), ids=lambda path: path.name)
def test_scripts_of_the_images_can_be_run(path):
    first = path.read_text().splitlines()[0]
    assert path.stat().st_mode & 0o111 and first in ("#!/bin/sh", "#!/usr/bin/env python3")
    if first == "#!/bin/sh":
        subprocess.run(["sh", "-n", path], check=True)
    else:
        compile(path.read_text(), path, "exec")


def test_a_command_without_its_secret_does_not_start(tmp_path):
    script = ROOT / "infra/docker/bin/with-secrets"
    path = {"PATH": "/usr/bin:/bin"}
    for missing in (tmp_path / "none", tmp_path):
        done = subprocess.run(
            [script, "env"], env=path | {"PGPASSWORD_FILE": str(missing)}, capture_output=True, text=True
        )
        assert done.returncode == 1 and "infra/secrets makes it" in done.stderr and not done.stdout
    (tmp_path / "password").write_text("hidden\n")
    given = path | {"PGPASSWORD_FILE": str(tmp_path / "password")}
    assert "PGPASSWORD=hidden\n" in subprocess.run([script, "env"], env=given, capture_output=True, text=True).stdout
