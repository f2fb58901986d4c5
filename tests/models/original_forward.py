"""What the original codes compute, in numpy and float64, from variables under their own names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.special import erf

Variables = Mapping[str, np.ndarray]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    """The formula that the last versions of both codes have."""
    return x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(scores: np.ndarray, axis: int) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def _dense(x: np.ndarray, v: Variables, scope: str) -> np.ndarray:
    return x @ v[f"{scope}/kernel"] + v[f"{scope}/bias"]


def _norm(x: np.ndarray, v: Variables, scope: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return scaled * v[f"{scope}/LayerNorm/gamma"] + v[f"{scope}/LayerNorm/beta"]


def bert(v: Variables, config: dict, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> dict[str, np.ndarray]:
    """What a checkpoint's heads give for ``[B, T]``, beside the encoder's states and its pooled output."""
    v = {name: array.astype(np.float64) for name, array in v.items()}
    batch, length = ids.shape
    heads = config["num_attention_heads"]
    size = config["hidden_size"] // heads
    x = v["bert/embeddings/word_embeddings"][ids] + v["bert/embeddings/token_type_embeddings"][types]
    x = _norm(x + v["bert/embeddings/position_embeddings"][:length], v, "bert/embeddings")
    for index in range(config["num_hidden_layers"]):
        scope = f"bert/encoder/layer_{index}"
        query, key, value = (
            _dense(x, v, f"{scope}/attention/self/{name}").reshape(batch, length, heads, size)
            for name in ("query", "key", "value")
        )
        scores = np.einsum("bihd,bjhd->bhij", query, key) / np.sqrt(size)
        scores = scores + (1 - mask[:, None, None, :]) * -1e9
        mixed = np.einsum("bhij,bjhd->bihd", softmax(scores, -1), value).reshape(batch, length, -1)
        x = _norm(_dense(mixed, v, f"{scope}/attention/output/dense") + x, v, f"{scope}/attention/output")
        inner = gelu(_dense(x, v, f"{scope}/intermediate/dense"))
        x = _norm(_dense(inner, v, f"{scope}/output/dense") + x, v, f"{scope}/output")
    found = {"last_hidden_state": x}
    pooled = np.tanh(_dense(x[:, 0], v, "bert/pooler/dense"))
    found["pooler_output"] = pooled
    if "cls/predictions/output_bias" in v:
        y = gelu(_dense(x, v, "cls/predictions/transform/dense"))
        y = _norm(y, v, "cls/predictions/transform")
        logits = y @ v["bert/embeddings/word_embeddings"].T + v["cls/predictions/output_bias"]
        found["prediction_logits"] = logits
        weights, bias = v["cls/seq_relationship/output_weights"], v["cls/seq_relationship/output_bias"]
        found["seq_relationship_logits"] = pooled @ weights.T + bias
    if "output_weights" in v:
        found["logits"] = pooled @ v["output_weights"].T + v["output_bias"]
    if "cls/squad/output_weights" in v:
        logits = x @ v["cls/squad/output_weights"].T + v["cls/squad/output_bias"]
        found["start_logits"], found["end_logits"] = logits[..., 0], logits[..., 1]
    return found


def xlnet(
    v: Variables,
    config: dict,
    ids: np.ndarray,
    mask: np.ndarray,
    types: np.ndarray,
    activation: callable = gelu,
) -> dict[str, np.ndarray]:
    """What a checkpoint's heads give for ``[B, T]``; the original's layout is ``[T, B]``, with 1 for padding."""
    v = {name: array.astype(np.float64) for name, array in v.items()}
    length, width = ids.shape[1], config["d_model"]
    scope = "model/transformer"
    x = v[f"{scope}/word_embedding/lookup_table"][ids.T]  # [T, B, E]
    padding = 1 - mask.T[None]  # [1, T, B], of keys
    # A token sees itself though it were padding.
    hidden = np.maximum(padding - np.eye(length)[:, :, None], 0)[..., None]  # [T, T, B, 1]
    same = np.eye(2)[(types.T[:, None] != types.T[None]).astype(int)]  # [T, T, B, 2]
    distances = np.arange(length, -length, -1.0)
    angles = distances[:, None] / 10000 ** (np.arange(0, width, 2.0) / width)
    table = np.concatenate([np.sin(angles), np.cos(angles)], -1)  # [2T, E]
    for index in range(config["n_layer"]):
        layer = f"{scope}/layer_{index}"
        query, key, value = (np.einsum("ibh,hnd->ibnd", x, v[f"{layer}/rel_attn/{name}/kernel"]) for name in "qkv")
        place = np.einsum("rh,hnd->rnd", table, v[f"{layer}/rel_attn/r/kernel"])
        biases = {
            name: v[f"{scope}/{name}"][index] if config["untie_r"] else v[f"{scope}/{name}"]
            for name in ("r_w_bias", "r_r_bias", "r_s_bias")
        }
        content = np.einsum("ibnd,jbnd->ijbn", query + biases["r_w_bias"], key)
        # Row length + j - i of the table is the distance i - j.
        rows = length + np.arange(length)[None] - np.arange(length)[:, None]
        position = np.einsum("ibnd,ijnd->ijbn", query + biases["r_r_bias"], place[rows])
        segment = np.einsum("ibnd,snd->ibns", query + biases["r_s_bias"], v[f"{scope}/seg_embed"][index])
        scores = content + position + np.einsum("ijbs,ibns->ijbn", same, segment)
        scores = scores / np.sqrt(config["d_head"]) - 1e30 * hidden
        mixed = np.einsum("ijbn,jbnd->ibnd", softmax(scores, 1), value)
        output = np.einsum("ibnd,hnd->ibh", mixed, v[f"{layer}/rel_attn/o/kernel"])
        x = _norm(output + x, v, f"{layer}/rel_attn")
        inner = activation(_dense(x, v, f"{layer}/ff/layer_1"))
        x = _norm(_dense(inner, v, f"{layer}/ff/layer_2") + x, v, f"{layer}/ff")
    x = x.transpose(1, 0, 2)  # [B, T, E]
    found = {"last_hidden_state": x}
    if "model/lm_loss/bias" in v:
        found["logits"] = x @ v[f"{scope}/word_embedding/lookup_table"].T + v["model/lm_loss/bias"]
    if "model/sequnece_summary/summary/kernel" in v:
        summary = np.tanh(_dense(x[:, -1], v, "model/sequnece_summary/summary"))
        found["logits"] = _dense(summary, v, "model/classification_mnli/logit")
    if "start_logits/dense/kernel" in v:
        found |= _answers(x, v, mask)
    return found


def _answers(x: np.ndarray, v: Variables, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The best start, the probabilities of its ends, and whether there is an answer; the class token is the last."""
    hidden = -1e30 * (1 - mask)
    starts = softmax(_dense(x, v, "start_logits/dense")[..., 0] * mask + hidden, 1)  # [B, T]
    best = starts.argmax(1)
    at_best = np.repeat(x[np.arange(len(x)), best][:, None], x.shape[1], 1)  # [B, T, E]
    ends = np.tanh(_dense(np.concatenate([x, at_best], -1), v, "end_logits/dense_0"))
    ends = _dense(_norm(ends, v, "end_logits"), v, "end_logits/dense_1")[..., 0] * mask + hidden
    expected = np.einsum("bth,bt->bh", x, starts)
    answer = np.tanh(_dense(np.concatenate([expected, x[:, -1]], -1), v, "answer_class/dense_0"))
    return {
        "start_top_index": best[:, None],
        "start_top_log_probs": starts.max(1)[:, None],
        "end_top_log_probs": softmax(ends, 1).max(1)[:, None],
        "cls_logits": (answer @ v["answer_class/dense_1/kernel"])[:, 0],
    }
