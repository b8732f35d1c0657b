import pytest
from training_cases import ANSWERS, pair, save_model

from sao_utils.tiny import pretrain


@pytest.fixture(scope="session")
def tokenizer():
    return pretrain.build_tokenizer(800)


@pytest.fixture(scope="session")
def base(tokenizer, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="session")
def pairs():
    return [pair(f"pair-{i}", *answers) for i, answers in enumerate(ANSWERS)]
