"""XLNet, token by token: as `transformers` does it, or left to right with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from pyxlbert.models.inputs import check_device, check_range, check_shape, check_tensors, check_tokens, check_zero_one
from pyxlbert.nn import UNSEEN_RANK, RelativeLayout, TokenLayout, relative_positions

# With memories transformers computes this many of the last tokens again at every step.
RECOMPUTED = 2


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken from its logits.

    Raises:
        ValueError: a value is out of range, or would have no effect.
        TypeError: a value is of another type.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise TypeError(f"do_sample: got {self.do_sample!r}, wanted True or False")
        _check_number("temperature", self.temperature)
        if not 0 < self.temperature < torch.inf:
            raise ValueError(f"temperature: got {self.temperature}, wanted more than 0 and finite")
        if self.top_k is not None:
            _check_integer("top_k", self.top_k)
            if self.top_k < 1:
                raise ValueError(f"top_k: got {self.top_k}, wanted an integer of at least 1")
        if self.top_p is not None:
            _check_number("top_p", self.top_p)
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p: got {self.top_p}, wanted more than 0 and at most 1")
        for name, unset in (("temperature", 1), ("top_k", None), ("top_p", None)):
            value = getattr(self, name)
            if not self.do_sample and value != unset:
                raise ValueError(f"{name}: got {value} without do_sample, which takes the best token; wanted {unset}")

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits [B, V] over the temperature, -inf outside the `top_k` best and the fewest that hold `top_p`."""
        best = logits == logits.amax(dim=-1, keepdim=True)
        logits = logits / self.temperature
        if not bool(logits.isfinite().all()):
            # Differences have become larger than any number: the best alone is left.
            logits = torch.zeros_like(logits).masked_fill(~best, -torch.inf)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            worst = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < worst, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            shares = ordered.softmax(dim=-1)
            # What the better ones leave: nothing of it is needed once they hold top_p.
            outside = shares.cumsum(dim=-1) - shares >= self.top_p
            logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
        return logits

    def next(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """One token for each row of logits [B, V]: the best, or one drawn."""
        logits = logits.float()
        if not self.do_sample:
            return logits.argmax(dim=-1)
        return torch.multinomial(self.filtered(logits).softmax(dim=-1), 1, generator=generator).squeeze(1)


class Whole:
    """Every step computes the whole text; all its tokens see each other, and the next place is the only target."""

    def __init__(self, model: Generates, tokens: Tensor | None) -> None:
        self.model, self.tokens = model, tokens

    def logits(self, ids: Tensor) -> Tensor:
        """The next token's, [B, V]."""
        output = self.model(**_with_target(ids, self.tokens), use_mems=False)
        return output.logits[:, 0]


class WithMemories:
    """The first step computes the whole text; later ones the last tokens, with the states of the others as memories.

    What is in a memory has not seen the tokens that came later, so results differ from `Whole`'s, as they do in
    `transformers`.
    """

    def __init__(self, model: Generates, tokens: Tensor | None) -> None:
        self.model, self.tokens = model, tokens
        self.mems: tuple[Tensor, ...] | None = None
        self.seen: Tensor | None = None  # bool [B, mem_len], where a memory is of a token

    def logits(self, ids: Tensor) -> Tensor:
        """The next token's, [B, V]."""
        tokens = self.tokens
        if self.mems:
            ids, tokens = ids[:, -RECOMPUTED:], None
        given = _with_target(ids, tokens)
        output = self.model(**given, mems=self.mems, mems_mask=self.seen if self.mems else None, use_mems=True)
        # The states of the dummy and of the tokens that come again are no memories.
        self.mems = tuple(memory[:-RECOMPUTED] for memory in output.mems)
        if self.tokens is not None:
            self._follow(given.get("attention_mask"), given["input_ids"])
        return output.logits[:, 0]

    def _follow(self, tokens: Tensor | None, ids: Tensor) -> None:
        """Keeps `seen` beside the memories, cut as they are."""
        config = self.model.config
        seen = torch.ones_like(ids, dtype=torch.bool) if tokens is None else tokens
        seen = seen[:, : config.reuse_len] if config.reuse_len else seen
        seen = seen if self.seen is None else torch.cat([self.seen, seen], dim=1)
        seen = seen[:, -config.mem_len :] if config.mem_len else seen
        self.seen = seen[:, :-RECOMPUTED]


def _with_target(ids: Tensor, tokens: Tensor | None) -> dict[str, Tensor]:
    """The text with a dummy behind it that no token sees and that is the target."""
    batch, length = ids.shape
    query_rank = ids.new_zeros(batch, length + 1, dtype=torch.int32)
    key_rank = torch.full_like(query_rank, -1)
    key_rank[:, -1] = 0
    given = {
        "input_ids": torch.cat([ids, ids.new_zeros(batch, 1)], dim=1),
        "target_positions": ids.new_full((batch, 1), length),
        "query_rank": query_rank,
        "key_rank": key_rank,
    }
    if tokens is not None:
        given["attention_mask"] = torch.nn.functional.pad(tokens, (0, length + 1 - tokens.shape[1]), value=True)
    return given


class LeftToRight:
    """No token sees a later one, so keys and values stay as they are: each step adds those of one token.

    A step sends two rows through the products of the layers, the new token's and the target's, whatever the length of
    the text; attention reads all keys that are there, so that a step's cost grows slowly with the text. The logits are
    those of one forward pass over the whole text with ranks 0, 1, 2, ... for queries and keys.

    Args:
        model: the model.
        tokens: bool ``[B, T]``, True where the prompt has a token, or None.
        batch: B.
        prompt: T, tokens in the prompt.
        capacity: tokens there will be at most.

    Raises:
        ValueError: the model attends to a window that moves (`same_length`).
    """

    def __init__(self, model: Generates, tokens: Tensor | None, batch: int, prompt: int, capacity: int) -> None:
        config, encoder = model.config, model.base_model
        if config.same_length and config.attn_type == "uni":
            raise ValueError("left_to_right: got True with same_length, whose window moves; wanted False")
        self.model, self.length, self.prompt = model, 0, prompt
        weight = encoder.word_embedding.weight
        device = weight.device
        # The distance of row x is farthest - x.
        self.farthest = capacity + prompt + 2
        positions = relative_positions(
            prompt + 1,
            self.farthest,
            config.d_model,
            clamp=config.clamp_len,
            backwards=config.bi_data,
            device=device,
        ).to(weight.dtype)  # [R, E] or [2, R, E]
        self.tables = [layer.rel_attn.project(positions, "r")[0] for layer in encoder.layer]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.capacity = capacity
        self.key_rank = torch.arange(capacity, dtype=torch.int32, device=device).repeat(batch, 1)
        if tokens is not None:
            self.key_rank[:, :prompt].masked_fill_(~tokens, UNSEEN_RANK)

    def logits(self, ids: Tensor) -> Tensor:
        """The next token's, [B, V], after the text [B, T] of which all but the end has been given before."""
        encoder = self.model.base_model
        new = ids[:, self.length :]
        batch, count = new.shape
        last = self.length + count
        stream_dtype, product_dtype, copy_dtype = encoder.dtypes()
        words = torch.cat([encoder.word_embedding(new), encoder.mask_emb.expand(batch, 1, -1)], dim=1)  # [B, T + 1, E]
        words = encoder.dropout(words)
        x, residual = words.to(product_dtype), words.to(stream_dtype)
        # A token sees those before it and itself; the target stands behind the last and sees it.
        query_rank = torch.arange(self.length + 1, last + 2, dtype=torch.int32, device=ids.device).clamp(max=last)
        # Queries are numbered from 0 though they stand at self.length: row count + 1 + j - i is for the distance
        # self.length + i - j, so the table begins at the distance self.length + count + 1.
        begin = self.farthest - (self.length + count + 1)
        layout = RelativeLayout(
            TokenLayout(batch, count + 1),
            words,  # not read: the tables are projected already
            query_rank=query_rank.expand(batch, -1).contiguous(),
            key_rank=self.key_rank[:, :last].contiguous(),
            masked_rows=self.model.config.masked_rows,
        )
        for index, layer in enumerate(encoder.layer):
            attention = layer.rel_attn
            key, value = attention.project(x[:, :count], "kv")  # [B, T, H, D]
            key, value = self._cached(index, key, value)  # [B, Tk, H, D]
            table = self.tables[index][..., begin : begin + count + 1 + last, :, :]  # [R, H, D] or [2, R, H, D]
            mixed = attention.look(attention.project(x, "q")[0], key, value, table, layout)  # [B, T + 1, H, D]
            x, residual = layer.finish(attention.back(mixed.flatten(-2)), (x, residual), copy_dtype)
        self.length = last
        target = encoder.dropout(encoder.public((x[:, -1], residual[:, -1])))  # [B, E]
        return self.model.lm_loss(target)

    def _cached(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer so far; the new ones are written behind the old ones."""
        if index == len(self.keys):
            shape = (key.shape[0], self.capacity, *key.shape[2:])
            self.keys.append(key.new_empty(shape))
            self.values.append(value.new_empty(shape))
        end = self.length + key.shape[1]
        self.keys[index][:, self.length : end] = key
        self.values[index][:, self.length : end] = value
        return self.keys[index][:, :end], self.values[index][:, :end]


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {value!r}, wanted an integer")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, wanted a number")


def _special(
    config: Any, stop_token_ids: int | Sequence[int] | None, pad_token_id: int | None
) -> tuple[list[int], int]:
    """The tokens that end a text, and what follows them; the configuration's where they are not given."""
    stops = config.eos_token_id if stop_token_ids is None else stop_token_ids
    stops = [] if stops is None else [stops] if not isinstance(stops, (list, tuple, set, range)) else list(stops)
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    pad = pad if pad is not None else stops[0] if stops else 0
    for name, values in (("stop_token_ids", stops), ("pad_token_id", [pad])):
        for value in values:
            _check_integer(name, value)
            if not 0 <= value < config.vocab_size:
                # What is not given but stands in the configuration may be of no use: nothing is drawn from outside.
                if name == "stop_token_ids" and stop_token_ids is None:
                    continue
                if name == "pad_token_id" and pad_token_id is None and not stops:
                    continue
                raise ValueError(f"{name}: got {value}, wanted 0 to {config.vocab_size - 1}, a token of the vocabulary")
    return [int(stop) for stop in stops], int(pad)


def _left_padded(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    check_device("attention_mask", mask, device)
    check_shape("attention_mask", mask, (batch, length))
    check_zero_one("attention_mask", mask)
    tokens = mask.to(torch.bool)
    if bool((tokens[:, 1:] < tokens[:, :-1]).any()) or not bool(tokens[:, -1].all()):
        raise ValueError("attention_mask: got padding behind a token, wanted padding on the left alone")
    return None if bool(tokens.all()) else tokens


class Generates:
    """What a language model continues texts with; mixed into `XLNetLMHeadModel`.

    Attributes:
        config: an XLNet's.
        base_model: its encoder.
        lm_loss: its decoder.
        device: the parameters'.
    """

    config: Any
    base_model: nn.Module
    lm_loss: nn.Module
    device: torch.device

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token_ids: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        use_mems: bool | None = None,
        left_to_right: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue texts, token by token, with no gradients.

        Args:
            input_ids: ``[B, T]``, the prompts, those shorter than the longest padded on the left.
            attention_mask: ``[B, T]`` of 1 (token) and 0 (padding on the left): each text is then continued as if it
                were alone. Without it padding is text.
            max_new_tokens: how many tokens to add at most.
            do_sample: draw tokens instead of taking the best.
            temperature, top_k, top_p: of drawing: logits are divided by the temperature, then cut to the `top_k` best,
                then to the fewest that together have the probability `top_p`. Only together with `do_sample`.
            stop_token_ids: a text that has got one of these is finished; the configuration's `eos_token_id` by default.
            pad_token_id: what follows in a finished text while others go on; the configuration's by default.
            use_mems: whether states of earlier tokens are kept as memories, or the whole text is computed at every
                step; the configuration's `use_mems_eval` by default. In both every token sees all others that are
                computed with it, as in `transformers`.
            left_to_right: no token sees a later one and keys and values are kept, so that a step computes the products
                of its own token alone; attention still reads all keys, so that a step's cost grows slowly with the
                text. Not together with `use_mems`.
            generator: the source of chance.

        Returns:
            int64 ``[B, T + n]``, the prompts and what follows.

        Raises:
            ValueError: an argument has a wrong shape or value, or no effect beside another; the message names it.
            TypeError: an argument has a wrong type or dtype.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p)
        check_tensors(input_ids=input_ids, attention_mask=attention_mask)
        check_tokens(input_ids, None, self.config.d_model, self.device)
        check_range("input_ids", input_ids, 0, self.config.vocab_size - 1)
        batch, length = input_ids.shape
        if length == 0:
            raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, wanted at least one token to begin with")
        _check_integer("max_new_tokens", max_new_tokens)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, wanted an integer of at least 1")
        for name, value in (("use_mems", use_mems), ("left_to_right", left_to_right)):
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, wanted True or False")
        if use_mems and left_to_right:
            raise ValueError("use_mems: got True with left_to_right, which keeps keys and values; wanted None or False")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: got {type(generator).__name__}, wanted a torch.Generator")
        stop_token_ids, pad_token_id = _special(self.config, stop_token_ids, pad_token_id)
        use_mems = self.config.use_mems_eval if use_mems is None else use_mems
        tokens = _left_padded(attention_mask, batch, length, input_ids.device)
        if left_to_right:
            stepper = LeftToRight(self, tokens, batch, length, length + max_new_tokens)
        else:
            stepper = (WithMemories if use_mems else Whole)(self, tokens)
        ids = input_ids.long()
        stops = torch.tensor(stop_token_ids, dtype=torch.long, device=ids.device)
        going = torch.ones(batch, dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            chosen = sampling.next(stepper.logits(ids), generator)
            chosen = torch.where(going, chosen, pad_token_id)
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            going = going & ~torch.isin(chosen, stops)
            if not bool(going.any()):
                break
        return ids
