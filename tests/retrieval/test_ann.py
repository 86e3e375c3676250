import concurrent.futures
import dataclasses
import json
import sys

import numpy as np
import pytest

from r1s_jax.retrieval import ann
from r1s_jax.retrieval.ann import (
    AnnConfig,
    AnnParameters,
    build_searcher,
    load_searcher,
    resolve,
)
from r1s_jax.types import UserError

TREE = AnnConfig(exact=False, leaves=20, leaves_to_search=5, reorder=30)


def _unit(rows):
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def vectors_ND():
    """3,000 in 30 loose bundles, width 24: what a tree can find its way in."""
    rng = np.random.default_rng(0)
    return _unit(
        rng.normal(size=(30, 24))[rng.integers(30, size=3000)] + rng.normal(size=(3000, 24))
    )


@pytest.fixture(scope="module")
def queries_QD(vectors_ND):
    rng = np.random.default_rng(1)
    return _unit(vectors_ND[rng.integers(3000, size=80)] + 0.2 * rng.normal(size=(80, 24)))


@pytest.fixture(scope="module")
def tree(vectors_ND):
    pytest.importorskip("scann")
    return build_searcher(vectors_ND, resolve(TREE, *vectors_ND.shape), threads=2)


def _reference(vectors_ND, queries_QD, k):
    """Rows and products in float64, best first, equal ones by row."""
    products_QN = queries_QD.astype(np.float64) @ vectors_ND.astype(np.float64).T
    rows_Qk = np.argsort(-products_QN, axis=1, kind="stable")[:, :k]
    return rows_Qk, np.take_along_axis(products_QN, rows_Qk, axis=1)


def _recall(found, wanted):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, wanted, strict=True)])


def test_an_exact_search_is_the_float64_one(vectors_ND, queries_QD):
    searcher = build_searcher(vectors_ND, AnnParameters(exact=True))
    assert searcher.is_exact
    rows, scores = searcher.search(queries_QD, 7)
    wanted, products = _reference(vectors_ND, queries_QD, 7)
    assert (rows.dtype, scores.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(rows, wanted)
    np.testing.assert_allclose(scores, products, atol=1e-6)


def test_a_tree_finds_most_and_scores_what_it_finds_exactly(tree, vectors_ND, queries_QD):
    assert not tree.is_exact
    rows, scores = tree.search(queries_QD, 5)
    wanted, _ = _reference(vectors_ND, queries_QD, 5)
    assert _recall(rows, wanted) > 0.6  # a quarter of the leaves; k-means has no seed
    products_QN = queries_QD.astype(np.float64) @ vectors_ND.T.astype(np.float64)
    np.testing.assert_allclose(scores, np.take_along_axis(products_QN, rows, 1), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_a_tree_searched_as_a_whole_is_the_exact_search_bit_for_bit(vectors_ND, queries_QD):
    pytest.importorskip("scann")
    config = dataclasses.replace(TREE, leaves_to_search=20, reorder=3000)
    searcher = build_searcher(vectors_ND, resolve(config, *vectors_ND.shape))
    exact = build_searcher(vectors_ND, AnnParameters(exact=True))
    for found, wanted in zip(
        searcher.search(queries_QD, 9), exact.search(queries_QD, 9), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("exact", [True, False])
def test_an_answer_depends_on_its_query_alone(exact, tree, vectors_ND, queries_QD):
    """ScaNN's own batched search gives other last bits than its search for one query."""
    searcher = build_searcher(vectors_ND, AnnParameters(exact=True), threads=2) if exact else tree
    rows, scores = searcher.search(queries_QD, 5)
    for start, stop in ((0, 1), (1, 8), (8, 80)):
        part = searcher.search(queries_QD[start:stop], 5)
        np.testing.assert_array_equal(part[0], rows[start:stop])
        np.testing.assert_array_equal(part[1], scores[start:stop])
    again = searcher.search(queries_QD[::-1].copy(), 5)
    np.testing.assert_array_equal(again[1][::-1], scores)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for other in pool.map(lambda _: searcher.search(queries_QD, 5), range(12)):
            np.testing.assert_array_equal(other[0], rows)
            np.testing.assert_array_equal(other[1], scores)


@pytest.mark.parametrize("exact", [True, False])
def test_equal_scores_go_by_row(exact):
    if not exact:
        pytest.importorskip("scann")
    rng = np.random.default_rng(3)
    vectors_ND = np.repeat(_unit(rng.normal(size=(150, 8))), 4, axis=0)[rng.permutation(600)]
    config = AnnConfig(exact=exact, leaves=5, leaves_to_search=5, reorder=600)
    searcher = build_searcher(vectors_ND, resolve(config, 600, 8))
    rows, scores = searcher.search(vectors_ND[:50], 6)
    for found, score in zip(rows, scores, strict=True):
        assert (np.diff(score) <= 0).all()
        assert (np.diff(found)[np.diff(score) == 0] > 0).all()
    zero, _ = searcher.search(np.zeros((1, 8), np.float32), 6)
    assert zero.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_k_is_met_even_where_the_leaves_searched_hold_fewer(vectors_ND, queries_QD):
    """With one leaf of 20 searched, ScaNN alone brings some 150 of the 1,000 asked for."""
    pytest.importorskip("scann")
    config = dataclasses.replace(TREE, leaves_to_search=1)
    searcher = build_searcher(vectors_ND, resolve(config, *vectors_ND.shape))
    rows, _ = searcher.search(queries_QD[:3], 1000)
    assert rows.shape == (3, 1000) and all(len(set(found)) == 1000 for found in rows.tolist())
    rows, _ = searcher.search(queries_QD[:2], 10**6)
    assert sorted(rows[1].tolist()) == list(range(3000))


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_vectors_in_fewer_bits_find_as_much_and_score_exactly(
    precision, tree, vectors_ND, queries_QD
):
    config = dataclasses.replace(TREE, precision=precision)
    searcher = build_searcher(vectors_ND, resolve(config, *vectors_ND.shape))
    rows, scores = searcher.search(queries_QD, 5)
    wanted, _ = _reference(vectors_ND, queries_QD, 5)
    assert _recall(rows, wanted) > 0.6
    products_QN = queries_QD.astype(np.float64) @ vectors_ND.T.astype(np.float64)
    np.testing.assert_allclose(scores, np.take_along_axis(products_QN, rows, 1), atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_saved_and_loaded_finds_the_same(precision, vectors_ND, queries_QD, tmp_path):
    pytest.importorskip("scann")
    parameters = resolve(dataclasses.replace(TREE, precision=precision), *vectors_ND.shape)
    searcher = build_searcher(vectors_ND, parameters)
    np.save(tmp_path / "vectors.npy", vectors_ND)
    searcher.save(tmp_path / "before")
    # float32 vectors are not written a second time
    assert not list((tmp_path / "before").glob("dataset.npy"))
    (tmp_path / "before").rename(tmp_path / "after")
    mapped_ND = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    read = AnnParameters(**json.loads(json.dumps(dataclasses.asdict(parameters))))
    assert read == parameters
    loaded = load_searcher(tmp_path / "after", mapped_ND, read)
    for found, wanted in zip(
        loaded.search(queries_QD, 5), searcher.search(queries_QD, 5), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_a_folder_that_is_not_whole_is_refused(tree, vectors_ND, tmp_path):
    with pytest.raises(UserError, match="holds no searcher"):
        load_searcher(tmp_path / "none", vectors_ND, tree.parameters)
    tree.save(tmp_path / "scann")
    with pytest.raises(UserError, match="of 3000 vectors, there are 2999"):
        load_searcher(tmp_path / "scann", vectors_ND[:2999], tree.parameters)
    (tmp_path / "scann" / "hashed_dataset.npy").unlink()
    with pytest.raises(UserError, match="cannot be read") as error:
        load_searcher(tmp_path / "scann", vectors_ND, tree.parameters)
    assert "\n" not in str(error.value)


def test_numpy_stands_in_where_scann_is_absent(vectors_ND, queries_QD, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    ann._scann.cache_clear()
    with pytest.warns(UserWarning, match="exact numpy search stands in"):
        searcher = build_searcher(vectors_ND, resolve(TREE, *vectors_ND.shape))
    ann._scann.cache_clear()
    assert searcher.is_exact
    searcher.save(tmp_path / "scann")
    assert not (tmp_path / "scann").exists()
    rows, _ = searcher.search(queries_QD, 5)
    np.testing.assert_array_equal(rows, _reference(vectors_ND, queries_QD, 5)[0])


def test_bad_queries_are_refused(vectors_ND):
    searcher = build_searcher(vectors_ND, AnnParameters(exact=True))
    with pytest.raises(ValueError, match="k is 0"):
        searcher.search(vectors_ND[:1], 0)
    with pytest.raises(ValueError, match="width 23, the vectors 24"):
        searcher.search(vectors_ND[:1, :23], 1)
    with pytest.raises(ValueError, match="not finite"):
        searcher.search(np.full((1, 24), np.nan, np.float32), 1)
    rows, scores = searcher.search(vectors_ND[:0], 4)
    assert rows.shape == scores.shape == (0, 4)


def test_parameters_come_from_the_corpus_unless_given():
    assert resolve(AnnConfig(), 7372, 384) == AnnParameters(exact=True)
    assert resolve(AnnConfig(exact=False), 1, 384).exact
    large = resolve(AnnConfig(), 1_000_000, 384)
    wide = resolve(AnnConfig(), 1_000_000, 1024)
    larger = resolve(AnnConfig(), 29_000_000, 1024)
    assert not (large.exact or wide.exact or larger.exact)
    assert larger.leaves > wide.leaves > 0 and wide.leaves_to_search < wide.leaves
    given = {"leaves": 50, "leaves_to_search": 7, "block": 3, "threshold": 0.5}
    given |= {"training_sample": 900, "reorder": 11, "precision": "int8"}
    assert resolve(AnnConfig(exact=False, **given), 1000, 16) == AnnParameters(exact=False, **given)
    # never more than there is
    small = resolve(AnnConfig(exact=False, leaves_to_search=99), 10, 1)
    assert small.leaves_to_search <= small.leaves <= 10 and small.block == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"leaves": 1}, "AnnConfig.leaves = 1, must be at least 2"),
        ({"reorder": 0}, "AnnConfig.reorder = 0, must be at least 1"),
        ({"threshold": -0.1}, "AnnConfig.threshold = -0.1"),
        ({"precision": "int4"}, "AnnConfig.precision = 'int4'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        AnnConfig(**settings)


def test_more_leaves_than_passages_are_refused():
    with pytest.raises(UserError, match="leaves = 50, the corpus has 40"):
        resolve(AnnConfig(exact=False, leaves=50), 40, 8)
    told = (
        "leaves = 5, but 40 vectors of 8 numbers are scanned exactly; exact = False builds a tree"
    )
    with pytest.raises(UserError, match=told):
        resolve(AnnConfig(leaves=5), 40, 8)
