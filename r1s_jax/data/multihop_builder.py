"""The published multi-hop question sets as TFDS data sets: fetched, or taken from a folder.

One builder config for each entry of `multihop.SOURCES`, so that asking for one split fetches and
reads no other. A file in the manual folder of the data set (`manual_folder`) is preferred to a
download. Importing this module imports tensorflow_datasets (a third of a second).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import tensorflow_datasets as tfds

from r1s_jax.data import multihop, prepared, questions
from r1s_jax.data.multihop import SOURCES, BadFile, Found, Source
from r1s_jax.data.prepared import (
    cache_directory,
    question_features,
    read_rows,
    to_example,
    to_question,
    written_whole,
)
from r1s_jax.types import Question, UserError

_TIMEOUT = 20.0  # seconds until a server has to begin to answer


class R1sQuestions(tfds.core.GeneratorBasedBuilder):
    """Multi-hop questions of one published split, with all their gold answers."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(
        tfds.core.BuilderConfig(name=name.replace(":", "-"), description=source.page)
        for name, source in SOURCES.items()
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The published file (an archive, or its files), as it is."
    code_path = None  # see atlas_builder

    @property
    def _split(self) -> str:
        """Its name in SOURCES."""
        assert self.builder_config is not None
        return self.builder_config.name.replace("-", ":")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage=SOURCES[self._split].page,
            features=tfds.features.FeaturesDict(question_features()),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        source = SOURCES[self._split]
        try:
            manual = manual_files(source, pathlib.Path(dl_manager.manual_dir))
        except AssertionError:  # there is no such folder
            manual = []
        found = _read(source, manual) if manual else _read_download(source, dl_manager)
        rows = questions.accept(_label(source, manual), *found, [])  # TFDS writes no empty splits
        metadata: Any = self.info.metadata  # is saved with the rows
        _, metadata["faults"] = found
        return {self._split.split(":")[1]: self._generate_examples(rows)}

    def _generate_examples(self, rows: Sequence[Question]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(map(to_example, rows))


def load_questions(name: str, *, skipped: list[str] | None = None) -> list[Question]:
    """The questions of an entry of SOURCES, prepared on the first call and cached afterwards.

    What is cached goes by the content of the files in the manual folder, or by the address and
    checksum of the download, and by the code that reads them: nothing stale is read. Bad rows are
    left out where `skipped` is given; it gets a text for each. A file in the manual folder may be a
    part of the published one, or corrected; a line on the screen says so.

    Raises:
        UserError: the file is neither in the manual folder nor can it be fetched (the message
            says where to put it); it is damaged; or a row is bad and there is no `skipped`.
    """
    source = SOURCES[name]
    manual = manual_files(source, manual_folder(name))
    path = cache_directory() / "questions" / f"{name.replace(':', '-')}-{_key(source, manual)}"
    if not path.exists():
        _prepare(name, path, manual)
    try:
        builder: Any = _builder(name, path)
        rows = [to_question(row) for row in read_rows(builder, name.split(":")[1])]
        faults = builder.info.metadata["faults"]
    except Exception as error:  # whatever a cut-off file makes the readers raise
        raise UserError(f"{path}: cannot be read, remove it to make it anew: {error!r}") from error
    if manual and (told := _not_published(source, manual, len(rows) + len(faults))):
        print(
            f"{name}: {_label(source, manual)} is not the published file: {told}", file=sys.stderr
        )
    return questions.accept(_label(source, manual), rows, faults, skipped)


def manual_folder(name: str) -> pathlib.Path:
    """Where a split's files are looked for before they are fetched: manual/NAME in the cache."""
    return cache_directory() / "manual" / name.split(":")[0]


def manual_files(source: Source, folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a split that lie in `folder`: unpacked, or the archive alone, or none."""
    unpacked = [folder / member for member in source.members or (source.file,)]
    if all(path.is_file() for path in unpacked):
        return unpacked
    archive = folder / source.file
    return [archive] if archive.is_file() else []


def _prepare(name: str, path: pathlib.Path, manual: list[pathlib.Path]) -> None:
    source = SOURCES[name]
    print(f"{name}: preparing it once from {_label(source, manual)}", file=sys.stderr, flush=True)
    config = tfds.download.DownloadConfig(manual_dir=manual_folder(name))
    downloads = cache_directory() / "downloads"
    try:
        with written_whole(path) as temporary:
            _builder(name, temporary).download_and_prepare(
                download_dir=downloads, download_config=config
            )
    except BadFile as bad:
        raise UserError(f"{_label(source, manual)}: {bad}{_remedy(name, manual)}") from bad
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _builder(name: str, path: pathlib.Path) -> R1sQuestions:
    return R1sQuestions(data_dir=path, config=name.replace(":", "-"), file_format="array_record")


def _key(source: Source, manual: list[pathlib.Path]) -> str:
    """Tells apart whatever the prepared questions depend on."""
    digest = hashlib.sha256()
    for module in (multihop, questions, prepared):
        digest.update(pathlib.Path(str(module.__file__)).read_bytes())
    if not manual:
        digest.update(f"{source.url} {source.sha256}".encode())
    for path in manual:
        digest.update(_sha256(path).encode())
    return digest.hexdigest()[:16]


def _sha256(path: pathlib.Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _not_published(source: Source, manual: list[pathlib.Path], count: int) -> str:
    """How the files differ from what was published, where that is known; else nothing."""
    if count != source.rows:
        return f"{count} rows, {source.rows} were published"
    whole = not source.members or _is_archive(source, manual)
    if whole and source.sha256 and (found := _sha256(manual[0])) != source.sha256:
        return f"sha256 {found}, {source.sha256} is known"
    return ""


def _label(source: Source, manual: list[pathlib.Path]) -> str:
    """The file whose rows are meant, for messages."""
    place = str(manual[0]) if manual else source.url
    packed = source.members and (not manual or _is_archive(source, manual))
    return f"{place} ({source.members[0]})" if packed else place


def _is_archive(source: Source, paths: list[pathlib.Path]) -> bool:
    return bool(source.members) and paths[0].name not in source.members


def _remedy(name: str, manual: list[pathlib.Path]) -> str:
    if manual:
        return ""
    source = SOURCES[name]
    return (
        f"; get {source.file} from {source.page} and put it at {manual_folder(name) / source.file}"
    )


# ---------------------------------------------------------------- downloads and archives


def _read_download(source: Source, dl_manager: tfds.download.DownloadManager) -> Found:
    """What the download holds; BadFile where it cannot be had or is not what was published."""
    import requests

    try:
        # Says quickly what TFDS would say after minutes of retries.
        with requests.get(source.url, stream=True, timeout=_TIMEOUT) as response:
            response.raise_for_status()
        path = pathlib.Path(dl_manager.download(source.url))
    except Exception as error:  # requests', urllib3's and TFDS' own, of many lines
        response = getattr(error, "response", None)
        why = getattr(error, "strerror", None) or type(error).__name__
        why = why if response is None else f"HTTP {response.status_code}"
        raise BadFile(f"cannot be fetched ({why})") from error
    try:
        if source.sha256 and (found := _sha256(path)) != source.sha256:
            raise BadFile(f"is not the published file: sha256 {found}, {source.sha256} is known")
        rows, faults = _read(source, [path])
        if len(rows) + len(faults) != source.rows:
            raise BadFile(f"has {len(rows) + len(faults)} rows, {source.rows} were published")
    except BadFile:
        for kept in (path, path.with_name(f"{path.name}.INFO")):  # or it would be used again
            kept.unlink(missing_ok=True)
        raise
    return rows, faults


def _read(source: Source, paths: list[pathlib.Path]) -> Found:
    """`source.read` on its files, which are the members of an archive where there is one."""
    with contextlib.ExitStack() as stack:
        try:
            if _is_archive(source, paths):
                archive = stack.enter_context(zipfile.ZipFile(paths[0]))
                files = [stack.enter_context(_member(archive, m)) for m in source.members]
            else:
                files = [stack.enter_context(path.open("rb")) for path in paths]
            return source.read(*files)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise BadFile(f"cannot be read: {error}") from error


def _member(archive: zipfile.ZipFile, name: str) -> io.BufferedIOBase:
    for entry in archive.namelist():
        if entry.split("/")[-1] == name:
            return cast(io.BufferedIOBase, archive.open(entry))
    raise BadFile(f"holds no {name}")
