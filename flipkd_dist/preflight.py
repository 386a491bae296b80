"""Everything that can be the user's mistake, found before anything is written or started."""

from dataclasses import dataclass
from pathlib import Path

from flipkd_dist.config import RunConfig
from flipkd_dist.ds_config import read_policy
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import fingerprint, resolve_model
from flipkd_dist.pairs import PairTable, read_pairs
from flipkd_dist.prompt import PairEncoder
from flipkd_dist.run_folder import RunFolder, decisive_settings, digest
from flipkd_dist.store import Store, StoreSpec
from flipkd_dist.student import attention_implementation, check_base, load_tokenizer, shares_prefix
from flipkd_dist.teacher import teacher_hidden_size

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Inputs:
    """A run's checked inputs; cheap to make again in every worker."""

    config: RunConfig
    folder: RunFolder
    splits: dict[str, PairTable]
    teacher_folder: Path
    store: Store
    base_folder: Path
    base_fingerprint: str
    tokenizer: object
    encoder: PairEncoder
    share_prefix: bool

    @property
    def texts(self) -> list[str]:
        return list(dict.fromkeys(text for pairs in self.splits.values() for text in pairs.texts))

    def digest(self, *splits: str) -> str:
        """A hash of what the adapter depends on, and of the named splits."""
        return digest(
            decisive_settings(self.config),
            self.store.spec.key,
            self.base_fingerprint,
            [_content(self.splits[split]) for split in splits if split in self.splits],
        )


def _content(pairs: PairTable) -> list:
    return [pairs.texts, pairs.text_a.tolist(), pairs.text_b.tolist(), pairs.label.tolist(), pairs.kind]


def check_inputs(config: RunConfig, splits: tuple[str, ...] = SPLITS) -> Inputs:
    """Read and check what the configuration names; starts and writes nothing.

    Raises:
        UserError: one line for the first mistake.
    """
    if config.distributed.deepspeed is None:
        if config.distributed.num_workers > 1:
            raise UserError(
                "distributed.deepspeed is null, which trains on one worker: name a file or set num_workers to 1"
            )
    else:
        read_policy(config.distributed.deepspeed)
    folder = RunFolder(config)
    folder.check()
    tables = {}
    for split in splits:
        paths = getattr(config.data, split)
        if split == "train" or paths is not None:
            tables[split] = read_pairs(paths, config.data, f"data.{split}")
    teacher_folder = resolve_model(config.teacher.model_name_or_path, "teacher.model_name_or_path")
    base_folder = resolve_model(config.student.model_name_or_path, "student.model_name_or_path")
    attention_implementation(config.student)
    base_config = check_base(base_folder, config.student)
    tokenizer = load_tokenizer(base_folder)
    encoder = PairEncoder(tokenizer, config.student.prompt, config.student.answers, config.data.max_length)
    spec = StoreSpec(
        fingerprint(teacher_folder),
        config.teacher.pooling,
        config.teacher.max_length,
        teacher_hidden_size(teacher_folder),
    )
    return Inputs(
        config=config,
        folder=folder,
        splits=tables,
        teacher_folder=teacher_folder,
        store=Store(folder.teacher, spec),
        base_folder=base_folder,
        base_fingerprint=fingerprint(base_folder),
        tokenizer=tokenizer,
        encoder=encoder,
        share_prefix=shares_prefix(base_config, config.data.max_length),
    )
