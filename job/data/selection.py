"""The rows that a split setting names, such as `train`, `train[:1000]` or `train[:10%]+test`, as a stream of batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from job.data.files import Batch, FileOptions, read_batches
from job.data.splits import find_splits, named_by_none
from job.errors import InputError

Part = tuple[tuple[Path, ...], int, int | None]  # files, first row, and the row to stop before


@dataclass(frozen=True)
class Selection:
    """Rows of some files below `folder`: what to read, and nothing read yet."""

    folder: Path
    split: str
    parts: tuple[Part, ...]

    def batches(self, options: FileOptions) -> Iterator[Batch]:
        """The rows, in order. Raises InputError for files that cannot be read."""
        for files, first, last in self.parts:
            position = 0
            for path in files:
                if last is not None and position >= last:
                    break
                for batch in read_batches(path, self._name(path), options):
                    start, end = max(0, first - position), len(batch)
                    if last is not None:
                        end = min(end, last - position)
                    position += len(batch)
                    if start < end:
                        yield batch.slice(start, end)
                    if last is not None and position >= last:
                        break

    def count(self, options: FileOptions) -> int:
        """The number of rows, which takes reading them all."""
        return sum(map(len, self.batches(options)))

    def files(self) -> list[Path]:
        return [path for files, _, _ in self.parts for path in files]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def select(folder: Path, split: str, config: str | None, options: FileOptions, *, variable: str) -> Selection:
    """Find the rows of `split` below `folder`.

    Opens no file outside of it, whatever the dataset's card says. `variable` is the setting that names the split.
    Raises InputError if there is no such split or it cannot be understood.
    """
    splits = find_splits(folder, config)
    if unused := named_by_none(folder, config, splits):
        more = f" and {len(unused) - 5:,} more" if len(unused) > 5 else ""
        options.tell(
            f"Not used, since other files are named like splits and these are not: {', '.join(unused[:5])}{more}."
        )
    split = _offered(split, set(splits), options)
    names = {part.partition("[")[0].strip() for part in split.split("+")} - {"all"}
    if missing := names - splits.keys():
        near = [name for name in sorted(splits) if name.startswith(min(missing))]
        raise InputError(
            f"The dataset has no split {min(missing)!r}. It has {', '.join(sorted(splits))}.",
            f"Set {variable} to one of them" + (f", such as {near[0]}." if near else "."),
        )
    if "[" not in split and "all" not in split.split("+"):
        wanted = [part.strip() for part in split.split("+")]
        return Selection(folder, split, tuple((tuple(splits[name]), 0, None) for name in wanted))
    from datasets import ReadInstruction  # takes a second to import

    known = splits if "all" in split else {name: splits[name] for name in names}
    try:
        spec = ReadInstruction.from_spec(split)
        counts = {
            name: Selection(folder, name, ((tuple(files), 0, None),)).count(options) for name, files in known.items()
        }
        found = spec.to_absolute(counts)
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"The split {split!r} cannot be understood: {error}", f"Set {variable} to a split such as train[:1000]."
        ) from error
    parts = tuple((tuple(known[part.splitname]), int(part.from_ or 0), _end(part.to)) for part in found)
    return Selection(folder, split, parts)


def _end(value: int | None) -> int | None:
    return None if value is None else int(value)


def _offered(split: str, there: set[str], options: FileOptions) -> str:
    """The split of a dataset that calls its training split by another name, as many for supervised fine-tuning do."""
    if split != "train" or "train" in there:
        return split
    others = [name for name in sorted(there) if name.startswith("train")]
    if "train_sft" in others or len(others) == 1:
        chosen = "train_sft" if "train_sft" in others else others[0]
        options.tell(f"The dataset has no split train; {chosen} is used.")
        return chosen
    return split
