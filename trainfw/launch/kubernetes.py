from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from trainfw import yaml_text
from trainfw.errors import UserError
from trainfw.launch.nodes import accepting, check_name, count_nodes
from trainfw.recipe import Recipe
from trainfw.training import check_place

_API = "jobset.x-k8s.io/v1alpha2"
_LABELS = "jobset.sigs.k8s.io"
"""Prefix of the labels that JobSet puts on each pod (kubernetes-sigs/jobset api/jobset/v1alpha2/jobset_types.go)."""
_JOB = "workers"
_RECIPE = "/etc/trainfw"
_PYTHON = ("python", "-P", "-m", "trainfw")
"""-P: whatever lies in the directory where the pod starts is not imported."""
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
"""RFC 1123."""
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""RFC 1035, which JobSet asks for (kubernetes-sigs/jobset pkg/webhooks/jobset_webhook.go)."""
_AMOUNT = re.compile(r"[a-z][-./a-zA-Z0-9]*=[0-9]+(\.[0-9]+)?[a-zA-Z]{0,2}")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
_OURS = ("/dev/shm", _RECIPE)
_LONGEST = 63
"""Letters of a label, and of a pod's host name, at most."""


class KubernetesJob:
    """A JobSet that trains a recipe: one pod an instance, a Job for the instances of one unit of the topology."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        image: str,
        volumes: Sequence[str],
        name: str | None = None,
        namespace: str | None = None,
        nodes: int | None = None,
        efa: int | None = None,
        resources: Sequence[str] = (),
        queue: str | None = None,
        grace: int = 120,
        restarts: int = 100,
        run_dir: str | None = None,
        accept: Sequence[str] = (),
    ):
        """Make it.

        Args:
            image: has `python -m trainfw`.
            volumes: `CLAIM` or `CLAIM:PATH`; all pods write the first.
            name: by default the recipe's, in the letters that Kubernetes takes.
            nodes: pods; by default the topology's instances.
            efa: EFA interfaces for each pod; by default those of the instance.
            resources: `NAME=AMOUNT` to ask for and be limited to, for each pod.
            accept: keys of which the run is to go on with another value (`trainfw train --accept`).

        Raises UserError for names and numbers that cannot be.
        """
        count = count_nodes(recipe, nodes)
        self.recipe, self.image, self.namespace, self.queue = recipe, image, namespace, queue
        self.grace, self.restarts = grace, restarts
        self.jobs, self.devices, self.node_labels, self.unit_label = _nodes(recipe, count, efa)
        self.pods = count // self.jobs
        if not volumes:
            raise UserError("--volume: expected at least one, CLAIM or CLAIM:/PATH, that all pods write")
        self.volumes = [_volume(text) for text in volumes]
        given = [("--run-dir", run_dir), ("--name", name), ("--namespace", namespace), ("--queue", queue)]
        given += [("--volume", path) for _, path in self.volumes] + [("--resource", text) for text in resources]
        for option, text in given:
            check_name(option, text)
        places = [*_OURS, *(path for _, path in self.volumes)]
        if twice := next((path for path in places if places.count(path) > 1), None):
            raise UserError(f"--volume: {twice} is there already")
        for text in resources:
            if not _AMOUNT.fullmatch(text):
                raise UserError(f"--resource {text}: expected NAME=AMOUNT, such as memory=1500Gi")
        self.resources = dict(text.split("=", 1) for text in resources)
        if run_dir is not None and not run_dir.startswith("/"):
            raise UserError(f"--run-dir {run_dir}: expected an absolute path, in a volume that all pods write")
        self.name = _name(recipe, name, self.jobs, self.pods)
        for option, label in (("--namespace", namespace), ("--queue", queue)):
            if label is not None and not (_LABEL.fullmatch(label) and len(label) <= _LONGEST):
                raise UserError(f"{option} {label}: expected small letters, digits and hyphens")
        if not _IMAGE.fullmatch(image):
            raise UserError(f"--image {image!r}: expected a container image, such as registry/trainfw:1.0")
        self.run_dir = run_dir or f"{self.volumes[0][1]}/runs/{self.name}"
        check_place(self.run_dir, recipe)
        self.accept = accepting(accept)

    def manifest(self) -> str:
        """Write YAML for `kubectl apply`: a ConfigMap of the recipe, and the JobSet."""
        header = (
            "# Written by `trainfw launch kubernetes`, for a cluster with JobSet (github.com/kubernetes-sigs/jobset), "
            "which makes\n# the headless service of `network` itself. Each pod sets Neuron's, EFA's and JAX's "
            "environment (`trainfw env` shows\n# which); those of UltraServers number themselves by their hosts' "
            "places in the torus. Has not run on Neuron hardware.\n"
        )
        return header + yaml.dump_all(self.objects(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)

    def objects(self) -> list[dict[str, object]]:
        config: dict[str, object] = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": self._metadata(f"{self.name}-recipe"),
            "data": {"recipe.yaml": self.recipe.to_yaml()},
        }
        metadata = self._metadata(self.name)
        if self.queue is not None:
            metadata["labels"] = {"kueue.x-k8s.io/queue-name": self.queue}
        if self.unit_label is not None:
            metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": self.unit_label}
        wrong = {"containerName": "trainfw", "operator": "In", "values": [1, 2]}  # another try would end as this one
        job = {
            "completionMode": "Indexed",
            "completions": self.pods,
            "parallelism": self.pods,
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": wrong}]},
            "template": {"spec": self._pod()},
        }
        spec = {
            "network": {"enableDNSHostnames": True, "subdomain": self.name, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": self.restarts,
                # Whatever else happens: all pods anew, and each goes on from the last checkpoint.
                "rules": [{"name": "wrong", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": _JOB, "replicas": self.jobs, "template": {"spec": job}}],
        }
        return [config, {"apiVersion": _API, "kind": "JobSet", "metadata": metadata, "spec": spec}]

    def _metadata(self, name: str) -> dict[str, object]:
        return {"name": name} if self.namespace is None else {"name": name, "namespace": self.namespace}

    def _pod(self) -> dict[str, object]:
        resources = {name: str(count) for name, count in self.devices.items()} | self.resources
        volumes: list[dict[str, Any]] = [{"name": "recipe", "configMap": {"name": f"{self.name}-recipe"}}]
        mounts: list[dict[str, Any]] = [{"name": "recipe", "mountPath": _RECIPE, "readOnly": True}]
        for i, (claim, path) in enumerate(self.volumes):
            volumes.append({"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": claim}})
            mounts.append({"name": f"volume-{i}", "mountPath": path})
        if self.devices:  # the 64 MiB that a container has by default are too few for libfabric and NCCL
            volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
            mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        recipe = f"{_RECIPE}/recipe.yaml"
        container = {
            "name": "trainfw",
            "image": self.image,
            "command": [*_PYTHON, "train", recipe, "--run-dir", _literal(self.run_dir), *map(_literal, self.accept)],
            "env": self._environment(),
            "volumeMounts": mounts,
            **({"resources": {"limits": resources, "requests": resources}} if resources else {}),
        }
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": self.grace,
            "containers": [container],
            "volumes": volumes,
        }
        if self.node_labels:
            pod["nodeSelector"] = self.node_labels
        if self.devices:
            pod["tolerations"] = [{"key": name, "operator": "Exists", "effect": "NoSchedule"} for name in self.devices]
        return pod

    def _environment(self) -> list[dict[str, object]]:
        labels = {
            "JOBSET_NAME": "jobset-name",
            "REPLICATED_JOB_NAME": "replicatedjob-name",
            "REPLICATED_JOB_REPLICAS": "replicatedjob-replicas",
            "JOB_INDEX": "job-index",
        }  # JOB_COMPLETION_INDEX is set by Kubernetes
        told: list[dict[str, object]] = [
            {"name": "TRAINFW_PROCESS_COUNT", "value": str(self.jobs * self.pods)},
            {"name": "PYTHONUNBUFFERED", "value": "1"},
        ]
        told += [
            {"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{_LABELS}/{label}']"}}}
            for name, label in labels.items()
        ]
        return told


def _nodes(recipe: Recipe, count: int, efa: int | None) -> tuple[int, dict[str, int], dict[str, str], str | None]:
    """Return the Jobs that `count` nodes make (units of the topology that are several instances each; else one), a
    pod's devices by resource, its nodes' labels, and the label that the nodes of one unit alone have in common."""
    topology = recipe.hardware.load()
    jobs, devices, labels, unit_label = 1, {}, {}, None
    if topology is not None and not topology.is_cpu:
        known = topology.kubernetes
        if known is None:
            raise recipe.error("hardware.topology", "no document says what its nodes are called in Kubernetes")
        devices = {known.devices: topology.chips // topology.instances}
        interfaces = known.efa if efa is None else efa
        if interfaces and count > 1:
            devices["vpc.amazonaws.com/efa"] = interfaces
        if known.instance_type is not None:
            labels = {"node.kubernetes.io/instance-type": known.instance_type}
        if topology.instances > topology.count:
            jobs, unit_label = topology.count, known.unit_label
    return jobs, devices, labels, unit_label


def _name(recipe: Recipe, name: str | None, jobs: int, pods: int) -> str:
    """Return the name that is given, or one made of the recipe's. Raises UserError where pods cannot be named by it."""
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-") or "trainfw"
        name = name if name[0].isalpha() else f"run-{name}"
    room = _LONGEST - len(f"-{_JOB}-{jobs - 1}-{pods - 1}-xxxxx")  # the names of pods
    if not _NAME.fullmatch(name) or len(name) > room:
        raise UserError(
            f"--name {name}: expected at most {room} small letters, digits and hyphens, the first a letter, the last "
            "no hyphen"
        )
    return name


def _volume(text: str) -> tuple[str, str]:
    claim, _, path = text.partition(":")
    path = (path or f"/{claim}").rstrip("/")
    if not _LABEL.fullmatch(claim) or not path.startswith("/") or ":" in path:
        raise UserError(f"--volume {text}: expected CLAIM or CLAIM:/PATH, such as checkpoints:/fsx")
    return claim, path


def _literal(text: str) -> str:
    """Escape a word of a container's command, in which Kubernetes expands `$(NAME)`, and reads `$$` as `$`."""
    return text.replace("$", "$$")


class _Dumper(yaml_text.Dumper):
    """Quotes all that a YAML of any version might take for no string, and writes several lines as they are."""


_PLAIN = re.compile(r"[A-Za-z/][\w./-]*[A-Za-z0-9]", re.ASCII)
_WORDS = ("true", "false", "yes", "no", "on", "off", "null")


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style: str | None = '"'
    if "\n" in text and not yaml_text.QUOTED.search(text):
        style = "|"
    elif _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        style = None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
