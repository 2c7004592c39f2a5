"""JobSets, SkyPilot and xpk: the fields that decide whether hosts meet, save and come back; and keys that exist."""

import re
import runpy
import shlex
import subprocess

import pytest
import yaml

from jaxmem.distributed import hosts
from tests.launch.stubs import LAUNCH, Stubs

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
JOBSETS = ["gke_jobset.yaml", "gke_gpu_jobset.yaml"]
CHIPS = {"gke_jobset.yaml": "google.com/tpu", "gke_gpu_jobset.yaml": "nvidia.com/gpu"}


def jobset(name):
    document = yaml.safe_load((LAUNCH / name).read_text())
    (replicated,) = document["spec"]["replicatedJobs"]
    return document, replicated, replicated["template"]["spec"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_every_script(script):
    ended = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_every_key_of_a_command_is_one_of_the_configuration(path):
    text = path.read_text()
    for name in set(re.findall(r"--config=(configs/\w+\.py)", text)):
        assert (LAUNCH.parent / name).exists()
    config = runpy.run_path(str(LAUNCH.parent / "configs/pvm_qwen3vl.py"))["get_config"]("8b")
    for key in set(re.findall(r"--config\.([a-z_.]+)=", text)):
        node = config
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobset_starts_every_host_once_and_all_again_together(name):
    document, replicated, job = jobset(name)
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert document["spec"]["network"]["enableDNSHostnames"] is True
    assert document["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert replicated["replicas"] == 1
    assert job["completions"] == job["parallelism"] > 1
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it


@pytest.mark.parametrize("name", JOBSETS)
def test_a_preempted_jobset_saves_and_comes_back_without_being_counted(name):
    document, _, job = jobset(name)
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    saved, taken = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert saved["action"] == taken["action"] == "FailJob"
    assert saved["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    assert container["command"][:2] == ["jaxmem", "train"]  # no shell in between keeps SIGTERM away from it


@pytest.mark.parametrize("name", JOBSETS)
def test_every_host_sees_the_output_folder_and_has_whole_chips(name):
    _, _, job = jobset(name)
    (container,) = job["template"]["spec"]["containers"]
    (output,) = [word.split("=")[1] for word in container["command"] if word.startswith("--config.output=")]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert output.startswith("/shared/") and mounts["/shared"] == "shared"
    assert set(mounts.values()) == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert int(container["resources"]["limits"][CHIPS[name]]) in (4, 8)


def test_the_tpu_slice_has_as_many_hosts_as_its_topology():
    _, _, job = jobset("gke_jobset.yaml")
    pod = job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] * int(pod["containers"][0]["resources"]["limits"]["google.com/tpu"]) == rows * columns
    assert "env" not in pod["containers"][0]  # GKE names the hosts


def test_gpu_nodes_are_told_how_to_find_one_another():
    document, replicated, job = jobset("gke_gpu_jobset.yaml")
    name, subdomain = document["metadata"]["name"], document["spec"]["network"]["subdomain"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    assert set(variables) == {hosts.COORDINATOR, hosts.COUNT, hosts.INDEX}
    port = container["ports"][0]["containerPort"]
    assert variables[hosts.COORDINATOR]["value"] == f"{name}-{replicated['name']}-0-0.{subdomain}:{port}"
    assert variables[hosts.COUNT]["value"] == str(job["completions"])
    assert "job-completion-index" in variables[hosts.INDEX]["valueFrom"]["fieldRef"]["fieldPath"]
    assert job["completionMode"] == "Indexed"


def test_skypilot_recovers_and_its_run_sets_the_variables(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["num_nodes"] > 1 and task["resources"]["use_spot"]
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert task["file_mounts"]["/shared"]["mode"] == "MOUNT"
    code = (
        "import os\nprint(*[os.environ[f'JAX_{n}'] for n in ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID')])\n"
    )
    stubs = Stubs(tmp_path / "venv")
    (tmp_path / "venv" / "bin").mkdir()
    stubs.add("bin/jaxmem", code)
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    ended = subprocess.run(
        ["bash", "-c", task["run"]],
        env=stubs.environment | nodes | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout == "10.0.0.7:8476 2 1\n", ended.stderr
    assert stubs.calls("bin/jaxmem")[0][:2] == ["train", "--config=configs/pvm_qwen3vl.py:8b"]
    assert subprocess.run(["bash", "-n", "-c", task["setup"]]).returncode == 0


def test_xpk_is_called_once_with_restarts_and_time_to_save(tmp_path):
    stubs = Stubs(tmp_path / "bin")
    stubs.add("xpk")
    words = ["jaxmem", "train", "--config.output=/shared/a b"]
    stubs.environment |= {"CLUSTER": "c", "TYPE": "v6e-16", "DRY": "--dry-run"}
    ended = subprocess.run(["bash", str(LAUNCH / "xpk.sh"), "pvm", *words], env=stubs.environment, timeout=60)
    assert ended.returncode == 0
    (call,) = stubs.calls("xpk")
    assert call[:3] == ["workload", "create", "--dry-run"]
    options = dict(word.removeprefix("--").split("=", 1) for word in call[3:])
    assert (options["cluster"], options["workload"], options["tpu-type"]) == ("c", "pvm", "v6e-16")
    assert options["restart-on-exit-codes"] == "75" and int(options["max-restarts"]) > 0
    assert int(options["termination-grace-period-seconds"]) >= 60
    assert shlex.split(options["command"]) == ["exec", *words]


def test_xpk_without_a_command_says_how():
    ended = subprocess.run(["bash", str(LAUNCH / "xpk.sh"), "pvm"], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("usage: bash launch/xpk.sh WORKLOAD COMMAND...")
