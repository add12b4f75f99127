"""Floating-point operations that a model needs: the numerator of MFU."""

from __future__ import annotations

from trainfw.models.decoder.config import ModelConfig


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of training (forward and backward) on one token of sequences of `sequence_length` tokens.

        6 * N + 12 * H * h * (sum over layers of the tokens that a token attends to)

    N counts the parameters that multiply every token: the layers' matrices and the output head, once, tied or
    not; embedding lookups, norms and biases do no matrix product. Of a mixture of experts it counts the router, the
    shared experts and as many experts as a token goes to, never the empty slots or what is dropped. Forward is 2
    FLOPs a parameter, backward twice that. Attention forward is 4 * H * h for each token attended to (2 for the
    scores, 2 for the weighted sum). A causal layer attends to S / 2 tokens on average, one with a window W < S to
    W - W**2 / (2 * S). What remat computes again is never counted.

    Source: PaLM (arXiv:2204.02311), appendix B, with the causal half of the attention square counted rather than
    the whole, as in the scaling book (jax-ml.github.io/scaling-book/transformers).
    """
    D, F, width = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    attention = 2 * D * width + 2 * D * config.num_kv_heads * config.head_dim
    feed_forward = 3 * D * F
    if config.moe is not None:
        shared = config.moe.shared_intermediate_size or 0
        feed_forward = 3 * D * (config.moe.experts_per_token * F + shared) + D * config.moe.num_experts
    matrices = config.num_layers * (attention + feed_forward) + D * config.vocab_size
    attended = 0.0
    for kind in config.layer_kinds:
        window = min(config.sliding_window or sequence_length, sequence_length)
        span = window if kind == "sliding" else sequence_length
        attended += span - span**2 / (2 * sequence_length)
    return 6.0 * matrices + 12.0 * width * attended
