"""JSON schemas of the Kubernetes objects under `cluster/kuberay/`: the documented fields, and no others.

KubeRay's are all fields of `ray.io/v1` at its release 1.7.0 that are not deprecated, outside of pods: from its API
reference (`docs/reference/api.md` of the tag v1.7.0, commit 97509c3a7216cf3440af381646560a1885afb53b) and the Go types
that the CRDs are made from (`ray-operator/apis/ray/v1`), with their enumerations, minima and rules.

Of the others, only the fields are here that the manifests use, so that a new one is looked up before it is added:
Kueue's types of `kueue.x-k8s.io/v1beta2`, Kubernetes' reference for `v1` (pods too) and `networking.k8s.io/v1`, and the
Prometheus operator's for PodMonitor.

The CRDs of a release themselves are megabytes, and are not kept here: `schema_of_crd` reads them where they are given.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
ANY: Schema = {}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(m|Ki|Mi|Gi|Ti)?$"}
# A name that may be part of an address: RFC 1123.
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}


def _choice(*values: str) -> Schema:
    return {"enum": list(values)}


def _list(items: Schema, minimum: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": minimum}


def _fields(required: str = "", /, **properties: Schema) -> Schema:
    """An object of these fields alone."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


LABEL_SELECTOR = _fields("matchLabels", matchLabels=TEXTS)
RESOURCES = _fields(
    "requests limits",
    requests={"type": "object", "additionalProperties": QUANTITY},
    limits={"type": "object", "additionalProperties": QUANTITY},
)
CONTAINER_SECURITY = _fields(
    allowPrivilegeEscalation=FLAG,
    capabilities=_fields(drop=_list(TEXT), add=_list(TEXT)),
    readOnlyRootFilesystem=FLAG,
    runAsNonRoot=FLAG,
    runAsUser=COUNT,
)
CONTAINER = _fields(
    "name image resources securityContext",
    name=NAME,
    image=TEXT,
    command=_list(TEXT),
    args=_list(TEXT),
    env=_list(_fields("name", name=TEXT, value=TEXT, valueFrom=ANY)),
    # The name of a port has 15 characters at most.
    ports=_list(
        _fields(
            "containerPort",
            name={"type": "string", "pattern": "^[a-z0-9-]{1,15}$"},
            containerPort={"type": "integer", "minimum": 1, "maximum": 65535},
            protocol=_choice("TCP", "UDP"),
        )
    ),
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    volumeMounts=_list(_fields("name mountPath", name=NAME, mountPath=TEXT, subPath=TEXT, readOnly=FLAG)),
)
POD_SPEC = _fields(
    "containers securityContext",
    containers=_list(CONTAINER, 1),
    restartPolicy=_choice("Always", "OnFailure", "Never"),
    activeDeadlineSeconds=POSITIVE,
    automountServiceAccountToken=FLAG,
    serviceAccountName=NAME,
    nodeSelector=TEXTS,
    tolerations=_list(
        _fields(
            key=TEXT,
            operator=_choice("Exists", "Equal"),
            value=TEXT,
            effect=_choice("NoSchedule", "PreferNoSchedule", "NoExecute"),
        )
    ),
    securityContext=_fields(
        runAsNonRoot=FLAG,
        runAsUser=COUNT,
        runAsGroup=COUNT,
        fsGroup=COUNT,
        fsGroupChangePolicy=_choice("OnRootMismatch", "Always"),
        seccompProfile=_fields("type", type=_choice("RuntimeDefault", "Unconfined", "Localhost")),
    ),
    volumes=_list(
        _fields(
            "name",
            name=NAME,
            persistentVolumeClaim=_fields("claimName", claimName=NAME, readOnly=FLAG),
            emptyDir=_fields(medium=_choice("", "Memory"), sizeLimit=QUANTITY),
        )
    ),
)
POD_TEMPLATE = _fields("metadata spec", metadata=_fields(labels=TEXTS, annotations=TEXTS), spec=POD_SPEC)
METADATA = _fields("name", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)

# KubeRay. What is ANY here is Kubernetes' own and not used by the manifests.
MANAGED_BY = _choice("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
IMAGE_PULL_POLICY = _choice("Always", "IfNotPresent", "Never")
NETWORK_RULES = {"ingressRules": ANY, "egressRules": ANY}
GROUP = {"template": POD_TEMPLATE, "rayStartParams": TEXTS, "resources": TEXTS, "labels": TEXTS}
RAY_CLUSTER_SPEC = _fields(
    "headGroupSpec",
    upgradeStrategy=_fields(type=_choice("Recreate", "None")),
    authOptions=_fields(mode=_choice("token", "disabled"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    suspend=FLAG,
    managedBy=MANAGED_BY,
    autoscalerOptions=_fields(
        resources=RESOURCES,
        image=TEXT,
        imagePullPolicy=IMAGE_PULL_POLICY,
        securityContext=CONTAINER_SECURITY,
        idleTimeoutSeconds=COUNT,
        upscalingMode=_choice("Default", "Aggressive", "Conservative"),
        version=_choice("v1", "v2"),
        env=ANY,
        envFrom=ANY,
        volumeMounts=ANY,
        command=_list(TEXT),
        args=_list(TEXT),
    ),
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=_fields(
        backend=_choice("redis", "rocksdb"),
        redisUsername=_fields(value=TEXT, valueFrom=ANY),
        redisPassword=_fields(value=TEXT, valueFrom=ANY),
        externalStorageNamespace=TEXT,
        redisAddress=TEXT,
        storage=_fields(
            claimName=TEXT,
            size=QUANTITY,
            storageClassName=TEXT,
            accessModes=_list(TEXT),
            subPath=TEXT,
            deletionPolicy=_choice("DeleteWithCluster", "Retain"),
        ),
    ),
    historyServerOptions=_fields(
        collectorOptions=_fields(image=TEXT, imagePullPolicy=IMAGE_PULL_POLICY, resources=RESOURCES, env=ANY)
    ),
    networkPolicy=_fields(
        mode=_choice("DenyAll", "DenyAllIngress", "DenyAllEgress"),
        head=_fields(**NETWORK_RULES),
        worker=_fields(**NETWORK_RULES),
        workerGroups=_list(_fields("groupName", groupName=TEXT, **NETWORK_RULES)),
    ),
    tlsOptions=_fields(enabled=FLAG),
    headGroupSpec=_fields(
        "template",
        **GROUP,
        headService=ANY,
        enableIngress=FLAG,
        ingressOptions=_fields(
            host=TEXT, path=TEXT, pathType=_choice("Exact", "Prefix", "ImplementationSpecific"), tls=ANY
        ),
        serviceType=_choice("ClusterIP", "NodePort", "LoadBalancer"),
    ),
    rayVersion=TEXT,
    workerGroupSpecs=_list(
        _fields(
            "groupName minReplicas maxReplicas template",
            **GROUP,
            suspend=FLAG,
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            idleTimeoutSeconds=COUNT,
            priority={"type": "integer"},
            scaleStrategy=_fields(workersToDelete=_list(TEXT)),
            numOfHosts=POSITIVE,
        )
    ),
)
DELETION_POLICY = _choice("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")
DELETION_RULE = _fields(
    "policy condition",
    policy=DELETION_POLICY,
    condition={
        # One of the two states, and not both.
        "oneOf": [
            _fields("jobStatus", jobStatus=_choice("SUCCEEDED", "FAILED"), ttlSeconds=COUNT),
            _fields("jobDeploymentStatus", jobDeploymentStatus=_choice("Failed"), ttlSeconds=COUNT),
        ]
    },
)
RAY_JOB_SPEC = _fields(
    activeDeadlineSeconds=POSITIVE,
    backoffLimit=COUNT,
    rayClusterSpec=RAY_CLUSTER_SPEC,
    submitterPodTemplate=POD_TEMPLATE,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=_fields(backoffLimit=COUNT),
    managedBy=MANAGED_BY,
    # The older form, `onSuccess` and `onFailure`, is deprecated.
    deletionStrategy=_fields("deletionRules", deletionRules=_list(DELETION_RULE, 1)),
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=_choice("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=TEXT,
    entrypointNumCpus={"type": "number", "minimum": 0},
    entrypointNumGpus={"type": "number", "minimum": 0},
    ttlSecondsAfterFinished=COUNT,
    preRunningDeadlineSeconds=POSITIVE,
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)
RAY_CRON_JOB_SPEC = _fields(
    "jobTemplate schedule",
    jobTemplate=RAY_JOB_SPEC,
    schedule={"type": "string", "pattern": r"^\S+( \S+){4}$"},
    timeZone={"type": "string", "minLength": 1},
    suspend=FLAG,
)

# Kueue.
CLUSTER_QUEUE_SPEC = _fields(
    "namespaceSelector resourceGroups",
    cohortName=NAME,
    namespaceSelector=LABEL_SELECTOR,
    preemption=ANY,
    queueingStrategy=_choice("BestEffortFIFO", "StrictFIFO"),
    resourceGroups=_list(
        _fields(
            "coveredResources flavors",
            coveredResources=_list(TEXT, 1),
            flavors=_list(
                _fields(
                    "name resources",
                    name=NAME,
                    resources=_list(
                        _fields(
                            "name nominalQuota",
                            name=TEXT,
                            nominalQuota=QUANTITY,
                            borrowingLimit=QUANTITY,
                            lendingLimit=QUANTITY,
                        ),
                        1,
                    ),
                ),
                1,
            ),
        ),
        1,
    ),
    stopPolicy=_choice("None", "Hold", "HoldAndDrain"),
)

NETWORK_POLICY_SPEC = _fields(
    "podSelector policyTypes ingress",
    podSelector=LABEL_SELECTOR,
    policyTypes=_list(_choice("Ingress", "Egress"), 1),
    ingress=_list(
        _fields(
            "from",
            **{"from": _list(_fields(podSelector=LABEL_SELECTOR, namespaceSelector=LABEL_SELECTOR), 1)},
            ports=_list(_fields("protocol port", protocol=_choice("TCP", "UDP"), port=POSITIVE)),
        )
    ),
)
CLAIM_SPEC = _fields(
    "accessModes resources storageClassName",
    accessModes=_list(_choice("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"), 1),
    resources=_fields("requests", requests=_fields("storage", storage=QUANTITY)),
    storageClassName=TEXT,
)
POD_MONITOR_SPEC = _fields(
    "selector podMetricsEndpoints",
    selector=LABEL_SELECTOR,
    podMetricsEndpoints=_list(_fields("port", port=TEXT, interval=TEXT, path=TEXT, relabelings=ANY), 1),
)


def _object(api: str, kind: str, spec: Schema | None) -> Schema:
    fields = {"apiVersion": _choice(api), "kind": _choice(kind), "metadata": METADATA}
    if spec is None:
        return _fields("apiVersion kind metadata", **fields)
    return _fields("apiVersion kind metadata spec", **fields, spec=spec)


SCHEMAS: dict[tuple[str, str], Schema] = {
    (api, kind): _object(api, kind, spec)
    for api, kind, spec in [
        ("v1", "Namespace", None),
        ("v1", "PersistentVolumeClaim", CLAIM_SPEC),
        ("v1", "Pod", POD_SPEC),
        ("networking.k8s.io/v1", "NetworkPolicy", NETWORK_POLICY_SPEC),
        ("monitoring.coreos.com/v1", "PodMonitor", POD_MONITOR_SPEC),
        ("kueue.x-k8s.io/v1beta2", "ResourceFlavor", None),
        ("kueue.x-k8s.io/v1beta2", "ClusterQueue", CLUSTER_QUEUE_SPEC),
        ("kueue.x-k8s.io/v1beta2", "LocalQueue", _fields("clusterQueue", clusterQueue=NAME)),
        ("ray.io/v1", "RayCluster", RAY_CLUSTER_SPEC),
        ("ray.io/v1", "RayJob", RAY_JOB_SPEC),
        ("ray.io/v1", "RayCronJob", RAY_CRON_JOB_SPEC),
    ]
}
"""By apiVersion and kind."""


def schema_of_crd(crd: dict[str, Any], version: str = "v1") -> Schema:
    """The schema in a CustomResourceDefinition; it refuses unknown fields, as `kubectl apply` does."""
    (found,) = (entry for entry in crd["spec"]["versions"] if entry["name"] == version)
    return _strict(found["schema"]["openAPIV3Schema"])


def _strict(schema: Schema) -> Schema:
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = dict(schema)
    if "properties" in schema:
        strict["properties"] = {name: _strict(child) for name, child in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            strict[key] = _strict(schema[key])
    return strict
