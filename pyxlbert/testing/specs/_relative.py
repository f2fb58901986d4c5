"""What the inputs of relative attention of one stream and of two have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyxlbert.testing.specs._attention import Scores
from pyxlbert.testing.specs._spec import Arguments, Bad, Draw, replace

UNSEEN_RANK = 2**31 - 1


@dataclass(frozen=True)
class RelativeInputs(Scores):
    """What relative attention of one stream and of two have in common; see `Scores`.

    Attributes:
        tables: G, 0 for a table of three dimensions.
        table_rows: R, by default what every pair needs.
        table_layout: "as rows" (query's where that is "heads first" or "strided", else a whole) or "expanded".
        table_scale, bias_scale: factors of their numbers.
        biases: letters: u content bias, v position bias, s segment bias, e segment embedding.
        wide: table and biases in float32.
        ranks: "random" (about a third of the keys is seen by all, few by none) or "order": a permutation of the keys,
            of which query i has the number of key i.
        offset, masked_rows: arguments of the op.
    """

    tables: int = 0
    table_rows: int | None = None
    table_layout: str = "as rows"
    table_scale: float = 1.0
    bias_scale: float = 1.0
    biases: str = "uv"
    wide: bool = False
    ranks: str = ""
    offset: int | None = None
    masked_rows: str | None = None

    def relative_arguments(self, draw: Draw, offset: int) -> Arguments:
        """The table, the biases and what goes with them, ranks; `offset` is the default one."""
        offset = offset if self.offset is None else self.offset
        dtype, heads, size = draw.single if self.wide else draw.dtype, self.heads, self.head_size
        count = offset + self.longest if self.table_rows is None else self.table_rows
        shape = (count, heads, size) if self.tables == 0 else (self.tables, count, heads, size)
        scale = self.magnitude * self.table_scale
        arguments: Arguments = {"position_key": draw.normal(*shape, scale=scale, dtype=dtype)}
        if self.table_layout == "expanded":
            arguments["position_key"] = arguments["position_key"][..., :1, :].expand(shape)
        for letter, name, wanted in (
            ("u", "content_bias", (heads, size)),
            ("v", "position_bias", (heads, size)),
            ("s", "segment_bias", (heads, size)),
            ("e", "segment_embedding", (2, heads, size)),
        ):
            if letter in self.biases:
                arguments[name] = draw.normal(*wanted, scale=self.magnitude * self.bias_scale, dtype=dtype)
        return arguments

    def segment_arguments(self, draw: Draw) -> Arguments:
        """Segments of queries and keys."""
        if "e" not in self.biases:
            return {}
        return {"query_segments": draw.below(3, *self.row_shape), "key_segments": draw.below(3, *self.column_shape)}

    def rank_arguments(self, draw: Draw) -> Arguments:
        """Ranks of queries and keys."""
        if not self.ranks:
            return {}
        if self.ranks == "order":
            key_rank = draw.orders(self.batch, self.key_count)
            query_rank = key_rank[:, : self.queries].contiguous()
        else:
            query_rank, key_rank = draw_ranks(draw, self.row_shape, self.column_shape)
        return {"query_rank": query_rank, "key_rank": key_rank}


def draw_ranks(draw: Draw, rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks of a random order: about a third of the keys is seen by all, few by none."""
    queries, keys = rows[-1], columns[-1]
    key_rank = draw.below(max(keys, 1), *columns)
    key_rank = key_rank.masked_fill(draw.share(0.3, columns), -1)
    key_rank = key_rank.masked_fill(draw.share(0.1, columns), UNSEEN_RANK)
    query_rank = draw.below(max(queries, 1) + 1, *rows) - 1
    return query_rank.to(torch.int32), key_rank.to(torch.int32)


# Bad arguments that relative_attention and two_stream_attention refuse alike; the first case of each has B = 2,
# 7 rows, 11 keys, H = 2, D = 16, two tables of 20 rows, every bias, segments, ranks, lengths and a mask.
SHARED_BAD = (
    Bad("key dtype", replace(key=lambda a: a["key"].half()), TypeError, ("key", "float16", "float32")),
    Bad("key heads", replace(key=lambda a: a["key"][:, :, :1]), ValueError, ("key", "[2, 11, 1, 16]")),
    Bad("value shape", replace(value=lambda a: a["value"][..., :8]), ValueError, ("value", "[2, 11, 2, 8]")),
    Bad("table none", replace(position_key=lambda a: None), TypeError, ("position_key", "NoneType", "tensor")),
    Bad(
        "table integer", replace(position_key=lambda a: a["position_key"].long()), TypeError, ("position_key", "int64")
    ),
    Bad(
        "table float64",
        replace(position_key=lambda a: a["position_key"].double()),
        TypeError,
        ("position_key", "float64", "float32"),
    ),
    Bad(
        "table 2-D",
        replace(position_key=lambda a: a["position_key"][0, 0]),
        ValueError,
        ("position_key", "[2, 16]", "[R, H, D]"),
    ),
    Bad(
        "table heads",
        replace(position_key=lambda a: a["position_key"][:, :, :1]),
        ValueError,
        ("position_key", "[2, 20, 1, 16]", "[2, 16]"),
    ),
    Bad(
        "table short",
        replace(position_key=lambda a: a["position_key"][:, :17]),
        ValueError,
        ("position_key", "17 rows", "at least 18", "offset 7 and 11 keys"),
    ),
    Bad(
        "tables and batch",
        replace(position_key=lambda a: a["position_key"][[0, 1, 0]]),
        ValueError,
        ("position_key", "3 tables", "divides B, 2"),
    ),
    Bad("no tables", replace(position_key=lambda a: a["position_key"][:0]), ValueError, ("position_key", "0 tables")),
    Bad("offset small", replace(offset=lambda a: 5), ValueError, ("offset", "5", "at least 6")),
    Bad("offset negative", replace(offset=lambda a: -1), ValueError, ("offset", "-1", "at least 6")),
    Bad(
        "segments of more bits",
        replace(key_segments=lambda a: a["key_segments"] + 2**32),
        ValueError,
        ("key_segments", str(2**32)[:6], "32 bits"),
    ),
    Bad("offset bool", replace(offset=lambda a: True), TypeError, ("offset", "bool", "int")),
    Bad("scale text", replace(scale=lambda a: "a"), TypeError, ("scale", "str", "finite number")),
    Bad("offset float", replace(offset=lambda a: 7.0), TypeError, ("offset", "float", "int")),
    Bad(
        "content bias shape",
        replace(content_bias=lambda a: a["content_bias"][:1]),
        ValueError,
        ("content_bias", "[1, 16]", "[2, 16]"),
    ),
    Bad(
        "position bias dtype",
        replace(position_bias=lambda a: a["position_bias"].double()),
        TypeError,
        ("position_bias", "float64", "float32"),
    ),
    Bad(
        "segment embedding shape",
        replace(segment_embedding=lambda a: a["segment_embedding"][:1]),
        ValueError,
        ("segment_embedding", "[1, 2, 16]", "[2, 2, 16]"),
    ),
    Bad(
        "segment bias alone",
        replace(segment_embedding=lambda a: None),
        ValueError,
        ("segment_bias", "segment_embedding"),
    ),
    Bad(
        "no query segments",
        replace(query_segments=lambda a: None),
        ValueError,
        ("query_segments", "None", "key_segments"),
    ),
    Bad(
        "key segments shape",
        replace(key_segments=lambda a: a["key_segments"][:, :7]),
        ValueError,
        ("key_segments", "[2, 7]", "[2, 11]"),
    ),
    Bad(
        "segments float",
        replace(query_segments=lambda a: a["query_segments"].float()),
        TypeError,
        ("query_segments", "float32", "int32"),
    ),
    Bad("no key ranks", replace(key_rank=lambda a: None), ValueError, ("key_rank", "None", "query_rank")),
    Bad("no query ranks", replace(query_rank=lambda a: None), ValueError, ("query_rank", "None", "key_rank")),
    Bad(
        "rank dtype", replace(query_rank=lambda a: a["query_rank"].long()), TypeError, ("query_rank", "int64", "int32")
    ),
    Bad(
        "query rank shape", replace(query_rank=lambda a: a["key_rank"]), ValueError, ("query_rank", "[2, 11]", "[2, 7]")
    ),
    Bad("key rank shape", replace(key_rank=lambda a: a["query_rank"]), ValueError, ("key_rank", "[2, 7]", "[2, 11]")),
    Bad(
        "lengths shape", replace(key_lengths=lambda a: a["key_lengths"][:1]), ValueError, ("key_lengths", "[1]", "[2]")
    ),
    Bad(
        "lengths float", replace(key_lengths=lambda a: a["key_lengths"].float()), TypeError, ("key_lengths", "float32")
    ),
    Bad("lengths long", replace(key_lengths=lambda a: a["key_lengths"] + 1), ValueError, ("key_lengths", "12")),
    Bad("lengths negative", replace(key_lengths=lambda a: a["key_lengths"] - 12), ValueError, ("key_lengths", "-8")),
    Bad(
        "mask 2-D",
        replace(attention_mask=lambda a: torch.ones(2, 11, dtype=torch.bool)),
        ValueError,
        ("attention_mask", "[2, 11]", "key_lengths"),
    ),
    Bad(
        "mask shape",
        replace(attention_mask=lambda a: torch.ones(2, 1, 1, 13, dtype=torch.bool)),
        ValueError,
        ("attention_mask", "[2, 1, 1, 13]", "[2, 2, 7, 11]"),
    ),
    Bad(
        "mask float",
        replace(attention_mask=lambda a: a["attention_mask"].float()),
        TypeError,
        ("attention_mask", "float32", "bool"),
    ),
    Bad("masked rows", replace(masked_rows=lambda a: "ones"), ValueError, ("masked_rows", "'ones'", "'zero'")),
    Bad("scale nan", replace(scale=lambda a: float("nan")), ValueError, ("scale", "nan", "finite")),
    Bad("dropout above 1", replace(dropout_p=lambda a: 1.5), ValueError, ("dropout_p", "1.5", "[0, 1]")),
    Bad("seed float", replace(seed=lambda a: 1.5), TypeError, ("seed", "float")),
    Bad("backend unknown", replace(backend=lambda a: "mkl"), ValueError, ("backend", "mkl", "torch")),
)
