"""The manifests as kustomize renders them: valid by KubeRay's own schemas, and safe by rules that bite."""

import copy
import dataclasses
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pytest
import yaml

from medscale.jobfile import load_job

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").glob("[!.]*"))
Document = dict[str, Any]


def rendered(overlay: str) -> list[Document]:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl, whose kustomize renders the manifests")
    path = ROOT / "k8s" / "overlays" / overlay
    done = subprocess.run(["kubectl", "kustomize", path], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def of_kind(documents: list[Document], kind: str) -> Document:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def cluster_of(documents: list[Document]) -> Document:
    cluster: Document = of_kind(documents, "RayJob")["spec"]["rayClusterSpec"]
    return cluster


def pods(documents: list[Document]) -> Iterator[Document]:
    """Yield the spec of every kind of pod: head, workers, and the one that submits."""
    cluster = cluster_of(documents)
    yield cluster["headGroupSpec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in cluster["workerGroupSpecs"])
    yield of_kind(documents, "RayJob")["spec"]["submitterPodTemplate"]["spec"]


def containers(documents: list[Document]) -> Iterator[Document]:
    for pod in pods(documents):
        yield from pod["containers"] + pod.get("initContainers", [])


def _pinned(image: str) -> bool:
    name, _, tag = image.rpartition(":")
    return "@sha256:" in image or bool(name and tag and "/" not in tag and tag != "latest")


#: what must hold of rendered manifests, and a change that breaks it
RULES: dict[str, tuple[Callable[[list[Document]], bool], Callable[[list[Document]], None]]] = {
    "pods run as a user who is not root": (
        lambda d: all(p["securityContext"]["runAsNonRoot"] and p["securityContext"]["runAsUser"] > 0 for p in pods(d)),
        lambda d: next(pods(d))["securityContext"].update(runAsUser=0),
    ),
    "root file systems are read-only": (
        lambda d: all(c["securityContext"]["readOnlyRootFilesystem"] for c in containers(d)),
        lambda d: next(containers(d))["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    "no capability is kept": (
        lambda d: all(c["securityContext"]["capabilities"] == {"drop": ["ALL"]} for c in containers(d)),
        lambda d: next(containers(d))["securityContext"].update(capabilities={"drop": ["ALL"], "add": ["SYS_PTRACE"]}),
    ),
    "no privilege is gained": (
        lambda d: not any(
            c["securityContext"]["allowPrivilegeEscalation"] or c["securityContext"].get("privileged")
            for c in containers(d)
        ),
        lambda d: next(containers(d))["securityContext"].update(privileged=True),
    ),
    "system calls are filtered": (
        lambda d: all(p["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"} for p in pods(d)),
        lambda d: next(pods(d))["securityContext"].update(seccompProfile={"type": "Unconfined"}),
    ),
    "no pod holds a token of the Kubernetes API": (
        lambda d: of_kind(d, "ServiceAccount")["automountServiceAccountToken"] is False
        and all(p["automountServiceAccountToken"] is False for p in pods(d)),
        lambda d: next(pods(d)).update(automountServiceAccountToken=True),
    ),
    "every container has limits": (
        lambda d: all({"cpu", "memory"} <= c["resources"]["limits"].keys() for c in containers(d)),
        lambda d: next(containers(d))["resources"]["limits"].pop("memory"),
    ),
    "nothing of the host is shared": (
        lambda d: not any(
            p.get(key) for p in pods(d) for key in ("hostNetwork", "hostPID", "hostIPC")
        ) and not any("hostPath" in v for p in pods(d) for v in p.get("volumes", [])),
        lambda d: next(pods(d))["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    ),
    "images are pinned": (
        lambda d: all(_pinned(c["image"]) for c in containers(d)),
        lambda d: next(containers(d)).update(image="medscale:latest"),
    ),
    "Ray asks for a token": (
        lambda d: cluster_of(d)["authOptions"]["mode"] == "token",
        lambda d: cluster_of(d)["authOptions"].update(mode="disabled"),
    ),
    "all traffic is denied but what is named": (
        lambda d: cluster_of(d)["networkPolicy"]["mode"] == "DenyAll"
        and of_kind(d, "NetworkPolicy")["spec"]["policyTypes"] == ["Ingress", "Egress"]
        and all("from" in rule for rule in of_kind(d, "NetworkPolicy")["spec"]["ingress"]),
        lambda d: of_kind(d, "NetworkPolicy")["spec"]["ingress"].append({}),
    ),
    "no port is opened to the outside": (
        lambda d: cluster_of(d)["headGroupSpec"]["serviceType"] == "ClusterIP"
        and not cluster_of(d)["headGroupSpec"].get("enableIngress")
        and not any(x["kind"] in ("Ingress", "Service") for x in d),
        lambda d: cluster_of(d)["headGroupSpec"].update(serviceType="LoadBalancer"),
    ),
    "a lost cluster is tried again": (
        lambda d: of_kind(d, "RayJob")["spec"]["backoffLimit"] >= 2,
        lambda d: of_kind(d, "RayJob")["spec"].update(backoffLimit=0),
    ),
    "pods have time to save": (
        lambda d: all(p["terminationGracePeriodSeconds"] >= 30 for p in pods(d)),
        lambda d: next(pods(d)).update(terminationGracePeriodSeconds=5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rule_holds_and_its_breach_is_seen(overlay: str, rule: str) -> None:
    holds, breach = RULES[rule]
    documents = rendered(overlay)
    assert holds(documents), rule
    broken = copy.deepcopy(documents)
    breach(broken)
    assert not holds(broken), f"a breach of {rule!r} goes unseen"


@pytest.fixture(scope="module")
def rayjob_schema(data_dir: Path) -> Document:
    """KubeRay's schema of a RayJob, closed: a misspelt key is a mistake here, where the cluster would drop it."""
    with pa.input_stream(str(data_dir / "kuberay_crds" / "ray.io_rayjobs.yaml.zst")) as stream:
        definition = yaml.safe_load(stream.read())
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema: Document = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {}
    _close(schema)
    return schema


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for part in schema:
            _close(part)
    elif isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            _close(part)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rayjobs_are_valid_by_kuberays_schema(overlay: str, rayjob_schema: Document) -> None:
    job = of_kind(rendered(overlay), "RayJob")
    jsonschema.validate(job, rayjob_schema)
    misspelt = copy.deepcopy(job)
    misspelt["spec"]["rayClusterSpec"]["headGroupSpec"]["templates"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(misspelt, rayjob_schema)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_job_is_a_shipped_one_but_for_its_machines_and_fits_the_cluster(overlay: str) -> None:
    documents = rendered(overlay)
    job = load_job(ROOT / "k8s" / "overlays" / overlay / "job.yaml")
    shipped = load_job(ROOT / "jobs" / f"{job.name}.yaml")
    # how many tables the columns are cut into goes with the number of machines
    model = dataclasses.replace(shipped.model, block_units=job.model.block_units)
    assert job == dataclasses.replace(shipped, model=model, runtime=job.runtime)
    (group,) = cluster_of(documents)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    per_pod = int(limits["nvidia.com/gpu"] if job.runtime.device == "cuda" else limits["cpu"])
    assert group["replicas"] * per_pod == job.runtime.workers, "a worker per GPU, or per CPU"
    if job.runtime.device == "cuda":
        spec = group["template"]["spec"]
        assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]


def test_pods_mount_the_generated_job_and_the_shared_storage() -> None:
    documents = rendered("cpu-smoke")
    name = of_kind(documents, "ConfigMap")["metadata"]["name"]
    for pod in list(pods(documents))[:2]:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["job"]["configMap"]["name"] == name
        assert volumes["storage"]["persistentVolumeClaim"]["claimName"] == "medscale"
    entrypoint = of_kind(documents, "RayJob")["spec"]["entrypoint"]
    assert entrypoint.startswith("python -m medscale.train /job/job.yaml")


def test_whichever_pod_comes_first_decides_on_the_node_of_a_volume_that_one_node_mounts() -> None:
    documents = rendered("cpu-smoke")
    cluster = cluster_of(documents)
    for template in (cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]):
        (term,) = template["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        chosen = term["labelSelector"]["matchLabels"]
        assert chosen.items() <= template["metadata"]["labels"].items(), "a pod may be the first"
    submitter = of_kind(documents, "RayJob")["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert not chosen.items() <= submitter.items(), "the pod that submits mounts nothing, and may be anywhere"


@pytest.fixture
def with_object_store() -> Iterator[list[Document]]:
    """The smallest overlay, with the component added."""
    with tempfile.TemporaryDirectory(dir=ROOT / "k8s" / "overlays", prefix=".") as folder:
        shutil.copytree(ROOT / "k8s" / "overlays" / "cpu-smoke", folder, dirs_exist_ok=True)
        path = Path(folder) / "kustomization.yaml"
        path.write_text(path.read_text() + "components: [../../components/object-store]\n")
        yield rendered(Path(folder).name)


def test_graphs_in_an_object_store_are_reached_with_credentials_of_a_secret(
    with_object_store: list[Document], rayjob_schema: Document
) -> None:
    job = of_kind(with_object_store, "RayJob")
    jsonschema.validate(job, rayjob_schema)
    assert "--graphs-dir s3://" in job["spec"]["entrypoint"]
    for pod in list(pods(with_object_store))[:2]:
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "medscale-object-store"}}]
    egress = of_kind(with_object_store, "NetworkPolicy")["spec"]["egress"]
    assert [rule["ports"] for rule in egress if "0.0.0.0/0" in str(rule)] == [[{"port": 443, "protocol": "TCP"}]]
    for rule, (holds, _) in RULES.items():
        assert holds(with_object_store), rule


def test_the_pod_that_copies_files_is_as_safe_as_the_others() -> None:
    pod = yaml.safe_load((ROOT / "k8s" / "volume.yaml").read_text())["spec"]
    worker = next(pods(rendered("cpu-smoke")))
    for key in ("securityContext", "automountServiceAccountToken", "enableServiceLinks"):
        assert pod[key] == worker[key], key
    (container,) = pod["containers"]
    assert container["securityContext"] == worker["containers"][0]["securityContext"]
    assert _pinned(container["image"])
    assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
    assert pod["volumes"] == [volume for volume in worker["volumes"] if volume["name"] == "storage"]
