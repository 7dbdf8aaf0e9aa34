"""The container files: what schemas and linters say of them, and what must fit the code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pho_service.host.settings import Settings

DOCKER = Path(__file__).parents[1] / "docker"
IMAGES = ("api", "worker")


def run(*command: object) -> "subprocess.CompletedProcess[str]":
    """What a command of this environment answers; skips the test where it is not installed."""
    program = shutil.which(str(command[0]), path=Path(sys.executable).parent)
    if program is None:
        pytest.skip(f"{command[0]} is not installed: see extra dev")
    words = [str(word) for word in command[1:]]
    return subprocess.run([program, *words], capture_output=True, text=True, check=False)


def objects() -> dict[str, Any]:
    """What kubernetes.yaml describes, by kind and name."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: see extra dev")
    found = yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())
    return {f"{item['kind']}/{item['metadata']['name']}": item for item in found}


def container(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The only pod of a deployment, and its only container."""
    pod = objects()[f"Deployment/{name}"]["spec"]["template"]["spec"]
    (only,) = pod["containers"]
    return pod, only


def test_hadolint_finds_nothing_to_say_of_the_dockerfiles() -> None:
    result = run("hadolint", *(DOCKER / f"{image}.Dockerfile" for image in IMAGES))

    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_its_own_lock_file_by_hashes_nothing_else_but_torch(image: str) -> None:
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


def test_the_compose_files_follow_the_compose_specification(tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("compose.yaml", "compose.cpu.yaml")]
    for copy in copies:  # without Compose's own YAML tag
        copy.write_text((DOCKER / copy.name).read_text().replace("!reset ", ""))
    result = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *copies)

    assert result.returncode == 0, result.stdout


def test_the_manifest_follows_kubernetes_own_schemas_without_unknown_fields() -> None:
    result = run("kubernetes-validate", "--strict", DOCKER / "kubernetes.yaml")

    assert result.returncode == 0, result.stdout


def test_the_api_is_probed_by_its_paths_and_a_worker_has_one_gpu() -> None:
    (_, api), (_, worker) = container("pho-api"), container("pho-worker")

    assert api["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert api["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("name", ["pho-api", "pho-worker"])
def test_a_pod_is_not_roots_gains_no_rights(name: str) -> None:
    pod, only = container(name)

    assert pod["securityContext"]["runAsNonRoot"]
    assert not only["securityContext"]["allowPrivilegeEscalation"]
    assert not pod["enableServiceLinks"]


def test_only_nginx_is_reached_and_it_accepts_its_configuration(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: see extra dev")
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
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
def test_bash_and_shellcheck_find_nothing_to_say_of_a_script(name: str) -> None:
    script = DOCKER / name
    parsed = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    linted = run("shellcheck", script)

    assert parsed.returncode == 0, parsed.stderr
    assert linted.returncode == 0, linted.stdout


def test_every_pho_variable_in_a_container_file_is_one_that_the_service_reads() -> None:
    files = [path.read_text() for path in DOCKER.iterdir() if path.is_file()]
    named = set(re.findall(r"\bPHO_[A-Z_]+\b", "\n".join(files)))

    assert named <= {f"PHO_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("file", ["compose.yaml", "kubernetes.yaml"])
def test_no_database_url_in_a_file_that_is_committed_has_a_password(file: str) -> None:
    lines = [line for line in (DOCKER / file).read_text().splitlines() if not line.startswith("#")]

    assert not re.search(r"://[^/\s]*:[^/\s]*@", "\n".join(lines))
