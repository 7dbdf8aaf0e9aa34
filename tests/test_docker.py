"""The container files: what schemas and linters say of them, and what must fit the code."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from functools import cache, partial
from pathlib import Path

import click
import pytest
import sqlalchemy.exc
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from pho_service.api.app import create_app
from pho_service.cli import main
from pho_service.host.settings import Settings, read_settings
from storage.jobs import NewJob
from storage.records import NewStage, StageKind
from storage.tables import READER

DOCKER = Path(__file__).parents[1] / "docker"
KUBERNETES = DOCKER / "kubernetes"
IMAGES = ("api", "worker")
# What an installation is made of beside the base: by ingress or proxy, with and without the rest.
INSTALLATIONS = [(), ("database", "ingress", "monitoring"), ("proxy", "keda")]
INSTALLATIONS.append(("database", "proxy", "monitoring", "keda"))
EVERYTHING = INSTALLATIONS[-1]


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


@cache
def rendered(*components):
    """What kustomize makes of the base and these components, as JSON."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: see extra dev")
    kustomize = shutil.which("kustomize") or shutil.which("kubectl")
    if kustomize is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    command = [kustomize, "build" if kustomize.endswith("kustomize") else "kustomize"]
    with tempfile.TemporaryDirectory() as folder:
        places = [os.path.relpath(KUBERNETES / name, folder) for name in ("base", *components)]
        document = {"namespace": "pho", "resources": places[:1], "components": places[1:]}
        Path(folder, "kustomization.yaml").write_text(json.dumps(document))
        made = subprocess.run([*command, folder], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return json.dumps(list(yaml.safe_load_all(made.stdout)))


def objects(*components):
    """What an installation describes, by kind and name."""
    items = json.loads(rendered(*components))
    return {f"{item['kind']}/{item['metadata']['name']}": item for item in items}


def pods(*components):
    """The pods of an installation, by what makes them."""
    found = {}
    for name, item in objects(*components).items():
        spec = item.get("spec", {})
        spec = spec.get("jobTemplate", spec).get("spec", spec.get("jobTargetRef", spec))
        if "template" in spec:
            found[name] = spec["template"]
    return found


def containers(template):
    """All containers of a pod, those that run before the others first."""
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def container(name, *components):
    """The pod of a deployment, and its only container beside those that run before."""
    pod = pods(*components)[f"Deployment/{name}"]["spec"]
    (only,) = pod["containers"]
    return pod, only


def parse(words):
    """Refuse what is not a command of `pho` with its options."""
    command, context = main, main.make_context("pho", [], resilient_parsing=True)
    while isinstance(command, click.Group) and words:
        name, command, words = command.resolve_command(context, [*words])
        below = isinstance(command, click.Group)  # what it is asked for comes next
        context = command.make_context(name, [*words], parent=context, resilient_parsing=below)


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
@pytest.mark.parametrize("components", INSTALLATIONS, ids="-".join)
def test_an_installation_follows_kubernetes_own_schemas_without_unknown_fields(
    components, tmp_path
):
    items = objects(*components)
    files = []
    for name, item in items.items():
        if item["kind"] == "ScaledJob":  # of what KEDA makes by it
            spec, metadata = item["spec"]["jobTargetRef"], {"name": "pho-worker"}
            item = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
        if "." in item["apiVersion"].removesuffix(".k8s.io/v1"):
            continue  # of an operator
        files.append(tmp_path / f"{name.replace('/', '-')}.json")  # which is YAML, too
        files[-1].write_text(json.dumps(item))
    result = run("kubernetes-validate", "--strict", *files)

    assert result.returncode == 0, result.stdout
    assert len(files) > 8


def test_the_example_is_an_installation_of_base_and_components_with_images_of_the_workflow():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: see extra dev")
    (example,) = read("kubernetes/installation/kustomization.yaml")
    workflow = DOCKER.parent / ".github" / "workflows" / "publish.yml"
    job = yaml.safe_load(workflow.read_text())["jobs"]["images"]
    pushed = [step["run"] for step in job["steps"] if "docker push" in step.get("run", "")]
    version = re.search(r'^version = "(.*)"$', (DOCKER.parent / "pyproject.toml").read_text(), re.M)

    assert example["resources"] == ["../base"]
    used = {name.removeprefix("../") for name in example["components"]}
    assert used <= {path.parent.name for path in KUBERNETES.glob("*/kustomization.yaml")}
    assert tuple(job["strategy"]["matrix"]["image"]) == IMAGES
    assert len(pushed) == 1
    assert "/pho-$IMAGES" in pushed[0]
    for image, of in zip(example["images"], IMAGES, strict=True):
        assert image["name"] == f"pho-{of}"
        assert image["newName"].startswith("ghcr.io/")
        assert image["newName"].endswith(f"/pho-{of}")
        assert image["newTag"] == version[1]  # type: ignore[index]
    if shutil.which("kustomize"):
        command = ["kustomize", "build", KUBERNETES / "installation"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("components", INSTALLATIONS, ids="-".join)
def test_each_command_port_and_path_in_an_installation_is_one_of_the_product(components, database):
    port = Settings.model_fields["port"].default
    items, templates = objects(*components), pods(*components)
    with TestClient(create_app(database, read_settings()), "http://localhost") as client:
        for template in templates.values():
            for each in containers(template):
                if each["image"].startswith("pho-") and "command" not in each:
                    parse(each.get("args", ["serve" if each["image"] == "pho-api" else "worker"]))
                for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                    path = each.get(probe, {}).get("httpGet", {}).get("path")
                    assert path is None or client.get(path).status_code == 200
        monitor = items.get("ServiceMonitor/pho", {"spec": {"endpoints": []}})
        for endpoint in monitor["spec"]["endpoints"]:
            assert client.get(endpoint["path"]).status_code == 200
    _, api = container("pho-api", *components)

    assert [p["containerPort"] for p in api["ports"]] == [port]
    assert [p["port"] for p in items["Service/pho-api"]["spec"]["ports"]] == [port]
    if "proxy" in components:
        assert f"server pho-api:{port};" in (KUBERNETES / "proxy" / "nginx.conf").read_text()


def test_each_command_that_a_comment_gives_is_one_of_pho():
    page = DOCKER.parent / "docs" / "containers.md"
    texts = [p.read_text() for p in (page, *KUBERNETES.rglob("*")) if p.is_file()]
    given = re.findall(r"(?:-- |`)(pho [a-z][^`#>)\n]*)", "\n".join(texts))

    assert len(given) >= 5
    for command in given:
        parse(command.split()[1:])


@pytest.mark.parametrize("components", INSTALLATIONS, ids="-".join)
def test_what_a_pod_or_an_operator_is_told_by_name_is_there_or_is_made_by_the_page(components):
    page = (DOCKER.parent / "docs" / "containers.md").read_text()
    items = objects(*components)
    made = set(re.findall(r"create secret (?:generic|tls) (\S+)", page))
    made |= {"pho-database-app"} if "database" in components else set()  # CloudNativePG makes it
    text = rendered(*components)
    keys = "secretKeyRef|passwordSecret|credentials|secret|secretTargetRef"
    secrets = set(re.findall(rf'"(?:{keys})": \[?{{[^}}]*"(?:name|secretName)": "([^"]+)"', text))
    claims = set(re.findall(r'"claimName": "([^"]+)"', text))
    maps = set(re.findall(r'"configMap(?:Ref)?": {"name": "([^"]+)"', text))

    assert secrets <= made
    assert claims == {name.partition("/")[2] for name in items if name.startswith("Persistent")}
    assert {f"ConfigMap/{name}" for name in maps} <= {*items}


@pytest.mark.parametrize("components", INSTALLATIONS, ids="-".join)
def test_each_selector_finds_pods_and_an_api_is_reached_by_what_shall_reach_it_only(components):
    items = objects(*components)
    labels = [template["metadata"]["labels"] for template in pods(*components).values()]
    labels += [{"cnpg.io/cluster": "pho-database"}] if "database" in components else []
    for name, item in items.items():
        if item["kind"] not in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            continue
        spec = item["spec"]
        selector = spec["podSelector"] if "podSelector" in spec else spec["selector"]
        wanted = selector.get("matchLabels", {} if "matchExpressions" in selector else selector)
        for expression in selector.get("matchExpressions", ()):
            assert {*expression["values"]} <= {each.get("app") for each in labels}, name
        assert any(wanted.items() <= each.items() for each in labels), name
    policies = {
        name for name, item in items.items()
        if item["kind"] == "NetworkPolicy" and "ingress" in item["spec"]
        and item["spec"]["podSelector"].get("matchLabels") == {"app": "pho-api"}
    }  # fmt: skip

    ways = {"ingress": "ingress", "proxy": "proxy", "monitoring": "prometheus"}
    expected = {f"NetworkPolicy/pho-api-from-{ways[c]}" for c in components if c in ways}
    assert policies == expected
    assert items["NetworkPolicy/pho"]["spec"]["policyTypes"] == ["Ingress"]


@pytest.mark.parametrize("components", INSTALLATIONS, ids="-".join)
def test_each_pod_may_run_where_the_namespace_wants_restricted_ones(components):
    namespace = objects(*components)["Namespace/pho"]["metadata"]["labels"]

    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, template in pods(*components).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not spec["automountServiceAccountToken"], name
        assert not spec["enableServiceLinks"], name  # their variables look like settings
        for each in containers(template):
            context = each["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert context["readOnlyRootFilesystem"], name
            assert not context["allowPrivilegeEscalation"], name
            assert {"requests", "limits"} <= each["resources"].keys(), name


def test_all_processes_use_the_database_that_cloudnativepg_makes_and_its_roles_are_those_of_pho():
    sql = (KUBERNETES / "database" / "roles.sql").read_text()
    urls = [
        variable["valueFrom"]["secretKeyRef"]
        for template in pods(*EVERYTHING).values()
        for each in containers(template)
        for variable in each.get("env", ())
        if variable["name"] == "PHO_DATABASE_URL"
    ]
    cluster = objects(*EVERYTHING)["Cluster/pho-database"]["spec"]
    roles = [role["name"] for role in cluster["managed"]["roles"]]

    assert urls == [{"name": "pho-database-app", "key": "uri"}] * 4
    assert roles == [READER, "keda"] == re.findall(r"CREATE ROLE (\w+)", sql)


def test_the_monitor_finds_the_service_and_gives_its_metrics_the_name_that_the_alerts_ask_for():
    items = objects(*EVERYTHING)
    monitor, service = items["ServiceMonitor/pho"]["spec"], items["Service/pho-api"]
    rules = json.dumps(items["PrometheusRule/pho"]["spec"])
    labels = service["metadata"]["labels"]

    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert [e["port"] for e in monitor["endpoints"]] == [service["spec"]["ports"][0]["name"]]
    assert f'up{{job=\\"{labels[monitor["jobLabel"]]}\\"}}' in rules
    assert json.loads(items["ConfigMap/pho-dashboard"]["data"]["grafana.json"])["panels"]


def test_a_new_version_meets_no_process_of_the_old_one_and_migrates_before_the_api_is_probed():
    pod, api = container("pho-api")
    deployments = [objects()[f"Deployment/pho-{image}"]["spec"] for image in IMAGES]
    (before,) = pod["initContainers"]

    assert [each["strategy"] for each in deployments] == [{"type": "Recreate"}] * 2
    assert before["args"] == ["migrate"]
    assert not {"livenessProbe", "startupProbe"} & before.keys()
    for key in ("image", "env", "envFrom"):
        assert before[key] == api[key]


def test_a_worker_of_keda_is_one_of_the_deployment_but_ends_by_itself():
    pod, only = container("pho-worker", "database")
    items = objects(*EVERYTHING)
    job = items["ScaledJob/pho-worker"]["spec"]["jobTargetRef"]
    own = job["template"]["spec"]
    args = only.pop("args")

    assert "Deployment/pho-worker" not in items
    assert "activeDeadlineSeconds" not in job  # it would kill a worker in the midst of its work
    assert own.pop("restartPolicy") == "Never"
    assert own["containers"][0].pop("args") == [*args, "--exit-when-idle", "120"]
    assert own == pod


def test_keda_counts_the_stages_that_could_be_worked_on_at_once_with_the_rights_that_it_has(store):
    _, scaled = read("kubernetes/keda/worker/scaledjob.yaml")
    (trigger,) = scaled["spec"]["triggers"]
    roles = (KUBERNETES / "database" / "roles.sql").read_text()
    calibrate = partial(NewStage, kind=StageKind.CALIBRATE)
    firsts = [calibrate(), calibrate(lock="a"), calibrate(lock="a"), NewStage(kind=StageKind.TASKS)]
    jobs = [
        store.submit(NewJob(spec={}, name="n", stages=[first], trials=1, max_attempts=1))[0]
        for first in firsts
    ]
    counts = []
    with store.database.transaction() as connection:
        for _ in range(2):  # where CloudNativePG has made the roles, too
            connection.exec_driver_sql(roles.replace("%", "%%"))
        connection.exec_driver_sql("GRANT keda, pho_reader TO CURRENT_USER")  # who is no superuser
        connection.exec_driver_sql("SET LOCAL ROLE pho_reader")
        studies = connection.exec_driver_sql("SELECT count(*) FROM optuna.studies").scalar()
        connection.exec_driver_sql("SET LOCAL ROLE keda")
        counts.append(connection.exec_driver_sql(trigger["metadata"]["query"]).scalar())
        for secret in ("pho.keys", "pho.jobs", "optuna.studies"):
            connection.exec_driver_sql("SAVEPOINT before")
            with pytest.raises(sqlalchemy.exc.ProgrammingError, match="permission denied"):
                connection.exec_driver_sql(f"SELECT * FROM {secret}")  # noqa: S608 - tables' names
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT before")
        connection.exec_driver_sql("RESET ROLE")
        # The reader stays: other databases of this server have given it rights, too.
        connection.exec_driver_sql("DROP OWNED BY keda, pho_reader; DROP ROLE keda")
    store.ask(jobs[0].id, "pause")
    with store.database.transaction() as connection:
        stage = connection.exec_driver_sql(
            "SELECT id, queue_id FROM pho.stages WHERE job_id = %s", (jobs[1].id,)
        ).one()
    store.claim(stage.id, stage.queue_id, uuid.uuid4())
    with store.database.transaction() as connection:
        counts.append(connection.exec_driver_sql(trigger["metadata"]["query"]).scalar())

    assert studies == 0
    assert counts == [2, 1]


def test_the_metric_that_keda_may_go_by_instead_is_one_of_the_service(database):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: see extra dev")
    text = (KUBERNETES / "keda" / "worker" / "scaledjob.yaml").read_text()
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


def test_the_api_is_probed_by_its_paths_and_a_worker_has_one_gpu_and_is_probed_by_its_file():
    (_, api), (_, worker) = container("pho-api"), container("pho-worker")

    assert api["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert api["readinessProbe"]["httpGet"]["path"] == "/readyz"
    touched = next(e["value"] for e in worker["env"] if e["name"] == "PHO_LIVENESS_FILE")
    assert f"find {touched} " in worker["livenessProbe"]["exec"]["command"][-1]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_nginx_has_each_limit_that_the_page_on_security_says_it_has():
    """The service itself has none for clients that are slow or many."""
    page = (DOCKER.parent / "docs" / "security.md").read_text()
    said = page.partition("## What the reverse proxy does")[2].partition("\n## ")[0]
    conf = (KUBERNETES / "proxy" / "nginx.conf").read_text()
    # What is said first is of all addresses, what comes later of one.
    found = dict(reversed(re.findall(r"^ *(\w+) ([^;{]+);", conf, re.MULTILINE)))

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
    service = objects("proxy")["Service/pho"]["spec"]

    assert published == ["proxy"]
    assert service["selector"] == {"app": "pho-proxy"}
    if not (shutil.which("nginx") and shutil.which("openssl")):
        pytest.skip("nginx or openssl is not installed")
    key = ["-keyout", str(tmp_path / "tls.key"), "-out", str(tmp_path / "tls.crt")]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*made, *key], check=True, capture_output=True)
    text = (KUBERNETES / "proxy" / "nginx.conf").read_text().replace("pho-api:", "127.0.0.1:")
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
    files = [path.read_text() for path in DOCKER.rglob("*") if path.is_file()]
    named = set(re.findall(r"\bPHO_[A-Z_]+\b", "\n".join(files)))

    assert named <= {f"PHO_{name.upper()}" for name in Settings.model_fields}
    for file in DOCKER.rglob("*.yaml"):  # no database's URL has a password
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert not re.search(r"://[^/\s]*:[^/\s]*@", "\n".join(lines)), file
