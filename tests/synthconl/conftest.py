import pytest

from modular_star_encoder.synthconl import build
from modular_star_encoder.synthconl.publishing import dataset_card
from tests.synthconl.openai_server import OpenAIServer
from tests.synthconl.samples import small_recipe, translation, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "repositories")


@pytest.fixture(scope="session")
def server():
    with OpenAIServer(translation) as server:
        yield server


@pytest.fixture(scope="session")
def card_arguments():
    """The arguments of `dataset_card` in the build `finished`."""
    return {}


@pytest.fixture(scope="session")
def finished(corpus, server, card_arguments, tmp_path_factory):
    """The folder of a build without interruptions; no test changes it."""
    out = tmp_path_factory.mktemp("build") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "dataset_card", lambda **given: card_arguments.update(given) or dataset_card(**given))
        assert build.build_dataset(small_recipe(corpus, server.base_url), out, progress=False) == out / "dataset"
    return out
