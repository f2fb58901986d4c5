"""Inputs of embedding_layer_norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyxlbert.ops.embedding_layer_norm import embedding_layer_norm
from pyxlbert.reference.philox import Tag, keep_rows
from pyxlbert.testing.specs._spec import (
    BOTH,
    HALF,
    ROWS,
    Arguments,
    Bad,
    Case,
    Draw,
    Spec,
    Use,
    bytes_of,
    replace,
    timed,
)


def plain(
    input_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-12,
    out_dtype: torch.dtype | None = None,
    copy_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same by torch.nn.functional, one call after the other."""
    total = _sums(input_ids, word, token_type, position, token_type_ids, position_ids, padding_idx)
    wide = word.dtype is torch.float64
    if out_dtype is not None and not wide:
        total = total.to(out_dtype)
    y = F.layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps)
    if dropout_p > 0:
        keep = keep_rows(seed, dropout_p, input_ids.numel(), y.shape[-1], Tag.EMBEDDING_LAYER_NORM).view(y.shape)
        y = torch.where(keep, y / (1 - dropout_p) if dropout_p < 1 else y, torch.zeros_like(y))
    if copy_dtype is None:
        return y
    return y, y.clone() if wide else y.to(copy_dtype)


def _sums(
    input_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """What LayerNorm takes."""
    total = F.embedding(input_ids, word, padding_idx)
    if position is not None:
        places = torch.arange(input_ids.shape[-1], device=input_ids.device) if position_ids is None else position_ids
        total = total + F.embedding(places.expand(input_ids.shape), position)
    if token_type is not None:
        kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        total = total + F.embedding(kinds.expand(input_ids.shape), token_type)
    return total


@dataclass(frozen=True)
class Inputs:
    """ids of `shape`, of tables with `columns` columns, the words' with `entries` rows, the positions' with `places`.

    Attributes:
        tables: the names of the other two tables, as far as there are any.
        ids: "own", "types" (no positions), "default" (neither), "broadcast", "int32", or "views" (of words and ids).
        wide: parameters in float32.
        mixed: float32 and a copy in the tables' 16 bits; of tables of 32 bits a copy in 16.
    """

    shape: tuple[int, ...]
    columns: int = 40
    entries: int = 50
    places: int | None = None
    scale: float = 1.0
    tables: tuple[str, ...] = ("position", "token_type")
    ids: str = "own"
    wide: bool = False
    mixed: bool = False
    padding_idx: int | None = None
    dropout_p: float | None = None

    def __str__(self) -> str:
        return "x".join(map(str, (*self.shape, self.columns)))


def make(inputs: Inputs, draw: Draw) -> Arguments:
    """See `Spec`."""
    shape, columns, entries = inputs.shape, inputs.columns, inputs.entries
    places = shape[-1] + 3 if inputs.places is None else inputs.places
    parameter = draw.single if inputs.wide else draw.dtype
    has_types, has_places = ("token_type" in inputs.tables), ("position" in inputs.tables)
    arguments: Arguments = {
        "input_ids": draw.below(entries, *shape),
        "word": draw.normal(entries, columns, scale=inputs.scale),
        "token_type": draw.normal(2, columns, scale=inputs.scale) if has_types else None,
        "position": draw.normal(places, columns, scale=inputs.scale) if has_places else None,
        "weight": draw.normal(columns, dtype=parameter) * 0.5 + 1,
        "bias": draw.normal(columns, dtype=parameter),
        "token_type_ids": draw.below(2, *shape) if has_types else None,
        "position_ids": draw.below(places, *shape) if has_places else None,
        "eps": 1e-6,
    }
    if inputs.padding_idx is not None:
        arguments["padding_idx"] = inputs.padding_idx
    if inputs.dropout_p is not None:
        arguments |= {"dropout_p": inputs.dropout_p, "seed": draw.numbers([-77], torch.int64)}
    if inputs.ids == "int32":
        arguments["input_ids"] = arguments["input_ids"].int()
    elif inputs.ids == "types":
        arguments["position_ids"] = None
    elif inputs.ids == "default":
        arguments["position_ids"] = arguments["token_type_ids"] = None
    elif inputs.ids == "broadcast":
        arguments["position_ids"] = draw.below(places, 1, shape[-1])
        arguments["token_type_ids"] = draw.below(2, shape[-1])
    elif inputs.ids == "views":
        arguments["word"] = draw.normal(entries, 2 * columns)[:, ::2]
        arguments["input_ids"] = draw.below(entries, *reversed(shape)).t()
    if inputs.mixed:
        half = draw.dtype in (torch.bfloat16, torch.float16)
        arguments |= {"out_dtype": torch.float32, "copy_dtype": draw.dtype} if half else {"copy_dtype": torch.bfloat16}
    return arguments


def _bad(id: str, error: type[Exception], words: str, **changes: Callable[[Arguments], object]) -> Bad:
    return Bad(id, replace(**changes), error, tuple(words.split()))


def _with(ids: Tensor, value: int) -> Tensor:
    ids = ids.clone()
    ids[1, 2] = value
    return ids


def _terms(name: str, a: Arguments, cotangents: tuple[Tensor, ...]) -> Tensor | float | None:
    """As layer_norm's; a table row sums the gradients of all its tokens."""
    if a["input_ids"].numel() == 0:
        return None
    plain_arguments = {k: v for k, v in a.items() if k not in ("dropout_p", "seed", "copy_dtype", "out_dtype")}
    y = plain(**plain_arguments | {"weight": torch.ones_like(a["weight"]), "bias": torch.zeros_like(a["bias"])})
    spread = float(y.abs().max())
    scale = 1 / (1 - a["dropout_p"]) if 0 < a.get("dropout_p", 0.0) < 1 else 1.0
    dy = float(sum(c.double().abs().max() for c in cotangents)) * scale
    if name.startswith("out"):
        return (spread * float(a["weight"].abs().max()) + float(a["bias"].abs().max())) * scale
    count = float(a["input_ids"].numel())
    if name in ("grad weight", "grad bias"):
        return count * dy * max(spread, 1.0)
    given = ("input_ids", "word", "token_type", "position", "token_type_ids", "position_ids")
    x = _sums(**{key: a[key] for key in given if key in a})
    rstd = (x.var(-1, correction=0) + a.get("eps", 1e-12)).rsqrt()
    # Of each token; as in layer_norm the rounding of x itself is scaled by rstd.
    each = dy * float(a["weight"].abs().max()) * rstd * (1 + rstd * x.abs().amax(-1))
    if name != "grad word":
        return float(each.sum())
    word = torch.zeros(len(a["word"]), dtype=each.dtype, device=each.device)
    return word.index_add(0, a["input_ids"].flatten().long(), each.flatten())[:, None]


def _bytes_moved(a: Arguments, backward: bool) -> int:
    """A row of the words' table read per token, many of them more than once, and one written; backward reads both and
    writes the table's whole gradient."""
    rows = a["input_ids"].numel() * a["word"].shape[1] * a["word"].element_size()
    return 2 * rows + (2 * rows + bytes_of(a["word"]) if backward else 0)


def _bert(shape: tuple[int, ...], columns: int = 768) -> Inputs:
    return Inputs(shape, columns, entries=30522, places=512, ids="default")


SPEC = Spec(
    name="embedding_layer_norm",
    function=embedding_layer_norm,
    plain=plain,
    make=make,
    differentiable=("word", "token_type", "position", "weight", "bias"),
    cases=(
        Case("padded", Inputs((3, 7))),
        Case("packed", Inputs((23,), columns=35)),
        Case("hidden 384", Inputs((2, 9), columns=384)),
        Case("default positions and types", Inputs((3, 7), ids="default")),
        Case("broadcast positions and types", Inputs((3, 7), ids="broadcast")),
        Case("word alone", Inputs((3, 7), tables=())),
        Case("no token types", Inputs((3, 7), tables=("position",))),
        Case("one token", Inputs((1, 1), columns=1)),
        Case("no tokens", Inputs((0, 5))),
        Case("length 0", Inputs((4, 0))),
        Case("int32 ids", Inputs((3, 7), ids="int32")),
        Case("padding row", Inputs((3, 40), entries=5, padding_idx=2)),
        Case("float32 parameters", Inputs((3, 7), wide=True)),
        Case("views", Inputs((3, 7), ids="views")),
        Case("dropout", Inputs((4, 9), columns=67, dropout_p=0.3)),
        Case("everything dropped", Inputs((2, 3), dropout_p=1.0)),
        Case("two outputs", Inputs((3, 7), columns=48, mixed=True)),
        Case("two outputs with dropout", Inputs((3, 7), columns=48, mixed=True, dropout_p=0.1)),
        Case("huge", Inputs((3, 7), scale=1e3)),
        Case("many tokens", Inputs((8, 128), columns=130, entries=300), small=False),
        Case("emulated", Inputs((3, 90), columns=64, ids="default"), {Use.EMULATION: HALF}),
        *(
            Case(
                f"8x512x{n}",
                Inputs(
                    (8, 512), columns=n, entries=3000, ids="types", places=512, mixed=True, padding_idx=0, dropout_p=0.1
                ),
                {use: BOTH},
            )
            for n, use in ((768, Use.AHEAD), (384, Use.AHEAD_ALL), (1024, Use.AHEAD_ALL))
        ),
        *timed(_bert((8, 128)), {Use.RACE: BOTH}),
        *timed(_bert((ROWS // 512, 512)), {Use.TARGET: HALF, Use.DECIDE: HALF}),
        *(case for n in (384, 1024) for case in timed(_bert((ROWS // 512, 512), n), {Use.GPU: HALF})),
        *(case for rows in (128, 2048, ROWS) for case in timed(_bert((rows // 128, 128)), both={Use.PREFER: BOTH})),
    ),
    bad=(
        _bad("input_ids float", TypeError, "input_ids float32", input_ids=lambda a: a["input_ids"].float()),
        _bad("input_ids list", TypeError, "input_ids list", input_ids=lambda a: [1, 2]),
        _bad("id too large", ValueError, "input_ids got 50 [1,", input_ids=lambda a: _with(a["input_ids"], 50)),
        _bad("id negative", ValueError, "input_ids got -1 [1,", input_ids=lambda a: _with(a["input_ids"], -1)),
        _bad("type too large", ValueError, "token_type_ids 2", token_type_ids=lambda a: _with(a["token_type_ids"], 2)),
        _bad("position too large", ValueError, "position_ids 10", position_ids=lambda a: _with(a["position_ids"], 10)),
        _bad(
            "too many tokens",
            ValueError,
            "input_ids 7 5 position",
            position_ids=lambda a: None,
            position=lambda a: a["position"][:5],
        ),
        _bad(
            "packed without positions",
            ValueError,
            "position_ids None packed",
            input_ids=lambda a: a["input_ids"][0],
            position_ids=lambda a: None,
            token_type_ids=lambda a: None,
        ),
        _bad("positions shape", ValueError, "position_ids [2, [3,", position_ids=lambda a: a["position_ids"][:2]),
        _bad("types without table", ValueError, "token_type_ids without", token_type=lambda a: None),
        _bad("word shape", ValueError, "word [40] [V,", word=lambda a: a["word"][0]),
        _bad("position columns", ValueError, "position 39] 40]", position=lambda a: a["position"][:, :-1]),
        _bad("table dtypes", TypeError, "token_type bfloat16", token_type=lambda a: a["token_type"].bfloat16()),
        _bad("weight shape", ValueError, "weight [39] [40]", weight=lambda a: a["weight"][1:]),
        _bad("padding row outside", ValueError, "padding_idx 50 49", padding_idx=lambda a: 50),
        _bad("dropout outside", ValueError, "dropout_p 1.5 [0,", dropout_p=lambda a: 1.5),
        _bad("out_dtype integer", TypeError, "out_dtype int32", out_dtype=lambda a: torch.int32),
        _bad("word meta", ValueError, "word meta", word=lambda a: a["word"].to("meta")),
        _bad("out_dtype float64", TypeError, "out_dtype float64 float16", out_dtype=lambda a: torch.float64),
        _bad("copy_dtype float64", TypeError, "copy_dtype float64 float16", copy_dtype=lambda a: torch.float64),
        _bad("copy_dtype text", TypeError, "copy_dtype 'half' float16", copy_dtype=lambda a: "half"),
        _bad("padding row text", TypeError, "padding_idx str int", padding_idx=lambda a: "a"),
        _bad("padding row bool", TypeError, "padding_idx bool int", padding_idx=lambda a: True),
        _bad("padding row float", TypeError, "padding_idx float int", padding_idx=lambda a: 1.0),
        _bad("eps none", TypeError, "eps NoneType number", eps=lambda a: None),
        _bad("eps negative", ValueError, "eps -1.0", eps=lambda a: -1.0),
    ),
    terms=_terms,
    bytes_moved=_bytes_moved,
)
