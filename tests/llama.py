"""llama.cpp, by the C functions of the library in xllamacpp's wheel, whose own interface is a server's.

Structures are those of llama.h at the version that pyproject.toml names.
"""

import ctypes
import importlib.util
import re
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_bool, c_byte, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path

import numpy as np
import pytest


class _ModelParams(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("devices", "tensor_buft_overrides")],
        *[(name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")],
        *[(name, c_void_p) for name in ("tensor_split", "progress_callback", "user_data", "kv_overrides")],
        *[(name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")],
        ("load_mtp", c_bool),
    ]


class _ContextParams(ctypes.Structure):
    _fields_ = [
        *[(name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max")],
        ("n_outputs_max_per_seq", c_uint32),
        *[(name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")],
        *[(name, c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")],
        *[(name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")],
        *[(name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")],
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        *[(name, c_void_p) for name in ("cb_eval", "cb_eval_user_data")],
        *[(name, c_int32) for name in ("type_k", "type_v")],
        *[(name, c_void_p) for name in ("abort_callback", "abort_callback_data")],
        *[(name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")],
        *[("samplers", c_void_p), ("n_samplers", c_size_t), ("ctx_other", c_void_p)],
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        *[("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32))],
        *[("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_byte))],
    ]


_FUNCTIONS = {
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_print_system_info": (c_char_p, []),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "llama_free": (None, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
}
_CALLBACK = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda *_: None)  # logs nothing


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("xllamacpp is not installed")
    library = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("*.so"))))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(ctypes.cast(_CALLBACK, c_void_p), None)
    return library


class Llama:
    """A GGUF file in llama.cpp, with two threads; closed at the end of a `with`.

    Args:
        adapter: another file, of a LoRA on it.
        exact: attention in 32 bits, keys and values too; else as llama.cpp has them by default, which is faster.
    """

    def __init__(
        self,
        file: Path,
        *,
        adapter: Path | None = None,
        vocab_only: bool = False,
        length: int = 128,
        exact: bool = True,
    ):
        self._library = _library()
        params = self._library.llama_model_default_params()
        assert (params.vocab_only, params.use_extra_bufts) == (False, True), "not the structure of this version"
        params.vocab_only = vocab_only
        self._context = self._model = self._library.llama_model_load_from_file(str(file).encode(), params)
        assert self._model, f"llama.cpp does not load {file}"
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.vocab_size = self._library.llama_vocab_n_tokens(self._vocab)
        self.bos = self._library.llama_vocab_bos(self._vocab)
        self.eos = self._library.llama_vocab_eos(self._vocab)
        self._place = 0
        if not vocab_only:
            settings = self._library.llama_context_default_params()
            assert (settings.type_k, settings.type_v) == (1, 1), "not the structure of this version"
            settings.n_ctx, settings.n_threads, settings.n_threads_batch = length, 2, 2
            if exact:
                settings.type_k = settings.type_v = settings.flash_attn_type = 0
            self._context = self._library.llama_init_from_model(self._model, settings)
            assert self._context, "llama.cpp makes no context"
        if adapter is not None:
            lora = c_void_p(self._library.llama_adapter_lora_init(self._model, str(adapter).encode()))
            assert lora, f"llama.cpp does not load {adapter}"  # freed with the model
            assert self._library.llama_set_adapters_lora(self._context, lora, 1, c_float(1)) == 0

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, *_: object) -> None:
        if self._context != self._model:
            self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        data = text.encode()
        tokens = (c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), False, special)
        assert count >= 0
        return list(tokens[:count])

    def metadata(self, key: str) -> str:
        value = ctypes.create_string_buffer(1 << 16)
        assert self._library.llama_model_meta_val_str(self._model, key.encode(), value, len(value)) >= 0, key
        return value.value.decode()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after each of `tokens`, which come after those of the calls before; (tokens, vocabulary)."""
        return self._decode(tokens, len(tokens)).copy()

    def write(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        """The likeliest tokens after a prompt, which comes after those of the calls before."""
        read = prompt
        for _ in range(count):
            token = int(self._decode(read, 1)[0].argmax())
            yield token
            read = [token]

    def _decode(self, tokens: Sequence[int], rows: int) -> np.ndarray:
        """Logits after the last of `tokens`, as many as `rows` says, until the next call."""
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, self._place + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index >= len(tokens) - rows
        assert self._library.llama_decode(self._context, batch) == 0
        self._library.llama_batch_free(batch)
        self._place += len(tokens)
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (rows, self.vocab_size))

    def reset(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._place = 0

    def instructions(self) -> list[str]:
        """The processor's, of which this build makes use."""
        info = self._library.llama_print_system_info().decode()
        return [name.split()[-1] for name in re.findall(r"[\w ]+(?= = 1)", info)]
