"""What the models of `parity` are: small random ones of every architecture, and what each is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyxlbert.testing.models import randomize

SMALL = {
    **{"vocab_size": 60, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 80},
    **{"max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
# Of Wav2Vec2's Conformers; their positions are relative, or nothing of theirs is replaced.
_SPEECH = {
    **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80},
    **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0},
    **{"conformer_conv_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False, "mask_time_prob": 0.0},
    **{"position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3},
}
_FASTSPEECH = {
    **{"layers": 2, "num_attention_heads": 4, "linear_units": 80, "dropout_rate": 0.0, "kernel_size": 3},
    **{"positional_dropout_rate": 0.0, "attention_dropout_rate": 0.0, "normalize_before": False},
    "concat_after": False,
}
# Where a configuration has other names, or needs more than SMALL.
_FIELDS: dict[str, dict[str, Any]] = {
    "distilbert": {
        **{"dim": 48, "n_heads": 4, "n_layers": 3, "hidden_dim": 80, "dropout": 0.0, "attention_dropout": 0.0},
        **{"vocab_size": 60, "max_position_embeddings": 40},
    },
    "albert": SMALL | {"embedding_size": 16},
    "electra": SMALL | {"embedding_size": 16},
    "xlnet": {"vocab_size": 60, "d_model": 48, "n_layer": 3, "n_head": 4, "d_inner": 80, "dropout": 0.0},
    "funnel": {
        **{"vocab_size": 60, "block_sizes": [1, 1], "d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 80},
        **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
        "architectures": ["FunnelModel"],
    },
    "parakeet_encoder": {
        **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"intermediate_size": 80, "num_mel_bins": 16, "subsampling_conv_channels": 4, "conv_kernel_size": 3},
        **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0},
    },
    "wav2vec2-bert": _SPEECH | {"feature_projection_input_dim": 10},
    "wav2vec2-conformer": _SPEECH
    | {"num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 4, "num_feat_extract_layers": 2}
    | {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (4, 2)},
    "seamless_m4t": {
        **{"hidden_size": 48, "speech_encoder_layers": 2, "speech_encoder_attention_heads": 4},
        **{"speech_encoder_intermediate_size": 80, "speech_encoder_dropout": 0.0, "speech_encoder_layerdrop": 0.0},
        **{"feature_projection_input_dim": 10, "conv_depthwise_kernel_size": 3, "adaptor_dropout": 0.0},
    },
    "fastspeech2_conformer": {
        **{"hidden_size": 48, "vocab_size": 60, "num_mel_bins": 6, "speech_decoder_postnet_units": 8},
        **{f"{one}_predictor_channels": 8 for one in ("duration", "pitch", "energy")},
        **{"encoder_config": _FASTSPEECH, "decoder_config": _FASTSPEECH},
    },
}
LENGTHS = (12, 7, 1, 9)


def build(kind: str) -> Any:
    """A random model of transformers; of SeamlessM4T its encoder of speech."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **_FIELDS.get(kind, SMALL))
    if kind == "seamless_m4t":
        from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TSpeechEncoder

        model = SeamlessM4TSpeechEncoder(config)
    else:
        model = transformers.AutoModel.from_config(config)
    generator = torch.Generator().manual_seed(0)
    randomize(model, generator)
    with torch.no_grad():
        for one in model.modules():
            # Not all have a name by which `randomize` knows them: small ones would leave nothing to attend by.
            if isinstance(one, torch.nn.LayerNorm | torch.nn.BatchNorm1d):
                one.weight.copy_(1 + 0.2 * torch.randn(one.weight.shape, generator=generator))
    return model.eval()


def given(model: Any) -> dict[str, Tensor]:
    """The arguments of a call: random ids, or features in the model's dtype, and ``attention_mask`` ``[B, T]``.

    Raises:
        ValueError: the model takes neither.
    """
    name, config = getattr(model, "main_input_name", "input_ids"), model.config  # ours take ids
    generator = torch.Generator().manual_seed(1)
    if name == "input_ids":
        mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        ids = torch.randint(5, config.vocab_size, mask.shape, generator=generator)
        padding = getattr(config, "pad_token_id", 0)  # a speech synthesiser's configuration names none
        ids = ids if padding is None else torch.where(mask, ids, padding)
        return {name: ids, "attention_mask": mask.long()}
    if name not in ("input_features", "input_values"):
        raise ValueError(f"its input is {name}, wanted input_ids, input_features or input_values")
    each, width = _each(config), getattr(config, "feature_projection_input_dim", getattr(config, "num_mel_bins", None))
    mask = torch.arange(max(LENGTHS) * each) < torch.tensor(LENGTHS)[:, None] * each
    shape = mask.shape if name == "input_values" else (*mask.shape, width)
    x = torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)
    return {name: x, "attention_mask": mask.long()}


def _each(config: Any) -> int:
    """Frames or samples that make a place of the output."""
    if hasattr(config, "subsampling_factor"):
        return config.subsampling_factor
    if hasattr(config, "adaptor_stride"):
        return config.adaptor_stride
    # The first convolution of a waveform reaches further than its stride.
    strides = getattr(config, "conv_stride", None)
    return math.prod(strides) + max(config.conv_kernel) if strides else 1


def call(model: Any, arguments: dict[str, Tensor], **options: bool) -> Any:
    """The output; of a speech synthesiser, which makes as many frames as it has predicted, that of its encoder."""
    if hasattr(model, "duration_predictor"):
        masks = arguments["attention_mask"].unsqueeze(-2)
        return model.encoder(arguments["input_ids"], masks, return_dict=True, **options)
    return model(**arguments, **options)


def tokens(model: Any, arguments: dict[str, Tensor], states: Tensor) -> Tensor:
    """Of hidden states ``[B, T, E]`` those of tokens, ``[total, E]``."""
    mask, places = arguments["attention_mask"], states.shape[1]
    if hasattr(model, "_get_feature_vector_attention_mask") and places != mask.shape[1]:
        mask = model._get_feature_vector_attention_mask(places, mask)
    elif places != mask.shape[1]:
        mask = mask[:, :: mask.shape[1] // places][:, :places]
    return states[mask.bool()]
