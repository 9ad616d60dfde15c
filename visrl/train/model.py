"""The policy at the start of its stage: weights in the right type, an adapter on them, and what is frozen."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
import transformers

from visrl.config import ConfigError
from visrl.models.adapters import load_merged, read_adapter
from visrl.models.attention import use_tree_attention
from visrl.models.chain import adapter_chain
from visrl.models.family import Family
from visrl.models.load import check_weights, load_config
from visrl.models.parts import base_model, language_model, projector, switch_off_dropout, vision_names, vision_tower
from visrl.models.router import experts_of_a_token, own_weight
from visrl.train.config import TrainConfig


def check_policy(config: TrainConfig) -> None:
    """Refuse what `prepare_model` would, as far as files say it, before data are read.

    Raises:
        CheckpointError: weights or an adapter that are missing, damaged, or belong to another model.
    """
    known = load_config(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    check_weights(config.model_name_or_path, known)
    for adapter in adapter_chain(config.model_name_or_path, config.adapter_name_or_path):
        read_adapter(adapter)


OF_TREES = ("attention", "bin_length", "feature_cache_gb")


def check_layout(config: TrainConfig, family: Family) -> None:
    """Refuse keys about prefix trees where there are none.

    Raises:
        ConfigError: names the first.
    """
    if family.plain and (given := [key for key in OF_TREES if key in config.model_fields_set]):
        raise ConfigError(f"{given[0]}: it is about prefix trees, and {family.plain}; leave the key out")


def router_weight(config: TrainConfig, known: Any) -> float:
    """What the router loss of a mixture of experts weighs beside the loss of a stage, 0 where none is added: `known` is
    the checkpoint's config, whose own wish holds where the key says nothing.

    Raises:
        ConfigError: a weight is given, and the model has no such loss.
    """
    given = config.router_aux_loss_coef
    if given and experts_of_a_token(known) is None:
        raise ConfigError(
            f"router_aux_loss_coef: {known.model_type} gives no router logits in transformers "
            f"{transformers.__version__}, so there is nothing to weigh; leave the key out"
        )
    return own_weight(known) if given is None else given


def prepare_model(config: TrainConfig, *, plain: bool = False) -> torch.nn.Module:
    """The policy at the start of its stage: an adapter given is merged first, then a new one is put on.

    The reference of a stage is this model before its first step (a new LoRA adapter starts as the identity). Where it
    is trained in the `plain` form, its attention stays its own.

    Raises:
        ConfigError: keys that do not go together, or what they ask for is not installed.
        CheckpointError: no model at `model_name_or_path`, or an adapter that does not fit it.
    """
    options: dict[str, Any] = {"quantization_config": quantization(config)} if config.quantization_bit else {}
    chain = adapter_chain(config.model_name_or_path, config.adapter_name_or_path)
    merged = [read_adapter(adapter) for adapter in chain]
    options |= {"dtype": weight_dtype(config), "trust_remote_code": config.trust_remote_code}
    model = load_merged(config.model_name_or_path, merged, **options)
    if not plain:
        use_tree_attention(model, config.attention)
    if config.stage != "sft":
        switch_off_dropout(model)  # policy and reference, and what samples online, must be the same function
    if config.finetuning_type == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha or 2 * config.lora_rank,
            lora_dropout=config.lora_dropout,
            target_modules=lora_targets(model, config.lora_target),
        )
        with warnings.catch_warnings():  # PEFT asks transformers by an older name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return get_peft_model(model, lora)
    if config.freeze_vision_tower:
        vision_tower(model).requires_grad_(False)
    if config.freeze_multi_modal_projector:
        projector(model).requires_grad_(False)
    if config.freeze_language_model:
        language_model(model).requires_grad_(False)
    return model


def lora_targets(model: torch.nn.Module, target: str) -> list[str]:
    """Names of the linear layers that get an adapter: "all" is every one of the language model, the output layer left
    out; otherwise a comma-separated list of last names (q_proj,v_proj).

    Raises:
        ConfigError: a name that no layer has.
    """
    decoder = language_model(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linear = [f"{prefix}.{name}" for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    if target == "all":
        return linear
    wanted = {name.strip() for name in target.split(",")}
    chosen = [name for name in linear if name.rsplit(".", 1)[1] in wanted]
    missing = wanted - {name.rsplit(".", 1)[1] for name in chosen}
    if missing:
        known = sorted({name.rsplit(".", 1)[1] for name in linear})
        raise ConfigError(f"lora_target: no layer is called {', '.join(sorted(missing))}; there are {', '.join(known)}")
    return chosen


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """The type in which weights are loaded: bf16 where nothing but an adapter is trained, or everything is to be in
    bf16; else fp32, as small steps on bf16 weights would be lost in rounding."""
    bf16 = bool(config.training_arguments().get("bf16"))
    frozen = config.finetuning_type == "lora"
    return torch.bfloat16 if config.pure_bf16 or (bf16 and frozen) else torch.float32


def quantization(config: TrainConfig) -> Any:
    """How bitsandbytes is to keep the frozen weights; vision tower and projector stay as they are.

    Raises:
        ConfigError: weights that are quantised cannot be trained or merged into, or bitsandbytes is missing.
    """
    if config.finetuning_type != "lora":
        raise ConfigError("quantization_bit: quantised weights cannot be trained; set finetuning_type=lora (QLoRA)")
    if config.adapter_name_or_path:
        raise ConfigError("quantization_bit: an adapter is not merged into quantised weights; `visrl export` it first")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            'quantization_bit needs bitsandbytes, which is not installed: pip install "visrl[bitsandbytes]"'
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=config.quantization_bit == 4,
        load_in_8bit=config.quantization_bit == 8,
        bnb_4bit_quant_type=config.quantization_type,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=weight_dtype(config),
        llm_int8_skip_modules=[*vision_names(), "lm_head"],
    )


def make_tied_embedding_sparse(model: torch.nn.Module) -> None:
    """Have an embedding that is the output layer, too, give its gradient for the tokens it read and no others.

    Autograd adds it to the output layer's, which is dense: the sum is the same, and one tensor of vocabulary × hidden
    size less is in memory meanwhile. Not for several processes: DDP would expect the sum to be sparse, too.
    """
    base = base_model(model)
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(embedding, torch.nn.Embedding) and output is not None and output.weight is embedding.weight:
        embedding.sparse = True
