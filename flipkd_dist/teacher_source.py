"""Where a run's teacher signals come from: checked before anything starts, cheap to send to a worker, loaded there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from flipkd_dist.config import RunConfig, TeacherConfig
from flipkd_dist.model_files import check_files, fingerprint, resolve_model
from flipkd_dist.store import StoreSpec
from flipkd_dist.taught_folder import taught_folder
from flipkd_dist.teacher import Teacher, teacher_hidden_size


class Encoder(Protocol):
    """n texts to n rows of numbers: unit vectors [n, d], or scores of pairs [n, 1] (texts of `store.pair_text`)."""

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray: ...


@dataclass(frozen=True)
class TeacherSource:
    settings: TeacherConfig
    folders: tuple[Path, ...]
    spec: StoreSpec  # everything that a vector depends on besides its text

    def load(self, device: torch.device | str = "cpu") -> Encoder:
        """The encoder, complete.

        Raises:
            UserError: its files cannot be loaded completely.
        """
        return Teacher(self.folders[0], self.settings.pooling, self.settings.max_length, device)


def text_teacher(config: RunConfig, taught: bool = True) -> TeacherSource:
    """The encoder of single texts that the configuration names; no weights are loaded.

    Args:
        taught: take the one that `flipkd teach` made of it, where there is one.
    Raises:
        UserError
    """
    settings, key = config.teacher, "teacher.model_name_or_path"
    folder = resolve_model(settings.model_name_or_path, key)
    check_files(folder, key)
    if taught and (fine_tuned := taught_folder(config, fingerprint(folder))):
        folder = fine_tuned
        check_files(folder, key)
    spec = StoreSpec(
        fingerprint(folder), settings.pooling, settings.max_length, teacher_hidden_size(folder), settings.prompt or ""
    )
    return TeacherSource(settings, (folder,), spec)
