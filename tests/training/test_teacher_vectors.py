import pickle

import numpy as np
import pytest

from modular_star_encoder.inference.encoders import Encoder
from modular_star_encoder.training.distilling import TeacherTargets, compute_teacher_vectors
from tests.errors import raises

TEXTS = [f"read file {number} of the table" for number in range(10)]


class Teacher(Encoder):
    """Gives a text, with its prompt, a vector by its length; `asked` collects the texts."""

    name, exit_layers = "stand-in", (None,)

    def __init__(self, checksum="one", value=None):
        self.checksum, self.value, self.asked = checksum, value, []

    def encode(self, texts, exit_layers, *, progress=True):
        self.asked += [prompt + text for prompt, text in texts]
        vectors = [[3, len(prompt + text), self.value or sum(map(ord, text)) % 7] for prompt, text in texts]
        return {None: np.array(vectors, np.float32)}


def compute(teacher, texts, cache, **options):
    return compute_teacher_vectors(teacher, texts, cache, progress=False, **options)


def test_each_text_is_computed_once_and_its_vector_is_the_teachers_at_unit_length(tmp_path):
    teacher = Teacher()
    compute(teacher, [*TEXTS[:6], *TEXTS[:2]], tmp_path)
    found = compute(teacher, TEXTS, tmp_path)
    assert sorted(teacher.asked) == sorted(TEXTS)
    expected = Teacher().encode([("", text) for text in TEXTS], [None])[None]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert found.rows(TEXTS) == pytest.approx(expected, abs=1e-6)
    assert (pickle.loads(pickle.dumps(found)).rows(TEXTS) == found.rows(TEXTS)).all()
    assert len(pickle.dumps(found)) < 1000
    with pytest.raises(KeyError, match="never seen"):
        found.rows(["never seen"])


def test_another_teacher_prompt_or_length_has_vectors_of_its_own(tmp_path):
    teachers = Teacher(), Teacher("two"), Teacher(), Teacher()
    options = {}, {}, {"prompt": "query: "}, {"max_characters": 9}
    found = [compute(one, TEXTS, tmp_path, **own) for one, own in zip(teachers, options, strict=True)]
    assert [len(teacher.asked) for teacher in teachers] == [10, 10, 10, 1]
    assert teachers[2].asked[0] == f"query: {TEXTS[0]}"
    assert teachers[3].asked == ["read file"]
    assert (found[3].rows([TEXTS[4]]) == found[3].rows([TEXTS[5]])).all()


def test_a_vector_that_is_not_finite_is_refused_and_not_stored(tmp_path):
    with raises("teacher.not_finite", "stand-in"):
        compute(Teacher(value=np.nan), TEXTS, tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


def test_targets_are_centred_by_kind_and_an_unpaired_text_by_the_nearer_mean(tmp_path):
    teacher, code = Teacher(), [f"def read_{number}(): return table[{number}] + offset" for number in range(6)]
    found = compute(teacher, [*TEXTS, *code], tmp_path)
    kinds = {"query": found, "document": found}
    means = {"query": found.mean(TEXTS[:8]), "document": found.mean(code)}
    assert (found.mean(TEXTS[:8][::-1]) == means["query"]).all()
    assert means["query"] == pytest.approx(found.rows(TEXTS[:8]).mean(axis=0), abs=1e-6)
    targets, raw = TeacherTargets(kinds, means), TeacherTargets(kinds)
    for text, kind in ((TEXTS[9], "query"), (code[0], "document")):
        (vector,) = found.rows([text])
        centred = vector - means[kind]
        assert targets.of(text, kind) == pytest.approx(centred / np.linalg.norm(centred), abs=1e-6)
        assert raw.of(text) == pytest.approx(vector, abs=1e-6)
        nearest = min(means, key=lambda one: np.linalg.norm(vector - means[one]))
        assert (targets.of(text) == targets.of(text, nearest)).all()
