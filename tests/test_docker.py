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


@pytest.mark.parametrize("image", IMAGES)
def test_dockerfile_lints(image: str) -> None:
    """hadolint finds nothing to say of a Dockerfile."""
    result = run("hadolint", DOCKER / f"{image}.Dockerfile")

    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_image_requirements(image: str) -> None:
    """An image installs its own lock file, each file by its hash, and nothing else but torch."""
    text = (DOCKER / f"{image}.Dockerfile").read_text()
    commands = re.findall(r"pip install (?:.*\\\n)*.*", text)
    locked = [command for command in commands if "--require-hashes --no-deps" in command]
    others = [command for command in commands if command not in locked]

    assert f"source=requirements/{image}.txt,target=/requirements.txt" in text
    assert [re.findall(r"/\w+\.txt", command) for command in locked] == [
        ["/build.txt"], ["/requirements.txt"]
    ]  # fmt: skip
    assert [re.findall(r"/wheel/\S+|/torch.txt", command) for command in others] == [
        *([["/torch.txt"]] if image == "worker" else []), ["/wheel/*.whl"]
    ]  # fmt: skip


@pytest.mark.parametrize("image", IMAGES)
def test_image_user(image: str) -> None:
    """An image's processes are not root's."""
    users = re.findall(r"^USER (\S+)$", (DOCKER / f"{image}.Dockerfile").read_text(), re.MULTILINE)

    assert users == ["10001"]


@pytest.mark.parametrize("file", ["compose.yaml", "compose.cpu.yaml"])
def test_compose_schema(file: str, tmp_path: Path) -> None:
    """A compose file follows the Compose specification."""
    copy = tmp_path / file
    copy.write_text((DOCKER / file).read_text().replace("!reset ", ""))  # Compose's own YAML tag
    result = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", copy)

    assert result.returncode == 0, result.stdout


def test_kubernetes_schema() -> None:
    """The manifest follows Kubernetes' own schemas, without unknown fields."""
    result = run("kubernetes-validate", "--strict", DOCKER / "kubernetes.yaml")

    assert result.returncode == 0, result.stdout


def test_kubernetes_probes() -> None:
    """The API is alive by /healthz, and given requests by /readyz."""
    _, api = container("pho-api")

    assert api["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert api["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_kubernetes_gpu() -> None:
    """A worker has one GPU."""
    _, worker = container("pho-worker")

    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("name", ["pho-api", "pho-worker"])
def test_kubernetes_security(name: str) -> None:
    """A pod is not root's, gains no rights, and takes no service's variable for a setting."""
    pod, only = container(name)

    assert pod["securityContext"]["runAsNonRoot"]
    assert not only["securityContext"]["allowPrivilegeEscalation"]
    assert not pod["enableServiceLinks"]


def test_proxy(tmp_path: Path) -> None:
    """nginx accepts its configuration, and only it is reached from outside."""
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
def test_scripts(name: str) -> None:
    """bash and shellcheck find nothing to say of a script."""
    script = DOCKER / name
    parsed = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    linted = run("shellcheck", script)

    assert parsed.returncode == 0, parsed.stderr
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("file", sorted(p.name for p in DOCKER.iterdir() if p.is_file()))
def test_settings_exist(file: str) -> None:
    """Every PHO_ variable in a container file is one that the service reads."""
    named = set(re.findall(r"\bPHO_[A-Z_]+\b", (DOCKER / file).read_text()))

    assert named <= {f"PHO_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("file", ["compose.yaml", "kubernetes.yaml"])
def test_no_password(file: str) -> None:
    """No database URL in a file that is committed has a password."""
    lines = [line for line in (DOCKER / file).read_text().splitlines() if not line.startswith("#")]

    assert not re.search(r"://[^/\s]*:[^/\s]*@", "\n".join(lines))
