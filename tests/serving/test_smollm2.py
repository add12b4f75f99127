"""Real weights: an engine under way writes what Transformers writes of each prompt alone."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

from tests.gguf_files import smollm2_file
from trainfw.data import load_tokenizer
from trainfw.interop import copy_model, open_model
from trainfw.serving import Sampling, load_engine

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Here is a recipe for bread.",
    "In 1969 men landed on the moon, and",
)


@pytest.mark.long
def test_greedy_tokens_are_those_of_transformers_whatever_shares_the_batch(tmp_path):
    directory = tmp_path / "model"
    copy_model(open_model(smollm2_file()), directory, companions=load_tokenizer(smollm2_file()).save)
    engine, tokenizer = load_engine(directory, slots=5, length=256, chunk=32)
    prompts = [tokenizer.encode(text) * times for text in TEXTS for times in (1, 2, 5, 9)]
    try:
        answers, early = [], {}
        for i, prompt in enumerate(prompts):
            answers.append(engine.submit(prompt, Sampling(max_tokens=64)))
            engine.submit(prompt[::-1], Sampling(max_tokens=100, temperature=1.0, top_p=0.9)).cancel()
            if i % 3 == 0:  # those that follow arrive while others are written
                early[i] = [answers[-1].next()]
        found = [[each.token for each in (*early.get(i, []), *answer)] for i, answer in enumerate(answers)]
    finally:
        engine.close()
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, eos_token_id=None
        )
        assert tokens == out[0, len(prompt) :].tolist(), prompt
