"""The GLM of 2022 (THUDM glm-2b, glm-10b, glm-10b-chinese): blank filling with two positions a token, no remote code.

Shapes: B rows of L tokens, h hidden, n heads.

Sources: github.com/THUDM/GLM. Names and shapes of the state dict, order of query, key and value, layer norms:
examples/squad/model_gen/modeling_glm.py at dec03b98f1d51e1aa9f4523ee4f3fefe7bf17f7e, which is the code that the
published checkpoints carry. The tanh form of GELU that they were trained with: mpu/transformer.py at
b9679fdc15894276b1e083d437eab000194dbca1. Paper: arXiv 2103.10360.
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flipkd_dist.glm_original_config import GlmOriginalConfig


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_kwargs,
) -> tuple[Tensor, Tensor]:
    """What transformers' attention interface asks for; `attention_mask` is added to the scores."""
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class GlmOriginalAttention(nn.Module):
    is_causal = False  # the mask alone says who sees whom

    def __init__(self, config: GlmOriginalConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.output_dropout = nn.Dropout(config.output_dropout_prob)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        heads = (*hidden_states.shape[:2], -1, self.head_size)
        # All queries, then all keys, then all values. GPT-NeoX, with the same names, has them head by head.
        query, key, value = (
            part.view(heads).transpose(1, 2) for part in self.query_key_value(hidden_states).chunk(3, dim=-1)
        )
        implementation = self.config._attn_implementation
        attend = eager_attention if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        # The configuration's `attention_scale` rearranges this product against overflow in fp16, its value is the same.
        mixed, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.head_size**-0.5,
            dropout=self.config.attention_dropout_prob if self.training else 0.0,
        )
        return self.output_dropout(self.dense(mixed.reshape(hidden_states.shape)))


class GlmOriginalMLP(nn.Module):
    def __init__(self, config: GlmOriginalConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.output_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.dense_4h_to_h(self.activation(self.dense_h_to_4h(hidden_states))))


class GlmOriginalLayer(GradientCheckpointingLayer):
    def __init__(self, config: GlmOriginalConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = GlmOriginalAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = GlmOriginalMLP(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attention(self.input_layernorm(hidden_states), attention_mask)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GlmOriginalStack(nn.Module):
    def __init__(self, config: GlmOriginalConfig):
        super().__init__()
        # The last row of each table is the published code's own; no position reaches it.
        self.position_embeddings = nn.Embedding(config.max_sequence_length + 1, config.hidden_size)
        self.block_position_embeddings = nn.Embedding(config.max_sequence_length + 1, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout_prob)
        self.layers = nn.ModuleList(GlmOriginalLayer(config) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, attention_mask: Tensor, history: list[Tensor] | None
    ) -> Tensor:
        """Output behind the final layer norm; what enters the first layer and leaves each one is added to `history`."""
        positions = self.position_embeddings(position_ids[:, 0])
        positions = positions + self.block_position_embeddings(position_ids[:, 1])
        hidden_states = self.embedding_dropout(embeddings + positions)
        if history is not None:
            history.append(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
            if history is not None:
                history.append(hidden_states)
        return self.final_layernorm(hidden_states)


class GlmOriginalPreTrainedModel(PreTrainedModel):
    config_class = GlmOriginalConfig
    base_model_prefix = "glm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GlmOriginalLayer"]  # noqa: RUF012
    _supports_sdpa = True


class GlmOriginalModel(GlmOriginalPreTrainedModel):
    """Embeddings and blocks; `last_hidden_state` is behind the final layer norm."""

    def __init__(self, config: GlmOriginalConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = GlmOriginalStack(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_kwargs,  # such as use_cache: a row is read once
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: [B, L].
            position_ids: [B, 2, L], positions in the context (in the blank: of its [MASK]) and in the blank, from 1;
                None counts along the row, outside any blank.
            attention_mask: [B, 1, L, L], true or 1 where a token (row) sees another (column), or floats that are added
                to the scores; [B, L] hides padding alone; None is a causal mask.
        """
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            positions = torch.arange(embeddings.shape[1], device=embeddings.device)
            position_ids = torch.stack([positions, torch.zeros_like(positions)]).expand(len(embeddings), -1, -1)
        history = [] if output_hidden_states else None
        mask = self._scores_mask(attention_mask, embeddings)
        output = self.transformer(embeddings, position_ids, mask, history)
        return BaseModelOutput(last_hidden_state=output, hidden_states=tuple(history) if history else None)

    def _scores_mask(self, mask: Tensor | None, embeddings: Tensor) -> Tensor:
        """The mask as the attention takes it: floats to add for eager, else booleans."""
        length, dtype = embeddings.shape[1], embeddings.dtype
        if mask is None:
            mask = torch.ones(1, 1, length, length, device=embeddings.device).tril()
        elif mask.dim() == 2:
            mask = mask[:, None, None, :].expand(-1, -1, length, -1).bool()
        elif mask.is_floating_point():
            return mask
        mask = mask.bool()
        if self.config._attn_implementation == "eager":
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask


class GlmOriginalForCausalLM(GlmOriginalPreTrainedModel, GenerationMixin):
    """Scores of the vocabulary by the matrix of the word embeddings; published as `GLMForConditionalGeneration`."""

    _tied_weights_keys = {"lm_head.weight": "glm.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: GlmOriginalConfig):
        super().__init__(config)
        self.glm = GlmOriginalModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, position_ids: Tensor, generation_attention_mask: Tensor, **_kwargs
    ) -> dict[str, Tensor]:
        """`generate` takes positions [B, 2, N] and a mask [B, 1, N, N] up to the longest output, and keeps no cache."""
        length = input_ids.shape[1]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids[..., :length],
            "attention_mask": generation_attention_mask[..., :length, :length],
        }

    def forward(self, labels: Tensor | None = None, **inputs) -> CausalLMOutput:
        """Arguments of `GlmOriginalModel.forward`; `labels` [B, L] stand where they are predicted, else -100."""
        output = self.glm(**inputs)
        logits = self.lm_head(output.last_hidden_state)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)


# Classes under `glm_original`; how a published folder is told from GLM-4: `base.check_base`.
AutoConfig.register(GlmOriginalConfig.model_type, GlmOriginalConfig)
AutoModel.register(GlmOriginalConfig, GlmOriginalModel)
AutoModelForCausalLM.register(GlmOriginalConfig, GlmOriginalForCausalLM)
