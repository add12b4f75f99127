"""The command, from weights on disk to an end by a signal."""

import signal
import subprocess
import sys

import httpx2
import openai
import peft
import pytest
import torch
import transformers

from tests.gguf_files import byte_level
from tests.gguf_models import MODELS, reference
from trainfw.data import stop_ids
from trainfw.errors import UserError
from trainfw.serving import generate_batch, load_engine
from trainfw.training import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = byte_level(tmp_path_factory.mktemp("base"), size=320)
    reference(*MODELS["llama"]).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """A directory of one adapter, `sharp`."""
    directory = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(directory / "sharp")
    return directory


def command(*arguments):
    return [sys.executable, "-m", "trainfw", "serve", *map(str, arguments)]


def test_a_model_and_its_adapters_are_served(base, adapters):
    arguments = (base, "--name", "tiny", "--adapter-dir", adapters, "--port", 0, "--slots", 2, "--length", 32)
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving tiny at http://127.0.0.1:"), line
        url = line.split()[-1]
        assert httpx2.get(f"{url}/health").status_code == 200  # at once
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        model, tokenizer = load_model(base, adapters={"sharp": str(adapters / "sharp")})
        names, ends = [None, "sharp"], stop_ids(tokenizer)
        ids = generate_batch(model, [[5, 17, 42]] * 2, max_tokens=12, eos_ids=ends, adapters=names)
        load = {"lora_name": "sharp", "lora_path": "sharp"}
        assert httpx2.post(f"{url}/v1/load_lora_adapter", json=load).status_code == 200
        options = {"prompt": [5, 17, 42], "max_tokens": 12, "temperature": 0}
        texts = [client.completions.create(model=name, **options).choices[0].text for name in ("tiny", "sharp")]
        assert texts == [tokenizer.decode(one) for one in ids]
        assert texts[0] != texts[1]
        assert httpx2.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "sharp"}).status_code == 200
        form = {"type": "regex", "regex": "[0-9]{4}"}
        got = client.completions.create(model="tiny", prompt=[5], max_tokens=20, extra_body={"response_format": form})
        assert got.choices[0].text.isdigit()
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM


def test_a_model_over_two_devices(base):
    arguments = (base, "--layout", "tensor=2", "--devices", 2, "--port", 0, "--slots", 2, "--length", 32)
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), line
        client = openai.OpenAI(base_url=f"{line.split()[-1]}/v1", api_key="any", max_retries=0)
        model, tokenizer = load_model(base)
        ids = generate_batch(model, [[5, 17, 42]], max_tokens=12, eos_ids=stop_ids(tokenizer))
        (name,) = (one.id for one in client.models.list())
        got = client.completions.create(model=name, prompt=[5, 17, 42], max_tokens=12, temperature=0)
        assert got.choices[0].text == tokenizer.decode(ids[0])
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM


def test_adapters_are_looked_for_before_anything_is_made(base, monkeypatch):
    monkeypatch.setattr("trainfw.serving.load.build_server", None)
    with pytest.raises(UserError, match="nowhere: holds no adapter"):
        load_engine(base, adapters={"sharp": "nowhere"}, length=16)


def test_a_length_beyond_the_models_positions_is_said(base, monkeypatch):
    monkeypatch.setattr("trainfw.serving.load.build_server", None)
    said = pytest.warns(UserWarning, match=r"length = 10,000,000: more than the [\d,]+ positions")
    with said, pytest.raises(UserError, match="holds no adapter"):
        load_engine(base, adapters={"sharp": "nowhere"}, length=10**7)


def test_what_cannot_be_served_is_said(base, tmp_path):
    cases = {
        ("--cache", "int4"): "--cache int4: expected float32, bfloat16 or int8",
        ("--adapter-dir", tmp_path / "none"): "expected a directory, from which adapters may be loaded",
        ("--devices", 2): "--devices 2: goes with --layout",
        ("--layout", "tensr=2"): "did you mean 'tensor'?",
        ("--layout", "tensor=64", "--port", 0): "; --devices 64 simulates them on the CPU",
        ("--host", "256.0.0.1"): "256.0.0.1:8000: cannot be served",
    }
    for arguments, said in cases.items():
        done = subprocess.run(command(base, *arguments), capture_output=True, text=True)
        assert done.returncode == 2
        assert said in done.stderr
