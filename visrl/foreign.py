"""Keys that users bring along: of older releases, of transformers, and of the program whose configs the reference uses.

Those that say the same are translated. Those that have nothing to say here are named when a config is read. Those that
would change what is done are refused, with what to write instead; switched off, they say what is so anyway.
"""

from __future__ import annotations

# Keys of earlier releases of ours: a line says what each is called now.
RENAMED: dict[str, str] = {
    "codec": "box_codec",
    "questions": "max_samples",
    "limit": "max_samples",
}

# Other names of a key, as they are typed elsewhere.
ALIASES: dict[str, str] = RENAMED | {
    "critic.box": "use_box_critic",  # the paper's name for an ablation
    "warmup_ratio": "warmup_steps",  # a float below 1 is a share of all steps
    "evaluation_strategy": "eval_strategy",
    "media_dir": "image_root",
    "enable_liger_kernel": "use_liger_kernel",
    "no_cuda": "use_cpu",
    "num_ppo_epochs": "num_iterations",  # PPO's names, of TRL and of LLaMA-Factory, for what GRPO has, too
    "ppo_epochs": "num_iterations",
    "cliprange": "epsilon",
    "response_length": "max_completion_length",
    "ppo_whiten_rewards": "whiten_rewards",
    "moe_aux_loss_coef": "router_aux_loss_coef",
}

_NO_VIDEO, _NO_SOUND = "there are no videos", "there is no sound"
_CACHE, _SERIAL = "nothing is cached between runs", "rows are read as they are needed"
_ATTENTION = "attention says how"
_ENVIRONMENT = "HF_HOME and HF_TOKEN of the environment say so"
NO_MEANING: dict[str, str] = {
    "template": "the checkpoint's own chat template is used",
    "video_max_pixels": _NO_VIDEO,
    "video_min_pixels": _NO_VIDEO,
    "video_fps": _NO_VIDEO,
    "video_fps_minlen": _NO_VIDEO,
    "video_maxlen": _NO_VIDEO,
    "use_audio_in_video": _NO_SOUND,
    "audio_sampling_rate": _NO_SOUND,
    "overwrite_cache": _CACHE,
    "preprocessing_num_workers": _SERIAL,
    "preprocessing_batch_size": _SERIAL,
    "buffer_size": _SERIAL,
    "tokenized_path": _CACHE,
    "use_fast_tokenizer": "the checkpoint's own tokenizer is used",
    "low_cpu_mem_usage": "weights are read one by one anyway",
    "flash_attn": _ATTENTION,
    "packing": "items are packed wherever the model takes it (layout), and see nothing of each other",
    "neat_packing": "items are packed wherever the model takes it (layout), and see nothing of each other",
    "disable_gradient_checkpointing": "gradient_checkpointing is off unless it is set",
    "use_reentrant_gc": "gradient_checkpointing_kwargs says how",
    "enable_thinking": "the checkpoint's own chat template is used",
    "print_param_status": "the first lines say what is trained",
    "ignore_pad_token_for_loss": "nothing is padded",
    "cache_dir": _ENVIRONMENT,
    "hf_hub_token": _ENVIRONMENT,
    "ms_hub_token": _ENVIRONMENT,
    "om_hub_token": _ENVIRONMENT,
    "logging_dir": "report_to's own variables say where",
    "save_safetensors": "weights are always safetensors",
    "quantization_method": "quantization_bit is bitsandbytes'",
}

_PLAIN_LORA = "an adapter here is plain LoRA; leave it out"
_OPTIMISER = "name an optimiser of transformers by optim"
_VOCABULARY = "the vocabulary stays the checkpoint's; leave it out"
_SCORER = "name the folder that stage: rm made among the rewards: [model:PATH]"
SWITCHED_OFF: dict[str, str] = {
    "eval_dataset": "val_size holds items of dataset out to validate on; rollout_dataset and rollout_samples name "
    "held-out samples that are rolled out",
    "streaming": "data sets are read from files; leave it out",
    "mix_strategy": "give data sets one after another; only concat is done",
    "interleave_probs": "give data sets one after another; only concat is done",
    "train_on_prompt": "only replies are learned; leave it out",
    "mask_history": "every reply of a row is learned; leave it out",
    "eval_on_each_dataset": "`visrl eval` scores each data set by itself; leave it out",
    "eval_num_beams": "rollouts are greedy; leave it out",
    "tool_format": "there are no tool calls here; leave it out",
    "predict_with_generate": "`visrl eval` generates and scores; leave it out",
    "compute_accuracy": "`visrl eval` scores answers and boxes; leave it out",
    "group_by_length": "what shares a batch is decided by pictures; leave it out",
    "use_unsloth": "leave it out",
    "use_unsloth_gc": "use gradient_checkpointing",
    "shift_attn": "leave it out",
    "rope_scaling": "the checkpoint's own positions are used; leave it out",
    "mixture_of_depths": "leave it out",
    "upcast_layernorm": "weights that are trained are kept in fp32 under bf16 anyway; leave it out",
    "upcast_lmhead_output": "log-probabilities are computed in fp32 anyway; leave it out",
    "train_from_scratch": "name a checkpoint of random weights as model_name_or_path",
    "resize_vocab": _VOCABULARY,
    "add_tokens": _VOCABULARY,
    "add_special_tokens": _VOCABULARY,
    "new_special_tokens_config": _VOCABULARY,
    "split_special_tokens": _VOCABULARY,
    "image_do_pan_and_scan": "pictures are given whole and as crops; leave it out",
    "crop_to_patches": "the checkpoint's own processor says how; leave it out",
    "model_revision": "download that revision and name its folder as model_name_or_path",
    "adapter_folder": "write the adapter's whole path as adapter_name_or_path",
    "use_dora": _PLAIN_LORA,
    "use_rslora": _PLAIN_LORA,
    "pissa_init": _PLAIN_LORA,
    "loraplus_lr_ratio": _PLAIN_LORA,
    "use_llama_pro": _PLAIN_LORA,
    "additional_target": "lora_target names the layers that get an adapter; set finetuning_type=full to train more",
    "use_galore": _OPTIMISER,
    "use_apollo": _OPTIMISER,
    "use_badam": _OPTIMISER,
    "use_adam_mini": _OPTIMISER,
    "use_muon": _OPTIMISER,
    "train_mm_proj_only": "set finetuning_type=full, freeze_language_model=true, freeze_multi_modal_projector=false",
    "pref_bco_weight": "leave it out",
    "ref_model": "the reference is the model at the start of its stage; leave it out",
    "ref_model_adapters": "the reference is the model at the start of its stage; leave it out",
    "reward_model": _SCORER,
    "reward_model_path": _SCORER,
    "reward_model_adapters": _SCORER,
    "ppo_score_norm": "advantages are whitened over the step; leave it out",
    "ppo_target": "the weight of the KL is kl_coef throughout; leave it out",
    "missing_eos_penalty": "mask_truncated_completions leaves out what was cut off; leave it out",
    "use_swanlab": "write report_to: swanlab",
    "use_ray": "start processes with torchrun or accelerate launch",
    "fp8": "use bf16, or quantization_bit",
    "quantization_device_map": "weights lie on the device that trains; leave it out",
    "export_quantization_bit": "export writes export_dtype; quantise the folder with a tool of your server",
    "export_quantization_dataset": "export writes export_dtype; quantise the folder with a tool of your server",
    "export_hub_model_id": "nothing is uploaded; send the folder with `hf upload`",
}
