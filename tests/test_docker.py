"""The container files: what schemas and linters say of them, and what must fit the code."""

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from pho_service.api.app import create_app
from pho_service.host.settings import Settings, read_settings
from storage.jobs import NewJob
from storage.records import NewStage, StageKind

DOCKER = Path(__file__).parents[1] / "docker"
IMAGES = ("api", "worker")


def run(*command):
    """What a command of this environment answers; skips the test where it is not installed."""
    program = shutil.which(str(command[0]), path=Path(sys.executable).parent)
    if program is None:
        pytest.skip(f"{command[0]} is not installed: see extra dev")
    words = [str(word) for word in command[1:]]
    return subprocess.run([program, *words], capture_output=True, text=True, check=False)


def read(file):
    """The documents of a YAML file."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: see extra dev")
    return list(yaml.safe_load_all((DOCKER / file).read_text()))


def objects(file="kubernetes.yaml"):
    """What a manifest describes, by kind and name."""
    return {f"{item['kind']}/{item['metadata']['name']}": item for item in read(file)}


def container(name):
    """The only pod of a deployment, and its only container."""
    pod = objects()[f"Deployment/{name}"]["spec"]["template"]["spec"]
    (only,) = pod["containers"]
    return pod, only


def test_hadolint_finds_nothing_to_say_of_the_dockerfiles():
    result = run("hadolint", *(DOCKER / f"{image}.Dockerfile" for image in IMAGES))

    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_its_own_lock_file_by_hashes_nothing_else_but_torch(image):
    text = (DOCKER / f"{image}.Dockerfile").read_text()
    commands = re.findall(r"pip install (?:.*\\\n)*.*", text)
    locked = [command for command in commands if "--require-hashes --no-deps" in command]
    others = [command for command in commands if command not in locked]

    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["10001"]
    assert f"source=requirements/{image}.txt,target=/requirements.txt" in text
    assert [re.findall(r"/\w+\.txt", command) for command in locked] == [
        ["/build.txt"], ["/requirements.txt"]
    ]  # fmt: skip
    assert [re.findall(r"/wheel/\S+|/torch.txt", command) for command in others] == [
        *([["/torch.txt"]] if image == "worker" else []), ["/wheel/*.whl"]
    ]  # fmt: skip


@pytest.mark.thorough
def test_the_compose_files_follow_the_compose_specification(tmp_path):
    copies = [tmp_path / name for name in ("compose.yaml", "compose.cpu.yaml")]
    for copy in copies:  # without Compose's own YAML tag
        copy.write_text((DOCKER / copy.name).read_text().replace("!reset ", ""))
    result = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *copies)

    assert result.returncode == 0, result.stdout


@pytest.mark.thorough
def test_the_manifest_and_the_job_of_keda_follow_kubernetes_own_schemas_without_unknown_fields(
    tmp_path,
):
    job = tmp_path / "job.json"  # which is YAML, too
    spec = objects("keda.yaml")["ScaledJob/pho-worker"]["spec"]["jobTargetRef"]
    metadata = {"name": "pho-worker"}
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    job.write_text(json.dumps(document))
    result = run("kubernetes-validate", "--strict", DOCKER / "kubernetes.yaml", job)

    assert result.returncode == 0, result.stdout


def test_a_worker_of_keda_is_one_of_the_deployment_but_ends_by_itself():
    pod, only = container("pho-worker")
    job = objects("keda.yaml")["ScaledJob/pho-worker"]["spec"]["jobTargetRef"]
    own = job["template"]["spec"]
    args = only.pop("args")

    assert "activeDeadlineSeconds" not in job  # it would kill a worker in the midst of its work
    assert own.pop("restartPolicy") == "Never"
    assert own["containers"][0].pop("args") == [*args, "--exit-when-idle", "120"]
    assert own == pod


def test_keda_counts_the_stages_that_could_be_worked_on_at_once_with_the_rights_that_it_has(store):
    text = (DOCKER / "keda.yaml").read_text()
    (trigger,) = objects("keda.yaml")["ScaledJob/pho-worker"]["spec"]["triggers"]
    rights = re.findall(r"^#   ((?:CREATE|GRANT) .*;)$", text, re.MULTILINE)
    calibrate = partial(NewStage, kind=StageKind.CALIBRATE)
    firsts = [calibrate(), calibrate(lock="a"), calibrate(lock="a"), NewStage(kind=StageKind.TASKS)]
    jobs = [
        store.submit(NewJob(spec={}, name="n", stages=[first], trials=1, max_attempts=1))[0]
        for first in firsts
    ]
    counts = []
    with store.database.transaction() as connection:
        for statement in rights:
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql("GRANT keda TO CURRENT_USER")  # who is no superuser
        connection.exec_driver_sql("SET LOCAL ROLE keda")
        counts.append(connection.exec_driver_sql(trigger["metadata"]["query"]).scalar())
        connection.exec_driver_sql("RESET ROLE")
        connection.exec_driver_sql("DROP OWNED BY keda; DROP ROLE keda")
    store.ask(jobs[0].id, "pause")
    with store.database.transaction() as connection:
        stage = connection.exec_driver_sql(
            "SELECT id, queue_id FROM pho.stages WHERE job_id = %s", (jobs[1].id,)
        ).one()
    store.claim(stage.id, stage.queue_id, uuid.uuid4())
    with store.database.transaction() as connection:
        counts.append(connection.exec_driver_sql(trigger["metadata"]["query"]).scalar())

    assert len(rights) == 4
    assert counts == [2, 1]


def test_the_metric_that_keda_may_go_by_instead_is_one_of_the_service(database):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: see extra dev")
    text = (DOCKER / "keda.yaml").read_text()
    commented = re.findall(r"^    # (- type: prometheus\n(?:    # .*\n)+)", text, re.MULTILINE)[0]
    (trigger,) = yaml.safe_load(commented.replace("    # ", ""))
    query = trigger["metadata"]["query"]
    name, labels = re.fullmatch(r"sum\(max by \(kind, state\) \((\w+)\{(.*)\}\)\)", query).groups()  # type: ignore[union-attr]
    wanted = dict(re.findall(r'(\w+)(?:=~|!=)"([^"]*)"', labels))
    with TestClient(create_app(database, read_settings()), "http://localhost") as client:
        metrics = text_string_to_metric_families(client.get("/metrics").text)
    (family,) = (family for family in metrics if family.name == name)
    known = {
        label: {sample.labels[label] for sample in family.samples} for label in ("kind", "state")
    }

    assert {*wanted} == {*known}
    assert {*wanted["state"].split("|")} <= known["state"]
    assert wanted["kind"] in known["kind"]


@pytest.mark.parametrize("name", ["compose", "kubernetes"])
def test_api_and_workers_mount_the_same_artifact_store_to_write_to_it(name):
    if name == "kubernetes":
        containers = [container(f"pho-{image}") for image in IMAGES]
        place = objects()["ConfigMap/pho-settings"]["data"]["PHO_ARTIFACTS"]
        mounted = [
            next(v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]
                 if v["name"] == next(m["name"] for m in only["volumeMounts"]
                                      if m["mountPath"] == place and "readOnly" not in m))
            for pod, only in containers
        ]  # fmt: skip
        settings = [only["envFrom"] for _, only in containers]
    else:
        services = [read("compose.yaml")[0]["services"][image] for image in IMAGES]
        settings = [service["environment"]["PHO_ARTIFACTS"] for service in services]
        mounted = [next(v for v in s["volumes"] if v.endswith(f":{settings[0]}")) for s in services]

    assert mounted[0] == mounted[1]
    assert settings[0] == settings[1]


def test_the_slurm_script_hands_its_arguments_to_a_worker_of_each_gpu(tmp_path):
    stand_in = tmp_path / "srun"
    stand_in.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS: $*"\n')
    stand_in.chmod(0o755)
    needed = {"PHO_DATABASE_URL": "postgresql://db/pho", "PHO_ARTIFACTS": "/shared"}
    words = ["bash", str(DOCKER / "worker.slurm"), "--exit-when-idle", "300"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    ran, refused = (
        subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        for env in ({"PATH": path, "SLURM_CPUS_PER_TASK": "8", **needed}, {"PATH": path})
    )

    command = "pho worker --device cuda:0 --exit-when-idle 300"
    assert ran.stdout == f"8: --cpus-per-task=8 --kill-on-bad-exit=0 {command}\n"
    assert refused.returncode == 1
    assert "PHO_DATABASE_URL: is not set" in refused.stderr


def test_a_worker_of_skypilot_ends_by_itself_a_pool_has_the_cards_and_the_setup_of_its_task():
    (task,), (pool,) = read("skypilot.yaml"), read("skypilot-pool.yaml")
    said = (DOCKER / "skypilot-pool.yaml").read_text()

    assert {*task} == {"name", "workdir", "resources", "envs", "secrets", "setup", "run"}
    assert "pho worker --device cuda:0 --exit-when-idle" in task["run"]
    assert (
        task["envs"]["PHO_ARTIFACTS"] is task["secrets"]["PHO_DATABASE_URL"] is None
    )  # must be given
    assert {*pool} == {"pool", "workdir", "resources", "setup"}
    assert pool["pool"]["workers"] == 8
    for part in ("workdir", "resources", "setup"):
        assert pool[part] == task[part]
    assert f"'{task['run'].strip()}'" in said
    for name in (*task["envs"], *task["secrets"]):
        assert name in said


def test_the_api_is_probed_by_its_paths_a_worker_has_one_gpu_and_neither_any_rights():
    pods = [container(name) for name in ("pho-api", "pho-worker")]
    (_, api), (_, worker) = pods

    assert api["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert api["readinessProbe"]["httpGet"]["path"] == "/readyz"
    touched = next(e["value"] for e in worker["env"] if e["name"] == "PHO_LIVENESS_FILE")
    assert f"find {touched} " in worker["livenessProbe"]["exec"]["command"][-1]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    for pod, only in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert not only["securityContext"]["allowPrivilegeEscalation"]
        assert not pod["enableServiceLinks"]


def test_nginx_has_each_limit_that_the_page_on_security_says_it_has():
    """The service itself has none for clients that are slow or many."""
    page = (DOCKER.parent / "docs" / "security.md").read_text()
    said = page.partition("## What the reverse proxy does")[2].partition("\n## ")[0]
    conf = (DOCKER / "nginx.conf").read_text()
    found = dict(re.findall(r"^ *(\w+) ([^;{]+);", conf, re.MULTILINE))

    for name, words in (
        ("client_header_timeout", "30 s"), ("client_body_timeout", "30 s"),
        ("send_timeout", "30 s"), ("client_max_body_size", "1 MiB"),
        ("limit_conn", "200 connections"),
    ):  # fmt: skip
        assert f"`{name}`" in said
        assert words in said
        assert found[name].split()[-1].rstrip("sm") == words.split()[0]
    assert found["limit_conn"].split()[0] in found["limit_conn_zone"]
    assert found["limit_conn_zone"].startswith("$binary_remote_addr ")


def test_only_nginx_is_reached_and_it_accepts_its_configuration(tmp_path):
    services = read("compose.yaml")[0]["services"]
    published = [name for name, service in services.items() if "ports" in service]
    service = objects()["Service/pho"]["spec"]

    assert published == ["proxy"]
    assert service["selector"] == {"app": "pho-proxy"}
    if not (shutil.which("nginx") and shutil.which("openssl")):
        pytest.skip("nginx or openssl is not installed")
    key = ["-keyout", str(tmp_path / "tls.key"), "-out", str(tmp_path / "tls.crt")]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*made, *key], check=True, capture_output=True)
    text = (DOCKER / "nginx.conf").read_text().replace("pho-api:", "127.0.0.1:")
    conf = tmp_path / "nginx.conf"
    conf.write_text(text.replace(" /tmp/", f" {tmp_path}/").replace("/etc/tls", str(tmp_path)))
    tested = subprocess.run(
        ["nginx", "-t", "-c", conf], capture_output=True, text=True, check=False
    )

    assert tested.returncode == 0, tested.stderr


@pytest.mark.parametrize("name", ["worker.slurm", "build.sh"])
def test_bash_and_shellcheck_find_nothing_to_say_of_a_script(name):
    script = DOCKER / name
    parsed = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    linted = run("shellcheck", script)

    assert parsed.returncode == 0, parsed.stderr
    assert linted.returncode == 0, linted.stdout


def test_every_pho_variable_in_a_container_file_is_one_that_the_service_reads():
    files = [path.read_text() for path in DOCKER.iterdir() if path.is_file()]
    named = set(re.findall(r"\bPHO_[A-Z_]+\b", "\n".join(files)))

    assert named <= {f"PHO_{name.upper()}" for name in Settings.model_fields}
    for file in DOCKER.glob("*.yaml"):  # no database's URL has a password
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert not re.search(r"://[^/\s]*:[^/\s]*@", "\n".join(lines)), file
