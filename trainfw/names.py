"""Names of other trainers for our keys and values, so that whoever brings them is told ours."""

from __future__ import annotations


def _by_theirs(ours: dict[str, str]) -> dict[str, str]:
    return {theirs: name for name, listed in ours.items() for theirs in listed.split()}


KEYS = _by_theirs(
    {
        # Training: Transformers' TrainingArguments, TRL, Axolotl, LLaMA-Factory, torchtitan, nanoGPT, MaxText
        "train.steps": (
            "max_steps num_steps n_steps total_steps max_iters num_iters iterations train_steps training_steps"
        ),
        "train.steps (a run is as many steps as that says, of train.global_batch_size rows each)": (
            "epochs num_epochs num_train_epochs"
        ),
        "train.global_batch_size (the rows of an update, over all devices)": (
            "batch_size train_batch_size per_device_batch_size per_device_train_batch_size local_batch_size"
        ),
        "train.accumulation_steps (the microbatches of train.global_batch_size rows)": "micro_batch_size",
        "train.global_batch_size (validation takes the same)": "per_device_eval_batch_size",
        "train.accumulation_steps": """
            gradient_accumulation_steps grad_accum grad_accumulation_steps accumulate_grad_batches
            gradient_accumulation
        """,
        "train.compute_dtype": "precision mixed_precision mixed_precision_param dtype torch_dtype",
        "train.compute_dtype (bfloat16)": "bf16",
        "train.compute_dtype (bfloat16: float16 would need its loss scaled)": "fp16",
        "train.matmul_dtype (fp8)": "fp8",
        "train.remat": "gradient_checkpointing activation_checkpointing activation_checkpoint remat_policy",
        "train.log_every": "logging_steps log_interval log_freq log_steps",
        "train.validate_every": "eval_steps eval_interval eval_every val_check_interval evals_per_epoch",
        "train.validation_batches": "eval_iters max_eval_batches",
        "train.seed": "seed random_seed",
        "data.seed": "data_seed",
        "name (the same command goes on with the run of that name; see --resume)": "resume_from_checkpoint",
        # Optimizer
        "optimizer.learning_rate": "lr learning_rate max_lr peak_lr",
        "optimizer.final_fraction (of the peak)": "min_lr",
        "optimizer.final_fraction": "min_lr_ratio",
        "optimizer.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
        "optimizer.warmup_steps": "warmup warmup_iters",
        "optimizer.warmup_steps (in steps)": "warmup_ratio warmup_steps_fraction",
        "optimizer.decay_steps (of schedule: wsd; the others decay over the run)": "lr_decay_iters",
        "optimizer.name": "optim optimizer_type opt_type",
        "optimizer.b1": "adam_beta1 beta1",
        "optimizer.b2": "adam_beta2 beta2",
        "optimizer.epsilon": "adam_epsilon eps",
        "optimizer.weight_decay": "wd",
        "optimizer.clip_norm": "gradient_clipping gradient_clip gradient_clip_val grad_clip max_grad_norm max_norm",
        "optimizer.ema": "ema_decay ema_rate ema_max_decay ema_beta",
        "optimizer.ema (0.9999: its decay)": "use_ema ema_enable",
        # Data
        "data.source": """
            data.path data.name dataset datasets dataset_path dataset_name dataset_dir data_path data_dir data_files
            train_file train_files
        """,
        "data.format": "dataset_format dataset_type data.type",
        "data.text_field": "dataset_text_field text_column",
        "data.messages_field": "field_messages",
        "data.image_field": "image_column",
        "data.caption_field": "caption_column",
        "data.label_field": "label_column",
        "data.flip": "random_flip horizontal_flip",
        "data.sequence_length": """
            max_seq_length max_seq_len max_length seq_len seq_length sequence_len context_length cutoff_len block_size
            max_target_length
        """,
        "data.validation_fraction": "val_set_size validation_split test_size",
        "data.max_documents": "max_samples max_train_samples",
        "data.loss_on": "train_on_inputs assistant_only_loss roles_to_train",
        "data.system_prompt": "default_system_message",
        "data.cache_dir": "dataset_prepared_path",
        "data.prefetch": "num_workers dataloader_num_workers",
        "data.tokenizer.path": "tokenizer_name tokenizer_path tokenizer_file data.tokenizer.from",
        # Model
        "model.preset": "model.name model.flavor model.type model_name",
        "model.from": (
            "model.path base_model model_name_or_path model_path pretrained initial_load_path load_parameters_path"
        ),
        "model.hidden_size": "d_model dim emb_dim base_emb_dim n_embd",
        "model.intermediate_size": "d_ff ffn_dim mlp_dim",
        "model.num_layers": "n_layer n_layers num_hidden_layers depth",
        "model.num_heads": "n_head n_heads num_attention_heads",
        "model.num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads",
        "model.tie_embeddings": "tie_word_embeddings",
        "model.norm_eps": "rms_norm_eps",
        "model.activation": "hidden_act",
        "model.max_position": "max_position_embeddings",
        "model.init_std": "initializer_range",
        "model.moe.num_experts": "num_local_experts",
        "model.moe.experts_per_token": "num_experts_per_tok",
        "model.moe.balance_loss": "router_aux_loss_coef",
        # Adapters: PEFT, Axolotl, LLaMA-Factory
        "adapter.rank": "r lora_r lora_rank",
        "adapter.alpha": "lora_alpha",
        "adapter.dropout": "lora_dropout",
        "adapter.targets": "lora_target target_modules lora_target_modules",
        "adapter.kind (dora)": "use_dora",
        "adapter.kind (rslora)": "use_rslora",
        "adapter.base (nf4)": "load_in_4bit",
        "adapter.base (int8)": "load_in_8bit",
        "adapter.base": "quantization_bit",
        "adapter.from": "adapter_name_or_path",
        # Losses of images: diffusers' training scripts
        "objective.min_snr_gamma": "snr_gamma",
        "objective.prediction": "prediction_type",
        "objective.betas": "beta_schedule",
        "objective.times": "weighting_scheme",
        "objective.drop_condition": "proportion_empty_prompts conditioning_dropout_prob class_dropout_prob",
        # Checkpoints
        "checkpoint.every": "save_steps save_every save_interval checkpoint.interval checkpoint_period",
        "checkpoint.keep_last": "save_total_limit keep_latest_k",
        "checkpoint.directory": "checkpoint.folder checkpoint.path checkpoint_dir",
        "name (a run is kept in runs/NAME, or where --run-dir says)": (
            "output_dir out_dir base_output_directory run_dir"
        ),
        "name": "run_name wandb_run_name",
        # Backend
        "backend.donate": "donate_argnums donate_state buffer_donation",
        # Parallelism: torchtitan, MaxText, Megatron, NxD
        "parallel.tensor": """
            tp tp_size tensor_parallel_size tensor_parallel_degree tensor_model_parallel_size ici_tensor_parallelism
            tensor_parallel
        """,
        "parallel.data": """
            dp dp_size data_parallel_size data_parallel_degree data_parallel_replicate_degree dcn_data_parallelism
            data_parallel
        """,
        "parallel.fsdp": "data_parallel_shard_degree ici_fsdp_parallelism",
        "parallel.pipeline": (
            "pp pp_size pipeline_parallel_size pipeline_parallel_degree pipeline_model_parallel_size pipeline_parallel"
        ),
        "parallel.pipeline_microbatches": "num_microbatches pipeline_parallel_microbatch_size",
        "parallel.context": "cp cp_size sp context_parallel_size context_parallel_degree context_parallel",
        "parallel.tensor (it splits the sequence, too)": "sequence_parallel",
        "parallel.expert": "ep ep_size expert_parallel_size expert_parallel_degree expert_parallel",
        "parallel.fsdp_shards": "zero_stage sharding_strategy",
    }
)
"""A key of theirs, in small letters, alone or with our section before it -> ours, perhaps with what to know of it."""

SECTIONS = _by_theirs(
    {
        "train": "training trainer training_args",
        "optimizer": "optim lr_scheduler",
        "data": "dataset datasets",
        "adapter": "lora peft",
        "parallel": "parallelism distributed mesh",
        "checkpoint": "checkpointing",
        "evaluation": "eval",
    }
)
"""A section of theirs -> the one of ours that holds the like."""

FIRST = {
    "model": "preset",
    "adapter": "kind",
    "data": "source",
    "tokenizer": "path",
    "optimizer": "name",
    "train": "steps",
    "evaluation": "metric",
    "checkpoint": "directory",
    "hardware": "topology",
}
"""A section of ours -> the key in it that a word in the section's place stands for."""

VALUES = _by_theirs(
    {
        "adamw": "adam adamw_torch adamw_torch_fused adamw_8bit paged_adamw_8bit",
        "bfloat16": "bf16 bf16-mixed fp16 float16 half 16",
        "float32": "fp32 f32 float 32",
        "fp8": "float8",
        "nf4": "4bit int4",
        "int8": "8bit",
        "cosine": "cosine_with_restarts",
        "constant": "constant_with_warmup",
        "wsd": "warmup_stable_decay",
        "full": "true",
        "dots": "selective minimal",
        "chat": "sharegpt messages conversational chat_template",
        "prompt_completion": "alpaca instruction",
        "text": "pretrain pretraining completion",
        "optimizer": "zero1 1",
        "gradients": "zero2 2",
        "parameters": "zero3 full_shard 3",
        "file": "huggingface",
        "rouge_l": "rouge",
        "exact_match": "accuracy",
        "v": "v_prediction",
    }
)
"""A value of theirs, in small letters -> ours, for the keys that take it."""
