"""What is wrong with a Kubernetes object of cluster/, in words; an empty list where nothing is.

Kubernetes' own kinds, and the pods inside KubeRay's, are judged by the strict schemas that kubernetes-validate carries.
KubeRay publishes no such client: KUBERAY names the fields of its v1 reference (KubeRay 1.4), and a field that is not
named there is a problem. Volumes, and what else a schema cannot see, are checked here too.
"""

from collections.abc import Iterator
from typing import Any

import kubernetes_validate

KUBERNETES = "1.32"
TEXTS = {"*": str}
AUTOSCALER = {
    "version": {"v1", "v2"},
    "idleTimeoutSeconds": int,
    "upscalingMode": {"Default", "Aggressive", "Conservative"},
    "resources": dict,
    "image": str,
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "securityContext": dict,
    "env": [dict],
    "envFrom": [dict],
    "volumeMounts": [dict],
}


def _pod(template: Any, where: str) -> Iterator[str]:
    yield from (f"{where}.{problem}" for problem in pod_problems(template))


HEAD = {
    "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"},
    "rayStartParams!": TEXTS,
    "template!": _pod,
    "headService": dict,
    "enableIngress": bool,
}
GROUP = {
    "groupName!": str,
    "replicas": int,
    "minReplicas!": int,
    "maxReplicas!": int,
    "numOfHosts": int,
    "idleTimeoutSeconds": int,
    "suspend": bool,
    "rayStartParams!": TEXTS,
    "template!": _pod,
    "scaleStrategy": {"workersToDelete": [str]},
}
CLUSTER_SPEC = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": AUTOSCALER,
    "headGroupSpec!": HEAD,
    "workerGroupSpecs": [GROUP],
    "headServiceAnnotations": TEXTS,
    "gcsFaultToleranceOptions": dict,
    "managedBy": {"ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"},
    "suspend": bool,
}
JOB_SPEC = {
    "entrypoint": str,
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode"},
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "ttlSecondsAfterFinished": int,
    "shutdownAfterJobFinishes": bool,
    "suspend": bool,
    "jobId": str,
    "metadata": TEXTS,
    "runtimeEnvYAML": str,
    "entrypointNumCpus": float,
    "entrypointNumGpus": float,
    "entrypointResources": str,
    "rayClusterSpec": CLUSTER_SPEC,
    "clusterSelector": TEXTS,
    "submitterPodTemplate": _pod,
    "submitterConfig": {"backoffLimit": int},
    "managedBy": {"ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"},
    "deletionStrategy": dict,
}
NAMED = {"apiVersion!": {"ray.io/v1"}, "kind!": str, "metadata!": {"name!": str, "labels": TEXTS, "annotations": TEXTS}}
KUBERAY = {"RayCluster": {**NAMED, "spec!": CLUSTER_SPEC}, "RayJob": {**NAMED, "spec!": JOB_SPEC}}


def problems(document: dict) -> list[str]:
    """Of a manifest of any kind that cluster/ holds."""
    if document.get("kind") in KUBERAY:
        return list(_unlike(document, KUBERAY[document["kind"]], ""))
    found = _by_schema(document)
    spec = document.get("spec")
    if isinstance(spec, dict) and "template" in spec:
        templates = [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])]
        found += _beyond_the_schema(spec["template"], templates)
    return found


def pod_problems(template: Any) -> list[str]:
    """Of a pod template, judged as the pod that it makes."""
    if not isinstance(template, dict) or not template.keys() <= {"metadata", "spec"}:
        return ["template: is no pod template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template.get("metadata", {})}}
    return _by_schema({**pod, "spec": template.get("spec")}) or _beyond_the_schema(template, [])


def _by_schema(document: dict) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}"]
    except (kubernetes_validate.SchemaNotFoundError, KeyError) as error:
        return [f"no such kind: {error}"]
    return []


def _beyond_the_schema(template: dict, claims: list[str]) -> list[str]:
    """Volumes that are mounted but not there, and what every pod here must have."""
    spec, found = template["spec"], []
    there = {volume["name"] for volume in spec.get("volumes", [])} | {*claims}
    if spec.get("enableServiceLinks") is not False:
        found.append("spec.enableServiceLinks: another service's name would become a variable: set it to false")
    if spec.get("securityContext", {}).get("runAsNonRoot") is not True:
        found.append("spec.securityContext: runs as root")
    for container in spec["containers"]:
        name = container["name"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        found += [f"{name}: no volume {missing}" for missing in sorted(mounted - there)]
        wanted = {"readinessProbe", "livenessProbe"} - container.keys()
        found += [f"{name}: no {probe}" for probe in sorted(wanted)]
        if container.get("resources", {}).keys() != {"requests", "limits"}:
            found.append(f"{name}: requests and limits are not both said")
        if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
            found.append(f"{name}: may gain privileges")
        ports = {port["name"] for port in container.get("ports", [])}
        for key in container.keys() & {"readinessProbe", "livenessProbe", "startupProbe"}:
            port = container[key].get("httpGet", {}).get("port", 0)
            if isinstance(port, str) and port not in ports:
                found.append(f"{name}: {key} asks port {port}, which it has not")
    return found


def _unlike(value: Any, shape: Any, where: str) -> Iterator[str]:
    """Where a value differs from a shape: a type, a set of choices, [shape], {field: shape}, or a check."""
    if isinstance(shape, type):
        if type(value) is not shape:
            yield f"{where}: {value!r} is no {shape.__name__}"
    elif isinstance(shape, set):
        if value not in shape:
            yield f"{where}: {value!r} is none of {sorted(shape)}"
    elif callable(shape):
        yield from shape(value, where)
    elif not isinstance(value, type(shape)):
        yield f"{where}: {value!r} is no {type(shape).__name__}"
    elif isinstance(shape, list):
        for place, item in enumerate(value):
            yield from _unlike(item, shape[0], f"{where}.{place}")
    else:
        yield from _fields(value, shape, where)


def _fields(value: dict, shape: dict, where: str) -> Iterator[str]:
    known = {name.removesuffix("!"): inner for name, inner in shape.items()}
    for name, item in value.items():
        if name not in known and "*" not in known:
            yield f"{where}.{name}: unknown field"
        else:
            yield from _unlike(item, known.get(name, known.get("*")), f"{where}.{name}")
    yield from (f"{where}.{name[:-1]}: missing" for name in shape if name.endswith("!") and name[:-1] not in value)
