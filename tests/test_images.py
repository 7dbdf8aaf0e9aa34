"""
The container images, built and started for real where a builder is.

Without an engine that makes containers of its own, each image runs in a mount namespace, changed
into its root: read-only, as its user, without capabilities, with the variables and the volumes of
the Compose file. That tests steps of the build, files, users and starts. It does not isolate.
"""

import configparser
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from transformers import AutoModelForCausalLM

from pho_service.client import Client
from storage.embedded import programs, server_user

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".images"  # layers, for the next run with the same files; `make clean` removes them
INPUTS = [
    *(ROOT / "requirements" / f"{name}.txt" for name in ("api", "worker", "build")),
    *(ROOT / "docker").glob("*.Dockerfile"),
]
STAND_IN = "localhost/pho-stand-in:latest"
PATIENCE_S = 1800.0  # on a machine with other work
NEEDED = ("buildah", "debootstrap", "unshare", "chroot", "setpriv", "mount")
START = """
set -eu
root=$1; shift
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
while [ "$1" != -- ]; do
    case $1 in
        tmpfs) mount -t tmpfs -o mode=1777 tmpfs "$root$2"; shift 2 ;;
        rw) mount --bind "$2" "$root$3"; shift 3 ;;
        ro) mount --bind "$2" "$root$3"; mount -o remount,bind,ro "$root$3"; shift 3 ;;
    esac
done
shift
mount -o remount,bind,ro "$root"
user=$1 folder=$2; shift 2
exec setpriv --no-new-privs --bounding-set=-all,+sys_chroot,+setuid,+setgid --inh-caps=-all \\
    chroot --userspec="$user:$user" --groups= "$root" \\
    sh -c 'cd "$1" && shift && exec "$@"' sh "$folder" "$@"
"""


def run(*words, **options):
    """What a command prints; the test fails with what it said if it fails."""
    done = subprocess.run(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False, timeout=PATIENCE_S, **options,
    )  # fmt: skip
    assert done.returncode == 0, f"{words[0]}: {done.stdout[-4000:]}"
    return done.stdout


def until(condition, what):
    """The first true value of ``condition``."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited in vain: {what()}")


def free_port():
    """One that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def store():
    """The environment for buildah: a store of images of its own, that needs no daemon."""
    if os.geteuid() or sys.platform != "linux":
        pytest.skip("images are built and started by root, on Linux")
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: no image is built")
    # buildah does not see that a file has changed which a step of the build only mounts.
    inputs = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(INPUTS))).hexdigest()
    kept = KEPT / inputs[:16]
    for older in KEPT.glob("*"):
        if older != kept:
            subprocess.run(["umount", "--recursive", older], check=False, capture_output=True)
            shutil.rmtree(older)
    kept.mkdir(parents=True, exist_ok=True)
    for driver in ("overlay", "vfs"):
        (kept / "storage.conf").write_text(
            f'[storage]\ndriver = "{driver}"\ngraphroot = "{kept}/{driver}"\n'
            f'runroot = "{kept}/run-{driver}"\n'
        )
        environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(kept / "storage.conf"),
            "BUILDAH_ISOLATION": "chroot",
        }
        asked = subprocess.run(["buildah", "images"], env=environment, capture_output=True)
        if asked.returncode == 0:
            return environment
    pytest.skip(f"buildah does not work here: {asked.stderr.decode()[-300:]}")


@pytest.fixture(scope="module")
def base(store, tmp_path_factory):
    """A stand-in for the base image, which cannot be pulled everywhere: Debian with this Python."""
    there = run("buildah", "images", "--quiet", "--filter", f"reference={STAND_IN}", env=store)
    if there.strip():
        return STAND_IN
    if (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists():
        pytest.skip("this Python has no ensurepip, as Debian's own: no base image is made of it")
    folder = tmp_path_factory.mktemp("base") / "root"
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "stable")
    try:
        run("debootstrap", "--variant=minbase", "--include=ca-certificates", release, folder)
    except AssertionError as error:
        pytest.skip(f"no base image can be made here: {str(error)[-300:]}")
    finally:
        for mounted in ("proc", "sys"):  # which it leaves behind
            subprocess.run(["umount", folder / mounted], check=False, capture_output=True)
    _copy_python(folder)
    container = run("buildah", "from", "scratch", env=store).strip()
    run("buildah", "copy", "--quiet", container, folder, "/", env=store)
    run("buildah", "commit", "--quiet", container, STAND_IN, env=store)
    run("buildah", "rm", container, env=store)
    shutil.rmtree(folder)
    return STAND_IN


def _copy_python(root):
    """This machine's Python, to where the real base has its own, with the libraries it needs."""
    here, there = Path(sys.base_prefix), root / "usr" / "local"
    number = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = f"lib/{number}"
    unwanted = shutil.ignore_patterns("site-packages", "dist-packages", "test", "__pycache__")
    shutil.copytree(here / library, there / library, ignore=unwanted, dirs_exist_ok=True)
    shutil.copy(Path(here, "bin", number).resolve(), there / "bin" / number)
    for name in ("python", "python3"):
        (there / "bin" / name).symlink_to(number)
    extensions = [there / "bin" / number, *(there / library / "lib-dynload").glob("*.so")]
    for needed in map(Path, re.findall(r"=> (/\S+)", run("ldd", *extensions))):
        if needed.is_relative_to(here):  # its own, maybe in a home that is closed
            shutil.copy(needed.resolve(), there / "lib" / needed.name)
        elif not Path(root, *needed.parts[1:]).exists():
            Path(root, *needed.parts[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(needed.resolve(), Path(root, *needed.parts[1:]))
    run("chroot", root, "/sbin/ldconfig")
    run("chroot", root, "/usr/local/bin/python", "-m", "ensurepip")
    (there / "bin" / "pip").unlink(missing_ok=True)
    (there / "bin" / "pip").symlink_to("pip3")


def settings_of_pip(folder):
    """Volumes by which the pip of a build has this machine's settings: its index, its wheels."""
    said = run(sys.executable, "-m", "pip", "config", "list")
    names = ("cert", "find-links", "constraint", "index-url", "extra-index-url", "timeout")
    found = {
        name: value for name, value in re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", said, re.MULTILINE)
        if name in names
    }  # fmt: skip
    written = configparser.ConfigParser()
    written["global"] = found
    written["install"] = {"compile": "no"}  # too little of it is imported here
    with (folder / "pip.conf").open("w") as file:
        written.write(file)
    here = [value for value in found.values() if value.startswith("/")]
    return [f"{folder / 'pip.conf'}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in here)]


@pytest.fixture(scope="module")
def images(store, base, tmp_path_factory):
    """Both, built by `make images` from this checkout; the environment that finds them."""
    wheels = run(sys.executable, "-m", "pip", "config", "list")
    if "find-links" not in wheels:
        pytest.skip(
            "pip knows of no folder with a small torch: a CUDA build of gigabytes would come"
        )
    limits = [f"--ulimit={kind}={n}:{n}" for kind, n in _hard_limits().items()]
    volumes = [f"--volume={v}" for v in settings_of_pip(tmp_path_factory.mktemp("pip"))]
    options = ["--layers", "--pull=never", "--network=host", f"--build-arg=BASE={base}"]
    run(
        "make", "--no-print-directory", "images",
        cwd=ROOT,
        env={
            **store, "BUILDER": "buildah", "WORKER_OPTIONS": "--build-arg TORCH_INDEX=",
            "OPTIONS": " ".join([*options, *limits, *volumes]),
        },
    )  # fmt: skip
    return store


def _hard_limits():
    """Which buildah would raise, and may not everywhere."""
    import resource

    return {
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "nproc": resource.getrlimit(resource.RLIMIT_NPROC)[1],
    }


@dataclass
class Container:
    """An image's root and configuration, ready to be started."""

    root: str
    config: dict[str, Any]
    environment: dict[str, str]
    mounts: list[str]

    def start(self, log, *command):
        """Run its command, or another one of its program."""
        image = dict(line.split("=", 1) for line in self.config["Env"])
        words = [*self.config["Entrypoint"], *(command or self.config["Cmd"])]
        user, folder = self.config["User"], self.config["WorkingDir"]
        with log.open("wb") as file:
            return subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", START, "sh", self.root, *self.mounts, "--",
                 user, folder, *words],
                env={**image, **self.environment},
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip

    def ask(self, log, *command):
        """The exit code of a command, and what it said."""
        process = self.start(log, *command)
        return process.wait(PATIENCE_S), log.read_text()


@pytest.fixture(scope="module")
def postgresql_by_password():
    """A PostgreSQL on a port of 127.0.0.1, with a user pho and a password: port and password."""
    user, port, password = server_user(), free_port(), secrets.token_hex(16)
    folder = Path("/tmp", f"pho-{secrets.token_hex(4)}")  # noqa: S108 - the server's user goes there
    folder.mkdir(mode=0o700)
    (folder / "password").write_text(password)
    shutil.chown(folder / "password", user.number)
    shutil.chown(folder, user.number)
    at = programs()[18]
    run(
        at / "initdb", "--auth=scram-sha-256", "-U", "pho", f"--pwfile={folder / 'password'}",
        "--no-sync", "-D", folder / "data", **user.rights(),
    )  # fmt: skip
    server = subprocess.Popen(
        [at / "postgres", "-D", folder / "data", "-c", "listen_addresses=127.0.0.1", "-c",
         f"port={port}", "-c", "unix_socket_directories=", "-c", "fsync=off"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        **user.rights(),
    )  # fmt: skip

    def made():
        url = f"postgresql://pho:{password}@127.0.0.1:{port}/postgres"
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("CREATE DATABASE pho")
        except psycopg.OperationalError:
            return False
        return True

    until(made, lambda: "PostgreSQL answers")
    yield port, password
    server.send_signal(signal.SIGINT)
    server.wait(60)
    shutil.rmtree(folder)


@pytest.fixture
def container_of(images, postgresql_by_password, tmp_path):
    """Makes a container of an image, as its service in the Compose file says."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: see extra dev")
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    port, password = postgresql_by_password
    made = []
    secret = tmp_path / "database_password"
    secret.write_text(password + "\n")
    secret.chmod(0o644)
    data = tmp_path / "data"
    data.mkdir()

    def make(name):
        service = services[name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        container = run("buildah", "from", "--pull=never", service["image"], env=images).strip()
        made.append(container)
        root = run("buildah", "mount", container, env=images).strip()
        described = run("buildah", "inspect", "--type", "image", service["image"], env=images)
        config = json.loads(described)["OCIv1"]["config"]
        environment = {k: v for k, v in service["environment"].items() if v is not None}
        url = environment["PHO_DATABASE_URL"]
        environment["PHO_DATABASE_URL"] = url.replace("@database/", f"@127.0.0.1:{port}/")
        # What an engine makes where a secret or a volume is mounted.
        for folder in ("run/secrets", "data"):
            Path(root, folder).mkdir(parents=True, exist_ok=True)
        Path(root, "run/secrets/database_password").touch()
        mounts = ["ro", str(secret), "/run/secrets/database_password"]
        for volume in service["volumes"]:
            source, target = re.fullmatch(r"(.*?):(/[^:]*)(?::ro)?", volume).groups()  # type: ignore[union-attr]
            if source.startswith("$"):
                mounts += ["ro", str(data), target]
                continue
            folder = tmp_path / source
            folder.mkdir(exist_ok=True)
            shutil.chown(folder, int(config["User"]))
            mounts += ["rw", str(folder), target]
        for folder in service.get("tmpfs", ()):
            mounts += ["tmpfs", folder]
        return Container(root, config, environment, mounts)

    yield make
    for container in made:
        subprocess.run(["buildah", "rm", container], env=images, check=False, capture_output=True)


def test_a_job_through_both(container_of, tmp_path, model_folder, texts):
    """
    The API and a worker start as their user on roots that nobody can write to, and do a job, whose
    pruned model is downloaded and loads.

    Without a key the API, which lets other machines in, does not start.
    """
    api, worker = container_of("api"), container_of("worker")
    data = tmp_path / "data"
    shutil.copytree(model_folder, data / "model")
    for path in texts.values():
        shutil.copy(path, data)
    for file in (data / "model").iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner reads
    port = free_port()
    api.environment["PHO_PORT"] = str(port)
    worker.environment["OMP_NUM_THREADS"] = "1"
    refused, why = api.ask(tmp_path / "refused.log")
    made, said = api.ask(tmp_path / "key.log", "keys", "create", "me", "--all-jobs")
    assert made == 0, said
    key = re.findall(r"^pho_\S+$", said, re.MULTILINE)[0]
    logs = {"api": tmp_path / "api.log", "worker": tmp_path / "worker.log"}
    running = {"api": api.start(logs["api"]), "worker": worker.start(logs["worker"])}

    def all_logs():
        return "\n".join(f"{name}: {log.read_text()[-3000:]}" for name, log in logs.items())

    client = httpx.Client(
        base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, timeout=30
    )

    def ready():
        assert running["api"].poll() is None, all_logs()
        try:
            return client.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        until(ready, all_logs)
        shut_out = httpx.get(f"http://127.0.0.1:{port}/v1/jobs").status_code
        document = {
            "model": "model", "pattern": "0.5", "preset": "score", "trials": 12, "prune": True,
            "calibration": {
                "text": "calibration.jsonl", "samples": 6, "context_length": 32,
                "rows_per_layer": 4, "projection_rows": 16, "kernel_sizes": [3, 5],
            },
            "confirm": {"text": "confirmation.jsonl", "windows": 3, "finalists": 2},
        }  # fmt: skip
        job = client.post("/v1/jobs", json=document).json()["id"]

        def over():
            assert running["worker"].poll() is None, all_logs()
            found = client.get(f"/v1/jobs/{job}").json()
            return found if found["state"] in ("succeeded", "failed") else None

        ended = until(over, all_logs)
        best = client.get(f"/v1/jobs/{job}/best").json()
        with Client(str(client.base_url), key=key) as user:
            pulled = user.pull(job, tmp_path / "pulled")
        is_ready = client.get("/readyz").json()
        touched = Path(f"/proc/{running['worker'].pid}/root/tmp/alive").stat().st_mtime
        status = {
            name: Path(f"/proc/{process.pid}/status").read_text()
            for name, process in running.items()
        }
        roots = {
            name: Path(f"/proc/{process.pid}/mounts").read_text()
            for name, process in running.items()
        }
    finally:
        for process in running.values():
            process.terminate()
        codes = [process.wait(120) for process in running.values()]
        client.close()

    assert refused != 0
    assert "no key opens anything" in why
    assert shut_out == 401
    assert ended["state"] == "succeeded", (ended, all_logs())
    assert best["pattern"] == "0.5"
    assert is_ready == {"status": "ok"}  # they see the same artifact store
    pruned = AutoModelForCausalLM.from_pretrained(pulled)
    zeros = [float((p == 0).float().mean()) for n, p in pruned.named_parameters() if "proj" in n]
    assert sum(zeros) / len(zeros) == pytest.approx(0.5, abs=0.05)
    assert time.time() - touched < 600
    assert codes == [0, 0], all_logs()
    for name in running:
        assert re.search(r"^Uid:\s+10001\s+10001\s+10001\s+10001$", status[name], re.MULTILINE)
        assert re.search(r"^CapEff:\s+0+$", status[name], re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s+1$", status[name], re.MULTILINE)
        assert re.search(r"^\S+ / \S+ ro,", roots[name], re.MULTILINE), roots[name]
    assert list((tmp_path / "bundles").iterdir())
    for container in (api, worker):  # and it is this checkout's code
        (installed,) = Path(container.root, "usr").glob("**/*-packages/storage/jobs.py")
        assert installed.read_bytes() == (ROOT / "storage" / "jobs.py").read_bytes()


def test_an_installation_on_kubernetes_from_an_empty_database_to_its_first_scrape(
    container_of, postgresql_by_password, tmp_path
):
    """
    The commands of docs/containers.md in the API's image, with the settings of docker/kubernetes/
    and a URL as CloudNativePG writes it.
    """
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: see extra dev")
    base = yaml.safe_load((ROOT / "docker/kubernetes/base/kustomization.yaml").read_text())
    settings = dict(line.split("=", 1) for line in base["configMapGenerator"][0]["literals"])
    postgresql, password = postgresql_by_password
    url = f"postgresql://pho:{password}@127.0.0.1:{postgresql}"
    with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE installation")
    api, port = container_of("api"), free_port()
    api.environment = {
        **settings, "PHO_DATABASE_URL": f"{url}/installation", "PHO_PORT": str(port)
    }  # fmt: skip
    log = tmp_path / "said.log"
    migrated = api.ask(log, "migrate")
    refused = api.ask(log)
    keys = [
        re.findall(r"^pho_\S+$", api.ask(log, "keys", "create", *words)[1], re.MULTILINE)[0]
        for words in (("me", "--all-jobs"), ("prometheus", "--scrape-only"))
    ]
    saved = api.ask(log, "backup", "--out", "/tmp/before.dump")  # noqa: S108 - the container's
    roles = (ROOT / "docker/kubernetes/database/roles.sql").read_text()
    with psycopg.connect(f"{url}/installation", autocommit=True) as connection:
        connection.execute(roles)
    running = api.start(log)
    probe = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Host": "10.1.2.3:8000"})

    def ready():
        assert running.poll() is None, log.read_text()
        try:
            return probe.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        until(ready, log.read_text)
        scraped = [
            probe.get(path, headers={"Authorization": f"Bearer {keys[1]}"})
            for path in ("/metrics", "/v1/jobs")
        ]
        listed = probe.get("/v1/jobs", headers={"Authorization": f"Bearer {keys[0]}"})
    finally:
        probe.close()
        running.terminate()
        code = running.wait(120)

    assert migrated[0] == 0, migrated[1]
    assert "has the tables of PHO" in migrated[1]
    assert "no key opens anything" in refused[1]
    assert saved[0] == 0, saved[1]
    assert [answer.status_code for answer in scraped] == [200, 403]
    assert "pho_workers" in scraped[0].text
    assert listed.status_code == 200
    assert code == 0
