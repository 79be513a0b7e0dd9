"""The keys of networks' configurations: which were compared with diffusers, which change nothing, which are refused.

A network is built by diffusers or transformers from its configuration, so a key that only builds it is honoured. What
the lists below are for: a key that a pipeline reads, a key that only some loaders read, and a key of a later release,
which nobody here has compared. `docs/config-keys.md` has the table, made by tests/config_walk.py.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from redif_sdk.errors import UnsupportedModel

__all__ = ["HARMLESS", "HONOURED", "check_config", "check_text_config"]

_log = logging.getLogger(__name__)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BLOCKS = _words(
    "act_fn attention_head_dim block_out_channels center_input_sample class_embed_type down_block_types "
    "downsample_padding flip_sin_to_cos freq_shift in_channels layers_per_block mid_block_scale_factor mid_block_type "
    "norm_eps norm_num_groups num_class_embeds out_channels resnet_time_scale_shift sample_size time_embedding_dim "
    "time_embedding_type up_block_types"
)
_TRANSFORMER = _words(
    "activation_fn attention_bias attention_head_dim in_channels norm_elementwise_affine norm_eps norm_type "
    "num_attention_heads num_layers out_channels patch_size sample_size"
)

#: By class: the keys that its images, or the states of prompts, depend on. The tests compare each with diffusers.
HONOURED: dict[str, frozenset[str]] = {
    "UNet2DModel": _BLOCKS
    | _words("add_attention attn_norm_num_groups downsample_type num_train_timesteps upsample_type"),
    "UNet2DConditionModel": _BLOCKS
    | _words(
        "addition_embed_type addition_embed_type_num_heads addition_time_embed_dim attention_type "
        "class_embeddings_concat conv_in_kernel conv_out_kernel cross_attention_dim cross_attention_norm "
        "dual_cross_attention encoder_hid_dim encoder_hid_dim_type mid_block_only_cross_attention num_attention_heads "
        "only_cross_attention projection_class_embeddings_input_dim resnet_out_scale_factor resnet_skip_time_act "
        "reverse_transformer_layers_per_block time_cond_proj_dim time_embedding_act_fn timestep_post_act "
        "transformer_layers_per_block upcast_attention use_linear_projection"
    ),
    "SD3Transformer2DModel": _words(
        "attention_head_dim caption_projection_dim dual_attention_layers in_channels joint_attention_dim "
        "num_attention_heads num_layers out_channels patch_size pooled_projection_dim pos_embed_max_size qk_norm "
        "sample_size"
    ),
    "FluxTransformer2DModel": _words(
        "attention_head_dim axes_dims_rope guidance_embeds in_channels joint_attention_dim num_attention_heads "
        "num_layers num_single_layers out_channels patch_size pooled_projection_dim"
    ),
    "PixArtTransformer2DModel": _TRANSFORMER
    | _words("attention_type caption_channels cross_attention_dim interpolation_scale use_additional_conditions"),
    "DiTTransformer2DModel": _TRANSFORMER | _words("num_embeds_ada_norm"),
    "AutoencoderKL": _words(
        "act_fn block_out_channels latent_channels latents_mean latents_std layers_per_block mid_block_add_attention "
        "norm_num_groups out_channels scaling_factor shift_factor up_block_types use_post_quant_conv"
    ),
    "AutoencoderTiny": _words(
        "act_fn block_out_channels decoder_block_out_channels latent_channels latents_mean latents_std "
        "num_decoder_blocks out_channels scaling_factor shift_factor upsample_fn upsampling_scaling_factor"
    ),
    "CLIPTextConfig": _words(
        "eos_token_id hidden_act hidden_size intermediate_size layer_norm_eps max_position_embeddings "
        "num_attention_heads num_hidden_layers projection_dim return_dict use_attention_mask vocab_size"
    ),
    "T5Config": _words(
        "d_ff d_kv d_model feed_forward_proj is_decoder layer_norm_epsilon num_heads num_layers "
        "relative_attention_max_distance relative_attention_num_buckets return_dict use_attention_mask vocab_size"
    ),
}

#: What a text encoder's configuration says of training, of generation and of the files: states do not depend on it.
_TEXT_HARMLESS = _words(
    "add_cross_attention architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens bos_token_id "
    "chunk_size_feed_forward classifier_dropout cross_attention_hidden_size decoder_start_token_id dense_act_fn "
    "diversity_penalty do_sample dropout dropout_rate dtype early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing "
    "id2label initializer_factor initializer_range is_encoder_decoder is_gated_act label2id length_penalty max_length "
    "min_length model_type n_positions no_repeat_ngram_size num_beam_groups num_beams num_decoder_layers "
    "num_return_sequences output_attentions output_hidden_states output_past output_scores pad_token_id prefix "
    "problem_type pruned_heads remove_invalid_values repetition_penalty return_dict_in_generate scale_decoder_outputs "
    "sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder "
    "tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p "
    "use_bfloat16 use_cache"
)

#: By class: keys that were tried and change neither images nor states.
HARMLESS: dict[str, frozenset[str]] = {
    "UNet2DModel": _words("dropout"),
    "UNet2DConditionModel": _words("dropout"),
    "SD3Transformer2DModel": frozenset(),
    "FluxTransformer2DModel": frozenset(),
    # of Transformer2DModel, of which these two classes were a part
    "PixArtTransformer2DModel": _words(
        "double_self_attention dropout norm_num_groups num_embeds_ada_norm num_vector_embeds only_cross_attention "
        "upcast_attention use_linear_projection"
    ),
    "DiTTransformer2DModel": _words(
        "attention_type caption_channels cross_attention_dim double_self_attention dropout norm_num_groups "
        "num_vector_embeds only_cross_attention upcast_attention use_linear_projection"
    ),
    # of the encoder, of training, and of half precision
    "AutoencoderKL": _words("down_block_types force_upcast in_channels sample_size use_quant_conv"),
    "AutoencoderTiny": _words(
        "encoder_block_out_channels force_upcast in_channels latent_magnitude latent_shift num_encoder_blocks"
    ),
    "CLIPTextConfig": _TEXT_HARMLESS,
    "T5Config": _TEXT_HARMLESS | {"eos_token_id"},
}


def check_config(network: Any, where: str) -> None:
    """Raise UnsupportedModel for a key of a network's configuration that its class reads and that is in no list here.

    A key that the class does not know is ignored, as diffusers does, with one line in the log.
    """
    kind = next((base for base in type(network).__mro__ if base.__name__ in HONOURED), None)
    if kind is None:
        return
    defaults = {name: one.default for name, one in inspect.signature(kind).parameters.items()}
    _refuse_unknown(kind, network.config, defaults, where, "it is ignored, as in diffusers")


def check_text_config(config: Any, where: str, layout: str) -> None:
    """Raise UnsupportedModel for a text encoder's setting that a pipeline or only some loaders honour.

    Args:
        config: of transformers.
        where: the part's name, for the message.
        layout: of the pipeline's text encoders (`redif_sdk.models.families.LAYOUTS`).
    """
    kind = next((base for base in type(config).__mro__ if base.__name__ in HONOURED), None)
    if kind is None:
        return
    if getattr(config, "return_dict", True) is False:
        raise UnsupportedModel(f"the {where} has return_dict=false in its config.json; remove it")
    if layout == "sd" and getattr(config, "use_attention_mask", False):
        raise UnsupportedModel(
            f"the {where} has use_attention_mask in its config.json: its pipeline masks the padding of prompts, which "
            "is not supported; use a text encoder without it"
        )
    if kind.__name__ == "T5Config":
        _check_activation(config, where)
    _refuse_unknown(kind, config.to_dict(), kind().to_dict(), where, "it is ignored")


def _refuse_unknown(
    kind: type, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str, ignored: str
) -> None:
    """Raise for a key in no list that is not at its class's default; a key that the class lacks is ``ignored``."""
    known = HONOURED[kind.__name__] | HARMLESS[kind.__name__]
    for key, value in config.items():
        if key.startswith("_") or key in known:
            continue
        if key not in defaults:
            _log.warning("%s: %s does not know the key %s; %s", where, kind.__name__, key, ignored)
        elif not _same(value, defaults[key]):
            raise _unknown(where, kind.__name__, key, value)


def _check_activation(config: Any, where: str) -> None:
    """Refuse T5's derived settings where they are not those of feed_forward_proj, which deployment goes by."""
    derived = type(config)(feed_forward_proj=config.feed_forward_proj)
    for key in ("dense_act_fn", "is_gated_act"):
        if getattr(config, key) != getattr(derived, key):
            raise UnsupportedModel(
                f"the {where} has {key}={getattr(config, key)!r} in its config.json, beside feed_forward_proj="
                f"{config.feed_forward_proj!r}; remove {key}"
            )


def _same(value: Any, default: Any) -> bool:
    plain = [
        list(one) if isinstance(one, tuple) else dict(one) if isinstance(one, Mapping) else one
        for one in (value, default)
    ]
    return bool(plain[0] == plain[1])


def _unknown(where: str, kind: str, key: str, value: Any) -> UnsupportedModel:
    return UnsupportedModel(
        f"{where} has {key}={value!r:.60}, a setting of {kind} that this release does not know, so its images could be "
        "others; update redif-sdk, or use an older diffusers"
    )
