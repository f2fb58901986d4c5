"""XLNet's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pyxlbert.models.config import MOST_ANYTHING, MOST_LAYERS, MOST_WIDTH, ModelConfig
from pyxlbert.nn import activation_kind

ATTENTION_TYPES = ("bi", "uni")
SUMMARY_TYPES = ("last", "first", "mean", "cls_index")
MASKED_ROWS = ("zero", "uniform")


@dataclass(kw_only=True)
class XLNetConfig(ModelConfig):
    """XLNet's configuration, with the defaults of `transformers`.

    `hidden_size`, `num_hidden_layers`, `num_attention_heads` and `n_token` are other names of `d_model`, `n_layer`,
    `n_head` and `vocab_size`, in files and as attributes.

    Fields beyond those of `transformers`:
        untie_r: False makes r_w_bias, r_r_bias and r_s_bias the same for all layers, as in the original code.
        residual_in_fp32: in bfloat16 and float16 models, keep the residual stream between the layers in float32.
        masked_rows: what a row of the query stream gives that may see nothing: ``"zero"``, or ``"uniform"``, the
            average over all keys, as in `transformers`.
        summary_at_padding: True takes a row's summary from the places that `transformers` takes, padding or not: the
            row's last place, its first, or all. By default it is taken from the row's tokens.

    Raises:
        ValueError: a field cannot be honoured; the message names it.
    """

    model_type: ClassVar[str] = "xlnet"
    unsupported: ClassVar[dict[str, tuple]] = {
        **ModelConfig.unsupported,
        "summary_proj_to_labels": (False, None),
    }
    aliases: ClassVar[dict[str, str]] = {
        "n_token": "vocab_size",
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }

    vocab_size: int = 32000
    d_model: int = 1024
    n_layer: int = 24
    n_head: int = 16
    d_inner: int = 4096
    d_head: int | None = None
    ff_activation: str = "gelu"
    attn_type: str = "bi"
    untie_r: bool = True
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    mem_len: int | None = 512
    reuse_len: int | None = None
    use_mems_eval: bool = True
    use_mems_train: bool = False
    bi_data: bool = False
    clamp_len: int = -1
    same_length: bool = False
    summary_type: str = "last"
    summary_use_proj: bool = True
    summary_activation: str | None = "tanh"
    summary_first_dropout: float = 0.0
    summary_last_dropout: float = 0.1
    start_n_top: int = 5
    end_n_top: int = 5
    pad_token_id: int | None = 5
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    residual_in_fp32: bool = True
    masked_rows: str = "zero"
    summary_at_padding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()  # which checks the fields
        if self.d_head is None:
            self.d_head = self.d_model // self.n_head

    def validate(self) -> None:
        super().validate()
        for name in ("d_model", "n_head", "d_inner"):
            self._integer(name, 1, MOST_WIDTH)
        for name in ("vocab_size", "start_n_top", "end_n_top"):
            self._integer(name, 1)
        self._integer("n_layer", 0, MOST_LAYERS)
        self._integer("clamp_len", -1)
        if self.d_model % self.n_head:
            raise ValueError(f"n_head: got {self.n_head}, wanted a divisor of d_model {self.d_model}")
        if self.d_model % 2:
            raise ValueError(f"d_model: got {self.d_model}, wanted an even number: half are sines, half cosines")
        if self.d_head not in (None, self.d_model // self.n_head):
            raise ValueError(f"d_head: got {self.d_head}, wanted d_model / n_head, {self.d_model // self.n_head}")
        for name in ("mem_len", "reuse_len"):
            if getattr(self, name) is not None:
                self._integer(name, 0)
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(self, name) is not None:
                self._integer(name, -1)
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        if not all(one is None or (type(one) is int and -1 <= one <= MOST_ANYTHING) for one in ends):
            wanted = f"an integer from -1 to {MOST_ANYTHING}, or a list of some"
            raise ValueError(f"eos_token_id: got {self.eos_token_id!r}, wanted {wanted}")
        for name in ("dropout", "summary_first_dropout", "summary_last_dropout"):
            self._number(name, 0, 1)
        self._number("layer_norm_eps", 0)
        self._number("initializer_range", 0)
        activation_kind(self.ff_activation, "ff_activation")
        for name, allowed in (
            ("attn_type", ATTENTION_TYPES),
            ("summary_type", SUMMARY_TYPES),
            ("masked_rows", MASKED_ROWS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted one of {', '.join(allowed)}")
        if self.summary_activation not in (None, "", "tanh"):
            activation_kind(self.summary_activation, "summary_activation")

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> XLNetConfig:
        def renamed(named: dict[str, Any]) -> dict[str, Any]:
            if not isinstance(named, dict):
                return named  # which is refused
            return {cls.aliases.get(name, name): value for name, value in named.items()}

        return super().from_dict(renamed(values), **renamed(overrides))

    @property
    def hidden_size(self) -> int:
        """`d_model`."""
        return self.d_model

    @property
    def num_hidden_layers(self) -> int:
        """`n_layer`."""
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        """`n_head`."""
        return self.n_head
