"""The student: a causal LM with LoRA or tuned as a whole, read at two output rows and at the last layer."""

import hashlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flipkd_dist.base import (
    attention_implementation,
    attention_targets,
    check_base,
    check_parts,
    drop_output_matrix,
    output_rows,
)
from flipkd_dist.base_loader import Placement, Streamed, Whole, empty_model, four_bit_form, load_parts, pretrained_model
from flipkd_dist.both_ways import read_both_ways
from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError
from flipkd_dist.last_layer import behind_attention, narrowed
from flipkd_dist.losses import alone_logits, at_least_fp32
from flipkd_dist.model_files import one_line
from flipkd_dist.shared_attention import SHARED, row_of_paths
from flipkd_dist.weight_files import Replaced, WeightFiles, Weights

LORA_A_STD = 0.01  # FlipKD, section 4
ANSWERS = ("answer_rows", "answer_bias")


class _ReadOut(Exception):
    """What is wanted is there: the rest of the forward is left out."""


class Student(nn.Module):
    """Two logits and two read-outs a pair.

    Shapes: R rows of L tokens, m pairs, S texts, r the width of a read-out.
    """

    def __init__(
        self,
        model: nn.Module,
        answer_rows: Tensor,
        answer_bias: Tensor | None,
        encoder_module: str | None,
        reads: str = "lora_a",
        alone: bool = False,
        trains_answers: bool = False,
    ):
        """
        Args:
            model: the PEFT model of a causal LM, or with full tuning the causal LM itself.
            answer_rows: [2, hidden], rows of the output matrix for the matching and the other answer.
            answer_bias: [2] or None.
            encoder_module: the projection whose LoRA-A in the last layer is read; None: there is no LoRA.
            reads: the read-out, `StudentConfig.reads`: r is LoRA's rank for lora_a, else the width of hidden states.
            alone: whether texts are encoded by themselves, so that read-outs are all that p(match) depends on.
            trains_answers: whether rows and bias are parameters, of their own even where the base ties its embeddings.
        """
        super().__init__()
        self.model = model
        for name, value in (("answer_rows", answer_rows), ("answer_bias", answer_bias)):
            if trains_answers:
                self.register_parameter(name, None if value is None else nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)
        self.encoder_module, self.reads, self.alone = encoder_module, reads, alone
        self.encoder_name = None if encoder_module is None else last_encoder(model, encoder_module)
        self.shares_prefix = model.config._attn_implementation == SHARED
        self.bidirectional = not getattr(model.config, "is_causal", True)  # as `read_both_ways` leaves it
        self.behind_attention = [] if encoder_module is None else behind_attention(model, self.encoder_name)

    @property
    def causal_lm(self) -> nn.Module:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        paths: tuple[Tensor, ...],
        path_masks: tuple[Tensor, ...],
        places: Tensor | None,
        segments: Tensor,
        first_texts: Tensor,
        second_texts: Tensor,
        last_tokens: Tensor,
        answer_positions: Tensor,
        readouts_only: bool = False,
    ) -> tuple[Tensor, ...]:
        """Answer logits [m, 2] (match first), read-outs of first and of second texts [m, r] each, fp32 sums.

        Args: the tensors of a `PackedBatch`, and
            readouts_only: stop at the read-outs and return these two; without gradient alone.
        """
        body = self.causal_lm.base_model
        shared = {"paths": paths, "places": places, "path_masks": path_masks} if paths else {}
        if paths:
            attention_mask = row_of_paths(input_ids.device)
        captured: list[Tensor] = []

        def capture(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            captured.append(output)
            if readouts_only:
                raise _ReadOut

        # Hooks are for this call alone. Activation checkpointing runs a layer again without them, in the backward: what
        # is captured stays as it is, and the last layer's end must have seen every position the first time too.
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        whole = checkpointed or self.reads == "mean"
        narrow = narrowed([] if whole else self.behind_attention, self._positions_read(answer_positions, last_tokens))
        with suppress(_ReadOut), self._hook(capture), narrow:
            hidden = body(
                input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False, **shared
            ).last_hidden_state
        if self.reads == "lasttoken":
            readouts = at_least_fp32(hidden.flatten(0, 1)[last_tokens])
        else:
            values = hidden if self.reads == "mean" else captured[0]
            readouts = self.segment_means(values, segments, len(last_tokens))
        sides = readouts[first_texts], readouts[second_texts]
        if readouts_only:
            return sides
        answers = hidden.flatten(0, 1)[answer_positions]
        if self.alone:
            # Nothing is answered; but weights behind the read-outs have a gradient on every rank, which is zero.
            return alone_logits(*sides) + 0 * answers.sum(), *sides
        # In fp32 at least: rounded to bf16, logits of 16 to 32 would be 0.125 apart.
        bias = None if self.answer_bias is None else at_least_fp32(self.answer_bias)
        logits = nn.functional.linear(at_least_fp32(answers), at_least_fp32(self.answer_rows), bias)
        return logits, *sides

    def _hook(self, capture: Callable) -> AbstractContextManager:
        if self.reads != "lora_a":
            return nullcontext()
        return self.model.get_submodule(self.encoder_name).lora_A["default"].register_forward_hook(capture)

    def _positions_read(self, answer_positions: Tensor, last_tokens: Tensor) -> Tensor:
        """Of the last hidden states, each once; a pair's last token may be that of its second text too."""
        if self.reads == "lasttoken" and not self.alone:
            return torch.cat([answer_positions, last_tokens]).unique()
        return answer_positions

    @property
    def readout_width(self) -> int:
        if self.reads == "lora_a":
            return self.model.get_submodule(self.encoder_name).r["default"]
        return self.model.config.hidden_size

    @torch.no_grad()
    def readouts(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """The read-outs that `forward` gives, without gradient: nothing behind the last layer's LoRA-A is computed."""
        return self(**batch, readouts_only=True)

    @staticmethod
    def segment_means(values: Tensor, segments: Tensor, num_texts: int) -> Tensor:
        """Mean of `values` [R, L, r] over the tokens of each text: [S, r]."""
        slots = segments.flatten()
        sums = values.new_zeros(num_texts + 1, values.shape[-1], dtype=torch.float32)
        sums = sums.index_add(0, slots, values.flatten(0, 1).float())
        counts = torch.zeros(len(sums), device=slots.device).index_add(0, slots, torch.ones_like(slots).float())
        return (sums / counts.clamp(min=1).unsqueeze(1))[:num_texts]

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """By the model's own names: those of LoRA, or all of the causal LM's and the answers'."""
        found = ((name.removeprefix("model."), parameter) for name, parameter in self.named_parameters())
        return {name: parameter for name, parameter in found if parameter.requires_grad}

    def behind_readouts(self) -> set[str]:
        """Names of what the read-outs do not depend on: with no other loss they stay as they are.

        They are the last layer's LoRA-B where LoRA-A is read, and with full tuning the answers' rows.
        """
        if self.encoder_name is None:
            return {name for name in self.trained_parameters() if name in ANSWERS}
        if self.reads != "lora_a":
            return set()
        layer = re.search(r".*\.\d+\.", self.encoder_name).group()
        return {name for name in self.trained_parameters() if name.startswith(layer) and ".lora_B." in name}


def last_encoder(model: nn.Module, encoder_module: str) -> str:
    """Name of the last layer's `encoder_module`, which has LoRA."""
    found = []
    for name, module in model.named_modules():
        layer = re.search(r"\.(\d+)\.", name)
        if isinstance(module, LoraLayer) and name.rsplit(".", 1)[-1] == encoder_module and layer:
            found.append((int(layer.group(1)), name))
    if not found:
        raise UserError(
            f"student.encoder_module: no layer has LoRA on {encoder_module!r}: name one of student.lora_target_modules"
        )
    if len({layer for layer, _ in found}) < len(found):
        raise UserError(f"student.encoder_module: {encoder_module!r} stands more than once in a layer: name another")
    return max(found)[1]


def default_encoder(targets: list[str]) -> str:
    """The query projection where it has LoRA, else the first module named (the fused one)."""
    return "q_proj" if "q_proj" in targets else targets[0]


def load_student(
    folder: Path,
    settings: StudentConfig,
    answers: list[int],
    rank: int | None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    placement: Placement | None = None,
    weights: Weights | None = None,
) -> Student:
    """Load the base, and put fresh LoRA on it (A ~ N(0, 0.01^2) from the seed and its name, B = 0) or train it all.

    Args:
        answers: token ids of the matching and the other answer.
        rank: r of LoRA where the settings leave it open (the teacher's hidden size); None with full tuning.
        placement: what becomes of the base's weights; default: they stay whole in this process.
        weights: where they come from, if not from the files in `folder`.
    Raises:
        UserError: a base that cannot be loaded, or modules that it lacks.
    """
    config = check_base(folder, settings)
    transformers.utils.logging.disable_progress_bar()
    name, attention = settings.model_name_or_path, attention_implementation(settings)
    placement, weights = placement or Whole(), weights or WeightFiles(folder, name)
    form = four_bit_form(settings, dtype)
    by_parts = form is not None or placement.by_parts
    if isinstance(placement, Streamed):
        weights = Replaced(weights, placement.state)
    if by_parts:
        model = empty_model(config, attention, dtype, name)
    else:
        model = pretrained_model(folder, config, attention, dtype, placement, name)
    check_parts(model, name)
    if attention == "sdpa" and model.is_backend_compatible():
        model.set_attn_implementation(SHARED)
    rows, bias = output_rows(model, weights, answers, name)
    drop_output_matrix(model)
    if by_parts:
        load_parts(model, weights, form, dtype, placement, name)
    if gradient_checkpointing:
        # The reentrant kind detaches what the hook captures: the read-out would have no gradient.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.bidirectional:
        read_both_ways(model)
    rows, bias = rows.to(dtype), None if bias is None else bias.to(dtype)
    alone = settings.mode == "alone"
    if settings.tuning == "full":
        if not by_parts:  # what is read part by part is to be looked at alone
            model.requires_grad_(True)
        return Student(model, rows, bias, None, settings.reads, alone, not alone)
    return _with_lora(model, rows, bias, settings, rank, seed)


def _with_lora(
    model: nn.Module, rows: Tensor, bias: Tensor | None, settings: StudentConfig, rank: int, seed: int
) -> Student:
    targets = settings.lora_target_modules or attention_targets(model)
    lora_r = settings.lora_r or rank
    lora = LoraConfig(
        r=lora_r,
        lora_alpha=settings.lora_alpha or lora_r,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"student.lora_target_modules: {targets} do not fit ({one_line(error)})") from None
    encoder_module = settings.encoder_module or default_encoder(targets)
    student = Student(model, rows, bias, encoder_module, settings.reads, settings.mode == "alone")
    initialise_lora(student, seed)
    return student


def initialise_lora(student: Student, seed: int) -> None:
    """A ~ N(0, 0.01^2), B = 0; a tensor's values depend on the seed and its name alone, not on rank or world."""
    for name, parameter in student.trained_parameters().items():
        if ".lora_A." in name:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            values = torch.randn(parameter.shape, generator=generator) * LORA_A_STD
            parameter.data.copy_(values)
        else:
            parameter.data.zero_()
