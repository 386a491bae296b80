"""The base's weights: by transformers, or part by part from the files, so that nothing whole has to stay anywhere."""

import ctypes
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError
from flipkd_dist.fourbit import FourBit, Linear4bit
from flipkd_dist.model_files import one_line
from flipkd_dist.weight_files import Weights, stored_name

KEY = "student.model_name_or_path"


@dataclass
class Part:
    """Tensors that one forward needs together: those of a decoder layer, or of one module outside of the layers."""

    module: nn.Module
    slots: list[tuple[nn.Module, str, str, torch.Size]]  # owner, its attribute, name in the files, shape
    weights: Weights
    dtype: torch.dtype
    device: torch.device

    def fill(self) -> None:
        """Read the tensors, in the run's dtype or quantised, one after the other."""
        for owner, attribute, name, shape in self.slots:
            value = self.weights.read(name)
            if value.shape != shape:
                raise UserError(
                    f"{KEY}: {name} has shape {list(value.shape)} in the files and {list(shape)} by config.json: "
                    "get the model again"
                )
            if isinstance(owner, Linear4bit) and attribute == "weight":
                owner.pack(value.to(self.device))
                _return_freed_memory()
            else:
                value = value.to(self.device, self.dtype, copy=True)  # a copy does not hold the file
                setattr(owner, attribute, nn.Parameter(value, requires_grad=False))

    def clear(self) -> None:
        """Drop the tensors; in their place stands one number, seen in the tensor's shape (PEFT looks at it)."""
        for owner, attribute, _, shape in self.slots:
            if isinstance(owner, Linear4bit) and attribute == "weight":
                owner.clear()
            else:
                number = torch.zeros((), dtype=self.dtype, device=self.device)
                setattr(owner, attribute, nn.Parameter(number.expand(shape), requires_grad=False))

    def parameters(self) -> list[nn.Parameter]:
        return [getattr(owner, attribute) for owner, attribute, *_ in self.slots]


class Placement(Protocol):
    """What becomes of the base's weights while it is loaded."""

    by_parts: bool  # whether it wants parts even where transformers could load the model
    device: torch.device  # where parts are quantised

    def loading(self) -> AbstractContextManager:
        """The context in which transformers loads."""

    def place(self, part: Part) -> None:
        """Fill the part, and put its tensors where they belong before the next one is filled."""


class Whole:
    """Everything stays in this process."""

    by_parts = False

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def loading(self) -> AbstractContextManager:
        return nullcontext()

    def place(self, part: Part) -> None:
        part.fill()


class Streamed(Whole):
    """Each part is read when its forward begins and dropped when it ends: no gradient, little memory."""

    by_parts = True

    def __init__(self, device: torch.device | str = "cpu", state: dict[str, Tensor] | None = None):
        """`state`: tensors by the model's names that are read in place of those in the files."""
        super().__init__(device)
        self.state = state or {}

    def place(self, part: Part) -> None:
        part.clear()
        part.module.register_forward_pre_hook(lambda *_: part.fill())
        part.module.register_forward_hook(lambda *_: part.clear(), always_call=True)


def four_bit_form(settings: StudentConfig, dtype: torch.dtype) -> FourBit | None:
    """How the settings want weights packed for an engine of `dtype`; None: not at all.

    Raises:
        UserError: a storage that an engine would cast.
    """
    if not settings.load_in_4bit:
        return None
    storage = settings.bnb_4bit_quant_storage
    run = str(dtype).removeprefix("torch.")
    if storage not in ("auto", "uint8", run):
        raise UserError(
            f"student.bnb_4bit_quant_storage: {storage} in a {run} run: engines cast floating tensors to their own "
            f"dtype, which destroys packed bytes: take auto, uint8 or {run}"
        )
    storage = torch.uint8 if storage == "auto" else getattr(torch, storage)
    return FourBit(settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant, storage)


def pretrained_model(
    folder: Path, config: PreTrainedConfig, attention: str, dtype: torch.dtype, placement: Placement, name: str
) -> PreTrainedModel:
    """The model as transformers loads it."""
    try:
        with placement.loading():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{KEY}: {name} cannot be loaded ({one_line(error)})") from None
    if info["missing_keys"]:  # transformers would go on with random weights there
        raise UserError(
            f"{KEY}: {name} lacks {len(info['missing_keys'])} weights, such as {min(info['missing_keys'])}: "
            "get it again"
        )
    return model


def empty_model(config: PreTrainedConfig, attention: str, dtype: torch.dtype, name: str) -> PreTrainedModel:
    """The model with parameters on the meta device; what its constructor computes (rotary frequencies) is real."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # transformers raises nearly anything here
        raise UserError(f"{KEY}: {name}: config.json cannot be used ({one_line(error)}): take another") from None
    return model.eval()


def load_parts(
    model: PreTrainedModel, weights: Weights, form: FourBit | None, dtype: torch.dtype, placement: Placement, name: str
) -> None:
    """Fill an empty model part by part; with `form`, the linear layers inside decoder layers are packed.

    Raises:
        UserError: names or shapes that the files do not have.
    """
    if form is not None:
        check_packable(model, name)
        for layer in decoder_layers(model, name):
            _replace_linear(layer, form)
    for part in find_parts(model, weights, dtype, placement.device, name):
        placement.place(part)
    for module in model.modules():  # parameters are on the device by now, rotary frequencies not yet
        for buffer_name, buffer in module.named_buffers(recurse=False):
            setattr(module, buffer_name, buffer.to(placement.device))
    for buffer_name in model.state_dict().keys() & dict(model.named_buffers()).keys():  # the persistent ones
        found = stored_name(weights, [buffer_name], model.base_model_prefix)
        if found:
            model.get_buffer(buffer_name).copy_(weights.read(found))


def _return_freed_memory() -> None:
    """Hand freed pages back to the system: among the packed tensors glibc would keep three times their size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def decoder_layers(model: PreTrainedModel, name: str) -> list[nn.Module]:
    """The layers of the body, from the first list of modules that has as many as the configuration says."""
    count = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UserError(
        f"{KEY}: {name} ({type(model).__name__}) has no list of {count} layers: 4 bits and merging need one"
    )


def check_packable(model: PreTrainedModel, name: str) -> None:
    """Four bits are for linear layers: any other matrix of a decoder layer would silently stay as it is.

    Raises:
        UserError
    """
    for layer in decoder_layers(model, name):
        for path, module in layer.named_modules():
            large = [key for key, value in module.named_parameters(recurse=False) if value.dim() > 1]
            if large and not isinstance(module, nn.Linear):
                raise UserError(
                    f"student.load_in_4bit: {path}.{large[0]} in the layers of {name} ({type(module).__name__}) is no "
                    "linear layer and would not be packed: set it to false"
                )


def _replace_linear(layer: nn.Module, form: FourBit) -> None:
    linear = [(path, module) for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
    for path, module in linear:
        layer.set_submodule(path, Linear4bit(module.in_features, module.out_features, module.bias, form))


def find_parts(
    model: PreTrainedModel, weights: Weights, dtype: torch.dtype, device: torch.device | str, name: str
) -> list[Part]:
    """Every tensor of the model in one part; reads nothing but names.

    Raises:
        UserError: a tensor that the files do not have under the model's name for it.
    """
    layers = decoder_layers(model, name)
    parts, inside, missing = [], {module for layer in layers for module in layer.modules()}, []
    for path, module in model.named_modules():
        if module in inside and module not in layers:
            continue
        slots = []
        for parameter, value in module.named_parameters(recurse=module in layers, remove_duplicate=False):
            owner_path, _, attribute = parameter.rpartition(".")
            owner = module.get_submodule(owner_path)
            full = f"{path}.{parameter}".lstrip(".")
            stored = stored_name(weights, [full], model.base_model_prefix)
            packed = isinstance(owner, Linear4bit) and attribute == "weight"
            shape = torch.Size((owner.out_features, owner.in_features)) if packed else value.shape
            slots.append((owner, attribute, stored, shape))
            missing += [full] if stored is None else []
        if slots:
            parts.append(Part(module, slots, weights, dtype, torch.device(device)))
    if missing:
        raise UserError(
            f"{KEY}: {name} lacks {len(missing)} weights under the names of {type(model).__name__}, such as "
            f"{min(missing)}: get it again, or set student.load_in_4bit to false"
        )
    return parts
