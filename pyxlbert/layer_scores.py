"""Which layer makes the best sentence vector: the score of every layer and of every sum of neighbouring layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pyxlbert.files import check_writable, real_path
from pyxlbert.text import SentenceEncoder

# Pooling of a sum of layers is the sum of their poolings.
_LINEAR = {"cls", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"}


def spearman(
    encode: Callable[[Sequence[str]], np.ndarray], first: Sequence[str], second: Sequence[str], scores: np.ndarray
) -> float:
    """Spearman's correlation of cosine similarity with `scores`.

    Args:
        encode: texts to [N, E].
        first, second: the pairs' sentences.
        scores: one number a pair.
    """
    return correlation(encode(first), encode(second), scores)


def correlation(first: np.ndarray, second: np.ndarray, scores: np.ndarray) -> float:
    """Spearman's correlation of the cosines of [N, E] with [N, E] with N scores; NaN where all cosines are equal."""
    from scipy.stats import spearmanr

    a, b = (np.asarray(vectors, dtype=np.float64) for vectors in (first, second))
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    if np.ptp(cosine) == 0:  # as of the first token's embedding, which is the same in every text
        return float("nan")
    return float(spearmanr(cosine, scores).statistic)


def layer_scores(
    encoder: SentenceEncoder, first: Sequence[str], second: Sequence[str], scores: np.ndarray, batch_size: int = 32
) -> np.ndarray:
    """Spearman's correlation × 100 of each layer and each sum of neighbouring ones.

    Args:
        encoder: pools, and applies dense layers, as its directory says.
        first, second: the pairs' sentences.
        scores: one number a pair.
        batch_size: texts per run of the model.

    Returns:
        float64 [L + 1, L + 1] for L layers: in row i and column j ≥ i the sum of layers i to j, 0 being the embeddings;
        NaN below, and where all pairs are equally alike.
    """
    count = encoder.model.config.depth + 1
    sums = _sums(encoder, count, batch_size)
    table = np.full((count, count), np.nan)
    prepared = [sums(texts) for texts in (first, second)]
    for i in range(count):
        for j in range(i, count):
            a, b = (of(i, j) for of in prepared)
            table[i, j] = 100 * correlation(a, b, scores)
    return table


def _sums(
    encoder: SentenceEncoder, count: int, batch_size: int
) -> Callable[[Sequence[str]], Callable[[int, int], np.ndarray]]:
    """From texts to what gives the vectors of the sum of layers i to j; lengths of vectors do not matter here."""
    modules = encoder.modules

    def again(texts: Sequence[str]) -> Callable[[int, int], np.ndarray]:
        return lambda i, j: encoder.encode(
            texts, batch_size=batch_size, normalize=False, layers=("sum", *range(i, j + 1))
        )

    def once(texts: Sequence[str]) -> Callable[[int, int], np.ndarray]:
        """The model runs once: poolings are added up in place of hidden states."""
        vectors = encoder.encode(texts, batch_size=batch_size, normalize=False, layers=("concat", *range(count)))
        layers = vectors.reshape(len(vectors), len(modules.modes), count, -1)
        return lambda i, j: layers[:, :, i : j + 1].sum(2, dtype=np.float64).reshape(len(vectors), -1)

    linear = set(modules.modes) <= _LINEAR and not modules.dense and encoder.settings.truncate_dim is None
    return once if linear else again


def layer_table(table: np.ndarray) -> str:
    """The scores as text: a line for each layer with its own score and that of the sum from it to the last one."""
    last = len(table) - 1
    i, j = best(table)
    lines = [f"  {'layer':<12}{'alone':>8}  summed to the last"]
    for layer in range(last + 1):
        name = "embeddings" if layer == 0 else str(layer)
        lines.append(f"  {name:<12}{table[layer, layer]:8.2f}{table[layer, last]:8.2f}")
    what = f"layer {i}" if i == j else f"the sum of layers {i} to {j}"
    return "\n".join([*lines, f"  best: {what}, {table[i, j]:.2f} (the last layer has {table[last, last]:.2f})"])


def best(table: np.ndarray) -> tuple[int, int]:
    """The first and the last layer of the best sum; of equals the shortest."""
    candidates = [(i, j) for i in range(len(table)) for j in range(i, len(table))]
    return max(candidates, key=lambda pair: (np.nan_to_num(table[pair], nan=-np.inf), pair[0] - pair[1]))


def check_picture(path: Path) -> None:
    """Whether a picture can be written there, before minutes are spent.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the name ends in something that is no picture, or no file can have it.
        OSError: it is a folder, or its folder is missing or not writable.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ImportError("--picture: needs matplotlib: pip install matplotlib") from None
    if path.suffix.removeprefix(".") not in FigureCanvasAgg.filetypes:
        raise ValueError(f"--picture: got {str(path)!r}, wanted a name that ends in .png, .pdf or .svg")
    check_writable("--picture", str(path), real_path("--picture", str(path)))


def draw_layers(tables: dict[str, np.ndarray], path: Path, data: str) -> None:
    """Draws a row for each model: its layers alone and summed to the last as lines, all sums as a map.

    Args:
        tables: of `layer_scores`, by the models' names.
        path: of the picture.
        data: what the scores are of, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 0.6 + 4.9 * len(tables)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Sentence vectors by layer: {data}, Spearman × 100 (0: the embeddings)", fontsize=13)
    rows = figure.subplots(len(tables), 2, squeeze=False, width_ratios=(1.15, 1))
    for (name, table), (lines, sums) in zip(tables.items(), rows, strict=True):
        layers = np.arange(len(table))
        lines.plot(layers, np.diag(table), "o-", label="the layer alone")
        lines.plot(layers, table[:, -1], "s--", label="the sum from it to the last")
        lines.set(title=name, xlabel="layer", ylabel="Spearman × 100", xticks=_ticks(len(table)))
        lines.grid(alpha=0.3)
        lines.legend()
        _draw_sums(figure, sums, table)
    figure.savefig(path, dpi=120)


def _ticks(count: int) -> np.ndarray:
    return np.arange(0, count, 1 if count <= 13 else 2)


def _draw_sums(figure: object, axes: object, table: np.ndarray) -> None:
    count = len(table)
    i, j = best(table)
    image = axes.imshow(table, cmap="viridis", origin="lower")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    if count <= 13:
        for row, column in zip(*np.nonzero(~np.isnan(table)), strict=True):
            colour = "black" if table[row, column] > middle else "white"
            text = f"{table[row, column]:.1f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=9 if count <= 8 else 6.5, color=colour)
    axes.plot(j, i, "s", markersize=260 / count, markerfacecolor="none", markeredgecolor="red", markeredgewidth=2)
    what = f"layer {i}" if i == j else f"layers {i} to {j}"
    axes.set(title=f"sums of layers; best: {what}, {table[i, j]:.2f}", xlabel="to layer", ylabel="from layer")
    axes.set(xticks=_ticks(count), yticks=_ticks(count))
    figure.colorbar(image, ax=axes, shrink=0.85)
