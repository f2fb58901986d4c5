"""The Conformers of transformers that have a table: small random configurations, heads, batches and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from pyxlbert.testing import models

# Which places are tokens: right padding, and with holes where a model keeps them.
RIGHT = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
HOLES = torch.tensor([[1] * 7, [1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0]])
MASKS = {"none": None, "right": RIGHT, "holes": HOLES}
# Frames of Parakeet and samples of Wav2Vec2-Conformer that make a place.
FRAMES, SAMPLES = 8, 8

_W2V = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
_W2V |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0}
_W2V |= {"conformer_conv_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False}
_W2V |= {"mask_time_prob": 0.0, "vocab_size": 12, "conv_depthwise_kernel_size": 3}
_W2V |= {"position_embeddings_type": "relative"}


def _parakeet_fields() -> dict[str, Any]:
    fields = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3}
    fields |= {"intermediate_size": 20, "num_mel_bins": 16, "subsampling_conv_channels": 4, "dropout": 0.0}
    return fields | {"attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0, "conv_kernel_size": 3}


def _parakeet(**fields: Any) -> Any:
    return transformers.ParakeetEncoder(transformers.ParakeetEncoderConfig(**_parakeet_fields() | fields))


def _parakeet_ctc(**fields: Any) -> Any:
    config = {"encoder_config": _parakeet_fields() | fields, "vocab_size": 12, "pad_token_id": 11}
    return transformers.ParakeetForCTC(transformers.ParakeetCTCConfig(**config))


def _wav2vec2(head: str, **fields: Any) -> Any:
    small = {"num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 4, "conv_dim": (8, 8)}
    small |= {"conv_stride": (4, 2), "conv_kernel": (4, 2), "num_feat_extract_layers": 2, "ctc_zero_infinity": True}
    config = transformers.Wav2Vec2ConformerConfig(**_W2V | small | fields)
    return getattr(transformers, f"Wav2Vec2Conformer{head}")(config)


def _wav2vec2_bert(head: str, **fields: Any) -> Any:
    config = transformers.Wav2Vec2BertConfig(**_W2V | {"feature_projection_input_dim": 10} | fields)
    return getattr(transformers, f"Wav2Vec2Bert{head}")(config)


def _seamless(**fields: Any) -> Any:
    from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TSpeechEncoder

    small = {"hidden_size": 24, "speech_encoder_layers": 2, "speech_encoder_attention_heads": 3}
    small |= {"speech_encoder_intermediate_size": 20, "speech_encoder_dropout": 0.0, "speech_encoder_layerdrop": 0.0}
    small |= {"feature_projection_input_dim": 10, "conv_depthwise_kernel_size": 3, "adaptor_dropout": 0.0}
    return SeamlessM4TSpeechEncoder(transformers.SeamlessM4TConfig(**small | fields))


def _fastspeech2(**fields: Any) -> Any:
    stack = {"layers": 2, "num_attention_heads": 3, "linear_units": 20, "dropout_rate": 0.0}
    stack |= {"positional_dropout_rate": 0.0, "attention_dropout_rate": 0.0, "kernel_size": 3}
    stack |= {"normalize_before": False, "concat_after": False}
    small = {"hidden_size": 24, "vocab_size": 12, "num_mel_bins": 6, "speech_decoder_postnet_units": 8}
    small |= {f"{one}_predictor_channels": 8 for one in ("duration", "pitch", "energy")}
    small |= {f"{one}_predictor_dropout": 0.0 for one in ("pitch", "energy")}
    small |= {"duration_predictor_dropout_rate": 0.0, "pitch_embed_dropout": 0.0, "energy_embed_dropout": 0.0}
    small |= {"speech_decoder_postnet_dropout": 0.0, "encoder_config": dict(stack), "decoder_config": dict(stack)}
    config = transformers.FastSpeech2ConformerConfig(**small)
    for part in (config.encoder_config, config.decoder_config):
        part.update(fields)
    return transformers.FastSpeech2ConformerModel(config)


def _drawn(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(5))


def _frames(name: str, width: int, each: int) -> Callable[[Tensor | None], dict[str, Tensor]]:
    def given(mask: Tensor | None) -> dict[str, Tensor]:
        x = _drawn(3, RIGHT.shape[1] * each, width)
        x = x[..., 0] if width == 1 else x
        return {name: x} | ({} if mask is None else {"attention_mask": mask.repeat_interleave(each, dim=1)})

    return given


def _text(mask: Tensor | None) -> dict[str, Tensor]:
    """With what a loss is made of, which FastSpeech2 wants for training; each place lasts two frames."""
    ids = torch.randint(1, 12, RIGHT.shape, generator=torch.Generator().manual_seed(5))
    real = torch.ones_like(ids) if mask is None else mask
    frames = real.sum(1) * 2
    spectrogram = _drawn(len(ids), int(frames.max()), 6)
    spectrogram[torch.arange(spectrogram.shape[1]) >= frames[:, None]] = -100.0
    labels = {"duration_labels": real * 2, "spectrogram_labels": spectrogram}
    labels |= {f"{one}_labels": _drawn(*ids.shape, 1) for one in ("pitch", "energy")}
    return {"input_ids": ids * real, **labels} | ({} if mask is None else {"attention_mask": mask})


def _labelled(given: Callable[[Tensor | None], dict[str, Tensor]], labels: Tensor) -> Any:
    return lambda mask: given(mask) | {"labels": labels}


@dataclass(frozen=True)
class Case:
    """A model: how it is made, what it is given beside a mask, and which masks it knows."""

    kind: str
    make: Callable[..., Any]
    given: Callable[[Tensor | None], dict[str, Tensor]]
    masks: tuple[str, ...] = ("none", "right", "holes")


_CTC = torch.tensor([[1, 2], [3, 11], [4, 11]])
_SOUND, _MEL = _frames("input_values", 1, SAMPLES), _frames("input_features", 16, FRAMES)
_ROWS = _frames("input_features", 10, 1)
_LENGTHS = ("none", "right")
CASES = {
    "parakeet": Case("parakeet_encoder", _parakeet, _MEL, _LENGTHS),
    "parakeet, ctc": Case("parakeet_encoder", _parakeet_ctc, _labelled(_MEL, _CTC), ("right",)),
    "wav2vec2-conformer": Case("wav2vec2-conformer", lambda **f: _wav2vec2("Model", **f), _SOUND, _LENGTHS),
    "wav2vec2-conformer, ctc": Case(
        "wav2vec2-conformer", lambda **f: _wav2vec2("ForCTC", **f), _labelled(_SOUND, _CTC.clamp(max=9)), _LENGTHS
    ),
    "wav2vec2-bert": Case("wav2vec2-bert", lambda **f: _wav2vec2_bert("Model", **f), _ROWS),
    "wav2vec2-bert, classes": Case(
        "wav2vec2-bert",
        lambda **f: _wav2vec2_bert("ForSequenceClassification", **f),
        _labelled(_ROWS, torch.tensor([0, 1, 1])),
    ),
    "seamless": Case("seamless_m4t", _seamless, _ROWS),
    "fastspeech2": Case("fastspeech2_conformer", _fastspeech2, _text, _LENGTHS),
}
# One of each kind.
MODELS = {case.kind: name for name, case in reversed(CASES.items())}


def build(name: str, **fields: Any) -> Any:
    """A random model in training mode, without dropout unless asked for."""
    torch.manual_seed(0)
    model = CASES[name].make(**fields)
    generator = torch.Generator().manual_seed(0)
    models.randomize(model, generator)
    with torch.no_grad():
        for one in model.modules():
            # By their class, since not all have a name that says it: small ones would leave nothing to attend by.
            if isinstance(one, torch.nn.LayerNorm | torch.nn.BatchNorm1d):
                one.weight.copy_(1 + 0.2 * torch.randn(one.weight.shape, generator=generator))
    return model.train()


def arguments(name: str, model: Any, mask: str = "right") -> dict[str, Tensor]:
    """Of a call, in the model's dtype."""
    dtype = next(model.parameters()).dtype
    given = CASES[name].given(MASKS[mask])
    return {key: one.to(dtype) if one.is_floating_point() else one for key, one in given.items()}


def tensors(output: Any) -> dict[str, Tensor]:
    """What a model returns, but for its loss."""
    return {name: one for name, one in output.items() if isinstance(one, Tensor) and name != "loss"}


def results(name: str, model: Any, mask: str, cotangents: dict[str, Tensor] | None = None) -> Any:
    """Outputs, loss and all gradients, as `pyxlbert.testing.models.results` returns them."""
    given = arguments(name, model, mask)
    if cotangents is None:
        with torch.no_grad():
            cotangents = models.random_cotangents(tensors(model(**given)), torch.Generator().manual_seed(4))
    return models.results(model, given, cotangents, tensors, lambda output: output.get("loss")), cotangents
