"""XLNet's own rule for numbers: a piece that ends in a digit and a comma is cut in front of the comma.

So "9,500" is `▁9` `,` `500` where SentencePiece alone finds `▁9,` `500`. Google's code did it after SentencePiece, when
the checkpoints were trained (`encode_pieces` in https://github.com/zihangdai/xlnet/blob/master/prepro_utils.py);
`transformers` 5 does not.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the library is loaded when a tokenizer is, not by `import pyxlbert`
    import tokenizers

_MARK = "▁"


class OriginalNumbers:
    """What each such piece of a vocabulary becomes.

    Args:
        tokenizer: of XLNet's pieces; it is only asked.

    Raises:
        ValueError: its pieces are none of XLNet's.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        from tokenizers import models

        if not isinstance(tokenizer.model, models.Unigram):
            kind = type(tokenizer.model).__name__
            raise ValueError(f"original_numbers: got True with a model of kind {kind}, wanted XLNet's unigram pieces")
        unknown = json.loads(tokenizer.to_str())["model"]["unk_id"]
        self._parts: dict[int, np.ndarray] = {}
        self._widths: dict[int, list[int]] = {}
        for piece, place in tokenizer.get_vocab(with_added_tokens=False).items():
            if len(piece) < 2 or piece[-1] != "," or not piece[-2].isdigit():
                continue
            parts = tokenizer.encode(piece[:-1].replace(_MARK, ""), add_special_tokens=False).tokens
            if piece[0] != _MARK and parts and parts[0][0] == _MARK:
                parts = parts[1:] if len(parts[0]) == 1 else [parts[0][1:], *parts[1:]]
            parts.append(",")
            ids = [tokenizer.token_to_id(part) for part in parts]
            self._parts[place] = np.array([unknown if one is None else one for one in ids], dtype=np.int32)
            self._widths[place] = [len(part.replace(_MARK, "")) for part in parts]

    def apply(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids after the rule, int32 ``[m]``, and for each the place that it comes from, int64 ``[m]``."""
        found = [(place, self._parts[one]) for place, one in enumerate(ids.tolist()) if one in self._parts]
        counts = np.ones(len(ids), dtype=np.int64)
        for place, parts in found:
            counts[place] = len(parts)
        sources = np.repeat(np.arange(len(ids)), counts)
        result = ids[sources]
        starts = np.cumsum(counts) - counts
        for place, parts in found:
            result[starts[place] : starts[place] + len(parts)] = parts
        return result, sources

    def offsets(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Character positions int64 ``[m, 2]`` of the ids after the rule, of those ``[n, 2]`` before it.

        A piece whose characters are not the text's own, one for one, keeps its span for all of its parts.
        """
        rows: list[tuple[int, int]] = []
        for one, (start, end) in zip(ids.tolist(), offsets.tolist(), strict=True):
            widths = self._widths.get(one, [end - start])
            if sum(widths) != end - start:
                rows += [(start, end)] * len(widths)
                continue
            for width in widths:
                rows.append((start, start + width))
                start += width
        return np.array(rows, dtype=np.int64).reshape(-1, 2)
