"""The JobSet that Kubernetes gets, held against the published schemas."""

from __future__ import annotations

import json
import re

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainfw import UserError, load_recipe, yaml_text
from trainfw.backends import read_wiring
from trainfw.launch import KubernetesJob

VERSION = "1.37"
QUICKSTART = load_recipe("quickstart")

# The fields of jobset.x-k8s.io/v1alpha2 that we write (kubernetes-sigs/jobset 0336a8fd hack/python-sdk/swagger.json and
# api/jobset/v1alpha2/jobset_types.go); `template.spec` is a batch/v1 Job's.
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
RULE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
        "action": {
            "enum": [
                "FailJobSet",
                "RestartJobSet",
                "RestartJobSetAndIgnoreMaxRestarts",
                "RestartJob",
                "RestartJobAndIgnoreMaxRestarts",
            ]
        },
        "onJobFailureReasons": {
            "items": {
                "enum": [
                    "BackoffLimitExceeded",
                    "DeadlineExceeded",
                    "FailedIndexes",
                    "MaxFailedIndexesExceeded",
                    "PodFailurePolicy",
                ]
            }
        },
    },
    "required": ["name", "action"],
    "additionalProperties": False,
}
JOBSET = {
    "type": "object",
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "properties": {
                "network": {
                    "type": "object",
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "subdomain": NAME,
                        "publishNotReadyAddresses": {"type": "boolean"},
                    },
                    "additionalProperties": False,
                },
                "failurePolicy": {
                    "type": "object",
                    "properties": {"maxRestarts": {"type": "integer", "minimum": 0}, "rules": {"items": RULE}},
                    "additionalProperties": False,
                },
                "replicatedJobs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "name": NAME,
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {
                                "type": "object",
                                "properties": {"spec": {"type": "object"}},
                                "required": ["spec"],
                                "additionalProperties": False,
                            },
                        },
                        "required": ["name", "template"],
                        "additionalProperties": False,
                    },
                },
            },
            "required": ["replicatedJobs"],
            "additionalProperties": False,
        },
    },
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
}

RECIPES = {
    "one process": ("quickstart", []),
    "many, of no topology": ("quickstart", ["parallel.data=4"]),
    "an UltraServer": ("llama3.1-8b-trn2-ultraserver", []),
    "many UltraServers": ("llama3.1-405b-trn2-ultraservers", []),
    "instances": ("llama3.1-8b-trn2-ultraserver", ["hardware={topology: trn2.48xlarge, count: 4}"]),
    "GPUs": ("quickstart", ["hardware={topology: h100-8, count: 2}"]),
}


def job(recipe="quickstart", overrides=(), **options):
    return KubernetesJob(
        load_recipe(recipe, overrides), **{"image": "registry/trainfw:1", "volumes": ["fsx"], **options}
    )


def read(job):
    config, jobset = yaml.safe_load_all(job.manifest())
    return config, jobset


def pod(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def check(config, jobset):
    kubernetes_validate.validate(config, VERSION, strict=True)
    jsonschema.validate(jobset, JOBSET)
    for each in jobset["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": each["template"]["spec"]}
        kubernetes_validate.validate(whole, VERSION, strict=True)


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_what_the_schemas_say(name):
    recipe, overrides = RECIPES[name]
    nodes = 4 if name == "many, of no topology" else None
    config, jobset = read(job(recipe, overrides, nodes=nodes, namespace="ml", queue="research"))
    check(config, jobset)


def test_the_schemas_refuse_what_is_wrong():
    config, jobset = read(job())
    pod(jobset)["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="comand"):
        check(config, jobset)
    config, jobset = read(job())
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        check(config, jobset)


def test_the_recipe_travels(tmp_path):
    recipe = load_recipe("quickstart", ["train.steps=7"])
    config, jobset = read(KubernetesJob(recipe, image="i", volumes=["fsx:/data/", "corpus"]))
    file = tmp_path / "recipe.yaml"
    file.write_text(config["data"]["recipe.yaml"])
    assert load_recipe(file) == recipe
    container = pod(jobset)["containers"][0]
    assert container["command"][-4:] == ["train", "/etc/trainfw/recipe.yaml", "--run-dir", "/data/runs/quickstart"]
    accepting = pod(read(job(accept=["optimizer"]))[1])["containers"][0]["command"]
    assert accepting[-4:] == ["--run-dir", "/fsx/runs/quickstart", "--accept", "optimizer"]
    assert {"name": "recipe", "mountPath": "/etc/trainfw", "readOnly": True} in container["volumeMounts"]
    assert {"name": "volume-1", "mountPath": "/corpus"} in container["volumeMounts"]


def test_ultraservers():
    _, jobset = read(job("llama3.1-8b-trn2-ultraserver", ["hardware.count=3"]))
    unit = "neuron.amazonaws.com/ultraserver-server-id-4"
    assert jobset["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": unit}
    [jobs] = jobset["spec"]["replicatedJobs"]
    assert (jobs["replicas"], jobs["template"]["spec"]["completions"]) == (3, 4)
    devices = {"aws.amazon.com/neuron": "16", "vpc.amazonaws.com/efa": "16"}
    assert pod(jobset)["containers"][0]["resources"] == {"limits": devices, "requests": devices}
    assert pod(jobset)["nodeSelector"] == {"node.kubernetes.io/instance-type": "trn2u.48xlarge"}
    _, jobset = read(job("llama3.1-8b-trn2-ultraserver", efa=15))
    assert pod(jobset)["containers"][0]["resources"]["limits"]["vpc.amazonaws.com/efa"] == "15"


def test_other_resources_and_names():
    _, jobset = read(job("quickstart", ["name=8b-run"], resources=["memory=15Gi", "hugepages-2Mi=5120Mi"]))
    assert jobset["metadata"]["name"] == "run-8b-run"
    asked = {"memory": "15Gi", "hugepages-2Mi": "5120Mi"}
    assert pod(jobset)["containers"][0]["resources"] == {"limits": asked, "requests": asked}


def test_pods_know_where_they_stand():
    """What the pods are told, as JobSet and Kubernetes fill it in, makes them processes 0 to 11."""
    recipe = load_recipe("llama3.1-8b-trn2-ultraserver", ["hardware.count=3"])
    _, jobset = read(KubernetesJob(recipe, image="i", volumes=["fsx"], name="llama"))
    found = []
    for index in range(12):
        labels = {
            "jobset-name": "llama",
            "replicatedjob-name": "workers",
            "replicatedjob-replicas": "3",
            "job-index": str(index // 4),
        }
        environ = {"JOB_COMPLETION_INDEX": str(index % 4)}
        for variable in pod(jobset)["containers"][0]["env"]:
            if "value" in variable:
                environ[variable["name"]] = variable["value"]
            else:
                path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                label = re.fullmatch(r"metadata\.labels\['jobset\.sigs\.k8s\.io/(.+)'\]", path)
                environ[variable["name"]] = labels[label[1]]
        wiring = read_wiring(environ, recipe.hardware.load())
        assert (wiring.process_count, wiring.head, wiring.order) == (12, "llama-workers-0-0.llama", "launcher's")
        found.append(wiring.process_index)
    assert found == list(range(12))


def test_what_another_try_would_not_mend_fails_at_once():
    _, jobset = read(job(restarts=7))
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"][0]["action"] == "FailJobSet"
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]
    assert (spec["backoffLimit"], spec["template"]["spec"]["restartPolicy"]) == (0, "Never")


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("quickstart", {"nodes": 0}, "--nodes 0: expected at least 1"),
        ("quickstart", {"volumes": ["Fsx"]}, "--volume Fsx: expected CLAIM or CLAIM:/PATH"),
        ("quickstart", {"volumes": ["fsx:data"]}, "--volume fsx:data: expected CLAIM or CLAIM:/PATH"),
        ("quickstart", {"name": "a.b"}, "--name a.b: expected at most 4[0-9] small letters"),
        ("quickstart", {"name": "a" * 60}, "expected at most 4[0-9] small letters"),
        ("quickstart", {"name": "8b"}, "--name 8b: expected .* the first a letter"),
        ("quickstart", {"volumes": ["c:/"]}, "--volume c:/: expected CLAIM"),
        ("quickstart", {"volumes": ["c:/x", "d:/x"]}, "--volume: /x is there already"),
        ("quickstart", {"volumes": ["c:/etc/trainfw"]}, "--volume: /etc/trainfw is there already"),
        ("quickstart", {"resources": ["memory"]}, "--resource memory: expected NAME=AMOUNT"),
        ("quickstart", {"run_dir": "runs/a"}, "--run-dir runs/a: expected an absolute path"),
        ("quickstart", {"run_dir": "/fsx/a[1]"}, r"/fsx/a\[1\].*: checkpoints cannot be kept under a name with '\['"),
        ("quickstart", {"volumes": []}, "--volume: expected at least one"),
        ("quickstart", {"namespace": "A"}, "--namespace A: expected"),
        ("quickstart", {"image": "a b"}, "--image 'a b': expected a container image"),
        ("quickstart", {"resources": ["memory=1Gi\nx"]}, r"--resource 'memory=1Gi\\nx': holds the character U\+000A"),
        ("quickstart", {"name": "a\nb"}, r"--name 'a\\nb': holds the character U\+000A"),
        ("quickstart", {"volumes": ["c:/x\n"]}, r"--volume '/x\\n': holds the character U\+000A"),
        ("quickstart", {"run_dir": "/a\x85"}, r"--run-dir '/a\\x85': holds the character U\+0085"),
        (
            "llama3.1-8b-trn2-ultraserver",
            {"nodes": 3},
            "hardware.count = 1: 1 x trn2-ultraserver is 4 instances, not --nodes 3",
        ),
    ],
)
def test_what_cannot_be_is_refused(recipe, options, message):
    with pytest.raises(UserError, match=message):
        job(recipe, **options)


PRINTABLE = [*"ab1 \"'\\$`#;&|<>(){}[]*?~!%^=,:-/.é", "$(JOB_INDEX)", "$$(", "no", "1e4"]
CONTROLS = [*"\t\n\r\0\x7f\x85\u2028\ufeff"]
HOSTILE = st.one_of(
    *[st.lists(st.sampled_from(letters), max_size=9).map("".join) for letters in (PRINTABLE, PRINTABLE + CONTROLS)]
)
FIELDS = dict.fromkeys(("image", "namespace", "queue", "run_dir", "path", "claim", "resource", "prompt"), HOSTILE)


def expand(text):
    """What Kubernetes makes of a word of a container's command (its expansion/expand.go)."""
    known = {"JOB_INDEX": "EXPANDED"}
    pattern = re.compile(r"\$(\$|\(([^)]*)\))", re.DOTALL)
    return pattern.sub(lambda found: "$" if found[1] == "$" else known.get(found[2], found[0]), text)


@settings(max_examples=150, deadline=None)
@given(given=st.fixed_dictionaries({}, optional=FIELDS))
@example({"namespace": "1e4", "queue": "y", "claim": "0x1f", "resource": "on"})
@example({"run_dir": "$(JOB_INDEX)$$(JOB_INDEX)$", "prompt": "\x85\u2028\u2029 \t\n\ufeff"})
def test_whatever_is_given_reaches_the_manifest_as_it_is_or_is_refused(given):
    given = {"claim": "fsx", "path": "fsx", "run_dir": "r", "image": "i", "resource": "cpu", **given}
    recipe = QUICKSTART.model_copy(
        update={"train": QUICKSTART.train.model_copy(update={"sample_prompt": given.get("prompt")})}
    )
    try:
        made = KubernetesJob(
            recipe,
            image=given["image"],
            volumes=[f"{given['claim']}:/{given['path']}"],
            run_dir=f"/{given['run_dir']}",
            resources=[f"{given['resource']}=1"],
            namespace=given.get("namespace"),
            queue=given.get("queue"),
        )
    except UserError:
        assert any(re.search(r"[^a-zA-Z0-9]|^[A-Z0-9]|^$", given[name]) for name in FIELDS if name in given)
        return
    manifest = made.manifest()
    objects = json.loads(json.dumps(made.objects()))
    for loader in (yaml.SafeLoader, yaml_text.Loader):  # YAML 1.1 and 1.2
        assert list(yaml.load_all(manifest, loader)) == objects
    assert not re.search(r"[^\n\x20-\x7e\xa0-\u2027\u202a-\uffff]", manifest)
    scalars = [event for event in yaml.parse(manifest) if isinstance(event, yaml.ScalarEvent)]
    plain = {event.value for event in scalars if event.style is None} - {"true"}
    assert all(re.fullmatch(r"[0-9]+|[A-Za-z/][\w./-]+", value) for value in plain), plain
    assert not {"yes", "no", "on", "off", "null"} & plain
    container = pod(objects[1])["containers"][0]
    assert [expand(word) for word in container["command"]] == [
        *("python", "-P", "-m", "trainfw", "train", "/etc/trainfw/recipe.yaml", "--run-dir", f"/{given['run_dir']}")
    ]
    assert container["volumeMounts"][1]["mountPath"] == f"/{given['path']}".rstrip("/")
    assert yaml_text.load(objects[0]["data"]["recipe.yaml"], "x")["train"]["sample_prompt"] == given.get("prompt")


def test_nodes_of_which_no_document_tells():
    recipe = load_recipe("llama3.1-8b-trn2-ultraserver", ["hardware={topology: trn3-gen1-ultraserver}"])
    with pytest.raises(
        UserError, match=r"hardware.topology = 'trn3-gen1-ultraserver': no document says what its nodes"
    ):
        KubernetesJob(recipe, image="i", volumes=["fsx"])
