"""launch/tpu_vm.sh against a gcloud that records its arguments and runs what it is told on "hosts" that are folders."""

import re
import subprocess
import time

import pytest

from tests.launch.stubs import LAUNCH, Stubs

SCRIPT = LAUNCH / "tpu_vm.sh"
TPU = ["compute", "tpus", "tpu-vm"]
QUEUE = ["compute", "tpus", "queued-resources"]
SIZE = ["--zone=z", "--accelerator-type=v6e-16"]
HOSTS = """
import os, subprocess
command = [word.removeprefix("--command=") for word in sys.argv if word.startswith("--command=")]
worker = [word.removeprefix("--worker=") for word in sys.argv if word.startswith("--worker=")]
for host in ("0", "1") if command and worker == ["all"] else worker * bool(command):
    home = os.path.join({folder!r}, host)
    os.makedirs(home + "/jaxmem", exist_ok=True)
    code = subprocess.run(["bash", "-c", command[0]], cwd=home, env=os.environ | {{"HOME": home}}).returncode
    if code:
        sys.exit(code)
if "describe" in sys.argv:
    sys.exit({queued})
"""


@pytest.fixture
def stubs(tmp_path):
    stubs = Stubs(tmp_path / "bin")
    stubs.environment |= {"NAME": "pod", "ZONE": "z", "TYPE": "v6e-16", "VERSION": "v"}
    stubs.add("gcloud", HOSTS.format(folder=str(tmp_path), queued=1))
    return stubs


def tpu(stubs, *words, code=0):
    ended = subprocess.run(
        ["bash", str(SCRIPT), *words], env=stubs.environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == code, ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [*TPU, "create", "pod", *SIZE, "--version=v"]),
        (["spot"], [*TPU, "create", "pod", *SIZE, "--version=v", "--spot"]),
        (["queued"], [*QUEUE, "create", "pod", "--node-id=pod", *SIZE, "--runtime-version=v"]),
        (["queued", "--spot"], [*QUEUE, "create", "pod", "--node-id=pod", *SIZE, "--runtime-version=v", "--spot"]),
    ],
)
def test_create_rents_in_three_ways(stubs, words, expected):
    tpu(stubs, "create", *words)
    assert stubs.calls("gcloud") == [expected]


@pytest.mark.parametrize(
    ("queued", "last"),
    [
        (1, [*TPU, "delete", "pod", "--zone=z", "--quiet"]),
        (0, [*QUEUE, "delete", "pod", "--zone=z", "--force", "--quiet"]),
    ],
)
def test_delete_gives_back_what_was_rented(stubs, tmp_path, queued, last):
    stubs.add("gcloud", HOSTS.format(folder=str(tmp_path), queued=queued))
    tpu(stubs, "delete")
    assert stubs.calls("gcloud")[-1] == last


def test_install_copies_tracked_files_to_all_hosts_and_installs_the_tpu_extra(stubs, tmp_path):
    listing = tmp_path / "listing"
    stubs.add("gcloud", f"import os\nif 'scp' in sys.argv: os.system(f'tar -tzf {{sys.argv[5]}} > {listing}')\n")
    tpu(stubs, "install")
    copy, install = stubs.calls("gcloud")
    assert copy[:3] == TPU and copy[3] == "scp" and copy[5:] == ["pod:", "--zone=z", "--worker=all"]
    names = listing.read_text().split()
    assert {"setup.py", "jaxmem/__init__.py", "configs/pvm_qwen3vl.py"} <= set(names)
    assert not any(name.startswith((".git/", ".venv")) for name in names)
    assert install[:4] == [*TPU, "ssh"] and "--worker=all" in install
    assert "pip install" in install[-1] and "'.[tpu]'" in install[-1]


def test_run_is_detached_keeps_the_words_whole_and_says_how_it_ended(stubs, tmp_path):
    tpu(stubs, "run", "bash", "-c", 'printf "%s|" "$@"; exit 3', "name", "a b", "it's", '$HOME "x"')
    assert ended(stubs) == {"ended with exit code 3"}
    for host in "01":
        assert (tmp_path / host / "jaxmem" / "run.log").read_text() == 'a b|it\'s|$HOME "x"|'


def test_stop_tells_the_command_which_saves_and_ends_with_75(stubs, tmp_path):
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('up', flush=True)"
    tpu(stubs, "run", "python3", "-c", f"{code}; time.sleep(100)")
    wait_until(lambda: all((tmp_path / host / "jaxmem/run.log").read_text() == "up\n" for host in "01"))
    assert tpu(stubs, "status").count("running") == 2
    assert "already running" in tpu(stubs, "run", "true", code=1)
    tpu(stubs, "stop")
    assert ended(stubs) == {"ended with exit code 75"}
    tpu(stubs, "run", "true")  # and can be started again
    assert ended(stubs) == {"ended with exit code 0"}


def test_logs_follow_one_host(stubs):
    stubs.add("gcloud")
    tpu(stubs, "logs", "3")
    tpu(stubs, "logs")
    three, zero = stubs.calls("gcloud")
    assert "--worker=3" in three and "--worker=0" in zero
    assert three[-1] == "--command=tail -n 100 -F jaxmem/run.log"


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ("gs://bucket", "gcsfuse --implicit-dirs bucket /mnt/shared"),
        ("10.0.0.2:/a", "mount -t nfs 10.0.0.2:/a /mnt/shared"),
    ],
)
def test_mount_takes_a_bucket_or_a_file_server(stubs, share, expected):
    stubs.add("gcloud")
    stubs.environment["SHARE"] = share
    tpu(stubs, "mount")
    assert expected in stubs.calls("gcloud")[0][-1]
    script = stubs.calls("gcloud")[0][-1].removeprefix("--command=")
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


@pytest.mark.parametrize("words", [[], ["destroy"], ["create", "free"], ["run"]])
def test_wrong_words_print_the_usage(stubs, words):
    text = tpu(stubs, *words, code=2)
    assert set(re.findall(r"tpu_vm.sh (\w+)", text)) == {
        "create", "install", "mount", "run", "logs", "status", "stop", "delete",
    }  # fmt: skip
    assert stubs.calls("gcloud") == []


def ended(stubs):
    """How the command ended, once it has on both hosts."""
    text = ""

    def both():
        nonlocal text
        text = tpu(stubs, "status")
        return text.count("ended") == 2

    wait_until(both)
    return set(re.findall(r"ended with exit code \d+", text))


def wait_until(condition, limit=30.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
