"""The GLM of 2022, slowly: NumPy in float64, one token and one head at a time, from weights by published names."""

import math

import numpy as np


def layer_norm(x: np.ndarray, weights: dict, name: str) -> np.ndarray:
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: dict, name: str) -> np.ndarray:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x])


def attend(inputs: list[np.ndarray], sees: np.ndarray, num_heads: int, weights: dict, name: str) -> list[np.ndarray]:
    """`sees[i, j]`: whether token i sees token j."""
    hidden = len(inputs[0])
    size = hidden // num_heads
    fused = [linear(x, weights, f"{name}.query_key_value") for x in inputs]
    mixed = []
    for i in range(len(inputs)):
        heads = []
        for first in range(0, hidden, size):
            query = fused[i][first : first + size]
            seen = [j for j in range(len(inputs)) if sees[i, j]]
            scores = [
                query @ fused[j][hidden + first : hidden + first + size] / math.sqrt(size) for j in seen
            ]  # keys behind all queries
            shares = np.exp(np.array(scores) - max(scores))
            shares /= shares.sum()
            values = [fused[j][2 * hidden + first : 2 * hidden + first + size] for j in seen]
            heads.append(sum(share * value for share, value in zip(shares, values, strict=True)))
        mixed.append(linear(np.concatenate(heads), weights, f"{name}.dense"))
    return mixed


def glm(
    weights: dict[str, np.ndarray], num_heads: int, ids: list[int], positions: np.ndarray, sees: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """Hidden states [L, h] before the first layer and behind each, and logits [L, V].

    Args:
        positions: [2, L], in the context and in the blank.
    """
    words, stack = weights["glm.word_embeddings.weight"], "glm.transformer"
    tables = (weights[f"{stack}.position_embeddings.weight"], weights[f"{stack}.block_position_embeddings.weight"])
    states = [words[t] + tables[0][p] + tables[1][b] for t, p, b in zip(ids, *positions, strict=True)]
    history = [np.stack(states)]
    num_layers = 1 + max(int(name.split(".")[3]) for name in weights if ".layers." in name)
    for number in range(num_layers):
        layer = f"{stack}.layers.{number}"
        normed = [layer_norm(x, weights, f"{layer}.input_layernorm") for x in states]
        states = [
            x + y for x, y in zip(states, attend(normed, sees, num_heads, weights, f"{layer}.attention"), strict=True)
        ]
        for i, x in enumerate(states):
            normed_again = layer_norm(x, weights, f"{layer}.post_attention_layernorm")
            wide = gelu(linear(normed_again, weights, f"{layer}.mlp.dense_h_to_4h"))
            states[i] = x + linear(wide, weights, f"{layer}.mlp.dense_4h_to_h")
        history.append(np.stack(states))
    final = [layer_norm(x, weights, f"{stack}.final_layernorm") for x in states]
    return history, np.stack([words @ x for x in final])
