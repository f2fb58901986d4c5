"""The base of models that live in Hugging Face directories: loading, saving, initialisation, checkpointing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.hub import Hub
from pyxlbert.models import checkpoints, integers
from pyxlbert.models.config import ModelConfig
from pyxlbert.models.outputs import ModelOutput
from pyxlbert.models.without_memory import without_memory
from pyxlbert.nn.packing import PacksItself, integers_of, is_quantised, packs_by_default, quantised_weights
from pyxlbert.nn.saved_integers import SavedIntegers

_CHECKPOINT_OPTIONS = {
    "use_reentrant",
    "preserve_rng_state",
    "context_fn",
    "determinism_check",
    "debug",
    "early_stop",
}
_NAMED_AT_MOST = 8  # names in a message; the rest are counted


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED_AT_MOST])
    return shown if len(names) <= _NAMED_AT_MOST else f"{shown} and {len(names) - _NAMED_AT_MOST} more"


class PretrainedModel(PacksItself):
    """A model with a configuration that can be read from and written to a Hugging Face directory.

    Attributes:
        config: its configuration.
        loading_info: what `from_pretrained` found: ``missing_keys`` (set to fresh values) and ``unexpected_keys``
            (left out), and ``removed_prefixes`` of names, which wrappers had put there. None for a model that was not
            loaded.
        packs: how an encoder packs its weights at its first forward pass without gradients: see `from_pretrained`.
    """

    config_class: ClassVar[type[ModelConfig]]
    base_model_prefix: ClassVar[str]
    #: The encoder's own top-level names, and those of them without which a checkpoint is refused.
    base_parts: ClassVar[tuple[str, ...]]
    required_parts: ClassVar[tuple[str, ...]]
    #: What a model with a head makes its encoder of.
    encoder_class: ClassVar[type[PretrainedModel]]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if type(config) not in self.config_class.kinds().values():
            raise TypeError(f"config: got {type(config).__name__}, wanted {self.config_class.__name__}")
        config.validate()
        self.config = config
        self.loading_info: dict[str, list[str]] | None = None

    # Structure

    @property
    def base_model(self) -> torch.nn.Module:
        """The encoder: this model itself when it has no head."""
        return getattr(self, self.base_model_prefix, self)

    def _add_encoder(self, **options: Any) -> None:
        """Give a model with a head its encoder, under the name that checkpoints have for it."""
        setattr(self, self.base_model_prefix, self.encoder_class(self.config, **options))

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        """What `forward` returns: the output, or where that is asked for its fields as a tuple."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a row; None where any number is taken."""
        return self.max_tokens_of(self.config)

    @classmethod
    def max_tokens_of(cls, config: Any) -> int | None:
        """`max_tokens` of a model of a configuration, which need not be there."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the parameters hold, tied ones counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def tied_names(self) -> dict[str, str]:
        """Names in the state dict that are the same tensor as another name: the second's name for each."""
        return {}

    def tie_weights(self) -> None:
        """Make the tied parameters one tensor again, after something has replaced one of them."""

    def _untie(self, names: list[str]) -> None:
        """Change the configuration so that these names are tied no more."""
        self.config.tie_word_embeddings = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute each layer in the backward pass instead of keeping what it made.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`; ``use_reentrant`` is False here
                unless given.

        Raises:
            TypeError: an option that `checkpoint` does not have.
        """
        options = gradient_checkpointing_kwargs or {}
        unknown = sorted(options.keys() - _CHECKPOINT_OPTIONS)
        if unknown:
            wanted = ", ".join(sorted(_CHECKPOINT_OPTIONS))
            raise TypeError(f"gradient_checkpointing_kwargs: got {', '.join(unknown)}, wanted {wanted}")
        self.base_model.checkpointing = {"use_reentrant": False, **options}

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the layers make for the backward pass again."""
        self.base_model.checkpointing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return self.base_model.checkpointing is not None

    def _check_embeddings(self, value: object, columns: int) -> None:
        if not isinstance(value, torch.nn.Embedding):
            raise TypeError(f"value: got {type(value).__name__}, wanted a torch.nn.Embedding")
        wanted = (self.config.vocab_size, columns)
        if tuple(value.weight.shape) != wanted:
            got = list(value.weight.shape)
            raise ValueError(
                f"value: got a table of shape {got}, wanted {list(wanted)}; another vocabulary needs another vocab_size"
            )

    # Initialisation

    def init_weights(self, within: str = "") -> None:
        """Set parameters to fresh values.

        Args:
            within: only those whose name begins like this.
        """
        for name, _ in self.named_parameters():
            if name.startswith(within):
                self._init_parameter(name)

    @torch.no_grad()
    def _init_parameter(self, name: str) -> None:
        owner_name, _, leaf = name.rpartition(".")
        owner = self.get_submodule(owner_name)
        parameter = getattr(owner, leaf)
        if isinstance(owner, torch.nn.LayerNorm):
            parameter.fill_(1.0 if leaf == "weight" else 0.0)
        elif leaf == "bias":
            parameter.zero_()
        else:
            parameter.normal_(0.0, self.config.initializer_range)
            if isinstance(owner, torch.nn.Embedding) and owner.padding_idx is not None:
                parameter[owner.padding_idx].zero_()

    # Files

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        config: ModelConfig | None = None,
        dtype: torch.dtype | str | None = "auto",
        output_loading_info: bool = False,
        pack: bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Self | tuple[Self, dict[str, list[str]]]:
        """A model in evaluation mode, read from a Hugging Face directory.

        A checkpoint of the bare encoder loads into a model with a head, and the other way round. Everything is read
        and checked before a model is made. Weights of the encoder must all be there; a pooler or head that is missing
        gets fresh values, tensors that have no place here are left out, and both are reported, once, as a warning.

        Args:
            directory: holds ``config.json`` and the weights. A name that is no folder is that of a model of the hub,
                of which `huggingface_hub` has a copy or downloads one.
            config: used in place of ``config.json``.
            dtype: of the parameters; ``"auto"`` or None takes the configuration's, else the checkpoint's. "int8"
                multiplies in the encoder's layers by eight-bit integers (`pyxlbert.pack`): those of the directory's
                ``int8.safetensors``, where `save_pretrained` has put them, with all else in the dtype of the model that
                was saved; without that file the weights are quantised, with all else in bfloat16 where the processor
                multiplies it, in float32 elsewhere.
            output_loading_info: also return `loading_info`.
            pack: whether the encoder packs its linear layers at its first forward pass without gradients on the CPU,
                which takes their memory a second time (`pyxlbert.pack`). None: unless the environment says
                PYXLBERT_PACK=0.
            revision, cache_dir, token, local_files_only: how the hub is asked: see `pyxlbert.hub.Hub`.
            overrides: fields of the configuration to replace, such as ``num_labels=3``; also ``add_pooling_layer``
                where the constructor takes it. `torch_dtype` is another name of `dtype`.

        Returns:
            The model, with `output_loading_info` the pair (model, info). The model also carries it as `loading_info`.

        Raises:
            FileNotFoundError: the directory, ``config.json``, the weights or a shard is missing, or a model of the hub
                cannot be had; the message says what to do.
            ValueError: a file is corrupt, a field of the configuration cannot be honoured, an encoder weight is
                missing, a tensor has the wrong shape, or ``int8.safetensors`` belongs to other weights.
            RuntimeError: dtype is "int8", and backend "cpu" is not here.
            TypeError: an override is no field of the configuration.
        """
        pack_given = pack
        if pack is None:
            pack = packs_by_default()
        elif not isinstance(pack, bool):
            raise TypeError(f"pack: got {pack!r}, wanted True, False or None")
        if "torch_dtype" in overrides:
            old = overrides.pop("torch_dtype")
            if dtype not in ("auto", None, old):
                raise ValueError(f"torch_dtype: got {old!r} together with dtype {dtype!r}, wanted one of them")
            dtype = old
        quantised = dtype == "int8"
        if quantised and pack_given is False:
            raise ValueError('pack: got False together with dtype "int8", wanted True or None')
        if quantised and backends.unavailable("cpu") is not None:
            raise RuntimeError(f'dtype: got "int8", but backend "cpu" is missing: {backends.unavailable("cpu")}')
        directory = Hub(revision, cache_dir, token, local_files_only).folder(directory)
        model_options = {name: overrides.pop(name) for name in cls._constructor_options() if name in overrides}
        if config is None:
            config = cls.config_class.from_pretrained(directory, **overrides)
        elif overrides:
            raise ValueError(f"config: given together with {', '.join(overrides)}; set the fields on the configuration")
        else:
            config = copy.deepcopy(config)  # the caller's stays as it is
        found = checkpoints.read_weights(directory)
        try:
            cls._check_depth(config, found)
        except ValueError as error:
            raise ValueError(f"the checkpoint in {directory} {error}") from None
        with without_memory():
            model = cls(config, **model_options)
        try:
            tensors, unexpected, untied = model._place(found)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        if untied:
            # The checkpoint was trained untied, whatever its configuration says: as transformers does, believe it.
            warnings.warn(
                f"{_listed(untied)} in {directory} differ from what they are tied to: left untied", stacklevel=2
            )
            model._untie(untied)
            with without_memory():
                model = cls(config, **model_options)
            tensors, unexpected, _ = model._place(found)
        saved = None
        if quantised:
            saved = integers.read(directory, found)
            usual = torch.bfloat16 if backends.multiplies_bfloat16() else torch.float32
            dtype = usual if saved is None else saved.dtype
        try:
            dtype = cls._choose_dtype(dtype, config, tensors)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        wanted = model._untied_parameters()
        missing = [name for name in wanted if name not in tensors]
        cls._check_tensors(tensors, wanted, missing, directory)

        for name, parameter in wanted.items():
            if name in tensors:
                value = tensors[name].to(dtype, copy=True, memory_format=torch.contiguous_format)
            else:
                value = torch.empty(parameter.shape, dtype=dtype)
            owner_name, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner_name), leaf, torch.nn.Parameter(value, parameter.requires_grad))
        model.tie_weights()
        for name in missing:
            model._init_parameter(name)
        config.dtype = str(dtype).removeprefix("torch.")
        prefix, inner = checkpoints.wrapping(found)
        model.loading_info = {
            "missing_keys": sorted(missing),
            "unexpected_keys": sorted(unexpected),
            "removed_prefixes": [one for one in (prefix, *inner) if one],
        }
        cls._report(model.loading_info, directory)
        model.eval()
        model.base_model.packs = "int8" if quantised else "own" if pack else None
        if saved is not None:
            model._keep_integers(saved, found, directory)
        return (model, model.loading_info) if output_loading_info else model

    @classmethod
    def _constructor_options(cls) -> tuple[str, ...]:
        return ()

    @classmethod
    def _check_depth(cls, config: ModelConfig, names: Iterable[str]) -> None:
        """Raises ValueError for more layers than a checkpoint has, before so many modules are made."""
        layers = checkpoints.layers_of(names)
        if config.num_hidden_layers > layers:
            wanted = f"num_hidden_layers is {config.num_hidden_layers}"
            raise ValueError(f"lacks weights of the encoder: {layers} layers, {wanted}")

    def _place(self, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """The checkpoint's tensors under our names, names without a place, and tied weights that differ."""
        ours = self._own_names(found)
        tensors = {own: found[name] for name, own in ours.items() if own is not None}
        tied = self.tied_names()
        differing = []
        for name, same in tied.items():
            if name in tensors:
                value = tensors.pop(name)
                if not name.endswith(".bias") and same in tensors and not torch.equal(value, tensors[same]):
                    differing.append(name)
                # Where an old file disagrees with itself about a bias, this is the one that was computed with.
                tensors[same] = value
        places = set(self._untied_parameters())
        unexpected = [name for name, own in ours.items() if own is not None and own not in places and own not in tied]
        return {name: value for name, value in tensors.items() if name in places}, unexpected, differing

    def _own_names(self, found: Mapping[str, Tensor]) -> dict[str, str | None]:
        headed = self.base_model is not self
        return checkpoints.own_names(found, base=self.base_model_prefix, base_parts=self.base_parts, headed=headed)

    def _keep_integers(self, saved: integers.SavedModel, found: Mapping[str, Tensor], directory: str | Path) -> None:
        """Those of the directory, for `pack`."""
        kept = SavedIntegers()
        theirs = {own: name for name, own in self._own_names(found).items()}
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        for parameter, weight in quantised_weights(self):
            name = theirs[names[id(parameter)]]
            one = saved.integers.get(name)
            if one is None or one.weight.shape != weight.shape:
                got = "nothing" if one is None else f"int8 {list(one.weight.shape)}"
                raise ValueError(f"{directory}/{integers.FILE}: {name}: got {got}, wanted int8 {list(weight.shape)}")
            kept.add(parameter, one)
        self.base_model.saved_integers = kept

    def save_integers(self, directory: str | Path) -> None:
        """Write ``int8.safetensors`` into a directory that holds this model's weights.

        Args:
            directory: as `from_pretrained` has read it or `save_pretrained` written it; its other files stay.

        Raises:
            ValueError: the model has no layers that eight-bit integers are for, or the directory lacks their weights.
        """
        found = checkpoints.read_weights(directory)
        theirs = {own: name for name, own in self._own_names(found).items() if own is not None}
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        wanted = {names[id(parameter)]: one for parameter, one in integers_of(self) if id(parameter) in names}
        missing = [name for name in wanted if name not in theirs]
        if missing or not wanted:
            raise ValueError(f"{directory} lacks weights of this model's layers: {_listed(missing) or 'it has none'}")
        integers.write(directory, {theirs[name]: one for name, one in wanted.items()}, found, self.dtype)

    def _untied_parameters(self) -> dict[str, Tensor]:
        tied = self.tied_names()
        named = self.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in named if name not in tied}

    @classmethod
    def _check_tensors(
        cls, tensors: dict[str, Tensor], wanted: dict[str, Tensor], missing: list[str], directory: str | Path
    ) -> None:
        prefix = f"{cls.base_model_prefix}."
        required = [n for n in missing if n.removeprefix(prefix).split(".")[0] in cls.required_parts]
        if required:
            raise ValueError(f"the checkpoint in {directory} lacks weights of the encoder: {_listed(required)}")
        wrong = [
            f"{name}: got shape {list(tensors[name].shape)}, wanted {list(parameter.shape)}"
            for name, parameter in wanted.items()
            if name in tensors and tensors[name].shape != parameter.shape
        ]
        if wrong:
            raise ValueError(f"the checkpoint in {directory} does not fit its configuration: {_listed(wrong)}")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name}: got {tensor.dtype} in {directory}, wanted a floating-point dtype")

    @staticmethod
    def _choose_dtype(dtype: torch.dtype | str | None, config: ModelConfig, tensors: dict[str, Tensor]) -> torch.dtype:
        if dtype in ("auto", None):
            dtype = config.dtype or next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, dtype)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"dtype: got {dtype!r}, wanted 'auto' or torch's float32, bfloat16, float16 or float64")
        return dtype

    @classmethod
    def _report(cls, info: dict[str, list[str]], directory: str | Path) -> None:
        parts = []
        if info["missing_keys"]:
            parts.append(f"not in the checkpoint, set to fresh values: {_listed(info['missing_keys'])}")
        if info["unexpected_keys"]:
            parts.append(f"in the checkpoint, without a place here: {_listed(info['unexpected_keys'])}")
        if parts:
            warnings.warn(f"{cls.__name__} from {directory}: {'; '.join(parts)}", stacklevel=3)

    def _tensors_to_save(self) -> dict[str, Tensor]:
        return self._untied_parameters()

    def save_pretrained(self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write ``model.safetensors`` and ``config.json``, which `transformers` reads back.

        Tied tensors are written once. Each file appears whole or not at all. Of a model that multiplies by eight-bit
        integers ``int8.safetensors`` is written too, from which ``from_pretrained(directory, dtype="int8")`` makes one
        with the same outputs; of any other model one that lies there is removed.

        Args:
            directory: made if need be.
            state_dict: tensors to write in place of the model's own, under the names of its `state_dict`: of a model
                whose parameters are sharded.

        Raises:
            ValueError: `state_dict` lacks a tensor.
        """
        tensors = self._tensors_to_save()
        if state_dict is not None:
            missing = [name for name in tensors if name not in state_dict]
            if missing:
                raise ValueError(f"state_dict: lacks {_listed(missing)}")
            tensors = {name: state_dict[name].detach().clone() for name in tensors}
        config = type(self.config).from_dict(self.config.to_dict())
        config.architectures = [config.architecture(type(self))]
        config.dtype = str(self.dtype).removeprefix("torch.")
        checkpoints.write_weights(directory, tensors)
        config.save_pretrained(directory)
        if is_quantised(self):
            self.save_integers(directory)
        else:
            integers.remove(directory)
