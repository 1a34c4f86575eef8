"""The files under `cluster/`: that they load, fit what reads them, and agree with each other and with the command line.

Nothing is started here: no cluster, no container. What Kubernetes itself would say is held by schemas of the fields
that are documented (`kubernetes_schema.py`), and by the CRDs of a KubeRay release in the folder that CXR_KUBERAY_CRDS
names. The manifests are those that Kustomize builds, without an overlay unless a test says so.
"""

import contextlib
import copy
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cxr_dist.cli.main import build_parser
from tests import kubernetes_schema, kustomize
from tests.documentation import project_commands, shell_lines, simple_commands
from tfrecords_builder.common.errors import UserError

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
PAGES = [ROOT / "docs" / name for name in ("cluster.md", "cloud.md")]
"""What says how to use the files."""
KUBERAY = CLUSTER / "kuberay"
FOLDERS = sorted(
    path.parent.name for path in KUBERAY.glob("*/*.yaml") if "kind: Kustomization" in path.read_text(encoding="utf-8")
)
"""What is applied by `kubectl apply -k`."""
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
VARIANTS = {"none": [], **{name: [name] for name in OVERLAYS}, "all": OVERLAYS}
"""Names of overlays, by the name of their combination."""
MANIFESTS = sorted(path for path in KUBERAY.glob("*/*.yaml") if path.name != "kustomization.yaml")
TEXTS = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
LAUNCHER = ["ray-aws.yaml", "ray-onprem.yaml"]

# What the trainer exports through ray.util.metrics, with the prefix that Ray gives it.
PROJECT_METRICS = {
    "ray_cxr_dist_images_per_second",
    "ray_cxr_dist_step_seconds",
    "ray_cxr_dist_loss",
    "ray_cxr_dist_validation_accuracy",
    "ray_cxr_dist_input_wait_share",
    "ray_cxr_dist_trials",
}
# Commands that the files may name before the command line knows them. Known ones are parsed.
EXPECTED_COMMANDS = {"tune", "submit", "dashboards"}


@functools.cache
def _documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@functools.cache
def _built(folder: str, variant: str) -> list[dict[str, Any]]:
    return kustomize.build(KUBERAY / folder, {KUBERAY / "site": [f"../overlays/{name}" for name in VARIANTS[variant]]})


def _objects(variant: str = "none") -> list[tuple[str, dict[str, Any]]]:
    """Every object with its folder. The search's job is there twice: by itself, and in a queue."""
    return [(folder, document) for folder in FOLDERS for document in _built(folder, variant)]


def _of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for _, document in _objects() if document["kind"] == kind]


def _jobs(variant: str = "none") -> list[tuple[str, dict[str, Any]]]:
    """Folder and spec of every Ray job, that of the nightly one included."""
    specs = {"RayJob": lambda spec: spec, "RayCronJob": lambda spec: spec["jobTemplate"]}
    return [
        (folder, specs[document["kind"]](document["spec"]))
        for folder, document in _objects(variant)
        if document["kind"] in specs
    ]


def _ray_clusters(variant: str = "none") -> list[tuple[str, dict[str, Any]]]:
    """Folder and spec of every Ray cluster, those inside jobs included."""
    standing = [
        (folder, document["spec"]) for folder, document in _objects(variant) if document["kind"] == "RayCluster"
    ]
    return standing + [(folder, spec["rayClusterSpec"]) for folder, spec in _jobs(variant)]


def _pod_templates(variant: str = "none") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that the manifests make, as name, `metadata` and `spec`."""
    for name, cluster in _ray_clusters(variant):
        yield f"{name}/head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{name}/{group['groupName']}", group["template"]
    for name, job in _jobs(variant):
        yield f"{name}/submitter", job["submitterPodTemplate"]
    for name, document in _objects(variant):
        if document["kind"] == "Pod":
            yield f"{name}/{document['metadata']['name']}", document


@functools.cache
def _pages() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in PAGES)


def _all_project_commands() -> list[tuple[str, list[str]]]:
    """Where it stands, and its arguments."""
    named = [("docs", line) for line in shell_lines(_pages())]
    named += [(f"{name}, {variant}", job["entrypoint"]) for variant in VARIANTS for name, job in _jobs(variant)]
    for path in LAUNCHER:
        config = _documents(CLUSTER / path)[0]
        named += [(path, line) for key in config if key.endswith("_commands") for line in config[key]]
    return [(name, arguments) for name, line in named for arguments in project_commands(line)]


def _quantity(value: str | int) -> Fraction:
    """A Kubernetes quantity: 500m, 8, 32Gi."""
    match = re.fullmatch(r"(\d+)(m|Ki|Mi|Gi|Ti)?", str(value))
    assert match, f"not a quantity: {value}"
    unit = {None: Fraction(1), "m": Fraction(1, 1000), "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[match[2]]
    return int(match[1]) * Fraction(unit)


# Loading.


@pytest.mark.parametrize(
    "path", [path for path in TEXTS if path.suffix in {".yaml", ".yml"}], ids=lambda path: path.name
)
def test_yaml_loads_safely_and_names_no_key_twice(path: Path) -> None:
    class Strict(yaml.SafeLoader):
        """PyYAML takes the last of two equal keys without a word."""

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{path.name}: a key twice in {keys}"
        loader.flatten_mapping(node)
        return loader.construct_mapping(node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    documents = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=Strict))
    assert documents
    assert all(isinstance(document, dict) for document in documents)


def test_files_name_no_package_index_and_no_secret() -> None:
    for path in [*TEXTS, ROOT / ".dockerignore"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"index-url|pypi\.|find-links|trusted-host", text), path.name
        # A token has 32 characters at least; names and digests of these files are words.
        assert not re.search(r"(?<![\w/-])[0-9a-f]{32,}(?![\w-])", text), path.name


def test_every_placeholder_is_explained() -> None:
    files = {name for path in TEXTS for name in re.findall(r"REPLACE_[A-Z0-9_]+", path.read_text())}
    table = {
        name
        for line in _pages().splitlines()
        if line.startswith("|")
        for name in re.findall(r"REPLACE_[A-Z0-9_]+", line)
    }
    assert files
    assert files == table


def test_the_pages_name_the_files_that_there_are() -> None:
    text = _pages()
    for name in re.findall(r"\bcluster/[\w./-]+\w", text):
        assert (ROOT / name).exists(), name
    folders = [*FOLDERS, "site", *(f"overlays/{name}" for name in OVERLAYS)]
    for name in [*(f"kuberay/{folder}" for folder in folders), *LAUNCHER]:
        assert f"`{name}`" in text, f"{name} is not mentioned"
    assert set(MANIFESTS) == {
        KUBERAY / folder / name
        for folder in FOLDERS
        for name in kustomize.load(KUBERAY / folder)["resources"]
        if name.endswith(".yaml")
    }


# Ray's own files.


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_accepts_the_launcher_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(_documents(CLUSTER / name)[0])
    validate_config(config)
    # Where a file says nothing, Ray's defaults install a Ray of their own choice.
    commands = [line for key in config if key.endswith("_commands") for line in config[key]]
    assert not [line for line in commands if "pip install" in line]


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launcher_starts_ray_with_a_token_and_a_closed_dashboard(name: str) -> None:
    config = _documents(CLUSTER / name)[0]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = config[key][-1]
        environment = start + " ".join(config.get("docker", {}).get("run_options", []))
        assert "RAY_AUTH_MODE=token" in environment
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    # The token's path inside is the one that it is copied to, or the one where Ray looks by itself.
    (remote,) = config["file_mounts"]
    found = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", " ".join(config.get("docker", {}).get("run_options", [])))
    assert found[1].startswith(f"{remote}/") if found else remote == "~/.ray/auth_token"


def test_the_launcher_rents_gpus_only_while_they_are_needed() -> None:
    config = _documents(CLUSTER / "ray-aws.yaml")[0]
    types = config["available_node_types"]
    workers = [value for name, value in types.items() if name != config["head_node_type"]]
    assert all(worker["min_workers"] == 0 for worker in workers)
    assert all(worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for worker in workers)
    assert "InstanceMarketOptions" not in types[config["head_node_type"]]["node_config"]
    assert 0 < config["idle_timeout_minutes"] <= 60
    assert any("nfs4" in line and line.endswith(" /shared") for line in config["initialization_commands"])
    assert "--volume=/shared:/shared" in config["docker"]["run_options"]


def _ray_commands() -> list[tuple[str, list[str]]]:
    """`ray ...` of the launcher files and of the pages' blocks."""
    lines = [("docs", line) for line in shell_lines(_pages())]
    for path in LAUNCHER:
        config = _documents(CLUSTER / path)[0]
        lines += [(path, line) for key in config if key.endswith("_commands") for line in config[key]]
    commands = [(name, words) for name, line in lines for words in simple_commands(line)]
    return [(name, words[1:]) for name, words in commands if Path(words[0]).name == "ray"]


def test_ray_knows_the_commands_and_options() -> None:
    import click
    from ray.scripts.scripts import cli

    commands = _ray_commands()
    assert {arguments[0] for _, arguments in commands} >= {"start", "stop", "up", "down", "exec", "job"}
    for name, arguments in commands:
        command: Any = cli
        rest, place = arguments, f"{name}: ray {shlex.join(arguments)}"
        while isinstance(command, click.Group):
            chosen = command.commands.get(rest[0])
            assert chosen is not None, f"{place}: no command {rest[0]}"
            command, rest = chosen, rest[1:]
        try:
            command.make_parser(click.Context(command)).parse_args(list(rest))
        except click.UsageError as error:
            pytest.fail(f"{place}: {error.format_message()}")


def test_the_runtime_environment_holds_variables_alone() -> None:
    from ray.runtime_env import RuntimeEnv

    content = _documents(CLUSTER / "runtime-env.yaml")[0]
    assert set(content) <= {"env_vars", "config"}  # no working_dir, no packages
    RuntimeEnv(**content)
    assert not [name for name in content["env_vars"] if re.search("TOKEN|SECRET|PASSWORD|KEY|AUTH", name)]


# Kubernetes.


def _refusals(schema: dict[str, Any], document: dict[str, Any]) -> list[str]:
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in jsonschema.Draft202012Validator(schema).iter_errors(document)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_manifest_has_documented_fields_only(folder: str, variant: str) -> None:
    for document in _built(folder, variant):
        schema = kubernetes_schema.SCHEMAS[document["apiVersion"], document["kind"]]
        assert not _refusals(schema, document), document["metadata"]["name"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["ttlSecondsAfterFinish"], 600),
        (["preRunningDeadlineSeconds"], 0),
        (["deletionStrategy", "deletionRules"], []),
        (["deletionStrategy", "deletionRules", 0, "condition", "jobDeploymentStatus"], "Failed"),
        (["deletionStrategy", "deletionRules", 0, "condition", "jobStatus"], "STOPPED"),
        (["rayClusterSpec", "gcsFaultToleranceOptions"], {"backend": "rocksdb", "claimName": "gcs"}),
        (["rayClusterSpec", "tlsOptions"], {"mode": "mTLS"}),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, list) and value else "",
)
def test_the_schemas_refuse_what_is_wrong(path: list[str | int], value: object) -> None:
    schema = kubernetes_schema.SCHEMAS["ray.io/v1", "RayJob"]
    job = copy.deepcopy(_built("search", "none")[0])
    assert not _refusals(schema, job)
    node = job["spec"]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    assert _refusals(schema, job)


def test_the_schema_of_a_crd_refuses_fields_without_a_name() -> None:
    spec = {"properties": {"size": {"x-kubernetes-int-or-string": True}, "labels": {"additionalProperties": {}}}}
    spec["properties"]["rules"] = {"items": {"properties": {"policy": {"enum": ["DeleteSelf"]}}}}
    schema = {"properties": {"metadata": {"type": "object"}, "spec": spec}}
    crd = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}}
    strict = kubernetes_schema.schema_of_crd(crd)
    good = {"metadata": {"name": "a"}, "spec": {"size": "1Gi", "labels": {"a": 1}, "rules": [{"policy": "DeleteSelf"}]}}
    assert not _refusals(strict, good)
    for wrong in ({"sizes": 1}, {"size": True}, {"rules": [{"policies": 1}]}, {"rules": [{"policy": "DeleteAll"}]}):
        assert _refusals(strict, {"spec": wrong})


@pytest.mark.skipif("CXR_KUBERAY_CRDS" not in os.environ, reason="CXR_KUBERAY_CRDS names no folder of CRDs")
@pytest.mark.parametrize("variant", VARIANTS)
def test_manifest_fits_the_crds_of_the_release(variant: str) -> None:
    crds = [crd for path in Path(os.environ["CXR_KUBERAY_CRDS"]).glob("*.yaml") for crd in _documents(path)]
    schemas = {crd["spec"]["names"]["kind"]: kubernetes_schema.schema_of_crd(crd) for crd in crds}
    documents = [document for _, document in _objects(variant) if document["apiVersion"] == "ray.io/v1"]
    assert {document["kind"] for document in documents} <= set(schemas)
    for document in documents:
        assert not _refusals(schemas[document["kind"]], document), document["metadata"]["name"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
@pytest.mark.parametrize("variant", VARIANTS)
def test_kubectl_builds_the_same_objects(tmp_path: Path, variant: str) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    site = tmp_path / "kuberay" / "site" / "kustomization.yaml"
    overlays = ", ".join(f"../overlays/{name}" for name in VARIANTS[variant])
    site.write_text(site.read_text(encoding="utf-8").replace("components: []", f"components: [{overlays}]"), "utf-8")
    for folder in FOLDERS:
        command = ["kubectl", "kustomize", str(tmp_path / "kuberay" / folder)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        expected = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text)}
        assert {(each["kind"], each["metadata"]["name"]): each for each in _built(folder, variant)} == expected


def test_the_builder_refuses_what_it_does_not_build(tmp_path: Path) -> None:
    path = tmp_path / "kustomization.yaml"
    path.write_text("namePrefix: a-\n", encoding="utf-8")
    with pytest.raises(ValueError, match="namePrefix"):
        kustomize.build(tmp_path)


def test_objects_lie_in_the_namespace_that_there_is() -> None:
    (namespace,) = [document["metadata"]["name"] for document in _of_kind("Namespace")]
    without = {"Namespace", "ResourceFlavor", "ClusterQueue"}  # they belong to the whole cluster
    for name, document in _objects():
        if document["kind"] in without:
            assert "namespace" not in document["metadata"], name
        else:
            assert document["metadata"]["namespace"] == namespace, name
    for folder in FOLDERS:
        names = [(document["kind"], document["metadata"]["name"]) for document in _built(folder, "none")]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "template"),
    [*_pod_templates("none"), *_pod_templates("all")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pod_is_not_root_and_asks_for_what_it_may_use(name: str, template: dict[str, Any]) -> None:
    spec = template["spec"]
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == int(re.search(r"^ARG UID=(\d+)", _dockerfile(), flags=re.MULTILINE)[1])
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= set(resources["requests"])
        assert all(_quantity(value) > 0 for value in resources["requests"].values())
        tag = container["image"].rpartition(":")[2]
        assert re.fullmatch(r"\d+\.\d+\.\d+-(cpu|gpu)", tag), container["image"]
        assert container["image"].startswith("registry.example.org/")  # as `site` says


@pytest.mark.parametrize(
    ("name", "template"), list(_pod_templates()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_volumes_and_accounts_of_a_pod_are_there(name: str, template: dict[str, Any]) -> None:
    claims = {document["metadata"]["name"] for document in _of_kind("PersistentVolumeClaim")}
    accounts = {document["metadata"]["name"] for document in _of_kind("ServiceAccount")}
    spec = template["spec"]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    mounted = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", [])}
    assert mounted == set(volumes)
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in claims
    if "serviceAccountName" in spec:
        assert spec["serviceAccountName"] in accounts
    if not name.endswith("/submitter"):
        mounts = {mount["mountPath"] for container in spec["containers"] for mount in container["volumeMounts"]}
        assert "/shared" in mounts


def test_the_shared_volume_is_for_many_nodes() -> None:
    for claim in _of_kind("PersistentVolumeClaim"):
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_selectors_find_the_pods() -> None:
    labels = [template["metadata"]["labels"] for _, template in _pod_templates()]
    (namespace,) = [document["metadata"]["name"] for document in _of_kind("Namespace")]
    (policy,) = _of_kind("NetworkPolicy")
    (monitor,) = _of_kind("PodMonitor")
    own = [rule["from"][0]["podSelector"] for rule in policy["spec"]["ingress"] if "podSelector" in rule["from"][0]]
    for selector in [policy["spec"]["podSelector"], monitor["spec"]["selector"], *own]:
        assert selector["matchLabels"]
        assert all(selector["matchLabels"].items() <= pod.items() for pod in labels)
    ports = {port["name"] for _, spec in _ray_pods() for port in spec["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
    numbers = {port["containerPort"] for _, spec in _ray_pods() for port in spec["containers"][0]["ports"]}
    opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
    assert opened <= numbers
    (queue,) = _of_kind("ClusterQueue")
    assert queue["spec"]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": namespace}


def _ray_pods() -> list[tuple[str, dict[str, Any]]]:
    heads_and_workers = {f"{name}/{part}" for name, _ in _ray_clusters() for part in ("head", "gpu")}
    return [(name, template["spec"]) for name, template in _pod_templates() if name in heads_and_workers]


def test_ray_clusters_ask_for_the_token_of_a_secret_that_is_made() -> None:
    made = re.findall(r"create secret generic (\S+)\s+--from-file=(\w+)=", " ".join(shell_lines(_pages())))
    clusters = _ray_clusters()
    assert len(clusters) >= 5
    for name, cluster in clusters:
        assert cluster["authOptions"]["mode"] == "token", name
        assert (cluster["authOptions"]["secretName"], "auth_token") in made, name
    assert not _of_kind("Secret")


def test_ray_clusters_are_of_the_version_that_is_installed() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    assert {cluster["rayVersion"] for _, cluster in _ray_clusters()} == {pinned}


def test_worker_groups_are_within_their_bounds() -> None:
    for name, cluster in _ray_clusters():
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"  # nothing is trained on a head
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], name
            if not cluster.get("enableInTreeAutoscaling"):
                assert group["minReplicas"] == group["maxReplicas"], f"{name}: nobody changes its size"
        assert "gcsFaultToleranceOptions" not in cluster


def test_overlays_change_what_they_are_for() -> None:
    for name, pod in _pod_templates("cpu"):
        assert "nvidia" not in json.dumps(pod), name
        assert all(container["image"].endswith("-cpu") for container in pod["spec"]["containers"])
    assert not [name for name, job in _jobs("cpu") if "entrypointNumGpus" in job]
    assert all(cluster["tlsOptions"] == {"enabled": True} for _, cluster in _ray_clusters("mtls"))
    options = {name: cluster.get("gcsFaultToleranceOptions") for name, cluster in _ray_clusters("rocksdb")}
    assert options.pop("cluster")["backend"] == "rocksdb"
    assert not any(options.values())
    assert not [name for name, cluster in _ray_clusters() if "tlsOptions" in cluster]


def test_the_pages_name_the_feature_gates_that_are_off_by_default() -> None:
    for gate in ("RayCronJob", "RayClusterMTLS", "GCSFaultToleranceEmbeddedStorage"):
        assert re.search(rf"`{gate}`.*alpha|alpha.*`{gate}`", _pages()), gate


def test_jobs_end_and_leave_no_cluster() -> None:
    jobs = _jobs()
    assert [name for name, _ in jobs] == ["evaluation", "nightly", "queue", "search"]
    for name, spec in jobs:
        assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"], name
        assert spec["backoffLimit"] in range(3)
        assert spec["submitterConfig"]["backoffLimit"] in range(1, 4)
        assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] in {"Never", "OnFailure"}
        assert "RAY_AUTH_TOKEN" not in json.dumps(spec)
        # KubeRay refuses a time to live without the first, and deletion rules beside either.
        if name == "queue":
            assert spec["shutdownAfterJobFinishes"] is True
            assert spec["ttlSecondsAfterFinished"] > 0
            assert "deletionStrategy" not in spec
        else:
            assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & set(spec)
            _check_deletion_rules(name, spec)
    for document in [*_of_kind("RayJob"), *_of_kind("RayCronJob")]:
        # KubeRay's rule for the name of a job, from which it makes longer ones.
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", document["metadata"]["name"])


def _check_deletion_rules(name: str, spec: dict[str, Any]) -> None:
    """What KubeRay's operator asks of them beyond the schema, and that the cluster goes after success and failure."""
    times: dict[str, dict[str, int]] = {}
    for rule in spec["deletionStrategy"]["deletionRules"]:
        (state,) = set(rule["condition"]) - {"ttlSeconds"}
        assert rule["policy"] not in times.setdefault(rule["condition"][state], {}), f"{name}: twice {rule}"
        times[rule["condition"][state]][rule["policy"]] = rule["condition"]["ttlSeconds"]
    # `Failed` is the state after every failure, so a rule on `FAILED` beside it would race with it.
    assert set(times) == {"SUCCEEDED", "Failed"}
    for policies in times.values():
        order = [policies[policy] for policy in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if policy in policies]
        assert order == sorted(order), name
        assert policies["DeleteCluster"] <= 3600
        if spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
            assert "DeleteWorkers" not in policies, f"{name}: not beside an autoscaler"
    if name == "nightly":  # nothing else removes the RayJobs that it makes
        assert all("DeleteSelf" in policies for policies in times.values())


def test_the_evaluation_runs_where_the_gpu_is() -> None:
    (job,) = [job for name, job in _jobs() if name == "evaluation"]
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    offered = container["resources"]["limits"]
    # It computes in its own process; `tune` and `train` ask Ray for workers.
    assert 0 < job["entrypointNumGpus"] <= int(offered["nvidia.com/gpu"])
    assert job["entrypointNumCpus"] <= int(offered["cpu"])


def test_the_queue_is_whole_and_has_room_for_the_job() -> None:
    (flavor,), (cluster_queue,), (local,) = (
        _of_kind(kind) for kind in ("ResourceFlavor", "ClusterQueue", "LocalQueue")
    )
    assert local["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    (group,) = cluster_queue["spec"]["resourceGroups"]
    (offered,) = group["flavors"]
    assert offered["name"] == flavor["metadata"]["name"]
    quota = {resource["name"]: _quantity(resource["nominalQuota"]) for resource in offered["resources"]}
    assert list(quota) == group["coveredResources"]

    queued = [job for job in _of_kind("RayJob") if job["spec"].get("suspend")]
    assert len(queued) == 1
    (job,) = queued
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert job["metadata"]["namespace"] == local["metadata"]["namespace"]
    cluster = job["spec"]["rayClusterSpec"]
    assert not cluster.get("enableInTreeAutoscaling")
    needed = dict.fromkeys(quota, Fraction(0))
    pods = [(1, cluster["headGroupSpec"]["template"]), (1, job["spec"]["submitterPodTemplate"])]
    pods += [(worker["replicas"], worker["template"]) for worker in cluster["workerGroupSpecs"]]
    for count, template in pods:
        for container in template["spec"]["containers"]:
            for resource, value in container["resources"]["requests"].items():
                needed[resource] += count * _quantity(value)
    assert all(needed[resource] <= quota[resource] for resource in quota), needed


# Commands.


def test_the_commands_of_this_project_parse() -> None:
    parser = build_parser()
    known = set(next(action for action in parser._actions if action.dest == "command").choices)
    commands = _all_project_commands()
    assert {arguments[0] for _, arguments in commands} >= {"build", "evaluate", "bench"} | EXPECTED_COMMANDS
    assert [name for name, _ in commands].count("docs") >= 12
    for name, arguments in commands:
        if arguments == ["--help"]:
            continue
        if arguments[0] not in known:
            assert arguments[0] in EXPECTED_COMMANDS, f"{name}: there is no command {arguments[0]}"
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                parser.parse_args(arguments)
        except UserError as error:
            pytest.fail(f"{name}: cxr-dist {shlex.join(arguments)}: {error}")


def test_commands_that_are_to_come_have_their_agreed_form() -> None:
    for name, arguments in _all_project_commands():
        if arguments[0] == "tune":
            assert {"--out", "--config"} <= set(arguments), name
            assert arguments[arguments.index("--config") + 1] in {"search", "search_cpu"}
        if arguments[0] == "submit":
            build_parser().parse_args(arguments[arguments.index("--") + 1 :])
            assert re.fullmatch(r"http://[\w.]+:8265", arguments[arguments.index("--address") + 1])


# The image.


def _dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text(encoding="utf-8")


def _instructions() -> list[tuple[str, str]]:
    text = "\n".join(line for line in _dockerfile().splitlines() if not line.startswith("#"))
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_is_pinned_and_not_roots() -> None:
    instructions = _instructions()
    base = dict(value.split("=", 1) for name, value in instructions if name == "ARG")["PYTHON_IMAGE"]
    python = re.fullmatch(r"python:3\.(\d+)\.\d+-slim-\w+", base)
    assert python
    assert 11 <= int(python[1]) <= 13
    assert "latest" not in " ".join(value for _, value in instructions)
    last_user = [value for name, value in instructions if name == "USER"][-1]
    assert last_user not in {"root", "0"}
    assert f" {last_user}\n" in _dockerfile().split("useradd", 1)[1]
    assert ("ENV", "HOME=/home/cxr") in instructions
    assert "ENTRYPOINT" not in {name for name, _ in instructions}
    assert all(
        "-c constraints.txt" in v or "--no-deps" in v for n, v in instructions if n == "RUN" and "pip install" in v
    )


def test_the_image_takes_what_there_is_and_no_data() -> None:
    copied = [source for name, value in _instructions() if name == "COPY" for source in value.split()[:-1]]
    ignored = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert ignored[0] == "*"
    assert allowed == set(copied)
    assert all((ROOT / source).exists() for source in copied)
    assert {"**/*.tfrecord*", "**/*.parquet", "**/*.h5", "**/*.keras"} <= set(ignored)
    packages = re.search(r"include = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
    assert {name.strip('"* ') for name in packages.split(",")} <= set(copied)


def test_the_image_has_the_extra_that_its_arguments_name() -> None:
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    for line in shell_lines(_pages()):
        for extra in re.findall(r"--build-arg EXTRA=(\w+)", line):
            assert re.search(rf"^{extra} = ", extras, flags=re.MULTILINE)
        arguments = set(re.findall(r"--build-arg (\w+)=", line))
        assert arguments <= {value.split("=")[0] for name, value in _instructions() if name == "ARG"}


# Monitoring.


def _dashboard() -> dict[str, Any]:
    return json.loads((CLUSTER / "grafana" / "dashboard.json").read_text(encoding="utf-8"))


def _expressions() -> list[str]:
    dashboard = _dashboard()
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return panels + [variable["query"]["query"] for variable in dashboard["templating"]["list"]]


def test_the_dashboard_shows_the_metrics_that_there_are() -> None:
    shown = {name for panel in _dashboard()["panels"] for t in panel.get("targets", []) for name in _metrics(t["expr"])}
    assert {name for name in shown if name.startswith("ray_cxr_dist_")} == PROJECT_METRICS
    # Those of the machines are Ray's own; it names them without its prefix.
    import ray

    agent = Path(ray.__file__).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    known = set(re.findall(r'Gauge\(\s*"(\w+)"', agent.read_text(encoding="utf-8")))
    others = {name for expression in _expressions() for name in _metrics(expression)} - PROJECT_METRICS
    assert {"ray_node_cpu_utilization", "ray_node_mem_used", "ray_node_gpus_utilization"} <= others
    assert {name.removeprefix("ray_") for name in others} <= known


def _metrics(expression: str) -> list[str]:
    return re.findall(r"\bray_\w+", expression)


def test_the_dashboard_filters_by_labels_and_variables_that_there_are() -> None:
    dashboard = _dashboard()
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert {"run", "experiment"} <= variables
    for expression in _expressions():
        assert set(re.findall(r"\$(\w+)", expression)) <= variables
        for name, labels in re.findall(r"(ray_cxr_dist_\w+)\{([^}]*)\}", expression):
            tags = {"experiment", "state"} if name == "ray_cxr_dist_trials" else {"run", "stage"}
            assert set(re.findall(r"(\w+)=~", labels)) <= tags, expression


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    panels = _dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_grafana_finds_the_source_and_the_dashboard() -> None:
    provisioning = CLUSTER / "grafana" / "provisioning"
    (source,) = _documents(provisioning / "datasources" / "prometheus.yaml")[0]["datasources"]
    (provider,) = _documents(provisioning / "dashboards" / "cxr-dist.yaml")[0]["providers"]
    named = {panel["datasource"]["uid"] for panel in _dashboard()["panels"] if "datasource" in panel}
    named |= {variable["datasource"]["uid"] for variable in _dashboard()["templating"]["list"]}
    assert named == {source["uid"]}
    text = _pages()
    assert f"dashboard.json:{provider['options']['path']}/" in text
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in text


def test_prometheus_reads_the_file_that_ray_writes() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = _documents(CLUSTER / "prometheus.yml")[0]["scrape_configs"]
    (source,) = job["file_sd_configs"]
    assert source["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, which comes with Prometheus, is not here")
def test_prometheus_accepts_its_configuration() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", str(CLUSTER / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
