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
        beside: the other modules that the encoder calls.
    """

    layers: tuple[str, ...] = ("layer",)
    inside: tuple[str, ...] | None = None
    before: str | None = None
    beside: tuple[str, ...] = ()


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
        summaries: heads that do so unless the configuration's `summary_type` is "first".
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
    summaries: tuple[str, ...] = ()

    def name(self, what: str) -> str:
        """The class's name of ``"model"``, ``"embeddings"``, ``"encoder"`` or ``"layer"``."""
        return getattr(self, what).format(self.prefix)

    def models(self) -> tuple[str, ...]:
        """The names of the classes of a whole model."""
        return (self.name("model"),)

    def computes_padding(self, head: str, summary: str | None) -> bool:
        """Whether a class of this name, with this `summary_type`, reads what is at padding."""
        heads = self.reads_padding if summary in ("first", None) else (*self.reads_padding, *self.summaries)
        return head in {name.format(self.prefix) for name in heads}


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

    def models(self) -> tuple[str, ...]:
        """The names of the classes of a whole model."""
        return (f"{self.prefix}Model",)

    def place(self, head: str, summary: str) -> str | None:
        """What a head of this name reads: ``"first"``, ``"last"``, ``"mean"`` or None."""
        reads = self.reads.get(head.removeprefix(self.prefix)) if head.startswith(self.prefix) else None
        if reads != "summary":
            return reads
        return "last" if summary == "cls_index" else summary


@dataclass(frozen=True)
class DistanceParts:
    """Attention with a term of the distance, by the names of its modules and arguments.

    The table of distances holds R = 2 T - 1 rows, from that of the last key's first query to the reverse: the row of
    query i and key j is T - 1 + j - i.

    Attributes:
        query, key, value, out, position: the linear layers.
        content_bias, position_bias: the parameters ``[H, D]``.
        dropout: of the weights, a module or a number.
        arguments: the names of the arguments, in order, among them `hidden_states` and
        mask, positions: those of the mask and of the distances.
        masks: in which form its mask is made: ``"interface"`` by transformers' interface of masks, ``"square"``
            ``[B, 1, T, T]``, in which padding sees nothing, or ``"keys"`` ``[B, 1, T]``, not 0 where a token is.
    """

    query: str = "linear_q"
    key: str = "linear_k"
    value: str = "linear_v"
    out: str = "linear_out"
    position: str = "linear_pos"
    content_bias: str = "pos_bias_u"
    position_bias: str = "pos_bias_v"
    dropout: str = "dropout"
    arguments: tuple[str, ...] = ("hidden_states", "attention_mask", "relative_position_embeddings")
    mask: str = "attention_mask"
    positions: str = "relative_position_embeddings"
    masks: str = "interface"


@dataclass(frozen=True)
class FeedForwardParts:
    """A feed-forward network: linear, activation, dropout, linear, dropout.

    Attributes:
        up, down: the linear layers.
        activation: the module between them.
        inner_dropout, dropout: modules or numbers; None for no dropout.
        activation_name: the configuration's field that names the activation.
    """

    up: str = "intermediate_dense"
    activation: str = "intermediate_act_fn"
    inner_dropout: str = "intermediate_dropout"
    down: str = "output_dense"
    dropout: str | None = "output_dropout"
    activation_name: str = "hidden_act"


@dataclass(frozen=True)
class ConformerArchitecture:
    """A Conformer: layers of attention with a term of the distance, feed-forward networks and a convolution.

    Attributes:
        model_type: the configuration's.
        tested: the versions of transformers that the table was tested with.
        prefix: what the names of its classes begin with.
        model, layer, attention, feed_forward, convolution: the names of its classes, ``{}`` for the prefix; no
            `feed_forward` where it is made of convolutions.
        attention_parts, feed_forward_parts: where the parameters are.
        distances: the name of a class that makes the same distances for each sequence of a batch, or None.
        inputs: the width of what the model takes and how many of it make one place, numbers or the configuration's
            fields.
        holds: fields of the configuration and the values that they may have.
    """

    model_type: str
    tested: str
    prefix: str
    attention_parts: DistanceParts = DistanceParts()
    feed_forward_parts: FeedForwardParts = FeedForwardParts()
    model: str = "{}Encoder"
    layer: str = "{}EncoderLayer"
    attention: str = "{}SelfAttention"
    feed_forward: str | None = "{}FeedForward"
    convolution: str = "{}ConvolutionModule"
    distances: str | None = None
    inputs: tuple[str | int, str | int] = ("hidden_size", 1)
    holds: Mapping[str, tuple] = field(default_factory=lambda: {"position_embeddings_type": ("relative",)})

    def name(self, what: str) -> str | None:
        """The class's name of ``"model"``, ``"layer"``, ``"attention"`` and so on."""
        name = getattr(self, what)
        return None if name is None else name.format(self.prefix)

    def models(self) -> tuple[str, ...]:
        """The names of the classes of a whole model."""
        return (self.model.format(self.prefix),)


@dataclass(frozen=True)
class FunnelArchitecture:
    """Funnel's.

    Attributes:
        model_type: the configuration's.
        tested: the versions of transformers that the table was tested with.
        prefix: what the names of its classes begin with.
        structure, layer: the names of its classes.
        parts: modules of each layer, and the names of their classes.
        holds: fields of the configuration and the values that they may have.
    """

    model_type: str
    tested: str
    prefix: str
    parts: Mapping[str, str]
    structure: str = "{}AttentionStructure"
    layer: str = "{}Layer"
    holds: Mapping[str, tuple] = field(default_factory=dict)

    def name(self, what: str) -> str:
        """The class's name of ``"structure"`` or ``"layer"``."""
        return getattr(self, what).format(self.prefix)

    def models(self) -> tuple[str, ...]:
        """The names of the classes of a whole model."""
        return f"{self.prefix}Model", f"{self.prefix}BaseModel"
