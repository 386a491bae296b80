"""Vectors of many texts from a student that encodes them alone, by batches of bounded size."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flipkd_dist.batches import BatchMaker
from flipkd_dist.student import Student
from flipkd_dist.token_batches import BatchLimits, text_batches


@torch.inference_mode()
def text_vectors(
    student: Student,
    make_batch: BatchMaker,
    texts: Sequence[str],
    limits: BatchLimits,
    device: torch.device,
    done: Callable[[int, int], None],
) -> tuple[Tensor, Tensor]:
    """Unit vectors, fp32 [N, d], and whether texts were cut to the maximum length, bool [N], both on `device`.

    A text that comes again is computed once.

    Args:
        texts: those of a window, whose tokens are held together.
        done: told how many texts are done, and how many of them were cut.
    Raises:
        UserError: a text without a token.
    """
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    rows = torch.tensor([numbers[text] for text in texts], dtype=torch.int64)
    encoded = make_batch.encoder.encode_texts(list(numbers))
    copies, cut = torch.bincount(rows), torch.tensor([text.truncated for text in encoded], dtype=torch.bool)
    found = torch.zeros(len(encoded), student.readout_width, device=device)
    prefix, bidirectional = len(make_batch.encoder.prefix), make_batch.bidirectional
    for batch in text_batches(encoded, prefix, limits, make_batch.share_prefix, own_prefix=bidirectional):
        packed = make_batch.of_texts([encoded[number] for number in batch])
        readouts, _ = student.readouts(**packed.tensors(device))
        found[batch] = nn.functional.normalize(readouts.float(), dim=1)
        done(int(copies[batch].sum()), int(copies[batch][cut[batch]].sum()))
    return found[rows.to(device)], cut[rows].to(device)
