import json

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from r1s_jax.retrieval.embed import TfidfSvdConfig, TfidfSvdEmbedder
from r1s_jax.types import UserError

NAMES = ["Oslo", "Bergen", "Trondheim", "Hamar", "Tromso", "Bodo", "Alta", "Molde", "Skien"]
TEXTS = [f"{name} is a city, number {i * 7}." for i, name in enumerate(NAMES)] + NAMES
SMALL = TfidfSvdConfig(dim=8, max_features=200)


@pytest.fixture(scope="module")
def embedder():
    return TfidfSvdEmbedder(SMALL).fit(TEXTS)


def test_vectors_equal_the_svd_of_tfidf_in_float64(embedder):
    """Inner products before the unit length, since a basis is free to turn and flip."""
    config = {"analyzer": "char_wb", "ngram_range": (2, 4), "sublinear_tf": True}
    counts = TfidfVectorizer(max_features=200, **config).fit_transform(TEXTS).toarray()
    _, values, basis = np.linalg.svd(counts, full_matrices=False)
    expected = counts @ basis[:8].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert values[7] > values[8] * 1.0001
    got = embedder.embed(TEXTS)
    assert got.dtype == np.float32 and got.shape == (len(TEXTS), 8) and embedder.dim == 8
    np.testing.assert_allclose(got @ got.T, expected @ expected.T, atol=0.02)


def test_a_row_does_not_depend_on_its_companions(embedder):
    whole = embedder.embed(TEXTS)
    for i, text in enumerate(TEXTS):
        assert (embedder.embed([text])[0] == whole[i]).all()
    assert (embedder.embed(TEXTS[::-1]) == whole[::-1]).all()
    assert (embedder.embed([TEXTS[3]] * 70) == whole[3]).all()


def test_unit_length_and_zeros_for_unknown_signs(embedder):
    vectors = embedder.embed(["Oslo", "漢字", ""])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 0], atol=1e-6)
    assert embedder.embed([]).shape == (0, 8)


def test_fitting_twice_gives_the_same_bits(embedder):
    again = TfidfSvdEmbedder(SMALL).fit(TEXTS)
    assert again.fingerprint == embedder.fingerprint
    assert (again.embed(TEXTS) == embedder.embed(TEXTS)).all()
    assert TfidfSvdEmbedder(SMALL).fit(TEXTS[1:]).fingerprint != embedder.fingerprint


def test_saved_and_loaded_embeds_bit_for_bit(embedder, tmp_path):
    embedder.save(tmp_path)
    loaded = TfidfSvdEmbedder.load(tmp_path)
    assert loaded.fingerprint == embedder.fingerprint and loaded.config == embedder.config
    assert (loaded.embed(TEXTS) == embedder.embed(TEXTS)).all()


def test_broken_files_are_user_errors(embedder, tmp_path):
    with pytest.raises(UserError, match=r"embedder\.json"):
        TfidfSvdEmbedder.load(tmp_path)
    embedder.save(tmp_path)
    content = json.loads((tmp_path / "embedder.json").read_text())
    content["config"]["iterations"] = 9
    (tmp_path / "embedder.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r'embedder\.json: field "fingerprint"'):
        TfidfSvdEmbedder.load(tmp_path)
    (tmp_path / "embedder.npz").write_bytes(b"no")
    with pytest.raises(UserError, match="not a saved embedder"):
        TfidfSvdEmbedder.load(tmp_path)


def test_use_before_fit_and_too_few_texts_are_value_errors():
    with pytest.raises(ValueError, match="not fitted"):
        TfidfSvdEmbedder().embed(["a"])
    with pytest.raises(ValueError, match="at least 2 texts to fit, got 1"):
        TfidfSvdEmbedder().fit(["Oslo"])
