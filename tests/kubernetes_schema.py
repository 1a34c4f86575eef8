"""JSON schemas of the Kubernetes objects under `cluster/kuberay/`: the documented fields, and no others.

Sources: KubeRay's API reference for `ray.io/v1` (RayCluster, RayJob), and the Go types that it is made from
(`ray-operator/apis/ray/v1`); Kueue's types of `kueue.x-k8s.io/v1beta2`; Kubernetes' reference for `v1` and
`networking.k8s.io/v1`; the Prometheus operator's for PodMonitor. Of KubeRay, fields of releases after 1.6 are left out.
Of the others, those are here that the manifests use, so that a new one is looked up before it is added.
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

# KubeRay.
RAY_CLUSTER_SPEC = _fields(
    "headGroupSpec rayVersion",
    authOptions=_fields(mode=_choice("token", "disabled"), secretName=NAME, enableK8sTokenAuth=FLAG),
    autoscalerOptions=_fields(
        resources=RESOURCES,
        image=TEXT,
        imagePullPolicy=_choice("Always", "IfNotPresent", "Never"),
        securityContext=CONTAINER_SECURITY,
        idleTimeoutSeconds=COUNT,
        upscalingMode=_choice("Default", "Aggressive", "Conservative"),
        version=_choice("v1", "v2"),
        env=ANY,
        envFrom=ANY,
        volumeMounts=ANY,
    ),
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=_fields(
        "redisAddress", redisAddress=TEXT, redisUsername=ANY, redisPassword=ANY, externalStorageNamespace=TEXT
    ),
    headServiceAnnotations=TEXTS,
    managedBy=_choice("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    rayVersion=TEXT,
    suspend=FLAG,
    upgradeStrategy=_fields(type=_choice("Recreate", "None")),
    headGroupSpec=_fields(
        "rayStartParams template",
        template=POD_TEMPLATE,
        headService=ANY,
        enableIngress=FLAG,
        rayStartParams=TEXTS,
        resources=TEXTS,
        labels=TEXTS,
        serviceType=_choice("ClusterIP", "NodePort", "LoadBalancer"),
    ),
    workerGroupSpecs=_list(
        _fields(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            idleTimeoutSeconds=COUNT,
            numOfHosts=POSITIVE,
            rayStartParams=TEXTS,
            resources=TEXTS,
            labels=TEXTS,
            scaleStrategy=_fields(workersToDelete=_list(TEXT)),
            suspend=FLAG,
            template=POD_TEMPLATE,
        )
    ),
)
RAY_JOB_SPEC = _fields(
    "entrypoint",
    activeDeadlineSeconds=POSITIVE,
    backoffLimit=COUNT,
    clusterSelector=TEXTS,
    deletionStrategy=ANY,
    entrypoint=TEXT,
    entrypointNumCpus={"type": "number", "minimum": 0},
    entrypointNumGpus={"type": "number", "minimum": 0},
    entrypointResources=TEXT,
    jobId=TEXT,
    managedBy=_choice("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    metadata=TEXTS,
    rayClusterSpec=RAY_CLUSTER_SPEC,
    runtimeEnvYAML=TEXT,
    shutdownAfterJobFinishes=FLAG,
    submissionMode=_choice("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=_fields(backoffLimit=COUNT),
    submitterPodTemplate=POD_TEMPLATE,
    suspend=FLAG,
    ttlSecondsAfterFinished=COUNT,
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
    ]
}
"""By apiVersion and kind."""
