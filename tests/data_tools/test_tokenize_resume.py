"""`data tokenize` killed at any moment resumes, and the bytes are the same."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from data_support import (
    CORPUS_FILES,
    corpus_bytes,
    edit_bytes,
    files_of,
    make_tokenizer,
    start_python,
)

from megaphase.data_tools.text import read_chunks
from megaphase.data_tools.tokenization import tokenize as module
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.utils.errors import InputError, RunError

CHUNK_BYTES = 4_000
SAVE_BYTES = 8_000

# Killed some batches after its first save, without which it would never finish.
RUN = f"""if True:
    import os, signal, sys, threading
    from functools import partial
    from pathlib import Path
    from megaphase.data_tools.tokenization import tokenize as module
    class Writer(module.CorpusWriter):
        def add_batch(self, batch):
            global batches
            super().add_batch(batch)
            if self.saved_documents > saved_before:
                if batches == 0:
                    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
                batches -= 1
    if __name__ == "__main__":
        saved_before, batches, seconds, workers = map(float, sys.argv[1:5])
        tokenizer, prefix, *inputs = map(Path, sys.argv[5:])
        module.SAVE_BYTES_PER_WORKER = {SAVE_BYTES}
        module.read_chunks = partial(module.read_chunks, chunk_bytes={CHUNK_BYTES})
        module.RANGE_BYTES = {CHUNK_BYTES}
        module.CorpusWriter = Writer
        module.tokenize(inputs, tokenizer, prefix, workers=int(workers))
"""


@pytest.fixture(
    scope="module", params=[pytest.param("sentencepiece", marks=pytest.mark.slow), "tokenizers"]
)
def tok(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), library=request.param)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Make three files of 0.6 MB in all, one of which must be decompressed to resume in it."""
    chance = random.Random(5)
    folder = tmp_path / "text"
    folder.mkdir()
    paths = []
    for name in ("a.jsonl", "b.jsonl.zst", "c.txt"):
        texts = [
            " ".join(chance.choice(["one", "two", "three", "vier", "fünf"]) for _ in range(60))
            for _ in range(600)
        ]
        data = (
            "\n\n".join(texts)
            if name == "c.txt"
            else "\n".join(
                json.dumps({"id": f"{name} {number**3}", "text": text})
                for number, text in enumerate(texts)
            )
        )
        path = folder / name
        if name.endswith(".zst"):
            import zstandard

            path.write_bytes(zstandard.compress(data.encode()))
        else:
            path.write_text(data)
        paths.append(path)
    return paths


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_BYTES_PER_WORKER", SAVE_BYTES)
    monkeypatch.setattr(module, "RANGE_BYTES", CHUNK_BYTES)

    def chunks(*arguments, **options):
        return read_chunks(*arguments, **options, chunk_bytes=CHUNK_BYTES)

    monkeypatch.setattr(module, "read_chunks", chunks)


def state_of(prefix: Path) -> dict | None:
    path = prefix.with_name(f".{prefix.name}.draft") / "state.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_killed_at_any_moment_it_loses_little_and_ends_the_same(tok, inputs, tmp_path) -> None:
    tokenize(inputs, tok, tmp_path / "whole", workers=1)
    prefix, chance = tmp_path / "out" / "en", random.Random(0)
    saved_documents, kills = 0, 0
    while not Path(f"{prefix}.json").exists():
        batches, seconds, workers = (
            chance.randrange(20),
            chance.random() / 500,
            chance.randint(1, 3),
        )
        process = start_python(
            RUN, saved_documents, batches, seconds, workers, tok, prefix, *inputs
        )
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        kills += process.returncode == -signal.SIGKILL
        state = state_of(prefix)
        if state is None:
            break
        assert kills
        # Everything that the killed one had written is saved, except the last part.
        assert state["figures"]["documents"] >= saved_documents
        saved_documents = state["figures"]["documents"]
        draft = prefix.parent / ".en.draft" / ".bin"
        # The last kill may have happened while the files were renamed.
        written = (draft if draft.exists() else Path(f"{prefix}.bin")).stat().st_size
        assert written - state["files"][".bin"]["bytes"] <= 2 * (SAVE_BYTES * 3 + CHUNK_BYTES)
    assert kills > 3
    assert corpus_bytes(prefix) == corpus_bytes(tmp_path / "whole")
    # If the last kill was after publication, the staging folder was not removed yet.
    left = [name for name in files_of(prefix.parent) if name != ".en.draft"]
    assert left == CORPUS_FILES


KILLED_AT_THE_END = """if True:
    import os, signal, sys
    from pathlib import Path
    from megaphase.corpus import writer
    from megaphase.corpus.manifest import Manifest
    from megaphase.data_tools.tokenization.tokenize import tokenize
    if __name__ == "__main__":
        moment, replace, renamed = sys.argv[1], os.replace, []
        def kill(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        def replace_twice(old, new):
            replace(old, new)
            if os.path.basename(new).startswith("en."):
                renamed.append(new)
                if len(renamed) == 2:
                    kill()
        if moment == "index":
            writer.write_index = kill
        if moment == "names":
            writer.os.replace = replace_twice
        if moment == "manifest":
            Manifest.write = kill
        tokenize([Path(sys.argv[4])], Path(sys.argv[2]), Path(sys.argv[3]), workers=1)
"""


@pytest.mark.parametrize("moment", ["index", "names", "manifest"])
def test_killed_while_the_files_get_their_names(tok, inputs, tmp_path, moment) -> None:
    tokenize(inputs[:1], tok, tmp_path / "whole", workers=1)
    prefix = tmp_path / "out" / "en"
    process = start_python(KILLED_AT_THE_END, moment, tok, prefix, inputs[0])
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not Path(f"{prefix}.json").exists()
    tokenize(inputs[:1], tok, prefix, workers=2)
    assert corpus_bytes(prefix) == corpus_bytes(tmp_path / "whole")
    assert files_of(prefix.parent) == CORPUS_FILES


@pytest.mark.usefixtures("small_steps")
def test_after_a_wrong_line_skipping_goes_on_there(tok, inputs, tmp_path) -> None:
    lines = inputs[0].read_bytes().split(b"\n")
    lines[400] = b"{oops"
    inputs[0].write_bytes(b"\n".join(lines))
    tokenize(inputs, tok, tmp_path / "whole", workers=1, skip_wrong=True)
    prefix = tmp_path / "out" / "en"
    message = r"a\.jsonl:401: is not valid JSON .* documents are tokenized and saved: if a doc"
    with pytest.raises(InputError, match=message):
        tokenize(inputs, tok, prefix, workers=2)
    state = state_of(prefix)
    assert state is not None
    assert 0 < state["figures"]["documents"] <= 400
    manifest = tokenize(inputs, tok, prefix, workers=1, skip_wrong=True)
    assert manifest.skipped_wrong == 1
    assert corpus_bytes(prefix) == corpus_bytes(tmp_path / "whole")
    skipped = [Path(f"{path}.skipped.jsonl").read_bytes() for path in (prefix, tmp_path / "whole")]
    assert skipped[0] == skipped[1]


@pytest.fixture
def stopped(tok, inputs, tmp_path, small_steps, monkeypatch) -> Path:
    """Return the prefix of a tokenization stopped by a full disk after it had saved."""
    prefix, saves = tmp_path / "out" / "en", []
    real = module.CorpusWriter.save

    def save(self, note):
        real(self, note)
        saves.append(note)
        if len(saves) == 5:
            raise RunError("the disk is full")

    monkeypatch.setattr(module.CorpusWriter, "save", save)
    with pytest.raises(RunError, match=r"full; [\d,]+ documents are tokenized and saved: the same"):
        tokenize(inputs, tok, prefix, workers=1)
    monkeypatch.setattr(module.CorpusWriter, "save", real)
    return prefix


def test_it_goes_on_and_does_not_start_over(stopped, tok, inputs, tmp_path, monkeypatch) -> None:
    note, starts = state_of(stopped)["note"], []
    real, real_ranges = module.read_chunks, module.ranges_of

    def chunks(path, reading, *, start, **options):
        starts.append((path, start.offset))
        return real(path, reading, start=start, **options)

    def ranges(path, begin, *more):
        starts.append((path, begin))
        return real_ranges(path, begin, *more)

    monkeypatch.setattr(module, "read_chunks", chunks)
    monkeypatch.setattr(module, "ranges_of", ranges)
    tokenize(inputs, tok, stopped, workers=2)
    assert note["offset"] > 0
    assert starts == [(inputs[0], note["offset"]), (inputs[1], 0), (inputs[2], 0)]


def test_what_was_saved_for_other_text_is_not_taken(stopped, tok, inputs, tmp_path) -> None:
    later = time.time() + 10
    os.utime(inputs[2], (later, later))
    tokenize(inputs, tok, stopped, workers=1)
    tokenize(inputs, tok, tmp_path / "whole", workers=1)
    assert corpus_bytes(stopped) == corpus_bytes(tmp_path / "whole")


def test_an_altered_draft_is_named(stopped, tok, inputs) -> None:
    edit_bytes(stopped.with_name(".en.draft") / ".bin", 10, b"xy")
    with pytest.raises(InputError, match=r"\.bin: has been altered; it is removed: run .* over$"):
        tokenize(inputs, tok, stopped, workers=1)
    assert files_of(stopped.parent) == []
    tokenize(inputs, tok, stopped, workers=1)


def test_a_truncated_draft_is_named(stopped, tok, inputs) -> None:
    os.truncate(stopped.with_name(".en.draft") / ".hash", 8)
    with pytest.raises(InputError, match=r"\.hash: is shorter than it was; it is removed"):
        tokenize(inputs, tok, stopped, workers=1)
