import pickle

import numpy as np
import pytest

from modular_star_encoder.training import distilling
from modular_star_encoder.training.distilling import TeacherTargets, TeacherVectors, compute_teacher_vectors
from tests.errors import raises

TEXTS = [f"read file {number} of the table" for number in range(10)]


class Teacher:
    """Gives a text, with its prompt, a vector by its length; `asked` collects the texts."""

    name, exit_layers = "stand-in", (None,)

    def __init__(self, checksum="one", value=None):
        self.checksum, self.value, self.asked = checksum, value, []

    def encode(self, texts, exit_layers, *, progress=True):
        self.asked += [prompt + text for prompt, text in texts]
        vectors = [[3, len(prompt + text), self.value or sum(map(ord, text)) % 7] for prompt, text in texts]
        return {None: np.array(vectors, np.float32)}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(distilling, "TEXTS_PER_CHUNK", 4)


def compute(teacher, texts, cache, **options):
    return compute_teacher_vectors(teacher, texts, cache, progress=False, **options)


def test_each_text_is_computed_once_and_its_vector_is_the_teachers_at_unit_length(tmp_path):
    teacher = Teacher()
    compute(teacher, [*TEXTS[:6], *TEXTS[:2]], tmp_path)
    found = compute(teacher, TEXTS, tmp_path)
    assert sorted(teacher.asked) == sorted(TEXTS)
    expected = Teacher().encode([("", text) for text in TEXTS], [None])[None]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(np.array([found.vector(text) for text in TEXTS]) - expected).max() < 1e-3
    assert all(isinstance(chunk, np.memmap) and chunk["vector"].dtype == np.float16 for chunk in found._chunks)
    assert (pickle.loads(pickle.dumps(found)).vector(TEXTS[7]) == found.vector(TEXTS[7])).all()
    assert len(pickle.dumps(found)) < 1000
    with pytest.raises(KeyError, match="never seen"):
        found.vector("never seen")


def test_after_a_kill_whole_chunks_count_and_a_torn_one_is_computed_again(tmp_path):
    teacher = Teacher()
    folder = compute(teacher, TEXTS, tmp_path).folder
    chunks = sorted(folder.glob("chunk-*.npy"))
    assert len(chunks) == 3
    whole = {path: path.read_bytes() for path in chunks}
    lost = np.load(chunks[1])["hash"].tolist()
    chunks[1].write_bytes(whole[chunks[1]][:-5])
    (folder / f".{chunks[2].name}.tmp").write_bytes(b"half")
    teacher.asked.clear()
    compute(teacher, TEXTS, tmp_path)
    assert distilling.text_hashes(teacher.asked).tolist() == lost
    assert {path: path.read_bytes() for path in sorted(folder.glob("chunk-*.npy"))} == whole


def test_another_teacher_prompt_or_length_has_a_folder_of_its_own(tmp_path):
    teachers = Teacher(), Teacher("two"), Teacher(), Teacher()
    options = {}, {}, {"prompt": "query: "}, {"max_characters": 9}
    found = [compute(one, TEXTS, tmp_path, **own) for one, own in zip(teachers, options, strict=True)]
    assert len({one.folder for one in found}) == 4
    assert [len(teacher.asked) for teacher in teachers] == [10, 10, 10, 1]
    assert teachers[2].asked[0] == f"query: {TEXTS[0]}"
    assert teachers[3].asked == ["read file"]
    assert (found[3].vector(TEXTS[4]) == found[3].vector(TEXTS[5])).all()


def test_a_vector_that_is_not_finite_is_refused_and_not_stored(tmp_path):
    with raises("teacher.not_finite", "stand-in"):
        compute(Teacher(value=np.nan), TEXTS, tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


def test_targets_are_centred_by_kind_and_an_unpaired_text_by_the_nearer_mean(tmp_path):
    teacher, code = Teacher(), [f"def read_{number}(): return table[{number}] + offset" for number in range(6)]
    found = compute(teacher, [*TEXTS, *code], tmp_path)
    kinds = {"query": found, "document": found}
    means = {"query": found.mean(TEXTS[:8]), "document": found.mean(code)}
    assert TeacherVectors(found.folder).mean(TEXTS[:8][::-1]) == pytest.approx(means["query"], abs=0)
    assert means["query"] == pytest.approx(np.mean([found.vector(text) for text in TEXTS[:8]], axis=0), abs=1e-6)
    targets, raw = TeacherTargets(kinds, means), TeacherTargets(kinds)
    for text, kind in ((TEXTS[9], "query"), (code[0], "document")):
        centred = found.vector(text) - means[kind]
        assert targets.of(text, kind) == pytest.approx(centred / np.linalg.norm(centred), abs=1e-6)
        assert raw.of(text) == pytest.approx(found.vector(text), abs=1e-3)
        distances = {one: np.linalg.norm(found.vector(text) - mean) for one, mean in means.items()}
        assert (targets.of(text) == targets.of(text, min(distances, key=distances.get))).all()
