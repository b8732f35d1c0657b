"""What a model of a given shape costs: parameters, and bytes of weights, KV cache and activations.

Arithmetic on a config.json; needs neither torch nor weights. "Values" are 16-bit numbers unless a
function says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

#: Bytes of a weight. 4 bit: NF4 with double quantisation keeps one 8-bit scale per 64 weights and one
#: float32 per 256 of those scales (QLoRA, Dettmers et al. 2023, section 3); AWQ and GPTQ keep a 16-bit
#: scale and a 4-bit zero point per 128 weights.
WEIGHT_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),
    "bitsandbytes": 0.5 + 1 / 64 + 4 / (64 * 256),
    "fp8": 1.0,
    "awq": 0.5 + 2.5 / 128,
    "gptq": 0.5 + 2.5 / 128,
}

#: model_type -> what distinguishes a family: norms per layer; whether query, key and value have biases
#: (None: as config.attention_bias says); whether each head's query and key are normed.
FAMILIES = {
    "llama": (2, None, False),
    "mistral": (2, False, False),
    "qwen2": (2, True, False),
    "qwen3": (2, None, True),
    "gemma": (2, None, False),
    "gemma2": (4, None, False),
}


@dataclass(frozen=True)
class Shape:
    """The properties of a decoder on which its cost depends."""

    family: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head: int  # values of one head
    inner: int  # of the gated feed-forward layer
    tied: bool
    biased: bool
    softcap: bool  # on attention scores, which are then held in memory as a whole
    context: int | None

    @property
    def linear(self) -> int:
        """Weights of the linear layers except the output head: those that are quantised and adapted."""
        return self.layers * sum(rows * columns for rows, columns in self.projections())

    def projections(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer of one block."""
        query, key = self.heads * self.head, self.kv_heads * self.head
        into, out = (self.width, self.inner), (self.inner, self.width)
        return [(self.width, query), *2 * [(self.width, key)], (query, self.width), into, into, out]

    @property
    def parameters(self) -> int:
        """All parameters of the model.

        Raises:
            ValueError: the architecture is not known here.
        """
        if self.family not in FAMILIES:
            raise ValueError(
                f"The architecture '{self.family}' is not known here ({', '.join(FAMILIES)})."
            )
        norms, biased, head_norms = FAMILIES[self.family]
        small = norms * self.width + (2 * self.head if head_norms else 0)
        if biased or self.biased:
            small += (self.heads + 2 * self.kv_heads) * self.head
            small += 0 if biased else self.width  # attention_bias: the output projection's, too
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)  # and the output head
        return embeddings + self.linear + self.layers * small + self.width

    def weight_bytes(self, dtype: str, quantisation: str = "none") -> float:
        """Bytes of the weights; embeddings, norms and output head are never quantised."""
        each = WEIGHT_BYTES[dtype if quantisation == "none" else quantisation]
        return self.linear * each + (self.parameters - self.linear) * WEIGHT_BYTES[dtype]

    def kv_bytes(self, dtype: str = "bfloat16") -> float:
        """Bytes of the KV cache per token."""
        return 2 * self.layers * self.kv_heads * self.head * WEIGHT_BYTES[dtype]

    def kept_bytes(self, full: bool = False, dtype: str = "bfloat16") -> float:
        """Bytes that a layer keeps per token for the backward pass, when packed rows are trained.

        In 16 bit, each norm keeps its input in float32 (2 values), an adapter a copy of its layer's
        input, and attention the query and the repeated key and value, also behind a shared prompt.
        Training all weights (`full`) keeps the residual stream in float32. Checked against what
        autograd keeps, on a CPU, in tests/plan/test_costs.py.
        """
        norms, queries = FAMILIES.get(self.family, (2,))[0], self.heads * self.head
        if dtype == "float32":
            wide = norms * (2 if full else 1) + 2
            return 4 * (wide * self.width + 8 * queries + 4 * self.inner)
        wide = norms * (4 if full else 2) + 5
        query = 6 if self.softcap and not full else 9 if self.softcap else 7
        return 2 * (wide * self.width + query * queries + 4 * self.inner)

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA adapter on all linear layers except the output head."""
        return self.layers * rank * sum(rows + columns for rows, columns in self.projections())


def shape_of(config) -> Shape:
    """The shape that a config describes: a config.json as a dict, or transformers' config object.

    Raises:
        ValueError: it lacks a number that every decoder has.
    """
    if isinstance(config, dict):
        read = (config.get("text_config") or config).get
    else:  # by attribute: some architectures map their own names to these

        def read(key, default=None):
            return getattr(config.get_text_config(), key, default)

    wanted = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in wanted if not read(key)]
    if missing:
        raise ValueError(f"The model's config.json has no {', '.join(missing)}.")
    family, vocabulary, width, layers, heads = map(read, wanted)
    return Shape(
        family=family,
        vocabulary=vocabulary,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=read("num_key_value_heads") or heads,
        head=read("head_dim") or width // heads,
        inner=read("intermediate_size") or 4 * width,
        tied=read("tie_word_embeddings", family.startswith("gemma")),
        biased=bool(read("attention_bias")),
        softcap=bool(read("attn_logit_softcapping")),
        context=read("max_position_embeddings"),
    )
