"""What is small enough for a test: settings of a run, and chats of the tiny world."""

SMALL = {"prompts.count": 40, "evaluation.per_combination": 1, "evaluation.bootstrap": 200}
QUESTIONS = [
    "I am new to chess. What should I know about the right tool and how long it takes?",
    "Can you explain where to go for yoga?",
    "Write a short guide to rowing that covers the main risk, who can teach it and the best place.",
    "For a weekend of baking, describe the best place and what can go wrong.",
]
CHATS = [[{"role": "user", "content": text}] for text in QUESTIONS]


def all_of(batches):
    """What an engine yields, by index."""
    found = [pair for batch in batches for pair in batch]
    assert len(dict(found)) == len(found), "an index came twice"
    return dict(found)


def save_random_adapter(model, folder, seed=0):
    """An adapter that is far from the identity, in a folder."""
    import torch
    from peft import LoraConfig, get_peft_model

    from sao_utils.engines.loading import load_model

    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(load_model(model), lora)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
