"""What a table of an architecture says: which classes are replaced, and where their parameters are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: What every encoder of BERT's kind must be configured as; a field that a configuration lacks holds.
ENCODER: Mapping[str, tuple] = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "position_embedding_type": ("absolute",),
}


@dataclass(frozen=True)
class LayerParts:
    """A post-norm layer by the paths of its modules: attention, residual, feed-forward network, residual.

    Attributes:
        query, key, value, out, up, down: the linear layers.
        heads: the number of heads, a path to a number.
        attention_dropout, out_dropout, down_dropout: None for no dropout.
        out_norm, norm: the LayerNorms of the two residuals.
        activation: the module between up and down.
        activation_name: the configuration's field that names it.
        biased: whether the layer takes a bias of the scores after its mask, and a mask that is added to them.
    """

    query: str
    key: str
    value: str
    heads: str
    attention_dropout: str
    out: str
    out_dropout: str | None
    out_norm: str
    up: str
    activation: str
    down: str
    down_dropout: str | None
    norm: str
    activation_name: str = "hidden_act"
    biased: bool = False


@dataclass(frozen=True)
class EmbeddingParts:
    """Embeddings by the names of their modules.

    Attributes:
        arguments: the names of the arguments, in order.
        word, position, token_type: the tables; None for none.
        norm, dropout: what follows their sum.
        positions: by which rule tokens are counted, ``"place"``: 0, 1, 2 in the padded row, or ``"token"``: from the
            padding's id on, over ids that are not the padding's.
    """

    arguments: tuple[str, ...] = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
    word: str = "word_embeddings"
    position: str = "position_embeddings"
    token_type: str | None = "token_type_embeddings"
    norm: str = "LayerNorm"
    dropout: str = "dropout"
    positions: str = "place"


@dataclass(frozen=True)
class Stack:
    """Which layers an encoder calls, and in which order.

    Attributes:
        layers: the path of the list of them, each called once.
        inside: if not None, `layers` are groups, each called several times in a row, `num_hidden_layers` times
            altogether; the path in a group of the list of its layers.
        before: the module that rows go through before the first.
    """

    layers: tuple[str, ...] = ("layer",)
    inside: tuple[str, ...] | None = None
    before: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One architecture of `transformers`.

    Attributes:
        model_type: the configuration's.
        tested: the versions of transformers that the table was tested with.
        prefix: what the names of its classes begin with.
        model, embeddings, encoder, layer: the names of its classes, ``{}`` for the prefix.
        layer_parts, embedding_parts, stack: where the parameters are.
        holds: fields of the configuration and the values that they may have.
        reads_padding: heads that read places where padding is, so that it is computed, ``{}`` for the prefix.
    """

    model_type: str
    tested: str
    prefix: str
    layer_parts: LayerParts
    embedding_parts: EmbeddingParts = EmbeddingParts()
    stack: Stack = Stack()
    model: str = "{}Model"
    embeddings: str = "{}Embeddings"
    encoder: str = "{}Encoder"
    layer: str = "{}Layer"
    holds: Mapping[str, tuple] = field(default_factory=lambda: ENCODER)
    reads_padding: tuple[str, ...] = ("{}ForQuestionAnswering",)

    def name(self, what: str) -> str:
        """The class's name of ``"model"``, ``"embeddings"``, ``"encoder"`` or ``"layer"``."""
        return getattr(self, what).format(self.prefix)

    def computes_padding(self, head: str) -> bool:
        """Whether a class of this name reads what is at padding."""
        return head in {name.format(self.prefix) for name in self.reads_padding}


@dataclass(frozen=True)
class RelativeArchitecture:
    """XLNet's.

    Attributes:
        model_type: the configuration's.
        tested: the versions of transformers that the table was tested with.
        prefix: what the names of its classes begin with.
        parts: modules of the model and of each layer, and the names of their classes.
        reads: which places a head reads beside the tokens: ``"mean"`` for all, ``"summary"`` for what the
            configuration's `summary_type` says.
    """

    model_type: str
    tested: str
    prefix: str
    parts: Mapping[str, str]
    reads: Mapping[str, str]

    def name(self, what: str) -> str:
        """The class's name of ``"model"``."""
        return f"{self.prefix}{what.capitalize()}"

    def place(self, head: str, summary: str) -> str | None:
        """What a head of this name reads: ``"first"``, ``"last"``, ``"mean"`` or None."""
        reads = self.reads.get(head.removeprefix(self.prefix)) if head.startswith(self.prefix) else None
        if reads != "summary":
            return reads
        return "last" if summary == "cls_index" else summary
