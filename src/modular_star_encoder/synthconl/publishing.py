"""A built dataset to the Hugging Face Hub."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import DatasetCard, HfApi

from modular_star_encoder.synthconl.build import CARD, STATISTICS
from modular_star_encoder.utils.hub import check_repository_id, wrap_hub_errors


@dataclass(frozen=True, slots=True)
class Upload:
    """What goes, or would go, to the Hub.

    Attributes:
        repository: Id of the dataset repository.
        files: (path in the repository, bytes) of every file.
        url: Where it is after the upload; empty if nothing was uploaded.
    """

    repository: str
    files: tuple[tuple[str, int], ...]
    url: str = ""

    def __str__(self) -> str:
        """One line a file, and one for all."""
        lines = [f"{size:>14,}  {name}" for name, size in self.files]
        total = f"{sum(size for _, size in self.files):>14,}  bytes in {len(self.files)} files"
        end = f"uploaded to {self.url}" if self.url else f"nothing was uploaded to {self.repository}: a dry run"
        return "\n".join([*lines, total, end])


def push_dataset(
    folder: str | os.PathLike[str], repository: str, *, upload: bool = False, private: bool = True
) -> Upload:
    """Upload a dataset with its card, or say what would be uploaded.

    The access token is the one of `hf auth login` or `HF_TOKEN`.

    Args:
        folder: A folder that `build_dataset` returned; or that it was given, which has it in it.
        repository: Id of a dataset repository, `owner/name`; it is made if there is none.
        upload: Whether to upload; nothing is sent otherwise.
        private: Whether a new repository is private.

    Raises:
        ValueError: If the folder holds no finished dataset, or the id is none.
        OSError: If the Hub refuses, or can't be reached.
    """
    root = _dataset_folder(Path(folder))
    check_repository_id(repository)
    paths = [root / CARD, root / STATISTICS, *sorted(root.glob("data/*.parquet"))]
    files = tuple((path.relative_to(root).as_posix(), path.stat().st_size) for path in paths)
    if not upload:
        return Upload(repository, files)
    api = HfApi()
    with wrap_hub_errors(repository):
        url = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=root,
            allow_patterns=[name for name, _ in files],
            # Files of an earlier build with another number of shards would be read along.
            delete_patterns="data/*.parquet",
            commit_message="Upload dataset",
        )
    return Upload(repository, files, str(url))


def _dataset_folder(folder: Path) -> Path:
    """The folder of the finished dataset, with a card that the Hub can read.

    Raises:
        ValueError: There is none.
    """
    root = folder if (folder / CARD).is_file() else folder / "dataset"
    if not (root / CARD).is_file() or not any(root.glob("data/*.parquet")) or not (root / STATISTICS).is_file():
        raise ValueError(f"{folder} holds no finished dataset; `mose dataset build` makes one.")
    try:
        card = DatasetCard.load(root / CARD).data.to_dict()
    except (ValueError, OSError) as error:
        raise ValueError(f"The metadata of {root / CARD} can't be read: {' '.join(str(error).split())}") from error
    missing = [name for name in ("license", "task_categories", "configs", "size_categories") if not card.get(name)]
    if missing:
        raise ValueError(f"The metadata of {root / CARD} lacks {', '.join(missing)}.")
    return root
