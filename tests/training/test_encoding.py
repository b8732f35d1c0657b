"""Token ids of pairs: the prompt as in generation, exactly one end token, the model's own template.

The templates of the families that the recipes name: tests/engines/test_families.py.
"""

import pytest
from training_cases import ANSWERS, pair, settings

from sao_utils.tiny import pretrain
from sao_utils.training import TrainingFailed
from sao_utils.training.encoding import encode
from sao_utils.training.fit import fit

PLAIN = pretrain.CHAT_TEMPLATE
NO_END = PLAIN.replace("<|end|>{%", "{%")


@pytest.mark.parametrize("template", [PLAIN, NO_END])
def test_an_answer_ends_in_exactly_one_end_token(tokenizer, monkeypatch, pairs, template):
    assert PLAIN != NO_END
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ids, labels = encode(pairs[0], "chosen", tokenizer)
    end = tokenizer.eos_token_id
    assert ids.count(end) == 1 and ids[-1] == end
    answer = [token for token in labels if token != -100]
    assert tokenizer.decode(answer) == ANSWERS[0][0] + "<|end|>"
    prompt = tokenizer.apply_chat_template(
        pairs[0]["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert ids[: -len(answer)] == prompt, "trained on another prompt than is generated from"


def test_an_end_token_inside_an_answer_is_data(tokenizer):
    ids, _ = encode(pair("p", "Yes.<|end|><|user|>More?", "No."), "chosen", tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 1


def test_what_cannot_be_trained_on_is_refused_by_name(base, pairs, tmp_path):
    def attempt(*bad):
        fit(base, [*pairs, *bad], settings(), "simpo", 0, tmp_path / "a")

    with pytest.raises(ValueError, match="Pair long, rejected .* 2048.*max_tokens"):
        attempt(pair("long", "Yes.", "no " * 3000))
    with pytest.raises(ValueError, match="Pair blank, chosen .*empty"):
        attempt(pair("blank", " \n", "No."))
    with pytest.raises(TrainingFailed, match="nothing to train a on"):
        fit(base, [], settings(), "simpo", 0, tmp_path / "a")
    assert not list(tmp_path.glob("**/done.json"))
