"""What `trainfw env` prints, and that it is what a process sets.

TRAINFW_UPDATE_GOLDEN=1 pytest tests/cli/test_env.py writes the golden files anew.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import write_recipe
from trainfw.backends.neuron import place
from trainfw.cli import main

GOLDEN = Path(__file__).parent / "golden"
FOREIGN = (
    "SLURM",
    "JOB",
    "REPLICATED",
    "OMPI",
    "TRAINFW_P",
    "TRAINFW_C",
    "NEURON",
    "FI_",
    "JAX",
    "XLA",
    "TF_CPP",
    "XDG",
    "OFI_",
    "CCOM_",
    "LD_",
)

ULTRASERVER = {"hardware": {"topology": "trn2-ultraserver"}, "parallel": {"fsdp": -1, "tensor": 4}}
UNROLLED = {"train": {"scan_layers": False}}
# (recipe, environment, this host's files under /sys/class/neuron_device)
CASES = {
    "trn2.48xlarge": ({"hardware": {"topology": "trn2.48xlarge"}, "parallel": {"tensor": 4}, **UNROLLED}, {}, {}),
    "ultraserver-slurm": (
        {**ULTRASERVER, **UNROLLED},
        {
            "SLURM_NODEID": "2",
            "SLURM_NNODES": "4",
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_STEP_NODELIST": "trn2u-[001-004]",
        },
        {"server_id_4": "3f00a1b2c3d4e5f6", "node_id_4": "2"},
    ),
    "ultraserver-kubernetes": (
        {**ULTRASERVER, **UNROLLED},
        {  # an indexed Job whose pods ran AWS's UltraServer script
            "JOB_COMPLETION_INDEX": "3",
            "NEURON_GLOBAL_TOPOID": "1",
            "NEURON_GLOBAL_TOPOID0_HOST": "llama-workers-0-2.llama",
            "NEURON_RT_ULTRASERVER_MODE": "1",
            "NEURON_RT_ULTRASERVER_SERVER_ID": "3f00a1b2c3d4e5f6",
            "NEURON_RT_ULTRASERVER_NODE_ID": "1",
        },
        {"server_id_4": "3f00a1b2c3d4e5f6", "node_id_4": "1"},
    ),
    "trn1.32xlarge-x32": (
        {"hardware": {"topology": "trn1.32xlarge", "count": 32}, "parallel": {"fsdp": 128, "tensor": 8}},
        {"SLURM_NODEID": "31", "SLURM_NNODES": "32", "SLURM_JOB_NODELIST": "trn1-[01-32]"},
        {},
    ),
}


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host in a known state, without anything that a launcher or a user has set."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-1021-aws")
    monkeypatch.setattr(place, "SYSFS", tmp_path / "neuron_device")
    monkeypatch.setenv("TRAINFW_SYSROOT", str(tmp_path / "root"))
    (tmp_path / "root").mkdir()


def env(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["trainfw", "env", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    output = capsys.readouterr()
    assert not stopped.value.code, output.err
    return output.out


def refused(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["trainfw", "env", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    return capsys.readouterr().err


def exports(text: str) -> dict[str, str]:
    lines = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("export ")]
    return dict(re.sub(r"\$\{.*\}$", "", line).split("=", 1) for line in lines)


def put(root: Path, *files: str) -> None:
    """Executable files below a directory that stands for `/`."""
    for file in files:
        path = root / file.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o755)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("name", CASES)
def test_golden(monkeypatch, capsys, tmp_path, name):
    sections, environ, files = CASES[name]
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "neuron_device").mkdir()
    for file, text in files.items():
        (tmp_path / "neuron_device" / file).write_text(text)
    text = env(monkeypatch, capsys, str(write_recipe(tmp_path, name=name, **sections)))
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("TRAINFW_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    for paragraph in text.split("\n\n")[1:]:
        *comments, last = paragraph.splitlines()
        assert re.fullmatch(r"export \w+=.*|unset \w+|# \w+ is not known here", last)
        assert re.fullmatch(r"# .+ \(.+\)", " ".join(line.replace("#   ", "") for line in comments))
        assert all(len(line) <= 80 or len(line.split()) == 2 for line in comments)  # a source's path stays whole


@pytest.mark.usefixtures("host")
def test_json_says_the_same(monkeypatch, capsys, tmp_path):
    recipe = str(write_recipe(tmp_path, **ULTRASERVER))
    arguments = [recipe, "--nodes", "4", "--node-rank", "3", "--head", "trn001"]
    found = json.loads(env(monkeypatch, capsys, *arguments, "--format", "json"))
    shell = env(monkeypatch, capsys, *arguments)
    assert {v["name"]: v["value"] for v in found if v["value"] is not None} == exports(shell)
    assert all(v["reason"] and v["source"] for v in found)
    values = {v["name"]: v["value"] for v in found}
    assert values["NEURON_RT_ROOT_COMM_ID"] == "trn001:41000"
    assert values["NEURON_PJRT_PROCESS_INDEX"] == "3"
    assert values["NEURON_RT_ULTRASERVER_SERVER_ID"] is None  # only that host knows
    overlap = {v["name"] for v in found if v["experimental"] and v["name"].startswith("NEURON_")}
    assert overlap == {"NEURON_FSDP_REPEATED"}  # the layers are scanned


@pytest.mark.usefixtures("host")
def test_without_a_launcher_the_topologys_first_process(monkeypatch, capsys, tmp_path):
    text = env(monkeypatch, capsys, str(write_recipe(tmp_path, **ULTRASERVER)))
    assert "process 0 of 4" in text
    assert "# NEURON_RT_ROOT_COMM_ID is not known here" in text
    assert exports(text)["NEURON_PJRT_PROCESSES_NUM_DEVICES"] == "64,64,64,64"


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("topology", ["h100-8", "cpu"])
def test_nothing_is_set_for_other_hardware(monkeypatch, capsys, tmp_path, topology):
    recipe = str(write_recipe(tmp_path, hardware={"topology": topology}))
    text = env(monkeypatch, capsys, recipe)
    assert f"# nothing to set: {topology} is not Neuron hardware" in text
    assert exports(text) == {}
    assert json.loads(env(monkeypatch, capsys, recipe, "--format", "json")) == []


@pytest.mark.usefixtures("host")
def test_what_the_user_has_set_stays_and_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NEURON_RT_EXEC_TIMEOUT", "1800")
    text = env(monkeypatch, capsys, str(write_recipe(tmp_path, hardware={"topology": "trn2.48xlarge"})))
    assert exports(text)["NEURON_RT_EXEC_TIMEOUT"] == "1800"
    assert "already set, and kept; trainfw would set 600" in text


@pytest.mark.usefixtures("host")
def test_warnings(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS", "3")
    recipe = str(write_recipe(tmp_path, hardware={"topology": "trn2.48xlarge", "sdk": "2.32"}))
    monkeypatch.setattr(sys, "argv", ["trainfw", "env", recipe])
    with pytest.raises(SystemExit):
        main()
    output = capsys.readouterr()
    assert "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS = 3: was removed in Neuron SDK 2.31" in output.err
    assert "INFLIGHT" not in output.out


@pytest.mark.usefixtures("host")
def test_jaxs_own_cache_is_off_and_a_directory_for_it_is_unset(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/shared/jax")
    recipe = str(write_recipe(tmp_path, hardware={"topology": "trn2.48xlarge"}))
    monkeypatch.setattr(sys, "argv", ["trainfw", "env", recipe])
    with pytest.raises(SystemExit):
        main()
    output = capsys.readouterr()
    assert "\nunset JAX_COMPILATION_CACHE_DIR\n" in output.out
    assert exports(output.out)["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert "warning: JAX_COMPILATION_CACHE_DIR = /shared/jax: trainfw unsets it" in output.err


@pytest.mark.usefixtures("host")
def test_the_environments_compiler_comes_first_on_the_path(monkeypatch, capsys, tmp_path):
    own = os.path.dirname(sys.executable)
    recipe = str(write_recipe(tmp_path, hardware={"topology": "trn2.48xlarge"}))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert "PATH" not in exports(env(monkeypatch, capsys, recipe))  # it is nowhere
    put(tmp_path / "root", f"{own}/neuronx-cc", "/usr/bin/neuronx-cc")
    text = env(monkeypatch, capsys, recipe)
    assert f'export PATH={own}"${{PATH:+:$PATH}}"' in text
    shell = subprocess.run(["/bin/sh"], input=f"{text}\necho $PATH", capture_output=True, text=True, check=True)
    assert shell.stdout == f"{own}:/usr/bin\n"
    monkeypatch.setenv("PATH", f"{own}:/usr/bin")
    assert "PATH" not in exports(env(monkeypatch, capsys, recipe))


@pytest.mark.usefixtures("host")
def test_several_nodes_have_efas_lines_and_kubernetes_one_more(monkeypatch, capsys, tmp_path):
    put(tmp_path / "root", "/usr/lib64/libtcmalloc.so.4")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libown.so")
    recipe = str(write_recipe(tmp_path, **ULTRASERVER))
    found = exports(env(monkeypatch, capsys, recipe))
    assert found["OFI_NCCL_PROTOCOL"] == "RDMA"
    assert found["OFI_NCCL_MR_CACHE_DISABLE"] == "1"
    assert found["LD_LIBRARY_PATH"] == "/opt/amazon/efa/lib"
    assert found["LD_PRELOAD"] == "/usr/lib64/libtcmalloc.so.4"
    assert "CCOM_SOCKET_IFNAME" not in found
    assert (
        not {"OFI_NCCL_PROTOCOL", "LD_PRELOAD"}
        & exports(env(monkeypatch, capsys, str(write_recipe(tmp_path, hardware={"topology": "trn2.48xlarge"})))).keys()
    )
    for name, value in CASES["ultraserver-kubernetes"][1].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/amazon/efa/lib/:/own")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so.4")
    found = exports(env(monkeypatch, capsys, str(write_recipe(tmp_path, **ULTRASERVER))))
    assert found["CCOM_SOCKET_IFNAME"] == "eth0"
    assert not {"LD_LIBRARY_PATH", "LD_PRELOAD"} & found.keys()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("NEURON_LOGICAL_NC_CONFIG", "1", "says LNC 1, but the recipe has trn2.48xlarge at LNC 2"),
        ("NEURON_CC_FLAGS", "-O2 --lnc=1", "says LNC 1, but the recipe has trn2.48xlarge at LNC 2"),
        ("NEURON_RT_VISIBLE_CORES", "0-3", "leaves a process 4 cores, but an instance of trn2.48xlarge has 64"),
        ("NEURON_RT_NUM_CORES", "32", "leaves a process 32 cores"),
    ],
)
def test_other_cores_than_the_recipes_are_refused(name, value, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(name, value)
    recipe = str(write_recipe(tmp_path, hardware={"topology": "trn2.48xlarge"}))
    monkeypatch.setattr(sys, "argv", ["trainfw", "env", recipe])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert name in error
    assert message in error


@pytest.mark.usefixtures("host")
def test_the_recipes_own_choices(monkeypatch, capsys, tmp_path):
    hardware = {
        "topology": "trn2.48xlarge",
        "lnc": 1,
        "compiler_flags": ["--auto-cast=none", "--tensorizer-options='--enable-hoist-fsdp-collectives'"],
        "fsdp_overlap": False,
    }
    found = exports(env(monkeypatch, capsys, str(write_recipe(tmp_path, hardware=hardware))))
    assert found["NEURON_LOGICAL_NC_CONFIG"] == "1"
    assert found["NEURON_CC_FLAGS"] == (
        "--target=trn2 --lnc=1 --model-type=transformer -O1 --auto-cast=none "
        "--tensorizer-options='--enable-hoist-fsdp-collectives'"
    )
    assert not [name for name in found if "FSDP" in name]


@pytest.mark.usefixtures("host")
def test_old_kernels_need_one_more(monkeypatch, capsys, tmp_path):
    recipe = str(write_recipe(tmp_path, **ULTRASERVER))
    assert "FI_EFA_FORK_SAFE" not in env(monkeypatch, capsys, recipe)
    monkeypatch.setattr(platform, "release", lambda: "5.10.205-195.807.amzn2.x86_64")
    assert exports(env(monkeypatch, capsys, recipe))["FI_EFA_FORK_SAFE"] == "1"


@pytest.mark.usefixtures("host")
def test_bad_input(monkeypatch, capsys, tmp_path):
    recipe = str(write_recipe(tmp_path, **ULTRASERVER))
    assert "--node-rank 4: expected 0 to 3" in refused(monkeypatch, capsys, recipe, "--node-rank", "4")
    assert "--nodes 0: expected at least 1" in refused(monkeypatch, capsys, recipe, "--nodes", "0")
    error = refused(monkeypatch, capsys, recipe, "--nodes", "2")
    assert "2 processes (the command line): 1 x trn2-ultraserver takes 4" in error
    assert "--format yaml: expected sh or json" in refused(monkeypatch, capsys, recipe, "--format", "yaml")
    assert "hardware.topology must say" in refused(monkeypatch, capsys, str(write_recipe(tmp_path)))


@pytest.mark.usefixtures("host")
def test_a_host_out_of_its_place_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "neuron_device").mkdir()
    for name, text in {"server_id_4": "3f", "node_id_4": "3"}.items():
        (tmp_path / "neuron_device" / name).write_text(text)
    error = refused(monkeypatch, capsys, str(write_recipe(tmp_path, **ULTRASERVER)), "--nodes", "4", "--node-rank", "1")
    assert "this host is node 3 of UltraServer 3f, but process 1 takes node 1" in error
    assert "NEURON_GLOBAL_TOPOID" in error


PREPARE = """
import json, os, sys
from trainfw import backends, load_recipe
from trainfw.backends.neuron import plugin
from trainfw.parallel import AXES

plugin.on_neuron = lambda environ: True  # as on an instance with the plugin
recipe = load_recipe(sys.argv[1])
before = dict(os.environ)
layout = {axis: getattr(recipe.parallel, axis) for axis in AXES}
backends.prepare(hardware=recipe.hardware, layout=layout, scan_layers=recipe.train.scan_layers)
assert "jax" not in sys.modules
print(json.dumps({k: os.environ.get(k) for k in before | dict(os.environ) if before.get(k) != os.environ.get(k)}))
"""


def test_a_process_sets_exactly_what_is_printed(tmp_path):
    recipe = str(write_recipe(tmp_path, **ULTRASERVER, **UNROLLED))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    environ |= CASES["ultraserver-slurm"][1] | {"NEURON_RT_EXEC_TIMEOUT": "1800", "JAX_COMPILATION_CACHE_DIR": "/jax"}
    environ |= {"TRAINFW_SYSROOT": str(tmp_path / "root"), "PATH": "/usr/bin", "LD_LIBRARY_PATH": "/own/lib"}
    put(tmp_path / "root", f"{os.path.dirname(sys.executable)}/neuronx-cc")
    environ |= {"NEURON_GLOBAL_TOPOID": "2", "NEURON_GLOBAL_TOPOID0_HOST": "trn2u-003"}  # or they would meet first

    def run(*command: str) -> str:
        return subprocess.run(
            [sys.executable, *command], env=environ, capture_output=True, text=True, check=True
        ).stdout

    printed = json.loads(run("-m", "trainfw", "env", recipe, "--format", "json"))
    set_by_process = json.loads(run("-c", PREPARE, recipe))
    known = [v for v in printed if not v["already_set"] and (v["removed"] or v["value"] is not None)]
    expected = {v["name"]: v["value"] for v in known}
    for name in (v["name"] for v in known if v["prepended"]):
        expected[name] = f"{expected[name]}:{environ[name]}"
    assert set_by_process == expected
    assert expected["JAX_COMPILATION_CACHE_DIR"] is None
    assert {"PATH", "LD_LIBRARY_PATH"} <= expected.keys()
    assert [v["name"] for v in printed if v["already_set"]] == ["NEURON_RT_EXEC_TIMEOUT"]
    assert set_by_process["JAX_PLATFORMS"] == "neuron,cpu"
