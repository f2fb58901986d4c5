"""Whether a model and its pretraining data go together: found before the first step."""

from __future__ import annotations

from pyxlbert.models.bert import BertConfig
from pyxlbert.models.xlnet_config import XLNetConfig
from pyxlbert.training.pretraining.pairs import PairOptions
from pyxlbert.training.pretraining.segments import SegmentOptions
from pyxlbert.training.pretraining.vocabularies import Vocabulary


def check_sizes(config: BertConfig | XLNetConfig, options: PairOptions | SegmentOptions, batch_size: int) -> None:
    """Raises ValueError where sizes do not fit that are known before any text is read."""
    if isinstance(options, PairOptions):
        _check_pair_sizes(config, options)
        return
    # Which ids the special tokens have changes no size.
    options.sampler(sep_id=0, cls_id=0, word_starts=None, batch_size=batch_size)
    _check_segment_sizes(config, options)


def check_pieces(config: BertConfig | XLNetConfig, pieces: int, vocabulary: Vocabulary | None) -> None:
    """Raises ValueError where a model has fewer words than its tokenizer: this one, or, None, one that is trained to
    so many pieces."""
    if vocabulary is not None:
        _check_vocabulary(config.vocab_size, vocabulary)
    elif pieces > config.vocab_size:
        raise ValueError(f"vocab_size: got {pieces}, wanted at most the configuration's, {config.vocab_size}")


def check_pairs(config: BertConfig, options: PairOptions, vocabulary: Vocabulary) -> None:
    """Raises ValueError where a BERT cannot be trained on such pairs."""
    _check_vocabulary(config.vocab_size, vocabulary)
    _check_pair_sizes(config, options)


def check_segments(config: XLNetConfig, options: SegmentOptions, vocabulary: Vocabulary, batch_size: int) -> None:
    """Raises ValueError where an XLNet cannot be trained on such segments."""
    _check_vocabulary(config.vocab_size, vocabulary)
    check_sizes(config, options, batch_size)


def _check_pair_sizes(config: BertConfig, options: PairOptions) -> None:
    if options.max_length > config.max_position_embeddings:
        raise ValueError(
            f"max_length: got {options.max_length}, wanted at most max_position_embeddings, "
            f"{config.max_position_embeddings}"
        )
    if config.type_vocab_size < 2:
        raise ValueError(f"type_vocab_size: got {config.type_vocab_size}, wanted at least 2: a row has two passages")


def _check_segment_sizes(config: XLNetConfig, options: SegmentOptions) -> None:
    if config.attn_type != "bi":
        raise ValueError(f"attn_type: got {config.attn_type!r}, wanted 'bi': the order decides who sees whom")
    if config.bi_data != options.bi_data:
        raise ValueError(f"bi_data: got {options.bi_data}, wanted the configuration's, {config.bi_data}")
    memory = config.mem_len or 0
    if not memory:
        return
    if not options.reuse_len:
        raise ValueError(
            f"reuse_len: got 0 with a mem_len of {memory}, wanted at least 1: a row goes on where its memory ends"
        )
    if (config.reuse_len or 0) != options.reuse_len:
        raise ValueError(
            f"reuse_len: got {options.reuse_len}, wanted the configuration's, {config.reuse_len}: a memory of other "
            "tokens is not what stands before the next row"
        )
    if memory < options.reuse_len:
        raise ValueError(
            f"config: 'mem_len' is {memory}, wanted at least reuse_len, {options.reuse_len}: so many tokens are "
            "remembered"
        )


def _check_vocabulary(size: int, vocabulary: Vocabulary) -> None:
    if vocabulary.size > size:
        raise ValueError(
            f"config: 'vocab_size' is {size}, wanted at least {vocabulary.size}, the tokens of the tokenizer"
        )
