"""Configuration of the GLM of 2022, under the keys of the published config.json.

Sources: names and meaning, github.com/THUDM/GLM, examples/squad/model_gen/configuration_glm.py at
dec03b98f1d51e1aa9f4523ee4f3fefe7bf17f7e; the values of each checkpoint, github.com/PaddlePaddle/PaddleNLP,
paddlenlp/transformers/glm/configuration.py at 30f74e3e2cbfc9b31fef8962baa17d40bcc1aed5.
"""

from transformers import PreTrainedConfig


class GlmOriginalConfig(PreTrainedConfig):
    """`model_type` is our own: the published one, "glm", is that of GLM-4 in transformers."""

    model_type = "glm_original"
    attribute_map = {"num_hidden_layers": "num_layers", "max_position_embeddings": "max_sequence_length"}  # noqa: RUF012

    def __init__(
        self,
        num_layers: int = 48,
        vocab_size: int = 50304,
        hidden_size: int = 4096,
        num_attention_heads: int = 64,
        max_sequence_length: int = 1024,
        embedding_dropout_prob: float = 0.1,
        attention_dropout_prob: float = 0.1,
        output_dropout_prob: float = 0.1,
        layernorm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        hidden_act: str = "gelu_pytorch_tanh",
        block_position_encoding: bool = True,
        relative_encoding: bool = False,
        **kwargs,
    ):
        """
        Args:
            hidden_act: the published modelling code has "gelu", the exact form; training had the tanh form.
        Raises:
            ValueError: positions that no published checkpoint has.
        """
        if relative_encoding or not block_position_encoding:
            raise ValueError("only GLMs with block positions and without relative ones are known")
        self.num_layers = num_layers
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.max_sequence_length = max_sequence_length
        self.embedding_dropout_prob = embedding_dropout_prob
        self.attention_dropout_prob = attention_dropout_prob
        self.output_dropout_prob = output_dropout_prob
        self.layernorm_epsilon = layernorm_epsilon
        self.initializer_range = initializer_range
        self.hidden_act = hidden_act
        self.block_position_encoding, self.relative_encoding = True, False
        for name in ("model_type", "auto_map", "architectures"):  # of the code that the checkpoints carry
            kwargs.pop(name, None)
        super().__init__(**{**kwargs, "tie_word_embeddings": True})


def is_published_glm(config: dict) -> bool:
    """Whether this config.json is one of the original GLM's, which a transformers of today takes for GLM-4."""
    return config.get("model_type") == "glm" and "block_position_encoding" in config
